"""Acting on files as somebody else for a moment, without another process (setfsuid(2)).

The real and effective ids remain ours, so that whoever it is can neither trace this process nor send it a
signal. What comes back afterwards is all that the kernel changes on the way: the capabilities in effect,
whether the process can be dumped, and that it ends with its parent. A process that cannot come back ends.
"""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from mountd.errors import NotSupported, SyscallError
from mountd.kernel import capabilities
from mountd.kernel.capabilities import CAP_SYS_ADMIN, EFFECTIVE, EFFECTIVE_HIGH, OF_FILES, PERMITTED, WRITING
from mountd.kernel.child import PR_SET_PDEATHSIG
from mountd.kernel.libc import call
from mountd.kernel.namespaces import PR_SET_DUMPABLE

LOST = 70  # exit status of a process that cannot come back
PR_GET_PDEATHSIG, PR_GET_DUMPABLE = 2, 3
ASK = -1  # an id that nobody has: the answer is the one that is in force
MAXIMUM_ID = (1 << 31) - 1  # larger ones are negative numbers in the answer


@contextmanager
def acting_as(uid: int, gid: int, *, as_root_of_its_files: bool = False) -> Iterator[None]:
    """Look at files and make them as the host's `uid` and `gid` meanwhile, and by no capability.

    With `as_root_of_its_files`, by those that an overlay shall have for which these are the root's ids, and
    by no others of any kind. Raises SyscallError, and NotSupported for ids that are too large to be checked.
    """
    before = capabilities.read()
    parent, dumpable = os.getppid(), call("prctl", PR_GET_DUMPABLE, 0, 0, 0, 0)
    death = ctypes.c_int()
    call("prctl", PR_GET_PDEATHSIG, ctypes.addressof(death), 0, 0, 0)
    own = call("setfsuid", ASK), call("setfsgid", ASK)
    try:
        become(uid, gid)
        data = capabilities.read()
        data[EFFECTIVE] = before[EFFECTIVE] & ~OF_FILES
        if as_root_of_its_files:
            data[EFFECTIVE] = (WRITING | 1 << CAP_SYS_ADMIN) & data[PERMITTED]
            data[EFFECTIVE_HIGH] = 0
        capabilities.write(data)
        yield
    finally:
        try:
            become(*own)
            # Having been somebody else gives and takes some.
            capabilities.write(before)
            call("prctl", PR_SET_DUMPABLE, int(dumpable == 1), 0, 0, 0)
            call("prctl", PR_SET_PDEATHSIG, death.value, 0, 0, 0)
        except BaseException:  # noqa: BLE001 - it would go on as somebody else
            os._exit(LOST)
        if death.value and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def become(uid: int, gid: int) -> None:
    """Have these ids for files. Raises SyscallError, NotSupported."""
    for name, id in (("setfsgid", gid), ("setfsuid", uid)):
        if id > MAXIMUM_ID:
            raise NotSupported(f"making files as {id}", hint="map ids below 2147483648")
        call(name, id)
        # It does not say whether it has done anything.
        if call(name, ASK) != id:
            raise SyscallError(1, f"{name}({id})")  # EPERM
