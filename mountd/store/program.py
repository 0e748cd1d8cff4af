"""Running a program of the system on what a stranger sent, so that it can do no harm.

The program is an ordinary one (skopeo, zstd, mkfs.erofs) and may have bugs; what it gets is

* a user of its own: `mountd-pull` where the system has it, nobody otherwise, without groups or capabilities,
  and without a way to get any (no_new_privs, prctl(2));
* pid, IPC and mount namespaces of its own, and a network without interfaces unless it needs the real one. It
  is the first process in its pid namespace, so that whatever it starts ends with it;
* every mount read-only but one directory, which it sees as /tmp and /var/tmp, and a /proc of its namespace;
* an environment that is the same everywhere, limits (setrlimit(2)), and the death of whoever waits for it as
  its own.

It still sees files that everybody may read: its configuration and the certificates are such.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import resource
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from mountd.errors import NotSupported, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel.child import EXIT_RAISED, close_all_but, end, end_with_parent, fork, pipe
from mountd.kernel.flags import Clone, MountAttr, OpenTree, Propagation
from mountd.kernel.fs_context import FsContext
from mountd.kernel.libc import call
from mountd.kernel.mount_api import mount_setattr, move_mount, open_tree, set_propagation
from mountd.kernel.namespaces import setns, unshare
from mountd.kernel.numbers import AT_FDCWD
from mountd.kernel.sandbox import NOBODY, PR_SET_NO_NEW_PRIVS
from mountd.store.child import Child, Output

if TYPE_CHECKING:
    from collections.abc import Sequence

USER = "mountd-pull"
HOME = "/tmp"
PLACES = (HOME, "/var/tmp")
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": HOME, "XDG_RUNTIME_DIR": HOME}
MAXIMUM_MESSAGES = 16384
MAXIMUM_EXCERPT = 500  # of them, in an error
FIRST_EXTRA = 3
HIGH = 64  # where descriptors are out of the way of those that the program gets
WRITABLE = MountAttr.NOSUID | MountAttr.NODEV | MountAttr.NOEXEC
LIMITS = {
    "cpu_seconds": resource.RLIMIT_CPU,
    "memory": resource.RLIMIT_AS,
    "file_size": resource.RLIMIT_FSIZE,
    "descriptors": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use: seconds of CPU, bytes of memory, bytes of each file, and so on.

    `processes` counts all that its user has, threads included.
    """

    cpu_seconds: int
    memory: int
    file_size: int
    descriptors: int = 256
    processes: int = 512


def identity() -> tuple[int, int]:
    """Return uid and gid of the user that programs run as."""
    try:
        entry = pwd.getpwnam(USER)
    except KeyError:
        return NOBODY, NOBODY
    # A user of this name that is root would be somebody's joke or somebody's attack.
    return (entry.pw_uid, entry.pw_gid) if entry.pw_uid and entry.pw_gid else (NOBODY, NOBODY)


def start(
    command: Sequence[str],
    limits: Limits,
    *,
    directory: int,
    network: bool = False,
    stdin: int | None = None,
    stdout: int | None = None,
    maximum_output: int = 0,
    extra: Sequence[int] = (),
) -> Child:
    """Start a program that may write to `directory` and nowhere else.

    All descriptors are borrowed. Without `stdin` there is nothing to read; without `stdout` what is written
    there is kept, up to `maximum_output` bytes, as the first output of the child; the last one is what it
    writes to stderr. `extra` descriptors become 3 and so on. Raises NotSupported if the program is not
    there, SyscallError and OSError if the confinement cannot be made.
    """
    outputs: list[Output] = []
    theirs: list[OwnedFd] = []
    try:
        null = OwnedFd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
        theirs.append(null)
        standard = [null.fileno() if stdin is None else stdin]
        if stdout is None:
            outputs.append(_output(theirs, maximum_output, last=False))
            standard.append(theirs[-1].fileno())
        else:
            standard.append(stdout)
        outputs.append(_output(theirs, MAXIMUM_MESSAGES, last=True))
        standard.append(theirs[-1].fileno())
        pid = _fork_and_run(command, limits, directory, network, [*standard, *extra])
    except BaseException:
        for output in outputs:
            output.fd.close()
        raise
    finally:
        for fd in theirs:
            fd.close()
    return Child(command[0], pid, outputs)


