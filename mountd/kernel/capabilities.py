"""A capability that this process has, and uses for one thing only (capabilities(7)).

An overlay reads its layers with the rights of whoever made it, after it has judged whoever reads it. So it
takes CAP_DAC_READ_SEARCH to make one; for everything else, mountd is better off without: modes hold for it,
too. It is permitted, and in effect for no longer than it takes to make an overlay.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from mountd.kernel.libc import call

VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
CAP_DAC_READ_SEARCH = 2
BIT = 1 << CAP_DAC_READ_SEARCH
EFFECTIVE, PERMITTED = 0, 1  # where they are, of capabilities below 32


def put_aside() -> None:
    """Have the capability no longer in effect. Raises SyscallError."""
    data = _read()
    if data[EFFECTIVE] & BIT:
        data[EFFECTIVE] &= ~BIT
        _write(data)


@contextmanager
def reading_everything() -> Iterator[None]:
    """Have the capability in effect meanwhile, if it is permitted. Raises SyscallError."""
    data = _read()
    if data[EFFECTIVE] & BIT or not data[PERMITTED] & BIT:
        yield
        return
    data[EFFECTIVE] |= BIT
    _write(data)
    try:
        yield
    finally:
        data[EFFECTIVE] &= ~BIT
        _write(data)


def _read() -> "ctypes.Array[ctypes.c_uint32]":
    data = (ctypes.c_uint32 * 6)()
    call("capget", (ctypes.c_uint32 * 2)(VERSION, 0), data)
    return data


def _write(data: "ctypes.Array[ctypes.c_uint32]") -> None:
    call("capset", (ctypes.c_uint32 * 2)(VERSION, 0), data)
