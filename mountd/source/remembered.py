"""What was recognised in images that only root can change: they are read once, not for each mount.

The kernel says when a file changed (st_ctime in inode(7)), as exactly as its clock ticks; so what has
changed just now is not remembered, as it may change once more within the same tick.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mountd.source.confined import recognise_source

if TYPE_CHECKING:
    from mountd.source.model import BackingFile, Disk, FileSystem, Luks

    Version = tuple[int, int, int, int]

SETTLED = 2_000_000_000  # nanoseconds; file systems count in seconds at the worst, the kernel in hundredths
MAXIMUM_REMEMBERED = 64

_recognised: dict[Version, FileSystem | Disk | Luks] = {}


def recognise_trusted(fd: int, backing: BackingFile) -> FileSystem | Disk | Luks:
    """Return what is in the image `fd` (borrowed), which `backing` describes and root vouches for.

    Raises InvalidImage and UnsupportedFileSystem as `recognise_source` does.
    """
    version = (backing.dev, backing.ino, backing.size, backing.changed)
    found = _recognised.get(version)
    if found is None:
        found = recognise_source(fd, backing.size, confined=False)
        if 0 < backing.changed < time.time_ns() - SETTLED:
            if len(_recognised) >= MAXIMUM_REMEMBERED:
                _recognised.clear()
            _recognised[version] = found
    return found
