"""Stacks on the route of a request: layers that are judged one by one, and one overlay of them all.

Each layer is a request of its own, with the whole of the route; the stack gets what all of them get. So a
stack shows nothing that could not be had apart, and adds nothing but which file hides which.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mountd.errors import NotSupported
from mountd.evidence.model import Evidence
from mountd.execute.run import Inputs, run
from mountd.fds import close_all
from mountd.plan.stack import plan_stack
from mountd.service.inspection import Inspected
from mountd.service.layers import about_layer, at_layer, name_of
from mountd.source.model import Source, SourceKind
from mountd.trust.decide import Decision
from mountd.trust.policy import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mountd.fds import OwnedFd
    from mountd.service.context import RequestContext
    from mountd.service.mount import Judged
    from mountd.service.requests import MountRequest

OVERLAY = "overlay"
NOTHING = Inspected(Source(SourceKind.STACK, None, None, None), Evidence(None, "it has no location", False))
BETWEEN = ", "  # what is known of one layer and what is of the next
MAXIMUM_SHOWN = 1024  # characters of all sources in the journal
STRICTEST = (Verdict.DENY, Verdict.ASK, Verdict.ALLOW)


def judge_layers(
    requests: Sequence[MountRequest], judge: Callable[[MountRequest], Judged], context: RequestContext
) -> tuple[Judged, ...]:
    """Have each layer judged by `judge`. Raises what that does, naming the layer.

    The journal is told of all sources.
    """
    found: list[Judged] = []
    for number, request in enumerate(requests):
        for name in ("source", "digest"):
            context.notes.pop(name, None)
        with at_layer(number):
            layer = judge(request)
            if len(layer.decision.uses) > 1:
                raise NotSupported(
                    "a disk image with several partitions as a layer",
                    hint="have an imagePolicy use one of them",
                )
        found.append(layer)
    context.notes.pop("digest", None)
    # Those of one image that was pulled have its name.
    sources = BETWEEN.join(dict.fromkeys(layer.source or "unknown" for layer in found))
    context.notes["source"] = sources[:MAXIMUM_SHOWN]
    return tuple(found)


def decision_of(layers: Sequence[Judged]) -> Decision:
    """Return what was decided about a stack: the strictest of what was about its layers."""
    decisions = [layer.decision for layer in layers]
    worst = min(range(len(decisions)), key=lambda number: STRICTEST.index(decisions[number].verdict))
    decision = decisions[worst]
    return Decision(
        verdict=decision.verdict,
        # What several rules allow together is none of them's to answer for when it is asked later.
        rule=decision.rule if decision.verdict is Verdict.DENY else joined(each.rule for each in decisions),
        trusted_by=joined(each.trusted_by for each in decisions),
        reason=f"{name_of(worst)}: {decision.reason}"
        if decision.verdict is not Verdict.ALLOW
        else f"each of its {len(layers)} layers is allowed",
        hint=decision.hint,
        steps=tuple(
            replace(step, reason=f"{name_of(number)}: {step.reason}")
            for number, each in enumerate(decisions)
            for step in each.steps
        ),
        error=None if decision.error is None else about_layer(decision.error, worst),
        read_only=True,
        attributes=frozenset().union(*(each.attributes for each in decisions)),
        options=(),
        signer=joined(each.signer for each in decisions),
        digest=joined(layer.decision.digest or layer.inspected.evidence.digest for layer in layers),
        attach=tuple(each for each in decision.attach if all(each in other.attach for other in decisions)),
        max_mounts=min((each.max_mounts for each in decisions if each.max_mounts is not None), default=None),
    )


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
    try:
        for number, layer in enumerate(judged.layers):
            with at_layer(number):
                mounts += make_layer(layer, context)
        inputs = Inputs(
            image_fd=None,
            userns_fd=None,
            seal=context.seal,
            note=note,
            naming=context.naming,
            layers=[mount.fileno() for mount in mounts],
        )
        return run(plan_stack(judged.decision, judged.caller, len(mounts)), inputs)
    finally:
        # An overlay has clones of its layers.
        close_all(mounts)


def facts(judged: Judged, of: Callable[[Judged], dict[str, str]]) -> dict[str, object]:
    """Return what was found out about each layer by `of`, as text for people."""
    found: dict[str, object] = {"layers": len(judged.layers) or None}
    for number, layer in enumerate(judged.layers):
        about = of(layer)
        about.pop("caller", None)
        found |= {f"layers[{number}]: {name}": text for name, text in about.items()}
    return found
