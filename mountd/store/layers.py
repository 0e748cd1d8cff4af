"""From the layer of an image to an erofs file: uncompress, filter, build, each where it can do no harm.

    the layer's bytes --(zstd)--> filter --tar--> mkfs.erofs --> a file

Neither zstd nor mkfs.erofs can do anything but that (program.py), and the filter in the middle, which is
mountd's own, can only read and write (kernel/sandbox.py). The bytes are in root's hands and have the layer's
digest when they get here; what comes out is taken only if the uncompressed bytes had the digest that the
image's configuration names, and it is copied into root's hands as well.
"""

from __future__ import annotations

import fcntl
import os
import signal
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage, LimitExceeded
from mountd.kernel import sandbox
from mountd.kernel.child import pipe
from mountd.store import below, erofs_build, program, tar_filter
from mountd.store.child import Child, Deadline, finish, fork_python
from mountd.store.decompress import Gunzip, Measured
from mountd.store.tar_filter import Filter, Summary

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mountd.fds import OwnedFd
    from mountd.store.below import Access

ZSTD = "zstd"
# The window that its format has everybody able to read is 8 MiB; no layer needs more than this.
ZSTD_COMMAND = (ZSTD, "-d", "-c", "-q", "--single-thread", "--memory=64MB", "-")
ZSTD_MEMORY = 1 << 30
CPU_SECONDS = 1800
FILTER_MEMORY = 512 << 20
BROKEN_PIPE = "Broken pipe"
PIPE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LayerLimits:
    """What one layer may become: `uncompressed` bytes of archive, `image` bytes of file system."""

    uncompressed: int = 64 << 30
    image: int = 64 << 30
    seconds: int = 1800
    tar: tar_filter.Limits = tar_filter.Limits()


@dataclass(frozen=True, slots=True)
class Work:
    """One layer to be made: its bytes `fd` (borrowed, at its start), how they are compressed, how many.

    `diff_id` is the digest of the uncompressed archive. `lowest` is whether no layer is below, `devices`
    whether device nodes are kept. `below` are the directories of those below (Summary.directories).
    """

    fd: int
    compression: str
    size: int
    diff_id: str
    lowest: bool
    devices: bool
    below: Mapping[bytes, Access] | None = field(default_factory=dict)


def build(
    work: Work,
    directory: int,
    limits: LayerLimits,
    version: tuple[int, int],
    tick: Callable[[], None],
) -> Summary:
    """Make a layer into the file erofs_build.NAME of `directory`, which belongs to the programs' user.

    What is there afterwards is not root's yet: see quarantine.take. Raises InvalidImage, LimitExceeded,
    NotSupported, StorageFull, TimedOut, and what `tick` raises.
    """
    os.lseek(work.fd, 0, os.SEEK_SET)
    with ExitStack() as stack:
        uncompressing = _start_zstd(stack, work.fd, directory) if work.compression == ZSTD else None
        reader, writer = pipe()
        # What is between the children is open in them only, so that each notices the end of the others.
        with reader, writer:
            fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            if uncompressing is None:
                filtering = stack.enter_context(_start_filter(work, work.fd, writer.fileno(), limits))
            else:
                with uncompressing[1] as source:
                    filtering = stack.enter_context(
                        _start_filter(work, source.fileno(), writer.fileno(), limits)
                    )
            building = stack.enter_context(
                erofs_build.start(
                    version,
                    work.diff_id,
                    stdin=reader.fileno(),
                    directory=directory,
                    maximum=limits.image,
                    lowest=work.lowest,
                )
            )
        first = [] if uncompressing is None else [uncompressing[0]]
        finish([*first, filtering, building], Deadline(limits.seconds), tick)
        return _outcome(first, filtering, building, work.diff_id, limits.image)


def _start_zstd(stack: ExitStack, fd: int, directory: int) -> tuple[Child, OwnedFd]:
    """Start the zstd program; return it and the end of the pipe that it writes to, both in the stack."""
    reader, writer = pipe()
    stack.enter_context(reader)
    with writer:
        limits = program.Limits(CPU_SECONDS, ZSTD_MEMORY, 0)
        child = program.start(ZSTD_COMMAND, limits, directory=directory, stdin=fd, stdout=writer.fileno())
    return stack.enter_context(child), reader


