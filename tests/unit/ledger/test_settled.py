"""What is taken for gone, and what is not where not everything could be looked at."""

from __future__ import annotations

from typing import Any, cast

import pytest

from mountd.ledger import find, live
from mountd.ledger.record import Record

# Long ago, without a watch or a mark: there only if it is found somewhere.
RECORD = Record(5, 0, (0, 9), 4000, 4000, 1, "/image", "erofs", True, "none", 1, sent=False)


class Book:
    """As much of a book as is asked."""

    hidden: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self.forgotten: set[int] = set()

    def sure(self, _: object) -> set[int]:
        return set()

    def is_there(self, _: object) -> bool:
        return False

    def forget(self, ids: set[int]) -> None:
        self.forgotten |= ids


@pytest.mark.parametrize("all_looked_at", [True, False])
@pytest.mark.parametrize("all_used", [True, False])
def test_nothing_is_forgotten_that_may_be_where_nobody_looked(
    monkeypatch: pytest.MonkeyPatch, all_looked_at: bool, all_used: bool
) -> None:
    monkeypatch.setattr(find, "attachments", lambda *_: ([], all_looked_at))
    monkeypatch.setattr(find, "uses", lambda *_: ([], all_used))
    book = Book()
    found = live.settled(cast("Any", book), [RECORD])
    if all_looked_at and all_used:
        assert (found, book.forgotten) == ([], {RECORD.id})
    else:
        assert [each.record for each in found] == [RECORD]
        assert found[0].partly is not all_looked_at
        assert not book.forgotten
