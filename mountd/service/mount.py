"""The methods of io.mountd.Mount: the route of a request, from top to bottom.

Explain is the same route, and stops after the decision; so it cannot say anything else than Mount does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mountd.caller.delegated import delegated_ids
from mountd.caller.identify import given_namespace, identify, pin
from mountd.caller.model import OVERFLOW_ID, DelegatedIds
from mountd.errors import NotFound, PeerGone, SyscallError, UserNamespaceNotPermitted
from mountd.evidence.location import locate
from mountd.evidence.model import Evidence, Proof
from mountd.execute.run import Inputs, run
from mountd.kernel import compat
from mountd.plan.idmap import IdMapKind, host_extents
from mountd.plan.planner import plan_mount
from mountd.service.context import RequestContext
from mountd.service.images import not_found
from mountd.service.phase import Phase
from mountd.service.requests import IMAGE_FIELD, REFERENCE_FIELD, MountRequest
from mountd.source.confined import recognise_image
from mountd.source.descriptor import inspect_descriptor
from mountd.source.model import Source, SourceKind
from mountd.store.record import ROOT
from mountd.trust.decide import Decision, decide
from mountd.trust.ids import authorize_extents, authorize_ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from mountd.caller.model import Caller, IdExtent, UserNamespace
    from mountd.fds import OwnedFd

    Extents = tuple[IdExtent, ...]

NO_PLACE = Evidence(None, "it has no location", False)
STORED = "stored"  # the kind of immutability, as the policy names it


@dataclass(frozen=True, slots=True)
class Judged:
    """A request with all the facts about it, and what was decided. `image_fd` is borrowed."""

    request: MountRequest
    caller: Caller
    source: Source
    evidence: Evidence
    image_fd: int | None
    decision: Decision
    uids: Extents
    gids: Extents


def mount(
    parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext
) -> tuple[dict[str, object], list[OwnedFd]]:
    """io.mountd.Mount.Mount: return the reply, and the detached mount that goes with it."""
    with pin(context.connection) as pidfd:
        judged = judge(parameters, fds, context, pidfd.fileno())
        if judged.decision.error is not None:
            raise judged.decision.error
        check_peer(pidfd.fileno())
        context.enter(Phase.MOUNT)
        context.writable = not judged.decision.read_only
        made = make(judged, context)
        try:
            id = compat.any_mount_id(made.fileno())
            check_peer(pidfd.fileno())
        except BaseException:
            made.close()
            raise
    described = {
        "mountFileDescriptor": 0,
        "fileSystemType": file_system_type(judged.source),
        "readOnly": judged.decision.read_only,
        "id": id,
    }
    return {"mounts": [described], "decision": decision_reply(judged.decision)}, [made]


def explain(
    parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext
) -> tuple[dict[str, object], list[OwnedFd]]:
    """io.mountd.Mount.Explain: return what would be decided, and why."""
    with pin(context.connection) as pidfd:
        judged = judge(parameters, fds, context, pidfd.fileno())
    steps = [
        {
            "rule": step.rule,
            "origin": step.origin,
            "applies": step.applies,
            "reason": step.reason,
            **({"hint": step.hint} if step.hint is not None else {}),
        }
        for step in judged.decision.steps
    ]
    return {"decision": decision_reply(judged.decision), "facts": facts(judged), "steps": steps}, []


def judge(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext, pidfd: int) -> Judged:
    """Find out the facts and decide. Raises for what is no matter of policy: a bad request, a bad image."""
    context.enter(Phase.VERIFY)
    request = MountRequest.from_call(parameters, fds)
    caller = identify(context.connection, pidfd, context.connected_from)
    context.note_caller(caller)
    if context.policy.refusal is not None:
        raise context.policy.refusal
    if caller.uid == OVERFLOW_ID and not caller.on_host:
        raise UserNamespaceNotPermitted(
            "the caller's uid is not mapped on the host, so nothing can belong to it",
            hint="call as a user that the user namespace maps",
        )
    uids, gids = authorize(request, caller)
    image_fd = request.image_fd
    if request.stored is not None:
        image_fd, source, evidence = inspect_stored(request.stored, caller, fds, context)
    else:
        source, evidence = inspect(request, caller)
    decision = decide(context.policy.policy, caller, source, evidence, request.wishes)
    context.notes["verdict"] = decision.verdict.value
    context.notes["file_system"] = file_system_type(source)
    if decision.rule is not None:
        context.notes["rule"] = decision.rule
    return Judged(request, caller, source, evidence, image_fd, decision, uids, gids)


def authorize(request: MountRequest, caller: Caller) -> tuple[Extents, Extents]:
    """Refuse ids that are not the caller's; return the host extents that explicit ranges ask for."""
    namespace: UserNamespace = caller.user_namespace
    if request.userns_fd is not None:
        given = given_namespace(request.userns_fd, caller)
        with_delegated(caller, lambda delegated: authorize_ids(caller, given, delegated))
        namespace = given.namespace
    if request.idmap.kind is not IdMapKind.RANGES:
        return (), ()
    uids = host_extents(request.idmap.uid_ranges, namespace, gids=False)
    gids = host_extents(request.idmap.gid_ranges, namespace, gids=True)
    if request.userns_fd is None:
        with_delegated(caller, lambda delegated: authorize_extents(caller, delegated, uids, gids))
    return uids, gids


