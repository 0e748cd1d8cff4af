"""What a request's source is, and what speaks for it: the steps of the route that look at an image.

Nothing is changed here but mountd's own store: an image that its owner can still write to is copied there
before it is judged, if the policy has a use for the copy and somebody vouches for what is in it. For Explain
it is not; then the bytes are judged as they are at that moment.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mountd.errors import (
    InvalidImage,
    InvalidParameter,
    KeyUnknown,
    LimitExceeded,
    NotFound,
    NotImmutable,
    NotSupported,
    SignatureInvalid,
)
from mountd.evidence import dm_verity, fs_verity, sealed
from mountd.evidence.digest import sha256_of
from mountd.evidence.location import locate
from mountd.evidence.model import Evidence, Proof
from mountd.plan.operations import Verity
from mountd.service import directories, signatures
from mountd.service.images import MAXIMUM_SHOWN, not_found, owner_of, transfer_seconds
from mountd.service.phase import Phase
from mountd.service.pulled import check_whole, missing, provenance_of
from mountd.service.requests import IMAGE_FIELD, REFERENCE_FIELD, VERITY_FIELD
from mountd.source.confined import read_verity_superblock, recognise_source
from mountd.source.descriptor import inspect_descriptor
from mountd.source.model import FileSystem, Luks, Source, SourceKind
from mountd.source.remembered import recognise_trusted
from mountd.store.layering import StoredLayer
from mountd.store.quota import Limits
from mountd.store.record import ROOT, Owner
from mountd.store.store import Known
from mountd.trust.options import shown
from mountd.trust.policy import Verdict
from mountd.trust.storing import STORED, may_store, named_digests

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mountd.caller.model import Caller
    from mountd.errors import MountdError
    from mountd.evidence.model import Provenance
    from mountd.fds import OwnedFd
    from mountd.service.context import RequestContext
    from mountd.service.requests import MountRequest
    from mountd.source.model import BackingFile, Disk
    from mountd.store.record import Record

NO_PLACE = Evidence(None, "it has no location", False)
SEALED = "sealed"
PROVE = {SEALED: sealed.prove_sealed, fs_verity.KIND: fs_verity.prove}
ALL_KINDS = frozenset(PROVE)
STORED_PLACE = "it lies in mountd's own store"
ROOT_HASH_FIELD = "source.verity.rootHash"
# What takes longer to hash than a mount may wait for is bounded in number, as transfers of the store are.
LONG_TO_HASH = 256 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Inspected:
    """A source, what speaks for it, and how to get at it: `image_fd` and `hash_fd` are borrowed."""

    source: Source
    evidence: Evidence
    image_fd: int | None = None
    hash_fd: int | None = None
    verity: Verity | None = None


def inspect(
    request: MountRequest, caller: Caller, fds: list[OwnedFd], context: RequestContext, *, may_change: bool
) -> Inspected:
    """Look at the source of a request. What is opened on the way is added to `fds`, for whoever has them.

    `may_change` is whether the store may get a copy of it. Raises BadFileDescriptor, InvalidImage,
    InvalidParameter, UnsupportedFileSystem, NotFound, LimitExceeded, SyscallError; whatever else is wrong is
    evidence.
    """
    if request.stored is not None:
        if isinstance(request.stored, StoredLayer):
            return inspect_layer(request.stored, caller, fds, context)
        # What was pulled is named by its layers by now.
        return inspect_stored(str(request.stored), caller, fds, context)
    if request.directory_fd is not None:
        return Inspected(*directories.look_at(request.directory_fd, caller, context))
    if request.image_fd is None:
        context.notes["source"] = "tmpfs"
        return Inspected(Source(SourceKind.TMPFS, None, None, request.tmpfs), NO_PLACE)
    backing = inspect_descriptor(request.image_fd, IMAGE_FIELD)
    # Where the caller says that it is: for people, and no evidence.
    context.notes["source"] = shown(backing.path_hint or "an image without a path", MAXIMUM_SHOWN)
    evidence = locate(request.image_fd, backing, context.walker, name_paths=caller.on_host)
    found = Inspected(Source(SourceKind.IMAGE, backing, None, None), evidence, request.image_fd)
    if request.verity is not None:
        return add_verity(look_inside(found), backing, request, context)
    kinds = ALL_KINDS if request.signature is not None else context.policy.policy.integrity
    found = replace(found, evidence=add_proofs(request.image_fd, evidence, kinds))
    if not is_fixed(found.evidence):
        return through_the_store(found, backing, request, caller, fds, context, may_change=may_change)
    found = add_vouching(look_inside(found), backing, request, caller, context)
    return rather_stored(found, backing, request, caller, fds, context, may_change=may_change)


def look_inside(found: Inspected) -> Inspected:
    """Add which file system or which partitions are in the image.

    Raises InvalidImage, UnsupportedFileSystem.
    """
    backing = found.source.backing
    if found.image_fd is None or backing is None:
        return found
    if found.evidence.root_owned_path is not None:
        inside = recognise_trusted(found.image_fd, backing)
    else:
        # What nobody vouches for is read where it can do no harm.
        inside = recognise_source(found.image_fd, backing.size, confined=True)
    return replace(found, source=with_contents(found.source, inside))


def with_contents(source: Source, inside: FileSystem | Disk | Luks) -> Source:
    """Add what was recognised in an image."""
    if isinstance(inside, Luks):
        return replace(source, luks=inside)
    if isinstance(inside, FileSystem):
        return replace(source, file_system=inside)
    return replace(source, disk=inside)


def is_fixed(evidence: Evidence) -> bool:
    """Tell whether the image is one that its caller cannot change any more."""
    return evidence.root_owned_path is not None or bool(evidence.proofs)


def add_proofs(image_fd: int, evidence: Evidence, kinds: frozenset[str]) -> Evidence:
    """Look for those of `kinds` of immutability that a file has by itself.

    Only those that a rule asks for, or that a signature could be about, can make a difference.
    """
    proofs: list[Proof] = []
    unproven: list[tuple[str, str]] = []
    for kind, prove in PROVE.items():
        if kind not in kinds:
            continue
        found = prove(image_fd)
        if isinstance(found, Proof):
            proofs.append(found)
        else:
            unproven.append((kind, found))
    if not proofs and not unproven:
        return evidence
    return replace(evidence, proofs=tuple(proofs), unproven=tuple(unproven))


def immutable_by(inspected: Inspected) -> list[str]:
    """Return all kinds of immutability of an image, for people: also those that no rule asks for."""
    kinds = [proof.kind for proof in inspected.evidence.proofs]
    if inspected.image_fd is not None:
        more = add_proofs(inspected.image_fd, inspected.evidence, ALL_KINDS - set(kinds))
        kinds += [proof.kind for proof in more.proofs if proof.kind not in kinds]
    return kinds


def add_verity(
    found: Inspected, backing: BackingFile, request: MountRequest, context: RequestContext
) -> Inspected:
    """Have the image judged by the root hash that it is going to be read through."""
    if request.verity is None:
        return found
    if found.source.disk is not None:
        raise InvalidParameter(VERITY_FIELD, "the image has partitions, and its hash data in one of them")
    if found.source.luks is not None:
        raise NotSupported("an encrypted image behind dm-verity", hint="mount it without")
    hashes = inspect_descriptor(request.verity.hash_fd, VERITY_FIELD)
    superblock = read_verity_superblock(request.verity.hash_fd, hashes.size, backing.size)
    proof = dm_verity.prove(superblock, request.verity.root_hash)
    if not isinstance(proof, Proof):
        # Who asks for dm-verity does not get a mount without it, whatever else speaks for the image.
        raise InvalidParameter(ROOT_HASH_FIELD, proof)
    evidence = replace(found.evidence, proofs=(proof,))
    if request.signature is not None and proof.digest is not None:
        evidence = signed(evidence, request.signature, [("root-hash", proof.digest)], context)
    return replace(
        found,
        evidence=evidence,
        hash_fd=request.verity.hash_fd,
        verity=Verity.of(superblock, request.verity.root_hash, hash_file=hashes.state),
    )


def add_vouching(
    found: Inspected, backing: BackingFile, request: MountRequest, caller: Caller, context: RequestContext
) -> Inspected:
    """Find out who vouches for the bytes of an image that cannot change any more.

    They are read only if somebody wants to know: a signature came along, or a rule names a digest.
    """
    evidence, image_fd = found.evidence, found.image_fd
    if image_fd is None or not (can_be_signed(request, context) or named_for(request, caller, context)):
        return with_signature_error(found, request, context)
    of_kernel = [("fs-verity", each.digest) for each in evidence.proofs if each.kind == fs_verity.KIND]
    known = [(covers, digest) for covers, digest in of_kernel if digest is not None]
    if request.signature is not None and known:
        # Measured by the kernel at once, so that this is the one to try first.
        evidence = signed(evidence, request.signature, known, context)
        if evidence.signers:
            return replace(found, evidence=evidence)
    trusted = evidence.root_owned_path is not None
    digest = hashed(image_fd, backing.size, None if trusted else caller, context)
    evidence = replace(evidence, digest=digest, signature_error=None)
    if request.signature is not None:
        evidence = signed(evidence, request.signature, [*known, ("image", digest)], context)
    return replace(found, evidence=evidence)


def through_the_store(
    found: Inspected,
    backing: BackingFile,
    request: MountRequest,
    caller: Caller,
    fds: list[OwnedFd],
    context: RequestContext,
    *,
    may_change: bool,
) -> Inspected:
    """Have an image that can still change replaced by a copy, if that is what gets it mounted.

    The bytes are hashed first, and stored only if there is a good signature over them or a rule that names
    them, and if the policy allows the copy: a refused request leaves nothing in the store. What is stored in
    the end has to be the same, and is judged anew. What is in an image that the store has already is known
    from there; looking takes a process of its own.
    """
    if not may_store(context.policy.policy, caller, namespace_given=request.wishes.namespace_given):
        return look_inside(found)
    image_fd, evidence = found.image_fd, found.evidence
    named = named_for(request, caller, context)
    if image_fd is None or context.store is None or not (can_be_signed(request, context) or named):
        return look_inside(with_signature_error(found, request, context))
    digest = hashed(image_fd, backing.size, caller, context)
    if request.signature is not None:
        evidence = signed(evidence, request.signature, [("image", digest)], context)
    found = replace(found, evidence=evidence)
    if not evidence.signers and digest not in named:
        return look_inside(found)
    record = record_of(digest, context)
    if record is not None and record.file_system is not None:
        found = replace(found, source=replace(found.source, file_system=record.file_system))
    else:
        found = look_inside(found)
    copy = replace(found, evidence=as_stored(evidence, digest, record, context))
    if judged(copy, request, caller, context) is not None:
        return copy
    return put_in(copy, backing, record, caller, fds, context, may_change=may_change)


def rather_stored(
    found: Inspected,
    backing: BackingFile,
    request: MountRequest,
    caller: Caller,
    fds: list[OwnedFd],
    context: RequestContext,
    *,
    may_change: bool,
) -> Inspected:
    """Have an image that cannot change replaced by a copy, too, where nothing but that is what it lacks.

    The rule that decides about it may want images in mountd's own store, whatever else makes them immutable.
    What another rule denies stays denied, as the copy has no location for a rule to be about.
    """
    policy, evidence = context.policy.policy, found.evidence
    named = named_for(request, caller, context)
    if context.store is None or not (evidence.signers or named):
        return found
    if not may_store(policy, caller, namespace_given=request.wishes.namespace_given):
        return found
    refusal = judged(found, request, caller, context)
    if not isinstance(refusal, NotImmutable) or found.image_fd is None:
        return found
    digest = evidence.digest
    if digest is None:
        trusted = evidence.root_owned_path is not None
        digest = hashed(found.image_fd, backing.size, None if trusted else caller, context)
    if not evidence.signers and digest not in named:
        return found
    record = record_of(digest, context)
    copy = replace(found, evidence=as_stored(evidence, digest, record, context))
    refusal = judged(copy, request, caller, context)
    if refusal is not None:
        # A copy that does not help, either, has less to say.
        return found if isinstance(refusal, NotImmutable) else copy
    return put_in(copy, backing, record, caller, fds, context, may_change=may_change)


def judged(
    found: Inspected, request: MountRequest, caller: Caller, context: RequestContext
) -> MountdError | None:
    """Return why the policy refuses the mount with this evidence, None if it does not.

    That somebody has to be asked is no refusal: what that is about has to be where it cannot change before.
    """
    decision = context.policy.decide(caller, found.source, found.evidence, request.wishes)
    return None if decision.verdict is Verdict.ASK else decision.error


def record_of(digest: str, context: RequestContext) -> Record | None:
    """Return what the store knows of an image, None for nothing."""
    if context.store is not None:
        with suppress(NotFound):
            return context.store.record(digest)
    return None


def put_in(
    copy: Inspected,
    backing: BackingFile,
    record: Record | None,
    caller: Caller,
    fds: list[OwnedFd],
    context: RequestContext,
    *,
    may_change: bool,
) -> Inspected:
    """Have what `copy` speaks for in the store, and return what is there, judged anew.

    Without `may_change` that is only said. Raises DeniedByPolicy for a caller who can have nothing there.
    """
    owner = owner_of(caller)
    if not may_change:
        return copy
    if record is None or not record.belongs_to(owner.uid):
        record = stored(copy, backing, owner, context)
        context.put_in.append(record.digest)
    inspected = inspect_stored(record.digest, caller, fds, context)
    signers = tuple(dict.fromkeys((*copy.evidence.signers, *inspected.evidence.signers)))
    return replace(inspected, evidence=replace(inspected.evidence, signers=signers))


def as_stored(evidence: Evidence, digest: str, record: Record | None, context: RequestContext) -> Evidence:
    """Return what would speak for a copy: the caller has the bytes, so that what is known of them counts."""
    signers, provenance = evidence.signers, None
    if record is not None:
        known = signatures.still_known(record.signers, context.policy.policy)
        signers = tuple(dict.fromkeys((*signers, *known)))
        provenance = provenance_of(record)
    return replace(
        evidence,
        root_owned_path=None,
        location_problem=evidence.location_problem or STORED_PLACE,
        descriptor_writable=False,
        proofs=(Proof(STORED, digest),),
        digest=digest,
        signers=signers,
        provenance=provenance,
    )


def stored(copy: Inspected, backing: BackingFile, owner: Owner, context: RequestContext) -> Record:
    """Return the record of the copy that the store gets now of the bytes that were hashed."""
    if context.store is None or copy.image_fd is None:
        raise NotFound("the store", hint="the journal of mountd says why it has none")

    def judge(fd: int, digest: str) -> Known:
        if digest != copy.evidence.digest:
            raise InvalidImage("it was changed while it was read")
        # What was recognised before may have been something else: the record is about what is stored.
        inside = recognise_source(fd, backing.size, confined=True)
        return Known(inside if isinstance(inside, FileSystem) else None, copy.evidence.signers)

    context.enter(Phase.TRANSFER, transfer_seconds(backing.size))
    record = context.store.add(copy.image_fd, backing.size, owner, judge=judge)
    context.enter(Phase.VERIFY)
    return record


def hashed(image_fd: int, size: int, caller: Caller | None, context: RequestContext) -> str:
    """Return the digest of an image, within the time that reading it may take.

    For an image that is `caller`'s, None for one that root has put where it lies, that is bounded as putting
    it into the store is: a sparse file costs nobody anything, and hashing it takes as long as a full one.
    Raises LimitExceeded.
    """
    limits = context.store.limits if context.store is not None else Limits()
    if caller is not None and size > limits.image_bytes:
        raise LimitExceeded("bytes in an image that is hashed", limits.image_bytes)
    slot: AbstractContextManager[None] = nullcontext()
    if caller is not None and context.store is not None and size > LONG_TO_HASH:
        slot = context.store.slot(Owner(caller.uid, caller.owner_uid))
    context.enter(Phase.TRANSFER, transfer_seconds(size))
    with slot:
        digest = sha256_of(image_fd, size)
    context.enter(Phase.VERIFY)
    return digest


def can_be_signed(request: MountRequest, context: RequestContext) -> bool:
    """Tell whether a signature came along that a key of the policy may have made."""
    return request.signature is not None and bool(context.policy.policy.keys)


def named_for(request: MountRequest, caller: Caller, context: RequestContext) -> frozenset[str]:
    """Return the digests that rules about this caller name."""
    return named_digests(context.policy.policy, caller, namespace_given=request.wishes.namespace_given)


def with_signature_error(found: Inspected, request: MountRequest, context: RequestContext) -> Inspected:
    """Say why a signature was not looked at: the policy has no keys."""
    if request.signature is None or context.policy.policy.keys:
        return found
    return replace(found, evidence=replace(found.evidence, signature_error=signatures.no_keys()))


def signed(
    evidence: Evidence, blob: bytes, digests: list[tuple[str, str]], context: RequestContext
) -> Evidence:
    """Add who has made the signature `blob`, or what is wrong with it."""
    try:
        signer = signatures.verify(blob, digests, context.policy.policy)
    except (SignatureInvalid, KeyUnknown) as error:
        return replace(evidence, signature_error=error)
    return replace(evidence, signers=(*evidence.signers, signer), signature_error=None)


def inspect_stored(digest: str, caller: Caller, fds: list[OwnedFd], context: RequestContext) -> Inspected:
    """Look at a stored image, and add it to `fds`.

    It is the caller's own, or one that root has put there; whom that is for is up to the policy. Raises
    NotFound for any other, NotSupported for a part of an image, InvalidImage for a damaged store.
    """
    context.notes.setdefault("source", f"stored:{digest}")
    if context.store is None:
        raise NotFound("the store", hint="the journal of mountd says why it has none")
    fd, record = context.store.lookup(digest)
    # From here on it is closed with those that came along.
    fds.append(fd)
    if not caller.is_host_root and not record.belongs_to(caller.uid) and not record.belongs_to(ROOT):
        raise not_found(digest)
    if not record.belongs_to(caller.uid) or caller.is_host_root:
        check_whole(record.provenance)
    return of_store(fd, record, provenance_of(record), context)


def inspect_layer(
    layer: StoredLayer, caller: Caller, fds: list[OwnedFd], context: RequestContext
) -> Inspected:
    """Look at a layer of an image that was pulled, and add it to `fds`.

    It is for whomever the policy lets have the image. Raises NotFound, InvalidImage for a damaged store.
    """
    context.notes["source"] = layer.name
    if context.store is None:
        raise NotFound("the store", hint="the journal of mountd says why it has none")
    try:
        fd, record = context.store.lookup(layer.digest)
    except NotFound:
        raise missing(layer.name, layer.wanted) from None
    fds.append(fd)
    if not record.belongs_to(ROOT):
        raise missing(layer.name, layer.wanted)
    return of_store(fd, record, layer.provenance, context)


def of_store(
    fd: OwnedFd, record: Record, provenance: Provenance | None, context: RequestContext
) -> Inspected:
    """Look at an image of the store, `fd`, borrowed, whose record is known, and where it is from."""
    digest = record.digest
    context.notes["digest"] = digest
    backing = inspect_descriptor(fd.fileno(), REFERENCE_FIELD)
    # It was looked at when it was stored, and is the same since; but it is whatever somebody has imported.
    inside = record.file_system or recognise_source(fd.fileno(), backing.size, confined=True)
    evidence = Evidence(
        root_owned_path=None,
        location_problem=STORED_PLACE,
        descriptor_writable=False,
        proofs=(Proof(STORED, digest),),
        digest=digest,
        signers=signatures.still_known(record.signers, context.policy.policy),
        provenance=provenance,
    )
    source = with_contents(Source(SourceKind.IMAGE, backing, None, None), inside)
    return Inspected(source, evidence, fd.fileno())
