"""The methods of io.mountd.Mount: the route of a request, from top to bottom.

Explain is the same route, and stops after the decision; so it cannot say anything else than Mount does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mountd.caller.delegated import delegated_ids
from mountd.caller.identify import given_namespace
from mountd.caller.model import OVERFLOW_ID, DelegatedIds
from mountd.errors import UserNamespaceNotPermitted
from mountd.execute.run import Inputs, run_all
from mountd.fds import close_all
from mountd.plan.idmap import IdMapKind, host_extents
from mountd.plan.planner import plan_mounts
from mountd.service import composefs, directories, disks, encrypted, pulled, stacks
from mountd.service.context import RequestContext
from mountd.service.handing_out import handing_out
from mountd.service.inspection import Inspected, immutable_by, inspect
from mountd.service.layers import at_part
from mountd.service.phase import Phase
from mountd.service.requests import STORED_PREFIX, MountRequest
from mountd.source import luks
from mountd.source.model import Source, SourceKind
from mountd.source.partition_types import MOUNT_POINTS
from mountd.store.layering import StoredLayer
from mountd.trust.ids import authorize_extents, authorize_ids, of_containers
from mountd.trust.policy import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mountd.caller.model import Caller, IdExtent, UserNamespace
    from mountd.fds import OwnedFd
    from mountd.source.model import Window
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
    source: str | None  # for people
    layers: tuple[Judged, ...] = ()  # of a stack, the topmost first
    top: Judged | None = None  # what takes what is written to it
    opened: Mapping[Window | None, str] = field(default_factory=dict)  # devices of what was encrypted


def mount(
    parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext
) -> tuple[dict[str, object], list[OwnedFd]]:
    """io.mountd.Mount.Mount: return the reply, and the detached mount that goes with it."""
    judged = allowed(judge(parameters, fds, context, may_change=True), fds, context)
    context.peer.check()
    context.enter(Phase.MOUNT)
    context.writable = not judged.decision.read_only
    with encrypted.opened(judged, context) as judged, handing_out(judged, context) as entry:
        made = make(judged, context, entry.notice)
        try:
            mounts = described(judged, entry.take_down(made))
            context.peer.check()
        except BaseException:
            close_all(made)
            raise
    return {"mounts": mounts, "decision": decision_reply(judged.decision)}, made


def described(judged: Judged, ids: list[int]) -> list[dict[str, object]]:
    """Return the mounts with these ids as the wire has them, in the order of their descriptors."""
    uses = judged.decision.uses
    if not uses:
        return [
            {
                "mountFileDescriptor": 0,
                "fileSystemType": file_system_type(judged.inspected.source),
                "readOnly": judged.decision.read_only,
                "id": ids[0],
            }
        ]
    found: list[dict[str, object]] = []
    for number, (use, id) in enumerate(zip(uses, ids, strict=True)):
        where = MOUNT_POINTS[use.partition.designator]
        found.append(
            {
                "mountFileDescriptor": number,
                "designator": use.partition.designator,
                **({"mountPoint": where} if where else {}),
                "fileSystemType": use.type,
                "readOnly": use.read_only,
                "id": id,
            }
        )
    return found


def allowed(
    judged: Judged,
    fds: list[OwnedFd],
    context: RequestContext,
    before: Callable[[], None] | None = None,
) -> Judged:
    """Return what was judged if it is allowed, by the policy or by whom that wants to have asked.

    `before` is called before anybody is asked, and raises for what would fail all the same. Raises the error
    of the decision, what `consent.ask` and `before` do, and KeyRequired and InvalidParameter; what was put
    into the store only for the question is taken out again then.
    """
    if judged.decision.verdict is not Verdict.ASK:
        if judged.decision.error is not None:
            raise judged.decision.error
        return judged
    try:
        # Nobody is asked about what would fail without it.
        encrypted.needed_password(judged)
        if before is not None:
            before()
        return consented(judged, context)
    except BaseException:
        take_out(judged.caller, fds, context)
        raise


def consented(judged: Judged, context: RequestContext) -> Judged:
    """Return what was judged and is not refused, once whoever has to be asked has consented to it.

    Raises what `consent.ask` does, of a stack naming the part that it was asked about.
    """
    if judged.decision.verdict is not Verdict.ASK:
        return judged
    if judged.layers:
        parts = []
        for where, part in stacks.parts_of(judged.layers, judged.top):
            with at_part(where):
                parts.append(consented(part, context))
        top = None if judged.top is None else parts.pop()
        return stacks.of_layers(replace(judged, layers=tuple(parts), top=top), context)
    from mountd.service import consent

    action = consent.action_of(judged.inspected.source, judged.decision)
    about = consent.details(judged.source, judged.decision)
    interactive, rule = judged.request.interactive, judged.decision.rule
    consent.ask(action, about, judged.caller, context, interactive=interactive, rule=rule)
    decision = replace(judged.decision, verdict=Verdict.ALLOW, error=None, hint=None)
    context.note_decision(decision, file_system_type(judged.inspected.source))
    return replace(judged, decision=decision)


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
    caller = context.caller_to_judge()
    if caller.uid == OVERFLOW_ID and not caller.on_host:
        raise UserNamespaceNotPermitted(
            "the caller's uid is not mapped on the host, so nothing can belong to it",
            hint="call as a user that the user namespace maps",
        )
    uids, gids = authorize(request, caller, context)
    request = pulled.expand(request, context)

    def judge_source(each: MountRequest) -> Judged:
        return judge_one(each, caller, (uids, gids), fds, context, may_change=may_change)

    def judge_stack() -> Judged:
        layers, top = stacks.judge_parts(request, judge_source, context)
        judged = Judged(
            request,
            caller,
            stacks.NOTHING,
            layers[0].decision,
            uids,
            gids,
            context.notes.get("source"),
            layers,
            top,
        )
        return stacks.of_layers(judged, context)

    try:
        judged = judge_stack() if request.layers else judge_source(request)
    except BaseException:
        take_out(caller, fds, context)
        raise
    if judged.decision.verdict is Verdict.DENY:
        take_out(caller, fds, context)
    return judged


def take_out(caller: Caller, fds: list[OwnedFd], context: RequestContext) -> None:
    """Take out of the store what was put there only for this request, which is refused."""
    if context.put_in:
        from mountd.service import consent

        consent.take_out(caller, fds, context)


def judge_one(
    request: MountRequest,
    caller: Caller,
    ids: tuple[Extents, Extents],
    fds: list[OwnedFd],
    context: RequestContext,
    *,
    may_change: bool,
) -> Judged:
    """Find out the facts about one source and decide, as `judge` does."""
    if request.composefs is not None:
        inspected = composefs.look_at(
            request, request.composefs, caller, fds, context, may_change=may_change
        )
    else:
        inspected = inspect(request, caller, fds, context, may_change=may_change)
    if inspected.source.disk is not None:
        inspected = disks.settle(inspected, request, caller, context)
    decision = context.policy.decide(caller, inspected.source, inspected.evidence, request.wishes)
    context.note_decision(decision, file_system_type(inspected.source))
    return Judged(request, caller, inspected, decision, *ids, context.notes.get("source"))


def authorize(request: MountRequest, caller: Caller, context: RequestContext) -> tuple[Extents, Extents]:
    """Refuse ids that are not the caller's; return the host extents that explicit ranges ask for."""
    namespace: UserNamespace = caller.user_namespace
    if request.userns_fd is not None:
        given = given_namespace(request.userns_fd, caller)
        try:
            with_delegated(caller, lambda delegated: authorized(caller, given, delegated))
        except UserNamespaceNotPermitted:
            if not context.registers or not (found := of_containers(given.namespace)).uids:
                raise
            authorized(caller, given, found)
            context.must_be_registered = True
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