def with_delegated(caller: Caller, check: Callable[[DelegatedIds], None]) -> None:
    """Run `check` with the ids delegated to the caller, which are looked up only if it fails without."""
    try:
        check(DelegatedIds((), ()))
    except UserNamespaceNotPermitted:
        check(delegated_ids(caller.uid))


def inspect(request: MountRequest, caller: Caller) -> tuple[Source, Evidence]:
    """Return what the source is, and what speaks for it."""
    if request.kind is SourceKind.TMPFS or request.image_fd is None:
        return Source(SourceKind.TMPFS, None, None, request.tmpfs), NO_PLACE
    backing = inspect_descriptor(request.image_fd, IMAGE_FIELD)
    evidence = locate(backing, name_paths=caller.on_host)
    # What root vouches for is read here; what nobody does is read where it can do no harm.
    confined = evidence.root_owned_path is None
    file_system = recognise_image(request.image_fd, backing.size, confined=confined)
    return Source(SourceKind.IMAGE, backing, file_system, None), evidence


def inspect_stored(
    digest: str, caller: Caller, fds: list[OwnedFd], context: RequestContext
) -> tuple[int, Source, Evidence]:
    """Return a stored image, open and borrowed, and what it is and what speaks for it.

    It is the caller's own, or one that root has put there; whom that is for is up to the policy. Raises
    NotFound for any other, InvalidImage for a damaged store.
    """
    if context.store is None:
        raise NotFound("the store", hint="the journal of mountd says why it has none")
    fd, record = context.store.lookup(digest)
    # From here on it is closed with those that came along.
    fds.append(fd)
    if not caller.is_host_root and not record.belongs_to(caller.uid) and not record.belongs_to(ROOT):
        raise not_found(digest)
    context.notes["digest"] = digest
    backing = inspect_descriptor(fd.fileno(), REFERENCE_FIELD)
    # It was looked at when it was stored, and is the same since; but it is whatever somebody has imported.
    file_system = record.file_system or recognise_image(fd.fileno(), backing.size, confined=True)
    evidence = Evidence(
        root_owned_path=None,
        location_problem="it lies in mountd's own store",
        descriptor_writable=False,
        proofs=(Proof(STORED, digest),),
        digest=digest,
        signers=record.signers,
        provenance=record.provenance,
    )
    return fd.fileno(), Source(SourceKind.IMAGE, backing, file_system, None), evidence


def make(judged: Judged, context: RequestContext) -> OwnedFd:
    """Carry out what was decided and return the detached mount."""
    plan = plan_mount(
        judged.source, judged.decision, judged.caller, judged.request.idmap.kind, judged.uids, judged.gids
    )
    inputs = Inputs(
        image_fd=judged.image_fd,
        userns_fd=judged.request.userns_fd,
        seal=context.seal,
    )
    return run(plan, inputs)


def check_peer(pidfd: int) -> None:
    """Raise PeerGone if nobody waits for the answer any more, so that nothing is made for nobody."""
    try:
        compat.check_alive(pidfd)
    except SyscallError:
        raise PeerGone("it has ended") from None


def file_system_type(source: Source) -> str:
    """Return the type of the source's file system."""
    return source.file_system.type if source.file_system is not None else "tmpfs"


def decision_reply(decision: Decision) -> dict[str, object]:
    """Return a decision as the wire has it."""
    fields = {
        "verdict": decision.verdict.value,
        "rule": decision.rule,
        "trustedBy": decision.trusted_by,
        "reason": decision.reason,
        "hint": decision.hint,
    }
    return {name: value for name, value in fields.items() if value is not None}


def facts(judged: Judged) -> dict[str, str]:
    """Return what was found out, as text for people."""
    caller, source, evidence = judged.caller, judged.source, judged.evidence
    found: dict[str, object] = {
        "caller": f"uid {caller.uid}, gid {caller.gid}"
        + (", on the host" if caller.on_host else ", in a user namespace"),
        "source": source.kind.value,
        "file system": file_system_type(source),
    }
    if source.backing is not None and source.file_system is not None:
        found["size"] = f"{source.backing.size} bytes"
        found["label"] = source.file_system.label
        found["uuid"] = source.file_system.uuid
        found["descriptor"] = "writable" if evidence.descriptor_writable else "read-only"
        found["location"] = evidence.location_problem or "root's alone"
        found["digest"] = evidence.digest
        found["immutable by"] = ", ".join(proof.kind for proof in evidence.proofs) or None
        if evidence.root_owned_path is not None and caller.on_host:
            found["path"] = evidence.root_owned_path
    return {name: str(value) for name, value in found.items() if value is not None}


METHODS = {"io.mountd.Mount.Mount": mount, "io.mountd.Mount.Explain": explain}
