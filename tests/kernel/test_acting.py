"""Acting as somebody else for a moment, the directories of a top, and what the ledger lets have one."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.errors import BadFileDescriptor, LimitExceeded, NotSupported, SyscallError
from mountd.execute.naming import Naming
from mountd.execute.run import Inputs, run
from mountd.execute.top import Top
from mountd.fds import OwnedFd, close_all
from mountd.kernel import capabilities, libc, mount_api, watch
from mountd.kernel.acting import MAXIMUM_ID, acting_as
from mountd.kernel.child import end_with_parent
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from mountd.kernel.mount_info import listmount
from mountd.ledger.book import Book
from mountd.plan.operations import MakeMount, MakeOverlay, Plan
from mountd.plan.stack import FORCED
from tests.container import forked
from tests.sealing import Unsealed

OWNER = (21_700, 21_701)  # of the top; not known to the system
PR_GET_PDEATHSIG, PR_GET_DUMPABLE = 2, 3


@pytest.fixture
def place(scratch: Path) -> Iterator[Path]:
    """A layer, and a directory of OWNER's."""
    path = scratch / "topped"
    for each in (path, path / "lower", path / "home"):
        each.mkdir(mode=0o755)
    (path / "lower/file").write_text("lower")
    os.chown(path / "home", *OWNER)
    yield path
    shutil.rmtree(path)


def top_of(place: Path) -> Top:
    return Top(mount_api.clone_mount(str(place / "home")), OWNER, 0o755)


def made_of(place: Path, naming: Naming | None = None) -> OwnedFd:
    plan = Plan((MakeOverlay(1, FORCED, OWNER), MakeMount(MountAttr.NOSUID | MountAttr.NODEV)))
    top, layer = top_of(place), mount_api.clone_mount(str(place / "lower"))
    try:
        inputs = Inputs(
            image_fd=None,
            userns_fd=None,
            seal=Unsealed(),
            naming=naming,
            layers=[layer.fileno()],
            top=top,
        )
        return run(plan, inputs)
    except BaseException:
        top.discard()
        raise
    finally:
        top.close()
        close_all([layer])


def status(field: str) -> str:
    return Path("/proc/self/status").read_text().partition(f"{field}:")[2].split("\n")[0]


def effective() -> int:
    return int(status("CapEff"), 16)


def test_acting_as_another_is_over_when_it_is(place: Path) -> None:
    """All that the kernel takes away or gives back on the way is as it was."""

    def look() -> tuple[object, ...]:
        ids = status("Uid").split()[3], status("Gid").split()[3]
        return (*ids, effective(), libc.call("prctl", PR_GET_DUMPABLE, 0, 0, 0, 0))

    def work() -> list[object]:
        end_with_parent()
        capabilities.put_aside()
        before = look()
        with acting_as(*OWNER):
            inside = status("Uid").split()[:4], status("Gid").split()[3], effective()
            (place / "home/made").write_text("")
            denied = os.access(place / "lower", os.W_OK, effective_ids=True)
        rights: list[int] = []

        def fail() -> None:
            with acting_as(*OWNER, as_root_of_its_files=True):
                rights.append(effective())
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        death = ctypes.c_int()
        libc.call("prctl", PR_GET_PDEATHSIG, ctypes.addressof(death), 0, 0, 0)
        with acting_as(0, 0, as_root_of_its_files=True):
            as_root = effective()
        return [before, look(), inside, denied, rights, as_root, death.value]

    before, after, inside, denied, rights, as_root, death = forked(work)
    assert before == after
    ids, group, acting = inside  # type: ignore[misc]
    assert (ids, group) == (["0", "0", "0", str(OWNER[0])], str(OWNER[1]))
    assert not acting & capabilities.OF_FILES
    assert not denied
    # To the bit: neither CAP_MKNOD nor CAP_SYS_RESOURCE is among them.
    assert rights == [as_root]
    assert as_root == capabilities.WRITING | 1 << capabilities.CAP_SYS_ADMIN
    assert death == signal.SIGKILL
    made = (place / "home/made").stat()
    assert (made.st_uid, made.st_gid) == OWNER


