"""Running a program of the system that reads what comes from an enemy: as nobody, and with a deadline.

The program has no capabilities and cannot get any (PR_SET_NO_NEW_PRIVS), an empty environment, no
descriptors but those that it is given, little memory and time, and a seccomp(2) filter that says EPERM to
what leads anywhere else: sockets, other processes, namespaces, mounts, keyrings, io_uring. That filter lists
what is forbidden, as which calls a program of the system makes differs between versions of it.
"""

import errno
import os
import resource
import signal

from mountd.errors import NotSupported
from mountd.kernel import child
from mountd.kernel.libc import call
from mountd.kernel.sandbox import (
    JUMP_IF_EQUAL,
    LOAD,
    NOBODY,
    OFFSET_ARCHITECTURE,
    OFFSET_NUMBER,
    PR_SET_NO_NEW_PRIVS,
    RETURN,
    SECCOMP_RET_ALLOW,
    SECCOMP_RET_KILL_PROCESS,
    load_filter,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

SECCOMP_RET_ERRNO = 0x00050000
JUMP_IF_GREATER_OR_EQUAL = 0x35  # BPF_JMP|BPF_JGE|BPF_K
JUMP_IF_SET = 0x45  # BPF_JMP|BPF_JSET|BPF_K
OFFSET_FLAGS = 16  # the low half of the first argument in struct seccomp_data, on little-endian machines
CLONE_THREAD = 0x00010000
X32_BIT = 0x40000000  # of the numbers of x86_64's other ABI
MAXIMUM_OUTPUT = 64 << 10
MAXIMUM_DESCRIPTORS = 64
MAXIMUM_PATIENCE = 1.0  # seconds from the end of its output to that of the program
# Of ids that are given to no user and no container (systemd's UIDS-GIDS.md), for what has a secret.
UNUSED_IDS = range(1 << 31, (1 << 32) - 2)

# Machine -> AUDIT_ARCH_*, and the numbers of: socket socketpair connect ptrace bpf perf_event_open add_key
# request_key keyctl userfaultfd unshare setns clone clone3 (fork vfork) kill mount move_mount open_tree
# fsopen, io_uring_setup process_vm_readv process_vm_writev
FORBIDDEN = {
    "x86_64": (
        0xC000003E,
        (41, 53, 42, 101, 321, 298, 248, 249, 250, 323, 272, 308, 56, 435, 57, 58, 62, 165, 429, 428, 430)
        + (425, 310, 311),
    ),
    "aarch64": (
        0xC00000B7,
        (198, 199, 203, 117, 280, 241, 217, 218, 219, 282, 97, 268, 220, 435, 129, 40, 429, 428, 430)
        + (425, 270, 271),
    ),
}
# The numbers of clone and clone3, which both machines have little-endian.
THREADS = {"x86_64": (56, 435), "aarch64": (220, 435)}


class Finished:
    """How a program ended: its exit status (negative for the signal that ended it), and what it printed."""

    __slots__ = ("output", "status", "timed_out")

    def __init__(self, status: int, output: bytes, timed_out: bool) -> None:
        self.status = status
        self.output = output
        self.timed_out = timed_out


def run(
    path: str,
    arguments: "Sequence[str]",
    fds: "Sequence[int]",
    *,
    seconds: float,
    memory: int,
    stdin: "int | None" = None,
    threads: bool = False,
    secret: bool = False,
) -> Finished:
    """Run the program `path` and return how it ended and what it wrote to descriptor 1.

    `fds` (borrowed) become its descriptors 3, 4, and so on, and `stdin` (borrowed) its 0; 2 leads nowhere,
    as 0 does without. It is killed after `seconds`, and once it has written MAXIMUM_OUTPUT bytes; `memory`
    is its address space in bytes. With `threads` it may have some, but no processes. With `secret` it is not
    nobody, but a user whom nobody else is: other processes of nobody could look into it (PTRACE_MODE_READ in
    ptrace(2)). Raises OSError, and NotSupported on a machine whose system call numbers are not known.
    """
    machine = os.uname().machine
    if machine not in FORBIDDEN:
        raise NotSupported(f"a seccomp filter for {machine}")
    limits, (architecture, numbers) = (seconds, memory, secret), FORBIDDEN[machine]
    given = [*fds] if stdin is None else [stdin, *fds]

    def become(writer: int) -> "NoReturn":
        _become(path, [path, *arguments], [writer, *given], stdin is not None, limits, rows)

    rows = filter_of(architecture, numbers, THREADS[machine] if threads else None)
    pid, reader = child.fork(become)
    patience = 0.0
    try:
        with reader:
            output, timed_out = child.read_all(reader.fileno(), MAXIMUM_OUTPUT, seconds)
        patience = 0.0 if timed_out else MAXIMUM_PATIENCE
    finally:
        status = child.end(pid, patience)
    return Finished(status, output, timed_out)


def _become(
    path: str,
    arguments: "list[str]",
    fds: "list[int]",
    reads: bool,
    limits: "tuple[float, int, bool]",
    rows: "list[tuple[int, int, int, int]]",
) -> "NoReturn":
    """Be the child: `fds[0]` becomes its output, the next its input if it `reads`, the others 3 and so on.

    Raises if that fails.
    """
    # Out of the way first, so that no dup2() below closes one that is still needed.
    output, *high = [os.dup(fd) for fd in _above(fds)]
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    source = high.pop(0) if reads else null
    for target, fd in enumerate([source, output, null, *high]):
        os.dup2(fd, target)
    child.close_all_but(set(range(len(high) + 3)))
    os.chdir("/")
    os.umask(0o077)
    for number in range(1, signal.NSIG):
        if signal.getsignal(number) == signal.SIG_IGN and number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _restrict(*limits)
    load_filter(rows)
    os.execve(path, arguments, {})


def _above(fds: "list[int]") -> "list[int]":
    """Fill the numbers below those that are about to be overwritten, so that dup() returns higher ones."""
    while os.dup(fds[0]) < len(fds) + 3:
        pass
    return fds


def _restrict(seconds: float, memory: int, secret: bool) -> None:
    """Set the limits and give up all privileges."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAXIMUM_DESCRIPTORS, MAXIMUM_DESCRIPTORS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.setgroups([])
    id = UNUSED_IDS[int.from_bytes(os.urandom(4), "big") % len(UNUSED_IDS)] if secret else NOBODY
    os.setresgid(id, id, id)
    os.setresuid(id, id, id)  # which drops every capability
    child.end_with_parent()
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def filter_of(
    architecture: int, numbers: "tuple[int, ...]", threads: "tuple[int, int] | None"
) -> "list[tuple[int, int, int, int]]":
    """Return the filter: EPERM for the system calls `numbers`, death for another architecture's.

    `threads` are the numbers of clone and clone3, for a program that may make threads. What clone3 is to
    make lies in memory, where no filter sees it; told that there is no such call, libraries use clone.
    """
    count = len(numbers)
    making: list[tuple[int, int, int, int]] = []
    if threads is not None:
        clone, clone3 = threads
        making = [
            (JUMP_IF_EQUAL, 0, 1, clone3),
            (RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.ENOSYS),
            (JUMP_IF_EQUAL, 0, 4, clone),
            (LOAD, 0, 0, OFFSET_FLAGS),
            (JUMP_IF_SET, 0, 1, CLONE_THREAD),
            (RETURN, 0, 0, SECCOMP_RET_ALLOW),
            (RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM),
        ]
    return [
        (LOAD, 0, 0, OFFSET_ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS),
        (LOAD, 0, 0, OFFSET_NUMBER),
        (JUMP_IF_GREATER_OR_EQUAL, len(making) + count + 1, 0, X32_BIT),
        *making,
        *((JUMP_IF_EQUAL, count - place, 0, number) for place, number in enumerate(numbers)),
        (RETURN, 0, 0, SECCOMP_RET_ALLOW),
        (RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM),
    ]
