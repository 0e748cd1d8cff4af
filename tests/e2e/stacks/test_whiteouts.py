"""What hides what in a stack: whiteouts of both kinds, opaque directories, and both at several depths."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.e2e.calls import errno_of
from tests.e2e.stacks.calls import directory, mounted, names, read
from tests.e2e.stacks.conftest import OVERLAY
from tests.images import build_image


def whiteout(path: Path) -> None:
    """A whiteout as overlayfs makes it itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


def attribute_whiteout(path: Path, name: str = f"{OVERLAY}.whiteout") -> None:
    """One for where no device can be made (Linux 6.7): an empty file that says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.setxattr(path, name, b"y")


@pytest.fixture(scope="module")
def hiding(place: Path, layers: dict[str, Path]) -> Iterator[list[Path]]:
    """Three layers, the topmost first."""
    work = place / "hiding"
    bottom = directory(
        work / "bottom",
        {
            **{
                f"{each}/old": "bottom"
                for each in ("again", "deep/opaque", "deep/whole", "marked", "unmarked")
            },
            "again/below/older": "bottom",
            "users/old": "bottom",
            "a-file": "bottom",
            "a-directory/in": "bottom",
        },
    )
    middle = directory(work / "middle", {"deep/opaque/middle": "middle", "back": "middle"})
    os.setxattr(middle / "deep/opaque", f"{OVERLAY}.opaque", b"y")
    whiteout(middle / "a-file")
    whiteout(middle / "a-directory")
    whiteout(middle / "deep/whole")
    top = directory(work / "top", {"deep/opaque/top": "top", "again/new": "top", "a-directory/new": "top"})
    os.setxattr(top / "again", f"{OVERLAY}.opaque", b"y")
    whiteout(top / "back")
    attribute_whiteout(top / "marked/old")
    os.setxattr(top / "marked", f"{OVERLAY}.opaque", b"x")
    attribute_whiteout(top / "unmarked/old")
    attribute_whiteout(top / "users/old", "user.overlay.whiteout")
    os.setxattr(top / "users", "user.overlay.opaque", b"x")
    trees = {"erofs": top, "squashfs": middle, "ext4": bottom}
    at = place / "stacked"
    made = [build_image(type, tree, at / f"{tree.name}-hiding.raw") for type, tree in trees.items()]
    subprocess.run(["sync"], check=True)
    yield made
    shutil.rmtree(work)
    for each in made:
        each.unlink()


def test_a_whiteout_hides_what_is_below_it_and_nothing_above(serving: Daemon, hiding: list[Path]) -> None:
    with mounted(serving, hiding) as reply:
        shown = names(reply.mount)
        assert {"a-file", "back"}.isdisjoint(shown)
        assert names(reply.mount, "deep") == {"opaque"}
        # Hidden by the middle one, and there again in the top.
        assert names(reply.mount, "a-directory") == {"new"}
        for name in ("a-file", "back", "deep/whole/old", "a-directory/in"):
            assert errno_of(lambda n=name: os.stat(n, dir_fd=reply.mount.fileno())) == "ENOENT"  # type: ignore[misc]
    with mounted(serving, hiding[1:]) as reply:
        assert read(reply.mount, "back") == "middle"
    with mounted(serving, [hiding[0], hiding[2]]) as reply:
        assert read(reply.mount, "a-file") == "bottom"
        assert names(reply.mount, "a-directory") == {"in", "new"}


def test_an_opaque_directory_ends_the_search(serving: Daemon, hiding: list[Path]) -> None:
    """Also in the middle: what is above it is merged with it, and what is below is not."""
    with mounted(serving, hiding) as reply:
        assert names(reply.mount, "deep/opaque") == {"top", "middle"}
        assert names(reply.mount, "again") == {"new"}
        assert errno_of(lambda: os.stat("again/below/older", dir_fd=reply.mount.fileno())) == "ENOENT"


def test_whiteouts_that_are_attributes(serving: Daemon, hiding: list[Path]) -> None:
    """They count in a directory that says that there are some, where root alone can have made them."""
    with mounted(serving, hiding) as reply:
        assert names(reply.mount, "marked") == set()
        assert errno_of(lambda: os.stat("marked/old", dir_fd=reply.mount.fileno())) == "ENOENT"
        for directory_name in ("unmarked", "users"):
            assert names(reply.mount, directory_name) == {"old"}
        assert read(reply.mount, "users/old") == ""
