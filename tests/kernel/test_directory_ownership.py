"""Whose a directory of the foreign range is: the way up to one of the caller's, and where it ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mountd.caller.model import FOREIGN, Caller, UserNamespace
from mountd.evidence import directory as evidence
from mountd.evidence.directory import MAXIMUM_LEVELS, collect_ownership
from mountd.evidence.location import Walker
from mountd.evidence.model import Ownership
from mountd.fds import OwnedFd
from mountd.kernel.cloning import open_parent
from mountd.source.directory import inspect_directory

USER = 4260
HOST = UserNamespace(4, 1, (), (), 0, is_host=True)
CALLER = Caller(USER, USER, frozenset(), 7, HOST, USER)
BASE = FOREIGN.start


def chain(top: Path, *owners: int) -> Path:
    """Directories below each other, which belong to `owners` from the top down; the last one."""
    path = top
    for number, owner in enumerate(owners):
        path = path / f"level-{number}"
        path.mkdir()
        os.chown(path, owner, owner)
    return path


def judged(path: Path) -> tuple[Ownership | None, str]:
    with OwnedFd(os.open(path, os.O_PATH)) as fd, Walker() as walker:
        found = collect_ownership(fd.fileno(), inspect_directory(fd.fileno(), "directory"), CALLER, walker)
    return found.ownership, found.ownership_problem or ""


@pytest.fixture
def top(home: Path) -> Path:
    os.chown(home, USER, USER)
    return home


@pytest.mark.parametrize("levels", [1, 2, MAXIMUM_LEVELS])
def test_as_far_up_as_is_looked(top: Path, levels: int) -> None:
    assert judged(chain(top, *[BASE] * levels)) == (Ownership.FOREIGN, "")


def test_no_farther(top: Path) -> None:
    ownership, problem = judged(chain(top, *[BASE] * (MAXIMUM_LEVELS + 1)))
    assert ownership is Ownership.OTHER
    assert problem.endswith(f"within {MAXIMUM_LEVELS} levels")


@pytest.mark.parametrize("between", [0, USER + 1, FOREIGN.stop])
def test_what_is_between_them_is_foreign_as_well(top: Path, between: int) -> None:
    """Whoever owns it could have moved there what is somebody else's."""
    ownership, problem = judged(chain(top, BASE, between, BASE))
    assert ownership is Ownership.OTHER
    assert problem.endswith(f"below the first that is uid {between}'s")


def test_it_is_moved_away_on_the_way_up(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way up is that of the directory, and not of what lies at its path by now."""
    theirs = top / "theirs"
    os.rename(chain(top, USER + 1), theirs)
    below = chain(top, BASE, BASE, BASE)
    moved = []

    def open_parent_and_move(fd: int, uid: int) -> OwnedFd:
        above = open_parent(fd, uid)
        if not moved:
            moved.append(os.rename(top / "level-0" / "level-1", theirs / "elsewhere"))
            chain(top / "level-0", BASE, BASE)
        return above

    monkeypatch.setattr(evidence, "open_parent", open_parent_and_move)
    ownership, problem = judged(below)
    assert moved
    assert ownership is Ownership.OTHER
    assert problem.endswith(f"below the first that is uid {USER + 1}'s")
