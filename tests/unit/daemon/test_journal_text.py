"""What the journal gets of names that are no text."""

from __future__ import annotations

import os

import pytest

from mountd.daemon import journal
from mountd.daemon.journal import Priority, log
from mountd.wire.framing import plain


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/x", "/home/x"),
        ("two\nlines \u2028", "two\nlines \u2028"),
        (os.fsdecode(b"caf\xe9 \xff"), r"caf\xe9 \xff"),
        ("half \ud800", r"half \ud800"),
    ],
)
def test_a_value(value: str, expected: str) -> None:
    assert plain(value) == expected
    expected.encode()


def test_such_a_field_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, object]] = []
    monkeypatch.setattr(journal, "in_service", lambda: True)
    monkeypatch.setattr("systemd.journal.send", lambda _, **fields: sent.append(fields))
    log(Priority.INFO, "text", target=os.fsdecode(b"/home/\xff"))
    assert sent[0]["MOUNTD_TARGET"] == r"/home/\xff"
