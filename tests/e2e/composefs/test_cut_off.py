"""composefs: descriptions of which no image comes, as the disk is full or the worker is killed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mountd.client import attach
from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from tests.container import USER
from tests.daemon import Daemon
from tests.e2e.calls import Outcome, outcome
from tests.e2e.composefs.calls import ask
from tests.e2e.composefs.trees import DESCRIPTIONS, HEAD, described
from tests.e2e.directories import peer
from tests.rogue import eventually


def lines(count: int) -> bytes:
    return HEAD + b"".join(b"/%d 1 100644 1 0 0 0 0.0 - x -\n" % number for number in range(count))


@pytest.fixture
def objects(place: Path) -> Iterator[Path]:
    path = place / "cut-off-objects"
    path.mkdir(mode=0o755)
    yield path
    path.rmdir()


def names(state: Path, below: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(state / "regenerated" / below)
    return []


def test_a_worker_that_is_killed_meanwhile(start: Callable[..., Daemon], place: Path, objects: Path) -> None:
    """What it has begun goes with it, or with whoever is next."""
    daemon = start(DESCRIPTIONS)
    state = daemon.directory / "state"
    path = described(place, lines(100_000))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: outcome(lambda: ask(daemon, path, objects)))
        assert eventually(lambda: bool(names(state, "incoming")), 10)
        for pid in daemon.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert asked.result()[0] == "MountFailed"
    assert names(state, "images/sha256") == []
    assert outcome(lambda: ask(daemon, path, objects)) == ("", "")
    assert names(state, "incoming") == []
    assert len(names(state, "images/sha256")) == 1
    path.unlink()


def test_a_disk_that_is_too_small(start: Callable[..., Daemon], place: Path, objects: Path) -> None:
    """Nothing of what others have goes for that, and the next one finds room."""
    state = place / "cut-off-state"
    state.mkdir()
    with FsContext.open("tmpfs") as context:
        context.set_string("size", "1m")
        context.create()
        with context.mount(MountAttr(0)) as mount:
            attach(mount.fileno(), str(state))
    state.chmod(0o700)
    daemon = start(DESCRIPTIONS, "--state-dir", str(state))

    def made(count: int, uid: int) -> Outcome:
        path = described(place, lines(count))
        with peer(uid):
            found = outcome(lambda: ask(daemon, path, objects))
        path.unlink()
        return found

    try:
        assert made(1, USER) == ("", "")
        before = names(state, "images/sha256")
        name, text = made(30_000, USER + 1)
        assert name == "LimitExceeded"
        assert "bytes on the disk of the store" in text
        assert names(state, "images/sha256") == before
        assert names(state, "incoming") == []
        assert made(2, USER + 1) == ("", "")
        assert len(names(state, "images/sha256")) == 2
        daemon.stop()
    finally:
        mount_api.umount(str(state))
        state.rmdir()
