"""The descriptor of an image that somebody has given, and where its file is."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from mountd.errors import BadFileDescriptor
from mountd.evidence import location, mounts
from mountd.fds import OwnedFd
from mountd.kernel import fuse, libc, mount_api, paths
from mountd.kernel.flags import MountAttr, OpenTree
from mountd.kernel.numbers import AT_FDCWD
from mountd.source import descriptor
from mountd.source.descriptor import inspect_descriptor
from mountd.source.model import BackingFile
from tests.container import USER, user_namespace
from tests.leases import without_leases

FIELD = "source.imageFileDescriptor"


def opened(path: str, flags: int) -> Callable[[Path], int]:
    return lambda image: os.open(path or image, flags)


def pipe(_: Path) -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (opened("", os.O_PATH), "opened with O_PATH"),
        (opened("", os.O_RDWR | os.O_APPEND), "opened with O_APPEND"),
        (opened("", os.O_RDONLY | os.O_DIRECT), "opened with O_DIRECT"),
        (opened("", os.O_WRONLY), "not open for reading"),
        (opened("/", os.O_RDONLY), "it is a directory"),
        (opened("/dev/null", os.O_RDONLY), "it is a character device"),
        (opened("/dev/loop0", os.O_RDONLY), "it is a block device"),
        (opened("/proc/self/exe", os.O_PATH | os.O_NOFOLLOW), "opened with O_PATH"),
        (pipe, "it is a pipe"),
        (lambda _: socket.socket(socket.AF_UNIX).detach(), "it is a socket"),
        (lambda _: os.eventfd(0), "it is no file"),
        (lambda _: os.pidfd_open(os.getpid()), "not a regular file"),
    ],
)
def test_descriptors_that_are_refused(
    images: dict[str, Path], make: Callable[[Path], int], reason: str
) -> None:
    with (
        OwnedFd(make(images["erofs"])) as fd,
        pytest.raises(BadFileDescriptor, match=reason) as raised,
    ):
        inspect_descriptor(fd.fileno(), FIELD)
    assert raised.value.parameters["parameter"] == FIELD


def test_a_descriptor_on_fuse(
    monkeypatch: pytest.MonkeyPatch, images: dict[str, Path], tmp_path: Path
) -> None:
    """fusectl has a directory for each connection, with the number of its device as the kernel has it."""
    monkeypatch.setattr(fuse, "CONNECTIONS", str(tmp_path))
    # What was found out about the mount is remembered.
    monkeypatch.setattr(descriptor, "mount_is_fuse", descriptor.mount_is_fuse.__wrapped__)
    device = images["erofs"].stat().st_dev
    (tmp_path / str(os.major(device) << 20 | os.minor(device))).mkdir()
    with (
        OwnedFd(os.open(images["erofs"], os.O_RDONLY)) as fd,
        pytest.raises(BadFileDescriptor, match="on a FUSE file system"),
    ):
        inspect_descriptor(fd.fileno(), FIELD)


@pytest.mark.parametrize(("flags", "writable"), [(os.O_RDONLY, False), (os.O_RDWR, True)])
def test_a_good_descriptor(images: dict[str, Path], flags: int, writable: bool) -> None:
    status = images["erofs"].stat()
    with OwnedFd(os.open(images["erofs"], flags | os.O_NONBLOCK)) as fd:
        found = inspect_descriptor(fd.fileno(), FIELD)
    expected = (status.st_size, status.st_dev, status.st_ino, 0, 0, status.st_mode)
    assert found == BackingFile(*expected, writable, str(images["erofs"]), status.st_ctime_ns)


@pytest.fixture(autouse=True)
def nothing_is_known_of_mounts() -> Iterator[None]:
    """What a test pretends about a mount is not remembered for the next one."""
    mounts.check.cache_clear()
    yield
    mounts.check.cache_clear()


@pytest.fixture
def backing(images: dict[str, Path]) -> BackingFile:
    with OwnedFd(os.open(images["erofs"], os.O_RDONLY)) as fd:
        return inspect_descriptor(fd.fileno(), FIELD)


def problem(backing: BackingFile, *, name_paths: bool = True) -> str | None:
    # Where a test pretends another path, the walk does not come to the file.
    path = backing.path_hint or "/"
    with (
        OwnedFd(os.open(path if os.path.isfile(path) else "/", os.O_RDONLY)) as fd,
        location.Walker() as walker,
    ):
        found = location.locate(fd.fileno(), backing, walker, name_paths=name_paths)
        # What is held from the first walk changes nothing.
        assert location.locate(fd.fileno(), backing, walker, name_paths=name_paths) == found
    assert (found.location_problem is None) == (found.root_owned_path is not None)
    return found.location_problem


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (None, "it has no path"),
        ("", "it has no path"),
        ("memfd:image", "it has no path"),
        ("//etc/passwd", "not a plain one"),
        ("/etc/../etc/passwd", "not a plain one"),
        ("/etc/./passwd", "not a plain one"),
        ("/etc/passwd/", "not a plain one"),
        pytest.param("/" + "a/" * 64 + "a", "not a plain one", id="deep"),
        ("/memfd:image (deleted)", "does not exist in the mount namespace"),
        ("/no/such/file", "does not exist in the mount namespace"),
        ("/etc/passwd/file", "does not exist in the mount namespace"),
        ("/etc/passwd", "another file is at its path"),
        ("/etc", "another file is at its path"),
        ("/etc/mtab", "a symbolic link in it"),
        ("/proc/version", "/proc is on a file system of type proc, whose contents others"),
        ("/tmp/file", "/tmp is writable by everybody"),
        pytest.param("/" + "a" * 256, "cannot be checked (ENAMETOOLONG)", id="long"),
    ],
)
def test_paths_that_prove_nothing(backing: BackingFile, hint: str | None, text: str) -> None:
    assert problem(backing) is None
    found = problem(replace(backing, path_hint=hint))
    assert found is not None
    assert text in found


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda place: os.chown(place, USER, 0), "belongs to uid 4000, not to root"),
        (lambda place: place.chmod(0o775), "is writable by its group"),
        (lambda place: place.chmod(0o757), "is writable by everybody"),
        (lambda place: place.chmod(0o1777), "is writable by everybody"),
        (lambda place: place.chmod(0o500), None),
        (lambda place: os.chown(place, 0, USER), None),
    ],
)
@pytest.mark.parametrize("part", ["outer", "outer/inner", "outer/inner/image"])
def test_every_component_has_to_be_roots(
    scratch: Path, change: Callable[[Path], None], text: str | None, part: str
) -> None:
    inner = scratch / "outer/inner"
    inner.mkdir(parents=True)
    (inner / "image").write_bytes(b"x")
    try:
        with OwnedFd(os.open(inner / "image", os.O_RDONLY)) as fd:
            backing = inspect_descriptor(fd.fileno(), FIELD)
        assert problem(backing) is None
        change(scratch / part)
        if text is None:
            assert problem(backing) is None
        else:
            assert problem(backing) == f"{scratch / part} {text}"
            assert problem(backing, name_paths=False) == f"a part of its path {text}"
    finally:
        (inner / "image").unlink()
        inner.rmdir()
        (scratch / "outer").rmdir()


def in_a_mapping(fd: int) -> AbstractContextManager[object]:
    mapping = mmap.mmap(fd, 1)
    os.close(fd)
    return mapping


def on_its_way(fd: int) -> AbstractContextManager[object]:
    """In a message that nobody has received."""
    stack = ExitStack()
    sender, _ = (stack.enter_context(end) for end in socket.socketpair())
    socket.send_fds(sender, [b"x"], [fd])
    os.close(fd)
    return stack


@pytest.mark.parametrize(
    ("way", "flags"),
    [
        (OwnedFd, os.O_RDWR),
        (OwnedFd, os.O_WRONLY),
        (OwnedFd, os.O_WRONLY | os.O_APPEND),
        (in_a_mapping, os.O_RDWR),
        (on_its_way, os.O_WRONLY),
    ],
)
def test_who_can_still_write_to_what_has_become_roots(
    scratch: Path, way: Callable[[int], AbstractContextManager[object]], flags: int
) -> None:
    """Whoever had it open before goes on to write, whatever the mode has become."""
    image = scratch / "image"
    image.write_bytes(b"x")
    os.chown(image, USER, USER)
    try:
        writer = os.open(image, flags)
        with way(writer):
            os.chown(image, 0, 0)
            with OwnedFd(os.open(image, os.O_RDONLY)) as fd:
                backing = inspect_descriptor(fd.fileno(), FIELD)
            assert problem(backing) == location.WRITTEN
        assert problem(backing) is None
    finally:
        image.unlink()


def test_readers_are_no_writers(images: dict[str, Path], backing: BackingFile) -> None:
    with OwnedFd(os.open(images["erofs"], os.O_RDONLY)), OwnedFd(os.open(images["erofs"], os.O_PATH)):
        assert problem(backing) is None


def test_where_there_are_no_leases(backing: BackingFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is not known who has it open, and that is no proof."""
    without_leases(monkeypatch)
    assert problem(backing) == f"{location.UNKNOWN_WRITERS} (EINVAL)"


