"""What Revoke tells of that holds a mount: something of each kind, however much there is of one."""

from __future__ import annotations

import pytest

from mountd.ledger import find
from mountd.ledger.find import Attachment, Use
from mountd.ledger.live import Live
from mountd.ledger.record import Record
from mountd.service.revoke import MAXIMUM_TOLD, holders

RECORD = Record(5, 3, (0, 9), 4000, 4000, 1, "/image", "erofs", True, "none", 1)
MANY = 10 * MAXIMUM_TOLD


def test_no_kind_leaves_out_another(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = [Use(pid, "cat", "fd 3", 5, (0, 9)) for pid in range(1, MANY)]
    monkeypatch.setattr(find, "uses", lambda *_: (uses, True))
    monkeypatch.setattr(
        find, "processes_in", lambda *_: [Use(99999, "sh", "in mount namespace 7", 0, (0, 0))]
    )
    places = tuple(Attachment(id, (0, 9), "/" + "\x01" * 5000, 7) for id in range(MANY))
    found = holders([Live(RECORD, places, unsure=places, partly=True)], "why")
    texts = [str(each["what"]) for each in found]
    assert len(found) < 6 * MAXIMUM_TOLD
    assert max(map(len, texts)) < 1000
    for begin in ("fd 3", "there may be others", "there may be other places", "attached at", "maybe a copy"):
        assert any(text.startswith(begin) for text in texts), begin
    assert f"attached in {MANY - MAXIMUM_TOLD} more places: revoke it once more" in texts


def test_processes_that_could_be_ended_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "uses", lambda *_: ([], True))
    monkeypatch.setattr(find, "processes_in", lambda *_: [Use(99, "sh", "in mount namespace 7", 0, (0, 0))])
    places = tuple(Attachment(id, (0, 9), "/m", 7) for id in range(MANY))
    found = holders([Live(RECORD, places)], "why")
    assert {"pid": 99, "command": "sh", "what": "in mount namespace 7"} in found
