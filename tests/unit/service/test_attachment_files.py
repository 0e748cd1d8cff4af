"""What may lie among the files that say who has attached what, and is none of them."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict
from pathlib import Path

import pytest

from mountd.service.attachments import MAXIMUM_FILE, Attachment, Attachments

ONE = Attachment(5, 1000, 1000, 7, "rule", "/home/x/\udcff", 1, (5, 6))


def write(directory: Path, **changes: object) -> None:
    fields = {name: value for name, value in (asdict(ONE) | changes).items() if value != "nothing"}
    (directory / "5").write_text(json.dumps(fields))


def test_what_another_version_has_written_is_read(tmp_path: Path) -> None:
    records = Attachments(tmp_path)
    write(tmp_path, new="something")
    assert records.find(5) == ONE
    write(tmp_path, tree="nothing")
    found = records.find(5)
    assert found is not None
    assert found.tree == ()


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in ("id", "namespace", "since") for value in ("5", -1, 1 << 63, True, 5.0)),
        *({name: value} for name in ("uid", "gid") for value in ("0", -1, 0xFFFFFFFF, 1 << 40, None, [])),
        *({"rule": value} for value in (5, ["rule"])),
        *({"path": value} for value in (5, None, "", "a\0b", "\ud800")),
        *({"tree": value} for value in (5, None, "56", {"5": 6}, [[5]], ["5"], [-1])),
        *({name: "nothing"} for name in ("id", "uid", "gid", "namespace", "rule", "path", "since")),
        {"id": 6},
    ],
    ids=str,
)
def test_another_type_or_range_is_none(tmp_path: Path, changes: dict[str, object]) -> None:
    write(tmp_path, **changes)
    assert Attachments(tmp_path).find(5) is None
    assert list(Attachments(tmp_path).all()) == []


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"5", b"null", b"[" * MAXIMUM_FILE, b'{"id":5,', b"\xff", b"\0" * 99]
)
def test_what_is_no_object_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "5").write_bytes(data)
    assert Attachments(tmp_path).find(5) is None


@pytest.mark.parametrize("kind", ["fifo", "link", "directory", "socket"])
def test_what_is_no_file_is_none(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "5", tmp_path / "other"
    write(tmp_path)
    path.rename(other)
    with socket.socket(socket.AF_UNIX) as listening:
        make = {
            "fifo": lambda: os.mkfifo(path),
            "link": lambda: path.symlink_to(other),
            "directory": path.mkdir,
            "socket": lambda: listening.bind(str(path)),
        }
        make[kind]()
        assert Attachments(tmp_path).find(5) is None
        assert list(Attachments(tmp_path).all()) == []


def test_all_of_them(tmp_path: Path) -> None:
    records = Attachments(tmp_path / "attached")
    assert list(records.all()) == []
    records.add(ONE).close()
    for name in ("other", "\u0666", "9" * 40):
        (tmp_path / "attached" / name).touch()
    assert list(records.all()) == [ONE]
