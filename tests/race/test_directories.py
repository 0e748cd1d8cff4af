"""Whose a directory is: exchanging what is above it does not make another one trusted."""

from __future__ import annotations

import os
from pathlib import Path

from mountd.caller.model import FOREIGN, Caller, UserNamespace
from mountd.evidence.directory import collect_ownership
from mountd.evidence.location import Walker
from mountd.evidence.model import Ownership
from mountd.fds import OwnedFd
from mountd.source.directory import inspect_directory
from tests.race.swapping import ATTACKER, Ground, Seen, loses, never_wins

HOST = UserNamespace(4, 1, (), (), 0, is_host=True)
CALLER = Caller(ATTACKER, ATTACKER, frozenset(), 7, HOST, ATTACKER)
BASE = FOREIGN.start


def made(path: Path, uid: int) -> Path:
    path.mkdir()
    os.chown(path, uid, uid)
    return path


def ownership(fd: int, walker: Walker) -> Ownership | None:
    return collect_ownership(fd, inspect_directory(fd, "directory"), CALLER, walker).ownership


def test_what_is_above_a_directory_of_roots(ground: Ground) -> None:
    """Both are root's themselves; only one lies where root alone could have put it."""
    good = made(made(ground.trusted / "a", 0) / "tree", 0)
    evil = made(made(ground.theirs / "a", ATTACKER) / "tree", 0)
    with (
        OwnedFd(os.open(good, os.O_RDONLY)) as trusted,
        OwnedFd(os.open(evil, os.O_RDONLY)) as theirs,
        Walker() as walker,
    ):

        def check() -> Seen:
            if ownership(theirs.fileno(), walker) is not Ownership.OTHER:
                return Seen.WON
            found = ownership(trusted.fileno(), walker)
            return Seen.GOOD if found is Ownership.ROOT else Seen.REFUSED

        never_wins(good.parent, evil.parent, check)


def above_a_foreign_one(ground: Ground) -> tuple[Path, Path, Path]:
    """What is exchanged, and a foreign directory that is root's to give: nothing above is the attacker's.

    The attacker exchanges its own with the one next to it, in a directory of its own.
    """
    kept = made(made(ground.trusted / "kept", 0) / "machine", BASE)
    one, other = made(ground.theirs / "one", ATTACKER), made(ground.theirs / "other", ATTACKER)
    return one, other, kept


def test_what_is_next_to_a_foreign_directory(ground: Ground) -> None:
    """By names the attacker's own would be found above it; the directory itself knows what it lies in."""
    one, other, kept = above_a_foreign_one(ground)
    own = made(one / "machine", BASE)
    with (
        OwnedFd(os.open(kept, os.O_PATH)) as theirs,
        OwnedFd(os.open(own, os.O_PATH)) as mine,
        Walker() as walker,
    ):

        def check() -> Seen:
            if ownership(theirs.fileno(), walker) is not Ownership.OTHER:
                return Seen.WON
            found = ownership(mine.fileno(), walker)
            return Seen.GOOD if found is Ownership.FOREIGN else Seen.REFUSED

        never_wins(one, other, check, refuses=False)


def test_a_naive_check_loses(ground: Ground) -> None:
    """The owner of what the path leads through, looked at by name, is that of another directory."""
    good = made(made(ground.trusted / "a", 0) / "tree", 0)
    evil = made(made(ground.theirs / "a", ATTACKER) / "tree", 0)
    with OwnedFd(os.open(evil, os.O_RDONLY)) as theirs:

        def check() -> Seen:
            owned = good.parent.stat().st_uid == 0
            same = os.path.samestat(good.stat(), os.fstat(theirs.fileno()))
            return Seen.WON if owned and same else Seen.REFUSED

        loses(good.parent, evil.parent, check)
