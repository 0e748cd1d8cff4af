"""Mounts that are kept for a while, so that whoever asks for the same again gets a clone of them.

A clone has the superblock of the first: one page cache, no second loop or dm-verity device, and a fraction
of the time. What is the same is said by a name (`plan.operations.Plan.shared`): the same unchangeable image,
the same way to read it, the same attributes, trusted for the same reason, and for the same owner.

Each worker has a few slots for them in the staging directory; any worker finds them by their names, which
are symbolic links there. Who has put one there takes it away when nobody has asked for it for some seconds;
whatever was cloned from it stays. A name may be stale at any moment: what it leads to is looked at after it
was cloned, when it cannot change any more.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from mountd.errors import SyscallError
from mountd.kernel import mount_api
from mountd.kernel.flags import StatxMask
from mountd.kernel.paths import statx

if TYPE_CHECKING:
    from collections.abc import Callable

    from mountd.fds import OwnedFd

SLOTS = 96  # of one worker: what it keeps, and room for all that it serves in a row
KEPT = 32
NAMES = "names"
NOTHING_KNOWN = StatxMask(0)


def prepare(directory: str, workers: int) -> None:
    """Make the places for `workers` below `directory`, which is empty. Raises OSError."""
    os.makedirs(f"{directory}/{NAMES}", 0o700)
    for number in range(workers):
        for slot in range(SLOTS):
            os.makedirs(f"{directory}/{number}/{slot}", 0o700)


def clean(directory: str, number: int) -> None:
    """Take away what a worker that was killed has kept; its names lead nowhere then. Raises SyscallError."""
    for slot in range(SLOTS):
        take_away(f"{directory}/{number}/{slot}")


def take_away(place: str) -> None:
    """Detach what is at `place`, if there is anything. Raises SyscallError."""
    try:
        mount_api.umount(place)
    except SyscallError as error:
        if error.errno_name != "EINVAL":  # umount2(2): not a mount point
            raise


class SharedMounts:
    """One worker's view of them all, and those that it keeps itself."""

    __slots__ = ("_clone", "_device", "_directory", "_kept", "_number", "_seconds")

    def __init__(self, directory: str, number: int, seconds: float, clone: Callable[[str], OwnedFd]) -> None:
        """Look for them below `directory`, and keep each for `seconds` after its last use.

        `clone` returns a locked, detached clone of the mount at a path. Raises OSError.
        """
        self._directory = directory
        self._number = number
        self._seconds = seconds
        self._clone = clone
        device = os.stat(directory).st_dev
        self._device = os.major(device), os.minor(device)
        self._kept: dict[int, str] = {}  # slot -> the path of the name

    def find(self, name: str, clone: Callable[[str], OwnedFd] | None = None) -> OwnedFd | None:
        """Return a clone of the mount with this name, None if there is none. Raises SyscallError.

        It is made by `clone`, if given.
        """
        if self._seconds <= 0:
            return None  # nobody keeps any
        path = f"{self._directory}/{NAMES}/{name}"
        try:
            found = (clone or self._clone)(path)
        except SyscallError as error:
            if error.errno_name == "ENOENT":
                return None
            raise
        try:
            status = statx(found.fileno(), "", NOTHING_KNOWN, sync=False)
            if (status.stx_dev_major, status.stx_dev_minor) == self._device:
                # Taken away meanwhile, and what was cloned is the empty place.
                found.close()
                return None
            self._touch(path)
        except BaseException:
            found.close()
            raise
        return found

    def keep(
        self, name: str, mount: OwnedFd, clone: Callable[[str], OwnedFd] | None = None
    ) -> OwnedFd | None:
        """Keep `mount`, which stays the caller's, under this name, and return a clone of it.

        It is made by `clone`, if given. None if there is no room for it. Raises SyscallError, OSError.
        """
        free = [slot for slot in range(SLOTS) if slot not in self._kept]
        if not free or self._seconds <= 0:
            return None
        place = f"{self._directory}/{self._number}/{free[0]}"
        mount_api.move_mount(mount.fileno(), place)
        path = f"{self._directory}/{NAMES}/{name}"
        self._kept[free[0]] = path
        made = (clone or self._clone)(place)
        try:
            passing = f"{path}.{self._number}"
            with suppress(FileNotFoundError):
                os.unlink(passing)  # of a worker with this number that was killed before it had renamed it
            os.symlink(f"../{self._number}/{free[0]}", passing)
            self._touch(passing)
            os.rename(passing, path)
        except BaseException:
            made.close()
            raise
        return made

    def seconds_left(self) -> float | None:
        """Return when `expire` has something to do, in seconds from now, None if there is nothing."""
        if not self._kept:
            return None
        ages = [self._age(path, slot) for slot, path in self._kept.items()]
        return max(0.0, self._seconds - max(ages))

    def expire(self, seconds: float | None = None) -> None:
        """Take away what was not used for `seconds`, or the usual, and all but the latest KEPT of the rest.

        Raises SyscallError, OSError.
        """
        limit = self._seconds if seconds is None else seconds
        ages = {slot: self._age(path, slot) for slot, path in self._kept.items()}
        if len(ages) > KEPT:
            limit = min(limit, sorted(ages.values())[KEPT])
        for slot, path in list(self._kept.items()):
            if ages[slot] >= limit:
                if self._is_own(path, slot):
                    with suppress(FileNotFoundError):
                        os.unlink(path)
                del self._kept[slot]
                take_away(f"{self._directory}/{self._number}/{slot}")

    def _age(self, path: str, slot: int) -> float:
        """Return the seconds since the last use. What another worker has taken the name of is old."""
        if not self._is_own(path, slot):
            return self._seconds
        try:
            return time.monotonic() - os.lstat(path).st_mtime_ns / 1e9
        except FileNotFoundError:
            return self._seconds

    def _is_own(self, path: str, slot: int) -> bool:
        try:
            return os.readlink(path) == f"../{self._number}/{slot}"
        except FileNotFoundError:
            return False

    @staticmethod
    def _touch(path: str) -> None:
        """Note the time of use, by a clock that nobody sets."""
        now = time.monotonic_ns()
        with suppress(FileNotFoundError):
            os.utime(path, ns=(now, now), follow_symlinks=False)
