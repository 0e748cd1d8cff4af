"""Attach while its caller is killed, leaves or goes elsewhere, and while the worker is killed.

Whenever that happens, what is attached is written down, for its user to detach; and what is written down but
not attached is forgotten. Nothing is attached anywhere but where it was asked for.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.fds import OwnedFd
from mountd.kernel import namespaces, sockets
from mountd.kernel.flags import Clone
from mountd.service.attachments import Attachment, Attachments, still_there
from tests.container import as_user
from tests.daemon import Daemon
from tests.e2e.attaching import User, granting, id_at, records, user_of
from tests.e2e.conftest import trusting
from tests.rights import drop_others
from tests.rogue import Raw, call, error, eventually, settled

HAL = 4250
LOOPS = int(os.environ.get("MOUNTD_TEST_KILLS", "10000")) // 200
SAMPLES = 10
BEYOND = 1.3  # times the length of a request
Scene = tuple[Daemon, Path]


@pytest.fixture(scope="module")
def scene(place: Path, images: dict[str, Path]) -> Iterator[Scene]:
    with granting(place, "kills", lambda grant: trusting(place / "trusted", attach=grant)) as made:
        yield made


def attach_call() -> bytes:
    parameters = {"source": {"imageFileDescriptor": 0}, "targetFileDescriptor": 1}
    return call("Attach", parameters)


class Target:
    """A directory, whether something is attached there, and who asks for it."""

    def __init__(self, user: User, name: str, image: Path) -> None:
        self.user = user
        self.path = user.directory(name)
        self.image = image
        self.nothing = id_at(self.path)
        self.attachments = Attachments(user.daemon.directory / "run/attached")

    def opened(self) -> tuple[OwnedFd, OwnedFd]:
        """The image and the directory below what is attached there, if anything is."""
        return OwnedFd(os.open(self.image, os.O_RDONLY)), OwnedFd(os.open(self.path, os.O_PATH))

    def consistent(self) -> bool:
        """Whether what is written down is what is attached."""
        found = [each.id for each in self.written_down()]
        return found == ([] if id_at(self.path) == self.nothing else [id_at(self.path)])

    def written_down(self) -> list[Attachment]:
        """What is attached no more is forgotten here, as by the daemon after a minute."""
        found = []
        for name in records(self.user.daemon):
            each = self.attachments.find(int(name))
            if each is not None and still_there(each):
                found.append(each)
            elif each is not None:
                with contextlib.suppress(TimeoutError), self.attachments.locked(each.id, 0) as there:
                    # Or it was attached just now.
                    if there and not still_there(each):
                        self.attachments.remove(each.id)
        return found

    def settle(self) -> bool:
        """Wait until it is consistent; detach what is there, and return whether there was something.

        What is about to be taken back may be gone at any moment, and who serves a request that nobody waits
        for may hold what is there for another.
        """
        assert eventually(self.consistent, 5), os.listdir(self.user.daemon.directory / "run/attached")
        said: list[str] = []

        def told() -> bool:
            there = id_at(self.path)
            said.append("nothing" if there == self.nothing else self.user.detach(there)[0])
            return said[-1] != "InUse"

        eventually(told, 5)
        assert eventually(lambda: self.consistent() and id_at(self.path) == self.nothing, 5), said
        return said[-1] == ""

    def seconds(self) -> float:
        """How long an ordinary request takes here and now: the median."""
        times = []
        for _ in range(SAMPLES):
            image, target = self.opened()
            with image, target:
                fds = [image.fileno(), target.fileno()]
                begin = time.perf_counter()
                assert as_user(lambda fds=fds: ask(self.user.daemon, fds), HAL) == ""  # type: ignore[misc]
                times.append(time.perf_counter() - begin)
            self.settle()
        return sorted(times)[SAMPLES // 2]


def ask(daemon: Daemon, fds: list[int]) -> str | None:
    with Raw(daemon) as raw:
        raw.send(attach_call(), fds)
        return error(raw.reply())


@contextlib.contextmanager
def asking(daemon: Daemon, fds: list[int], then: Callable[[socket.socket], object]) -> Iterator[int]:
    """A process of the user's that has sent the call, and goes on with `then`; yields its pid."""
    ready, sent = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(HAL, HAL, HAL)
            os.setresuid(HAL, HAL, HAL)
            connection = sockets.connect(str(daemon.socket))
            os.write(sent, b"k")
            socket.send_fds(connection, [attach_call()], fds)
            then(connection)
        finally:
            os._exit(0)
    os.close(sent)
    try:
        os.read(ready, 1)
        yield pid
    finally:
        os.close(ready)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("way", ["killed", "closes"])
