"""Recognising a file system in an image that nothing vouches for yet, in a process that can do no harm.

The parser is the same (`superblock.recognise`); it runs in a throw-away child that has given up everything
but reading the image, and that tells what it found as JSON.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from typing import TYPE_CHECKING, NoReturn

from mountd.errors import InvalidImage, MountdError, UnsupportedFileSystem
from mountd.kernel import sandbox
from mountd.kernel.namespaces import close_all_but
from mountd.source.model import FileSystem
from mountd.source.superblock import recognise

if TYPE_CHECKING:
    from collections.abc import Callable

MAXIMUM_ANSWER = 16384
CPU_SECONDS = 2
MEMORY = 64 << 20


def recognise_image(fd: int, size: int, *, confined: bool) -> FileSystem:
    """Return the file system of the image `fd` (borrowed) of `size` bytes.

    Raises InvalidImage and UnsupportedFileSystem as `recognise` does.
    """
    return _in_child(fd, size) if confined else recognise(_reader(fd), size)


def _reader(fd: int) -> Callable[[int, int], bytes]:
    """Return a way to read the image, which raises InvalidImage where that is not possible."""

    def read(offset: int, length: int) -> bytes:
        try:
            return os.pread(fd, length, offset)
        except OSError as error:
            raise InvalidImage(f"it cannot be read ({error.strerror})", offset=offset) from None

    return read


def _in_child(fd: int, size: int) -> FileSystem:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except BaseException:
        os.close(reader)
        os.close(writer)
        raise
    if pid == 0:
        _be_the_child(fd, size, writer)
    os.close(writer)
    answer = b""
    try:
        while len(answer) < MAXIMUM_ANSWER and (chunk := os.read(reader, MAXIMUM_ANSWER)):
            answer += chunk
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return _understand(answer)


def _be_the_child(fd: int, size: int, writer: int) -> NoReturn:
    """Parse and tell; whatever goes wrong is told as an answer that is not one."""
    answer: dict[str, object] = {}
    try:
        close_all_but({fd, writer})
        # What is used for the first time after the filter is there must not need an import.
        json.dumps(answer)
        sandbox.confine(CPU_SECONDS, MEMORY)
        answer = {"found": asdict(recognise(_reader(fd), size))}
    except MountdError as error:
        answer = {"error": error.wire_name, **error.parameters}
    except BaseException as error:  # noqa: BLE001 - a child of a fork has nobody to raise to
        answer = {"failed": f"{type(error).__name__}: {error}"}
    finally:
        try:
            os.write(writer, json.dumps(answer).encode())
        finally:
            os._exit(0)  # whatever happens: what called has to go on in one process only


def _understand(answer: bytes) -> FileSystem:
    """Turn the child's answer into what `recognise` returns or raises."""
    try:
        told = json.loads(answer)
    except ValueError:
        raise InvalidImage("its superblock could not be read within the limits set for that") from None
    if "found" in told:
        return FileSystem(**told["found"])
    if told.get("error") == UnsupportedFileSystem.wire_name:
        raise UnsupportedFileSystem(told["reason"], file_system_type=told.get("fileSystemType"))
    if told.get("error") == InvalidImage.wire_name:
        raise InvalidImage(told["reason"], offset=told.get("offset"))
    raise InvalidImage(f"its superblock could not be read: {told.get('failed')}")