def test_who_opens_it_meanwhile_ends_nobody(images: dict[str, Path], backing: BackingFile) -> None:
    """The kernel tells whoever has a lease by a signal."""
    pid = os.fork()
    if pid == 0:
        while True:
            os.close(os.open(images["erofs"], os.O_RDWR))
    try:
        seen = {problem_of_writers(backing) for _ in range(2000)}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert seen <= {None, location.WRITTEN}
    assert location.WRITTEN in seen


def problem_of_writers(backing: BackingFile) -> str | None:
    with OwnedFd(os.open(str(backing.path_hint), os.O_RDONLY)) as fd:
        return location.problem_of_writers(fd.fileno())


@pytest.mark.parametrize("type", ["fuse.sshfs", "fuse", "fuseblk", "nfs4", "cifs", "9p", "virtiofs", None])
def test_a_server_somewhere_on_the_way(
    monkeypatch: pytest.MonkeyPatch, backing: BackingFile, type: str | None
) -> None:
    class Info:
        fs_type = type

    monkeypatch.setattr(mounts, "statmount", lambda _id: Info)
    assert "whose contents somebody else decides" in str(problem(backing))


@pytest.fixture
def mapped(scratch: Path) -> Iterator[Path]:
    """A user's directory with an image in it, and a mount of it that shows both as root's."""
    theirs, shown = scratch / "theirs", scratch / "shown"
    theirs.mkdir()
    shown.mkdir()
    (theirs / "image").write_bytes(b"x")
    for path in (theirs, theirs / "image"):
        os.chown(path, USER, USER)
    with (
        mount_api.open_tree(AT_FDCWD, str(theirs), OpenTree.CLONE) as tree,
        user_namespace([(USER, 0, 1)]) as userns,
    ):
        mount_api.mount_setattr(tree.fileno(), set=MountAttr.IDMAP, userns_fd=userns.fileno())
        mount_api.move_mount(tree.fileno(), str(shown))
    yield shown
    libc.call("umount2", str(shown).encode(), 0)
    shutil.rmtree(theirs)
    shown.rmdir()