def test_callers_leave_at_any_moment(scene: Scene, images: dict[str, Path], way: str) -> None:
    target = Target(user_of(*scene, HAL), f"caller-{way}", images["erofs"])
    dice, longest = random.Random(50), target.seconds() * BEYOND
    outcomes: Counter[bool] = Counter()
    for _ in range(LOOPS):
        seconds = dice.uniform(0, longest)

        def leave(connection: socket.socket, seconds: float = seconds) -> None:
            time.sleep(60 if way == "killed" else seconds)
            connection.close()
            time.sleep(60)

        image, directory = target.opened()
        with (
            image,
            directory,
            asking(scene[0], [image.fileno(), directory.fileno()], leave) as pid,
        ):
            time.sleep(seconds)
            if way == "killed":
                os.kill(pid, signal.SIGKILL)
            # For whoever serves it to come to an end.
            time.sleep(longest)
        outcomes[target.settle()] += 1
    assert outcomes[True], outcomes
    assert outcomes[False] or way == "closes", outcomes


def test_callers_go_elsewhere(scene: Scene, images: dict[str, Path]) -> None:
    """Into namespaces of their own: then it is attached where they asked from, or not at all."""
    target = Target(user_of(*scene, HAL), "elsewhere", images["erofs"])
    dice, longest = random.Random(51), target.seconds() * BEYOND
    said: Counter[str] = Counter()
    for _ in range(LOOPS):
        seconds = dice.uniform(0, longest)

        def go(seconds: float = seconds) -> str:
            image, directory = target.opened()
            with image, directory, Raw(scene[0]) as raw:
                raw.send(attach_call(), [image.fileno(), directory.fileno()])
                time.sleep(seconds)
                namespaces.unshare(Clone.NEWUSER | Clone.NEWNS)
                return error(raw.reply()) or ""

        found = as_user(go, HAL)
        said[found] += 1
        assert target.settle() is (found == ""), found
    # The two namespaces are not left in the same instant.
    assert set(said) <= {"", "PeerGone", "AttachNotPermitted"}, said
    assert said["PeerGone"], said


def test_a_worker_is_killed_at_any_moment(scene: Scene, images: dict[str, Path]) -> None:
    target = Target(user_of(*scene, HAL), "worker", images["erofs"])
    dice, longest = random.Random(52), target.seconds() * BEYOND
    daemon = scene[0]
    outcomes: Counter[bool] = Counter()
    for _ in range(LOOPS):
        settled(daemon)
        image, directory = target.opened()
        fds = [image.fileno(), directory.fileno()]
        with image, directory, asking(daemon, fds, lambda connection: connection.recv(65536)):
            time.sleep(dice.uniform(0, longest))
            for pid in daemon.workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(longest)
        outcomes[target.settle()] += 1
    assert outcomes[True], outcomes
    assert outcomes[False], outcomes


def test_with_the_capabilities_of_the_unit(place: Path, images: dict[str, Path]) -> None:
    """None of which lets the daemon into a directory that is its user's alone."""
    grounds = place / "bounded"
    grounds.mkdir(mode=0o755)
    policy = trusting(place / "trusted", attach=f'["{grounds}/$UID/**"]')
    daemon = Daemon(place / "bounded-daemon", policy, preexec_fn=drop_others)
    try:
        user = user_of(daemon, grounds, HAL)
        status = Path(f"/proc/{daemon.workers[0]}/status").read_text()
        assert not int(status.partition("CapEff:")[2].split()[0], 16) & 0b111
        for type in ("erofs", "squashfs"):
            with user.attached(images[type], user.directory(f"bounded-{type}", 0o700)) as id:
                assert user.detach(id) == ("", "", id), daemon.log
    finally:
        assert daemon.stop() == 0, daemon.log
