"""What the journal gets of names that are no text, and of a refusal."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mountd.daemon import journal, worker
from mountd.daemon.journal import MAXIMUM_LINE, Priority, log, one_line
from mountd.wire.answer import Failure
from mountd.wire.framing import Message, plain


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


CALLER = {"caller_uid": "4000", "caller_pid": "7", "owner_uid": "4000"}
ALLOWED = {**CALLER, "verdict": "allow", "rule": "r", "reason": "only root can change it"}
BEGIN = "Mount for uid 4000 (pid 7): "


@pytest.mark.parametrize(
    ("notes", "failure", "text", "priority"),
    [
        (ALLOWED, None, "allow by rule “r”", Priority.INFO),
        (
            ALLOWED,
            Failure("AttachNotPermitted", "it is\na sticky directory"),
            "refused with AttachNotPermitted: it is?a sticky directory",
            Priority.NOTICE,
        ),
        (
            {**ALLOWED, "verdict": "deny"},
            Failure("DeniedByPolicy", "denied"),
            "refused with DeniedByPolicy by rule “r”: denied",
            Priority.NOTICE,
        ),
        (CALLER, Failure("InvalidImage", "x" * 5000), None, Priority.NOTICE),
        (CALLER, None, "done", Priority.INFO),
    ],
)
def test_why_it_was_refused_is_not_why_it_was_allowed(
    monkeypatch: pytest.MonkeyPatch,
    notes: dict[str, str],
    failure: Failure | None,
    text: str | None,
    priority: Priority,
) -> None:
    told: list[tuple[Priority, str, dict[str, Any]]] = []
    monkeypatch.setattr(worker, "log", lambda *line, **fields: told.append((*line, fields)))
    self: Any = SimpleNamespace(_throttle=SimpleNamespace(may_write=lambda _: True), _owner=(4000, 0))
    context: Any = SimpleNamespace(fields=lambda: dict(notes))
    message = Message({"method": "io.mountd.Mount.Mount"}, b"", [])
    worker.Worker._note(self, message, context, failure, 0.0, taken=True)
    ((found, line, fields),) = told
    assert found is priority
    assert text is None or line == BEGIN + text
    assert fields["error"] == ("" if failure is None else failure.name)
    assert fields.get("reason") == notes.get("reason")
    if failure is None:
        assert "error_text" not in fields
    else:
        assert fields["error_text"] == one_line(failure.text, MAXIMUM_LINE)
        assert len(fields["error_text"]) <= MAXIMUM_LINE + 1
        assert line.endswith(": " + cast("str", fields["error_text"]))