def _output(theirs: list[OwnedFd], maximum: int, *, last: bool) -> Output:
    reader, writer = pipe()
    theirs.append(writer)
    return Output(reader, maximum, last=last)


def _fork_and_run(
    command: Sequence[str], limits: Limits, directory: int, network: bool, fds: Sequence[int]
) -> int:
    """Fork into a new pid namespace and wait until the program runs there; return its pid."""
    with OwnedFd(os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)) as own:
        unshare(Clone.NEWPID)
        try:
            pid, reader = fork(lambda report: _become(command, limits, directory, network, fds, report))
        finally:
            # Only children are put into the new namespace, and only this one is meant.
            setns(own.fileno(), Clone.NEWPID)
    with reader:
        failure = os.read(reader.fileno(), 4096)
    if failure:
        end(pid)
        _fail(command[0], failure)
    return pid


def _fail(name: str, failure: bytes) -> NoReturn:
    """Raise what the child failed with before there was a program."""
    kind, number, call = failure.decode("utf-8", "replace").split(" ", 2)
    if kind == "missing":
        raise NotSupported(f"the program {name}", hint=f"install the package that has {name}")
    raise SyscallError(int(number), call)


def _become(
    command: Sequence[str],
    limits: Limits,
    directory: int,
    network: bool,
    fds: Sequence[int],
    report: int,
) -> int:
    """Be the child: confine it and become the program; tell why if that fails."""
    try:
        end_with_parent()
        os.setsid()
        report = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, HIGH)
        # First all out of the way, then each to its place.
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH) for fd in fds]
        writable = fcntl.fcntl(directory, fcntl.F_DUPFD_CLOEXEC, HIGH)
        for place, fd in enumerate(moved):
            os.dup2(fd, place)
        close_all_but({*range(len(fds)), report, writable})
        _leave(writable, network)
        os.close(writable)
        _drop(limits)
        try:
            os.execvpe(command[0], list(command), ENVIRONMENT)
        except (FileNotFoundError, PermissionError):
            os.write(report, b"missing 0 ")
    except OSError as error:
        said = error.call if isinstance(error, SyscallError) else f"starting {command[0]}"
        os.write(report, f"failed {error.errno or 0} {said}".encode())
    except NotSupported as error:
        os.write(report, f"failed 38 {error}".encode())
    except BaseException as error:  # noqa: BLE001 - a child of a fork has nobody to raise to
        os.write(report, f"failed 5 starting {command[0]}: {type(error).__name__}".encode())
    return EXIT_RAISED


def _leave(writable: int, network: bool) -> None:
    """Leave the namespaces of the daemon for ones in which only the directory can be written to."""
    # Cloned before: a mount of another namespace cannot be.
    flags = OpenTree.CLONE | OpenTree.EMPTY_PATH
    clones = [open_tree(writable, "", flags) for _ in PLACES]
    unshare(Clone.NEWNS | Clone.NEWIPC | Clone.NEWUTS | (Clone(0) if network else Clone.NEWNET))
    set_propagation("/", Propagation.PRIVATE, recursive=True)
    with open_tree(AT_FDCWD, "/", OpenTree(0)) as root:
        mount_setattr(root.fileno(), set=MountAttr.RDONLY, recursive=True)
    for clone, place in zip(clones, PLACES, strict=True):
        with clone:
            mount_setattr(clone.fileno(), set=WRITABLE)
            move_mount(clone.fileno(), place)
    # Its own processes only; and Go looks itself up there.
    with FsContext.open("proc") as context:
        context.create()
        with context.mount(MountAttr.NOSUID | MountAttr.NODEV | MountAttr.NOEXEC) as proc:
            move_mount(proc.fileno(), "/proc")
    os.chdir(HOME)


def _drop(limits: Limits) -> None:
    """Become the user that programs run as, within limits, for good."""
    uid, gid = identity()
    for name, number in LIMITS.items():
        value = getattr(limits, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    # Python ignores it, and a program that is started inherits that.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)  # which drops every capability
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Another user id reset it.
    end_with_parent()


def excerpt(said: str, code: int) -> str:
    """Return the last line of what a program said, fit for a message; how it ended if it said nothing."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if not lines:
        return f"it ended with signal {-code}" if code < 0 else f"it ended with status {code}"
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in lines[-1])
    return shown if len(shown) <= MAXIMUM_EXCERPT else shown[: MAXIMUM_EXCERPT - 1] + "…"
