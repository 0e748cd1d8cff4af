"""The one place where Python leaves for the kernel through ctypes.

`call()` makes every system call that the standard library has no function for. A failure becomes a
`SyscallError` whose text is the call with its arguments; a call that the kernel does not know becomes
`NotSupported`, so that no caller ever compares kernel versions.
"""

import ctypes
import errno
import sys

from mountd.errors import NotSupported, SyscallError
from mountd.kernel.numbers import AT_FDCWD, NUMBERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)

# The arguments of each call: n a number, q one of 64 bits everywhere, s a string, p a pointer to something.
_KINDS = {"n": ctypes.c_long, "q": ctypes.c_uint64, "s": ctypes.c_char_p, "p": ctypes.c_void_p}
_SYSCALLS = {
    "fsconfig": "nnspn",
    "fsmount": "nnn",
    "fsopen": "sn",
    "fspick": "nsn",
    "listmount": "ppnn",
    "mount_setattr": "nsnpn",
    "move_mount": "nsnsn",
    "open_tree": "nsn",
    "open_tree_attr": "nsnpn",
    "openat2": "nspn",
    "pidfd_open": "nn",
    "statmount": "ppnn",
}
# Calls that are as old as glibc itself and have another number on each architecture.
_FUNCTIONS = {
    "capget": "pp",
    "capset": "pp",
    "fanotify_init": "nn",
    "fanotify_mark": "nnqns",
    "fstatfs": "np",
    "getsockopt": "nnnpp",
    "inotify_add_watch": "nsn",
    "inotify_init1": "n",
    "ioctl": "nnp",
    "mount": "sssns",
    "pivot_root": "ss",
    "prctl": "nnnnn",
    "renameat2": "nsnsn",
    "setfsgid": "n",
    "setfsuid": "n",
    "setns": "nn",
    "statx": "nsnnp",
    "umount2": "sn",
    "unshare": "n",
}


def _prepare(name: str) -> "Callable[..., int]":
    """Return the function object of one call, its conversions fixed once and for all."""
    kinds = _SYSCALLS.get(name)
    if kinds is not None:
        types = [ctypes.c_long, *(_KINDS[kind] for kind in kinds)]
        return ctypes.CFUNCTYPE(ctypes.c_long, *types, use_errno=True)(("syscall", _libc))
    types = [_KINDS[kind] for kind in _FUNCTIONS[name]]
    return ctypes.CFUNCTYPE(ctypes.c_int, *types, use_errno=True)((name, _libc))


def prepare_all() -> None:
    """Make the function objects of all calls: for a process whose children are to find them ready.

    Others make each when it is called first; a program that makes one call has no use for the rest.
    """
    for name in (*_SYSCALLS, *_FUNCTIONS):
        if name not in _calls:
            _calls[name] = _prepare(name)


_calls: "dict[str, Callable[..., int]]" = {}
# Which arguments are strings, which must not have a NUL inside.
_TEXTS = {
    name: tuple(index for index, kind in enumerate(kinds) if kind == "s")
    for name, kinds in (_SYSCALLS | _FUNCTIONS).items()
}

# Name of a call (for an ioctl "ioctl REQUEST") -> errno that it fails with. Filled by tests only.
inject: dict[str, int] = {}


def call(name: str, *args: object) -> int:
    """Make the system call `name` and return its result, which is not negative.

    Arguments are int (flags as their IntFlag, so that errors name them), bytes without NUL inside, None for
    a null pointer, a ctypes array, or `ctypes.byref()` of a ctypes object. Raises SyscallError, NotSupported
    where the kernel lacks the call, and ValueError for text with a NUL.
    """
    for index in _TEXTS[name]:
        text = args[index]
        if text is not None and b"\0" in text:  # type: ignore[operator]  # bytes, as the table says
            raise ValueError(f"{name}: text with a NUL: {text!r}")
    number = _injected(name, args) if inject else 0
    function = _calls.get(name)
    if function is None:
        function = _calls[name] = _prepare(name)
    numbered = (NUMBERS[name], *args) if name in NUMBERS else args
    while not number:
        result = function(*numbered)
        if result >= 0:
            return result
        number = ctypes.get_errno()
        if number == errno.EINTR:
            number = 0  # none of these calls has done anything when a signal interrupts it
    if number == errno.ENOSYS:
        raise NotSupported(f"the system call {name}")
    raise SyscallError(number, f"{name}({', '.join(map(show, args))})")


def _injected(name: str, args: tuple[object, ...]) -> int:
    """Return the errno that a test wants this call to fail with, 0 for none."""
    return inject.get(f"ioctl {show(args[1])}" if name == "ioctl" else name, 0)


def show(argument: object) -> str:
    """Return an argument of a call as strace(1) would print it."""
    if argument is None:
        return "NULL"
    if isinstance(argument, bytes):
        return '"' + argument.decode("utf-8", "backslashreplace").replace('"', '\\"') + '"'
    # Whoever has not loaded that module has no flags of it, and does not wait for it.
    enum = sys.modules.get("enum")
    if enum is not None and isinstance(argument, enum.IntEnum):
        return str(argument.name)
    if enum is not None and isinstance(argument, enum.IntFlag):
        return "|".join(member.name or "?" for member in type(argument) if member in argument) or "0"
    if isinstance(argument, int):
        return "AT_FDCWD" if argument == AT_FDCWD else str(argument)
    if isinstance(argument, ctypes.Array):
        return f"[{len(argument)} items]"
    # What byref() returns keeps what it points to.
    target = getattr(argument, "_obj", argument)
    return f"&{target.value}" if isinstance(target, ctypes._SimpleCData) else repr(target)
