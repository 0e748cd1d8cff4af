"""mountctl image, as installed."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.store.store import Store
from tests.daemon import Daemon
from tests.e2e.stored import MIB, digest_of
from tests.programs import Done, check_line, run


class TestCommandLine:
    """mountctl image, as installed."""

    @pytest.fixture
    def mountctl(self, daemon: Daemon, installed: Path, clean: Store) -> Callable[..., Done]:
        return lambda *arguments: run([installed / "bin/mountctl", "image", *arguments], daemon.socket)

    def test_all_verbs(self, mountctl: Callable[..., Done], images: dict[str, Path]) -> None:
        digest = digest_of(images["erofs"])
        done = mountctl("import", images["erofs"], "--name", "base image")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{digest}\n", "")
        done = mountctl("list")
        assert done.stdout.split() == [digest, *size_words(images["erofs"]), "erofs", "base", "image"]
        listed = json.loads(mountctl("list", "--json").stdout)["images"]
        assert [each["digest"] for each in listed] == [digest]
        assert f"digest: {digest}" in mountctl("inspect", digest).stdout.splitlines()
        assert mountctl("verify", f"stored:{digest}").stdout == f"{digest} is as it was stored\n"
        assert json.loads(mountctl("verify", "--json", digest).stdout) == {"image": listed[0]}
        assert mountctl("gc").stdout == "0 bytes freed\n"
        assert json.loads(mountctl("gc", "--age", "1d", "--json").stdout)["removed"] == []
        assert mountctl("remove", digest).returncode == 0
        assert mountctl("list").stdout == ""

    def test_failures_are_one_line(self, mountctl: Callable[..., Done], place: Path) -> None:
        missing = "sha256:" + "0" * 64
        for verb in ("inspect", "verify", "remove"):
            done = mountctl(verb, missing)
            assert done.returncode == 1
            check_line(done, f"not found: the stored image {missing}.*hint: ")
        check_line(mountctl("import", place / "nothing"), "not found: ")
        check_line(
            mountctl("import", place), "bad file descriptor in imageFileDescriptor: it is a directory"
        )
        done = mountctl("inspect", "x", "--json")
        assert json.loads(done.stdout)["parameters"]["parameter"] == "digest"

    def test_progress_on_a_terminal(
        self, daemon: Daemon, installed: Path, place: Path, clean: Store
    ) -> None:
        path = place / "large"
        with path.open("wb") as file:
            file.truncate(768 * MIB)
        ours, theirs = pty.openpty()
        try:
            program = installed / "bin/mountctl"
            done = run([program, "image", "import", path], daemon.socket, capture_output=False,
                       stdout=subprocess.PIPE, stderr=theirs)  # fmt: skip
            shown = os.read(ours, 65536).decode()
        finally:
            os.close(ours)
            os.close(theirs)
        assert re.search(r"\rimporting: \d+ % of 768\.0 MiB\x1b\[K", shown)
        assert shown.endswith("\r\x1b[K")
        assert done.stdout.startswith("sha256:")
        path.unlink()

    def test_a_bar_where_there_is_room(
        self, daemon: Daemon, installed: Path, place: Path, clean: Store
    ) -> None:
        path = place / "large for a bar"
        with path.open("wb") as file:
            file.truncate(768 * MIB)
        program = installed / "bin/mountctl"
        digest = run([program, "image", "import", path], daemon.socket).stdout.strip()
        for columns, bar in ((80, r"\[#*-*\] "), (45, r"\[[#-]{5,}\] "), (20, "")):
            ours, theirs = pty.openpty()
            try:
                fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("=HHHH", 24, columns, 0, 0))
                run([program, "image", "verify", digest], daemon.socket, capture_output=False,
                    stdout=subprocess.PIPE, stderr=theirs)  # fmt: skip
                shown = os.read(ours, 65536).decode()
            finally:
                os.close(ours)
                os.close(theirs)
            lines = re.findall(rf"\r(verifying: {bar}\d+ % of 768\.0 MiB)\x1b\[K", shown)
            assert lines, shown
            assert all(len(line) < max(columns, 30) for line in lines)
        path.unlink()


def size_words(path: Path) -> list[str]:
    return f"{path.stat().st_size / 1024:.1f} KiB".split()
