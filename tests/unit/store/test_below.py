"""Directories that a layer leaves out: they are as the layers below have them."""

from __future__ import annotations

import json

import pytest

from mountd.errors import LimitExceeded
from mountd.store import below, tar_header
from tests.oci import Member, archive, directory
from tests.unit.store.test_tar_filter import members, run

BASE = archive(
    directory("./", mode=0o711),
    directory("root/", mode=0o700),
    directory("tmp/", mode=0o1777),
    directory("home/"),
    directory("home/app/", mode=0o750, uid=1000),
    directory("home/app/cache/", mode=0o700, uid=1000),
    directory("gone/", mode=0o700),
    directory("gone/deep/", mode=0o700),
    directory("replaced/", mode=0o700),
    directory("opaque/", mode=0o700),
    directory("opaque/deep/", mode=0o700),
    directory("changed/", mode=0o700),
)
ABOVE = archive(
    Member("root/.wh.file", b""),
    Member("tmp/file", b""),
    Member("home/app/cache/file", b""),
    Member(".wh.gone", b""),
    Member("replaced", b""),
    Member("opaque/.wh..wh..opq", b""),
    directory("changed/"),
)
TOPMOST = archive(
    *(Member(f"{name}/file", b"") for name in ("root", "tmp", "home/app/cache", "changed")),
    *(Member(f"{name}/deep/file", b"") for name in ("gone", "opaque", "replaced")),
)


def test_directories_that_were_left_out_are_as_those_below() -> None:
    """Else the layer would open what is closed in a lower one, or close what is open."""
    known: dict[str, tuple[int, int]] = {}
    summary = run(BASE)[1]
    for data in (ABOVE, TOPMOST):
        out, summary = run(data, lowest=False, below=summary.directories)
        known = {name: (each.mode, each.uid) for name, each in members(out).items() if each.isdir()}
        assert known["."] == (0o711, 0)
        assert known["root"] == (0o700, 0)
        assert known["tmp"] == (0o1777, 0)
        assert known["home"] == (0o755, 0)
        assert known["home/app"] == (0o750, 1000)
        assert known["home/app/cache"] == (0o700, 1000)
        assert known["changed"] == (0o755, 0)
        assert known["opaque"] == (0o700, 0)
    for name in ("gone", "gone/deep", "opaque/deep", "replaced", "replaced/deep"):
        assert known[name] == (0o755, 0), name
    empty, _ = run(archive(), lowest=False, below=summary.directories)
    assert members(empty)["."].mode == 0o711


def test_an_entry_counts_more_than_what_it_was_taken_for() -> None:
    data = archive(Member("root/file", b""), directory("root/", mode=0o750))
    summary = run(data, lowest=False, below=run(BASE)[1].directories)[1]
    assert summary.directories is not None
    assert summary.directories[b"root"] == (0o750, 0, 0)


def test_too_many_directories_to_be_remembered() -> None:
    """Only who needs to know is refused."""
    many = {
        b"%d" % number + b"/" * 200: below.Access(0o700, 0, 0)
        for number in range(below.MAXIMUM_BYTES // 200)
    }
    assert below.serialise(many) is None
    assert run(archive(directory("./"), Member("a", b"")), lowest=False, below=None)[1].directories is None
    with pytest.raises(LimitExceeded, match="directories of the layers below"):
        run(archive(directory("./"), Member("a/b", b"")), lowest=False, below=None)


@pytest.mark.parametrize(
    "told", [1, [1], [["a"]], [["a", 0o10000, 0, 0]], [["a", 0, -1, 0]], [["a", 0, 0, True]], [[1, 0, 0, 0]]]
)
def test_what_is_no_list_of_directories(told: object) -> None:
    with pytest.raises(ValueError, match="no "):
        below.parse(told)


def test_directories_are_told_as_they_are() -> None:
    known = {
        b"": below.Access(0o711, 1, 2),
        b"\xff/\xc3\xa4": below.Access(0o1777, 0, tar_header.MAXIMUM_ID),
    }
    assert below.parse(json.loads(json.dumps(below.serialise(known)))) == known
