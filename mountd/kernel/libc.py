"""The one place where Python leaves for the kernel through ctypes.

`call()` makes every system call that the standard library has no function for. A failure becomes a
`SyscallError` whose text is the call with its arguments; a call that the kernel does not know becomes
`NotSupported`, so that no caller ever compares kernel versions.
"""

import ctypes
import errno
from enum import IntEnum, IntFlag

from mountd.errors import NotSupported, SyscallError
from mountd.kernel.abi import AT_FDCWD, NUMBERS

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

# Calls that are as old as glibc itself and have another number on each architecture.
_FUNCTIONS = {
    "getsockopt": (
        _libc.getsockopt,
        (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
    ),
    "ioctl": (_libc.ioctl, (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)),
    "mount": (
        _libc.mount,
        (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p),
    ),
    "pivot_root": (_libc.pivot_root, (ctypes.c_char_p, ctypes.c_char_p)),
    "prctl": (_libc.prctl, (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)),
    "setns": (_libc.setns, (ctypes.c_int, ctypes.c_int)),
    "statx": (_libc.statx, (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)),
    "umount2": (_libc.umount2, (ctypes.c_char_p, ctypes.c_int)),
    "unshare": (_libc.unshare, (ctypes.c_int,)),
}
for _function, _argtypes in _FUNCTIONS.values():
    _function.restype = ctypes.c_int
    _function.argtypes = _argtypes

# Name of a call (for an ioctl "ioctl REQUEST") -> errno that it fails with. Filled by tests only.
inject: dict[str, int] = {}


def call(name: str, *args: object) -> int:
    """Make the system call `name` and return its result, which is not negative.

    Arguments are int (flags as their IntFlag, so that errors name them), bytes without NUL inside, None for
    a null pointer, or a ctypes object, which is passed by reference. Raises SyscallError, NotSupported where
    the kernel lacks the call, and ValueError for text with a NUL.
    """
    for argument in args:
        if isinstance(argument, bytes) and b"\0" in argument:
            raise ValueError(f"{name}: text with a NUL: {argument!r}")
    number = inject.get(name, 0) if name != "ioctl" else inject.get(f"ioctl {show(args[1])}", 0)
    while not number:
        result = _enter(name, args)
        if result >= 0:
            return result
        number = ctypes.get_errno()
        if number == errno.EINTR:
            number = 0  # none of these calls has done anything when a signal interrupts it
    if number == errno.ENOSYS:
        raise NotSupported(f"the system call {name}")
    raise SyscallError(number, f"{name}({', '.join(map(show, args))})")


def _enter(name: str, args: tuple[object, ...]) -> int:
    """Make the call through its own function or through syscall(2)."""
    prepared = [
        ctypes.byref(a) if isinstance(a, ctypes.Structure | ctypes.Array | ctypes._SimpleCData) else a
        for a in args
    ]
    if name in _FUNCTIONS:
        return int(_FUNCTIONS[name][0](*prepared))
    # A plain int would be passed as a C int, whose upper half is undefined in a variadic call.
    longs = [ctypes.c_long(a) if isinstance(a, int) else a for a in prepared]
    return int(_syscall(ctypes.c_long(NUMBERS[name]), *longs))


def show(argument: object) -> str:
    """Return an argument of a call as strace(1) would print it."""
    if argument is None:
        return "NULL"
    if isinstance(argument, bytes):
        return '"' + argument.decode("utf-8", "backslashreplace").replace('"', '\\"') + '"'
    if isinstance(argument, IntEnum):
        return argument.name
    if isinstance(argument, IntFlag):
        return "|".join(member.name or "?" for member in type(argument) if member in argument) or "0"
    if argument == AT_FDCWD and not isinstance(argument, ctypes._SimpleCData):
        return "AT_FDCWD"
    if isinstance(argument, ctypes.Array):
        return f"[{len(argument)} items]"
    if isinstance(argument, ctypes._SimpleCData):
        return "&" + str(argument.value)
    return repr(argument)
