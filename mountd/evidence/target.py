"""Where a mount is to be attached: the proof that the place is the caller's, and nobody else's.

The target is a descriptor, and nothing is attached but there. What its path is good for is to say whether a
rule grants the place, and whose the directories above it are: whoever can rename one of them decides what
the place is called, and so what the mount hides. The kernel says what the path is; it is then walked in the
caller's own mount namespace, with the caller's rights, one component at a time, each found in the directory
that was held and judged before it. Every directory has to belong to root or to the caller, and what is in it
must be nobody else's to rename. What the walk ends at has to be the very directory that was handed over.

The caller can still rename directories of its own, before and afterwards; the mount goes along. It could do
that with anything that it has there, and hides nothing but what is its own.

All of it happens in a throw-away child (kernel/visitor); `Place.problem` is for another one, later.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.errors import AttachNotPermitted, BadFileDescriptor, SyscallError
from mountd.evidence.mounts import REMOTE
from mountd.fds import OwnedFd
from mountd.kernel.flags import StatxMask
from mountd.kernel.mount_info import statmount
from mountd.kernel.paths import statx
from mountd.kernel.visitor import visit

if TYPE_CHECKING:
    from mountd.kernel.abi import statx as statx_struct
    from mountd.kernel.visitor import Visitor

FIELD = "targetFileDescriptor"
MAXIMUM_COMPONENTS = 64
COMPONENT = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
WANTED = StatxMask.BASIC_STATS | StatxMask.MNT_ID_UNIQUE
OTHERS = 0o022
MOVED = "it is not at its path in the mount namespace of the caller: it was removed, or is somewhere else"
OPEN_ANEW = "open it by the path that it has now, in the mount namespace that it is in"
ENTER = "see that you may enter each directory above it"
ELSEWHERE = "use a directory below directories of root's and of your own, such as your home directory"


class NotTheirs(Exception):
    """The walk found that the place is not the caller's alone; the text says why, the hint what to do."""

    def __init__(self, reason: str, hint: str) -> None:
        """Both are for the caller."""
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Who:
    """Whom the place has to belong to: ids of the host, and whose directories above it may be."""

    uid: int
    gid: int
    groups: frozenset[int]
    roots: frozenset[int]

    @property
    def ids(self) -> tuple[int, int, frozenset[int]]:
        """As `visit` takes them."""
        return self.uid, self.gid, self.groups


@dataclass(frozen=True, slots=True)
class Place:
    """A target as it was found: its path in the caller's mount namespace, and which directory it is.

    `home` is the caller's home directory, if the path leads through it.
    """

    path: str
    home: str | None
    mount: int
    device: tuple[int, int]
    inode: int

    def problem(self, who: Who, mounted: int | None = None) -> str | None:
        """Walk again, from within a visitor; say what is not, or no longer, as it has to be.

        `mounted` is the unique id of the mount that is attached there by now. Raises OSError.
        """
        try:
            walk(self, who, None, mounted)
        except NotTheirs as problem:
            return str(problem)
        return None


def find(target_fd: int, namespace_fd: int, who: Who, home: str | None) -> Place:
    """Find out where the target is, in the mount namespace of the caller. Both descriptors are borrowed.

    Raises BadFileDescriptor for what is no directory, AttachNotPermitted for one that is not the caller's
    alone, and SyscallError.
    """
    status = statx(target_fd, "", WANTED, sync=False)
    if not stat.S_ISDIR(status.stx_mode):
        raise BadFileDescriptor(FIELD, "it is not a directory")
    seen = (status.stx_mnt_id, (status.stx_dev_major, status.stx_dev_minor), status.stx_ino)

    def look(visitor: Visitor) -> bytes:
        try:
            path = visitor.path_of(target_fd)
            home_at = walk(Place(path, None, *seen), who, home)
        except NotTheirs as problem:
            return json.dumps({"problem": str(problem), "hint": problem.hint}).encode()
        return json.dumps({"path": path, "home": home_at}).encode()

    try:
        answer = json.loads(visit(namespace_fd, [target_fd], who.ids, look))
    except SyscallError as error:
        raise AttachNotPermitted(f"its path cannot be checked ({error.errno_name})", hint=ENTER) from None
    if "problem" in answer:
        raise AttachNotPermitted(answer["problem"], hint=answer["hint"])
    return Place(answer["path"], answer["home"], *seen)


