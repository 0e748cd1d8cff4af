"""The methods of io.mountd.Images: mountd's store, for those who have images in it.

Who asks is found out as for a mount. An image belongs to the host's uid that has imported it; the host's
root may see and remove all. A uid 0 that is not that root (`Caller.is_host_root`), as in a container that
was left without the capability or whose namespace maps the host's root, is nobody here.
"""

from __future__ import annotations

import json
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from mountd.caller.model import OVERFLOW_ID
from mountd.errors import (
    DeniedByPolicy,
    InvalidParameter,
    NotFound,
    TimedOut,
    UnsupportedFileSystem,
    UserNamespaceNotPermitted,
)
from mountd.service import signatures
from mountd.service.descriptors import Descriptors
from mountd.service.phase import Phase
from mountd.service.requests import read_signature
from mountd.source.confined import recognise_image
from mountd.source.descriptor import inspect_descriptor
from mountd.store.record import ROOT, Owner, Record
from mountd.store.store import Known
from mountd.trust.options import shown
from mountd.trust.policy import Verdict
from mountd.trust.storing import storing

if TYPE_CHECKING:
    from collections.abc import Generator

    from mountd.caller.model import Caller
    from mountd.evidence.model import Signer
    from mountd.fds import OwnedFd
    from mountd.service.context import PolicyInForce, RequestContext
    from mountd.store.store import Progress, Store
    from mountd.wire.dispatch import Handler, Reply, Stream

IMAGE_FIELD = "imageFileDescriptor"
# A transfer may take this long, all in all: what a slow disk needs, and no more than an hour.
TRANSFER_SECONDS = 30
TRANSFER_BYTES_PER_SECOND = 20 << 20
MAXIMUM_TRANSFER_SECONDS = 3600
PROGRESS_INTERVAL = 0.1  # seconds between two replies with progress
PAGE = 256 << 10  # bytes of JSON in one reply of List
MAXIMUM_SHOWN = 1024  # characters of a path in the journal


