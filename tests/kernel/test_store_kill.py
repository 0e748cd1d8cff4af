"""A process that is killed, wherever it is, leaves a store that is whole."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.errors import NotFound
from mountd.store import disk
from mountd.store.record import Owner
from mountd.store.store import Store
from tests.store import OTHER, USER, content, digest_of, files, put, tree

MIB = 1 << 20
OLD, NEW = content(5000), content(3 * MIB + 5, 2)
RANDOM_KILLS = 150


def killed(work: Callable[[], object], after: int | None = None, seconds: float = 0.0) -> bool:
    """Run `work` in a child that is killed at its step `after`, or after a time; tell whether it was."""
    pid = os.fork()
    if pid == 0:
        code = 1
        left = after

        def count(step: str) -> None:
            nonlocal left
            if left is not None:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        try:
            disk.reached.append(count)
            work()
            code = 0
        finally:
            os._exit(code)
    if after is None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def consistent(home: Path, store: Store, *possible: bytes) -> set[str]:
    """Check that each image that can be found is whole, that nothing else is there; return their digests."""
    for data in possible:
        # What can be found is whole already, before anything is swept.
        try:
            store.verify(digest_of(data), Owner(0, 0))
        except NotFound:
            continue
    store.prepare()
    found = {record.digest for record in store.records()}
    assert found <= {digest_of(data) for data in possible}
    assert tree(home) == files(*found)
    for digest in found:
        store.verify(digest, Owner(0, 0))
    return found


@pytest.fixture
def home(scratch: Path, request: pytest.FixtureRequest) -> Path:
    path = scratch / f"kill-{request.node.name[:60]}"
    path.mkdir()
    return path


@pytest.fixture
def store(home: Path) -> Store:
    made = Store(home / "state")
    made.prepare()
    put(made, OLD)
    put(made, OLD, OTHER)
    return made


def each_step(work: Callable[[], object], check: Callable[[bool], object], least: int) -> None:
    """Kill `work` at each step, one after the other, until it comes to its end."""
    for step in range(100):
        if not killed(work, after=step):
            assert step >= least, "there are more steps than that"
            check(True)
            return
        check(False)
    pytest.fail("it never ends")


def test_an_import(home: Path, store: Store) -> None:
    def check(ended: bool) -> None:
        found = consistent(home, store, OLD, NEW)
        assert digest_of(OLD) in found
        assert not ended or digest_of(NEW) in found
        # It can be imported again, whatever happened before.
        assert put(store, NEW).digest == digest_of(NEW)
        store.remove(digest_of(NEW), USER.uid)

    each_step(lambda: put(store, NEW), check, least=8)


def test_an_import_over_what_another_one_left(home: Path, store: Store) -> None:
    """Without a sweep in between but its own."""
    step = 0
    while killed(lambda: put(store, NEW), after=step):
        step += 1
    assert step >= 8
    assert consistent(home, store, OLD, NEW) == {digest_of(OLD), digest_of(NEW)}


def test_an_import_of_what_is_there(home: Path, store: Store) -> None:
    third = Owner(1002, 1002)

    def check(ended: bool) -> None:
        assert consistent(home, store, OLD) == {digest_of(OLD)}
        owners = store.record(digest_of(OLD)).owners
        assert owners == (USER, OTHER, third) or (not ended and owners == (USER, OTHER))
        if third in owners:
            store.remove(digest_of(OLD), third.uid)

    each_step(lambda: put(store, OLD, third), check, least=6)


def test_a_removal(home: Path, store: Store) -> None:
    def check(ended: bool) -> None:
        found = consistent(home, store, OLD)
        assert not ended or found == set()
        put(store, OLD)

    each_step(lambda: store.remove(digest_of(OLD), 0), check, least=4)


def test_a_removal_by_one_of_two(home: Path, store: Store) -> None:
    def check(ended: bool) -> None:
        assert consistent(home, store, OLD) == {digest_of(OLD)}
        owners = store.record(digest_of(OLD)).owners
        assert OTHER in owners
        assert not ended or USER not in owners
        put(store, OLD)

    each_step(lambda: store.remove(digest_of(OLD), USER.uid), check, least=4)


def test_a_garbage_collection(home: Path, store: Store) -> None:
    def check(ended: bool) -> None:
        found = consistent(home, store, OLD, NEW)
        assert not ended or found == set()
        put(store, OLD)
        put(store, NEW)

    put(store, NEW)
    each_step(lambda: store.collect_garbage(maximum_age=0), check, least=8)


def test_at_any_moment(home: Path, store: Store) -> None:
    """Kills at random times, with everything going on at once."""
    seed = random.randrange(1 << 32)
    choose = random.Random(seed)  # noqa: S311 - where to kill is no secret
    works: list[Callable[[], object]] = [
        lambda: put(store, NEW),
        lambda: put(store, OLD, OTHER),
        lambda: store.remove(digest_of(NEW), 0),
        lambda: store.collect_garbage(maximum_age=0),
    ]
    ends = 0
    for turn in range(RANDOM_KILLS):
        work = choose.choice(works)
        ends += not killed(lambda work=work: ignoring(work), seconds=choose.random() * 0.02)  # type: ignore[misc]
        if turn % 10 == 9:
            consistent(home, store, OLD, NEW)
    consistent(home, store, OLD, NEW)
    assert 0 < ends < RANDOM_KILLS, f"all or none were killed in time (seed {seed})"
    put(store, NEW)


def ignoring(work: Callable[[], object]) -> None:
    try:
        work()
    except NotFound:
        return


def test_imports_at_the_same_time(home: Path, store: Store) -> None:
    """Of the same and of different bytes, while another one collects garbage."""
    made = [content(MIB + each, each + 3) for each in range(3)]

    def worker(number: int) -> None:
        for turn in range(6):
            put(store, made[(number + turn) % 3], Owner(number, number))
            store.collect_garbage(maximum_age=3600)

    children = []
    for number in range(4):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                worker(2000 + number)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    assert consistent(home, store, OLD, *made) == {digest_of(data) for data in (OLD, *made)}
    for data in made:
        assert {owner.uid for owner in store.record(digest_of(data)).owners} == {2000, 2001, 2002, 2003}
