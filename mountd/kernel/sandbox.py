"""Giving up everything but reading what is already open: for code that parses what nobody vouches for.

`ask` has something done by a throw-away child that has done so, and returns what that tells, as JSON; `tell`
is the child's side of it, for who has to do something else while it works.

A process that has called `confine()` can read, write, close, get memory and random bytes, and nothing else:
another system call ends it (seccomp(2)). The filter goes by number, as libraries that know names do not know
all numbers.
"""

import ctypes
import json
import os
import resource

from mountd.errors import MountdError, NotSupported
from mountd.kernel import child
from mountd.kernel.libc import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

NOBODY = 65534
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_KILL_PROCESS = 0x80000000
# struct bpf_insn codes: BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
OFFSET_NUMBER, OFFSET_ARCHITECTURE = 0, 4  # struct seccomp_data
MAXIMUM_ANSWER = 16384  # bytes
MAXIMUM_FAILURE = 500  # characters

# Machine -> AUDIT_ARCH_*, and the numbers of: read write close mmap mprotect munmap brk rt_sigaction
# rt_sigprocmask rt_sigreturn pread64 mremap madvise exit futex exit_group getpid getrandom (libcrypto blinds
# what it computes with some curves, and asks for both after a fork).
ALLOWED = {
    "x86_64": (0xC000003E, (0, 1, 3, 9, 10, 11, 12, 13, 14, 15, 17, 25, 28, 60, 202, 231, 39, 318)),
    "aarch64": (
        0xC00000B7,
        (63, 64, 57, 222, 226, 215, 214, 134, 135, 139, 67, 216, 233, 93, 98, 94, 172, 278),
    ),
}


class sock_filter(ctypes.Structure):  # noqa: N801 - the kernel's name
    """struct sock_filter."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class sock_fprog(ctypes.Structure):  # noqa: N801
    """struct sock_fprog."""

    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.POINTER(sock_filter)))


def ask(
    work: "Callable[[], dict[str, Any]]",
    keep: set[int],
    *,
    cpu_seconds: int,
    memory: int,
    seconds: "float | None" = None,
) -> "dict[str, Any] | None":
    """Have `work` done in a child that is confined, and return what the child tells (see `tell`).

    The child has the descriptors `keep` (borrowed) and no other, and the limits of `confine`; `seconds` is
    how long it may take by the clock. None is what there is from one that came to no answer within its
    limits. Raises OSError where no child can be made.
    """
    pid, reader = child.fork(
        lambda writer: 0 if tell(writer, work, keep, cpu_seconds=cpu_seconds, memory=memory) else 1
    )
    try:
        with reader:
            answer, timed_out = child.read_all(reader.fileno(), MAXIMUM_ANSWER, seconds)
    finally:
        child.end(pid)
    return None if timed_out else understand(answer)


def tell(
    writer: int, work: "Callable[[], dict[str, Any]]", keep: set[int], *, cpu_seconds: int, memory: int
) -> bool:
    """Be the child: do `work` confined, write to `writer` what came of it, and return whether that is good.

    What is written is {"found": what it returned}; {"error": the name of the MountdError it raised, "kind":
    that of its class, and its parameters}; or {"failed": text, "kind": the name of whatever else it raised}.
    Nothing is written where
    the process is ended for what it does.
    """
    answer: dict[str, object]
    try:
        child.close_all_but({writer, *keep})
        # What is used for the first time after the filter is there must not need an import.
        json.dumps({})
        confine(cpu_seconds, memory)
        answer = {"found": work()}
    except MountdError as error:
        answer = {"error": error.wire_name, "kind": type(error).__name__, **error.parameters}
    except BaseException as error:  # noqa: BLE001 - a child of a fork has nobody to raise to
        kind = type(error).__name__
        answer = {"failed": f"{kind}: {error}"[:MAXIMUM_FAILURE], "kind": kind}
    os.write(writer, json.dumps(answer).encode())
    return "found" in answer


def understand(answer: bytes) -> "dict[str, Any] | None":
    """Return what a child wrote that has called `tell`; None if that is no answer.

    Nothing else about it is certain: it may be from somebody who has taken the child over.
    """
    try:
        told = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None


def confine(cpu_seconds: int, extra_memory: int) -> None:
    """Become nobody, without capabilities, under limits and a seccomp filter; there is no way back.

    `extra_memory` is what may be used in bytes beyond what is mapped now. Raises OSError, SyscallError, and
    NotSupported on a machine whose numbers are not known.
    """
    machine = os.uname().machine
    if machine not in ALLOWED:
        raise NotSupported(f"a seccomp filter for {machine}")
    with open("/proc/self/statm", encoding="utf-8") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + extra_memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)  # which drops every capability
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    install_filter(*ALLOWED[machine])


def install_filter(architecture: int, numbers: tuple[int, ...]) -> None:
    """Allow the system calls `numbers` and end the process at any other."""
    count = len(numbers)
    rows = [
        (LOAD, 0, 0, OFFSET_ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS),
        (LOAD, 0, 0, OFFSET_NUMBER),
        *((JUMP_IF_EQUAL, count - place, 0, number) for place, number in enumerate(numbers)),
        (RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS),
        (RETURN, 0, 0, SECCOMP_RET_ALLOW),
    ]
    load_filter(rows)


def load_filter(rows: "list[tuple[int, int, int, int]]") -> None:
    """Install a filter of instructions: code, jump if true, jump if false, operand. Raises SyscallError."""
    program = sock_fprog(len(rows), (sock_filter * len(rows))(*(sock_filter(*row) for row in rows)))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0)
