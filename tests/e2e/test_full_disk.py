"""A runtime directory without room: what cannot be written down is refused, and nothing is left of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.kernel import mount_api
from mountd.kernel.flags import Unmount
from mountd.kernel.libc import call
from tests.container import as_user
from tests.daemon import Daemon
from tests.e2e.calls import mount, outcome
from tests.e2e.conftest import trusting
from tests.e2e.test_list import listed


@pytest.fixture
def full(place: Path, images: dict[str, Path]) -> Iterator[Daemon]:
    """A daemon that has just run out of space."""
    run = place / "full-disk/run"
    run.mkdir(parents=True)
    call("mount", b"mountd", bytes(run), b"tmpfs", 0, b"mode=0755,size=64k")
    daemon = Daemon(place / "full-disk", trusting(images["erofs"].parent))
    try:
        with open(run / "fill", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        yield daemon
    finally:
        assert daemon.stop() == 0
        mount_api.umount(str(run), Unmount.DETACH)


def test_a_mount_is_refused_by_name(full: Daemon, images: dict[str, Path]) -> None:
    def ask() -> tuple[str, str]:
        return outcome(lambda: mount(full.socket, images["squashfs"]).mount.close())

    expected = ("MountFailed", "mount failed: write(a record): ENOSPC")
    assert (as_user(ask), ask()) == (expected, expected)
    names = [name for _, _, files in os.walk(full.directory / "run/ledger") for name in files]
    places = [name for name in names if name.isdecimal()]
    assert (places, listed(full, everybody=True)) == ([], [])
    os.unlink(full.directory / "run/fill")
    assert as_user(ask)[0] == ""
    assert "internal error" not in full.log
