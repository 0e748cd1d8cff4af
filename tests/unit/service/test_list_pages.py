"""What fits into one reply of List, and what is left for the next."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mountd.fds import OwnedFd
from mountd.ledger.find import Attachment
from mountd.ledger.live import Live
from mountd.ledger.record import Record
from mountd.service import listing
from mountd.service.listing import PAGE, PLACES, list_mounts


def live(id: int, *places: str, source: str = "/image") -> Live:
    record = Record(id, 1, (0, 9), 4000, 4000, 1, source, "erofs", True, "none", 1)
    return Live(record, tuple(Attachment(id, (0, 9), place, 7) for place in places))


@pytest.fixture
def context() -> Any:
    caller = SimpleNamespace(is_host_root=True)
    return SimpleNamespace(enter=lambda _: None, peer=SimpleNamespace(identify=lambda: caller))


def pages(context: Any) -> list[list[dict[str, Any]]]:
    found, after = [], None
    fds: list[OwnedFd] = []
    while True:
        reply, _ = list_mounts({"all": True, "after": after}, fds, context)
        assert len(json.dumps(reply)) < PAGE + 2 * PLACES
        found.append(cast("list[dict[str, Any]]", reply["mounts"]))
        after = reply.get("next")
        if after is None:
            return found


def test_all_are_on_some_page(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(range(1000, 1, -1))
    monkeypatch.setattr(listing, "living", lambda _: [live(id, source="/" + "x" * 4000) for id in ids])
    found = pages(context)
    assert len(found) > 10
    assert [each["id"] for page in found for each in page] == sorted(ids)


def test_one_that_is_longer_than_a_page_has_one_of_its_own(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "PAGE", 100)
    monkeypatch.setattr(listing, "living", lambda _: [live(id) for id in (3, 4)])
    found = []
    for after in (None, 3, 4):
        reply, _ = list_mounts({"all": True, "after": after}, [], context)
        found.append(([each["id"] for each in cast("Any", reply["mounts"])], reply.get("next")))
    assert found == [([3], 3), ([4], None), ([], None)]


def test_places_that_there_is_no_room_for_are_counted(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [f"/{number}" + "y" * 1000 for number in range(100)]
    monkeypatch.setattr(listing, "living", lambda _: [live(3, *places), live(4, places[0])])
    ((first, second),) = pages(context)
    assert 0 < len(first["attached"]) < len(places)
    assert len(first["attached"]) + first["unlisted"] == len(places)
    assert len(second["attached"]) == 1
    assert "unlisted" not in second
