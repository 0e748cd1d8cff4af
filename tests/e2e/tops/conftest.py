"""Images to write over, directories to write to, and a daemon that lets it be done."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.e2e.conftest import trusting
from tests.e2e.directories import rule
from tests.e2e.stacks.calls import directory
from tests.e2e.tops.calls import INNER_ROOT
from tests.e2e.tops.changes import FILE_CAPABILITY, SETUID
from tests.e2e.tops.rules import LIMITED, MEMORY_RULE, WRITABLE
from tests.images import build_image
from tests.layered import rule as of_registry
from tests.rogue import eventually, settled


@pytest.fixture(scope="package")
def images(place: Path) -> Iterator[list[Path]]:
    """Two images, the topmost first, where a rule trusts them."""
    trusted = place / "topped"
    trusted.mkdir(mode=0o755)
    work = Path(tempfile.mkdtemp(prefix="tops-", dir=place))
    above = directory(work / "above", {"both": "above", "gone": "above", "dir/a": "above"})
    below = directory(
        work / "below", {"both": "below", "etc/passwd": "below", "dir/b": "below", "suid": "", "of-33": "33"}
    )
    (below / "suid").chmod(SETUID)
    os.setxattr(below / "etc/passwd", "security.capability", FILE_CAPABILITY)
    os.chown(below / "of-33", 33, 33)
    (below / "everybodys").write_text("root's")
    (below / "everybodys").chmod(0o666)
    (below / "all").mkdir()
    (below / "all").chmod(0o777)
    os.mknod(below / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    made = [
        build_image(type, tree, trusted / tree.name) for type, tree in (("erofs", above), ("ext4", below))
    ]
    yield made
    shutil.rmtree(work)
    shutil.rmtree(trusted)


@pytest.fixture(scope="package")
def one_daemon(place: Path, images: list[Path]) -> Iterator[tuple[Daemon, dict[str, object]]]:
    policy = (
        LIMITED
        + trusting(place / "topped")
        + MEMORY_RULE
        + rule("shown", '"root"', image=f', location = "{place}/shown/*"')
        + rule("own", '"caller", "foreign"', WRITABLE)
        + of_registry()
    )
    daemon = Daemon(place / "tops", policy)
    yield daemon, settled(daemon)
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log, daemon.log


@pytest.fixture
def serving(one_daemon: tuple[Daemon, dict[str, object]]) -> Iterator[Daemon]:
    """The daemon; nothing is left of what it made, whatever came of it."""
    daemon, before = one_daemon
    yield daemon
    assert eventually(lambda: daemon.held() == before, 10), (before, daemon.held())


@pytest.fixture
def home(place: Path) -> Iterator[Path]:
    """A directory that belongs to the root of a container, alone to read."""
    path = Path(tempfile.mkdtemp(prefix="top-", dir=place))
    os.chown(path, INNER_ROOT, INNER_ROOT)
    yield path
    shutil.rmtree(path)
