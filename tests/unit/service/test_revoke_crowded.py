"""What Revoke says where mountd begins no more children, as too many hang: that, and the way out."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from mountd.errors import SyscallError
from mountd.execute import attachment, taking_back
from mountd.fds import OwnedFd
from mountd.kernel.mount_info import MountNamespace
from mountd.kernel.visitor import TooManyHanging
from mountd.ledger import find
from mountd.ledger.find import Attachment
from mountd.ledger.live import Live
from mountd.ledger.record import Record
from mountd.service import revoke

OWNER = 4000
RECORD = Record(5, 3, (0, 9), OWNER, OWNER, 1, "/image", "erofs", True, "none", 1)
SPACES = (7, 8)
LEFT = Live(RECORD, tuple(Attachment(5, (0, 9), "/m", space) for space in SPACES))
Visits = list[int]


@pytest.fixture
def visiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Visits]:
    """Have visits of two mount namespaces, in which the mount stays, raise something; returns the visits."""

    def prepare(raised: BaseException) -> Visits:
        visits: Visits = []

        def opened(ids: object, stack: ExitStack) -> list[MountNamespace]:
            fds = [stack.enter_context(OwnedFd(os.open("/dev/null", os.O_PATH))) for _ in SPACES]
            return [MountNamespace(fd, id) for fd, id in zip(fds, SPACES, strict=True)]

        def visit(ids: object, fd: int, *_: object, **__: object) -> int:
            visits.append(fd)
            raise raised

        monkeypatch.setattr(revoke, "opened", opened)
        monkeypatch.setattr(attachment, "is_there", lambda *_: True)
        monkeypatch.setattr(find, "payer", lambda _: (OWNER, 0))
        monkeypatch.setattr(taking_back, "take_back", visit)
        return visits

    return prepare


def test_too_many_that_hang_are_a_reason_of_their_own(
    visiting: Callable[[BaseException], Visits], monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = visiting(TooManyHanging())
    done, why = revoke.take_back([LEFT], [LEFT])
    assert (done, why) == ([], revoke.CROWDED)
    assert len(visits) == 1  # elsewhere it would be the same
    monkeypatch.setattr(find, "uses", lambda *_: ([], True))
    monkeypatch.setattr(find, "processes_in", lambda *_: [])
    told = str(revoke.holders([LEFT], why)[0]["what"])
    assert "hang in file systems that do not answer" in told
    assert "end the processes there" in told


def test_another_reason_holds_up_no_other_place(visiting: Callable[[BaseException], Visits]) -> None:
    visits = visiting(SyscallError(10, "a child in another mount namespace"))
    assert revoke.take_back([LEFT], [LEFT]) == ([], revoke.IN_THE_WAY)
    assert len(set(visits)) == len(SPACES)
