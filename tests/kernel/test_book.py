"""The places of the ledger: how many are ever taken, and that nobody frees another's."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mountd.errors import LimitExceeded
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, watch
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from mountd.kernel.mount_info import mount_id
from mountd.ledger import book as module
from mountd.ledger import find
from mountd.ledger.book import Book, Reservation, usable
from mountd.ledger.places import Place, free, is_locked
from mountd.ledger.record import Record, decode, without

OWNER = (4270, 0)
RECORD = Record(1, 0, (0, 0), 4270, 4270, 1, "/image", "tmpfs", True, "none", 1)


@pytest.fixture
def watches() -> Iterator[OwnedFd]:
    with watch.create() as fd:
        yield fd


def book(home: Path, watches: OwnedFd, maximum: int = 8, attached: Callable[[], list[Known]] = list) -> Book:
    return Book(str(home), watches.fileno(), None, maximum, frozenset(), attached)


def mount() -> OwnedFd:
    with FsContext.open("tmpfs") as context:
        context.create()
        return context.mount(MountAttr(0))


def fill(book: Book, place: Reservation, mount: OwnedFd, id: int) -> Record:
    device = os.fstat(mount.fileno()).st_dev
    made = replace(
        RECORD, id=id, watch=book.watch(mount), device=(os.major(device), os.minor(device)), sent=False
    )
    place.fill(made)
    return made


def hold(book: Book, count: int, rule: tuple[str, int] | None = None) -> list[OwnedFd]:
    mounts = []
    for number in range(count):
        mounts.append(mount())
        place = book.reserve(OWNER, *(rule or (None, None)))
        fill(book, place, mounts[-1], number + os.getpid() * 100)
    return mounts


def close(mounts: list[OwnedFd]) -> None:
    for each in mounts:
        each.close()


@pytest.mark.parametrize("of_a_rule", [False, True])
def test_a_lower_limit_counts_what_is_there(home: Path, watches: OwnedFd, of_a_rule: bool) -> None:
    """Wherever those lie that were there before: places are taken in no order."""

    def limited(maximum: int) -> tuple[Book, tuple[str, int] | None]:
        if of_a_rule:
            return book(home, watches, 64), ("a rule", maximum)
        return book(home, watches, maximum), None

    ledger, rule = limited(32)
    mounts = hold(ledger, 6, rule)
    try:
        for maximum in (2, 5, 6):
            ledger, rule = limited(maximum)
            with pytest.raises(LimitExceeded, match=f"at most {maximum}"):
                ledger.reserve(OWNER, *(rule or (None, None)))
        ledger, rule = limited(8)
        mounts += hold(ledger, 2, rule)
        with pytest.raises(LimitExceeded):
            ledger.reserve(OWNER, *(rule or (None, None)))
        close(mounts[:7])
        ledger, rule = limited(2)
        mounts += hold(ledger, 1, rule)
        with pytest.raises(LimitExceeded):
            ledger.reserve(OWNER, *(rule or (None, None)))
    finally:
        close(mounts)
    assert ledger.records() == []


def test_how_many_places_are_usable() -> None:
    for taken, maximum, places in (
        (set(), 4, 4),
        ({0, 3}, 4, 4),
        ({9}, 4, 3),
        ({3, 9}, 4, 2),
        ({1, 9}, 2, 0),
        ({7, 8, 9}, 2, 0),
        ({0, 7, 8, 9}, 4, 1),
        ({5}, 1, 0),
    ):
        assert usable(taken, maximum) == places
        # Whatever is taken of these, there are never more than allowed.
        assert len(taken | set(range(places))) <= max(maximum, len(taken))


def test_what_is_written_while_others_look_is_not_taken_for_gone(
    home: Path, watches: OwnedFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watches are looked at after the files: whatever is in one by then has its watch."""
    ledger = book(home, watches)
    made: list[OwnedFd] = []
    watched = watch.watched

    def watched_and_more(fd: int) -> dict[int, tuple[int, int]]:
        found = watched(fd)
        if not made:
            made.append(mount())
            fill(ledger, ledger.reserve(OWNER, None, None), made[0], 5)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(module.watch, "watched", watched_and_more)
        ledger.records()
    assert [record.id for record in ledger.records()] == [5]
    close(made)
    assert ledger.records() == []


