"""Making the image of a composefs from its textual description: mkcomposefs(1) of composefs 1.0.8 or later.

    the description --> filter --> mkcomposefs --> a file without a name

The filter is mountd's own and can only read and write (kernel/sandbox.py), mkcomposefs can do nothing but
this (program.py). What comes out is root's: when the program has ended, nobody else has it open. The same
description gives the same image, bit by bit.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage, LimitExceeded, NotSupported
from mountd.fds import OwnedFd
from mountd.kernel import sandbox
from mountd.kernel.child import pipe
from mountd.store import program
from mountd.store.child import Child, Deadline, finish, fork_python

if TYPE_CHECKING:
    from collections.abc import Callable

    # Reads the description by one function and writes it by the other; returns what it came to.
    Filter = Callable[[Callable[[int], bytes], Callable[[bytes], None]], dict[str, object]]

PROGRAM = "mkcomposefs"
COMMAND = (PROGRAM, "--from-file", "-", "-")
HINT = "install the package composefs, 1.0.8 or later"
SECONDS = 60
CPU_SECONDS = 30
FILTER_MEMORY = 512 << 20
MEMORY = 2 << 30
MAXIMUM_IMAGE = 256 << 20
PIECE = 1 << 16
IDENTITY = 16  # digits
LIBRARY = re.compile(rb"libcomposefs\.so[.0-9]*")
MAXIMUM_PROGRAM = 16 << 20
PREFIXES = ("/usr", "/usr/local", "")
MULTIARCH = getattr(sys.implementation, "_multiarch", "")  # of Debian, like x86_64-linux-gnu
DISCARDED = "/dev/null"


@dataclass(frozen=True, slots=True)
class Made:
    """The image, which whoever has this owns, its size in bytes, and what the filter found out."""

    fd: OwnedFd
    size: int
    found: dict[str, object]


def identity() -> str:
    """Return what tells one version of mkcomposefs from another, which may make another image.

    It has no option that says so, and most of it is in a library, which has updates of its own. Where it is
    missing, that is a version as well.
    """
    path = shutil.which(PROGRAM, path=program.ENVIRONMENT["PATH"])
    if path is None:
        return "missing"
    found = [state_of(path)]
    for name in libraries(path, found[0]):
        for directory in library_directories(path):
            with suppress(OSError):
                found.append(state_of(f"{directory}/{name}"))
    return hashlib.sha256(repr(found).encode()).hexdigest()[:IDENTITY]


def state_of(path: str) -> tuple[int, ...]:
    """Return what tells a file, and the state that it is in, from its predecessors. Raises OSError."""
    status = os.stat(path)
    # Not the device, whose number may be another after each boot.
    # The time of the change as well: that of the contents is the same for all where images are reproducible.
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=1)
def libraries(path: str, _state: tuple[int, ...]) -> list[str]:
    """Return the names of libraries that a program in this state asks for, as far as that can be read."""
    try:
        with open(path, "rb") as file:
            return sorted({os.fsdecode(name) for name in LIBRARY.findall(file.read(MAXIMUM_PROGRAM))})
    except OSError:
        return []


def library_directories(path: str) -> list[str]:
    """Return where the libraries of a program are looked for: those of the system, and beside it."""
    beside = os.path.dirname(os.path.dirname(os.path.realpath(path)))
    prefixes = dict.fromkeys((*PREFIXES, beside))
    return [f"{prefix}/{name}" for prefix in prefixes for name in ("lib", "lib64", f"lib/{MULTIARCH}")]


def build(description: int, size: int, filter: Filter, directory: int) -> Made:
    """Make the image of `description`, a file of `size` bytes that nobody can change, borrowed.

    `directory`, borrowed, is what the program sees as /tmp. Raises InvalidImage, LimitExceeded, TimedOut,
    NotSupported where the program is missing, SyscallError and OSError.
    """
    image = OwnedFd(os.memfd_create("composefs", os.MFD_CLOEXEC))
    try:
        reader, writer = pipe()
        with reader, writer:
            limits = program.Limits(CPU_SECONDS, MEMORY, MAXIMUM_IMAGE)
            try:
                child = program.start(
                    COMMAND, limits, directory=directory, stdin=reader.fileno(), stdout=image.fileno()
                )
            except NotSupported as error:
                if PROGRAM not in error.message:
                    raise
                raise NotSupported(f"making a composefs without {PROGRAM}", hint=HINT) from None
            with child as building, _start(description, size, filter, writer.fileno()) as filtering:
                # Open in the children only, so that each notices the end of the other.
                reader.close()
                writer.close()
                finish([filtering, building], Deadline(SECONDS), lambda: None)
                found = _outcome(filtering, building)
        return Made(image, os.fstat(image.fileno()).st_size, found)
    except BaseException:
        image.close()
        raise


def check(description: int, size: int, filter: Filter) -> dict[str, object]:
    """Return what the filter finds out, without making anything. Raises InvalidImage, LimitExceeded."""
    with (
        OwnedFd(os.open(DISCARDED, os.O_WRONLY | os.O_CLOEXEC)) as sink,
        _start(description, size, filter, sink.fileno()) as filtering,
    ):
        finish([filtering], Deadline(SECONDS), lambda: None)
        return _understand(filtering)


def _start(description: int, size: int, filter: Filter, sink: int) -> Child:
    return fork_python(
        "filter",
        lambda answer: _filter(description, size, filter, sink, answer),
        sandbox.MAXIMUM_ANSWER,
    )


def _filter(description: int, size: int, filter: Filter, sink: int, answer: int) -> bool:
    """Be the child: filter, and tell what came of it."""
    pending = bytearray()
    at = 0

    def read(length: int) -> bytes:
        # At a place of its own: the file's belongs to whoever sent it.
        nonlocal at
        piece = os.pread(description, min(length, size - at), at)
        at += len(piece)
        return piece

    def flush() -> None:
        with memoryview(pending) as left:
            done = 0
            while done < len(left):
                done += os.write(sink, left[done:])
        pending.clear()

    def write(data: bytes) -> None:
        pending.extend(data)
        if len(pending) >= PIECE:
            flush()

    def work() -> dict[str, object]:
        try:
            found = filter(read, write)
        except MemoryError:
            raise LimitExceeded("bytes of memory", FILTER_MEMORY) from None
        flush()
        return found

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return sandbox.tell(answer, work, {description, sink}, cpu_seconds=CPU_SECONDS, memory=FILTER_MEMORY)


def _outcome(filtering: Child, building: Child) -> dict[str, object]:
    """Return what the filter found out. Whoever failed first is to blame: the other only noticed."""
    try:
        found = _understand(filtering)
    except BrokenPipeError:
        found = None
    if found is None or building.code:
        said = building.outputs[-1].kept.decode("utf-8", "replace")
        raise InvalidImage(f"no composefs can be made of it: {program.excerpt(said, building.code)}")
    return found


def _understand(filtering: Child) -> dict[str, object]:
    """Return what the filter returned, or raise what it raised; BrokenPipeError if mkcomposefs ended."""
    told = sandbox.understand(filtering.outputs[0].kept)
    if told is None:
        raise InvalidImage("the description could not be read within the limits set for that")
    if "found" in told:
        return dict(told["found"])
    if told.get("kind") == BrokenPipeError.__name__:
        raise BrokenPipeError
    if told.get("error") == LimitExceeded.wire_name:
        raise LimitExceeded(told["limit"], told["maximum"])
    if told.get("error") == InvalidImage.wire_name:
        raise InvalidImage(told["reason"])
    raise InvalidImage(f"the description could not be read: {told.get('failed')}")
