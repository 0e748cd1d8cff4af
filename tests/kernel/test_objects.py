"""What is in an object directory: root's alone, or not; and an image of it that takes too much room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.errors import LimitExceeded
from mountd.evidence import objects
from mountd.evidence.objects import problem_inside
from mountd.fds import OwnedFd
from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from mountd.service import composefs
from mountd.service.composefs import kept
from mountd.store import composefs_build, program
from mountd.store.composefs_build import Made
from mountd.store.quota import Limits
from mountd.store.record import MAXIMUM_OWNERS, Owner
from mountd.store.store import Store
from tests.images import build_image, build_tree

OWNER = Owner(1000, 1000)


@pytest.fixture
def directory(scratch: Path) -> Iterator[Path]:
    path = scratch / "objects"
    (path / "0a/0b").mkdir(parents=True)
    (path / "0a/0b/object").write_text("contents")
    (path / "object").write_text("contents")
    (path / "link").symlink_to("object")
    yield path
    shutil.rmtree(path)


def problem(path: Path) -> str | None:
    with OwnedFd(os.open(path, os.O_RDONLY | os.O_DIRECTORY)) as fd:
        return problem_inside(fd.fileno())


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.chown(path / "0a", 1000, 0),
        lambda path: os.chown(path / "object", 1000, 0),
        lambda path: os.chown(path / "link", 1000, 0, follow_symlinks=False),
        lambda path: (path / "0a").chmod(0o775),
        lambda path: (path / "object").chmod(0o646),
        lambda path: os.chown(path / "0a/0b", 1000, 0),
        lambda path: os.chown(path / "0a/0b/object", 1000, 0),
        lambda path: (path / "0a/0b/object").chmod(0o664),
    ],
)
def test_what_others_can_change(directory: Path, change: Callable[[Path], None]) -> None:
    assert problem(directory) is None
    change(directory)
    assert problem(directory) == "what is in it can be changed by others than root"


@pytest.mark.parametrize("name", ["object", "0a/0b/object"])
@pytest.mark.parametrize("mode", [0o644, 0o000])
def test_what_somebody_can_still_write_to(directory: Path, name: str, mode: int) -> None:
    (directory / name).chmod(mode)
    with OwnedFd(os.open(directory / name, os.O_RDWR)):
        assert problem(directory) == "somebody has what is in it open for writing"
    assert problem(directory) is None


@pytest.mark.parametrize("hidden", ["0a", "0a/0b", "object", "0a/0b/object"])
def test_what_is_hidden_by_a_mount(directory: Path, hidden: str) -> None:
    """What is looked at has to be what the composefs has, which is below it."""
    other = directory.parent / "other"
    (other / "0b").mkdir(parents=True)
    (other / "object").write_text("root's")
    path = directory / hidden
    source = other if path.is_dir() else other / "object"
    os.chown(path, 1000, 0)
    with mount_api.clone_mount(str(source)) as clone:
        mount_api.move_mount(clone.fileno(), str(path))
    try:
        assert path.stat().st_uid == 0
        assert problem(directory) == "something is mounted on what is in it"
    finally:
        mount_api.umount(str(path))
        shutil.rmtree(other)


def test_more_directories_in_one_another_than_are_looked_at(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "MAXIMUM_DEPTH", 1)
    assert problem(directory) == "there are more than 1 directories in one another in it"


def test_more_than_is_looked_at(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "MAXIMUM_NAMES", 2)
    assert problem(directory) == "there are more than 2 names in it"


class Keeping:
    """A store of images that are made anew, and images that differ in their label."""

    def __init__(self, state: Path, image: Path, limits: Limits) -> None:
        self.store = Store(state).part("regenerated", limits)
        self.store.prepare()
        self._data = image.read_bytes()

    def keep(self, label: str, owner: Owner = OWNER, name: str | None = None) -> str:
        with OwnedFd(os.memfd_create(label)) as fd:
            data = bytearray(self._data)
            data[1024 + 0x48 : 1024 + 0x48 + len(label)] = label.encode()
            os.write(fd.fileno(), data)
            return kept(Made(fd, len(data), {}), name or label, self.store, owner)

    @property
    def known(self) -> set[str]:
        return {record.digest for record in self.store.records()}


@pytest.fixture
def keeping(scratch: Path, tmp_path: Path) -> Iterator[Callable[[Limits], Keeping]]:
    image = build_image("erofs", build_tree(tmp_path / "tree"), tmp_path / "image.erofs")
    yield lambda limits: Keeping(scratch / "state", image, limits)
    shutil.rmtree(scratch / "state")


def test_images_that_nobody_uses_make_room(keeping: Callable[[Limits], Keeping]) -> None:
    case = keeping(Limits(owner_images=1))
    first = case.keep("one")
    second = case.keep("two")
    assert first != second
    assert case.known == {second}
    held, _ = case.store.lookup(second)
    with held, pytest.raises(LimitExceeded):
        case.keep("three")
    assert composefs.LIMITS.owner_images < composefs.LIMITS.images


def test_whoever_has_too_many_takes_none_from_others(keeping: Callable[[Limits], Keeping]) -> None:
    case = keeping(Limits(owner_images=1, images=3))
    of_other = case.keep("other", Owner(1001, 1001))
    case.keep("one")
    # On the same account, as whoever else pays.
    second = case.keep("two", Owner(100000, OWNER.charged))
    assert case.known == {of_other, second}
    held, _ = case.store.lookup(second)
    with held, pytest.raises(LimitExceeded):
        case.keep("three")
    assert case.known == {of_other, second}
    # Where there is no room for anybody, it is made.
    third = case.keep("third", Owner(1002, 1002))
    assert case.known == {of_other, second, third}
    fourth = case.keep("fourth", Owner(1003, 1003))
    assert fourth in case.known
    assert len(case.known) == 3


def test_nothing_goes_where_that_would_not_help(keeping: Callable[[Limits], Keeping]) -> None:
    """The limit is not about room, or not enough of it is to be had."""
    case = keeping(Limits())
    store = case.store
    first = case.keep("first", Owner(1001, 1001))
    size = store.record(first).size
    held, _ = store.lookup(case.keep("held", Owner(100000, OWNER.charged)))
    known = case.known
    for number in range(1, MAXIMUM_OWNERS):
        case.keep("held", Owner(100000 + number, OWNER.charged))
    # It has enough owners, and is there for others all the same.
    shared = case.keep("held", Owner(99999, OWNER.charged), "anew")
    assert shared in known
    assert store.record(shared).name == "anew"
    assert case.known == known
    for limits in (Limits(total_bytes=2 * size - 1), Limits(images=1), Limits(owner_images=1)):
        store.limits = limits
        with pytest.raises(LimitExceeded):
            case.keep("third")
        assert case.known == known
    held.close()


def test_on_a_full_disk_what_others_have_goes_if_that_helps(
    scratch: Path, keeping: Callable[[Limits], Keeping]
) -> None:
    state = scratch / "state"
    state.mkdir()
    with FsContext.open("tmpfs") as context:
        context.set_string("size", "1m")
        context.create()
        with context.mount(MountAttr(0)) as mount:
            mount_api.move_mount(mount.fileno(), str(state))
    try:
        case = keeping(Limits())
        first = case.keep("first", Owner(1001, 1001))
        size = case.store.record(first).size
        with (state / "rest").open("wb") as file:
            status = os.statvfs(state)
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - size // 2)
        held, _ = case.store.lookup(first)
        with held, pytest.raises(LimitExceeded, match="on the disk"):
            case.keep("second")
        assert case.known == {first}
        second = case.keep("second")
        assert case.known == {second} != {first}
    finally:
        mount_api.umount(str(state))


def test_an_image_that_is_made_again_has_the_new_name(keeping: Callable[[Limits], Keeping]) -> None:
    case = keeping(Limits())
    digest = case.keep("one", name="by the old program")
    assert case.keep("one", name="by the new program") == digest
    assert case.store.record(digest).name == "by the new program"


def test_another_program_is_told_apart(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = scratch / composefs_build.PROGRAM
    monkeypatch.setitem(program.ENVIRONMENT, "PATH", str(scratch))
    found = {composefs_build.identity()}
    for text, time in (("one", 1), ("two", 1), ("two", 2)):
        file.write_text(text)
        file.chmod(0o755)
        os.utime(file, (time, time))
        found.add(composefs_build.identity())
        assert composefs_build.identity() in found
    assert len(found) == 4
    file.unlink()
