"""What an image, an owner and all of them together may take of the store, and of its disk."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.errors import LimitExceeded
from mountd.store.record import Owner
from mountd.store.store import Store, finish
from tests.store import MIB, OTHER, ROOT, USER, content, digest_of, files, limited, opened, put, tree


class TestQuota:
    def test_bytes_of_an_image(self, home: Path) -> None:
        store = limited(home, image_bytes=1000)
        refused(lambda: put(store, content(1001)), "image of the store", 1000)
        put(store, content(1000))

    def test_bytes_of_an_owner(self, home: Path) -> None:
        store = limited(home, owner_bytes=1000)
        first = put(store, content(600))
        refused(lambda: put(store, content(401, 2)), "bytes of one owner", 1000)
        put(store, content(401, 2), OTHER)
        put(store, content(2000, 3), ROOT)
        # Another uid, and the same one who pays.
        refused(lambda: put(store, content(401, 4), Owner(100000, 1000)), "bytes of one owner", 1000)
        # A container's root is not the host's: what is charged to uid 0 is bounded as well.
        put(store, content(999, 8), Owner(5, 5))
        refused(lambda: put(store, content(2001, 9), Owner(100001, 0)), "bytes of one owner", 1000)
        store.remove(first.digest, USER.uid)
        put(store, content(401, 4))

    def test_images_of_an_owner(self, home: Path) -> None:
        store = limited(home, owner_images=2)
        put(store, b"1")
        put(store, b"2")
        refused(lambda: put(store, b"3"), "images of one owner", 2)
        put(store, b"3", OTHER)

    def test_bytes_of_all(self, home: Path) -> None:
        store = limited(home, total_bytes=1000)
        put(store, content(600))
        assert store.left() == 400
        refused(lambda: put(store, content(401, 2), ROOT), "bytes in the store", 1000)
        put(store, content(400, 2), OTHER)

    def test_images_of_all(self, home: Path) -> None:
        store = limited(home, images=1)
        put(store, b"1")
        refused(lambda: put(store, b"2", ROOT), "images in the store", 1)

    def test_the_same_bytes_count_for_each_owner_and_once_for_all(self, home: Path) -> None:
        store = limited(home, owner_bytes=1000, total_bytes=1500)
        put(store, content(700))
        put(store, content(700), OTHER)
        put(store, content(300, 2), ROOT)
        refused(lambda: put(store, content(301, 3), OTHER), "bytes of one owner", 1000)

    def test_what_is_being_imported_counts(self, home: Path) -> None:
        store = limited(home, owner_bytes=3 * MIB, total_bytes=5 * MIB)
        data = content(2 * MIB)
        with opened(data) as fd:
            steps = store.adding(fd, len(data), USER)
            next(steps)
            refused(lambda: put(store, content(2 * MIB, 2)), "bytes of one owner", 3 * MIB)
            refused(lambda: put(store, content(4 * MIB, 2), ROOT), "bytes in the store", 5 * MIB)
            steps.close()
        put(store, content(2 * MIB, 2))

    def test_transfers_at_the_same_time(self, home: Path) -> None:
        store = limited(home, transfers=3, owner_transfers=2)
        record = put(store, b"0", ROOT)
        with store.slot(USER), store.slot(USER):
            refused(lambda: put(store, b"1"), "transfers of one owner", 2)
            refused(lambda: put(store, b"1", Owner(100000, 1000)), "transfers of one owner", 2)
            with store.slot(OTHER):
                refused(lambda: put(store, b"1", ROOT), "transfers at the same time", 3)
                refused(lambda: store.verify(record.digest, ROOT), "transfers at the same time", 3)
            put(store, b"1", ROOT)
        put(store, b"2")

    def test_slots_that_are_waited_for(self, home: Path) -> None:
        store = limited(home, transfers=4, owner_transfers=2)
        for owners in ([USER, USER], [OTHER, OTHER, ROOT, ROOT]):
            with contextlib.ExitStack() as slots:
                for owner in owners:
                    slots.enter_context(store.slot(owner))
                with pytest.raises(LimitExceeded) as raised, store.slot(USER, seconds=0.1):
                    pass
                assert raised.value.hint == "try again later"
                soon = threading.Timer(0.2, slots.close)
                soon.start()
                with store.slot(USER, seconds=20):
                    soon.join()

    def test_the_same_work_once_for_each_owner(self, home: Path) -> None:
        store = limited(home)
        with store.slot(USER, work="image 1"):
            with (
                pytest.raises(LimitExceeded, match="of the same") as raised,
                store.slot(USER, work="image 1"),
            ):
                pass
            assert raised.value.hint == "try again later"
            with store.slot(USER, work="image 2"), store.slot(OTHER, work="image 1"):
                pass
        with store.slot(USER, work="image 1"):
            pass

    def test_a_full_disk(self, home: Path) -> None:
        with mounted_tmpfs(home / "small", "2m") as place:
            store = Store(place / "state")
            store.prepare()
            record = put(store, content(MIB))
            with pytest.raises(LimitExceeded, match="bytes on the disk of the store") as raised:
                put(store, content(3 * MIB, 2))
            assert "an administrator has to make room" in str(raised.value.hint)
            assert 0 < raised.value.parameters["maximum"] < 2 * MIB  # type: ignore[operator]
            assert tree(place) == files(record.digest)
            put(store, content(MIB // 2, 3))

    def test_a_disk_without_room_for_a_slot(self, home: Path) -> None:
        with mounted_tmpfs(home / "small", "2m") as place:
            store = Store(place / "state")
            store.prepare()
            with (place / "rest").open("wb", buffering=0) as rest, contextlib.suppress(OSError):
                while rest.write(bytes(4096)):
                    pass
            limit = pytest.raises(LimitExceeded, match="at most 0 bytes on the disk of the store")
            with limit as raised, store.slot(USER):
                pass
            assert "an administrator has to make room" in str(raised.value.hint)

    def test_a_disk_without_inodes(self, home: Path) -> None:
        with mounted_tmpfs(home / "small", "2m,nr_inodes=20") as place:
            store = Store(place / "state")
            store.prepare()
            held = set()

            def fill() -> None:
                for each in range(20):
                    held.add(put(store, bytes([each])).digest)

            with pytest.raises(LimitExceeded, match="disk"):
                fill()
            assert held
            assert tree(place) == files(*held)


def refused(work: Callable[[], object], limit: str, maximum: int) -> None:
    with pytest.raises(LimitExceeded, match=limit) as raised:
        work()
    assert raised.value.parameters["maximum"] == maximum


@contextlib.contextmanager
def mounted_tmpfs(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=755,size={options}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_slot_serves_for_the_transfers_within_it(home: Path) -> None:
    store = limited(home, transfers=1)
    with store.slot(USER), opened(b"x") as fd:
        with pytest.raises(LimitExceeded):
            next(store.adding(fd, 1, ROOT))
        record = finish(store.adding(fd, 1, ROOT, within_slot=True), None)
    assert record.digest == digest_of(b"x")
