"""A refused request never reaches the kernel: no file system is opened, no loop device looked for."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container import as_user
from tests.daemon import Daemon
from tests.e2e.calls import mount, mount_fds, outcome

TRACED = "trace=fsopen,fsconfig,fsmount,fspick,mount,open_tree,openat,openat2,ioctl"
REACHED = re.compile(r"\b(fsopen|fsconfig|fsmount|fspick|mount)\(|(LOOP_\w+|DM_\w+|/dev/(?:loop|mapper))")


@contextlib.contextmanager
def traced(daemon: Daemon, log: Path) -> Iterator[None]:
    """Have all that the fork server's processes ask of the kernel written to `log`."""
    before = {daemon.fork_server, *daemon.workers}
    who = [word for pid in before for word in ("-p", str(pid))]
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-e", TRACED, "-e", "signal=none", "-o", log, *who], stdin=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 10
        while not all(f"TracerPid:\t{tracer.pid}\n" in status(pid) for pid in before):
            assert tracer.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(20)


def status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def reached(log: Path) -> set[str]:
    return {call or name for call, name in REACHED.findall(log.read_text())}


@pytest.fixture
def ambiguous(images: dict[str, Path], place: Path) -> Iterator[Path]:
    """An ext4 with the superblock of a squashfs before its own, where it has nothing."""
    path = place / "trusted/two.raw"
    data = bytearray(images["ext4"].read_bytes())
    squashfs = images["squashfs"].read_bytes()
    data[:96] = squashfs[:96]
    path.write_bytes(data)
    yield path
    path.unlink()


def test_what_is_allowed_reaches_it(daemon: Daemon, images: dict[str, Path], tmp_path: Path) -> None:
    """So that the other test can fail."""
    with traced(daemon, tmp_path / "log"):
        for type in ("erofs", "ext4"):
            found = as_user(lambda type=type: outcome(lambda: mount(daemon.socket, images[type])))  # type: ignore[misc]
            assert found == ("", "")
    assert {"fsopen", "fsconfig", "fsmount", "LOOP_CONFIGURE", "LOOP_CTL_GET_FREE"} <= reached(
        tmp_path / "log"
    )


def test_what_is_refused_does_not(
    daemon: Daemon, images: dict[str, Path], ambiguous: Path, place: Path, tmp_path: Path
) -> None:
    untrusted = place / "untrusted.raw"
    untrusted.write_bytes(images["ext4"].read_bytes())
    untrusted.chmod(0o666)
    signature = base64.b64encode(b"\x30" * 80).decode()

    def ask(source: dict[str, object], path: Path, **fields: object) -> str:
        def asked() -> str:
            fd = os.open(path, os.O_RDONLY)
            try:
                return outcome(lambda: mount_fds(daemon.socket, source, [fd], **fields))[0]
            finally:
                os.close(fd)

        return as_user(asked)

    plain: dict[str, object] = {"imageFileDescriptor": 0}
    with traced(daemon, tmp_path / "log"):
        found = [
            ask(plain, untrusted),
            ask({**plain, "signature": signature}, untrusted),
            ask(plain, ambiguous),
            ask(plain, images["ext4"], options=["suid"]),
            ask(plain, images["ext4"], imagePolicy="root=signed"),
            as_user(lambda: outcome(lambda: mount(daemon.socket, "tmpfs:1G"))[0]),
        ]
    assert found == [
        "DeniedByPolicy",
        "DeniedByPolicy",
        "InvalidImage",
        "OptionNotPermitted",
        "DeniedByPolicy",
        "LimitExceeded",
    ]
    assert "openat" in (tmp_path / "log").read_text()
    assert reached(tmp_path / "log") == set()
    untrusted.unlink()
