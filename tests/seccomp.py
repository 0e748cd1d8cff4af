"""A kernel that lacks a system call, for a process and all that it starts (seccomp(2))."""

from __future__ import annotations

import ctypes
import errno
import os

from mountd.kernel import sandbox
from mountd.kernel.libc import call

SECCOMP_RET_ERRNO = 0x00050000
OFFSET_ARGUMENTS = 16  # struct seccomp_data, on machines that have the low half first


def lose(number: int, error: int = errno.ENOSYS, argument: tuple[int, int] | None = None) -> None:
    """Have the system call `number` fail from now on.

    With `argument`, only where the one with this index is that, which is below 2³².
    """
    index, value = argument or (0, 0)
    about = (
        (sandbox.LOAD, 0, 0, OFFSET_ARGUMENTS + 8 * index),
        (sandbox.JUMP_IF_EQUAL, 0, 1, value),
    )
    condition = about if argument else ()
    architecture, _ = sandbox.ALLOWED[os.uname().machine]
    rows = [
        (sandbox.LOAD, 0, 0, sandbox.OFFSET_ARCHITECTURE),
        (sandbox.JUMP_IF_EQUAL, 1, 0, architecture),
        (sandbox.RETURN, 0, 0, sandbox.SECCOMP_RET_ALLOW),
        (sandbox.LOAD, 0, 0, sandbox.OFFSET_NUMBER),
        (sandbox.JUMP_IF_EQUAL, 0, len(condition) + 1, number),
        *condition,
        (sandbox.RETURN, 0, 0, SECCOMP_RET_ERRNO | error),
        (sandbox.RETURN, 0, 0, sandbox.SECCOMP_RET_ALLOW),
    ]
    filters = (sandbox.sock_filter * len(rows))(*(sandbox.sock_filter(*row) for row in rows))
    program = sandbox.sock_fprog(len(rows), filters)
    call("prctl", sandbox.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", sandbox.PR_SET_SECCOMP, sandbox.SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0)
