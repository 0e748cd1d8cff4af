"""Building an erofs image from a tar archive: mkfs.erofs(1) of erofs-utils, from 1.7 on.

The same archive gives the same image, bit by bit: the UUID comes from the layer's digest, the times from the
archive.
"""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING
from uuid import UUID

from mountd.errors import InvalidImage, LimitExceeded, NotSupported, StorageFull
from mountd.store import program
from mountd.store.child import Deadline, finish

if TYPE_CHECKING:
    from mountd.store.child import Child

PROGRAM = "mkfs.erofs"
OLDEST, WITH_BUILD_TIME = (1, 7), (1, 8)
VERSION = re.compile(rb"([0-9]{1,4})\.([0-9]{1,4})")
NAME = "layer.erofs"
HINT = "install erofs-utils 1.7 or later, which can build from a tar archive"
SECONDS, VERSION_SECONDS = 1800, 10
MEMORY = 4 << 30
MAXIMUM_VERSION = 4096
FULL, TOO_LARGE = "No space left on device", "File too large"
LIMIT = "bytes in the file system of a layer"


def version(directory: int) -> tuple[int, int]:
    """Return the version of mkfs.erofs. Raises NotSupported if it is missing or too old to build from tar.

    `directory` is what the program may write to, borrowed; it does not.
    """
    limits = program.Limits(VERSION_SECONDS, MEMORY, 0)
    try:
        running = program.start([PROGRAM, "-V"], limits, directory=directory, maximum_output=MAXIMUM_VERSION)
    except NotSupported:
        raise NotSupported(f"building erofs images without {PROGRAM}", hint=HINT) from None
    with running as child:
        finish([child], Deadline(VERSION_SECONDS), lambda: None)
        # Older versions say it on stderr.
        match = VERSION.search(b" ".join(output.kept for output in child.outputs))
    if match is None:
        raise NotSupported(f"building erofs images with a {PROGRAM} of unknown version", hint=HINT)
    found = int(match[1]), int(match[2])
    if found < OLDEST:
        raise NotSupported(f"building from a layer with {PROGRAM} {found[0]}.{found[1]}", hint=HINT)
    return found


def command(found: tuple[int, int], diff_id: str, *, lowest: bool) -> list[str]:
    """Return the command that builds NAME in its directory from the archive on stdin.

    `found` is the version of mkfs.erofs. Whiteouts become overlayfs's, but for the lowest layer, in which
    there are none.
    """
    # Version 8 of RFC 9562 is for numbers that are made in a way of one's own.
    raw = bytearray.fromhex(diff_id.removeprefix("sha256:")[:32])
    raw[6], raw[8] = raw[6] & 0x0F | 0x80, raw[8] & 0x3F | 0x80
    options = ["--quiet", "--tar=f", "-T0", f"-U{UUID(bytes=bytes(raw))}"]
    if found >= WITH_BUILD_TIME:
        # Before, there is no way to have the files' own times and the same image each time.
        options.append("--mkfs-time")
    if not lowest:
        options.append("--aufs")
    return [PROGRAM, *options, f"{program.HOME}/{NAME}"]


def start(
    found: tuple[int, int], diff_id: str, *, stdin: int, directory: int, maximum: int, lowest: bool
) -> Child:
    """Start building NAME in `directory`, of at most `maximum` bytes. Descriptors are borrowed."""
    limits = program.Limits(SECONDS, MEMORY, maximum)
    return program.start(
        command(found, diff_id, lowest=lowest),
        limits,
        directory=directory,
        stdin=stdin,
        maximum_output=program.MAXIMUM_MESSAGES,
    )


def check(child: Child, maximum: int) -> None:
    """Raise an error unless the build, of at most `maximum` bytes, has ended well.

    InvalidImage, StorageFull or LimitExceeded.
    """
    if child.code == 0:
        return
    said = b"\n".join(output.kept for output in child.outputs).decode("utf-8", "replace")
    if child.code == -signal.SIGXFSZ or TOO_LARGE in said:
        raise LimitExceeded(LIMIT, maximum)
    if FULL in said:
        raise StorageFull("the file system image of a layer", hint="free space for mountd's images")
    raise InvalidImage(f"a layer cannot be made into a file system: {program.excerpt(said, child.code)}")
