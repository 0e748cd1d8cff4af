"""The files that say who has attached what."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mountd.service import attachments
from mountd.service.attachments import ABANDONED, Attachment, Attachments

ONE = Attachment(5, 1000, 1000, 7, "rule", "/home/x/mnt", 1)


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_nothing_is_left_of_what_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    records = Attachments(tmp_path)
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="full"):
        records.add(ONE)
    assert names(tmp_path) == []


def test_what_ended_by_itself_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not what is about to be attached."""
    there = {6}
    monkeypatch.setattr(attachments, "is_there", lambda id, _: id in there)
    records = Attachments(tmp_path)
    for id in (5, 6, 7):
        records.add(replace(ONE, id=id))
    (tmp_path / "8.new").write_text("")
    for name in ("5", "6", "8.new"):
        os.utime(tmp_path / name, (time.time() - ABANDONED - 1,) * 2)
    records.tidy()
    assert names(tmp_path) == ["6", "7"]
    assert records.find(6) == replace(ONE, id=6)


def test_there_are_never_many_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "is_there", lambda *_: False)
    records = Attachments(tmp_path)
    for id in range(1, 301):
        records.add(replace(ONE, id=id))
        os.utime(tmp_path / str(id), (0, 0))
        records.tidy()
    assert len(names(tmp_path)) <= attachments.LOOKED_AT
