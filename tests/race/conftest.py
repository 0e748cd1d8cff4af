"""The two sides of each race: a directory that is root's alone, and one that is the attacker's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.race.swapping import ATTACKER, Ground

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.kernel)


@pytest.fixture
def ground() -> Iterator[Ground]:
    """Both sides on one file system, in a directory that is root's all the way up."""
    path = Path(tempfile.mkdtemp(prefix="mountd-race-", dir="/var/lib"))
    path.chmod(0o755)
    made = Ground(path / "trusted", path / "theirs")
    for side in (made.trusted, made.theirs):
        side.mkdir(mode=0o755)
    os.chown(made.theirs, ATTACKER, ATTACKER)
    yield made
    shutil.rmtree(path)
