"""The children that parse what nobody vouches for end, whatever happens, and never go on as workers."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from mountd.evidence import confined_signature
from mountd.kernel import sandbox
from mountd.source import confined

WENT_ON = 42


def status_of(be_the_child: Callable[[int], object], *, listener: bool) -> int:
    """Return the exit status of a child whose answer somebody waits for, or nobody any more."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            if not listener:
                os.close(reader)
            be_the_child(writer)
        except BaseException:  # noqa: BLE001 - going on is what must not happen, in any way
            os._exit(WENT_ON)
        finally:
            os._exit(WENT_ON)
    os.close(writer)
    if listener:
        os.read(reader, 65536)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def parser(writer: int) -> None:
    confined._be_the_child(os.open("/dev/null", os.O_RDONLY), lambda _: {"type": "none"}, writer)


def parser_without_an_answer(writer: int) -> None:
    """What it found is nothing that JSON has a word for."""
    confined._be_the_child(os.open("/dev/null", os.O_RDONLY), lambda _: {"type": object()}, writer)


def parser_that_fails(writer: int) -> None:
    def parse(_: object) -> dict[str, object]:
        raise RecursionError("a bug")

    confined._be_the_child(os.open("/dev/null", os.O_RDONLY), parse, writer)


def verifier(writer: int) -> None:
    confined_signature._be_the_child(writer, b"no signature", [], [], 0)


CHILDREN = [parser, parser_without_an_answer, parser_that_fails, verifier]


@pytest.mark.parametrize("listener", [True, False])
@pytest.mark.parametrize("child", CHILDREN)
def test_the_child_ends(child: Callable[[int], None], listener: bool) -> None:
    """With EPIPE, too: the worker that forked it is gone, and nobody reads the pipe."""
    assert status_of(child, listener=listener) == 0


@pytest.mark.parametrize("child", [parser, verifier])
def test_the_child_ends_where_it_cannot_be_confined(
    child: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(22, "no filter")

    monkeypatch.setattr(sandbox, "confine", fails)
    for listener in (True, False):
        assert status_of(child, listener=listener) == 0
