"""What “mountctl list” prints for people: tables that fit, and everything with --long."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from mountd.cli import listing, table
from mountd.cli.mountctl import parse
from mountd.cli.report import UsageError
from mountd.errors import ProtocolError

DIGEST = "sha256:" + 64 * "a"
MOUNT: dict[str, Any] = {
    "id": 2147500000,
    "uid": 1000,
    "owner": 1001,
    "source": "/home/me/an image\x1b.raw",
    "fileSystemType": "erofs",
    "readOnly": True,
    "rule": "signed images",
    "trustedBy": "signature",
    "signer": "CN=somebody",
    "digest": DIGEST,
    "idMap": "namespace",
    "since": 86400,
    "attached": [
        {"mountPoint": "/home/me/base", "mountNamespace": 4026531841, "id": 2147500000},
        {"mountPoint": "/mnt", "mountNamespace": 4026532842, "id": 2147500007},
    ],
    "maybeAttached": [{"mountPoint": "/srv", "mountNamespace": 4026532843, "id": 2147500009}],
    "unlisted": 3,
    "partly": True,
}
BARE: dict[str, Any] = {
    "id": 7,
    "uid": 0,
    "owner": 0,
    "source": "tmpfs:64M",
    "fileSystemType": "tmpfs",
    "readOnly": False,
    "idMap": "none",
    "since": 0,
    "attached": [],
}

LONG = f"""\
id: 2147500000
user: 1000
owner: 1001
source: /home/me/an image?.raw
type: erofs
access: read-only
rule: signed images
trusted by: signature
signer: CN=somebody
digest: {DIGEST}
id map: namespace
since: 1970-01-02 00:00:00 UTC (2 min)
attached at: /home/me/base (mount namespace 4026531841, mount 2147500000)
attached at: /mnt (mount namespace 4026532842, mount 2147500007)
maybe at: /srv (mount namespace 4026532843, mount 2147500009)
not listed: 3 more places
not looked at: there are too many mounts on this system, it may be in other places

id: 7
user: 0
owner: 0
source: tmpfs:64M
type: tmpfs
access: writable
rule: -
trusted by: -
signer: -
digest: -
id map: none
since: 1970-01-01 00:00:00 UTC (1 d)
attached at: (held by a descriptor)
"""


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mounts: list[Any], *words: str
) -> str:
    monkeypatch.setattr(listing, "all_mounts", lambda everybody: mounts)
    assert listing.list_mounts(parse(["list", *words])) == 0
    return capsys.readouterr().out


def test_everything_about_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("time.time", lambda: 86400.0 + 125)
    assert printed(monkeypatch, capsys, [MOUNT, BARE], "--long") == LONG


def test_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each field of the reply, by a value of its own; the test above shows what a field is called."""
    fields = [*MOUNT, *MOUNT["attached"][0]]
    assert len(fields) == 19
    text = printed(monkeypatch, capsys, [MOUNT], "-l")
    for name in set(MOUNT) - {"attached", "maybeAttached", "partly", "readOnly", "since", "source"}:
        assert str(MOUNT[name]) in text
    for place in (*MOUNT["attached"], *MOUNT["maybeAttached"]):
        for value in place.values():
            assert str(value) in text


def test_no_mounts_are_no_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(monkeypatch, capsys, []) == printed(monkeypatch, capsys, [], "--long") == ""


@pytest.mark.parametrize("wrong", [{**MOUNT, "since": "x"}, {**MOUNT, "attached": [{}]}, {}, 1])
@pytest.mark.parametrize("how", [[], ["--long"]])
def test_a_reply_that_is_none(monkeypatch: pytest.MonkeyPatch, wrong: Any, how: list[str]) -> None:
    monkeypatch.setattr(listing, "all_mounts", lambda everybody: [wrong])
    with pytest.raises(ProtocolError):
        listing.list_mounts(parse(["list", *how]))


def test_a_time_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "all_mounts", lambda everybody: [{**MOUNT, "since": 1 << 70}])
    with pytest.raises(ProtocolError):
        listing.list_mounts(parse(["list", "--long"]))


def test_people_or_programs() -> None:
    with pytest.raises(UsageError, match="not allowed with"):
        parse(["list", "--long", "--json"])