def test_an_idmapped_mount_makes_nothing_roots(mapped: Path) -> None:
    assert (mapped / "image").stat().st_uid == 0
    with OwnedFd(os.open(mapped / "image", os.O_RDONLY)) as fd:
        backing = inspect_descriptor(fd.fileno(), FIELD)
    assert problem(backing) == f"{mapped} is on an idmapped mount, which shows files of others as root's"
    assert "a part of its path is on an idmapped mount" in str(problem(backing, name_paths=False))


def test_the_root_itself_may_be_idmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a container often is."""

    class Info:
        fs_type = "ext4"
        attributes = MountAttr.IDMAP

    monkeypatch.setattr(mounts, "statmount", lambda _id: Info)
    assert mounts.problem_of(1, is_root=True) is None
    assert "on an idmapped mount" in str(mounts.problem_of(1))


@pytest.mark.parametrize("name", ["statx", "statmount"])
@pytest.mark.parametrize(("number", "text"), [(errno.EIO, "(EIO)"), (errno.EACCES, "(EACCES)")])
def test_what_cannot_be_checked_is_no_proof(
    monkeypatch: pytest.MonkeyPatch, backing: BackingFile, name: str, number: int, text: str
) -> None:
    monkeypatch.setitem(libc.inject, name, number)
    found = str(problem(backing))
    assert "cannot be checked" in found
    assert text in found


def test_flags_of_a_descriptor_are_asked_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, images: dict[str, Path]
) -> None:
    """Of what was opened with O_PATH not even the status is asked, which could go to a FUSE server."""
    monkeypatch.setitem(libc.inject, "statx", errno.EIO)
    with (
        OwnedFd(os.open(images["erofs"], os.O_PATH)) as fd,
        pytest.raises(BadFileDescriptor, match="O_PATH"),
    ):
        inspect_descriptor(fd.fileno(), FIELD)
    assert paths.STATX_FLAGS[False, False] & 0x4000  # AT_STATX_DONT_SYNC
