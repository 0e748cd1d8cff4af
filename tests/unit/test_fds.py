from __future__ import annotations

import os

import pytest

from mountd.fds import OwnedFd, close_all


def null() -> OwnedFd:
    return OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))


def test_closes_once() -> None:
    owned = null()
    number = owned.fileno()
    owned.close()
    owned.close()
    assert owned.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_take_moves_the_duty() -> None:
    owned = null()
    number = owned.take()
    assert owned.closed
    os.close(number)
    with pytest.raises(ValueError, match="closed or taken"):
        owned.fileno()
    with pytest.raises(ValueError, match="closed or taken"):
        owned.take()


def test_context_manager_closes_on_error() -> None:
    owned = null()
    with pytest.raises(RuntimeError), owned:
        raise RuntimeError
    assert owned.closed


def test_a_leak_warns_and_is_closed() -> None:
    owned = null()
    number = owned.fileno()
    with pytest.warns(ResourceWarning, match="never closed"):
        del owned
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 is not a file descriptor"):
        OwnedFd(-1)


def test_close_all_empties_the_list() -> None:
    fds = [null(), null()]
    kept = list(fds)
    close_all(fds)
    assert fds == []
    assert all(fd.closed for fd in kept)
