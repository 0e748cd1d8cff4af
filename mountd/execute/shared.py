"""Mounts that are kept, so that whoever asks for the same again gets a clone of them.

A clone has the superblock of the first: one page cache, no second loop or dm-verity device, and a fraction
of the time. What is the same is said by a name (`plan.operations.Plan.shared`): the same unchangeable image,
the same way to read it, the same attributes, trusted for the same reason, and for the same owner.

Each has a place below the staging directory, which has the name: what is at a place is never anything else
than what the name stands for, whoever has put it there and whatever became of him since. They belong to all
workers. Beside the places there is a file for each name: the time of its last change is that of the last
use, and who holds a lock on it is the one who makes the mount, so that others who ask for it at the same
moment wait for that, or who takes it away. A lock goes with its process.

What is in use is kept for as long as it is, and what is not for some seconds after the last use. Which it
is, is not known here: whoever is to look (`due`) finds that out, and says what is to stay (`settle`).
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from mountd.errors import SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import mount_api
from mountd.kernel.compat import mount_id_and_device
from mountd.kernel.flags import StatxMask
from mountd.kernel.mount_info import statmount
from mountd.kernel.paths import statx

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    Device = tuple[int, int]

PLACES = 512
KEPT = 128  # of what nobody uses
NAMES = "names"
NOTHING_KNOWN = StatxMask(0)
# Seconds: then it is made once more, and nobody else gets it.
PATIENCE = 2.0
FIRST_PAUSE, LONGEST_PAUSE = 0.0005, 0.02
# Seconds until a worker that has nothing to do looks whether another one has left anything.
LOOK_EVERY = 60.0
NEVER = float("inf")  # used
SHARE_OF_TIME = 50  # it looks the more rarely, the longer it takes


def prepare(directory: str) -> None:
    """Make what is needed in `directory`, which is empty. Raises OSError."""
    os.makedirs(f"{directory}/{NAMES}", 0o700)


def take_away(place: str) -> bool:
    """Detach what is at `place`; return whether there was anything. Raises SyscallError."""
    try:
        mount_api.umount(place)
    except SyscallError as error:
        if error.errno_name not in ("EINVAL", "ENOENT"):  # umount2(2): not a mount point; or no such place
            raise
        return False
    return True


class SharedMounts:
    """One worker's view of them."""

    __slots__ = (
        "_clone",
        "_device",
        "_directory",
        "_held",
        "_look_at",
        "_looked_since",
        "_not_before",
        "_seconds",
    )

    def __init__(self, directory: str, seconds: float, clone: Callable[[str], OwnedFd]) -> None:
        """Look for them below `directory`; each is kept for `seconds` after its last use.

        `clone` returns a locked, detached clone of the mount at a path. Raises OSError.
        """
        self._directory = directory
        self._seconds = seconds
        self._clone = clone
        device = os.stat(directory).st_dev
        self._device = os.major(device), os.minor(device)
        self._held: str | None = None  # the name whose lock this process has
        self._look_at = self._looked_since = self._not_before = time.monotonic()

    def find(self, name: str, clone: Callable[[str], OwnedFd] | None = None) -> OwnedFd | None:
        """Return a clone of the mount with this name, None if there is none. Raises SyscallError.

        It is made by `clone`, if given.
        """
        if self._seconds <= 0:
            return None  # nobody keeps any
        try:
            found = (clone or self._clone)(self._place(name))
        except SyscallError as error:
            # EINVAL: detached between being found and being cloned.
            if error.errno_name in ("ENOENT", "EINVAL"):
                return None
            raise
        try:
            status = statx(found.fileno(), "", NOTHING_KNOWN, sync=False)
            if (status.stx_dev_major, status.stx_dev_minor) == self._device:
                # Not yet there, or taken away meanwhile, and what was cloned is the empty place.
                found.close()
                return None
            self._touch(name)
        except BaseException:
            found.close()
            raise
        return found

    @contextmanager
    def making(self, name: str) -> Iterator[None]:
        """Be the one who makes what has this name, for as long as a with statement: `keep` needs it.

        Who else makes it is waited for; then it may be there. Raises OSError.
        """
        lock = self._lock(name, PATIENCE) if self._seconds > 0 else None
        if lock is None:
            yield
            return
        with lock:
            self._held = name
            self._touch(name)
            try:
                yield
            finally:
                self._held = None
                if not os.path.lexists(self._place(name)):
                    os.unlink(self._file(name))  # it was not made

    def keep(
        self, name: str, mount: OwnedFd, clone: Callable[[str], OwnedFd] | None = None
    ) -> OwnedFd | None:
        """Keep `mount`, which stays the caller's, under this name, and return a clone of it.

        It is made by `clone`, if given. None if there is no room for it, or if this process is not the one
        who makes it. Raises SyscallError, OSError.
        """
        if self._held != name:
            return None
        count = len(os.listdir(f"{self._directory}/{NAMES}"))
        if count > PLACES:
            self._look_at = time.monotonic()
            return None
        place = self._place(name)
        os.makedirs(place, 0o700, exist_ok=True)
        mount_api.move_mount(mount.fileno(), place)
        made = (clone or self._clone)(place)
        self._touch(name)
        now = time.monotonic()
        self._look_at = now if count > KEPT else min(self._look_at, now + self._seconds)
        return made

    def seconds_left(self) -> float | None:
        """Return in how many seconds to look whether there is anything to settle, None for never."""
        if self._seconds <= 0:
            return None
        return max(0.0, max(self._look_at, self._not_before) - time.monotonic())

    def due(self) -> dict[str, set[Device]]:
        """Return what nobody has asked for lately, if it is time to look: name -> device numbers.

        The one or two numbers are those that files of the mount and its superblock have. `settle` has to
        follow. Raises OSError.
        """
        now = self._looked_since = time.monotonic()
        if now < max(self._look_at, self._not_before):
            return {}
        ages = self._ages(now)
        limit = self._limit(ages)
        left = [self._seconds - age for age in ages.values() if age < limit]
        self._look_at = now + min(left, default=LOOK_EVERY)
        return {name: self._devices(name) for name, age in ages.items() if age >= limit}

    def settle(self, due: Collection[str], used: Collection[str]) -> None:
        """Keep those of what was `due` that are `used`, and take away the others. Raises SyscallError."""
        for name in used:
            self._touch(name)
        for name in set(due).difference(used):
            self._give_up(name, self._looked_since)
        if used:
            now = time.monotonic()
            self._look_at = min(self._look_at, now + self._seconds)
            self._not_before = now + SHARE_OF_TIME * (now - self._looked_since)

    def give_up_all(self) -> None:
        """Take away what nobody is about to make or to take away. Raises SyscallError, OSError."""
        for name in self._ages(0.0):
            self._give_up(name, NEVER)

    def _limit(self, ages: dict[str, float]) -> float:
        """Return for how many seconds what is unused may stay."""
        if len(ages) <= KEPT:
            return self._seconds
        return min(self._seconds, sorted(ages.values())[KEPT])

    def _ages(self, now: float) -> dict[str, float]:
        """Return how many seconds ago each was used last."""
        ages = {}
        for name in os.listdir(f"{self._directory}/{NAMES}"):
            with suppress(FileNotFoundError):
                age = now - os.lstat(self._file(name)).st_mtime_ns / 1e9
                # One from the future has the time of another clock: who made it was killed at once.
                ages[name] = age if age >= 0 else NEVER
        return ages

    def _devices(self, name: str) -> set[Device]:
        """Return the device numbers of what is at a place: there may be nothing."""
        try:
            with OwnedFd(os.open(self._place(name), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)) as place:
                id, device = mount_id_and_device(place.fileno())
                return {device, statmount(id).sb_dev}
        except (SyscallError, OSError):
            return set()

    def _give_up(self, name: str, before: float) -> None:
        """Take away what has not been used since `before`, unless somebody makes it or takes it away."""
        lock = self._lock(name, 0.0, make=False)
        if lock is None:
            return
        with lock:
            if before < os.fstat(lock.fileno()).st_mtime_ns / 1e9 <= time.monotonic():
                return
            place = self._place(name)
            with suppress(FileNotFoundError):
                while take_away(place):
                    pass
                os.rmdir(place)
            os.unlink(self._file(name))

    def _lock(self, name: str, patience: float, *, make: bool = True) -> OwnedFd | None:
        """Return the lock of a name, None if somebody else has it for so long, or there is no such name."""
        end, pause = time.monotonic() + patience, FIRST_PAUSE
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
        while True:
            try:
                lock = OwnedFd(os.open(self._file(name), flags, 0o600))
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                if time.monotonic() >= end:
                    return None
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            if os.fstat(lock.fileno()).st_nlink:
                return lock
            lock.close()  # it was taken away while it was waited for

    def _place(self, name: str) -> str:
        return f"{self._directory}/{name}"

    def _file(self, name: str) -> str:
        return f"{self._directory}/{NAMES}/{name}"

    def _touch(self, name: str) -> None:
        """Note the time of use, by a clock that nobody sets."""
        now = time.monotonic_ns()
        with suppress(FileNotFoundError):
            os.utime(self._file(name), ns=(now, now), follow_symlinks=False)
