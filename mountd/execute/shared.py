"""Mounts that are kept for a while, so that whoever asks for the same again gets a clone of them.

A clone has the superblock of the first: one page cache, no second loop or dm-verity device, and a fraction
of the time. What is the same is said by a name (`plan.operations.Plan.shared`): the same unchangeable image,
the same way to read it, the same attributes, trusted for the same reason, and for the same owner.

A worker has a directory for its own below the staging directory, and there a place for each, which has the
name: what is at a place is never anything else than what the name stands for, whoever has put it there and
whatever became of him since. Any worker finds them all by symbolic links of the same names. Who has put one
there takes it away when nobody has asked for it for some seconds; whatever was cloned from it stays. A link
may be stale at any moment: then it leads to nothing, or to another of the same.
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

PLACES = 96  # of one worker: what it keeps, and room for all that it serves in a row
KEPT = 32
NAMES = "names"
NOTHING_KNOWN = StatxMask(0)


def prepare(directory: str, workers: int) -> None:
    """Make the directories for `workers` below `directory`, which is empty. Raises OSError."""
    os.makedirs(f"{directory}/{NAMES}", 0o700)
    for number in range(workers):
        os.mkdir(f"{directory}/{number}", 0o700)


def clean(directory: str, number: int) -> None:
    """Take away what a worker that was killed has kept, and its links. Raises SyscallError, OSError."""
    for name in os.listdir(f"{directory}/{NAMES}"):
        link = f"{directory}/{NAMES}/{name}"
        with suppress(FileNotFoundError):
            if os.readlink(link).startswith(f"../{number}/"):
                os.unlink(link)
    for name in os.listdir(f"{directory}/{number}"):
        give_up(f"{directory}/{number}/{name}")


def give_up(place: str) -> None:
    """Remove `place`, with all that is there. Raises SyscallError, OSError."""
    while take_away(place):
        pass  # another, of a worker that could not be cleaned up after
    os.rmdir(place)


def take_away(place: str) -> bool:
    """Detach what is at `place`; return whether there was anything. Raises SyscallError."""
    try:
        mount_api.umount(place)
    except SyscallError as error:
        if error.errno_name != "EINVAL":  # umount2(2): not a mount point
            raise
        return False
    return True


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
        self._kept: set[str] = set()  # names

    def find(self, name: str, clone: Callable[[str], OwnedFd] | None = None) -> OwnedFd | None:
        """Return a clone of the mount with this name, None if there is none. Raises SyscallError.

        It is made by `clone`, if given.
        """
        if self._seconds <= 0:
            return None  # nobody keeps any
        path = self._link(name)
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
        # What it has kept before under this name is not found any more, and goes at the next occasion.
        if name in self._kept or len(self._kept) == PLACES or self._seconds <= 0:
            return None
        place = f"{self._directory}/{self._number}/{name}"
        os.makedirs(place, 0o700, exist_ok=True)
        self._kept.add(name)
        mount_api.move_mount(mount.fileno(), place)
        made = (clone or self._clone)(place)
        try:
            passing = f"{self._link(name)}.{self._number}"
            with suppress(FileNotFoundError):
                os.unlink(passing)  # of a worker with this number that was killed before it had renamed it
            os.symlink(self._target(name), passing)
            self._touch(passing)
            os.rename(passing, self._link(name))
        except BaseException:
            made.close()
            raise
        return made

    def seconds_left(self) -> float | None:
        """Return when `expire` has something to do, in seconds from now, None if there is nothing."""
        if not self._kept:
            return None
        return max(0.0, self._seconds - max(map(self._age, self._kept)))

    def expire(self, seconds: float | None = None) -> None:
        """Take away what was not used for `seconds`, or the usual, and all but the latest KEPT of the rest.

        Raises SyscallError, OSError.
        """
        limit = self._seconds if seconds is None else seconds
        ages = {name: self._age(name) for name in self._kept}
        if len(ages) > KEPT:
            limit = min(limit, sorted(ages.values())[KEPT])
        for name, age in ages.items():
            if age >= limit:
                if self._is_own(name):
                    with suppress(FileNotFoundError):
                        os.unlink(self._link(name))
                give_up(f"{self._directory}/{self._number}/{name}")
                self._kept.remove(name)

    def _link(self, name: str) -> str:
        return f"{self._directory}/{NAMES}/{name}"

    def _target(self, name: str) -> str:
        return f"../{self._number}/{name}"

    def _age(self, name: str) -> float:
        """Return the seconds since the last use. What another worker has taken the link of is old."""
        if not self._is_own(name):
            return self._seconds
        try:
            return time.monotonic() - os.lstat(self._link(name)).st_mtime_ns / 1e9
        except FileNotFoundError:
            return self._seconds

    def _is_own(self, name: str) -> bool:
        try:
            return os.readlink(self._link(name)) == self._target(name)
        except FileNotFoundError:
            return False

    @staticmethod
    def _touch(path: str) -> None:
        """Note the time of use, by a clock that nobody sets."""
        now = time.monotonic_ns()
        with suppress(FileNotFoundError):
            os.utime(path, ns=(now, now), follow_symlinks=False)