def test_ids_that_cannot_be_checked() -> None:
    def work() -> int:
        with pytest.raises(NotSupported), acting_as(MAXIMUM_ID + 1, 0):
            pass
        return int(status("Uid").split()[3]) + int(status("Gid").split()[3])

    assert forked(work) == 0


def test_its_directories_are_the_owners_and_go_if_nothing_comes_of_it(place: Path) -> None:
    home = place / "home"
    top = top_of(place)
    for name, mode in (("upper", 0o40755), ("work", 0o40700)):
        found = (home / name).stat()
        assert (found.st_uid, found.st_gid, found.st_mode) == (*OWNER, mode)
    assert len(set(top.names())) == 2
    top.discard()
    assert os.listdir(home) == []
    top.close()
    (home / "upper").mkdir()
    os.chown(home / "upper", *OWNER)
    top = top_of(place)
    top.discard()
    top.close()
    # What was there stays.
    assert os.listdir(home) == ["upper"]


def test_what_cannot_be_opened_leaves_nothing(place: Path) -> None:
    home, fds = place / "home", os.listdir("/proc/self/fd")
    (home / "work").symlink_to("/var")
    with pytest.raises(BadFileDescriptor, match="work"):
        top_of(place)
    assert os.listdir(home) == ["work"]
    (home / "work").unlink()
    os.chown(home, 0, 0)
    with pytest.raises(SyscallError, match="EACCES"):
        top_of(place)
    for name in ("openat2", "capget"):
        os.chown(home, *OWNER)
        libc.inject[name] = errno.EIO
        try:
            with pytest.raises(SyscallError):
                top_of(place)
        finally:
            libc.inject.clear()
        assert os.listdir(home) == []
    assert os.listdir("/proc/self/fd") == fds


def test_every_step_can_fail_and_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")
    for name in ("fsopen", "fsconfig", "fsmount"):
        with monkeypatch.context() as patch:
            patch.setitem(libc.inject, name, errno.EIO)
            with pytest.raises(SyscallError):
                made_of(place)
        assert os.listdir(place / "home") == [], name
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL])
def test_by_names_where_descriptors_are_not_taken(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As before Linux 6.15. The names are those of what is open, and of nothing that has taken its place."""

    def refuse(self: FsContext, key: str, fd: int) -> None:
        # The last moment before the names are followed.
        for name in ("upper", "work"):
            if not (place / f"home/{name}").is_symlink():
                (place / f"home/{name}").rename(place / f"home/{name}.moved")
                (place / f"home/{name}").symlink_to(place / "lower")
        raise SyscallError(number, f"fsconfig({key}, {fd})")

    def work() -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(FsContext, "set_fd", refuse)
            directory = place / "own"
            directory.mkdir()
            before = len(listmount())
            with made_of(place, Naming(str(directory))) as mount:
                fd = os.open("file", os.O_WRONLY | os.O_TRUNC, dir_fd=mount.fileno())
                os.write(fd, b"written")
                os.close(fd)
                return len(listmount()) == before

    assert forked(work)
    assert (place / "lower/file").read_text() == "lower"
    assert (place / "home/upper.moved/file").read_text() == "written"


def test_one_claim_at_a_time(tmp_path: Path) -> None:
    """Whoever's it is, and until the place is given back."""
    with watch.create() as watches:
        book = Book(str(tmp_path), watches.fileno(), None, 4, frozenset())
        one, other = book.reserve((1, 0), "r", None), book.reserve((2, 0), "r", None)
        book.claim(one, "8:1")
        book.claim(one, "8:2")
        with pytest.raises(LimitExceeded):
            book.claim(other, "8:2")
        book.claim(other, "8:3")
        one.give_back()
        book.claim(other, "8:2")
        other.give_back()
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
