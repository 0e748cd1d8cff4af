"""The methods of io.mountd.Mount: the route of a request, from top to bottom.

Explain is the same route, and stops after the decision; so it cannot say anything else than Mount does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mountd.caller.delegated import delegated_ids
from mountd.caller.identify import given_namespace
from mountd.caller.model import OVERFLOW_ID, DelegatedIds
from mountd.errors import UserNamespaceNotPermitted
from mountd.execute.run import Inputs, run
from mountd.kernel import compat
from mountd.plan.idmap import IdMapKind, host_extents
from mountd.plan.planner import plan_mount
from mountd.service import directories
from mountd.service.context import RequestContext
from mountd.service.inspection import Inspected, immutable_by, inspect
from mountd.service.phase import Phase
from mountd.service.requests import MountRequest
from mountd.source.model import Source
from mountd.trust.ids import authorize_extents, authorize_ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from mountd.caller.model import Caller, IdExtent, UserNamespace
    from mountd.fds import OwnedFd
    from mountd.trust.decide import Decision

    Extents = tuple[IdExtent, ...]

NOTHING_DELEGATED = DelegatedIds((), ())
# The same facts are permitted the same; what is refused raises, and is not remembered.
authorized = lru_cache(maxsize=64)(authorize_ids)


@dataclass(frozen=True, slots=True)
class Judged:
    """A request with all the facts about it, and what was decided."""

    request: MountRequest
    caller: Caller
    inspected: Inspected
    decision: Decision
    uids: Extents
    gids: Extents


def mount(
    parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext
) -> tuple[dict[str, object], list[OwnedFd]]:
    """io.mountd.Mount.Mount: return the reply, and the detached mount that goes with it."""
    judged = judge(parameters, fds, context, may_change=True)
    if judged.decision.error is not None:
        raise judged.decision.error
    context.peer.check()
    context.enter(Phase.MOUNT)
    context.writable = not judged.decision.read_only
    made = make(judged, context)
    try:
        id = compat.any_mount_id(made.fileno())
        context.peer.check()
    except BaseException:
        made.close()
        raise
    described = {
        "mountFileDescriptor": 0,
        "fileSystemType": file_system_type(judged.inspected.source),
        "readOnly": judged.decision.read_only,
        "id": id,
    }
    return {"mounts": [described], "decision": decision_reply(judged.decision)}, [made]


def explain(
    parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext
) -> tuple[dict[str, object], list[OwnedFd]]:
    """io.mountd.Mount.Explain: return what would be decided, and why."""
    judged = judge(parameters, fds, context, may_change=False)
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


def judge(
    parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext, *, may_change: bool
) -> Judged:
    """Find out the facts and decide. Raises for what is no matter of policy: a bad request, a bad image.

    `may_change` is whether the image may be copied into the store to be judged there.
    """
    context.enter(Phase.VERIFY)
    request = MountRequest.from_call(parameters, fds)
    caller = context.peer.identify()
    context.note_caller(caller)
    if context.policy.refusal is not None:
        raise context.policy.refusal
    if caller.uid == OVERFLOW_ID and not caller.on_host:
        raise UserNamespaceNotPermitted(
            "the caller's uid is not mapped on the host, so nothing can belong to it",
            hint="call as a user that the user namespace maps",
        )
    uids, gids = authorize(request, caller)
    inspected = inspect(request, caller, fds, context, may_change=may_change)
    decision = context.policy.decide(caller, inspected.source, inspected.evidence, request.wishes)
    context.note_decision(decision, file_system_type(inspected.source))
    return Judged(request, caller, inspected, decision, uids, gids)


def authorize(request: MountRequest, caller: Caller) -> tuple[Extents, Extents]:
    """Refuse ids that are not the caller's; return the host extents that explicit ranges ask for."""
    namespace: UserNamespace = caller.user_namespace
    if request.userns_fd is not None:
        given = given_namespace(request.userns_fd, caller)
        with_delegated(caller, lambda delegated: authorized(caller, given, delegated))
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
        check(NOTHING_DELEGATED)
    except UserNamespaceNotPermitted:
        check(delegated_ids(caller.uid))


def make(judged: Judged, context: RequestContext) -> OwnedFd:
    """Carry out what was decided and return the detached mount."""
    inspected = judged.inspected
    if inspected.source.directory is not None:
        return directories.make(judged, context)
    plan = plan_mount(
        inspected.source,
        judged.decision,
        judged.caller,
        judged.request.idmap.kind,
        judged.uids,
        judged.gids,
        verity=inspected.verity,
    )
    inputs = Inputs(
        image_fd=inspected.image_fd,
        hash_fd=inspected.hash_fd,
        userns_fd=judged.request.userns_fd,
        seal=context.seal,
    )
    return run(plan, inputs)


def file_system_type(source: Source) -> str:
    """Return the type of the source's file system."""
    if source.directory is not None:
        return source.directory.file_system
    return source.file_system.type if source.file_system is not None else "tmpfs"


def decision_reply(decision: Decision) -> dict[str, object]:
    """Return a decision as the wire has it."""
    fields = {
        "verdict": decision.verdict.value,
        "rule": decision.rule,
        "trustedBy": decision.trusted_by,
        "signer": decision.signer,
        "digest": decision.digest,
        "reason": decision.reason,
        "hint": decision.hint,
    }
    return {name: value for name, value in fields.items() if value is not None}


def facts(judged: Judged) -> dict[str, str]:
    """Return what was found out, as text for people."""
    caller, source, evidence = judged.caller, judged.inspected.source, judged.inspected.evidence
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
        found["immutable by"] = ", ".join(immutable_by(judged.inspected)) or None
        if evidence.provenance is not None:
            found["pulled from"] = f"{evidence.provenance.repository}@{evidence.provenance.manifest}"
            found["pulled under"] = evidence.provenance.requirement
            found["signed with"] = evidence.provenance.signer
        if evidence.root_owned_path is not None and caller.on_host:
            found["path"] = evidence.root_owned_path
    found |= directories.facts(judged)
    return {name: str(value) for name, value in found.items() if value is not None}


METHODS = {"io.mountd.Mount.Mount": mount, "io.mountd.Mount.Explain": explain}
