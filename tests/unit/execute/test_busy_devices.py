"""A btrfs that is just being dropped is in the way of the next mount of the same, for a moment only."""

from __future__ import annotations

import errno

import pytest

from mountd.errors import SyscallError
from mountd.execute import run
from mountd.plan.operations import Backing, CreateSuperblock


class Kernel:
    """Fails so many times."""

    def __init__(self, failures: int, error: int = errno.EEXIST) -> None:
        self.calls = 0
        self._failures = failures
        self._error = error

    def create(self, *_: object) -> str:
        self.calls += 1
        if self.calls <= self._failures:
            raise SyscallError(self._error, "fsconfig")
        return "context"


def created(monkeypatch: pytest.MonkeyPatch, kernel: Kernel, type: str) -> object:
    monkeypatch.setattr(run, "_create_once", kernel.create)
    monkeypatch.setattr(run, "PAUSES", (0.0, 0.0))
    return run._create_from(CreateSuperblock(type, Backing.LOOP, True, ()), "/dev/loop0")


def test_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(2)
    assert created(monkeypatch, kernel, "btrfs") == "context"
    assert kernel.calls == 3


@pytest.mark.parametrize(
    ("kernel", "type", "calls"),
    [
        (Kernel(3), "btrfs", 3),
        (Kernel(1), "xfs", 1),
        (Kernel(1, errno.EINVAL), "btrfs", 1),
    ],
)
def test_what_lasts_and_what_is_something_else_is_told(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, type: str, calls: int
) -> None:
    with pytest.raises(SyscallError):
        created(monkeypatch, kernel, type)
    assert kernel.calls == calls
