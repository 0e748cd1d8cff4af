"""As many attachments as somebody can get (THREATS.md, C 52): mountd's bound holds, and the kernel's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation
from mountd.kernel.mount_info import listmount
from tests.container import as_user, forked
from tests.daemon import Daemon
from tests.e2e.attaching import DIRECTORY, User, asked, detached, user_of
from tests.e2e.conftest import trusting

ERIN = 4231
MANY = int(os.environ.get("MOUNTD_TEST_ATTACHED", "128"))
MOUNT_MAX = Path("/proc/sys/fs/mount-max")
MOST = 300  # mounts of a namespace: more than are in any that mountd itself has


@pytest.fixture(scope="module")
def erin(place: Path) -> Iterator[User]:
    grounds = place / "attach-many"
    grounds.mkdir(mode=0o755)
    policy = trusting(place / "trusted", attach=f'["{grounds}/$UID/**"]')
    daemon = Daemon(place / "attach-many-daemon", policy, ("--max-mounts", str(MANY)))
    yield user_of(daemon, grounds, ERIN)
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


@pytest.fixture
def mount_max() -> Iterator[Callable[[int], None]]:
    before = MOUNT_MAX.read_text()
    yield lambda number: MOUNT_MAX.write_text(str(number)) and None
    MOUNT_MAX.write_text(before)


def in_a_session(user: User, work: Callable[[], object]) -> object:
    """Do `work` as a user, in a mount namespace of its own."""

    def enter() -> object:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        return as_user(work, user.uid)

    return forked(enter)


def attach(user: User, image: Path, name: str) -> tuple[str, str, int]:
    """Attach `image` at a new directory of the user, who does it."""
    path = user.own / name
    path.mkdir()
    with OwnedFd(os.open(path, DIRECTORY)) as fd:
        return asked(user.daemon.socket, image, fd.fileno())


def test_52_until_there_are_too_many(erin: User, images: dict[str, Path]) -> None:
    def work() -> tuple[object, ...]:
        before, ids = len(listmount()), []
        while True:
            name, text, id = attach(erin, images["erofs"], f"many-{len(ids)}")
            if name:
                break
            ids.append(id)
        more = len(listmount()) - before - len(ids)
        freed = detached(erin.daemon.socket, ids[-1])[0]
        return len(ids), name, text, more, freed, attach(erin, images["erofs"], "again")[0]

    count, name, text, more, *ends = in_a_session(erin, work)  # type: ignore[misc]
    assert (count, name, more, ends) == (MANY, "LimitExceeded", 0, ["", ""])
    assert f"at most {MANY} mounts of one user at a time" in text
    # All is gone with the namespace.
    with erin.attached(images["erofs"], erin.own / "many-0") as id:
        assert id


def test_52_never_one_on_top_of_another(erin: User, images: dict[str, Path]) -> None:
    target = erin.directory("stacked")

    def work() -> list[str]:
        with OwnedFd(os.open(target, DIRECTORY)) as fd:
            return [asked(erin.daemon.socket, images["erofs"], fd.fileno())[0] for _ in range(3)]

    assert in_a_session(erin, work) == ["", "AttachNotPermitted", "AttachNotPermitted"]


def test_52_as_many_as_the_kernel_lets_a_namespace_have(
    erin: User, images: dict[str, Path], mount_max: Callable[[int], None]
) -> None:
    def work() -> list[tuple[str, bool]]:
        answers = [attach(erin, images["erofs"], f"full-{number}") for number in range(3)]
        return [(name, "ENOSPC" in text) for name, text, _ in answers]

    def enter() -> list[tuple[str, bool]]:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        while len(listmount()) < MOST:
            with mount_api.clone_mount("/tmp") as one:
                mount_api.move_mount(one.fileno(), "/tmp")
        mount_max(len(listmount()) + 1 + 2)  # the first one of all is not listed
        return as_user(work, erin.uid)

    assert forked(enter) == [("", False), ("", False), ("MountFailed", True)]
    mount_max(MOST * 1000)
    with erin.attached(images["erofs"], erin.own / "full-2") as id:
        assert id
