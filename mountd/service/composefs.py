"""composefs on the route of a request: metadata that is judged, or made anew, and directories with contents.

An image of metadata is judged as any image is. A description of one is not: mountd makes the image itself,
in a store of its own, so that whoever has written the description has no say in what the kernel parses. It
is made once for the same description, whoever hands that over: who has it knows all that is in the image.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from mountd.errors import (
    BadFileDescriptor,
    InvalidImage,
    LimitExceeded,
    NotFound,
    NotImmutable,
    UnsupportedFileSystem,
)
from mountd.evidence import fs_verity
from mountd.evidence.digest import sha256_of
from mountd.evidence.model import Evidence, Proof
from mountd.evidence.objects import collect_objects
from mountd.evidence.sealed import prove_sealed
from mountd.execute.run import Inputs, run, run_all
from mountd.fds import close_all
from mountd.kernel.compat import mount_id_and_device
from mountd.plan.composefs import plan_composefs, plan_metadata, plan_objects
from mountd.service.images import owner_of, transfer_seconds
from mountd.service.inspection import Inspected, inspect, is_fixed, judged
from mountd.service.phase import Phase
from mountd.service.requests import COMPOSEFS_FIELD, DESCRIPTION_FIELD, OBJECTS_FIELD
from mountd.source import composefs_dump
from mountd.source.composefs_dump import MAXIMUM_DUMP
from mountd.source.confined import recognise_image
from mountd.source.descriptor import inspect_descriptor
from mountd.source.directory import inspect_directory
from mountd.source.model import Composefs, FileSystem, Source, SourceKind
from mountd.store import composefs_build
from mountd.store.quota import IMAGE_OWNERS, Limits
from mountd.store.store import Known, finish
from mountd.trust.contents import VERITY
from mountd.trust.owned import CANNOT_IDMAP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mountd.caller.model import Caller
    from mountd.evidence.model import Objects
    from mountd.fds import OwnedFd
    from mountd.service.context import RequestContext
    from mountd.service.mount import Judged
    from mountd.service.requests import ComposefsRequest, MountRequest
    from mountd.source.model import Directory
    from mountd.store.composefs_build import Made
    from mountd.store.record import Owner, Record
    from mountd.store.store import Store

EROFS = "erofs"
PART = "regenerated"  # the store of images that were made of descriptions
REGENERATED = "regenerated"
SECONDS_TO_WAIT = 20  # for others of the same owner who read descriptions
UNUSED_SECONDS = 30 * 24 * 3600  # after which such an image is removed when another is made
TO_BE_MADE = FileSystem(EROFS, 0, 4096, None, None, needs_recovery=False)
LIMITS = Limits(
    total_bytes=8 << 30,
    owner_bytes=1 << 30,
    image_bytes=composefs_build.MAXIMUM_IMAGE,
    images=512,
    owner_images=128,
)
LIMITS_OF_ROOM = 5  # bytes and images, of an owner and of all, and the disk
NO_STORE = "the journal of mountd says why it has none"


def look_at(
    request: MountRequest,
    composefs: ComposefsRequest,
    caller: Caller,
    fds: list[OwnedFd],
    context: RequestContext,
    *,
    may_change: bool,
) -> Inspected:
    """Look at a composefs. What is opened or made on the way is added to `fds`.

    `may_change` is whether an image may be made of a description. Raises what `inspection.inspect` does, and
    NotImmutable for a description that can still change, NotSupported where mkcomposefs is missing.
    """
    objects = tuple(
        look_at_objects(
            fd, f"{OBJECTS_FIELD}[{at}]", caller, context, inside=composefs.description_fd is None
        )
        for at, fd in enumerate(composefs.objects_fds)
    )
    about = Composefs(tuple(each for each, _ in objects), composefs.verity, composefs.digest)
    speaking = tuple(each for _, each in objects)
    if composefs.description_fd is not None:
        return regenerated(
            request, composefs.description_fd, about, speaking, caller, fds, context, may_change=may_change
        )
    found = inspect(replace(request, composefs=None), caller, fds, context, may_change=may_change)
    source = found.source
    if source.file_system is None or source.file_system.type != EROFS:
        what = "partitions" if source.disk is not None else "encrypted contents"
        what = what if source.file_system is None else source.file_system.type
        raise UnsupportedFileSystem(f"the metadata of a composefs are {EROFS}, and the image has {what}")
    if (
        about.digest is not None
        and found.image_fd is not None
        and source.backing
        and is_fixed(found.evidence)
    ):
        check_digest(about.digest, found.image_fd, source.backing.size, context)
    return replace(
        found,
        source=replace(source, composefs=about),
        evidence=replace(found.evidence, objects=speaking),
    )


def look_at_objects(
    fd: int, field: str, caller: Caller, context: RequestContext, *, inside: bool
) -> tuple[Directory, Objects]:
    """Return what an object directory is, and what speaks for it, also `inside`.

    Raises BadFileDescriptor and others.
    """
    directory = inspect_directory(fd, field)
    if not directory.opened:
        raise BadFileDescriptor(field, "it was opened with O_PATH, which proves no access")
    if directory.file_system in CANNOT_IDMAP and not caller.is_host_root:
        raise UnsupportedFileSystem(
            f"the kernel maps no ids on {directory.file_system}, and objects would be read as root does",
            file_system_type=directory.file_system,
            hint="keep the objects on the file system below",
        )
    return directory, collect_objects(fd, directory, caller, context.walker, inside=inside)


def check_digest(wanted: str, fd: int, size: int, context: RequestContext) -> None:
    """Raise InvalidImage unless the image, which cannot change, has this fs-verity digest."""
    if size > composefs_build.MAXIMUM_IMAGE:
        raise LimitExceeded("bytes in an image of a composefs", composefs_build.MAXIMUM_IMAGE)
    context.enter(Phase.TRANSFER, transfer_seconds(size))
    try:
        found = fs_verity.digest_of(fd, size)
    except (OSError, ValueError):
        raise InvalidImage("the image cannot be read to its end") from None
    context.enter(Phase.VERIFY)
    if found != wanted:
        raise InvalidImage(f"the image has the fs-verity digest {found}, and {wanted} was asked for")


def regenerated(
    request: MountRequest,
    fd: int,
    about: Composefs,
    objects: tuple[Objects, ...],
    caller: Caller,
    fds: list[OwnedFd],
    context: RequestContext,
    *,
    may_change: bool,
) -> Inspected:
    """Have the image made of the description `fd`, borrowed, if the policy allows it to be mounted."""
    context.notes["source"] = "a description of a composefs"
    size = check_description(fd)
    verifiable = all(each.unverifiable is None for each in objects)
    source = Source(SourceKind.COMPOSEFS, None, TO_BE_MADE, None, composefs=about)
    found = Inspected(source, evidence_of(objects, None, verifiable=verifiable))
    if judged(found, request, caller, context) is not None:
        return found
    if not may_change:
        with slot(size, caller, context):
            told = composefs_build.check(fd, size, rewrite)
        context.enter(Phase.VERIFY)
        return replace(
            found, evidence=evidence_of(objects, None, verifiable=verifiable and not unverified(told))
        )
    image, record, without = made(fd, size, caller, context)
    fds.append(image)
    context.notes["digest"] = record.digest
    if about.digest is not None:
        check_digest(about.digest, image.fileno(), record.size, context)
    backing = inspect_descriptor(image.fileno(), COMPOSEFS_FIELD)
    return Inspected(
        replace(source, backing=backing, file_system=record.file_system),
        evidence_of(objects, record.digest, verifiable=verifiable and not without),
        image.fileno(),
    )


def check_description(fd: int) -> int:
    """Return the size of a description that can be read. Raises NotImmutable, LimitExceeded and others."""
    backing = inspect_descriptor(fd, DESCRIPTION_FIELD)
    sealed = prove_sealed(fd)
    if not isinstance(sealed, Proof):
        raise NotImmutable(
            f"the description can still change: {sealed}",
            hint="hand it over as a memfd with all four seals, as mountctl does",
        )
    if backing.size > MAXIMUM_DUMP:
        raise LimitExceeded("bytes of a composefs description", MAXIMUM_DUMP)
    return backing.size


def evidence_of(objects: tuple[Objects, ...], digest: str | None, *, verifiable: bool) -> Evidence:
    """Return what speaks for an image that mountd makes."""
    proofs = (Proof(REGENERATED, digest), *((Proof(VERITY, digest),) if verifiable else ()))
    return Evidence(
        None, "mountd makes it of a description", False, proofs=proofs, digest=digest, objects=objects
    )


def rewrite(read: Callable[[int], bytes], write: Callable[[bytes], None]) -> dict[str, object]:
    """Be the filter of `composefs_build.build`."""
    return asdict(composefs_dump.rewrite(read, write))


def unverified(found: dict[str, object]) -> int:
    """Return how many files have no digest, by what the filter found, which is a child that read a lot."""
    count = found.get("unverified")
    if type(count) is not int or count < 0:
        raise InvalidImage("the description could not be read")
    return count


def made(fd: int, size: int, caller: Caller, context: RequestContext) -> tuple[OwnedFd, Record, int]:
    """Return the image of the description, which the caller of this owns, its record, and `unverified`.

    It is looked for first. Raises what `composefs_build.build` does, NotFound without a store.
    """
    store = store_of(context)
    # By the bytes that it is made of, by what is let through of them, and by what makes it.
    known = f"composefs-dump {composefs_dump.VERSION} {sha256_of(fd, size)} {composefs_build.identity()} "
    found = made_before(known, store)
    if found is not None:
        return found
    with slot(size, caller, context, known):
        # Who has waited for another who made the same has it by now.
        found = made_before(known, store)
        if found is None:
            with store.workspace() as directory:
                image = composefs_build.build(fd, size, rewrite, directory)
            with image.fd:
                without = unverified(image.found)
                digest = kept(image, f"{known}{without}", store, owner_of(caller))
            found = *store.lookup(digest), without
    context.enter(Phase.VERIFY)
    return found


def store_of(context: RequestContext) -> Store:
    """Return the store of images that are made of descriptions. Raises NotFound where there is none."""
    if context.store is None:
        raise NotFound("the store", hint=NO_STORE)
    return context.store.part(PART, LIMITS)


@contextmanager
def slot(size: int, caller: Caller, context: RequestContext, work: str = "") -> Iterator[None]:
    """Be one of those who read a description, of `size` bytes, which takes memory and time; wait for that.

    The phase is that of a transfer then. Raises LimitExceeded, and what `owner_of` and `store_of` do.
    """
    store, owner = store_of(context), owner_of(caller)
    store.prepare()
    context.enter(Phase.TRANSFER, SECONDS_TO_WAIT + composefs_build.SECONDS + transfer_seconds(size))
    with store.slot(owner, seconds=SECONDS_TO_WAIT, work=work):
        yield


def made_before(known: str, store: Store) -> tuple[OwnedFd, Record, int] | None:
    """Return the image whose name begins with `known`, as `made` does; None for none."""
    # The store may not be there yet.
    with suppress(NotFound):
        for record in store.records():
            # Nobody but mountd gives names there.
            if record.name is not None and record.name.startswith(known):
                with suppress(NotFound):
                    return *store.lookup(record.digest), int(record.name.removeprefix(known))
    return None


def kept(image: Made, name: str, store: Store, owner: Owner) -> str:
    """Put an image into the store, which gets rid of old ones, and return its digest."""

    def judge(fd: int, digest: str) -> Known:
        inside = recognise_image(fd, image.size, confined=True)
        if inside.type != EROFS:
            raise InvalidImage(f"what was made of the description is {inside.type}")
        return Known(inside)

    def added() -> str:
        steps = store.adding(image.fd.fileno(), image.size, owner, name=name, judge=judge, within_slot=True)
        record = finish(steps, None)
        # The same image may have been made before of other lines, or by another mkcomposefs.
        store.rename(record.digest, name)
        return record.digest

    store.collect_garbage(maximum_age=UNUSED_SECONDS)
    # What nobody uses just now is made again when somebody needs it. One limit may hide another.
    for _ in range(LIMITS_OF_ROOM):
        try:
            return added()
        except LimitExceeded as error:
            if error.parameters["limit"] == IMAGE_OWNERS:
                # It is there, and on the accounts of enough.
                digest = sha256_of(image.fd.fileno(), image.size)
                store.rename(digest, name)
                return digest
            if not store.make_room(image.size, owner, error):
                raise
    return added()


def make(judged: Judged, context: RequestContext, note: Callable[[OwnedFd], None] | None) -> OwnedFd:
    """Carry out what was decided about a composefs and return the detached mount.

    Raises what `execute.run` does, and BadFileDescriptor for an object directory that is not any more what
    was judged. Nothing is left then.
    """
    source, request = judged.inspected.source, judged.request
    if source.composefs is None or request.composefs is None:
        raise ValueError("there is no composefs to be mounted")
    mounts: list[OwnedFd] = []
    try:
        mounts += metadata(judged, context)
        context.layers += [mount_id_and_device(mount.fileno())[1] for mount in mounts]
        for at, fd in enumerate(request.composefs.objects_fds):
            mounts.append(objects(judged, at, fd, context))
        inputs = Inputs(
            image_fd=None,
            userns_fd=None,
            seal=context.seal,
            naming=context.naming,
            note=note,
            layers=[mount.fileno() for mount in mounts],
        )
        # As of any other image. One that was made of a description lies where nobody else looks.
        name = judged.inspected.evidence.root_owned_path if judged.caller.on_host else None
        return run(
            plan_composefs(judged.decision, judged.caller, len(source.composefs.objects), name), inputs
        )
    finally:
        # The overlay has clones of them.
        close_all(mounts)


def metadata(judged: Judged, context: RequestContext) -> list[OwnedFd]:
    """Return the mount of the metadata."""
    inspected, request = judged.inspected, judged.request
    plans = plan_metadata(
        inspected.source, judged.decision, judged.caller, request.idmap.kind, judged.uids, judged.gids
    )
    inputs = Inputs(image_fd=inspected.image_fd, userns_fd=request.userns_fd, seal=context.seal)
    return run_all(plans, inputs)


def objects(judged: Judged, at: int, fd: int, context: RequestContext) -> OwnedFd:
    """Return the mount of the object directory `fd`, borrowed. Raises BadFileDescriptor."""
    source, caller = judged.inspected.source, judged.caller
    if source.composefs is None:
        raise ValueError("there is no composefs to be mounted")
    directory, speaking = source.composefs.objects[at], judged.inspected.evidence.objects[at]
    with context.peer.mount_namespace() as namespace:
        inputs = Inputs(
            image_fd=fd, userns_fd=None, seal=context.seal, mount_namespace_fd=namespace.fileno()
        )
        made = run(plan_objects(directory, speaking.ownership, caller), inputs)
    try:
        field = f"{OBJECTS_FIELD}[{at}]"
        # What is in it was root's alone, or did not count: that has not changed by itself.
        again, who = look_at_objects(fd, field, caller, context, inside=False)
        if (again, who.ownership, who.unverifiable) != (
            directory,
            speaking.ownership,
            speaking.unverifiable,
        ):
            raise BadFileDescriptor(field, "it was moved or changed hands while it was judged")
    except BaseException:
        made.close()
        raise
    return made


def facts(judged: Judged) -> dict[str, object]:
    """Return what was found out about a composefs, as text for people."""
    found: dict[str, object] = {}
    if judged.inspected.source.composefs is None:
        return found
    for at, each in enumerate(judged.inspected.evidence.objects):
        found[f"objects {at}"] = f"{each.ownership}-owned" + (f"; {each.problem}" if each.problem else "")
        found[f"objects {at}: fs-verity"] = each.unverifiable or "can check it"
    if judged.decision.error is None:
        found["contents"] = "checked by fs-verity" if judged.decision.verify else "not checked"
    return found
