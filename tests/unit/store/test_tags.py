"""What a tag leads to, as it is written down."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mountd.errors import InvalidImage
from mountd.store import tags
from mountd.store.record import MAXIMUM_INTEGER, NoRecord
from mountd.store.tags import Tag, key_of

ONE = "sha256:" + "1" * 64
TAG = Tag("registry.example.com:5000/apps/one", "v1.0-rc_2", ONE, 1_700_000_000_000_000_000)


def test_it_is_read_as_it_was_written() -> None:
    assert tags.parse(tags.serialise(TAG)) == TAG
    assert TAG.name == "oci:registry.example.com:5000/apps/one:v1.0-rc_2"
    longest = Tag(f"{'a' * 63}.example/{'b' * 183}", "t" * 128, ONE, MAXIMUM_INTEGER)
    assert len(longest.repository) == 255
    assert tags.parse(tags.serialise(longest)) == longest


@pytest.mark.parametrize(
    "change",
    [
        {"repository": "Registry.example.com/a"}, {"repository": "../../records"}, {"repository": ""},
        {"repository": "registry.example.com"}, {"repository": "registry.exämple.com/a"},
        {"repository": "docker.io/busybox"}, {"repository": "a.example/b:1"},
        {"repository": "a.example/b\n"},
        {"tag": ""}, {"tag": "../latest"}, {"tag": "a/b"}, {"tag": "a b"}, {"tag": "é"}, {"tag": "t" * 129},
        {"tag": "1@" + ONE}, {"tag": "1:2"}, {"tag": "1\x00"}, {"tag": "1\n"}, {"tag": None}, {"tag": 1},
        {"manifest": "sha256:1"}, {"manifest": ONE.upper()}, {"manifest": ONE + "\n"}, {"manifest": None},
        {"manifest": ONE.replace("sha256", "sha512")},
        {"resolved": -1}, {"resolved": MAXIMUM_INTEGER + 1}, {"resolved": 1.5}, {"resolved": True},
    ],
)  # fmt: skip
def test_what_is_no_tag_is_not_written(change: dict[str, object]) -> None:
    with pytest.raises(InvalidImage):
        tags.serialise(replace(TAG, **change))  # type: ignore[arg-type]


def test_anything_else_is_none() -> None:
    good = json.loads(tags.serialise(TAG))
    bad: list[object] = [
        [], {}, None, "x", {**good, "version": 2}, {**good, "version": True}, {**good, "more": 1},
        {**good, "tag": ["1"]}, {**good, "repository": {}}, {**good, "manifest": 1},
        {**good, "resolved": "1"},
        {name: value for name, value in good.items() if name != "resolved"},
    ]  # fmt: skip
    for each in bad:
        with pytest.raises(NoRecord):
            tags.parse(json.dumps(each).encode())
    whole = tags.serialise(TAG)
    for data in (b"", b"\xff", b"{" * 100_000, whole + b" " * tags.MAXIMUM, whole[:-1], whole + whole):
        with pytest.raises(NoRecord):
            tags.parse(data)
    # The last of two would win, and be another than the first.
    with pytest.raises(NoRecord):
        tags.parse(whole[:-1] + b', "tag": "2"}')


def test_a_name_has_one_place_and_no_way_out_of_it() -> None:
    places = {
        key_of(repository, tag)
        for repository in ("a.example/b", "a.example/c", "a.example:1/b", "b", "../../x", "\ud800")
        for tag in ("1", "b:1", "latest", "Latest", "../1", "/")
    }
    assert len(places) == 36
    for place in places:
        assert len(place) == 64
        assert set(place) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    ("new", "known", "now", "outdated"),
    [
        (5, 4, 9, False),
        (4, 5, 9, True),
        (5, 5, 9, False),
        # A clock that was put right.
        (5, 99, 9, False),
        (4, 9, 9, True),
    ],
)
def test_who_asked_first_does_not_win(new: int, known: int, now: int, outdated: bool) -> None:
    assert tags.is_outdated(replace(TAG, resolved=new), replace(TAG, resolved=known), now) is outdated
