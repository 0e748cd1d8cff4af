"""Making a directory for somebody else, with no more rights than who asks has, and those over the new one.

A throw-away child does it as the caller, in a user namespace that has two ids: the caller's own, and the one
that the directory is to belong to. There it may give what is the one's to the other, and nothing else: of
whatever the caller puts in the way, it could only give away what the caller has.
"""

import errno
import os
import secrets
from contextlib import suppress

from mountd.errors import SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import namespaces
from mountd.kernel.child import end_with_parent
from mountd.kernel.cloning import by_a_child
from mountd.kernel.flags import Clone, Resolve
from mountd.kernel.libc import call
from mountd.kernel.mount_api import path_bytes
from mountd.kernel.paths import openat2

CALLER, OWNER = 0, 1  # the two ids in the namespace
RENAME_NOREPLACE = 1
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
WHERE = Resolve.NO_XDEV | Resolve.NO_SYMLINKS | Resolve.BENEATH


def make_directory(
    parent_fd: int, name: str, mode: int, *, uid: int, gid: int, owner_uid: int, owner_gid: int
) -> OwnedFd:
    """Make the directory `name` in `parent_fd`, borrowed, as `uid` and `gid`; return it opened to read.

    It belongs to `owner_uid` and `owner_gid`, and has `mode` from the moment on in which it has its name.
    Raises SyscallError (EEXIST if there is something with that name), and nothing is left then.
    """
    temporary = f".#{secrets.token_hex(8)}"
    uids, gids = [(CALLER, uid, 1), (OWNER, owner_uid, 1)], [(CALLER, gid, 1), (OWNER, owner_gid, 1)]

    def become_caller() -> None:
        namespaces.setns(userns.fileno(), Clone.NEWUSER)
        os.setgroups([])
        # Only the effective ids, so that no process of the caller's may send it a signal.
        os.setegid(CALLER)
        os.seteuid(CALLER)
        end_with_parent()  # other ids have reset it

    def make() -> OwnedFd:
        become_caller()
        os.umask(0o077)
        os.mkdir(temporary, 0o700, dir_fd=parent_fd)
        try:
            made = openat2(parent_fd, temporary, DIRECTORY, WHERE)
            if os.fstat(made.fileno()).st_uid != CALLER:
                # Put there in place of the new one, and somebody else's.
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            os.fchmod(made.fileno(), mode)
            os.fchown(made.fileno(), OWNER, OWNER)
            call(
                "renameat2", parent_fd, path_bytes(temporary), parent_fd, path_bytes(name), RENAME_NOREPLACE
            )
        except BaseException:
            with suppress(OSError):
                os.rmdir(temporary, dir_fd=parent_fd)
            raise
        return made

    with namespaces.make_user_namespace(uids, gids) as userns:
        try:
            return by_a_child(make, {parent_fd, userns.fileno()})
        except SyscallError as error:
            number = error.errno or errno.EIO
            raise SyscallError(number, f"making the directory {name!r} as uid {uid}") from None
