"""Tags in the store: what moves them, what does not, and that they are swept."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.errors import InUse, InvalidImage, LimitExceeded, SyscallError
from mountd.evidence.model import Provenance
from mountd.store import disk
from mountd.store.disk import record_path, tag_path
from mountd.store.layering import PulledImage
from mountd.store.store import Store
from tests.kernel.test_store_kill import each_step
from tests.store import ROOT, USER, age, digest_of, limited, put

REPOSITORY = "registry.example.com/app"
HOUR = 3600 * 10**9


def pulled(
    store: Store, data: bytes, tag: str | None = "1", resolved: int | None = None, of: str = REPOSITORY
) -> str:
    """Have an image of one layer as pulled by a tag; return the digest of its manifest."""
    manifest = digest_of(b"manifest of " + data)
    origin = Provenance(of, manifest, (digest_of(b"layer"),), "signedBy", "team", 1)
    record = put(store, data, ROOT, provenance=origin)
    when = time.time_ns() if resolved is None else resolved
    store.remember(PulledImage(origin, (record.digest,)), tag, when)
    return manifest


def files(home: Path) -> set[str]:
    return {path.name for path in (home / "state/tags/sha256").iterdir()}


def test_a_tag_leads_to_the_last_pull(home: Path, store: Store) -> None:
    assert store.tagged(REPOSITORY, "1") is None
    old = pulled(store, b"old")
    assert store.tagged(REPOSITORY, "1") == old
    new = pulled(store, b"new")
    assert store.tagged(REPOSITORY, "1") == new
    # What it led to is still there.
    image = store.pulled(REPOSITORY, old)
    assert image is not None
    assert image.stored == (digest_of(b"old"),)
    assert pulled(store, b"old") == store.tagged(REPOSITORY, "1")
    (path,) = (home / "state/tags/sha256").iterdir()
    status = path.stat()
    assert (status.st_uid, status.st_mode & 0o7777, status.st_nlink) == (0, 0o400, 1)


def test_by_a_digest_alone_no_tag_moves(store: Store) -> None:
    old = pulled(store, b"old")
    pulled(store, b"new", None)
    assert store.tagged(REPOSITORY, "1") == old
    assert store.tags() == {digest_of(b"old"): [f"oci:{REPOSITORY}:1"]}


@pytest.mark.parametrize(
    ("repository", "tag"),
    [
        (REPOSITORY, "latest"),
        (REPOSITORY, "V1"),
        (f"{REPOSITORY}/x", "v1"),
        ("registry.example.com.evil.test/app", "v1"),
        ("registry.example.com:5000/app", "v1"),
        ("registry.exarnple.com/app", "v1"),
        ("Registry.example.com/app", "v1"),
        ("../records/sha256", "v1"),
    ],
)
def test_nothing_else_leads_there(store: Store, repository: str, tag: str) -> None:
    pulled(store, b"it", "v1")
    assert store.tagged(repository, tag) is None


def test_of_two_pulls_the_last_to_ask_wins(store: Store) -> None:
    """One that takes long, and ends after another that has begun later, does not move the tag back."""
    now = time.time_ns()
    new = pulled(store, b"new", resolved=now)
    old = pulled(store, b"old", resolved=now - HOUR)
    assert store.tagged(REPOSITORY, "1") == new
    assert store.pulled(REPOSITORY, old) is not None
    # A clock that was wrong does not hold the tag for ever.
    assert store.tagged(REPOSITORY, "2") is None
    pulled(store, b"new", "2", resolved=now + HOUR)
    assert pulled(store, b"old", "2", resolved=now - HOUR) == store.tagged(REPOSITORY, "2")


@pytest.mark.parametrize("tag", ["../1", "", "a/b", "x" * 129, "1\n"])
def test_a_tag_that_is_none(home: Path, store: Store, tag: str) -> None:
    with pytest.raises(InvalidImage):
        pulled(store, b"it", tag)
    assert files(home) == set()
    assert not (home / "state/tags/1.json").exists()


def test_tags_that_lead_to_nothing_are_swept(home: Path, store: Store) -> None:
    pulled(store, b"old", "old")
    pulled(store, b"both", "both")
    pulled(store, b"both", "same")
    store.remove(digest_of(b"old"), 0)
    assert len(files(home)) == 2
    # Nor does it come back with the image.
    pulled(store, b"old", None)
    assert store.tagged(REPOSITORY, "old") is None
    store.remove(digest_of(b"old"), 0)
    assert store.tags() == {digest_of(b"both"): [f"oci:{REPOSITORY}:both", f"oci:{REPOSITORY}:same"]}
    # With what is collected for its age, they go at once.
    age(home, digest_of(b"both"))
    assert store.collect_garbage(maximum_age=3600).removed == (digest_of(b"both"),)
    assert files(home) == set()
    assert list((home / "state/pulled/sha256").iterdir()) == []


def test_damage_is_no_tag_and_is_swept(home: Path, store: Store) -> None:
    kept = pulled(store, b"it", "kept")
    damages: list[Callable[[Path], object]] = [
        lambda path: write(path, b"{"),
        lambda path: write(path, b""),
        lambda path: write(path, json.dumps({"version": 1}).encode()),
        lambda path: path.chmod(0o644),
        lambda path: os.chown(path, 1000, -1),
        # That of another tag, in its place: a rename is all that it would take.
        lambda path: replaced(path, (home / "state" / tag_path(REPOSITORY, "kept")).read_bytes()),
        lambda path: os.link(path, home / "linked"),
        lambda path: linked(path, home / "elsewhere"),
    ]
    for damage in damages:
        pulled(store, b"it", "1")
        path = home / "state" / tag_path(REPOSITORY, "1")
        damage(path)
        assert store.tagged(REPOSITORY, "1") is None
        store.collect_garbage()
        assert files(home) == {os.path.basename(tag_path(REPOSITORY, "kept"))}
        (home / "linked").unlink(missing_ok=True)
    assert store.tagged(REPOSITORY, "kept") == kept
    assert (home / "elsewhere").exists()


def test_a_link_in_the_place_of_the_tags_is_not_followed(home: Path, store: Store) -> None:
    pulled(store, b"it", "1")
    (home / "state/tags").rename(home / "elsewhere")
    (home / "state/tags").symlink_to(home / "elsewhere")
    assert store.tagged(REPOSITORY, "1") is None
    with pytest.raises(SyscallError):
        pulled(store, b"new", "1")
    assert len(list((home / "elsewhere/sha256").iterdir())) == 1


def test_an_image_in_use_keeps_its_tags(home: Path, store: Store) -> None:
    led = pulled(store, b"it")
    with store.lookup(digest_of(b"it"))[0], pytest.raises(InUse):
        store.remove(digest_of(b"it"), 0)
    assert store.tagged(REPOSITORY, "1") == led
    assert store.tags() == {digest_of(b"it"): [f"oci:{REPOSITORY}:1"]}


def test_what_another_has_of_its_bytes_keeps_no_tag(home: Path, store: Store) -> None:
    """One of several owners removes an image; with root, for all, the tags go."""
    led = pulled(store, b"it")
    put(store, b"it", USER)
    store.remove(digest_of(b"it"), USER.uid)
    assert store.tagged(REPOSITORY, "1") == led
    store.remove(digest_of(b"it"), 0)
    assert files(home) == set()


@pytest.mark.parametrize("round", range(3))
def test_pulls_at_the_same_time(home: Path, round: int) -> None:
    """Whichever is the last to end, the tag leads to what the last one to ask has got."""
    store = limited(home, transfers=8)
    now = time.time_ns()
    images = [bytes([round, number]) for number in range(8)]
    reader, writer = os.pipe()
    children = []
    for number in random.Random(round).sample(range(8), 8):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(writer)
                os.read(reader, 1)  # all at once
                pulled(store, images[number], "1", resolved=now - HOUR + number)
                pulled(store, images[number], f"own-{number}", resolved=now)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    os.close(reader)
    os.close(writer)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 8
    assert store.tagged(REPOSITORY, "1") == digest_of(b"manifest of " + images[7])
    for number, image in enumerate(images):
        assert store.tagged(REPOSITORY, f"own-{number}") == digest_of(b"manifest of " + image)
    assert len(files(home)) == 9
    assert os.listdir(home / "state/incoming") == []


def linked(path: Path, target: Path) -> None:
    """A link to what would be a tag if it were there."""
    target.unlink(missing_ok=True)
    path.rename(target)
    path.symlink_to(target)


def write(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(0o400)


def replaced(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)
    path.chmod(0o400)


def test_there_is_room_for_so_many(home: Path) -> None:
    store = limited(home, images=2)
    pulled(store, b"it", "1")
    pulled(store, b"it", "2")
    before = files(home)
    with pytest.raises(LimitExceeded, match="tags of pulled images"):
        pulled(store, b"it", "3")
    assert files(home) == before
    # One that is there moves nevertheless.
    new = pulled(store, b"new", "2")
    assert store.tagged(REPOSITORY, "2") == new
    # And what leads to nothing, as somebody was killed who has removed it, takes no room.
    (home / "state" / record_path(digest_of(b"it"))).unlink()
    assert pulled(store, b"new", "3") == store.tagged(REPOSITORY, "3")


def test_a_killed_pull_leaves_the_tag_whole(home: Path, store: Store) -> None:
    old = pulled(store, b"old")
    new = digest_of(b"manifest of new")

    def check(ended: bool) -> None:
        store.prepare()
        led = store.tagged(REPOSITORY, "1")
        assert led == new if ended else led in (old, new)
        # Whatever it leads to is there.
        image = store.pulled(REPOSITORY, led or "")
        assert image is not None
        for digest in image.stored:
            assert store.record(digest).digest == digest
        assert os.listdir(home / "state/incoming") == []
        pulled(store, b"old")
        if digest_of(b"new") in {record.digest for record in store.records()}:
            store.remove(digest_of(b"new"), 0)

    each_step(lambda: pulled(store, b"new"), check, least=14)


def test_a_tag_moves_after_all_else(home: Path, store: Store) -> None:
    steps: list[str] = []
    disk.reached.append(steps.append)
    try:
        pulled(store, b"it")
    finally:
        disk.reached.remove(steps.append)
    renames = [step.split("/")[0] for step in steps if step.startswith("rename")]
    assert renames == ["rename images", "rename records", "rename pulled", "rename tags"]