def walk(place: Place, who: Who, home: str | None, mounted: int | None = None) -> str | None:
    """Walk to the place; return the home directory as the walk found it.

    `mounted` is the mount that has to be attached at its end. Raises NotTheirs, OSError.
    """
    names = place.path.split("/")[1:]
    if not place.path.startswith("/") or len(names) > MAXIMUM_COMPONENTS or not all(names):
        hint = f"use a directory below “/” that is at most {MAXIMUM_COMPONENTS} levels deep"
        raise NotTheirs("its path is not a plain one", hint)
    home_identity, home_at = identity_of(home, who), None
    at = OwnedFd(os.open("/", os.O_PATH | os.O_CLOEXEC))
    try:
        above = judge_directory(at.fileno(), "/", None, who)
        last = names.pop()
        path = ""
        for name in names:
            path = f"{path}/{name}"
            below = enter(at.fileno(), name)
            at.close()
            at = below
            above = judge_directory(at.fileno(), path, above, who)
            if home_identity == (above.stx_dev_major, above.stx_dev_minor, above.stx_ino):
                home_at = path
        with enter(at.fileno(), last) as target:
            if mounted is None:
                judge_target(target.fileno(), place, above, who)
            else:
                judge_attached(target.fileno(), place, mounted)
    finally:
        at.close()
    return home_at


def identity_of(home: str | None, who: Who) -> tuple[int, int, int] | None:
    """Return which directory the home is, None if it is not there, or not the caller's."""
    if home is None:
        return None
    try:
        status = os.stat(home)
    except OSError:
        return None
    if status.st_uid != who.uid:
        return None
    return os.major(status.st_dev), os.minor(status.st_dev), status.st_ino


def enter(at: int, name: str) -> OwnedFd:
    """Hold what is called `name` in the directory `at`. Raises NotTheirs, OSError."""
    try:
        return OwnedFd(os.open(name, COMPONENT, dir_fd=at))
    except (FileNotFoundError, NotADirectoryError):
        raise NotTheirs(MOVED, OPEN_ANEW) from None


def judge_directory(fd: int, path: str, above: statx_struct | None, who: Who) -> statx_struct:
    """Refuse a directory on the way that somebody else has power over; return its status.

    `above` is that of the directory which it is in, and which others may write to only if it is sticky: then
    an entry is for its owner to rename.
    """
    status = statx(fd, "", WANTED, sync=False)
    if not stat.S_ISDIR(status.stx_mode):
        reason = MOVED if stat.S_ISLNK(status.stx_mode) else f"{path} is not a directory"
        raise NotTheirs(reason, OPEN_ANEW)
    if above is None or above.stx_mnt_id != status.stx_mnt_id:
        judge_mount(status.stx_mnt_id, path)
    if status.stx_uid not in who.roots and status.stx_uid != who.uid:
        reason = f"{path} belongs to uid {status.stx_uid}, who may put something else in its place"
        raise NotTheirs(reason, ELSEWHERE)
    if status.stx_mode & OTHERS and not status.stx_mode & stat.S_ISVTX:
        hint = f"“chmod go-w {path}”" if status.stx_uid == who.uid else ELSEWHERE
        raise NotTheirs(f"{path} is writable by others, who may put something else there", hint)
    return status


def judge_mount(id: int, path: str) -> None:
    """Refuse what lies on a file system whose server says who owns what, and when it answers."""
    type = statmount(id).fs_type
    if type is None or type.split(".")[0] in REMOTE:
        reason = f"{path} is on a file system of type {type}, whose contents somebody else decides"
        raise NotTheirs(reason, "use a directory on a local file system")


def judge_target(fd: int, place: Place, above: statx_struct, who: Who) -> None:
    """Refuse a target that is not the one that was handed over, or not the caller's alone."""
    status = statx(fd, "", WANTED, sync=False)
    found = (status.stx_mnt_id, (status.stx_dev_major, status.stx_dev_minor), status.stx_ino)
    if found != (place.mount, place.device, place.inode):
        raise NotTheirs(MOVED, OPEN_ANEW)
    if status.stx_mnt_id != above.stx_mnt_id:
        hint = f"“umount {place.path}” first, or use another directory"
        raise NotTheirs(f"something is mounted at {place.path} already", hint)
    if status.stx_uid != who.uid:
        hint = "use a directory of your own, below directories of your own"
        raise NotTheirs(f"{place.path} belongs to uid {status.stx_uid}, not to the caller", hint)
    if status.stx_mode & stat.S_ISVTX:
        hint = f"use a directory in it; or “chmod -t {place.path}”, if it is yours alone"
        raise NotTheirs(f"{place.path} is sticky, which says that it is shared", hint)
    if status.stx_mode & OTHERS:
        raise NotTheirs(f"{place.path} is writable by others than the caller", f"“chmod go-w {place.path}”")


def judge_attached(fd: int, place: Place, mounted: int) -> None:
    """Refuse whatever is found at the place once the mount was attached, but that mount, on the target."""
    status = statx(fd, "", WANTED, sync=False)
    if status.stx_mnt_id != mounted or statmount(mounted).parent_id != place.mount:
        raise NotTheirs(MOVED, OPEN_ANEW)
