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
from mountd.service import composefs
from mountd.service.composefs import kept
from mountd.store.composefs_build import Made
from mountd.store.quota import Limits
from mountd.store.record import Owner
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


def test_images_that_nobody_uses_make_room(scratch: Path, tmp_path: Path) -> None:
    image = build_image("erofs", build_tree(tmp_path / "tree"), tmp_path / "image.erofs")
    size = image.stat().st_size
    store = Store(scratch / "state").part("regenerated", Limits(owner_images=1))
    store.prepare()

    def keep(name: str, label: bytes) -> str:
        with OwnedFd(os.memfd_create(name)) as fd:
            data = bytearray(image.read_bytes())
            # Its label: another image, and an erofs all the same.
            data[1024 + 0x48 : 1024 + 0x48 + len(label)] = label
            os.write(fd.fileno(), data)
            return kept(Made(fd, size, {}), name, store, OWNER)

    first = keep("one", b"one")
    second = keep("two", b"two")
    assert first != second
    assert [record.digest for record in store.records()] == [second]
    held, _ = store.lookup(second)
    with held, pytest.raises(LimitExceeded):
        keep("three", b"three")
    assert composefs.LIMITS.owner_images < composefs.LIMITS.images
    shutil.rmtree(scratch / "state")
