"""Layers of three file systems, and a daemon that trusts them."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.e2e.conftest import trusting
from tests.e2e.loops import wait_until_dropped
from tests.e2e.stacks.calls import directory
from tests.images import build_image
from tests.rogue import eventually, settled

OVERLAY = "trusted.overlay"


@pytest.fixture(scope="package")
def layers(place: Path) -> Iterator[dict[str, Path]]:
    """An image each of erofs (topmost), squashfs and ext4 (lowest), where a rule trusts them."""
    trusted = place / "stacked"
    trusted.mkdir(mode=0o755)
    work = Path(tempfile.mkdtemp(prefix="stacks-", dir=place))
    top = directory(work / "top", {"both": "top", "top": "top", "opaque/new": "top", "merged/top": "top"})
    os.mknod(top / "gone", stat.S_IFCHR, os.makedev(0, 0))
    os.setxattr(top / "opaque", f"{OVERLAY}.opaque", b"y")
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    # What would show something else than what is there, if it were heeded.
    directory(top, {"meta": "", "also-meta": "", "redirected/own": "top"})
    os.setxattr(top / "meta", f"{OVERLAY}.metacopy", b"")
    os.setxattr(top / "meta", f"{OVERLAY}.redirect", b"/secret")
    os.setxattr(top / "also-meta", f"{OVERLAY}.metacopy", b"")
    os.setxattr(top / "redirected", f"{OVERLAY}.redirect", b"/merged")
    directory(top, {"users/file": "top"})
    os.setxattr(top / "users", "user.overlay.opaque", b"y")
    middle = directory(
        work / "middle", {"both": "middle", "gone": "middle", "merged/middle": "middle", "users/low": "m"}
    )
    (middle / "private").write_text("of 1000\n")
    (middle / "private").chmod(0o600)
    os.chown(middle / "private", 1000, 1000)
    bottom = directory(
        work / "bottom",
        {"both": "bottom", "opaque/old": "b", "merged/bottom": "b", "secret": "s", "also-meta": "below"},
    )
    made = {
        type: build_image(type, tree, trusted / f"{tree.name}.raw")
        for type, tree in (("erofs", top), ("squashfs", middle), ("ext4", bottom))
    }
    subprocess.run(["sync"], check=True)
    yield made
    shutil.rmtree(work)
    shutil.rmtree(trusted)


@pytest.fixture(scope="package")
def one_daemon(place: Path, layers: dict[str, Path]) -> Iterator[tuple[Daemon, dict[str, object]]]:
    """A daemon, and what it held in the beginning."""
    daemon = Daemon(place / "stacks", trusting(place / "stacked"))
    yield daemon, settled(daemon)
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


@pytest.fixture
def serving(one_daemon: tuple[Daemon, dict[str, object]], layers: dict[str, Path]) -> Iterator[Daemon]:
    """The daemon; nothing is left of what it made, whatever came of it."""
    daemon, before = one_daemon
    yield daemon
    assert eventually(lambda: daemon.held() == before, 10), (before, daemon.held())
    for image in layers.values():
        wait_until_dropped(image)
