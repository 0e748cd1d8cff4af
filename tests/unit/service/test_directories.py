"""What is not any more what was judged is not handed out."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mountd.caller.model import Caller, UserNamespace
from mountd.errors import BadFileDescriptor
from mountd.evidence.location import Walker
from mountd.fds import OwnedFd
from mountd.plan.idmap import IdMapKind, IdMapWish
from mountd.service import directories
from mountd.trust.decide import Decision
from mountd.trust.policy import Verdict

HOST = UserNamespace(4, 1, (), (), 0, is_host=True)


def test_a_directory_that_is_moved_while_it_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = Caller(os.getuid() or 1000, 100, frozenset(), 7, HOST, 1000)
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    os.chown(before, caller.uid, -1)
    made: list[OwnedFd] = []

    def run(*_: object) -> OwnedFd:
        before.rename(after)
        made.append(OwnedFd(os.open(after, os.O_PATH)))
        return made[-1]

    monkeypatch.setattr(directories, "run", run)
    with Walker() as walker, OwnedFd(os.open(before, os.O_RDONLY)) as fd:
        context = cast(
            "Any",
            SimpleNamespace(
                notes={},
                walker=walker,
                seal=None,
                peer=SimpleNamespace(
                    mount_namespace=lambda: OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY))
                ),
            ),
        )
        source, evidence = directories.look_at(fd.fileno(), caller, context)
        decision = Decision(Verdict.ALLOW, "r", None, "", None, (), None, True, frozenset(), ())
        judged = SimpleNamespace(
            request=SimpleNamespace(
                directory_fd=fd.fileno(), userns_fd=None, idmap=IdMapWish(IdMapKind.NONE)
            ),
            caller=caller,
            inspected=SimpleNamespace(source=source, evidence=evidence),
            decision=decision,
            uids=(),
            gids=(),
        )
        with pytest.raises(BadFileDescriptor, match="moved or changed hands"):
            directories.make(cast("Any", judged), context)
    with pytest.raises(ValueError):
        made[0].fileno()
