"""The command line of mountctl, and what `run` does before it enters the image."""

from __future__ import annotations

from pathlib import Path

import pytest

from mountd.cli import container, mountctl
from mountd.cli.mountctl import UsageError, explanation, parse


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("run img ls -l", ["ls", "-l"]),
        ("run img -- ls -l", ["ls", "-l"]),
        ("run --json -o noexec img -- sh -c x -- y", ["sh", "-c", "x", "--", "y"]),
        ("run img -- -- x", ["--", "x"]),
    ],
)
def test_command_of_run(line: str, command: list[str]) -> None:
    options = parse(line.split())
    assert options.command == command
    assert options.source == "img"


@pytest.mark.parametrize(
    "line",
    ["", "mount", "mount img", "mount img dir more", "run", "run img", "run img --", "run --userns x img ls",
     "explain", "explain --idmap ranges img", "explain --js img", "bogus img"],
)  # fmt: skip
def test_wrong_usage(line: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(line.split())
    assert caught.value.hint


@pytest.mark.parametrize(
    ("line", "read_only"),
    [
        ("mount tmpfs:1M dir", False),
        ("mount -o ro tmpfs:1M dir", True),
        ("mount -w tmpfs:1M dir", False),
        ("mount /dev/null dir", True),
        ("mount -o noexec,rw /dev/null dir", False),
        ("run /dev/null ls", True),
    ],
)
def test_request(line: str, read_only: bool) -> None:
    with mountctl.request_of(parse(line.split())) as request:
        assert request.parameters["readOnly"] is read_only
        assert ("tmpfs" in request.source) == (not request.fds)


def test_explanation_has_no_surprises_for_the_terminal() -> None:
    reply = {
        "decision": {"verdict": "deny", "reason": "a\x1bb", "hint": "h"},
        "facts": {"label": "x\ny"},
        "steps": [{"rule": "r", "origin": "o", "applies": False, "reason": "s", "hint": "t"}],
    }
    assert explanation(reply) == (  # type: ignore[arg-type]
        "deny: no rule applies: a?b\nhint: h\nfacts:\n  label: x?y\n"
        "rules, in order:\n  “r” (o) does not apply: s\n    hint: t"
    )


def test_explanation_says_who_has_signed() -> None:
    reply = {"decision": {"verdict": "allow", "rule": "r", "reason": "s", "signer": "CN=a\x1bb"}}
    assert explanation(reply) == "allow: by rule “r”: s\nsigned by: CN=a?b"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        ("4000:100000:65536\n", (100000, 65536)),
        ("4000:100000:1000\n4000:200000:70000\nroot:300000:65536\n", (200000, 65536)),
        ("broken\n4000:x:65536\n4000:5:٣x\n\n 4000:7:8 \n", (7, 8)),
        ("4000:100000:0\n", None),
        ("root:100000:65536\n", None),
    ],
)
def test_subordinate(tmp_path: Path, text: str, found: tuple[int, int] | None) -> None:
    (tmp_path / "subuid").write_text(text)
    assert container.subordinate(str(tmp_path / "subuid"), 4000) == found
    assert container.subordinate(str(tmp_path / "missing"), 4000) is None
