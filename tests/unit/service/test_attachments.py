"""The files that say who has attached what."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mountd.errors import AttachNotPermitted, LimitExceeded
from mountd.service import attachments
from mountd.service.attachments import ABANDONED, MAXIMUM_FILE, Attachment, Attachments

ONE = Attachment(5, 1000, 1000, 7, "rule", "/home/x/mnt", 1)
TWO = replace(ONE, id=6)


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
            Attachments(tmp_path).add(ONE).close()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert names(tmp_path) == []


def test_what_is_written_down_is_found(tmp_path: Path) -> None:
    records = Attachments(tmp_path / "attached")
    assert records.find(ONE.id) is None
    records.add(ONE).close()
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
        records.add(replace(ONE, id=id)).close()
    (tmp_path / "other").write_text("")
    for name in ("5", "6", "other"):
        os.utime(tmp_path / name, (time.time() - ABANDONED - 1,) * 2)
    records.tidy()
    assert names(tmp_path) == ["6", "7"]
    assert records.find(6) == replace(ONE, id=6)


def test_the_longest_path_is_read_again(tmp_path: Path) -> None:
    """JSON has six bytes for each of those that are no UTF-8, or control something."""
    longest = replace(ONE, path="/\udcff" * 2047, rule="\U0001f512" * 255, tree=(1 << 62,) * 8)
    records = Attachments(tmp_path)
    records.add(longest).close()
    assert records.find(ONE.id) == longest


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    records = Attachments(tmp_path / "attached")
    with pytest.raises(LimitExceeded, match="written down of one mount"):
        records.add(replace(ONE, rule="r" * MAXIMUM_FILE))
    assert not (tmp_path / "attached").exists()


def test_one_of_two_is_refused_and_leaves_what_the_other_has_written(tmp_path: Path) -> None:
    records = Attachments(tmp_path)
    with records.held([ONE]):
        with pytest.raises(AttachNotPermitted, match="just being attached"), records.held([TWO, ONE]):
            pass
        assert names(tmp_path) == ["5"]
    assert records.find(ONE.id) == ONE


def test_what_is_just_being_attached_is_nobody_else_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for who would detach it, nor for who tidies, however long it takes."""
    monkeypatch.setattr(attachments, "is_there", lambda *_: False)
    records = Attachments(tmp_path)
    with records.held([ONE]):
        with pytest.raises(TimeoutError), records.locked(ONE.id, 0.02):
            pass
        os.utime(tmp_path / "5", (0, 0))
        records.tidy()
        assert names(tmp_path) == ["5"]
    with records.locked(ONE.id) as there:
        assert there
        records.remove(ONE.id)
    with records.locked(ONE.id) as there:
        assert not there


def test_who_has_waited_for_the_lock_learns_that_it_is_gone(tmp_path: Path) -> None:
    records = Attachments(tmp_path)
    records.add(ONE).close()
    inside, found = threading.Event(), []

    def wait() -> None:
        inside.set()
        with records.locked(ONE.id, 10) as there:
            found.append(there)

    waiting = threading.Thread(target=wait)
    with records.locked(ONE.id):
        waiting.start()
        inside.wait()
        time.sleep(0.05)
        records.remove(ONE.id)
    waiting.join()
    assert found == [False]


def test_a_directory_that_somebody_has_removed(tmp_path: Path) -> None:
    records = Attachments(tmp_path / "attached")
    records.add(ONE).close()
    shutil.rmtree(tmp_path / "attached")
    records.tidy()
    assert records.find(ONE.id) is None


def test_there_are_never_many_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "is_there", lambda *_: False)
    records = Attachments(tmp_path)
    for id in range(1, 301):
        records.add(replace(ONE, id=id)).close()
        os.utime(tmp_path / str(id), (0, 0))
        records.tidy()
    assert len(names(tmp_path)) <= attachments.LOOKED_AT