def test_nobody_frees_a_place_that_is_anothers_by_now(
    home: Path, watches: OwnedFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two find that a mount is gone, and a third takes its place between the one and the other."""
    one, other = book(home, watches, 1), book(home, watches, 1)
    close(hold(one, 1))
    late: list[OwnedFd] = []

    def free_late(ledger: str, places: set[Place]) -> None:
        if not late:
            late.append(mount())
            with monkeypatch.context() as patch:
                patch.setattr(module, "free", free)
                other.records()
                fill(other, other.reserve(OWNER, None, None), late[0], 7)
        free(ledger, places)

    with monkeypatch.context() as patch:
        patch.setattr(module, "free", free_late)
        one.records()
    assert [record.id for record in one.records()] == [7]
    close(late)


def test_giving_back_a_place_that_is_anothers_by_now(home: Path, watches: OwnedFd) -> None:
    ledger = book(home, watches, 1)
    first, second = mount(), mount()
    place = ledger.reserve(OWNER, None, None)
    fill(ledger, place, first, 6)
    first.close()
    assert ledger.records() == []
    fill(ledger, ledger.reserve(OWNER, None, None), second, 7)
    place.give_back()
    assert [record.id for record in ledger.records()] == [7]
    second.close()


def test_many_at_the_same_time_get_no_more_than_there_may_be(home: Path, watches: OwnedFd) -> None:
    """While others look who is gone, as the workers of a daemon do."""
    before = book(home, watches, 40)
    before._next = 19  # so that all of them lie beyond
    mounts = hold(before, 4)
    got: list[Reservation] = []
    refused: list[Exception] = []

    def ask() -> None:
        ledger = book(home, watches, 10)
        for _ in range(4):
            try:
                got.append(ledger.reserve(OWNER, None, None))
            except LimitExceeded as error:
                refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert len(got) == 6
        assert len(refused) == 26
    finally:
        for each in got:
            each.give_back()
        close(mounts)
    assert before.records() == []


@pytest.mark.parametrize("given_back", [True, False])
def test_nothing_stays_of_what_was_claimed(home: Path, watches: OwnedFd, given_back: bool) -> None:
    """A user has as many directories to claim as he likes, one after the other."""
    ledger = book(home, watches)
    left = []
    for number in range(3):
        for each in range(20):
            made = mount()
            place = ledger.reserve(OWNER, None, None)
            ledger.claim(place, f"{number} {each}")
            fill(ledger, place, made, each + 1)
            made.close()
            if given_back:
                place.give_back()
            else:
                assert ledger.records() == []
        ledger._collect()
        left.append(sorted(home.rglob("*")))
    assert left[0] == left[1] == left[2]
    assert not [path for path in left[0] if path.is_file() and not path.is_symlink()]


def test_what_is_claimed_is_so_until_the_mount_is_gone(home: Path, watches: OwnedFd) -> None:
    ledger = book(home, watches)
    with mount() as made:
        place = ledger.reserve(OWNER, None, None)
        ledger.claim(place, "8:1")
        fill(ledger, place, made, 5)
        other = book(home, watches).reserve((OWNER[0] + 1, 0), None, None)
        with pytest.raises(LimitExceeded):
            ledger.claim(other, "8:1")
    ledger.claim(other, "8:1")
    other.give_back()


def test_what_is_no_directory_of_the_ledger(tmp_path: Path, watches: OwnedFd) -> None:
    ledger = book(tmp_path, watches)
    mounts = hold(ledger, 1)
    (tmp_path / "stray").write_text("x")
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "link.x").symlink_to("/nowhere")
    (tmp_path / "4270.stray").write_text("x")
    assert len(ledger.records()) == 1
    close(mounts)
    ledger._collect()
    assert ledger.records() == []


@dataclass(frozen=True)
class Known:
    """What is written down elsewhere of a mount that mountd has attached."""

    id: int
    namespace: int = 0
    uid: int = OWNER[0]
    rule: str | None = None
    since: int = 1


def test_nobody_takes_a_place_before_it_is_written_anew(tmp_path: Path, watches: OwnedFd) -> None:
    """What is there counts for whoever asks meanwhile."""
    home = tmp_path / "ledger"
    asking = threading.Thread(target=lambda: refused.append(reserved(book(home, watches, 1))))
    refused: list[bool] = []

    def attached() -> list[Known]:
        asking.start()
        asking.join(0.3)
        assert not home.exists()
        return [Known(mount_id(made.fileno()))]

    with mounted_at(tmp_path / "mnt") as made:
        found = book(home, watches, 1, attached).records()
        asking.join()
        assert [record.uid for record in found] == [OWNER[0]]
        assert refused == [True]
    assert not (tmp_path / "ledger.new").exists()


def test_one_that_was_killed_meanwhile_is_followed_by_another(tmp_path: Path, watches: OwnedFd) -> None:
    home = tmp_path / "ledger"

    def killed() -> list[Known]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    with mounted_at(tmp_path / "mnt") as made:
        pid = os.fork()
        if pid == 0:
            try:
                book(home, watches, 1, killed).records()
            finally:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert not home.exists()
        known = Known(mount_id(made.fileno()))
        assert len(book(home, watches, 1, lambda: [known]).records()) == 1


def test_it_is_not_looked_everywhere_for_nothing(
    tmp_path: Path, watches: OwnedFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is after every start of the system, when somebody may have made any number of namespaces."""
    monkeypatch.setattr(find, "attachments", None)
    assert book(tmp_path / "ledger", watches).records() == []


def reserved(ledger: Book) -> bool:
    """Whether there is no place, after one was asked for; it is given back."""
    try:
        ledger.reserve(OWNER, None, None).give_back()
    except LimitExceeded:
        return True
    return False


@contextlib.contextmanager
def mounted_at(path: Path) -> Iterator[OwnedFd]:
    path.mkdir()
    with mount() as made:
        mount_api.move_mount(made.fileno(), str(path))
        try:
            yield made
        finally:
            mount_api.umount(str(path))


def test_what_could_not_be_read_again_is_not_written(home: Path, watches: OwnedFd) -> None:
    ledger = book(home, watches)
    place = ledger.reserve(OWNER, None, None)
    with pytest.raises(LimitExceeded, match="32768"):
        place.fill(replace(RECORD, digest="x" * 33000))
    place.give_back()
    assert ledger._places() == set()


def test_numbers_of_a_descriptor_that_was_lost_are_taken_off_in_place(home: Path, watches: OwnedFd) -> None:
    """Whoever is killed meanwhile leaves a whole record, as it stays as long as it is."""
    odd = replace(
        RECORD, source='x","watch":7,"mark":8', rule='"watch": 9', watch=4711, mark=42, digest="d" * 9000
    )
    for number in range(2):
        ledger = book(home, watches)
        place = ledger.reserve(OWNER, "a rule", 4)
        place.fill(replace(odd, id=number + 1))
    (path, *_), *_ = ledger._written()
    before = os.stat(path)
    for expected, lost in (
        ({"watch": 4711, "mark": 0}, {"watches": False, "marks": True}),
        ({"watch": 0, "mark": 0}, {"watches": True, "marks": False}),
    ):
        ledger.recover(**lost)
        found = sorted(ledger._written().values(), key=lambda record: record.id)
        assert found == [replace(odd, id=id, **expected) for id in (1, 2)]  # type: ignore[arg-type]
    after = os.stat(path)
    assert (after.st_ino, after.st_size, after.st_nlink) == (before.st_ino, before.st_size, 2)
    for begin, nothing in without(odd.encode(), ["watch", "mark"]):
        half = bytearray(odd.encode())
        half[begin : begin + len(nothing)] = nothing
        assert decode(bytes(half)) is not None


def test_a_place_is_free_soon_after_its_worker_was_killed(home: Path, watches: OwnedFd) -> None:
    """With all that it has claimed; and is not while the worker lives, however long that takes."""
    ready, killed = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            place = book(home, watches, 1).reserve(OWNER, "a rule", 1)
            book(home, watches, 1).claim(place, "a top")
            os.write(killed, b"x")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 1) == b"x"
        place, *_ = [path for path in home.rglob("0") if path.is_file()]
        os.utime(place, (1, 1))
        ledger = book(home, watches, 1)
        with pytest.raises(LimitExceeded):
            ledger.reserve(OWNER, None, None)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(killed)
    mine = ledger.reserve(OWNER, "a rule", 1)
    ledger.claim(mine, "a top")
    mine.give_back()


