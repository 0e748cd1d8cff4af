"""What is attached is locked: nosuid and nodev cannot be lifted by its user (THREATS.md, C 43 to 45)."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, FsPick, MountAttr, OpenTree, Propagation, Unmount
from mountd.kernel.fs_context import FsContext
from mountd.kernel.libc import call
from mountd.kernel.mount_info import statmount
from tests.container import as_user, drop_capabilities, forked, in_container
from tests.daemon import Daemon
from tests.e2e.attaching import User, asked, detached, granting, id_at, user_of
from tests.e2e.calls import errno_of
from tests.e2e.conftest import trusting
from tests.images import build_image

FAY = 4230
FULL = ((0, 0, 65536),)  # a container whose root is the host's
LOCKED = (MountAttr.NOSUID, MountAttr.NODEV, MountAttr.RDONLY)
Scene = tuple[Daemon, Path]


@pytest.fixture(scope="module")
def scene(place: Path, images: dict[str, Path]) -> Iterator[Scene]:
    with granting(place, "locked", lambda grant: trusting(place / "trusted", attach=grant)) as made:
        yield made


@pytest.fixture
def fay(scene: Scene) -> User:
    return user_of(*scene, FAY)


@pytest.fixture(scope="module")
def hostile(place: Path, images: dict[str, Path]) -> Path:
    """An image with a device node and a set-uid program that shows whose rights it has."""
    tree = place / "locked-tree"
    tree.mkdir(mode=0o755)
    os.mknod(tree / "disk", stat.S_IFBLK | 0o666, os.stat("/dev/loop0").st_rdev)
    os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (tree / "id").write_bytes(Path("/usr/bin/id").read_bytes())
    for name, mode in (("disk", 0o666), ("null", 0o666), ("id", 0o4755)):
        (tree / name).chmod(mode)
    return build_image("squashfs", tree, place / "trusted/locked.raw")


def reconfigure(fd: int) -> None:
    with FsContext.pick("", dir_fd=fd, flags=FsPick.EMPTY_PATH) as context:
        context.set_flag("rw")
        context.reconfigure()


def attempts(target: Path) -> dict[str, str]:
    """What root of a namespace of one's own can try, and the errno that it gets."""
    done: dict[str, str] = {}
    with OwnedFd(os.open(target, os.O_PATH)) as fd:
        for flag in LOCKED:
            name = str(flag.name)
            done[name] = errno_of(lambda flag=flag: mount_api.mount_setattr(fd.fileno(), clear=flag))  # type: ignore[misc]
            with mount_api.open_tree(fd.fileno(), "", OpenTree.CLONE | OpenTree.EMPTY_PATH) as clone:
                done[f"{name} of a clone"] = errno_of(
                    lambda flag=flag: mount_api.mount_setattr(clone.fileno(), clear=flag)  # type: ignore[misc]
                )
        done["remount"] = errno_of(
            lambda: call("mount", None, bytes(target), None, 32 | 4096, None)  # MS_REMOUNT|MS_BIND
        )
        done["reconfigure"] = errno_of(lambda: reconfigure(fd.fileno()))
        done["unmount"] = errno_of(lambda: mount_api.umount(str(target), Unmount.DETACH))
    done["block"] = errno_of(lambda: os.close(os.open(target / "disk", os.O_RDONLY)))
    done["character"] = errno_of(lambda: os.close(os.open(target / "null", os.O_RDONLY)))
    return done


def test_in_a_namespace_of_one_s_own(fay: User, hostile: Path) -> None:
    def work() -> dict[str, str]:
        namespaces.unshare(Clone.NEWUSER | Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        return attempts(target)

    target = fay.directory("own")
    with fay.attached(hostile, target):
        found = as_user(work, FAY)
        assert all(found.values()), found
        assert all(found[str(flag.name)] == "EPERM" for flag in LOCKED), found
        assert (found["block"], found["character"]) == ("EACCES", "EACCES")
        # It would have shown what it hides.
        assert found["unmount"] == "EINVAL"


def test_as_one_s_self(fay: User, hostile: Path) -> None:
    target = fay.directory("self")
    with fay.attached(hostile, target):
        found = as_user(lambda: attempts_of_a_user(target), FAY)
        assert found == {"block": "EACCES", "character": "EACCES", "uid": str(FAY)}


def attempts_of_a_user(target: Path) -> dict[str, str]:
    run = subprocess.run([target / "id", "-u"], capture_output=True, text=True, check=True)
    return {
        "block": errno_of(lambda: os.close(os.open(target / "disk", os.O_RDONLY))),
        "character": errno_of(lambda: os.close(os.open(target / "null", os.O_RDONLY))),
        "uid": run.stdout.strip(),
    }


def test_even_the_host_s_root_cannot_lift_it(fay: User, hostile: Path) -> None:
    """A lock binds everybody in the namespace that it is in; so no service can be talked into it."""
    target = fay.directory("root")
    with fay.attached(hostile, target), OwnedFd(os.open(target, os.O_PATH)) as fd:
        for flag in LOCKED:
            assert errno_of(lambda flag=flag: mount_api.mount_setattr(fd.fileno(), clear=flag)) == "EPERM"  # type: ignore[misc]


def test_uid_0_that_is_not_the_host_s_root(scene: Scene, hostile: Path, containers: None) -> None:
    """A service without capabilities, and one in a container whose root is the host's."""
    zero = user_of(*scene, 0)
    target = zero.directory("zero")
    socket = zero.daemon.socket

    def work() -> tuple[int, str, int]:
        with OwnedFd(os.open(target, os.O_PATH)) as fd:
            drop_capabilities()
            name, text, id = asked(socket, hostile, fd.fileno(), userns="none")
        assert name == "", text
        attributes = statmount(id).attributes
        return attributes, detached(socket, id)[0], id_at(target)

    wanted = MountAttr.NOSUID | MountAttr.NODEV
    for found in (forked(work), in_container(work, uids=FULL)):
        assert found[0] & wanted == wanted
        assert found[1] == ""
