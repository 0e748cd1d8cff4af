"""Stacks on a kernel whose overlay takes no mount that is attached nowhere, read only and to write to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.fds import close_all
from mountd.kernel.mount_info import listmount
from tests.container import USER, as_user
from tests.daemon import Daemon
from tests.e2e.calls import mount_fds
from tests.e2e.conftest import TMPFS_RULE, trusting
from tests.e2e.directories import rule
from tests.e2e.stacks.calls import ask, directory, user
from tests.images import build_image


@pytest.fixture
def layers(scratch: Path) -> Iterator[list[Path]]:
    place = scratch / "stacked"
    place.mkdir(mode=0o755)
    made = []
    for name, type in (("top", "erofs"), ("bottom", "squashfs")):
        tree = directory(place / name, {"both": name, name: name})
        made.append(build_image(type, tree, place / f"{name}.raw"))
    yield made
    shutil.rmtree(place)


def test_a_stack_of_images(scratch: Path, layers: list[Path]) -> None:
    daemon = Daemon(scratch / "stacks-daemon", trusting(scratch / "stacked"))
    before = len(listmount())
    for _ in range(2):
        reply = ask(daemon, layers)
        top = f"/proc/self/fd/{reply.mount.fileno()}"  # type: ignore[attr-defined]
        try:
            assert sorted(os.listdir(top)) == ["both", "bottom", "top"]
            assert Path(f"{top}/both").read_text() == "top"
        finally:
            close_all([reply.mount])  # type: ignore[attr-defined]
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log, daemon.log
    assert len(listmount()) == before
    shutil.rmtree(scratch / "stacks-daemon")


def test_tops(scratch: Path, layers: list[Path]) -> None:
    """In memory and in a directory, where it stays; by the names that the kernel has for what is open."""
    own = rule("own", '"caller"', ', access = "read-write"')
    daemon = Daemon(scratch / "tops-daemon", trusting(scratch / "stacked") + TMPFS_RULE + own)
    before = len(listmount())
    home = scratch / "home"
    # The root directory of the stack is the caller's there.
    for path in (home, home / "upper"):
        path.mkdir(mode=0o755)
        os.chown(path, USER, USER)
    fds = [os.open(path, os.O_RDONLY) for path in (*layers, home)]
    sources = [{"imageFileDescriptor": number} for number in range(2)]
    try:
        for found, top, kind in (
            (["both", "bottom", "top"], {"directoryFileDescriptor": 2}, "none"),
            (["both", "bottom", "made", "top"], {"directoryFileDescriptor": 2}, "none"),
            (["both", "bottom", "top"], {"sizeBytes": 1 << 20}, "caller"),
        ):
            with user():
                reply = mount_fds(
                    daemon.socket,
                    {"layers": sources, "top": top},
                    fds if "sizeBytes" not in top else fds[:2],
                    readOnly=False,
                    idMap={"kind": kind},
                )
            with reply.mount as mount:
                assert sorted(os.listdir(f"/proc/self/fd/{mount.fileno()}")) == found

                def work(fd: int = mount.fileno()) -> None:
                    os.close(os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=fd))

                as_user(work, USER)
    finally:
        for fd in fds:
            os.close(fd)
    assert (home / "upper/made").stat().st_uid == USER
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log, daemon.log
    assert len(listmount()) == before
    shutil.rmtree(home)
    shutil.rmtree(scratch / "tops-daemon")