def _outcome(first: list[Child], filtering: Child, building: Child, diff_id: str, maximum: int) -> Summary:
    """Return what came of it all. Whoever failed first is to blame: the others only noticed."""
    try:
        summary = _understand(filtering.outputs[0].kept, diff_id)
    except LimitExceeded:
        raise
    except InvalidImage:
        for child in first:
            said = child.outputs[-1].kept.decode("utf-8", "replace")
            if child.poll() and child.code and BROKEN_PIPE not in said:
                shown = program.excerpt(said, child.code)
                raise InvalidImage(f"a layer cannot be uncompressed: {shown}") from None
        raise
    except BrokenPipeError:
        erofs_build.check(building, maximum)
        raise InvalidImage("a layer cannot be made into a file system") from None
    erofs_build.check(building, maximum)
    return summary


def _start_filter(work: Work, source: int, sink: int, limits: LayerLimits) -> Child:
    return fork_python(
        "filter",
        lambda answer: _filter(work, source, sink, answer, limits),
        sandbox.MAXIMUM_ANSWER + below.MAXIMUM_BYTES,
    )


def _filter(work: Work, source: int, sink: int, answer_fd: int, limits: LayerLimits) -> bool:
    """Be the child: filter and tell; whatever goes wrong is told as an answer that is not one."""

    def filtered() -> dict[str, object]:
        try:
            return serialise(_pass_through(work, source, sink, limits))
        except MemoryError:
            raise LimitExceeded("bytes of memory", FILTER_MEMORY) from None

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    warm_up()
    return sandbox.tell(answer_fd, filtered, {source, sink}, cpu_seconds=CPU_SECONDS, memory=FILTER_MEMORY)


def warm_up() -> None:
    """Use once what is used later, when nothing can be loaded any more."""
    Measured(lambda _: b"", 0, 0).read(1)


def _pass_through(work: Work, source: int, sink: int, limits: LayerLimits) -> Summary:
    """Filter the whole layer from `source` to `sink`. Raises InvalidImage and LimitExceeded."""

    def read(length: int) -> bytes:
        return os.read(source, length)

    def flush() -> None:
        with memoryview(pending) as left:
            done = 0
            while done < len(left):
                done += os.write(sink, left[done:])
        pending.clear()

    def write(data: bytes) -> None:
        pending.extend(data)
        if len(pending) >= PIPE_BYTES:
            flush()

    pending = bytearray()

    uncompressed = Gunzip(read).read if work.compression == "gzip" else read
    measured = Measured(uncompressed, limits.uncompressed, work.size)
    filter = Filter(
        measured.read,
        write,
        limits=limits.tar,
        lowest=work.lowest,
        devices=work.devices,
        below=work.below,
    )
    summary = filter.run()
    flush()
    if measured.digest != work.diff_id:
        raise InvalidImage(
            f"an uncompressed layer has the digest {measured.digest}, not {work.diff_id} as configured"
        )
    return summary


def serialise(summary: Summary) -> dict[str, object]:
    """Return a summary for JSON."""
    found = summary.directories
    told = asdict(replace(summary, directories=None))
    return {**told, "directories": None if found is None else below.serialise(found)}


def _understand(answer: bytes, diff_id: str) -> Summary:
    """Turn the child's answer into what the filter returned or raised; BrokenPipeError if mkfs ended."""
    told = sandbox.understand(answer)
    if told is None:
        raise InvalidImage(f"the layer {diff_id} could not be read within the limits set for that")
    if "found" in told:
        try:
            return Summary(**{**told["found"], "directories": below.parse(told["found"]["directories"])})
        except (KeyError, TypeError, ValueError):
            raise InvalidImage(f"the layer {diff_id} could not be read") from None
    if told.get("kind") == BrokenPipeError.__name__:
        raise BrokenPipeError
    if told.get("error") == LimitExceeded.wire_name:
        raise LimitExceeded(told["limit"], told["maximum"])
    if told.get("error") == InvalidImage.wire_name:
        raise InvalidImage(told["reason"], offset=told.get("offset"))
    raise InvalidImage(f"the layer {diff_id} could not be read: {told.get('failed')}")
