"""Capabilities that this process has, and uses for one thing only (capabilities(7)).

An overlay works on what it is made of with the rights of whoever made it, after it has judged whoever asks
it. So it takes CAP_DAC_READ_SEARCH to make one that reads layers, and a few more to make one that is written
to. For everything else, mountd is better off without: modes hold for it, too. They are permitted, and in
effect for no longer than it takes to make an overlay, or a user namespace that maps root.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from mountd.kernel.libc import call

VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
CAP_DAC_READ_SEARCH = 2
BIT = 1 << CAP_DAC_READ_SEARCH
# What the root of a container has over its files: CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID and
# CAP_SETFCAP. Not CAP_MKNOD: a device node of a layer must not come to lie where its nodev does not hold.
SETFCAP = 1 << 31
WRITING = BIT | 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | SETFCAP
OF_FILES = WRITING | 1 << 9 | 1 << 27  # all that are about files: CAP_LINUX_IMMUTABLE and CAP_MKNOD, too
CAP_SYS_ADMIN = 21
EFFECTIVE, PERMITTED = 0, 1  # where they are, of capabilities below 32
EFFECTIVE_HIGH = 3  # of those from 32 on


def put_aside() -> None:
    """Have these capabilities no longer in effect. Raises SyscallError."""
    data = read()
    if data[EFFECTIVE] & WRITING:
        data[EFFECTIVE] &= ~WRITING
        write(data)


@contextmanager
def reading_everything() -> Iterator[None]:
    """Have CAP_DAC_READ_SEARCH in effect meanwhile, if it is permitted. Raises SyscallError."""
    with in_effect(BIT):
        yield


@contextmanager
def mapping_root() -> Iterator[None]:
    """Have CAP_SETFCAP in effect meanwhile, if it is permitted. Raises SyscallError.

    Whoever opens the map of a user namespace needs it to map the host's root there (user_namespaces(7)).
    """
    with in_effect(SETFCAP):
        yield


@contextmanager
def in_effect(bit: int) -> Iterator[None]:
    """Have a capability in effect meanwhile, if it is permitted. Raises SyscallError."""
    data = read()
    if data[EFFECTIVE] & bit or not data[PERMITTED] & bit:
        yield
        return
    data[EFFECTIVE] |= bit
    write(data)
    try:
        yield
    finally:
        data[EFFECTIVE] &= ~bit
        write(data)


def read() -> "ctypes.Array[ctypes.c_uint32]":
    """Return the capabilities of this process. Raises SyscallError."""
    data = (ctypes.c_uint32 * 6)()
    call("capget", (ctypes.c_uint32 * 2)(VERSION, 0), data)
    return data


def write(data: "ctypes.Array[ctypes.c_uint32]") -> None:
    """Have these capabilities. Raises SyscallError."""
    call("capset", (ctypes.c_uint32 * 2)(VERSION, 0), data)
