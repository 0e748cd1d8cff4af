"""A sealed memfd: memory that nobody can change any more (memfd_create(2), F_ADD_SEALS in fcntl(2)).

All four seals have to be there. F_SEAL_WRITE cannot be set while somebody has the memory mapped for writing,
and from then on nobody can; F_SEAL_FUTURE_WRITE leaves those mappings that exist, so that it does not count.
F_SEAL_SHRINK and F_SEAL_GROW keep the size, and F_SEAL_SEAL says that this is all.
"""

from __future__ import annotations

import errno
import fcntl

from mountd.evidence.model import Proof

KIND = "sealed"
SEALS = {
    fcntl.F_SEAL_SEAL: "F_SEAL_SEAL",
    fcntl.F_SEAL_SHRINK: "F_SEAL_SHRINK",
    fcntl.F_SEAL_GROW: "F_SEAL_GROW",
    fcntl.F_SEAL_WRITE: "F_SEAL_WRITE",
}


def prove_sealed(fd: int) -> Proof | str:
    """Return the proof that the file `fd` (borrowed) is a fully sealed memfd, or why it is not.

    Raises nothing for a file of whatever kind; OSError for a number that is no descriptor.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        # EBADF also is what a descriptor says that was opened with O_PATH.
        if error.errno == errno.EBADF and not _is_open(fd):
            raise
        return "it is not a memfd"
    missing = [name for seal, name in SEALS.items() if not seals & seal]
    if missing:
        return f"it lacks {', '.join(missing)}"
    return Proof(KIND)


def _is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True
