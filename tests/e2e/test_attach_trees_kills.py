"""Attaching and detaching a tree of mounts while its caller or the worker is killed: all of it, or nothing.

Detaching is one step for each mount, so that it may end in between; but then what is written down is what is
attached, and the rest can be detached.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.errors import SyscallError
from mountd.kernel import sockets
from mountd.kernel.mount_info import listmount
from tests.daemon import Daemon
from tests.e2e.attaching import granting, id_at, user_of
from tests.e2e.conftest import trusting
from tests.e2e.test_attach_kills import BEYOND, HAL, Target, asking
from tests.e2e.test_sources import loops_over
from tests.e2e.trees import build_contents, build_tree_disk
from tests.rogue import call, eventually, settled

LOOPS = 12
NAMES = ("root", "home", "var", "tmp")
Scene = tuple[Daemon, Path]


@pytest.fixture(scope="module")
def scene(place: Path, images: dict[str, Path]) -> Iterator[Scene]:
    with granting(place, "tree-kills", lambda grant: trusting(place / "trusted", attach=grant)) as made:
        yield made


@pytest.fixture(scope="module")
def disk(place: Path, images: dict[str, Path]) -> Path:
    return build_tree_disk(place / "trusted/kills.raw", build_contents(place / "parts-of-kills"), *NAMES)


class Tree(Target):
    """A directory at which a whole image is attached, or nothing is."""

    def consistent(self) -> bool:
        """Whether what is written down is what is attached."""
        found = sorted(each.id for each in self.written_down())
        with contextlib.suppress(SyscallError):  # it is just going
            return found == (sorted([self.top, *listmount(self.top)]) if self.top != self.nothing else [])
        return False

    @property
    def top(self) -> int:
        """The id of what is seen there."""
        return id_at(self.path)

    @property
    def whole(self) -> bool:
        """Whether all of the image is there."""
        with contextlib.suppress(SyscallError):
            return self.top != self.nothing and len(listmount(self.top)) == len(NAMES) - 1
        return False


@contextlib.contextmanager
def tree(scene: Scene, name: str, disk: Path) -> Iterator[Tree]:
    """One, of which nothing is left at the end."""
    before = len(listmount())
    yield Tree(user_of(*scene, HAL), name, disk)
    assert len(listmount()) == before
    assert eventually(lambda: not loops_over(disk), 10)


def kill_workers(daemon: Daemon) -> None:
    for pid in daemon.workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("who", ["caller", "worker"])
def test_killed_while_it_is_attached(scene: Scene, disk: Path, who: str) -> None:
    daemon = scene[0]
    outcomes: Counter[bool] = Counter()
    with tree(scene, who, disk) as target:
        dice, longest = random.Random(53), target.seconds() * BEYOND
        # Both happen, however long a request takes here.
        for seconds in (0.0, *(dice.uniform(0, longest) for _ in range(LOOPS)), None):
            if who == "worker":
                settled(daemon)
            image, directory = target.opened()
            fds = [image.fileno(), directory.fileno()]
            with image, directory, asking(daemon, fds, lambda connection: connection.recv(65536)) as pid:
                if seconds is None:
                    assert eventually(lambda: target.whole, 10)
                else:
                    time.sleep(seconds)
                os.kill(pid, signal.SIGKILL) if who == "caller" else kill_workers(daemon)
                time.sleep(longest)
            assert eventually(lambda: target.whole or target.top == target.nothing, 10)
            outcomes[target.settle()] += 1
    assert outcomes[True], outcomes
    assert outcomes[False], outcomes


def test_a_worker_is_killed_while_it_is_detached(scene: Scene, disk: Path) -> None:
    """What is left can be detached, and then nothing is left of what was written down."""
    daemon = scene[0]
    left: Counter[str] = Counter()
    with tree(scene, "detached", disk) as target:
        dice = random.Random(54)
        for _ in range(LOOPS):
            # Those that were killed serve nobody; who is given to one of them before that is known, fails.
            settled(daemon)
            name, text, id = target.user.attach(disk, target.path)
            assert name == "", text
            settled(daemon)
            with detaching(daemon, id):
                time.sleep(dice.uniform(0, 0.03))
                kill_workers(daemon)
            assert eventually(target.consistent, 10)
            left["all" if target.whole else "nothing" if target.top == target.nothing else "some"] += 1
            assert eventually(lambda: gone(target), 10)
    assert left["nothing"] < LOOPS, left


def gone(target: Tree) -> bool:
    """Detach what is there, and return whether nothing is."""
    if target.top != target.nothing:
        target.user.detach(target.top)
    return target.top == target.nothing and target.consistent()


@contextlib.contextmanager
def detaching(daemon: Daemon, id: int) -> Iterator[None]:
    """A process of the user's that has sent the call of Detach, and waits for the reply."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(HAL, HAL, HAL)
            os.setresuid(HAL, HAL, HAL)
            connection = sockets.connect(str(daemon.socket))
            connection.send(call("Detach", {"id": id}))
            connection.recv(65536)
        finally:
            os._exit(0)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