def import_image(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Stream:
    """io.mountd.Images.Import: put an image into the store."""
    context.enter(Phase.VERIFY)
    table = Descriptors(fds)
    image_fd = table.take(parameters[IMAGE_FIELD], IMAGE_FIELD)
    table.check_all_named()
    signature = read_signature(parameters.get("signature"), "signature")
    caller, owner, store = admit(context)
    asks = check_may_import(caller, context.policy)
    backing = inspect_descriptor(image_fd, IMAGE_FIELD)
    context.notes["source"] = shown(backing.path_hint or "an image without a path", MAXIMUM_SHOWN)

    def judge(fd: int, digest: str) -> Known:
        signers: tuple[Signer, ...] = ()
        if signature is not None:
            signers = (signatures.verify(signature, [("image", digest)], context.policy.policy),)
        if asks:
            context.notes["digest"] = digest
            ask_for_import(
                digest, signers, caller, context, interactive=parameters.get("interactive") is True
            )
            # The rest takes as long as it would have without a question.
            context.enter(Phase.TRANSFER, transfer_seconds(backing.size))
        try:
            # Nobody vouches for it.
            return Known(recognise_image(fd, backing.size, confined=True), signers)
        except UnsupportedFileSystem:
            return Known(None, signers)

    steps = store.adding(image_fd, backing.size, owner, name=parameters.get("name"), judge=judge)
    record = yield from transferred(steps, backing.size, context)
    context.notes["digest"] = record.digest
    return {"image": image_reply(record, owner)}, []


def ask_for_import(
    digest: str, signers: tuple[Signer, ...], caller: Caller, context: RequestContext, *, interactive: bool
) -> None:
    """Ask whether a copy that is written, and no image of the store yet, may be. Raises as `ask` does."""
    from mountd.service import consent

    signer = signers[0].subject if signers else None
    about = consent.described(context.notes.get("source"), digest, signer, None)
    consent.ask(consent.IMPORT, about, caller, context, interactive=interactive, importing=True)


def check_may_import(caller: Caller, policy: PolicyInForce) -> bool:
    """Return whether somebody has to be asked first, as no rule lets the caller store without.

    Raises DeniedByPolicy for who may put nothing into the store: root may, and whom a rule lets.
    """
    if caller.is_host_root:
        return False
    if policy.refusal is not None:
        raise policy.refusal
    verdict = storing(policy.policy, caller, namespace_given=False)
    if verdict is Verdict.DENY:
        raise DeniedByPolicy(
            "no rule lets this caller have stored images",
            hint="an administrator can import it, or add a rule with require.integrity = [“stored”]",
        )
    return verdict is Verdict.ASK


def list_images(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """io.mountd.Images.List: return what of the caller's images fits into one reply."""
    owner, store = begin(fds, context)
    images: list[dict[str, object]] = []
    tags: dict[str, list[str]] | None = None
    length = 0
    for record in store.records(parameters.get("after")):
        if not may_see(owner, record):
            continue
        if tags is None:
            tags = tags_for(owner, store)
        image = image_reply(record, owner, tags)
        length += len(json.dumps(image))
        if images and length > PAGE:
            return {"images": images, "next": images[-1]["digest"]}, []
        images.append(image)
    return {"images": images}, []


def inspect_image(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """io.mountd.Images.Inspect: return one image of the caller's."""
    owner, store = begin(fds, context)
    record = store.record(parameters["digest"])
    check_seen(owner, record)
    return {"image": image_reply(record, owner, tags_for(owner, store))}, []


def verify_image(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Stream:
    """io.mountd.Images.Verify: read an image anew and compare its digest."""
    owner, store = begin(fds, context)
    record = store.record(parameters["digest"])
    check_seen(owner, record)
    context.notes["digest"] = record.digest
    steps = store.verifying(record.digest, owner)
    record = yield from transferred(steps, record.size, context)
    return {"image": image_reply(record, owner)}, []


def remove_image(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """io.mountd.Images.Remove: remove an image for the caller, or for all if that is root."""
    owner, store = begin(fds, context)
    store.remove(parameters["digest"], owner.uid)
    context.notes["digest"] = parameters["digest"]
    return {}, []


def collect_garbage(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """io.mountd.Images.CollectGarbage: remove what nobody has used for long."""
    owner, store = begin(fds, context)
    age = parameters.get("maximumAge")
    if age is not None and age < 0:
        raise InvalidParameter("maximumAge", "it cannot be negative")
    collected = store.collect_garbage(owner.uid, age)
    reply: dict[str, object] = {
        "removed": list(collected.removed),
        "freed": collected.freed,
        "inUse": list(collected.in_use),
    }
    return reply, []


def begin(fds: list[OwnedFd], context: RequestContext) -> tuple[Owner, Store]:
    """Find out who asks, for a method that takes no descriptors."""
    context.enter(Phase.VERIFY)
    Descriptors(fds).check_all_named()
    _, owner, store = admit(context)
    return owner, store


def admit(context: RequestContext) -> tuple[Caller, Owner, Store]:
    """Return who calls, as whom the store knows it, and the store.

    Raises NotFound where there is none, PeerGone, UserNamespaceNotPermitted, NotSupported, SyscallError.
    """
    caller = context.caller()
    owner = owner_of(caller)
    if context.store is None:
        raise NotFound("the store", hint="the journal of mountd says why it has none")
    return caller, owner, context.store


def owner_of(caller: Caller) -> Owner:
    """Return as whom the store knows a caller. Raises UserNamespaceNotPermitted, DeniedByPolicy."""
    if caller.uid == ROOT and not caller.is_host_root:
        raise DeniedByPolicy(
            "root without CAP_SYS_ADMIN on the host has nothing in the store",
            hint="call as an ordinary user, or as the host's root",
        )
    if caller.uid == OVERFLOW_ID and not caller.on_host:
        raise UserNamespaceNotPermitted(
            "nothing in the store can belong to the caller's uid",
            hint="call as a user that the user namespace maps to an id of its own",
        )
    return Owner(caller.uid, caller.owner_uid)


def may_see(owner: Owner, record: Record) -> bool:
    """Tell whether an image is one of the caller's."""
    return owner.uid == ROOT or record.belongs_to(owner.uid)


def check_seen(owner: Owner, record: Record) -> None:
    """Raise NotFound for an image that is not one of the caller's, as for one that is not there."""
    if not may_see(owner, record):
        raise not_found(record.digest)


def not_found(digest: str) -> NotFound:
    """Return the error for an image that is not there for the caller."""
    return NotFound(f"the stored image {digest}", hint="“mountctl image list” shows those of yours")


def transfer_seconds(size: int) -> int:
    """Return how long reading `size` bytes may take."""
    return min(MAXIMUM_TRANSFER_SECONDS, TRANSFER_SECONDS + size // TRANSFER_BYTES_PER_SECOND)


def transferred(
    steps: Generator[Progress, None, Record], size: int, context: RequestContext
) -> Generator[dict[str, object], None, Record]:
    """Run `steps` within the time that `size` bytes may take, yield progress now and then.

    Raises TimedOut, and what `steps` raises.
    """
    seconds = transfer_seconds(size)
    context.enter(Phase.TRANSFER, seconds)
    end, next_reply = time.monotonic() + seconds, 0.0
    with closing(steps):
        while True:
            try:
                step = next(steps)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            now = time.monotonic()
            if now >= end + context.asked_for:
                raise TimedOut(seconds)
            # What comes after the last step may be a question, and the wait for its answer.
            if now >= next_reply or step.done >= step.total:
                next_reply = now + PROGRESS_INTERVAL
                yield {"progress": {"done": step.done, "total": step.total}}


def tags_for(owner: Owner, store: Store) -> dict[str, list[str]]:
    """Return the tags that `owner` may be told of, by digest. Raises NotFound, SyscallError.

    What was pulled is root's: who has the bytes of a layer does not learn of which images it is one.
    """
    return store.tags() if owner.uid == ROOT else {}


def image_reply(record: Record, owner: Owner, tags: dict[str, list[str]] | None = None) -> dict[str, object]:
    """Return a record as the wire has it, for `owner`, who does not learn who else has the image.

    `tags` are by which names images are mounted, by their digests.
    """
    # What was pulled for somebody is root's.
    owners = [each.uid for each in record.owners if owner.uid in (ROOT, each.uid)]
    # What another has called it is that one's own affair.
    name = record.name if owner.uid in (ROOT, record.owner_uid) else None
    file_system, provenance = record.file_system, record.provenance
    return given(
        digest=record.digest,
        size=record.size,
        ownerUids=owners,
        created=record.created,
        name=name,
        fileSystem=None
        if file_system is None
        else given(
            type=file_system.type,
            size=file_system.size,
            blockSize=file_system.block_size,
            uuid=file_system.uuid,
            label=file_system.label,
            needsRecovery=file_system.needs_recovery,
        ),
        provenance=None
        if provenance is None
        else given(
            repository=provenance.repository,
            manifest=provenance.manifest,
            layers=list(provenance.layers),
            requirement=provenance.requirement,
            signer=provenance.signer,
            time=provenance.time,
        ),
        signers=[
            given(key=each.key, subject=each.subject, covers=each.covers, digest=each.digest)
            for each in record.signers
        ],
        tags=(tags or {}).get(record.digest),
    )


def given(**fields: object) -> dict[str, object]:
    """Return the fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


METHODS: dict[str, Handler] = {
    "io.mountd.Images.Import": import_image,
    "io.mountd.Images.List": list_images,
    "io.mountd.Images.Inspect": inspect_image,
    "io.mountd.Images.Verify": verify_image,
    "io.mountd.Images.Remove": remove_image,
    "io.mountd.Images.CollectGarbage": collect_garbage,
}
