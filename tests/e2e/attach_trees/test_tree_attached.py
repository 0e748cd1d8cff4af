"""Attach and Detach of disk images with several partitions: a tree of mounts, which is one thing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, MountAttr, Propagation
from mountd.kernel.mount_info import statmount
from tests.container import as_user
from tests.e2e.attach_trees.asking import TINA, TOBY, WANTED, WHOLE, Scene, ask, list_of
from tests.e2e.attaching import User, detached, id_at, records, user_of
from tests.e2e.calls import errno_of
from tests.e2e.test_sources import loops_over
from tests.e2e.trees import PLACES, TYPES, ids_at, seen
from tests.rogue import eventually

QUEUED = """
import os, socket, sys
one, other = socket.socketpair()
fd = os.open(sys.argv[1], os.O_RDONLY)
socket.send_fds(one, [b"x"], [fd])
os.close(fd)
print(flush=True)
sys.stdin.read()
"""


def test_all_of_it_there_and_back(tina: User, disk: Path) -> None:
    target = tina.directory("all")
    reply = ask(tina, disk, target)
    assert seen(target) == WHOLE
    ids = ids_at(target)
    assert len(set(ids.values())) == len(PLACES)
    assert reply["id"] == ids["root"]
    assert reply["mounts"] == [
        {
            "designator": name,
            **({"mountPoint": place} if place else {}),
            "fileSystemType": TYPES[name],
            "readOnly": True,
            "id": ids[name],
        }
        for name, place in PLACES.items()
    ]
    assert "leftOut" not in reply
    around = statmount(id_at(tina.own)).propagation & Propagation.SHARED
    for name, id in ids.items():
        found = statmount(id)
        assert found.attributes & WANTED == WANTED
        assert found.propagation == (name in ("root", "var") and around or Propagation.PRIVATE)
    assert records(tina.daemon) == sorted(map(str, ids.values()))
    assert list_of(tina) == {ids[name]: [str(target / place)] for name, place in PLACES.items()}
    assert tina.detach(ids["root"]) == ("", "", ids["root"])
    assert os.listdir(target) == []
    assert list_of(tina) == {}
    assert eventually(lambda: not loops_over(disk), 5)


@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_written_down_is_lost(tina: User, disk: Path, lazy: bool) -> None:
    """Each can be detached alone, from the last one on; or lazily the first, with all that is below it."""
    target = tina.directory(f"lost-{lazy}")
    ask(tina, disk, target)
    ids = ids_at(target)
    shutil.rmtree(tina.daemon.directory / "run/attached")
    assert tina.detach(ids["root"])[0] == "InUse"
    for name in ("root",) if lazy else reversed(PLACES):
        assert tina.detach(ids[name], lazy=lazy) == ("", "", ids[name])
    assert os.listdir(target) == []


def test_every_flag_is_locked(tina: User, disk: Path) -> None:
    """Who copies the mount namespace into one of its own takes none off, and uncovers nothing."""
    target = tina.directory("locked")

    def work() -> list[str]:
        namespaces.unshare(Clone.NEWUSER | Clone.NEWNS)
        found = []
        for place in PLACES.values():
            with OwnedFd(os.open(target / place, os.O_PATH)) as fd:
                for flag in (MountAttr.RDONLY, MountAttr.NOSUID, MountAttr.NODEV):
                    found.append(errno_of(lambda: mount_api.mount_setattr(fd.fileno(), clear=flag)))  # noqa: B023
        return [*found, errno_of(lambda: mount_api.umount(str(target / "usr")))]

    with tina.attached(disk, target):
        assert as_user(work, TINA) == [*["EPERM"] * 18, "EINVAL"]


def test_by_its_directory_lazily_and_by_root(tina: User, disk: Path) -> None:
    target = tina.directory("ways")

    def by_target() -> object:
        with Client(str(tina.daemon.socket)) as client, OwnedFd(os.open(target, os.O_PATH)) as fd:
            parameters = {"targetFileDescriptor": 0, "lazy": True}
            return client.call("Detach", parameters, [fd])[0]

    with tina.attached(disk, target):
        # It keeps the mount busy itself, so that it has to be lazy.
        assert as_user(by_target, TINA) == {}
        assert records(tina.daemon) == []
    with tina.attached(disk, target) as id:
        assert detached(tina.daemon.socket, id) == ("", "", id)
        assert os.listdir(target) == []


def test_what_is_in_use_stays_wholly(tina: User, disk: Path) -> None:
    """Wherever it is used, and however often it is tried: the marks of one time mean nothing the next."""
    target = tina.directory("busy")
    with tina.attached(disk, target) as id:
        for place in PLACES.values():
            with OwnedFd(os.open(target / place / "name", os.O_RDONLY)):
                for _ in range(3):
                    name, text, _ = tina.detach(id)
                    assert (name, text) == ("InUse", "the mount is in use"), place
                    assert seen(target) == WHOLE
        # The working directory of somebody, and a mount of somebody else's.
        with subprocess.Popen(["sleep", "60"], cwd=target / "var") as sleeping:
            assert tina.detach(id)[0] == "InUse"
            sleeping.kill()
        with mount_api.clone_mount("/proc") as other:
            mount_api.move_mount(other.fileno(), str(target / "var/tmp"))
        try:
            assert tina.detach(id)[0] == "InUse"
        finally:
            mount_api.umount(str(target / "var/tmp"))
        assert seen(target) == WHOLE
        with OwnedFd(os.open(target / "var/name", os.O_RDONLY)) as held:
            assert tina.detach(id, lazy=True) == ("", "", id)
            assert os.listdir(target) == []
            assert os.read(held.fileno(), 3) == b"var"
    assert eventually(lambda: not loops_over(disk), 5)


@contextlib.contextmanager
def on_its_way(path: Path) -> Iterator[None]:
    """Somebody has `path` open where no process shows it: in the queue of a socket."""
    with subprocess.Popen(
        [sys.executable, "-c", QUEUED, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield
        process.kill()


def test_what_no_process_shows_keeps_the_mount_that_has_it(tina: User, disk: Path) -> None:
    """The kernel has the last word: before anything is done about a mount with none below it, else then."""
    target = tina.directory("unseen")
    with tina.attached(disk, target) as id:
        for place in ("usr", "var/tmp"):
            with on_its_way(target / place / "name"):
                for _ in range(2):
                    assert tina.detach(id)[:2] == ("InUse", "the mount is in use")
                    assert seen(target) == WHOLE
        with on_its_way(target / "name"):
            name, text, _ = tina.detach(id)
            assert (name, "what was mounted below it is detached" in text) == ("InUse", True)
            assert id_at(target) == id
            assert seen(target) == {"root": "root"}
            assert records(tina.daemon) == [str(id)]
            assert list(list_of(tina)) == [id]
        assert eventually(lambda: tina.detach(id) == ("", "", id), 5)


def test_one_that_is_not_the_first(tina: User, scene: Scene, disk: Path) -> None:
    """It is the user's to detach, with what is below it; nobody else's."""
    target = tina.directory("one")
    toby = user_of(*scene, TOBY)
    with tina.attached(disk, target) as id:
        ids = ids_at(target)
        for each in ids.values():
            assert toby.detach(each)[0] == "NotFound"
        assert tina.detach(ids["var"]) == ("", "", ids["var"])
        assert tina.detach(ids["tmp"])[0] == "NotFound"
        assert tina.detach(ids["home"]) == ("", "", ids["home"])
        assert records(tina.daemon) == sorted(str(ids[each]) for each in ("root", "usr", "srv"))
        assert id_at(target / "var") == id
        assert tina.detach(id) == ("", "", id)


def test_each_counts(tina: User, disk: Path) -> None:
    """A rule grants 14 mounts: two images of six are attached, and no third."""
    targets = [tina.directory(f"count-{number}") for number in range(3)]
    with tina.attached(disk, targets[0]), tina.attached(disk, targets[1]):
        name, text, _ = tina.attach(disk, targets[2])
        assert (name, "at most 14" in text) == ("LimitExceeded", True)
        assert os.listdir(targets[2]) == []
        assert len(records(tina.daemon)) == 12
    with tina.attached(disk, targets[2]):
        assert seen(targets[2])["tmp"] == "tmp"
