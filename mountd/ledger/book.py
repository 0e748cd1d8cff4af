"""The ledger: which mounts of those that were handed out are still there.

It is a directory of small files, one for each mount, below a directory for each owner. A file is a place,
and there are only as many places as the owner may have mounts: who finds none gets none, however many ask at
the same time, and without a lock. What is in the files is never believed without asking the kernel: a record
holds for as long as the watch on its superblock is there (`kernel.watch`), and where superblocks are shared,
for as long as the mark on the mount is (`kernel.mark`); one record stays when only copies do. What is gone
is cleared away by whoever comes across it. That does take a lock: a place that was freed may be another's a
moment later, and who is about to free it must not free that. A place that is not written to yet is locked by
who has it, with flock(2), so that one of a process that was killed is anybody's at once.

In each directory it is written down up to which place there may be some that are taken. Where an owner may
have fewer mounts than before, those beyond count as well.

The watches and the marks belong to descriptors that a service manager keeps when mountd ends. Where one was
lost, the records that it was for have none any more (`recover`), and `ledger.live` looks for their mounts.

The directory may not be there: at first, or as somebody has removed it. Then whoever needs it makes it, and
writes down what there is all the same (`ledger.rebuilding`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from typing import TYPE_CHECKING

from mountd.errors import LimitExceeded, NotSupported, SyscallError
from mountd.kernel import capabilities, mark, watch
from mountd.ledger import live
from mountd.ledger.places import free, free_abandoned, is_locked, look_at
from mountd.ledger.record import MAXIMUM_SIZE, decode, ended, without

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from mountd.fds import OwnedFd
    from mountd.ledger.places import Place
    from mountd.ledger.rebuilding import Attached
    from mountd.ledger.record import Record

TRIES = 4
BOUND = "bound"  # a link in each directory, to the number of places that were in use at the most
ROOT = "root"
CLAIMED = "claimed.names"  # in it, each name is a number; a directory for each would stay for ever
MAXIMUM_OF_ROOT = 65536
COLLECT_EVERY = 256  # reservations, at least
LIMIT = "mounts of one user at a time"
RULE_LIMIT = "mounts of one user at a time by the rule"
HINT = "detach one, or have an administrator look at “mountctl list --all”"


class Reservation:
    """A place for one mount, to be either filled or given back."""

    __slots__ = ("_data", "_fd", "_inode", "_ledger", "_paths")

    def __init__(self, ledger: str, fd: int, paths: list[str]) -> None:
        """Take `fd` over, the open file of the place, which has these paths in the directory `ledger`."""
        self._ledger = ledger
        self._fd = fd
        self._inode = os.fstat(fd).st_ino
        self._data: bytes | None = None
        self._paths = paths

    def fill(self, record: Record) -> None:
        """Write the record down; from now on the mount is known.

        Raises SyscallError, such as ENOSPC, and LimitExceeded for one that could not be read again.
        """
        data = record.encode()
        if len(data) > MAXIMUM_SIZE:
            raise LimitExceeded("bytes of what is written down of one mount", MAXIMUM_SIZE)
        try:
            if os.write(self._fd, data) != len(data):
                raise SyscallError(28, "write(a record)")
        except OSError as error:
            raise SyscallError(error.errno or 0, "write(a record)") from None
        os.close(self._fd)
        self._fd, self._data = -1, data

    @property
    def path(self) -> str:
        """The place itself."""
        return self._paths[0]

    def add(self, path: str) -> None:
        """Have another name of the place, which goes with it."""
        self._paths.append(path)

    def give_back(self) -> None:
        """Free the place; also what was filled, if its mount is not handed out after all."""
        free(self._ledger, [(path, self._inode, self._data) for path in self._paths])
        # Only now: until then no other file can have its inode.
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Book:
    """The ledger of one daemon, shared by its processes."""

    __slots__ = (
        "_attached",
        "_directory",
        "_due",
        "_next",
        "hidden",
        "marks_fd",
        "maximum",
        "watches_fd",
    )

    def __init__(
        self,
        directory: str,
        watches_fd: int,
        marks_fd: int | None,
        maximum: int,
        hidden: frozenset[int],
        attached: Callable[[], Iterable[Attached]] = tuple,
    ) -> None:
        """Keep it in `directory`, for `maximum` mounts an owner. `watches_fd` and `marks_fd` are borrowed.

        There are no marks for None. `hidden` are the ids of mount namespaces that are nobody's but mountd's.
        `attached` says what is known otherwise, for a ledger that was lost.
        """
        self.hidden = hidden
        self._attached = attached
        self._directory = directory
        self.maximum = maximum
        self._next = int.from_bytes(os.urandom(4), "big")
        self._due = COLLECT_EVERY
        self.watches_fd = watches_fd
        self.marks_fd = marks_fd

    def reserve(
        self,
        owner: tuple[int, int] | None,
        rule: str | None,
        maximum: int | None,
        *more: tuple[str | None, int | None],
    ) -> Reservation:
        """Return a place for a mount of `owner` (`Caller.payer`), who may have `maximum` by the rule.

        `more` are other rules with theirs, that the mount is one of as well. None for the owner is for the
        host's root, who only has to leave room for others.

        Raises LimitExceeded, SyscallError.
        """
        self._due -= 1
        name = ROOT if owner is None else directory_of(*owner)
        bound = MAXIMUM_OF_ROOT if owner is None else self.maximum
        fd, path = self._place(f"{self._directory}/{name}", bound, LIMIT)
        names = [path]
        try:
            for each, most in ((rule, maximum), *more):
                if most is not None:
                    mark = hashlib.sha256((each or "").encode("utf-8", "surrogateescape")).hexdigest()[:32]
                    names.append(self._link(path, f"{self._directory}/{name}.{mark}", most))
        except BaseException:
            Reservation(self._directory, fd, names).give_back()
            raise
        return Reservation(self._directory, fd, names)

    def claim(self, place: Reservation, name: str) -> None:
        """Have what is called `name` belong to the mount of this place alone, whoever's it is.

        Raises LimitExceeded if it belongs to one that is there, SyscallError.
        """
        directory = f"{self._directory}/{CLAIMED}"
        path = f"{directory}/{int(hashlib.sha256(name.encode()).hexdigest()[:32], 16)}"
        with named("writing the ledger"):
            os.makedirs(directory, mode=0o700, exist_ok=True)
            for clear in (None, self._collect, self._look_closer):
                if clear is not None:
                    clear()
                with contextlib.suppress(FileExistsError):
                    os.link(place.path, path)
                    return place.add(path)
        raise LimitExceeded(RULE_LIMIT, 1, hint=HINT)

    def watch(self, mount: OwnedFd) -> int:
        """Watch the superblock of a mount that has no ids mapped yet; return the watch, 0 for none."""
        # Also of a root directory that is its owner's alone to read.
        for rights in (contextlib.nullcontext, capabilities.reading_everything):
            with contextlib.suppress(SyscallError), rights():
                return watch.watch(self.watches_fd, mount.fileno())
        # One that nobody may read, or no room for more watches: looked for where it is attached, then.
        return 0

    def mark(self, mount: OwnedFd) -> int:
        """Mark a mount that has no ids mapped yet; return the number of the mark, 0 for none."""
        if self.marks_fd is None:
            return 0
        try:
            return mark.mark(self.marks_fd, mount.fileno())
        except SyscallError:
            return 0  # as above

    def records(self) -> list[Record]:
        """Return what is there by the kernel's word. Raises SyscallError."""
        with named("reading the ledger"):
            self._make()
            written = self._written()
            # Afterwards: what was written down meanwhile has its watch by now.
            left = watch.watched(self.watches_fd)
            there = {
                place: record
                for place, record in written.items()
                if not record.watch or left.get(record.watch) == record.device
            }
            over = ended(there.values(), self.sure(there.values()))
            there = {place: record for place, record in there.items() if record.id not in over}
            self._free(written.keys() - there.keys())
            return sorted(there.values(), key=lambda record: (record.since, record.id))

    def sure(self, records: Collection[Record]) -> set[int]:
        """Return the ids of those mounts of all `records` whose mark is there. Raises SyscallError."""
        if self.marks_fd is None:
            return set()
        with named("reading the ledger"):
            left = mark.marked(self.marks_fd)
        youngest: dict[int, int] = {}
        for record in records:
            if record.mark in left:
                youngest[record.mark] = max(record.id, youngest.get(record.mark, 0))
        return set(youngest.values())

    def is_there(self, record: Record) -> bool:
        """Tell whether the superblock that a record has a watch on is there by now. Raises SyscallError."""
        with named("reading the ledger"):
            return watch.watched(self.watches_fd).get(record.watch) == record.device

    def forget(self, ids: set[int]) -> None:
        """Remove the records of mounts that are gone. Raises SyscallError."""
        with named("clearing the ledger"):
            self._free({place for place, record in self._written().items() if record.id in ids})

    def recover(self, *, watches: bool, marks: bool) -> None:
        """Take the watches or the marks off all records: they are of a descriptor that was lost.

        For the start of a daemon that has a new one. Raises SyscallError.
        """
        with named("reading the ledger"):
            names = [name for name, lost in (("watch", watches), ("mark", marks)) if lost]
            for path, _, data in self._written():
                # In place: a file of the ledger has several names. And each number by itself, at its length,
                # so that there is a whole record at every moment, if this is killed.
                with open(path, "r+b", buffering=0) as file:
                    for begin, nothing in without(data or b"", names):
                        os.pwrite(file.fileno(), nothing, begin)

    def collect(self) -> None:
        """Clear away what is gone, if that is due; for when nobody waits. Raises SyscallError."""
        if self._due <= 0:
            self._collect()

    def _collect(self) -> None:
        # The more there are, the more it takes, and the more rarely it is done.
        self._due = max(COLLECT_EVERY, len(self.records()))
        with named("clearing the ledger"):
            # The other names first: what has one afterwards had a place before.
            others = self._places(rules=True)
            places = {inode for _, inode, _ in self._places()} if others else set()
            self._free({place for place in others if place[1] not in places})

    def _make(self) -> None:
        """Make the directory if it is not there, with what is there without it. Raises OSError.

        Nobody sees it before it is whole, or could take a place that counts for what is not yet written.
        """
        if os.path.isdir(self._directory):
            return
        from mountd.ledger.rebuilding import rebuild  # of no use otherwise

        parent = os.open(os.path.dirname(self._directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(parent, fcntl.LOCK_EX)
            if os.path.isdir(self._directory):
                return
            passing = f"{self._directory}.new"
            shutil.rmtree(passing, ignore_errors=True)  # of a process that was killed meanwhile
            os.mkdir(passing, 0o700)
            anew = Book(passing, self.watches_fd, self.marks_fd, self.maximum, self.hidden)
            rebuild(anew, self._attached())
            os.rename(passing, self._directory)
        finally:
            os.close(parent)

    def _places(self, *, rules: bool = False) -> set[Place]:
        """Return each place that is taken, or each other name of one."""
        return {place for place in map(look_at, self._paths(rules=rules)) if place is not None}

    def _place(self, directory: str, maximum: int, limit: str) -> tuple[int, str]:
        """Return a new file in one of `maximum` places of a directory, and its path."""

        def create(path: str) -> int | None:
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                return None
            if is_locked(fd):
                return fd
            os.close(fd)
            return None

        return self._first_free(directory, maximum, limit, create)

    def _link(self, path: str, directory: str, maximum: int) -> str:
        """Give a file a second name in one of `maximum` places of a directory, and return it."""

        def link(second: str) -> int | None:
            try:
                os.link(path, second)
            except FileExistsError:
                return None
            return 0

        return self._first_free(directory, maximum, RULE_LIMIT, link)[1]

    def _first_free(
        self, directory: str, maximum: int, limit: str, take: Callable[[str], int | None]
    ) -> tuple[int, str]:
        """Have `take` take one of `maximum` places; return what it returns, and the path of the place."""
        with named("writing the ledger"):
            self._make()
            known = bound_of(directory) == maximum or self._look_beyond(directory, maximum)
            for _ in range(TRIES if known else 0):
                self._next += 1
                path = f"{directory}/{self._next % maximum}"
                found = take(path)
                if found is not None:
                    return found, path
            for clear in (None, self._collect, self._look_closer):
                if clear is not None:
                    clear()
                taken = numbers_in(directory)
                for number in set(range(usable(taken, maximum))) - taken:
                    path = f"{directory}/{number}"
                    found = take(path)
                    if found is not None:
                        return found, path
        raise LimitExceeded(limit, maximum, hint=HINT)

    @staticmethod
    def _look_beyond(directory: str, maximum: int) -> bool:
        """Write down that no place beyond `maximum` is taken; return whether that is so."""
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if any(number >= maximum for number in numbers_in(directory)):
            return False
        passing = f"{directory}/{BOUND}.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(passing)  # of a process with this number that was killed
        os.symlink(str(maximum), passing)
        os.rename(passing, f"{directory}/{BOUND}")
        return True

    def _look_closer(self) -> None:
        with contextlib.suppress(NotSupported):
            live.settled(self, self.records())

    def _paths(self, *, rules: bool = False) -> Iterator[str]:
        """Return the places that are taken, of all owners; or their other names."""
        try:
            with os.scandir(self._directory) as directories:
                owners = [
                    each.path
                    for each in directories
                    if ("." in each.name) is rules and each.is_dir(follow_symlinks=False)
                ]
        except FileNotFoundError:
            return  # it is made when there is something to be written, or said
        for owner in owners:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile, with all that was in it
                for name in os.listdir(owner):
                    if name.isdecimal():
                        yield f"{owner}/{name}"

    def _written(self) -> dict[Place, Record]:
        """Return what is written at the places; nobody's place, and what is no record, is freed."""
        found: dict[Place, Record] = {}
        unwritten: list[str] = []
        for place in self._places():
            record = decode(place[2] or b"")
            if record is not None:
                found[place] = record
            else:
                unwritten.append(place[0])
        if unwritten:
            free_abandoned(self._directory, unwritten)
        return found

    def _free(self, places: Collection[Place]) -> None:
        if places:
            free(self._directory, places)


def bound_of(directory: str) -> int | None:
    """Return up to which place some may be taken in a directory, None where that is not known."""
    try:
        return int(os.readlink(f"{directory}/{BOUND}"))
    except (FileNotFoundError, ValueError):
        return None


def numbers_in(directory: str) -> set[int]:
    """Return the places of a directory that are taken."""
    return {int(name) for name in os.listdir(directory) if name.isdecimal()}


def usable(taken: set[int], maximum: int) -> int:
    """Return how many places there are to be had, so that not more than `maximum` are ever taken.

    Of those beyond, none is taken anew, so that each of them leaves one less to all who look, whenever they
    do.
    """
    number, count = maximum, sum(each >= maximum for each in taken)
    while number + count > maximum and number > 0:
        number -= 1
        count += number in taken
    return number


def directory_of(owner: int, roots_namespace: int) -> str:
    """Return the name of the directory of who pays for a mount."""
    return f"{owner}-{roots_namespace}" if roots_namespace else str(owner)


@contextlib.contextmanager
def named(doing: str) -> Iterator[None]:
    """Turn what the ledger's own directory fails with into the error that a caller gets."""
    try:
        yield
    except OSError as error:
        raise SyscallError(error.errno or 0, doing) from None
