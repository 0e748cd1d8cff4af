"""The files that say who has attached what."""

from __future__ import annotations

import errno
import os
import signal
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
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    records = Attachments(tmp_path)
    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="full"):
        records.add(ONE)
    assert names(tmp_path) == []


def test_nothing_is_left_of_who_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just before the file is given its name."""
    monkeypatch.setattr(os, "link", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    pid = os.fork()
    if pid == 0:
        try:
            Attachments(tmp_path).add(ONE)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert names(tmp_path) == []


def test_what_is_written_down_is_found(tmp_path: Path) -> None:
    records = Attachments(tmp_path / "attached")
    assert records.find(ONE.id) is None
    records.add(ONE)
    assert records.find(ONE.id) == ONE
    assert (tmp_path / "attached").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "attached/5").stat().st_mode & 0o777 == 0o600
    records.remove(ONE.id)
    records.remove(ONE.id)
    assert names(tmp_path / "attached") == []


def test_what_ended_by_itself_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not what is about to be attached."""
    there = {6}
    monkeypatch.setattr(attachments, "is_there", lambda id, _: id in there)
    records = Attachments(tmp_path)
    for id in (5, 6, 7):
        records.add(replace(ONE, id=id))
    (tmp_path / "other").write_text("")
    for name in ("5", "6", "other"):
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
