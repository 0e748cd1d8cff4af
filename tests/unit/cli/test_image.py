"""What mountctl image says, to people and on terminals."""

from __future__ import annotations

import os
import pty
import select
import sys

import pytest

from mountd.cli import image, mountctl
from mountd.cli.image import details, digest_of, line_of, parse_age, size_of
from mountd.errors import InvalidParameter, ProtocolError

DIGEST = "sha256:" + "0a" * 32
IMAGE = {
    "digest": DIGEST,
    "size": 3 << 20,
    "ownerUids": [0, 1000],
    "created": 0,
    "name": "base\x1b[2J",
    "fileSystem": {"type": "erofs", "size": 4096},
    "signers": [{"key": "team", "subject": "CN=team"}],
}


@pytest.mark.parametrize(
    "line",
    ["image", "image bogus", "image import", "image import a b", "image inspect", "image list x",
     "image remove", "image verify", "image gc now", "image import --na x a",
     "image pull", "image pull a b"],
)  # fmt: skip
def test_wrong_usage(line: str) -> None:
    with pytest.raises(mountctl.UsageError):
        mountctl.parse(line.split())


@pytest.mark.parametrize("verb", ["import x", "pull x", "list", "inspect x", "verify x", "remove x", "gc"])
def test_every_verb_is_there_and_can_say_json(verb: str) -> None:
    options = mountctl.parse(["image", *verb.split(), "--json"])
    assert options.json
    assert options.image_verb in image.VERBS


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("90", 90), ("5s", 5), ("2m", 120), ("12h", 43200), ("30d", 2592000)]
)
def test_age(text: str, seconds: int) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1", "1.5h", "1y", "٣d", "1 d", "9" * 13])
def test_no_age(text: str) -> None:
    with pytest.raises(InvalidParameter, match="12h"):
        parse_age(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (3 << 30, "3.0 GiB"), (1 << 63, "8.0 EiB"),
     (None, "?"), (True, "?")],
)  # fmt: skip
def test_size(size: object, text: str) -> None:
    assert size_of(size) == text


def test_lines() -> None:
    assert line_of(IMAGE) == f"{DIGEST}     3.0 MiB erofs    base\x1b[2J"
    assert line_of({"digest": DIGEST, "size": 1}) == f"{DIGEST}     1 bytes unknown"
    assert details(IMAGE) == [
        f"digest: {DIGEST}",
        "size: 3145728",
        "ownerUids:",
        "  0",
        "  1000",
        "created: 1970-01-01T00:00:00Z",
        "name: base\x1b[2J",
        "fileSystem:",
        "  type: erofs",
        "  size: 4096",
        "signers:",
        "  key team, subject CN=team",
    ]


def test_nothing_upsets_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    image.show(mountctl.parse(["image", "list"]), {}, line_of(IMAGE))
    assert capsys.readouterr().out == f"{DIGEST}     3.0 MiB erofs    base?[2J\n"


def test_digest() -> None:
    assert digest_of(f"stored:{DIGEST}") == digest_of(DIGEST) == DIGEST
    with pytest.raises(InvalidParameter):
        digest_of("sha256:\udcff")


def test_a_reply_without_an_image() -> None:
    with pytest.raises(ProtocolError):
        image.image_of({})


def test_nothing_is_shown_while_somebody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is once all of it is read: the line is gone by then."""
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        meter = image.Meter("importing")
        for done in (1, 2):
            meter.show({"done": done, "total": 2})
        assert os.read(ours, 1000).endswith(b"50 % of 2 bytes\x1b[K\r\x1b[K")
        meter.clear()
        meter.show({"done": 2, "total": 2})
        assert select.select([ours], [], [], 0)[0] == []
        monkeypatch.undo()
    os.close(ours)


def test_progress_is_for_terminals_only(capsys: pytest.CaptureFixture[str]) -> None:
    meter = image.Meter("importing")
    meter.show({"done": 1, "total": 2})
    meter.clear()
    assert capsys.readouterr() == ("", "")
