"""What programs without privileges have left: they may exchange it while it is taken over."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from mountd.errors import InvalidImage
from mountd.fds import OwnedFd
from mountd.store import quarantine
from mountd.store.manifest import Descriptor
from tests.race.swapping import Ground, Seen, loses, never_wins

GOOD, SECRET = b"a layer of the image", b"what only root reads"
DIGEST = f"sha256:{hashlib.sha256(GOOD).hexdigest()}"
NAME = DIGEST.removeprefix("sha256:")
IMAGE = "image"
BIG = 1 << 20


@dataclass(frozen=True, slots=True)
class Scene:
    """A quarantine with an image of one blob, and a directory of root's with what must not be read."""

    place: Path
    outside: Path
    into: int

    @property
    def blob(self) -> Path:
        return self.place / IMAGE / NAME


@pytest.fixture
def scene(ground: Ground) -> Iterator[Scene]:
    blob, _ = ground.write(f"quarantine/{IMAGE}/{NAME}", GOOD, GOOD)
    secret, _ = ground.write(f"outside/{NAME}", SECRET, b"")
    secret.chmod(0o600)
    into = ground.trusted / "into"
    into.mkdir()
    with OwnedFd(os.open(into, os.O_RDONLY | os.O_DIRECTORY)) as fd:
        yield Scene(blob.parents[1], secret.parent, fd.fileno())


# What the blob, or the directory that it is in, is exchanged with.
def another_blob(scene: Scene) -> tuple[Path, Path]:
    other = scene.place / "other"
    other.write_bytes(SECRET)
    return scene.blob, other


def a_link(scene: Scene) -> tuple[Path, Path]:
    link = scene.place / "link"
    link.symlink_to(scene.outside / NAME)
    return scene.blob, link


def a_relative_link(scene: Scene) -> tuple[Path, Path]:
    link = scene.place / IMAGE / "link"
    link.symlink_to(f"../../outside/{NAME}")
    return scene.blob, link


def a_pipe(scene: Scene) -> tuple[Path, Path]:
    pipe = scene.place / "pipe"
    os.mkfifo(pipe)
    return scene.blob, pipe


def a_link_to_a_directory(scene: Scene) -> tuple[Path, Path]:
    link = scene.place / "link"
    link.symlink_to(scene.outside)
    return scene.place / IMAGE, link


MakeRace = Callable[[Scene], tuple[Path, Path]]
OUTSIDE = [a_link, a_relative_link, a_pipe, a_link_to_a_directory]


def check(scene: Scene, read: Callable[[int], bytes]) -> Callable[[], Seen]:
    """Read the blob in the directory of the image, opened anew each time."""

    def once() -> Seen:
        try:
            with (
                OwnedFd(os.open(scene.place, os.O_RDONLY | os.O_DIRECTORY)) as top,
                quarantine.open_directory(top.fileno(), IMAGE) as image,
            ):
                contents = read(image.fileno())
        except InvalidImage:
            return Seen.REFUSED
        return Seen.GOOD if contents == GOOD else Seen.WON

    return once


def naive(path: Path) -> bytes:
    """The contents of a file that is no link, nor in a link to a directory: looked at by name."""
    if not path.is_file() or path.is_symlink() or path.parent.is_symlink():
        return b""
    return path.read_bytes()


@pytest.mark.parametrize("make", OUTSIDE)
def test_documents(scene: Scene, make: MakeRace) -> None:
    never_wins(*make(scene), check(scene, lambda fd: quarantine.read_document(fd, NAME, "it", 100)))


@pytest.mark.parametrize("make", [another_blob, *OUTSIDE])
def test_blobs(scene: Scene, make: MakeRace) -> None:
    """Here not even another file within the quarantine is taken: its digest is another."""
    described = Descriptor("", DIGEST, len(GOOD))

    def read(image: int) -> bytes:
        with quarantine.receive(image, described, "it", scene.into, lambda count: None) as copy:
            return os.pread(copy.fileno(), 100, 0)

    never_wins(*make(scene), check(scene, read))


@pytest.mark.parametrize("make", OUTSIDE)
def test_what_a_program_has_made(scene: Scene, make: MakeRace) -> None:
    def read(image: int) -> bytes:
        fd, _ = quarantine.take(image, NAME, scene.into, "taken")
        os.unlink("taken", dir_fd=scene.into)
        with fd:
            return os.pread(fd.fileno(), 100, 0)

    never_wins(*make(scene), check(scene, read))


@pytest.mark.parametrize("make", [a_link, a_relative_link, a_link_to_a_directory])
def test_naive_reading_loses(scene: Scene, make: MakeRace) -> None:
    def once() -> Seen:
        with suppress(OSError):
            return Seen.WON if naive(scene.blob) == SECRET else Seen.REFUSED
        return Seen.REFUSED

    loses(*make(scene), once)


def test_naive_hashing_loses(scene: Scene) -> None:
    """As if the digest were that of the file, which is copied afterwards."""

    def once() -> Seen:
        if hashlib.sha256(scene.blob.read_bytes()).hexdigest() != NAME:
            return Seen.REFUSED
        return Seen.WON if scene.blob.read_bytes() == SECRET else Seen.GOOD

    loses(*another_blob(scene), once)


def test_how_much_there_is(scene: Scene) -> None:
    """What lies outside is never counted."""
    (scene.outside / "big").write_bytes(bytes(BIG))

    def once() -> Seen:
        with OwnedFd(os.open(scene.place, os.O_RDONLY | os.O_DIRECTORY)) as top:
            return Seen.WON if quarantine.usage(top.fileno()) >= BIG else Seen.GOOD

    never_wins(*a_link_to_a_directory(scene), once, refuses=False)
