"""Who has to wait for whom."""

from __future__ import annotations

from typing import cast

import pytest

from mountd.daemon.connection import Connection
from mountd.daemon.limits import MAXIMUM_RUNNING_PER_OWNER, MAXIMUM_STUCK_PER_OWNER
from mountd.daemon.owners import FairQueue, Owner


class Waiting:
    def __init__(self, owner: Owner, name: str) -> None:
        self.owner = owner
        self.name = name


@pytest.fixture
def queue() -> FairQueue:
    return FairQueue()


def add(queue: FairQueue, uid: int, *names: str) -> None:
    for name in names:
        queue.add(cast("Connection", Waiting(queue.owner((uid, 0)), name)))


def order(queue: FairQueue, *, run: bool = False) -> list[str]:
    names = []
    while (connection := queue.next()) is not None:
        waiting = cast("Waiting", connection)
        waiting.owner.running += run
        names.append(waiting.name)
    return names


def test_owners_take_turns(queue: FairQueue) -> None:
    add(queue, 1, "a1", "a2", "a3")
    add(queue, 2, "b1")
    add(queue, 3, "c1", "c2")
    assert order(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert queue.waiting == 0


def test_who_comes_later_is_not_behind_a_crowd(queue: FairQueue) -> None:
    add(queue, 1, *(f"a{n}" for n in range(100)))
    assert cast("Waiting", queue.next()).name == "a0"
    add(queue, 2, "b")
    assert [cast("Waiting", queue.next()).name for _ in range(2)] == ["a1", "b"]


def test_who_has_enough_running_waits_and_others_do_not(queue: FairQueue) -> None:
    add(queue, 1, *(f"a{n}" for n in range(MAXIMUM_RUNNING_PER_OWNER + 2)))
    add(queue, 2, "b")
    taken = order(queue, run=True)
    assert len([name for name in taken if name.startswith("a")]) == MAXIMUM_RUNNING_PER_OWNER
    assert "b" in taken
    assert queue.waiting == 2
    queue.owner((1, 0)).running -= 1
    assert len(order(queue, run=True)) == 1


def test_drain_takes_everything(queue: FairQueue) -> None:
    add(queue, 1, "a1", "a2")
    add(queue, 2, "b1")
    assert len(queue.drain()) == 3
    assert queue.next() is None
    assert queue.waiting == 0


def test_an_idle_owner_is_forgotten_and_no_other(queue: FairQueue) -> None:
    for attribute in ("connections", "running", "stuck"):
        owner = queue.owner((7, 0))
        setattr(owner, attribute, 1)
        queue.forget_if_idle(owner)
        assert queue.owner((7, 0)) is owner
        setattr(owner, attribute, 0)
        queue.forget_if_idle(owner)
        assert queue.owner((7, 0)) is not owner


def test_in_a_crowd_only_who_has_nothing_gets_a_turn(queue: FairQueue) -> None:
    add(queue, 1, "a1", "a2")
    assert order(queue, run=True) == ["a1", "a2"]
    add(queue, 1, "a3")
    add(queue, 2, "b1", "b2")
    assert queue.idle_owners == 1
    first = cast("Waiting", queue.next(only_idle_owners=True))
    first.owner.running += 1
    assert first.name == "b1"
    assert queue.idle_owners == 0
    assert queue.next(only_idle_owners=True) is None
    assert order(queue) == ["a3", "b2"]


def test_in_a_crowd_a_refusal_has_its_turn(queue: FairQueue) -> None:
    queue.owner((1, 0)).stuck = MAXIMUM_STUCK_PER_OWNER
    add(queue, 1, "a")
    assert cast("Waiting", queue.next(only_idle_owners=True)).name == "a"


def test_where_no_more_may_hang_who_has_one_is_refused(queue: FairQueue) -> None:
    queue.owner((1, 0)).stuck = 1
    add(queue, 1, "a")
    assert queue.next(only_idle_owners=True) is None
    assert cast("Waiting", queue.next(only_idle_owners=True, most_stuck=1)).name == "a"


def test_of_root_each_namespace_is_an_owner(queue: FairQueue) -> None:
    assert queue.owner((0, 0)) is not queue.owner((0, 4026532000))
    assert queue.owner((0, 4026532000)).uid == 0
