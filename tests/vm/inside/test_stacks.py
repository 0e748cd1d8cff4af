"""Stacks on a kernel whose overlay takes no mount that is attached nowhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.fds import close_all
from mountd.kernel.mount_info import listmount
from tests.daemon import Daemon
from tests.e2e.conftest import trusting
from tests.e2e.test_stacks import ask, directory
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