def make_layer(judged: Judged, context: RequestContext) -> list[OwnedFd]:
    """Carry out what was decided about a layer; the mount is for an overlay, and for nobody to have."""
    return make(judged, context, as_layer=True)


def make(
    judged: Judged,
    context: RequestContext,
    note: Callable[[OwnedFd], None] | None = None,
    *,
    as_layer: bool = False,
) -> list[OwnedFd]:
    """Carry out what was decided and return the detached mounts, which are the caller's to close.

    `note` is shown each before ids are mapped. With `as_layer` their attributes are not locked.
    """
    inspected = judged.inspected
    if judged.layers:
        return [stacks.make(judged, context, make_layer, note)]
    if inspected.source.directory is not None:
        return [directories.make(judged, context, note)]
    if inspected.source.composefs is not None:
        return [composefs.make(judged, context, note)]
    plans = plan_mounts(
        inspected.source,
        judged.decision,
        judged.caller,
        judged.request.idmap.kind,
        judged.uids,
        judged.gids,
        verity=inspected.verity,
        # The source of a layer is nobody's to see.
        name=None if as_layer else source_name(judged),
        as_layer=as_layer,
    )
    inputs = Inputs(
        image_fd=inspected.image_fd,
        hash_fd=inspected.hash_fd,
        userns_fd=judged.request.userns_fd,
        seal=context.seal,
        naming=context.naming,
        note=note,
        opened=judged.opened,
    )
    return run_all(plans, inputs)


