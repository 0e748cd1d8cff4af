"""The store: exchanging an image, a record or a directory does not have the attacker's handed out."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mountd.errors import InvalidImage, NotFound, SyscallError
from mountd.evidence.model import Signer
from mountd.store.disk import IMAGE_MODE, image_path, record_path
from mountd.store.record import Owner, serialise
from mountd.store.store import Known, Store
from tests.race.swapping import ATTACKER, Ground, Seen, loses, never_wins

GOOD, EVIL = b"the good image".ljust(4096), b"the evil image".ljust(4096)
DIGEST = f"sha256:{hashlib.sha256(GOOD).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A store with one image; beside it, a forged one that belongs to the attacker."""

    store: Store
    good: Path
    forged: Path
    aside: Path  # a place on the same file system


@pytest.fixture
def scene(ground: Ground) -> Scene:
    state = ground.trusted / "state"
    store = Store(state)
    store.prepare()
    source = ground.theirs / "source"
    source.write_bytes(GOOD)
    with source.open("rb") as file:
        signer = Signer("good", "CN=good", "image", DIGEST)
        judge = lambda fd, digest: Known(None, (signer,))  # noqa: E731
        record = store.add(file.fileno(), len(GOOD), Owner(0, 0), judge=judge)
    forged = ground.theirs / "state"
    shutil.copytree(state, forged)
    (forged / image_path(DIGEST)).chmod(0o600)
    (forged / image_path(DIGEST)).write_bytes(EVIL)
    (forged / record_path(DIGEST)).chmod(0o600)
    lie = replace(record, signers=(replace(signer, key="evil"),))
    (forged / record_path(DIGEST)).write_bytes(serialise(lie))
    for path in (image_path(DIGEST), record_path(DIGEST)):
        (forged / path).chmod(IMAGE_MODE)
    for path in (forged, *forged.rglob("*")):
        os.chown(path, ATTACKER, ATTACKER)
    return Scene(store, state, forged, ground.trusted)


def check_of(store: Store) -> Seen:
    """Look the image up."""
    try:
        fd, record = store.lookup(DIGEST)
    except (InvalidImage, NotFound, SyscallError):
        return Seen.REFUSED
    with fd:
        contents = os.pread(fd.fileno(), len(GOOD), 0)
    good = contents == GOOD and [signer.key for signer in record.signers] == ["good"]
    return Seen.GOOD if good else Seen.WON


def naive(state: Path) -> bytes:
    """Contents of a file that is root's: looked at and opened by name."""
    path = state / image_path(DIGEST)
    if any(os.stat(each).st_uid != 0 for each in (state, path)):
        return b""
    return path.read_bytes()


PLACES: dict[str, Callable[[Path], Path]] = {
    "the image": lambda state: state / image_path(DIGEST),
    "the record": lambda state: state / record_path(DIGEST),
    "its directory": lambda state: (state / image_path(DIGEST)).parent,
    "the directory of records": lambda state: (state / record_path(DIGEST)).parent,
    "the directory above": lambda state: state / "images",
    "the whole": lambda state: state,
}


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "by a link"])
@pytest.mark.parametrize("place", PLACES)
def test_look_up(scene: Scene, place: str, linked: bool) -> None:
    one, other = PLACES[place](scene.good), PLACES[place](scene.forged)
    never_wins(one, link_to(other, scene) if linked else other, lambda: check_of(scene.store))


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "by a link"])
@pytest.mark.parametrize("place", ["the image", "its directory", "the whole"])
def test_a_naive_look_up_loses(scene: Scene, place: str, linked: bool) -> None:
    one, other = PLACES[place](scene.good), PLACES[place](scene.forged)
    # What is in a directory is root's, so that its owner does not give it away.
    os.chown(scene.forged / image_path(DIGEST), *((ATTACKER,) * 2 if place == "the image" else (0, 0)))
    loses(
        one,
        link_to(other, scene) if linked else other,
        lambda: Seen.WON if naive(scene.good) == EVIL else Seen.REFUSED,
    )


def link_to(path: Path, scene: Scene) -> Path:
    link = scene.aside / "link"
    link.symlink_to(path)
    return link
