"""Where an image lies: the proof that its path belongs to root from the top to the file itself.

The link in /proc only says where to look. The path is then walked from the root of the daemon's own mount
namespace, one component at a time, each found in the directory that was held and judged before it, and each
must be no link, belong to root and be writable by nobody else. What the walk ends at has to be the very
inode that the caller handed over. Only root can rename what is in such a directory; should root do so at
this very moment, what was judged is still what the rest was found in.

A file that root was given may still be open for writing to whoever had it before, and nobody must have it
open so. That is asked last: by then it takes to be root to open it.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from mountd.errors import SyscallError
from mountd.evidence.model import Evidence
from mountd.evidence.mounts import problem_of
from mountd.fds import OwnedFd
from mountd.kernel import lease
from mountd.kernel.flags import StatxMask
from mountd.kernel.numbers import AT_FDCWD
from mountd.kernel.paths import statx

if TYPE_CHECKING:
    from typing import NoReturn

    from mountd.kernel.abi import statx as statx_struct
    from mountd.source.model import BackingFile, Directory

    Identity = tuple[int, int, int, int]  # device, inode, mount

MAXIMUM_COMPONENTS = 64
MAXIMUM_HELD = 64
COMPONENT = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
UNKNOWN_WRITERS = "whether somebody has it open for writing cannot be found out"
WRITTEN = "somebody has it open for writing"
MISSING = "its path does not exist in the mount namespace of mountd"
WANTED = StatxMask.BASIC_STATS | StatxMask.MNT_ID_UNIQUE


class NotThere(Exception):
    """The walk found that the path proves nothing; the text says why."""


class Walker:
    """Walks paths, and holds the directories that it came through until it is closed.

    The next walk finds most of them again, and need not open them. To hold them for long would keep an
    administrator from unmounting what they lie on.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: dict[str, tuple[OwnedFd, Identity]] = {}

    def walk(self, backing: BackingFile | Directory, name_paths: bool, kind: int = stat.S_IFREG) -> str:
        """Return the path if every component of it proves to be root's, and it leads to a file of `kind`.

        Raises NotThere, SyscallError.
        """
        hint = backing.path_hint
        if hint is None or not hint.startswith("/"):
            raise NotThere("it has no path")
        names = hint.split("/")[1:]
        if len(names) > MAXIMUM_COMPONENTS or any(name in ("", ".", "..") for name in names):
            raise NotThere("its path is not a plain one")
        if len(self._held) > MAXIMUM_HELD:
            self.close()
        path, last = "", names.pop()
        at, status = self._enter("/", AT_FDCWD, "/", "/", 0)
        for name in names:
            path = f"{path}/{name}"
            shown = path if name_paths else "a part of its path"
            at, status = self._enter(path, at, name, shown, status.stx_mnt_id)
        status = check(at, last, hint if name_paths else "a part of its path", status.stx_mnt_id)
        dev = os.makedev(status.stx_dev_major, status.stx_dev_minor)
        if (dev, status.stx_ino) != (backing.dev, backing.ino) or stat.S_IFMT(status.stx_mode) != kind:
            raise NotThere("another file is at its path, in the mount namespace of mountd")
        return hint

    def _enter(self, path: str, at: int, name: str, shown: str, mount: int) -> tuple[int, statx_struct]:
        """Judge the component `name` of the directory `at`; return its descriptor, borrowed, and its status.

        `path` is what leads to it, `mount` the mount of the directory.
        """
        status = check(at, name, shown, mount)
        known = self._held.get(path)
        if known is not None and known[1] == identity(status):
            return known[0].fileno(), status
        held = hold(at, name)
        try:
            # Anew: it may not be what was there a moment ago.
            status = check(held.fileno(), "", shown, mount)
        except BaseException:
            held.close()
            raise
        if known is not None:
            known[0].close()
        self._held[path] = held, identity(status)
        return held.fileno(), status

    def close(self) -> None:
        """Let go of all directories; the next walk opens them again."""
        while self._held:
            self._held.popitem()[1][0].close()

    def __enter__(self) -> Walker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def locate(fd: int, backing: BackingFile, walker: Walker, *, name_paths: bool) -> Evidence:
    """Find out whether the image `fd`, borrowed, which `backing` describes, lies where it is root's alone.

    `name_paths` says whether the reason may name directories: whoever is in a container has no business with
    the host's. Raises NotSupported, and SyscallError for an image that cannot be opened at once; whatever
    else goes wrong is a reason why there is no such evidence.
    """
    try:
        path: str | None = walker.walk(backing, name_paths)
        problem = None
    except NotThere as reason:
        path, problem = None, str(reason)
    except SyscallError as error:
        path, problem = None, f"its path cannot be checked ({error.errno_name})"
    # A caller's descriptor that can write to it is one itself; what that comes to is for the policy to say.
    if path is not None and not backing.writable:
        problem = problem_of_writers(fd)
    return Evidence(path if problem is None else None, problem, backing.writable)


def problem_of_writers(fd: int) -> str | None:
    """Return why a file that only root can open for writing by now may be written to by others all the same.

    Who had it open before it became root's still can: an administrator may have moved it where it lies. None
    if nobody has. Raises SyscallError.
    """
    try:
        with lease.open_again(fd) as own:
            written = lease.has_writer(own.fileno())
    except SyscallError as error:
        if error.errno == errno.EAGAIN:
            raise  # somebody has a lease on it
        return f"{UNKNOWN_WRITERS} ({error.errno_name})"
    return WRITTEN if written else None


def identity(status: statx_struct) -> Identity:
    """Return what no two files have in common while both are there."""
    return status.stx_dev_major, status.stx_dev_minor, status.stx_ino, status.stx_mnt_id


def hold(at: int, name: str) -> OwnedFd:
    """Hold one component, a link itself and not what it leads to. Raises NotThere, SyscallError."""
    try:
        return OwnedFd(os.open(name, COMPONENT, dir_fd=None if at == AT_FDCWD else at))
    except (FileNotFoundError, NotADirectoryError):
        raise NotThere(MISSING) from None
    except OSError as error:
        raise SyscallError(error.errno or 0, "openat") from None


def check(at: int, name: str, shown: str, mount: int) -> statx_struct:
    """Refuse a component that is a link, or that another user or a server has power over; return its status.

    It is `name` in the directory `at`, or `at` itself for "". `mount` is that of the component above it.
    """
    try:
        # Without asking the file system: that is safe only once its mount is known not to be a server's.
        status = statx(at, name, WANTED, sync=False)
    except SyscallError as error:
        if error.errno_name in ("ENOENT", "ENOTDIR"):
            raise NotThere(MISSING) from None
        raise
    if stat.S_ISLNK(status.stx_mode):
        raise NotThere("its path has a symbolic link in it")
    if status.stx_mnt_id != mount:
        problem = problem_of(status.stx_mnt_id, is_root=not mount)
        if problem is not None:
            raise NotThere(f"{shown} {problem}")
    if status.stx_uid != 0 or status.stx_mode & 0o022:
        refuse_owner(status, shown)
    return status


def refuse_owner(status: statx_struct, shown: str) -> NoReturn:
    """Say why a component is not root's alone."""
    if status.stx_uid != 0:
        raise NotThere(f"{shown} belongs to uid {status.stx_uid}, not to root")
    who = "everybody" if status.stx_mode & 0o002 else "its group"
    raise NotThere(f"{shown} is writable by {who}")
