"""What mount.mountd and umount.mountd share: whose rights they use, where they work, what they log."""

from __future__ import annotations

import errno
import os
import sys

from mountd.cli.report import UsageError, fail, finish, leave, line_about, printable, say
from mountd.errors import MountdError, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import sockets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import NoReturn

    Flag = tuple[str, str]  # with its dash or dashes, and its value, "" for none

JOURNAL = "/run/systemd/journal/socket"
JOURNAL_STREAM = "JOURNAL_STREAM"
ERROR, INFO = 3, 6  # syslog(3)
OWN_NAMESPACE = "/proc/self/ns/mnt"
NAMESPACE = "give the path of a mount namespace, such as /proc/PID/ns/mnt"


def become_caller() -> None:
    """Give up for good whatever rights a program with the set-user-ID bit has lent this one.

    mountd judges who connects to it, by the effective ids, and has to see who it was that called mount(8).
    """
    uid, gid = os.getuid(), os.getgid()
    if (uid, gid) != (os.geteuid(), os.getegid()):
        # The groups first, which takes the rights that go with the uid.
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)


class Wishes:
    """A command line, read: what those of both programs have."""

    def __init__(self) -> None:
        """Nothing is asked for yet."""
        self.directory = ""
        self.namespace: str | None = None
        self.verbose = self.json = False

    def read(self, argv: list[str]) -> None:
        """Read a command line; how its errors are to be told comes first. Raises MountdError."""
        raise NotImplementedError


def carry_out(program: str, usage: str, argv: list[str], wishes: Wishes, work: Callable[[], int]) -> int:
    """Have `wishes` read a command line, do `work` and return the exit status; what goes wrong is told.

    Raises KeyboardInterrupt.
    """
    if argv[:1] in (["-h"], ["--help"]):
        say(usage)
        return 0
    if argv[:1] in (["-V"], ["--version"]):
        from mountd.version import VERSION

        say(f"{program} {VERSION}")
        return 0
    try:
        wishes.read(argv)
        return work()
    except (MountdError, OSError) as error:
        return failed(program, error, where=wishes.directory, as_json=wishes.json)


def read_line(
    argv: list[str], letters: str, words: Sequence[str] = (), *, names: Sequence[str], usage: str
) -> tuple[list[Flag], list[str]]:
    """Return the options of a command line with their values, and what stands for each of `names`.

    As getopt_long(3) reads it, but without abbreviated words: `letters` that take a value are followed by a
    colon, `words` take none. The standard library's getopt loads regular expressions and translations, for
    which every mount would have to wait. Raises UsageError.
    """
    flags: list[Flag] = []
    others: list[str] = []
    rest = iter(argv)
    for argument in rest:
        if argument == "--":
            others += rest
        elif argument.startswith("--"):
            if argument[2:] not in words:
                raise UsageError(f"option {argument} not recognized", hint=usage)
            flags.append((argument, ""))
        elif argument.startswith("-") and argument != "-":
            flags += read_letters(argument[1:], letters, rest, usage)
        else:
            others.append(argument)
    if len(others) != len(names):
        needed = f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} needed"
        raise UsageError(f"{needed}, and nothing else", hint=usage)
    return flags, others


def read_letters(text: str, letters: str, rest: Iterator[str], usage: str) -> Iterator[Flag]:
    """Yield the options of one argument; the value of the last one may be the next of `rest`."""
    for number, letter in enumerate(text, 1):
        if letter == ":" or letter not in letters:
            raise UsageError(f"option -{letter} not recognized", hint=usage)
        if f"{letter}:" not in letters:
            yield f"-{letter}", ""
            continue
        value = text[number:] or next(rest, None)
        if value is None:
            raise UsageError(f"option -{letter} requires argument", hint=usage)
        yield f"-{letter}", value
        return


def run_program(program: str, run: Callable[[list[str]], int]) -> NoReturn:
    """Be the program: with the rights of who called it, and no longer than it takes."""
    become_caller()
    leave(finish(program, lambda: run(sys.argv[1:])))


class Place:
    """A mount namespace to work in: the one of -N, or that of this process. Closes what it has opened."""

    __slots__ = ("_other", "_own", "path")

    def __init__(self, path: str | None) -> None:
        """Open the namespace at `path`, None for one's own. Raises UsageError, OSError."""
        self.path = path
        self._own = self._other = None
        if path == "":
            raise UsageError("-N has no value", hint=NAMESPACE)
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
                raise UsageError(f"{self._path} is not a mount namespace", hint=NAMESPACE) from None
            if error.errno == errno.EPERM:
                raise UsageError(f"{self._path} may not be entered", hint="-N is for root") from None
            raise

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            enter(self._own)


def enter(namespace: OwnedFd) -> None:
    """Enter a mount namespace. Raises SyscallError.

    What is imported here is all that is used there, besides what has been imported by then.
    """
    from mountd.kernel import attaching, moving, paths  # noqa: F401 - not for here
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
        sockets.send_datagram(JOURNAL, data)
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
    import stat

    return stat.S_ISSOCK(status.st_mode) and stream == f"{status.st_dev}:{status.st_ino}"
