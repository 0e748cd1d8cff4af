"""Where an image lies: exchanging a part of its path does not make another file root's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mountd.evidence.location import Walker, locate
from mountd.fds import OwnedFd
from mountd.source.descriptor import inspect_descriptor
from tests.race.swapping import Ground, Seen, loses, never_wins


@dataclass(frozen=True, slots=True)
class Scene:
    """What is exchanged, the path that is checked, and the image that must never be found there."""

    one: Path
    other: Path
    checked: Path
    evil: Path


def a_file(ground: Ground) -> Scene:
    good, evil = ground.write("image.raw", b"good", b"evil")
    return Scene(good, evil, good, evil)


def a_link_to_a_file(ground: Ground) -> Scene:
    good, evil = ground.write("image.raw", b"good", b"evil")
    link = ground.trusted / "link"
    link.symlink_to(evil)
    return Scene(good, link, good, evil)


def a_directory(ground: Ground) -> Scene:
    """The file in it is root's on both sides: what gives it away is the directory alone."""
    good, evil = ground.write("directory/image.raw", b"good", b"evil")
    os.chown(evil, 0, 0)
    return Scene(good.parent, evil.parent, good, evil)


def a_link_to_a_directory(ground: Ground) -> Scene:
    scene = a_directory(ground)
    link = ground.trusted / "link"
    link.symlink_to(scene.other)
    return replace(scene, other=link)


def a_directory_further_up(ground: Ground) -> Scene:
    good, evil = ground.write("a/b/c/image.raw", b"good", b"evil")
    for path in (evil, evil.parent, evil.parent.parent):
        os.chown(path, 0, 0)
    return Scene(ground.trusted / "a", ground.theirs / "a", good, evil)


MakeScene = Callable[[Ground], Scene]
SCENES = [a_file, a_link_to_a_file, a_directory, a_link_to_a_directory, a_directory_further_up]


@contextmanager
def opened(scene: Scene) -> Iterator[tuple[int, int]]:
    """The good image and the other, as callers hand them over."""
    with (
        OwnedFd(os.open(scene.checked, os.O_RDONLY)) as good,
        OwnedFd(os.open(scene.evil, os.O_RDONLY)) as evil,
    ):
        yield good.fileno(), evil.fileno()


def naive(path: Path, fd: int) -> bool:
    """Whether all of a path is root's, and leads to the file: looked at one after the other, by name."""
    if any(os.stat(each).st_uid != 0 for each in (path, *path.parents)):
        return False
    return os.path.samestat(os.stat(path), os.fstat(fd))


@pytest.mark.parametrize("make", SCENES)
@pytest.mark.parametrize("hinted", [True, False], ids=["hinted", "as /proc says"])
@pytest.mark.parametrize("held", [True, False], ids=["held", "anew"])
def test_locate(ground: Ground, make: MakeScene, hinted: bool, held: bool) -> None:
    """With what /proc says the path is, and with a hint that always names the trusted place.

    The directories of the walk before are held, or opened each time.
    """
    scene = make(ground)

    def found(fd: int) -> str | None:
        backing = inspect_descriptor(fd, "image")
        if hinted:
            backing = replace(backing, path_hint=str(scene.checked))
        if not held:
            walker.close()
        return locate(fd, backing, walker, name_paths=True).root_owned_path

    with opened(scene) as (good, evil), Walker() as walker:

        def check() -> Seen:
            if found(evil) is not None:
                return Seen.WON
            path = found(good)
            if path is None:
                return Seen.REFUSED
            # By either name, as long as it is in the trusted directory under that one.
            return Seen.GOOD if path.startswith(f"{ground.trusted}/") else Seen.WON

        never_wins(scene.one, scene.other, check)


@pytest.mark.parametrize("make", SCENES)
def test_a_naive_check_loses(ground: Ground, make: MakeScene) -> None:
    scene = make(ground)
    with opened(scene) as (_, evil):
        loses(
            scene.one,
            scene.other,
            lambda: Seen.WON if naive(scene.checked, evil) else Seen.REFUSED,
        )
