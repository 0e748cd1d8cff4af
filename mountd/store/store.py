"""mountd's own images: content-addressed, root's, and never changed once they are there.

How an image gets in
--------------------
1. Under the lock: the quota is checked, and a file in incoming/ is made that reserves the image's size.
2. Without the lock: the bytes are shared or copied into it, and what is in it is hashed (`transfer`). Then
   it is looked at through a descriptor that cannot write to it, and flushed.
3. Under the lock: it gets its name in images/, and then its record in records/. From then on it counts. If
   another has imported the same bytes meanwhile, the copy is dropped and the record gets one owner more.

An image belongs to everybody who has imported its bytes. Each of them has it on its account with its full
size, since nobody shall learn from its quota what others have; the total counts it once. When one removes
it, the others keep it.

A `Store` holds nothing but the path and the limits: each call opens the directory anew, so that it can be
handed to any process. The methods that read a whole image come twice: as a generator, which yields
`Progress` and returns the result, and as a plain method with a callback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from mountd.errors import InUse, InvalidImage, LimitExceeded, SyscallError
from mountd.store import garbage, quota, room, tags, transfer
from mountd.store.disk import (
    IMAGE_MODE,
    PULLED,
    TAGS,
    State,
    all_records,
    at,
    image_path,
    missing,
    pulled_path,
    tag_path,
)
from mountd.store.layering import key_of
from mountd.store.quota import Limits
from mountd.store.record import (
    MAXIMUM_OWNERS,
    MAXIMUM_SIGNERS,
    ROOT,
    NoRecord,
    Record,
    check_name,
    hex_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from mountd.evidence.model import Provenance, Signer
    from mountd.fds import OwnedFd
    from mountd.source.model import FileSystem
    from mountd.store.garbage import Collected
    from mountd.store.layering import PulledImage
    from mountd.store.record import Owner
    from mountd.store.tags import Tag

    Report = Callable[[int, int], None]

SHORTAGES = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How old the time of the last access may be before it is written anew.
TOUCH_SECONDS = 3600
PAUSE_SECONDS = 0.05  # before a slot is asked for again

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long operation is, in bytes."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Known:
    """What was found out about the stored bytes, before they count."""

    file_system: FileSystem | None = None
    signers: tuple[Signer, ...] = ()


class Store:
    """The store in a state directory. Holds no descriptors."""

    def __init__(self, state_dir: Path, limits: Limits | None = None) -> None:
        """Nothing is touched yet."""
        self._path = state_dir
        self.limits = limits or Limits()

    def part(self, name: str, limits: Limits | None = None) -> Store:
        """Return a store of its own in a directory below this one's; its images are none of this one."""
        return Store(self._path / name, limits)

    def prepare(self) -> None:
        """Make what is missing, and sweep what killed processes have left. Raises SyscallError, NotFound."""
        with self._named("preparing the store"):
            with contextlib.suppress(FileExistsError):
                os.makedirs(self._path, 0o700)
            with State(self._path) as state:
                state.make_directories()
                with state.locked():
                    garbage.sweep(state)

    def adding(
        self,
        source_fd: int,
        size: int,
        owner: Owner,
        *,
        name: str | None = None,
        provenance: Provenance | None = None,
        judge: Callable[[int, str], Known] = lambda fd, digest: Known(),
        within_slot: bool = False,
    ) -> Generator[Progress, None, Record]:
        """Import the `size` bytes of the regular file `source_fd`, borrowed, and return the record.

        The descriptor has passed `source.descriptor.inspect_descriptor`, which `size` is from. `judge` gets
        a descriptor of the stored bytes that cannot write to them, borrowed, and their digest; what it
        raises ends the import. `within_slot` is whether the transfer is part of one that has a slot.

        Raises InvalidImage, InvalidParameter, LimitExceeded, NotFound without a store, and SyscallError.
        Nothing is left then, nor when the generator is closed.
        """
        check_name(name)
        if size < 1:
            raise InvalidImage("it is empty")
        if size > self.limits.image_bytes:
            raise LimitExceeded("bytes in an image of the store", self.limits.image_bytes)
        slot = contextlib.nullcontext() if within_slot else self.slot(owner)
        with self._named("writing to the store"), State(self._path) as state, slot:
            with state.locked():
                garbage.sweep(state, read_records=False)
                quota.check(state, self.limits, size, owner)
                path, fd = state.reserve(size, owner.charged)
            try:
                with fd:
                    digest = yield from progress(transfer.transfer(source_fd, size, fd.fileno()), size)
                    at("flush image")
                    os.fchmod(fd.fileno(), IMAGE_MODE)
                    os.fsync(fd.fileno())
                    with state.open(path) as readable:
                        known = judge(readable.fileno(), digest)
                    record = Record(
                        digest=digest,
                        size=size,
                        owners=(owner,),
                        created=int(time.time()),
                        name=name,
                        file_system=known.file_system,
                        provenance=provenance,
                        signers=known.signers,
                    )
                    with state.locked():
                        return self._publish(state, path, record)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path, dir_fd=state.fileno())

    def add(
        self,
        source_fd: int,
        size: int,
        owner: Owner,
        *,
        name: str | None = None,
        provenance: Provenance | None = None,
        judge: Callable[[int, str], Known] = lambda fd, digest: Known(),
        report: Report | None = None,
    ) -> Record:
        """As `adding`, with a callback for done and total bytes."""
        steps = self.adding(source_fd, size, owner, name=name, provenance=provenance, judge=judge)
        return finish(steps, report)

    def lookup(self, digest: str) -> tuple[OwnedFd, Record]:
        """Return the stored bytes, open for reading and owned by the caller, and their record.

        They are proven to be what mountd wrote by their place and by being root's and 0400; they are not
        hashed again (`verify` does). Raises InvalidParameter, NotFound, InvalidImage, SyscallError.
        """
        hex_of(digest)
        with self._named("reading the store"), State(self._path) as state:
            record = self._record(state, digest)
            fd = state.open_image(record)
            now = time.time()
            status = os.fstat(fd.fileno())
            if now - status.st_atime > TOUCH_SECONDS:
                # Reads of the kernel count for nothing where the file system is mounted noatime.
                with contextlib.suppress(OSError):
                    os.utime(fd.fileno(), ns=(int(now * 1e9), status.st_mtime_ns))
            return fd, record

    def record(self, digest: str) -> Record:
        """Return what is known about an image. Raises InvalidParameter, NotFound, InvalidImage."""
        hex_of(digest)
        with self._named("reading the store"), State(self._path) as state:
            return self._record(state, digest)

    def records(self, after: str | None = None) -> Iterator[Record]:
        """Yield all records in the order of their digests, those past the digest `after`.

        One that cannot be read is left out, and is removed by the next who sweeps. Raises as `record`.
        """
        past = hex_of(after) if after is not None else ""
        with self._named("reading the store"), State(self._path) as state:
            yield from all_records(state, past)

    def remember(self, pulled: PulledImage, tag: str | None = None, resolved: int = 0) -> None:
        """Write down which layers an image has, all of which are there, and where it is from.

        With `tag`, also that this tag led to it at the time `resolved`, in nanoseconds since the epoch;
        unless another pull has written by now what it led to later. Raises LimitExceeded, InvalidImage,
        NotFound, SyscallError; then nothing is written, or the tag is not.
        """
        origin = pulled.provenance
        with self._named("writing to the store"), State(self._path) as state, state.locked():
            self._check_room(state, pulled_path(origin), "pulled images of the store")
            if tag is None:
                state.write_pulled(pulled)
                return
            self._check_room(state, tag_path(origin.repository, tag), "tags of pulled images of the store")
            # In this order, so that no tag ever leads to what is not there yet.
            state.write_pulled(pulled)
            new = tags.Tag(origin.repository, tag, origin.manifest, resolved)
            known = read_tag(state, origin.repository, tag)
            if known is None or not tags.is_outdated(new, known, time.time_ns()):
                state.write_tag(new)

    def _check_room(self, state: State, path: str, what: str) -> None:
        """Raise LimitExceeded if there is no room for one file more of its kind. The lock is held."""
        directory, name = os.path.split(path)
        known = state.names(directory)
        if len(known) >= self.limits.images and name not in known:
            # What leads to nothing any more takes no room from others.
            garbage.sweep_pulled(state)
            if len(state.names(directory)) >= self.limits.images:
                raise LimitExceeded(what, self.limits.images, hint="“mountctl image remove” makes room")

    def tagged(self, repository: str, tag: str) -> str | None:
        """Return the digest of the manifest that a tag led to when it was pulled last, None for no pull.

        Whether that image is still there is not looked at. Raises NotFound, SyscallError.
        """
        with self._named("reading the store"), State(self._path) as state:
            known = read_tag(state, repository, tag)
            return None if known is None else known.manifest

    def tags(self) -> dict[str, list[str]]:
        """Return by which tags images of the store are mounted now: by digest, the names of all.

        A layer has those of all images that it is one of. Raises NotFound, SyscallError.
        """
        found: dict[str, list[str]] = {}
        with self._named("reading the store"), State(self._path) as state:
            for name in state.names(TAGS):
                with contextlib.suppress(NoRecord):
                    tag = state.read_tag(f"{TAGS}/{name}")
                    image = state.read_pulled(f"{PULLED}/{key_of(tag.repository, tag.manifest)}.json")
                    for digest in set(image.stored):
                        found.setdefault(digest, []).append(tag.name)
        return {digest: sorted(names) for digest, names in found.items()}

    def pulled(self, repository: str, manifest: str) -> PulledImage | None:
        """Return which layers an image has, None for one that is not known. Raises NotFound, SyscallError.

        Whether the layers are still there is not looked at.
        """
        with self._named("reading the store"), State(self._path) as state:
            try:
                return state.read_pulled(f"{PULLED}/{key_of(repository, manifest)}.json")
            except NoRecord:
                return None

    def verifying(self, digest: str, owner: Owner) -> Generator[Progress, None, Record]:
        """Hash an image anew and compare. `owner` is who asks. Raises InvalidImage, and as `lookup`."""
        fd, record = self.lookup(digest)
        with fd, self._named("reading the store"):
            if owner.uid != ROOT and not record.belongs_to(owner.uid):
                raise missing(digest)
            with self.slot(owner):
                found = yield from progress(transfer.hashing(fd.fileno(), record.size), record.size)
        if found != digest:
            raise InvalidImage(f"the store is damaged: the bytes of {digest} are those of {found}")
        return record

    def verify(self, digest: str, owner: Owner, report: Report | None = None) -> Record:
        """As `verifying`, with a callback for done and total bytes."""
        return finish(self.verifying(digest, owner), report)

    def rename(self, digest: str, name: str) -> None:
        """Give an image another name. Raises InvalidParameter, NotFound, InvalidImage, SyscallError."""
        check_name(name)
        with self._named("writing to the store"), State(self._path) as state, state.locked():
            record = self._record(state, digest)
            if record.name != name:
                state.write_record(replace(record, name=name))

    def remove(self, digest: str, by_uid: int) -> None:
        """Remove an image for one of its owners; the host's root (ROOT) removes it for all.

        Raises NotFound also for an image of others, InUse for one that is mounted or read just now.
        """
        hex_of(digest)
        with self._named("writing to the store"), State(self._path) as state, state.locked():
            record = self._record(state, digest)
            if by_uid != ROOT and not record.belongs_to(by_uid):
                raise missing(digest)
            others = tuple(each for each in record.owners if each.uid != by_uid)
            if by_uid != ROOT and others:
                # The name was given by the first owner, and goes with that one.
                name = record.name if others[0] == record.owners[0] else None
                state.write_record(replace(record, owners=others, name=name))
            elif not garbage.drop(state, digest):
                raise InUse(
                    f"the stored image {digest} is mounted or being read",
                    hint="unmount it everywhere first, also where a descriptor holds the mount",
                )
            else:
                # Or a tag would lead there again as soon as somebody has pulled it by its digest.
                garbage.sweep_pulled(state)

    def collect_garbage(self, by_uid: int = ROOT, maximum_age: int | None = None) -> Collected:
        """Sweep, and remove images that nobody has used for `maximum_age` seconds, None for no image.

        Only those of `by_uid` alone, for the host's root (ROOT) all. Never what is in use.
        """
        with self._named("writing to the store"), State(self._path) as state, state.locked():
            garbage.sweep(state)
            if maximum_age is None:
                return garbage.collect(state, [])
            before = time.time() - maximum_age
            candidates = [
                record
                for record in all_records(state)
                if (by_uid == ROOT or all(owner.uid == by_uid for owner in record.owners))
                and garbage.last_used(state, record) <= before
            ]
            return garbage.collect(state, candidates)

    def left(self) -> int:
        """Return how many bytes more the store takes now. Raises NotFound, LimitExceeded, SyscallError."""
        with self._named("reading the store"), State(self._path) as state, state.locked():
            return max(self.limits.total_bytes - sum(quota.sizes_of(state)), 0)

    def make_room(self, size: int, owner: Owner, error: LimitExceeded) -> bool:
        """Remove what nobody uses, if an image of `size` bytes has room then; tell whether it has.

        For a store of what can be made again. `error` is what `adding` has raised.
        """
        with self._named("writing to the store"), State(self._path) as state, state.locked():
            return room.make(state, self.limits, size, owner, error.parameters.get("limit"))

    @contextlib.contextmanager
    def slot(self, owner: Owner, *, seconds: float = 0.0, work: str = "") -> Iterator[None]:
        """Be one of the transfers that run at the same time; wait up to `seconds` for that.

        `work` is something that an owner does not do twice at the same time. Raises LimitExceeded,
        SyscallError.
        """
        deadline = time.monotonic() + seconds
        with State(self._path) as state:
            while True:
                try:
                    with self._named("writing to the store"), state.locked():
                        fd = quota.take_slot(state, self.limits, owner, work)
                    break
                except LimitExceeded:
                    if time.monotonic() >= deadline:
                        raise
                time.sleep(PAUSE_SECONDS)
            with fd:
                yield

    @contextlib.contextmanager
    def workspace(self) -> Iterator[int]:
        """Have an empty directory of root's, borrowed, on the store's own file system, and remove it again.

        That of a killed process is swept as everything else. Raises SyscallError, NotFound, LimitExceeded.
        """
        with self._named("writing to the store"), State(self._path) as state:
            with state.locked():
                garbage.sweep(state, read_records=False)
                path, fd = state.make_workspace()
            with fd:
                try:
                    yield fd.fileno()
                finally:
                    state.discard(path)

    def _publish(self, state: State, path: str, record: Record) -> Record:
        """Give an image its name, or its owner to the one that is there. The lock is held."""
        if garbage.is_whole(state, record.digest):
            known = state.read_record(record.digest)
            merged = merge(known, record)
            if merged != known:
                state.write_record(merged)
            return merged
        try:
            state.rename(path, image_path(record.digest))
            state.write_record(record)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(image_path(record.digest), dir_fd=state.fileno())
            raise
        at("done")
        return record

    def _record(self, state: State, digest: str) -> Record:
        try:
            return state.read_record(digest)
        except NoRecord as reason:
            raise InvalidImage(f"the store is damaged: {reason}") from None

    @contextlib.contextmanager
    def _named(self, doing: str) -> Iterator[None]:
        """Give the errors of the disk a name: LimitExceeded for a full one, SyscallError for any other.

        A process or a descriptor that was not to be had is none of them.
        """
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                free = os.statvfs(self._path)
                left = free.f_bavail * free.f_frsize
                hint = "the disk of the store is full: an administrator has to make room"
                raise LimitExceeded(quota.DISK_BYTES, left, hint=hint) from None
            if isinstance(error, SyscallError) or error.errno in SHORTAGES:
                raise
            raise SyscallError(error.errno or 0, doing) from None