@pytest.mark.parametrize("columns", [10, 20, 30, 40, 60, 80, 200])
def test_a_table_that_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    """In a pipe as well; with the whole id, which has to be typed in somewhere else."""
    monkeypatch.setenv("COLUMNS", str(columns))
    head, *rows = printed(monkeypatch, capsys, [{**MOUNT, "partly": None}, BARE]).splitlines()
    assert max(len(line) for line in (head, *rows)) <= columns
    assert head.startswith("ID")
    assert [row.split()[0] for row in rows] == ["2147500000", "7"]
    assert ("ATT" in head) == (columns >= 22)
    assert ("RULE" in head) == (columns >= 80)


def test_an_id_is_whole_though_nothing_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "3")
    assert printed(monkeypatch, capsys, [{**MOUNT, "partly": None}]) == "ID\n2147500000\n"


MAYBE = {"maybeAttached": MOUNT["maybeAttached"]}


@pytest.mark.parametrize(
    ("known", "cell", "field"),
    [
        ({}, "(held by a descriptor)", "attached at: (held by a descriptor)"),
        ({"partly": True}, "(not all looked at)", "not looked at: there are too many"),
        (MAYBE, "maybe /srv", "maybe at: /srv (mount"),
        ({**MAYBE, "partly": True}, "maybe /srv", "maybe at: /srv (mount"),
        ({**MAYBE, "attached": MOUNT["attached"]}, "/home/me/base, /mnt", "attached at: /mnt (mount"),
        ({"unlisted": 3}, "3 more", "not listed: 3 more places"),
    ],
)
def test_only_what_is_known_is_said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    known: dict[str, Any],
    cell: str,
    field: str,
) -> None:
    """A descriptor holds what is attached nowhere, if everything was looked at and nothing is unsure."""
    monkeypatch.delenv("COLUMNS", raising=False)
    mount = {**BARE, **known}
    _, line, *below = printed(monkeypatch, capsys, [mount]).splitlines()
    assert line.split("tmpfs:64M")[1].strip() == cell
    assert below == ([listing.PARTLY] if known.get("partly") else [])
    text = printed(monkeypatch, capsys, [mount], "--long")
    assert f"\n{field}" in text
    assert ("held by a descriptor" in text) == (not known)


def test_what_was_not_looked_at_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(monkeypatch, capsys, [{**BARE, "partly": True}, {**BARE, "partly": True}, BARE])
    assert text.count(listing.PARTLY) == 1
    assert text.endswith(f"{listing.PARTLY}\n")


def test_revoke_says_how_many_places_there_was_no_room_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"mountPoint": "/mnt", "mountNamespace": 7, "id": 3}
    reply = {"detached": [place], "held": [], "unlisted": 12}
    monkeypatch.setattr(listing, "call", lambda *_: reply)
    assert listing.revoke(parse(["revoke", "5"])) == 0
    assert capsys.readouterr().out == (
        "detached from /mnt in mount namespace 7\ndetached from 12 more places\n"
    )


class TestWidth:
    """How wide a table may be."""

    @pytest.mark.parametrize("text", ["", "0", "-5", "x", "٣", "80x", "1" * 9, " 80"])
    def test_what_is_no_number(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        monkeypatch.setenv("COLUMNS", text)
        assert table.terminal_width() is None

    def test_the_environment_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Colours are for terminals all the same."""
        monkeypatch.setenv("COLUMNS", "33")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert table.terminal_width() == 33
        assert not table.wants_colour()
        monkeypatch.setattr(sys, "stdout", None)
        assert table.terminal_width() == 33
        assert not table.wants_colour()

    def test_columns_are_left_out_from_the_end(self) -> None:
        rows = [[12 * "a", 12 * "b", 8 * "c"]]
        text = table.table(rows, ["A", "B", "C"], width=23, colour=False)
        assert text.splitlines()[1] == "aaaaaaaaa…  bbbbbbbbbb…"
        text = table.table(rows, ["A", "B", "C"], width=20, colour=False, whole="C", spare="AB")
        assert text.splitlines() == ["B           C", "bbbbbbbbb…  cccccccc"]