def test_a_place_of_one_that_was_killed_is_anybody_s_at_once(home: Path, watches: OwnedFd) -> None:
    """With what it has claimed; and one that somebody is about to write to is nobody else's."""
    ledger = book(home, watches, maximum=1)
    pid = os.fork()
    if pid == 0:
        ledger.claim(ledger.reserve(OWNER, "a rule", 1), "a directory")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    for _ in range(2):
        place = ledger.reserve(OWNER, "a rule", 1)
        ledger.claim(place, "a directory")
        with pytest.raises(LimitExceeded):
            ledger.reserve(OWNER, "a rule", 1)
        place.give_back()
    assert ledger.records() == []


def test_a_place_that_is_taken_for_abandoned_while_it_is_made(
    home: Path, watches: OwnedFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its lock another has freed it: then there is another one."""
    ledger = book(home, watches)
    looked: list[int] = []

    def late(fd: int) -> bool:
        if not looked:
            looked.append(fd)
            ledger.records()
        return is_locked(fd)

    monkeypatch.setattr(module, "is_locked", late)
    place = ledger.reserve(OWNER, None, None)
    assert looked
    assert os.path.exists(place.path)
    with mount() as mounted:
        fill(ledger, place, mounted, 5)
        assert [record.id for record in ledger.records()] == [5]