def read_tag(state: State, repository: str, tag: str) -> Tag | None:
    """Return what a tag leads to, None for nothing that is known. Raises SyscallError."""
    try:
        return state.read_tag(tag_path(repository, tag))
    except NoRecord:
        return None


def merge(known: Record, new: Record) -> Record:
    """Return the record of an image that is imported once more. Raises LimitExceeded."""
    owner = new.owners[0]
    owners = known.owners if known.belongs_to(owner.uid) else (*known.owners, owner)
    if len(owners) > MAXIMUM_OWNERS:
        raise LimitExceeded(quota.IMAGE_OWNERS, MAXIMUM_OWNERS)
    signers = tuple(dict.fromkeys((*known.signers, *new.signers)))
    if len(signers) > MAXIMUM_SIGNERS:
        raise LimitExceeded("signatures of one stored image", MAXIMUM_SIGNERS)
    return replace(
        known,
        owners=owners,
        signers=signers,
        file_system=known.file_system or new.file_system,
        provenance=later(known.provenance, new.provenance),
    )


def later(known: Provenance | None, new: Provenance | None) -> Provenance | None:
    """Return which of two pulls is to be remembered.

    The later one has the more recent word on where an image is from; but what is a whole image in one
    repository does not become a part of another by being a layer there.
    """
    if new is None or (known is not None and len(known.layers) == 1 and len(new.layers) > 1):
        return known
    return new


def progress(steps: Generator[int, None, T], total: int) -> Generator[Progress, None, T]:
    """Yield what `steps` yields as Progress, and return what it returns."""
    while True:
        try:
            yield Progress(next(steps), total)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def finish(steps: Generator[Progress, None, T], report: Report | None) -> T:
    """Run `steps` to the end, and return what it returns."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if report is not None:
            report(step.done, step.total)
