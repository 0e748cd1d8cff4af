"""The board, the channels between processes, and what the listener says by itself."""

from __future__ import annotations

import contextlib
import os
import socket
import time

import pytest

from mountd.daemon import channel
from mountd.daemon.board import MAXIMUM_SECONDS, Board
from mountd.daemon.channel import Word
from mountd.daemon.connection import answer
from mountd.daemon.limits import DEADLINES, MAXIMUM_STUCK, MAXIMUM_WORKERS, SLOTS
from mountd.errors import TimedOut
from mountd.fds import OwnedFd, close_all
from mountd.kernel import sockets
from mountd.service.phase import Phase


def test_the_board_is_shared_with_a_child() -> None:
    board = Board(3)
    pid = os.fork()
    if pid == 0:
        board.enter(1, Phase.MOUNT)
        board.enter(2, Phase.TRANSFER, 3600)
        os._exit(0)
    os.waitpid(pid, 0)
    for slot, expected in ((1, (Phase.MOUNT, 0)), (2, (Phase.TRANSFER, 3600))):
        phase, since, seconds = board.read(slot)
        assert (phase, seconds) == expected
        assert 0 <= time.monotonic() - since < 5
    assert board.read(0) == (Phase.IDLE, 0.0, 0)


def test_a_deadline_that_the_board_has_no_room_for_is_the_longest() -> None:
    board = Board(1)
    board.enter(0, Phase.TRANSFER, 1 << 40)
    phase, since, seconds = board.read(0)
    assert (phase, seconds) == (Phase.TRANSFER, MAXIMUM_SECONDS)
    assert 0 <= time.monotonic() - since < 5


def test_commands_keep_their_descriptors_and_texts() -> None:
    ours, theirs = channel.pair()
    with ours, theirs:
        with OwnedFd(os.open("/dev/null", os.O_RDONLY)) as null:
            channel.tell(ours, Word.SPAWNED, 7, "a text — with ünïcode", [null, null])
        channel.tell(ours, Word.GONE, 8)
        word, number, text, fds = channel.hear(theirs) or pytest.fail("nothing was heard")
        assert (word, number, text, len(fds)) == (Word.SPAWNED, 7, "a text — with ünïcode", 2)
        close_all(fds)
        assert channel.hear(theirs) == (Word.GONE, 8, "", [])
        ours.close()
        assert channel.hear(theirs) is None


def test_a_request_without_its_connection_is_the_end() -> None:
    ours, theirs = channel.pair()
    with ours, theirs:
        sockets.send(ours, channel.REQUEST.pack(1, 2, 3, 4, channel.Entrance.OWN), [])
        assert channel.next_request(theirs) is None


def test_an_answer_never_waits_for_room() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with contextlib.suppress(BlockingIOError):
            while ours.send(b"x" * 65536, socket.MSG_DONTWAIT):
                continue
        answer(ours, TimedOut(10), channel.Entrance.OWN)
        assert ours.getblocking()


def test_every_phase_of_a_request_has_a_deadline() -> None:
    assert set(DEADLINES) == set(Phase) - {Phase.IDLE}
    assert SLOTS == MAXIMUM_WORKERS + MAXIMUM_STUCK
