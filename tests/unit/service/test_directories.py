"""What is not any more what was judged is not handed out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mountd.caller.model import Caller, UserNamespace
from mountd.errors import BadFileDescriptor
from mountd.evidence.location import Walker
from mountd.fds import OwnedFd
from mountd.plan.idmap import IdMapKind, IdMapWish
from mountd.service import composefs, directories
from mountd.service.requests import OBJECTS_FIELD
from mountd.trust.decide import Decision
from mountd.trust.policy import Verdict

HOST = UserNamespace(4, 1, (), (), 0, is_host=True)
CALLER = Caller(os.getuid() or 1000, 100, frozenset(), 7, HOST, 1000)


@pytest.fixture
def walker() -> Iterator[Walker]:
    with Walker() as walker:
        yield walker


@pytest.fixture
def context(walker: Walker) -> Any:
    """What a step is handed, as far as these look at it."""
    peer = SimpleNamespace(mount_namespace=lambda: OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY)))
    return SimpleNamespace(notes={}, walker=walker, seal=None, peer=peer)


class Moving:
    """Stands for `execute.run`: the directory is moved meanwhile."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        os.chown(directory, CALLER.uid, -1)
        self._directory = directory
        self.made: list[OwnedFd] = []

    def __call__(self, *_: object) -> OwnedFd:
        self.made.append(OwnedFd(os.open(self._directory, os.O_PATH)))
        self._directory.rename(self._directory.with_name("elsewhere"))
        return self.made[-1]

    def has_left_nothing(self) -> bool:
        with pytest.raises(ValueError):
            self.made[0].fileno()
        return len(self.made) == 1


def test_a_directory_that_is_moved_while_it_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: Any
) -> None:
    run = Moving(tmp_path / "directory")
    monkeypatch.setattr(directories, "run", run)
    with OwnedFd(os.open(tmp_path / "directory", os.O_RDONLY)) as fd:
        source, evidence = directories.look_at(fd.fileno(), CALLER, context)
        decision = Decision(Verdict.ALLOW, "r", None, "", None, (), None, True, frozenset(), ())
        judged = SimpleNamespace(
            request=SimpleNamespace(
                directory_fd=fd.fileno(), userns_fd=None, idmap=IdMapWish(IdMapKind.NONE)
            ),
            caller=CALLER,
            inspected=SimpleNamespace(source=source, evidence=evidence),
            decision=decision,
            uids=(),
            gids=(),
        )
        with pytest.raises(BadFileDescriptor, match="moved or changed hands"):
            directories.make(cast("Any", judged), context)
    assert run.has_left_nothing()


def test_objects_that_are_moved_while_they_are_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: Any
) -> None:
    run = Moving(tmp_path / "objects")
    monkeypatch.setattr(composefs, "run", run)
    with OwnedFd(os.open(tmp_path / "objects", os.O_RDONLY)) as fd:
        field = f"{OBJECTS_FIELD}[0]"
        directory, speaking = composefs.look_at_objects(fd.fileno(), field, CALLER, context, inside=True)
        judged = SimpleNamespace(
            caller=CALLER,
            inspected=SimpleNamespace(
                source=SimpleNamespace(composefs=SimpleNamespace(objects=(directory,))),
                evidence=SimpleNamespace(objects=(speaking,)),
            ),
        )
        with pytest.raises(BadFileDescriptor, match="moved or changed hands") as caught:
            composefs.objects(cast("Any", judged), 0, fd.fileno(), context)
    assert caught.value.parameters["parameter"] == field
    assert run.has_left_nothing()
