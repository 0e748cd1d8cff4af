"""The methods of io.mountd.Admin: the daemon itself, for the host's root.

Who asks is found out as for a mount. What only asks leaves no line in the journal; a reload leaves two: what
came of it, by whoever reads the policy, and who asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mountd.errors import DeniedByPolicy, MountdError, NotFound, SyscallError
from mountd.kernel import features
from mountd.service.descriptors import Descriptors
from mountd.service.phase import Phase
from mountd.trust.policy_text import as_toml
from mountd.version import VERSION

if TYPE_CHECKING:
    from mountd.fds import OwnedFd
    from mountd.service.context import Around, PolicyInForce, RequestContext
    from mountd.trust.policy_file import PolicyError
    from mountd.wire.dispatch import Handler, Reply

MAXIMUM_FAULTS = 64
MAXIMUM_REASON = 1000  # characters


def status(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """io.mountd.Admin.Status: describe the daemon."""
    # The listener has this module, and no need of what has limits.
    from mountd.service.limits import limits_of_requests

    around = admit(fds, context)
    found = around.status()
    reply: dict[str, object] = {
        "version": VERSION,
        **{name: found[name] for name in ("pid", "started", "sockets")},
        "policy": policy_state(context.policy),
        "store": store_state(str(found["store"]), context),
        "pool": around.pool(),
        "limits": [*limits_of(found["limits"]), *limits_of(limits_of_requests(context))],
        "kernel": [
            given(name=each.name, available=each.available, detail=each.detail or None)
            for each in features.probe()
        ],
    }
    return given(**reply, liveMounts=live_mounts(context)), []


def metrics(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """io.mountd.Admin.Metrics: return all counters."""
    around = admit(fds, context)
    images, size, _ = stored(context)
    origin = context.policy.origin
    reply = given(
        version=VERSION,
        pool=around.pool(),
        liveMounts=live_mounts(context),
        storeImages=images,
        storeBytes=size,
        policyGeneration=0 if origin is None else origin.generation,
        policySince=0 if origin is None else origin.since,
    )
    return {**reply, **around.metrics()}, []


def get_policy(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """io.mountd.Admin.GetPolicy: return the policy in force as it was written."""
    admit(fds, context)
    origin = context.policy.origin
    # Nothing of a broken policy is in force.
    text = "" if origin is None or context.policy.refusal is not None else as_toml(origin.loaded)
    return {"policy": policy_state(context.policy), "text": text}, []


def reload(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """io.mountd.Admin.Reload: have the policy read again, and say what came of it."""
    around = admit(fds, context)
    # Who had it done is worth a line, unlike who only asks.
    context.caller()
    return around.reload(), []


def admit(fds: list[OwnedFd], context: RequestContext) -> Around:
    """Let nobody but the host's root in. Raises DeniedByPolicy, InvalidParameter, PeerGone, NotSupported."""
    context.enter(Phase.VERIFY)
    Descriptors(fds).check_all_named()
    caller = context.peer.identify()
    if not caller.is_host_root:
        raise DeniedByPolicy(
            "only the host's root administers mountd",
            hint="call as root of the host, with CAP_SYS_ADMIN; root of a container is not",
        )
    if context.around is None:
        raise NotFound("the daemon around this request")
    return context.around


def policy_state(policy: PolicyInForce) -> dict[str, object]:
    """Return a PolicyState."""
    origin = policy.origin
    if origin is None:
        return {
            **dict.fromkeys(("generation", "since", "rules", "keys"), 0),
            **{name: [] for name in ("directories", "files", "faults")},
            "broken": policy.refusal is not None,
        }
    return {
        "generation": origin.generation,
        "since": origin.since,
        "rules": len(policy.policy.rules),
        "keys": len(policy.policy.keys),
        "broken": policy.refusal is not None,
        "directories": [str(each) for each in origin.directories],
        "files": [
            given(path=each.path, mask=each.is_mask, maskedBy=each.masked_by) for each in origin.loaded.files
        ],
        "faults": [fault(each) for each in origin.faults[:MAXIMUM_FAULTS]],
    }


def fault(problem: PolicyError) -> dict[str, object]:
    """Return a PolicyFault."""
    reason = problem.reason[:MAXIMUM_REASON]
    return given(file=problem.file, line=problem.line, key=problem.key, reason=reason)


def store_state(path: str, context: RequestContext) -> dict[str, object]:
    """Return a StoreState."""
    images, size, reason = stored(context)
    maximum = None if context.store is None else context.store.limits.total_bytes
    return given(path=path, images=images, bytes=size, maximumBytes=maximum, reason=reason)


def stored(context: RequestContext) -> tuple[int | None, int | None, str | None]:
    """Return how many images there are, and their bytes; or neither, and the reason."""
    if context.store is None:
        return None, None, "there is no store; the journal of mountd says why"
    try:
        sizes = [record.size for record in context.store.records()]
    except (MountdError, SyscallError) as error:
        return None, None, str(error)
    return len(sizes), sum(sizes), None


def limits_of(limits: object) -> list[dict[str, object]]:
    """Return a dict of numbers as a list of Limit."""
    return [
        {"name": name, "maximum": maximum}
        for name, maximum in (limits.items() if isinstance(limits, dict) else ())
    ]


def live_mounts(context: RequestContext) -> int | None:
    """Return how many delegated mounts are alive, None where nobody keeps a record of them."""
    return None if context.ledger is None else len(context.ledger.records())


def given(**fields: object) -> dict[str, object]:
    """Return the fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


METHODS: dict[str, Handler] = {
    "io.mountd.Admin.Status": status,
    "io.mountd.Admin.Metrics": metrics,
    "io.mountd.Admin.GetPolicy": get_policy,
    "io.mountd.Admin.Reload": reload,
}
