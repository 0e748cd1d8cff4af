"""Stacks on the route of a request: layers that are judged one by one, and one overlay of them all.

Each layer is a request of its own, with the whole of the route; the stack gets what all of them get. So a
stack shows nothing that could not be had apart, and adds nothing but which file hides which. What takes what
is written to it, its top, is judged as a source to write to as well.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from mountd.errors import NotSupported
from mountd.evidence.model import Evidence
from mountd.execute.run import Inputs, run
from mountd.fds import close_all
from mountd.kernel.compat import mount_id_and_device
from mountd.plan.stack import plan_stack
from mountd.service import tops
from mountd.service.inspection import Inspected
from mountd.service.layers import TOP, about_part, at_part, name_of
from mountd.source.model import Source, SourceKind
from mountd.store.layering import StoredLayer
from mountd.trust.decide import Decision
from mountd.trust.encrypted import JUDGED_LATER, is_locked
from mountd.trust.policy import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mountd.errors import MountdError
    from mountd.execute.top import Top
    from mountd.fds import OwnedFd
    from mountd.service.context import RequestContext
    from mountd.service.mount import Judged
    from mountd.service.requests import MountRequest

T = TypeVar("T")
OVERLAY = "overlay"
NOTHING = Inspected(Source(SourceKind.STACK, None, None, None), Evidence(None, "it has no location", False))
BETWEEN = ", "  # what is known of one layer and what is of the next
MAXIMUM_SHOWN = 1024  # characters of all sources in the journal
STRICTEST = (Verdict.DENY, Verdict.ASK, Verdict.ALLOW)


def parts_of(layers: Sequence[T], top: T | None) -> list[tuple[str | None, T]]:
    """Return the layers, the topmost first, and then the top, each with what it is called on the wire.

    A single layer is what the request names as its source.
    """
    names = [name_of(number) if len(layers) > 1 else None for number in range(len(layers))]
    found: list[tuple[str | None, T]] = list(zip(names, layers, strict=True))
    return found if top is None else [*found, (TOP, top)]


def judge_parts(
    request: MountRequest, judge: Callable[[MountRequest], Judged], context: RequestContext
) -> tuple[tuple[Judged, ...], Judged | None]:
    """Have each layer judged by `judge`, and the top. Raises what that does, naming the part.

    The journal is told of all sources.
    """
    found: list[Judged] = []
    for where, each in parts_of(request.layers, request.top):
        for name in ("source", "digest"):
            context.notes.pop(name, None)
        with at_part(where):
            layer = judge(each)
            check_uses(layer.decision)
        found.append(layer)
    context.notes.pop("digest", None)
    # Those of one image that was pulled have its name.
    sources = BETWEEN.join(dict.fromkeys(layer.source or "unknown" for layer in found))
    context.notes["source"] = sources[:MAXIMUM_SHOWN]
    top = None if request.top is None else found.pop()
    return tuple(found), top


def check_uses(decision: Decision) -> None:
    """Raise NotSupported for a layer that would be several mounts."""
    if len(decision.uses) > 1:
        raise NotSupported(
            "a disk image with several partitions as a layer", hint="have an imagePolicy use one of them"
        )


def of_layers(judged: Judged, context: RequestContext) -> Judged:
    """Return a stack with what was decided about its layers."""
    decision = decision_of(judged.layers, judged.top)
    context.note_decision(decision, OVERLAY)
    return replace(judged, decision=decision)


def decision_of(layers: Sequence[Judged], top: Judged | None = None) -> Decision:
    """Return what was decided about a stack: the strictest of what was about its layers and its top.

    Whether it can be written to is up to the rule about the top alone: what is in a layer never changes.
    """
    parts = parts_of(layers, top)
    decisions = [part.decision for _, part in parts]
    worst = min(range(len(decisions)), key=lambda number: STRICTEST.index(decisions[number].verdict))
    decision = decisions[worst]
    return Decision(
        verdict=decision.verdict,
        # What several rules allow together is none of them's to answer for when it is asked later.
        rule=decision.rule if decision.verdict is Verdict.DENY else joined(each.rule for each in decisions),
        trusted_by=joined(each.trusted_by for each in decisions),
        reason=said_of(parts[worst][0], decision.reason)
        if decision.verdict is not Verdict.ALLOW
        else allowed_because(layers, top),
        hint=decision.hint,
        steps=tuple(
            replace(step, reason=said_of(where, step.reason))
            for where, each in parts
            for step in each.decision.steps
        ),
        error=None if decision.error is None else about(decision.error, parts[worst][0]),
        read_only=top is None,
        attributes=frozenset().union(*(each.attributes for each in decisions)),
        options=(),
        signer=joined(each.signer for each in decisions),
        digest=joined(layer.decision.digest or layer.inspected.evidence.digest for layer in layers),
        attach=tuple(each for each in decision.attach if all(each in other.attach for other in decisions)),
        max_mounts=min((each.max_mounts for each in decisions if each.max_mounts is not None), default=None),
    )


def allowed_because(layers: Sequence[Judged], top: Judged | None) -> str:
    """Return why a stack is allowed, all of whose parts are."""
    reason = f"each of its {len(layers)} layers is allowed" + (", and so is its top" if top else "")
    if any(is_locked(layer.inspected.source, layer.decision.uses) for layer in layers):
        reason += f"; {JUDGED_LATER}"
    return reason


def said_of(where: str | None, text: str) -> str:
    """Return `text` with the part that it is about."""
    return text if where is None else f"{where}: {text}"


def about(error: MountdError, where: str | None) -> MountdError:
    """Return `error` with the part that it is about."""
    return error if where is None else about_part(error, where)


def joined(texts: Iterable[str | None]) -> str | None:
    """Return what is known of the layers, each once; None if nothing is."""
    return BETWEEN.join(dict.fromkeys(text for text in texts if text is not None)) or None


def make(
    judged: Judged,
    context: RequestContext,
    make_layer: Callable[[Judged, RequestContext], list[OwnedFd]],
    note: Callable[[OwnedFd], None] | None,
) -> OwnedFd:
    """Carry out what was decided about a stack and return the detached mount.

    Raises what `make_layer` and `execute.run` do. Nothing is left then.
    """
    mounts: list[OwnedFd] = []
    source = context.notes.get("source")
    try:
        for where, layer in parts_of(judged.layers, None):
            with at_part(where):
                mounts += make_layer(layer, context)
        context.layers += [mount_id_and_device(mount.fileno())[1] for mount in mounts]
        with tops.made(judged.top, mounts, context) as top:
            inputs = Inputs(
                image_fd=None,
                userns_fd=None,
                seal=context.seal,
                note=note,
                naming=context.naming,
                layers=[mount.fileno() for mount in mounts],
                top=top,
            )
            owner = None if top is None else top.owner
            plan = plan_stack(judged.decision, judged.caller, len(mounts), owner, pulled_as(judged))
            return writable(run(plan, inputs), top)
    finally:
        if source is not None:
            context.notes["source"] = source
        # An overlay has clones of its layers.
        close_all(mounts)


def pulled_as(judged: Judged) -> str | None:
    """Return what a stack was asked for as that is one image that was pulled, None for any other."""
    named = {
        each.wanted if isinstance(each := layer.request.stored, StoredLayer) else None
        for layer in judged.layers
    }
    return named.pop() if len(named) == 1 else None


def writable(mount: OwnedFd, top: Top | None) -> OwnedFd:
    """Return `mount` if it can be written to where it has a top; else close it and raise NotSupported.

    The kernel makes a stack read-only where it cannot do its work in the top, and says so only in its log.
    """
    if top is None or not os.fstatvfs(mount.fileno()).f_flag & os.ST_RDONLY:
        return mount
    mount.close()
    raise NotSupported(
        "writing to this top, in which the kernel cannot work", hint="use another directory; dmesg says why"
    )


def facts(judged: Judged, of: Callable[[Judged], dict[str, str]]) -> dict[str, object]:
    """Return what was found out about each layer by `of`, as text for people."""
    found: dict[str, object] = {"layers": len(judged.layers) or None}
    parts = [(f"layers[{number}]", layer) for number, layer in enumerate(judged.layers)]
    for where, part in parts if judged.top is None else [*parts, ("top", judged.top)]:
        known = of(part)
        known.pop("caller", None)
        found |= {f"{where}: {name}": text for name, text in known.items()}
    return found
