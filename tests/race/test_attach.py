"""Attaching and detaching: exchanging what is above a target has nothing happen where it must not."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mountd.errors import AttachNotPermitted, SyscallError
from mountd.evidence.target import Who, find
from mountd.execute import attachment
from mountd.execute.attachment import Outcome, is_there
from mountd.fds import OwnedFd
from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr, StatmountMask, Unmount
from mountd.kernel.fs_context import FsContext
from mountd.kernel.mount_info import mount_id, statmount
from mountd.trust.attach import permits
from tests.race.swapping import ATTACKER, Ground, Seen, loses, never_wins

WHO = Who(ATTACKER, ATTACKER, frozenset(), frozenset({0}))
Attach = Callable[[OwnedFd, int, Path], bool]


@pytest.fixture
def namespace() -> Iterator[int]:
    with OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY)) as fd:
        yield fd.fileno()


def a_tmpfs() -> OwnedFd:
    with FsContext.open("tmpfs") as context:
        context.create()
        return context.mount(MountAttr.RDONLY)


def above(mount: OwnedFd) -> tuple[int, int]:
    """The directory that an attached mount is in, whatever it is called by now."""
    with OwnedFd(os.open("..", os.O_PATH, dir_fd=mount.fileno())) as fd:
        status = os.fstat(fd.fileno())
    return status.st_dev, status.st_ino


def carefully(namespace: int) -> Attach:
    def attach(mount: OwnedFd, target: int, path: Path) -> bool:
        try:
            place = find(target, namespace, WHO, None)
        except AttachNotPermitted:
            return False
        if not permits(f"{path.parent}/**", place.path, home=None, uid=ATTACKER, gid=ATTACKER):
            return False

        def problem(mounted: int | None) -> str | None:
            return place.problem(WHO, mounted)

        try:
            return attachment.attach(mount.fileno(), target, namespace, WHO.ids, problem) is None
        except SyscallError:
            return False  # a component was not there just then

    return attach


def naively(mount: OwnedFd, _: int, path: Path) -> bool:
    """By name, once what has the name was seen to belong to the caller."""
    try:
        status = os.stat(path)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != ATTACKER:
            return False
        mount_api.move_mount(mount.fileno(), str(path))
    except OSError:
        return False
    return True


def scene(ground: Ground) -> tuple[Path, Path, Path, int]:
    """A directory of the attacker's and a link to root's; the target, and what is never mounted on."""
    mine, roots = ground.theirs / "mine", ground.trusted / "mine"
    for path in (mine / "target", roots / "target"):
        path.mkdir(parents=True)
    ground.give(mine / "target")
    # By path, both belong to the attacker for as long as a look takes.
    link = ground.theirs / "link"
    link.symlink_to(roots)
    return mine, link, mine / "target", os.open(mine / "target", os.O_PATH)


def attaching(attach: Attach, target: int, path: Path) -> Seen:
    mine = above_of(target)
    with a_tmpfs() as mount:
        id = mount_id(mount.fileno())
        good = attach(mount, target, path)
        there = is_there(id)
        where = above(mount) if there else None
        if there:
            os.fchdir(mount.fileno())
            mount_api.umount(".", Unmount.DETACH)
            os.chdir("/")
    if there != good or (there and where != mine):
        return Seen.WON
    return Seen.GOOD if good else Seen.REFUSED


def above_of(target: int) -> tuple[int, int]:
    with OwnedFd(os.open("..", os.O_PATH, dir_fd=target)) as fd:
        status = os.fstat(fd.fileno())
    return status.st_dev, status.st_ino


def test_attach(ground: Ground, namespace: int) -> None:
    one, other, path, fd = scene(ground)
    with OwnedFd(fd) as target:
        never_wins(one, other, lambda: attaching(carefully(namespace), target.fileno(), path))


def test_a_naive_attach_loses(ground: Ground) -> None:
    one, other, path, fd = scene(ground)
    with OwnedFd(fd) as target:
        loses(one, other, lambda: attaching(naively, target.fileno(), path))


@contextmanager
def two_mounts(ground: Ground) -> Iterator[tuple[Path, Path, int, Callable[[], int]]]:
    """Two directories with a mount each: the attacker's, at the target, and root's, made by the callable."""
    mine, roots = ground.theirs / "mine", ground.theirs / "roots"
    for path in (mine / "target", roots / "target"):
        path.mkdir(parents=True)
        ground.give(path)
    with (
        OwnedFd(os.open(mine / "target", os.O_PATH)) as target,
        OwnedFd(os.open(roots / "target", os.O_PATH)) as kept,
    ):
        made: list[int] = []

        def mounted() -> int:
            if not made or not is_there(made[-1]):
                with a_tmpfs() as mount:
                    made.append(mount_id(mount.fileno()))
                    mount_api.move_mount(
                        mount.fileno(), "", to_dir_fd=kept.fileno(), flags=attachment.AT_TARGET
                    )
            return made[-1]

        yield mine, roots, target.fileno(), mounted
    for path in (mine / "target", roots / "target"):
        with suppress(SyscallError):
            mount_api.umount(str(path))


def detaching(detach: Callable[[int], bool], target: int, mounted: Callable[[], int]) -> Seen:
    root_s = mounted()
    with a_tmpfs() as mount:
        id = mount_id(mount.fileno())
        mount_api.move_mount(mount.fileno(), "", to_dir_fd=target, flags=attachment.AT_TARGET)
    good = detach(id)
    gone = not is_there(id)
    if not gone:
        # In the directory that it is in, whatever that is called.
        with OwnedFd(os.open("..", os.O_PATH, dir_fd=target)) as mine:
            os.fchdir(mine.fileno())
        mount_api.umount("target")
        os.chdir("/")
    if not is_there(root_s) or gone != good:
        return Seen.WON
    return Seen.GOOD if good else Seen.REFUSED


def test_detach(ground: Ground, namespace: int) -> None:
    def detach(id: int) -> bool:
        try:
            return attachment.detach(id, namespace, WHO.ids, lazy=False) is Outcome.DONE
        except SyscallError:
            return False

    with two_mounts(ground) as (one, other, target, mounted):
        never_wins(one, other, lambda: detaching(detach, target, mounted))


def test_a_naive_detach_loses(ground: Ground) -> None:
    def detach(id: int) -> bool:
        path = statmount(id, StatmountMask.MNT_POINT).mount_point or ""
        try:
            mount_api.umount(path, Unmount.NOFOLLOW)
        except SyscallError:
            return False
        return True

    with two_mounts(ground) as (one, other, target, mounted):
        loses(one, other, lambda: detaching(detach, target, mounted))