def source_name(judged: Judged) -> str | None:
    """Return what the mount table calls the source of a mount, None where no name for it is true.

    The path of an image is true where it has proven to lead to it, and is root's alone; whoever is in a
    container has no business with the host's paths. An image of the store is called as it was asked for, by
    its tag as well: what that led to is in the list of mounts.
    """
    named = judged.request.stored
    if isinstance(named, StoredLayer):
        return named.wanted
    if named is not None:
        return f"{STORED_PREFIX}{named}"
    return judged.inspected.evidence.root_owned_path if judged.caller.on_host else None


def file_system_type(source: Source) -> str:
    """Return the type of the source's file system, or of its partition table."""
    if source.disk is not None:
        return "gpt"
    if source.directory is not None:
        return source.directory.file_system
    if source.kind is SourceKind.STACK or source.composefs is not None:
        return stacks.OVERLAY
    if source.file_system is None and source.luks is not None:
        return luks.TYPE
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
    decision = judged.decision
    found: dict[str, object] = {
        "caller": f"uid {caller.uid}, gid {caller.gid}"
        + (", on the host" if caller.on_host else ", in a user namespace"),
        "source": source.kind.value,
        "file system": file_system_type(source),
    }
    if source.disk is not None:
        found["partitions"] = ", ".join(disks.shown_partition(each) for each in source.disk.partitions)
        found["uuid"] = source.disk.uuid
        mounted = (
            f"{use.partition.designator}{' (dm-verity)' * use.verity}" for use in judged.decision.uses
        )
        found["mounted"] = ", ".join(mounted) or None
    if source.luks is not None:
        found["encrypted"] = f"LUKS{source.luks.version}, {source.luks.cipher}"
        found["label"], found["uuid"] = source.luks.label, source.luks.uuid
    if source.file_system is not None:
        found["label"] = source.file_system.label
        found["uuid"] = source.file_system.uuid
    if source.backing is not None:
        found["size"] = f"{source.backing.size} bytes"
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
    if decision.verdict is Verdict.ASK and not judged.layers:
        from mountd.service import consent

        shown = consent.details(judged.source, decision)
        found["polkit action"] = consent.action_of(source, decision)
        found["polkit details"] = ", ".join(f"{name} {value}" for name, value in shown.items())
    found |= directories.facts(judged) | composefs.facts(judged) | stacks.facts(judged, facts)
    return {name: str(value) for name, value in found.items() if value is not None}


METHODS = {"io.mountd.Mount.Mount": mount, "io.mountd.Mount.Explain": explain}
