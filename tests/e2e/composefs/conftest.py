"""A composefs that a rule trusts, one whose objects are a user's, and a daemon."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container import USER
from tests.daemon import Daemon
from tests.e2e.composefs.trees import DESCRIPTIONS, Trees
from tests.e2e.conftest import trusting
from tests.rogue import eventually, settled


@pytest.fixture(scope="package")
def trees(place: Path) -> Iterator[Trees]:
    path = place / "composefs"
    path.mkdir(mode=0o755)
    yield Trees(path)
    shutil.rmtree(path)


@pytest.fixture(scope="package")
def one_daemon(place: Path, trees: Trees) -> Iterator[tuple[Daemon, dict[str, object]]]:
    daemon = Daemon(place / "composefs-daemon", trusting(trees.place) + DESCRIPTIONS)
    yield daemon, settled(daemon)
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


@pytest.fixture
def serving(one_daemon: tuple[Daemon, dict[str, object]]) -> Iterator[Daemon]:
    """The daemon; nothing is left of what it made, whatever came of it."""
    daemon, before = one_daemon
    yield daemon
    assert eventually(lambda: daemon.held() == before, 10), (before, daemon.held())


@pytest.fixture
def own(place: Path, trees: Trees) -> Iterator[Path]:
    """A directory of USER's with the objects, which are USER's as well."""
    path = Path(tempfile.mkdtemp(prefix="objects-", dir=place))
    shutil.copytree(trees.objects, path, dirs_exist_ok=True)
    for each in (path, *path.rglob("*")):
        os.chown(each, USER, USER)
        each.chmod(0o700 if each.is_dir() else 0o600)
    yield path
    shutil.rmtree(path)
