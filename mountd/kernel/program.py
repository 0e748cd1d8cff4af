"""Running a program of the system that reads what comes from an enemy: as nobody, and with a deadline.

The program has no capabilities and cannot get any (PR_SET_NO_NEW_PRIVS), an empty environment, no
descriptors but those that it is given, little memory and time, and a seccomp(2) filter that says EPERM to
what leads anywhere else: sockets, other processes, namespaces, mounts, keyrings, io_uring. That filter lists
what is forbidden, as which calls a program of the system makes differs between versions of it.
"""

import errno
import os
import resource
import select
import signal
import time

from mountd.errors import NotSupported
from mountd.kernel.libc import call
from mountd.kernel.namespaces import close_all_but
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

PR_SET_PDEATHSIG = 1
SECCOMP_RET_ERRNO = 0x00050000
JUMP_IF_GREATER_OR_EQUAL = 0x35  # BPF_JMP|BPF_JGE|BPF_K
X32_BIT = 0x40000000  # of the numbers of x86_64's other ABI
MAXIMUM_OUTPUT = 64 << 10
MAXIMUM_DESCRIPTORS = 64
MAXIMUM_PATIENCE = 1.0  # seconds from the end of its output to that of the program
EXIT_NOT_RUN = 127

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


class Finished:
    """How a program ended: its exit status (negative for the signal that ended it), and what it printed."""

    __slots__ = ("output", "status", "timed_out")

    def __init__(self, status: int, output: bytes, timed_out: bool) -> None:
        self.status = status
        self.output = output
        self.timed_out = timed_out


def run(
    path: str, arguments: "Sequence[str]", fds: "Sequence[int]", *, seconds: float, memory: int
) -> Finished:
    """Run the program `path` and return how it ended and what it wrote to descriptor 1.

    `fds` (borrowed) become its descriptors 3, 4, and so on; 0 and 2 lead nowhere. It is killed after
    `seconds`, and once it has written MAXIMUM_OUTPUT bytes; `memory` is its address space in bytes. Raises
    OSError, and NotSupported on a machine whose system call numbers are not known.
    """
    machine = os.uname().machine
    if machine not in FORBIDDEN:
        raise NotSupported(f"a seccomp filter for {machine}")
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except BaseException:
        os.close(reader)
        os.close(writer)
        raise
    if pid == 0:
        _become(path, [path, *arguments], [writer, *fds], (seconds, memory), FORBIDDEN[machine])
    os.close(writer)
    patience = 0.0
    output, timed_out = b"", True
    try:
        output, timed_out = _read_all(reader, time.monotonic() + seconds)
        patience = 0.0 if timed_out else MAXIMUM_PATIENCE
    finally:
        os.close(reader)
        status = _end(pid, patience)
    return Finished(status, output, timed_out)


def _read_all(reader: int, deadline: float) -> tuple[bytes, bool]:
    """Read to the end, and return what was read and whether the deadline passed before."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    output = b""
    while len(output) < MAXIMUM_OUTPUT:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return output, True
        chunk = os.read(reader, MAXIMUM_OUTPUT)
        if not chunk:
            return output, False
        output += chunk
    return output, False


def _end(pid: int, patience: float) -> int:
    """Give the process a moment to end by itself after its output, then kill it; return its status."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _become(
    path: str,
    arguments: "list[str]",
    fds: "list[int]",
    limits: "tuple[float, int]",
    forbidden: "tuple[int, tuple[int, ...]]",
) -> "NoReturn":
    """Be the child: `fds[0]` becomes its output, the others 3 and so on. There is no return."""
    try:
        # Out of the way first, so that no dup2() below closes one that is still needed.
        high = [os.dup(fd) for fd in _above(fds)]
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for target, fd in enumerate([null, high[0], null, *high[1:]]):
            os.dup2(fd, target)
        close_all_but(set(range(len(high) + 2)))
        os.chdir("/")
        os.umask(0o077)
        for number in range(1, signal.NSIG):
            if signal.getsignal(number) == signal.SIG_IGN and number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _restrict(*limits)
        _forbid(*forbidden)
        os.execve(path, arguments, {})
    except BaseException:  # noqa: BLE001 - a child of a fork has nobody to raise to
        os._exit(EXIT_NOT_RUN)
    finally:
        os._exit(EXIT_NOT_RUN)


def _above(fds: "list[int]") -> "list[int]":
    """Fill the numbers below those that are about to be overwritten, so that dup() returns higher ones."""
    while os.dup(fds[0]) < len(fds) + 3:
        pass
    return fds


def _restrict(seconds: float, memory: int) -> None:
    """Set the limits and give up all privileges."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAXIMUM_DESCRIPTORS, MAXIMUM_DESCRIPTORS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)  # which drops every capability
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _forbid(architecture: int, numbers: "tuple[int, ...]") -> None:
    """Install the filter: EPERM for the system calls `numbers`, death for another architecture's."""
    count = len(numbers)
    load_filter(
        [
            (LOAD, 0, 0, OFFSET_ARCHITECTURE),
            (JUMP_IF_EQUAL, 1, 0, architecture),
            (RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS),
            (LOAD, 0, 0, OFFSET_NUMBER),
            (JUMP_IF_GREATER_OR_EQUAL, count + 1, 0, X32_BIT),
            *((JUMP_IF_EQUAL, count - place, 0, number) for place, number in enumerate(numbers)),
            (RETURN, 0, 0, SECCOMP_RET_ALLOW),
            (RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM),
        ]
    )
