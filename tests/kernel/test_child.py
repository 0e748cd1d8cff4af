"""Children of a fork: that they never come back, what is heard of them, and that they are gone."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.fds import OwnedFd
from mountd.kernel import child, sandbox

pytestmark = pytest.mark.kernel
ROOT = Path(__file__).parents[2]


def heard(
    work: Callable[[int], int], *, maximum: int = 4096, seconds: float | None = 5
) -> tuple[bytes, bool]:
    """What a child writes, read as the arguments say; it is ended by force afterwards."""
    pid, reader = child.fork(work)
    try:
        with reader:
            return child.read_all(reader.fileno(), maximum, seconds)
    finally:
        child.end(pid)


def write(*pieces: bytes, pause: float = 0, stay: bool = False) -> Callable[[int], int]:
    def work(writer: int) -> int:
        for piece in pieces:
            os.write(writer, piece)
            time.sleep(pause)
        while stay:
            signal.pause()
        return 0

    return work


def test_what_it_writes_is_read_to_the_end() -> None:
    assert heard(write(b"a", b"b", b"c", pause=0.05)) == (b"abc", False)
    assert heard(write(b"a", b"b", pause=0.05), seconds=None) == (b"ab", False)
    assert heard(write()) == (b"", False)


def test_no_more_is_read_than_the_maximum() -> None:
    """And a child that goes on writing neither blocks who reads nor survives."""
    assert heard(write(b"x" * (1 << 20))) == (b"x" * 4096, False)
    assert heard(write(b"abc"), maximum=3) == (b"abc", False)
    assert heard(write(b"abc", stay=True), maximum=2) == (b"ab", False)


def test_one_that_trickles_does_not_get_beyond_the_deadline() -> None:
    start = time.monotonic()
    said, timed_out = heard(write(*[b"x"] * 100, pause=0.05), seconds=0.3)
    assert timed_out
    assert 1 <= len(said) < 20
    assert time.monotonic() - start < 2
    assert heard(write(b"x", stay=True), seconds=0.3) == (b"x", True)


def test_a_deadline_that_has_passed() -> None:
    """Not even what is there already is read: poll(2) would wait for ever for less than nothing."""
    pid, reader = child.fork(write(b"x"))
    with reader:
        assert select.select([reader.fileno()], [], [], 5)[0]
        for seconds in (0, -1):
            assert child.read_all(reader.fileno(), 10, seconds) == (b"", True)
    child.end(pid)


def test_how_it_ended() -> None:
    for work, status in (
        (lambda _: 0, 0),
        (lambda _: 7, 7),
        (lambda _: os.kill(os.getpid(), signal.SIGTERM) or signal.pause(), -signal.SIGTERM),
        (lambda _: 1 // 0, child.EXIT_RAISED),
        (lambda _: sys.exit(3), child.EXIT_RAISED),
    ):
        pid, reader = child.fork(work)
        with reader:
            assert child.end(pid, patience=5) == status
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, 0)


def test_patience_ends() -> None:
    pid, reader = child.fork(write(stay=True))
    with reader:
        assert child.ended(pid) is None
        start = time.monotonic()
        assert child.end(pid, patience=0.2) == -signal.SIGKILL
        assert 0.2 <= time.monotonic() - start < 2


@pytest.mark.parametrize(
    "work",
    [
        "lambda _: 1 // 0",
        "lambda _: sys.exit('told')",
        # The first is cut short if the other end is closed meanwhile.
        "lambda w: os.write(w, b'x' * (1 << 20)) and os.write(w, b'x')",
        "lambda w: sandbox.tell(w, lambda: {'x': 'y' * (1 << 20)}, set(), cpu_seconds=1, memory=1 << 26)",
    ],
    ids=["raises", "exits", "nobody reads", "nobody reads what is told"],
)
def test_it_never_comes_back(work: str) -> None:
    """Nor does it say a word, or what its parent has not written yet, whatever it ends by."""
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from mountd.kernel import child, sandbox
sys.stdout.write("once")
try:
    pid, reader = child.fork({work})
    reader.close()
    status = child.end(pid, patience=5)
finally:
    print(" and", status)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"once and {child.EXIT_RAISED}\n", "")


def test_both_ends_are_closed_where_there_is_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """That they are, conftest.py finds out."""

    def fork() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(BlockingIOError):
        child.fork(lambda _: 0)


def test_the_ends_are_not_inherited_by_programs() -> None:
    for end in child.pipe():
        with end:
            assert not os.get_inheritable(end.fileno())


def test_it_ends_with_its_parent() -> None:
    reader, writer = child.pipe()

    def parent(told: int) -> int:
        def work(_: int) -> int:
            child.end_with_parent()
            os.write(told, b"ready")
            while True:
                signal.pause()

        child.fork(work)
        while True:
            signal.pause()

    with reader:
        with writer:
            pid, told = child.fork(parent)
        with told:
            assert os.read(told.fileno(), 9) == b"ready"
            child.end(pid)
            # Both of them held it: the end is there when the last one is gone.
            assert select.select([reader.fileno()], [], [], 5)[0]
            assert os.read(reader.fileno(), 1) == b""


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_everything_but_what_is_kept_is_closed(kept: int) -> None:
    with open("/etc/passwd", "rb") as a, open("/etc/passwd", "rb") as b, OwnedFd(os.memfd_create("c")) as c:
        keep = {a.fileno(), b.fileno(), c.fileno()} if kept == 3 else {c.fileno()} if kept else set()

        def work(writer: int) -> int:
            child.close_all_but({writer, *keep})
            held = set()
            for fd in range(256):
                try:
                    os.fstat(fd)
                except OSError:
                    continue
                held.add(fd)
            os.write(writer, b"yes" if held == {writer, *keep} else str(held).encode())
            return 0

        assert heard(work) == (b"yes", False)


@pytest.mark.parametrize(
    "answer",
    [b"", b"{", b"[1]", b"7", b"null", b"[" * 16384, b'{"found":', b"\xff"],
    ids=["nothing", "cut off", "a list", "a number", "null", "nested", "without an end", "no text"],
)
def test_an_answer_that_is_none(answer: bytes) -> None:
    """As it may be from somebody who has taken the child over."""
    assert sandbox.understand(answer) is None


def test_what_a_confined_child_tells() -> None:
    limits = {"cpu_seconds": 1, "memory": 64 << 20}
    assert sandbox.ask(lambda: {"a": 1}, set(), **limits) == {"found": {"a": 1}}
    failed = sandbox.ask(lambda: {}["x" * 100000], set(), **limits)
    assert failed is not None
    assert failed["kind"] == "KeyError"
    assert len(failed["failed"]) == sandbox.MAXIMUM_FAILURE
    assert sandbox.ask(lambda: {"a": "x" * 100000}, set(), **limits) is None
    assert sandbox.ask(lambda: {"a": object()}, set(), **limits) is None
    assert sandbox.ask(lambda: {"a": os.getppid()}, set(), **limits) is None
