"""What mount.mountd and umount.mountd share: whose rights they use, where they work, what they log."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys

from mountd.cli.report import UsageError, fail, line_about, printable, say
from mountd.errors import SyscallError
from mountd.fds import OwnedFd

JOURNAL = "/run/systemd/journal/socket"
JOURNAL_STREAM = "JOURNAL_STREAM"
ERROR, INFO = 3, 6  # syslog(3)
OWN_NAMESPACE = "/proc/self/ns/mnt"


def become_caller() -> None:
    """Give up for good whatever rights a program with the set-user-ID bit has lent this one.

    mountd judges who connects to it, by the effective ids, and has to see who it was that called mount(8).
    """
    uid, gid = os.getuid(), os.getgid()
    if (uid, gid) != (os.geteuid(), os.getegid()):
        # The groups first, which takes the rights that go with the uid.
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)


class Place:
    """A mount namespace to work in: the one of -N, or that of this process. Closes what it has opened."""

    __slots__ = ("_other", "_own", "path")

    def __init__(self, path: str | None) -> None:
        """Open the namespace at `path`, None for one's own. Raises OSError."""
        self.path = path
        self._own = self._other = None
        if path is not None:
            self._own = OwnedFd(os.open(OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC))
            self._other = OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self._own, self._other):
            if fd is not None:
                fd.close()

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def inside(self) -> Inside:
        """Return what it takes to be there, for a with statement."""
        return Inside(self.path, self._own, self._other)


class Inside:
    """Being in another mount namespace. Nothing may be imported there: its files are not ours."""

    __slots__ = ("_other", "_own", "_path")

    def __init__(self, path: str | None, own: OwnedFd | None, other: OwnedFd | None) -> None:
        """Both are borrowed, and None to stay where one is."""
        self._path, self._own, self._other = path, own, other

    def __enter__(self) -> None:
        """Raises UsageError for what is no mount namespace or may not be entered, and SyscallError."""
        if self._other is None:
            return
        try:
            enter(self._other)
        except SyscallError as error:
            if error.errno == errno.EINVAL:
                raise UsageError(f"{self._path} is not a mount namespace") from None
            if error.errno == errno.EPERM:
                raise UsageError(f"{self._path} may not be entered", hint="-N is for root") from None
            raise

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            enter(self._own)


def enter(namespace: OwnedFd) -> None:
    """Enter a mount namespace. Raises SyscallError.

    With what is imported here for that comes all that is used there.
    """
    from mountd.kernel.flags import Clone
    from mountd.kernel.namespaces import setns

    setns(namespace.fileno(), Clone.NEWNS)


def failed(program: str, error: BaseException, *, where: str = "", as_json: bool = False) -> int:
    """Report `error` to the user and to the journal, and return the exit status."""
    note(program, line_about(program, error, where), ERROR)
    return fail(program, error, where=where, as_json=as_json)


def tell(program: str, text: str) -> None:
    """Say something that is no error, and tell the journal. Raises OSError."""
    line = printable(f"{program}: {text}")
    note(program, line, INFO)
    say(line)


def note(program: str, line: str, priority: int) -> None:
    """Write one line to the journal, if there is one and standard error does not lead there already.

    Who calls libmount itself never sees what a helper prints.
    """
    if leads_to_journal():
        return
    message = printable(line).encode("utf-8", "replace").decode()
    data = f"MESSAGE={message}\nPRIORITY={priority}\nSYSLOG_IDENTIFIER={program}\n".encode()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as journal:
            journal.setblocking(False)
            journal.sendto(data, JOURNAL)
    except OSError:
        return  # there is none, or it does not listen


def leads_to_journal() -> bool:
    """Tell whether standard error is what the service manager has connected with the journal."""
    stream = os.environ.get(JOURNAL_STREAM)
    if stream is None or sys.stderr is None:
        return False
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return stat.S_ISSOCK(status.st_mode) and stream == f"{status.st_dev}:{status.st_ino}"
