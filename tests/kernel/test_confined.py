"""An image that nobody vouches for is recognised by a child that has nothing and gets nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mountd.errors import InvalidImage, UnsupportedFileSystem
from mountd.fds import OwnedFd
from mountd.kernel import libc
from mountd.kernel.flags import Clone
from mountd.source import confined
from mountd.source.model import FileSystem
from tests.disks import Part, build_disk
from tests.images import build_image
from tests.process import in_child

LUKS = b"LUKS\xba\xbe\0\x02"
FOUND = FileSystem("ext4", 1, 1, None, None, False)


def confine(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object]) -> FileSystem:
    """Recognise an image confined, with `act` instead of the parser; it gets the image's descriptor."""
    with OwnedFd(os.open("/etc/passwd", os.O_RDONLY)) as fd:
        number = fd.fileno()

        def recognise(*_: object) -> FileSystem:
            act(number)
            return FOUND

        monkeypatch.setattr(confined, "recognise", recognise)
        return confined.recognise_image(number, 1, confined=True)


def test_the_confined_child_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from outside, while it waits for the image, which is a pipe here."""
    reader, writer = os.pipe()
    monkeypatch.setattr(confined, "recognise", lambda *_: os.read(reader, 1) and FOUND)
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if confined.recognise_image(reader, 1, confined=True) == FOUND else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + 5
    while True:
        assert time.monotonic() < deadline
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children and "Seccomp:\t2" in Path(f"/proc/{children[0]}/status").read_text():
            break
        time.sleep(0.01)
    lines = Path(f"/proc/{children[0]}/status").read_text().splitlines()
    held = len(os.listdir(f"/proc/{children[0]}/fd"))
    limits = Path(f"/proc/{children[0]}/limits").read_text()
    not_dumpable = os.stat(f"/proc/{children[0]}/environ").st_uid
    os.write(writer, b"x")
    os.close(writer)
    os.close(reader)
    _, code = os.waitpid(pid, 0)
    status = dict(line.split(":\t", 1) for line in lines)
    nothing, nobody = f"{0:016x}", "\t".join(["65534"] * 4)
    assert code == 0
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {nothing}
    assert (status["Uid"], status["Gid"], status["Groups"].strip()) == (nobody, nobody, "")
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert held == 2  # the image, and the way to tell
    assert not_dumpable == 0
    for limit in ("Max open files", "Max file size", "Max core file size"):
        (line,) = [line for line in limits.splitlines() if line.startswith(limit)]
        assert line.split()[-3:-1] == ["0", "0"]


def burn(_: int) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda _: os.getppid(), "within the limits"),
        (lambda _: os.open("/etc/passwd", os.O_RDONLY), "within the limits"),
        (lambda _: socket.socket(socket.AF_UNIX), "within the limits"),
        (lambda _: os.fork(), "within the limits"),
        (lambda _: os.execv("/bin/true", ["true"]), "within the limits"),
        (lambda _: os.kill(1, 0), "within the limits"),
        (lambda _: os.setresuid(0, 0, 0), "within the limits"),
        (lambda _: libc.call("prctl", 22, 0, 0, 0, 0), "within the limits"),
        (lambda _: libc.call("unshare", Clone.NEWUSER), "within the limits"),
        (burn, "within the limits"),
        (lambda _: bytearray(1 << 30), "MemoryError"),
        (lambda _: 1 // 0, "ZeroDivisionError"),
    ],
)
def test_the_confined_child_ends_at_anything_else(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object], text: str
) -> None:
    with pytest.raises(InvalidImage, match=text):
        confine(monkeypatch, act)


def test_what_the_confined_child_says(monkeypatch: pytest.MonkeyPatch, images: dict[str, Path]) -> None:
    assert confine(monkeypatch, lambda fd: os.pread(fd, 10, 0)) == FOUND

    def refuse(error: Exception) -> Callable[[int], None]:
        def act(_: int) -> None:
            raise error

        return act

    for error in (InvalidImage("why", offset=7), UnsupportedFileSystem("why", file_system_type="ntfs")):
        with pytest.raises(type(error), match="why") as raised:
            confine(monkeypatch, refuse(error))
        assert raised.value.parameters == error.parameters
    monkeypatch.setattr(confined, "recognise", lambda *_: replace(FOUND, label="x" * (1 << 20)))
    with pytest.raises(InvalidImage, match="within the limits"):
        confined.recognise_image(0, 1, confined=True)
    monkeypatch.undo()
    for kind, image in images.items():
        with OwnedFd(os.open(image, os.O_RDONLY)) as fd:
            found = [
                confined.recognise_image(fd.fileno(), image.stat().st_size, confined=each)
                for each in (True, False)
            ]
        assert found[0] == found[1]
        assert found[0].type == kind


def test_an_image_that_cannot_be_read() -> None:
    """A file of /proc has a size of 0 and refuses to be read, here through what nothing can read."""

    def work() -> None:
        with OwnedFd(os.open("/proc/self/mem", os.O_RDONLY)) as fd:
            for each in (True, False):
                with pytest.raises(InvalidImage, match="cannot be read|could not be read"):
                    confined.recognise_image(fd.fileno(), 4096, confined=each)

    in_child(work)


def test_a_disk_image_is_read_by_a_process_that_has_read_none_before(tmp_path: Path) -> None:
    """What a parser needs for the first time cannot be imported any more."""
    tree = tmp_path / "tree"
    tree.mkdir()
    root = build_image("erofs", tree, tmp_path / "root.raw")
    image = build_disk(tmp_path / "disk.raw", [Part("root", root, label="name"), Part("home", LUKS)])
    script = (
        "import os, sys; from mountd.source.confined import recognise_source;"
        "fd = os.open(sys.argv[1], os.O_RDONLY); size = os.fstat(fd).st_size;"
        "found = recognise_source(fd, size, confined=True);"
        "assert found == recognise_source(fd, size, confined=False);"
        "print(*((each.label, each.contents) for each in found.partitions))"
    )
    done = subprocess.run([sys.executable, "-c", script, image], capture_output=True, text=True, check=False)
    assert done.stdout == "('name', None) ('', 'crypto_LUKS')\n", done.stderr
