"""Recognising a file system in an image that nothing vouches for yet, in a process that can do no harm.

The parser is the same (`superblock.recognise`); it runs in a throw-away child that has given up everything
but reading the image, and that tells what it found as JSON.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from mountd.errors import InvalidImage, MountdError, UnsupportedFileSystem
from mountd.kernel import sandbox
from mountd.kernel.namespaces import close_all_but
from mountd.source import verity_superblock
from mountd.source.model import FileSystem, VeritySuperblock
from mountd.source.superblock import recognise

if TYPE_CHECKING:
    from collections.abc import Callable

    Parse = Callable[[Callable[[int, int], bytes]], dict[str, object]]

MAXIMUM_ANSWER = 16384
CPU_SECONDS = 2
MEMORY = 64 << 20


def recognise_image(fd: int, size: int, *, confined: bool) -> FileSystem:
    """Return the file system of the image `fd` (borrowed) of `size` bytes.

    Raises InvalidImage and UnsupportedFileSystem as `recognise` does.
    """
    if not confined:
        return recognise(_reader(fd), size)
    return FileSystem(**_in_child(fd, lambda read: asdict(recognise(read, size)), "its superblock"))


def read_verity_superblock(hash_fd: int, hash_size: int, data_size: int) -> VeritySuperblock:
    """Return what the hash data `hash_fd` (borrowed) of dm-verity says about itself, read in a child.

    Raises InvalidImage as `verity_superblock.read` does.
    """

    def parse(read: Callable[[int, int], bytes]) -> dict[str, object]:
        found = verity_superblock.read(read, hash_size, data_size)
        return {**asdict(found), "salt": found.salt.hex()}

    told = _in_child(hash_fd, parse, "the superblock of the hash data")
    return VeritySuperblock(**{**told, "salt": bytes.fromhex(told["salt"])})


def _reader(fd: int) -> Callable[[int, int], bytes]:
    """Return a way to read the image, which raises InvalidImage where that is not possible."""

    def read(offset: int, length: int) -> bytes:
        try:
            return os.pread(fd, length, offset)
        except OSError as error:
            raise InvalidImage(f"it cannot be read ({error.strerror})", offset=offset) from None

    return read


def _in_child(fd: int, parse: Parse, what: str) -> dict[str, Any]:
    """Return what `parse` makes of the file in a confined child; `what` is what it reads, for messages."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except BaseException:
        os.close(reader)
        os.close(writer)
        raise
    if pid == 0:
        _be_the_child(fd, parse, writer)
    os.close(writer)
    answer = b""
    try:
        while len(answer) < MAXIMUM_ANSWER and (chunk := os.read(reader, MAXIMUM_ANSWER)):
            answer += chunk
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return _understand(answer, what)


def _be_the_child(fd: int, parse: Parse, writer: int) -> NoReturn:
    """Parse and tell; whatever goes wrong is told as an answer that is not one."""
    answer: dict[str, object] = {}
    try:
        close_all_but({fd, writer})
        # What is used for the first time after the filter is there must not need an import.
        json.dumps(answer)
        sandbox.confine(CPU_SECONDS, MEMORY)
        answer = {"found": parse(_reader(fd))}
    except MountdError as error:
        answer = {"error": error.wire_name, **error.parameters}
    except BaseException as error:  # noqa: BLE001 - a child of a fork has nobody to raise to
        answer = {"failed": f"{type(error).__name__}: {error}"}
    finally:
        try:
            os.write(writer, json.dumps(answer).encode())
        finally:
            os._exit(0)  # whatever happens: what called has to go on in one process only


def _understand(answer: bytes, what: str) -> dict[str, Any]:
    """Turn the child's answer into what the parser returned or raised."""
    try:
        told = json.loads(answer)
    except ValueError:
        raise InvalidImage(f"{what} could not be read within the limits set for that") from None
    if "found" in told:
        return dict(told["found"])
    if told.get("error") == UnsupportedFileSystem.wire_name:
        raise UnsupportedFileSystem(told["reason"], file_system_type=told.get("fileSystemType"))
    if told.get("error") == InvalidImage.wire_name:
        raise InvalidImage(told["reason"], offset=told.get("offset"))
    raise InvalidImage(f"{what} could not be read: {told.get('failed')}")
