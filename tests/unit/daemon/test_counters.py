"""The counters: what is counted, by whom, and what survives a worker that is killed."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import timeit

import pytest

from mountd.daemon.board import Board
from mountd.daemon.counters import (
    BOUNDS,
    DONE,
    MAXIMUM_METHODS,
    OTHER,
    RESULTS,
    Counters,
    Figure,
    Slot,
    Tally,
)
from mountd.daemon.limits import SLOTS
from mountd.errors import MountdError
from mountd.service.mountfs_errors import in_their_words, of_image
from tests.unit.service.test_mountfs_errors import every, made

MOUNT, LIST = "io.mountd.Mount.Mount", "io.mountd.Images.List"


@pytest.fixture
def counters() -> Counters:
    made = Counters(3)
    made.name_methods([MOUNT, LIST])
    return made


def test_rows_are_added_up(counters: Counters) -> None:
    for slot in range(3):
        tally = Tally(counters, slot)
        tally.begin(MOUNT)
        tally.count("allow", 0.002)
    tally.begin(LIST)
    tally.count(DONE, 0.1)
    tally.begin("io.nobody.Knows")
    tally.count("MethodNotFound", 0.1)
    assert counters.requests() == [
        ("", "MethodNotFound", 1), (LIST, DONE, 1), (MOUNT, "allow", 3),
    ]  # fmt: skip


def test_an_error_that_has_no_column_is_another(counters: Counters) -> None:
    counters.begin(0, MOUNT)
    counters.count(0, "SomethingNew", 0.0)
    assert counters.requests() == [(MOUNT, OTHER, 1)]


def test_every_error_has_a_column() -> None:
    for each in MountdError.__subclasses__():
        if each.wire_name and each.__module__ == "mountd.errors":
            assert each.wire_name.rpartition(".")[2] in RESULTS
    assert len(set(RESULTS)) == len(RESULTS)


def test_every_error_of_systemds_interface_has_a_column() -> None:
    """Whatever the clients of that are told; test_mountfs_errors.py has an error of each kind."""
    for kind in every():
        for error in (made(kind), of_image(made(kind))):
            assert in_their_words(error).wire_name.rpartition(".")[2] in RESULTS, error
    assert {"DeniedByImagePolicy", "BadFileDescriptorFlags", "RootPartitionNotFound"} <= set(RESULTS)


def test_the_histogram_is_cumulative_and_has_its_bounds_inside(counters: Counters) -> None:
    for seconds in (0.0001, BOUNDS[0], BOUNDS[0] + 0.0001, 31.0):
        counters.begin(1, MOUNT)
        counters.count(1, "allow", seconds)
    ((method, at, total),) = counters.latencies()
    assert method == MOUNT
    assert len(at) == len(BOUNDS) + 1
    assert at[:2] == [2, 3]
    assert at[-2:] == [3, 4]
    assert total == pytest.approx(31.0012, abs=1e-5)


def test_a_child_counts_for_its_parent_and_the_next_one_goes_on(counters: Counters) -> None:
    for number in (signal.SIGKILL, 0, signal.SIGKILL):
        pid = os.fork()
        if pid == 0:
            counters.begin(2, MOUNT)
            counters.count(2, "allow", 0.01)
            counters.begin(2, LIST)  # and in the middle of the next request …
            if number:
                os.kill(os.getpid(), number)
            os._exit(0)
        os.waitpid(pid, 0)
    assert counters.requests() == [(MOUNT, "allow", 3)]


def test_what_a_killed_worker_was_at_is_counted_by_the_listener(counters: Counters) -> None:
    counters.begin(1, LIST)
    counters.count_for(1, "TimedOut")
    counters.count_for(1, "TimedOut")  # before its method was known
    counters.count_for(None, "LimitExceeded")
    assert sorted(counters.requests()) == [
        ("", "LimitExceeded", 1), ("", "TimedOut", 1), (LIST, "TimedOut", 1),
    ]  # fmt: skip
    # As long as those have waited for it who got that answer.
    ((method, at, total),) = counters.latencies()
    assert (method, at[-1]) == (LIST, 1)
    assert 0 < total < 60


def test_slots_and_figures(counters: Counters) -> None:
    counters.set_slot(0, Slot.BUSY)
    counters.set_slot(2, Slot.STUCK)
    counters.add(Figure.KILLED)
    counters.set(Figure.CONNECTIONS, 7)
    assert counters.slots() == {
        Slot.NONE: 1, Slot.IDLE: 0, Slot.BUSY: 1, Slot.STUCK: 1, Slot.KILLED: 0,
    }  # fmt: skip
    counters.restart()
    assert counters.slots()[Slot.NONE] == 3
    assert (counters.get(Figure.CONNECTIONS), counters.get(Figure.KILLED)) == (0, 1)
    assert counters.get(Figure.STARTED) > 0


def test_there_is_room_for_all_methods() -> None:
    counters = Counters(1)
    counters.name_methods([f"a.B{number}" for number in range(2 * MAXIMUM_METHODS)])
    assert len(counters.methods) == MAXIMUM_METHODS
    for method in (counters.methods[-1], "a.B99"):
        counters.begin(0, method)
        counters.count(0, DONE, 0.0)
    assert {(method, count) for method, _, count in counters.requests()} >= {(counters.methods[-1], 1)}
    from mountd.wire.dispatch import interface_directory

    declared = "".join(file.read_text() for file in interface_directory().glob("*.varlink"))
    assert declared.count("\nmethod ") + 3 <= MAXIMUM_METHODS


@pytest.mark.parametrize("kind", ["board", "counters"])
def test_what_a_worker_forks_has_none_of_it(counters: Counters, kind: str) -> None:
    """A child that parses images, and was taken over, can neither write there nor look."""
    board = Board(3)

    def touch() -> int:
        return len(counters.requests()) if kind == "counters" else board.read(0)[2]

    def child(hidden: bool) -> int:
        pid = os.fork()
        if pid == 0:
            if hidden:
                (counters if kind == "counters" else board).hide_from_children()
            touch()  # the worker itself still can
            inner = os.fork()
            if inner == 0:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                touch()
                os._exit(0)
            os._exit(0 if os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) == 0 else 7)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    faulthandler_was_on = faulthandler.is_enabled()
    faulthandler.disable()  # its report would look like a failure
    try:
        assert child(hidden=False) == 0
        assert child(hidden=True) == 7
    finally:
        if faulthandler_was_on:
            faulthandler.enable()


def test_counting_costs_little(counters: Counters) -> None:
    """As a ratio, not in seconds: a request costs at least one system call, this as few of the cheapest."""
    counters = Counters(SLOTS)
    counters.name_methods([MOUNT])
    tally = Tally(counters, 5)

    def count() -> None:
        tally.begin(MOUNT)
        tally.count("allow", 0.003)

    ours = min(timeit.repeat(count, number=2000, repeat=7))
    theirs = min(timeit.repeat(lambda: os.stat("/"), number=2000, repeat=7))
    assert ours < 3 * theirs
