"""io.mountd.Images.Pull: an image from a registry into mountd's store, for those whom the policy lets.

Pulling needs what mounting must not have: the network, and the right to give files away. So there is a
second instance for it (`mountd --only-pull`, mountd-pull.service): the request is judged here, done there,
and what is told on the way is passed on. Nothing of the outcome is believed but the digests, whose records
are in the same store. Where there is no such instance, nothing can be pulled.

What was pulled is root's, and on root's account: the next who asks for it finds it, and nobody but root
removes it. For whom it may be mounted is up to the policy, each time. The tag that it was pulled by leads to
it from then on, for everybody.
"""

from __future__ import annotations

import stat
from contextlib import closing
from typing import TYPE_CHECKING, Any

from mountd.client import Client
from mountd.errors import (
    IMAGES_INTERFACE,
    DeniedByPolicy,
    InvalidParameter,
    MountdError,
    NotFound,
    NotSupported,
    ProtocolError,
    UnsupportedFileSystem,
)
from mountd.service.descriptors import Descriptors
from mountd.service.images import admit, given, image_reply, transferred
from mountd.service.phase import Phase
from mountd.source.confined import recognise_image
from mountd.store import pull, reference
from mountd.store.layering import PulledImage
from mountd.store.pull import BUILD, FETCH, RESOLVE, VERIFY, PullLimits
from mountd.store.record import DIGEST, MAXIMUM_NAME, ROOT, Owner
from mountd.store.store import Known
from mountd.trust.storing import may_pull

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from mountd.caller.model import Caller
    from mountd.fds import OwnedFd
    from mountd.service.context import PolicyInForce, RequestContext
    from mountd.store.pull import Layer, Pulled
    from mountd.store.record import Record
    from mountd.store.reference import Reference
    from mountd.store.store import Store
    from mountd.wire.dispatch import Handler, Stream, Tell

    # What a step of a streaming handler yields, and then returns the records of all layers.
    Steps = Generator[dict[str, object] | Callable[[Tell], object], Any, list[Record]]

METHOD = f"{IMAGES_INTERFACE}.Pull"
PULLING = "pulling from registries"
ENABLE = "an administrator can do “systemctl enable --now mountd-pull.socket”, or start “mountd --only-pull”"
STORE, DONE = "store", "done"
# Each stage may take so many seconds, and comes once. The steps of a pull have deadlines of their own, by
# which they end with a better message.
STAGES = {RESOLVE: 300, FETCH: 3660, VERIFY: 3600, BUILD: 7200, STORE: 7200}
SILENT_SECONDS = 300.0  # between two replies: each tells how far it is several times a second
OF_ROOT = Owner(ROOT, ROOT)


def pull_image(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Stream:
    """io.mountd.Images.Pull, for everybody who may ask."""
    caller, owner, store, wanted = begin(parameters, fds, context)
    check_may_pull(caller, context.policy, wanted)
    # One slot for all of it, whoever does it, and of the caller's.
    with store.slot(owner):
        if context.pull_socket is None or not is_socket(context.pull_socket):
            raise NotSupported(f"{PULLING}: nothing listens at {context.pull_socket}", hint=ENABLE)
        records = yield from pulled_there(wanted, store, context, context.pull_socket)
    return last_reply(records, owner, context)


def pull_for_others(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Stream:
    """io.mountd.Images.Pull of the instance that does nothing else, for the one that has judged already."""
    caller, owner, store, wanted = begin(parameters, fds, context)
    if not caller.is_host_root:
        raise DeniedByPolicy("only root may ask for this", hint="ask mountd itself: “mountctl image pull”")
    records = yield from pulled_here(wanted, store, context)
    return last_reply(records, owner, context)


def begin(
    parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext
) -> tuple[Caller, Owner, Store, Reference]:
    """Read the request and find out who asks."""
    context.enter(Phase.VERIFY)
    Descriptors(fds).check_all_named()
    wanted = reference.parse(parameters["reference"])
    caller, owner, store = admit(context)
    return caller, owner, store, wanted


def check_may_pull(caller: Caller, policy: PolicyInForce, wanted: Reference) -> None:
    """Raise DeniedByPolicy for who may not pull from this repository: root may, and whom a rule lets."""
    if caller.is_host_root:
        return
    if policy.refusal is not None:
        raise policy.refusal
    if not may_pull(policy.policy, caller, wanted.repository):
        raise DeniedByPolicy(
            f"no rule lets this caller have images of {wanted.repository}",
            hint=f"an administrator can pull it, or add a rule with image.registry = “{wanted.repository}” "
            "and require.integrity = [“stored”]",
        )


def last_reply(
    records: list[Record], owner: Owner, context: RequestContext
) -> tuple[dict[str, object], list[OwnedFd]]:
    """Return what a pull ends with, as the caller may see it."""
    context.notes["digest"] = records[0].digest
    images = [image_reply(record, owner) for record in records]
    return given(stage=DONE, image=images[0], layers=images if len(images) > 1 else None), []


def is_socket(path: Path) -> bool:
    """Tell whether there is a socket at a path of root's."""
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False


class Stages:
    """Where a pull is; each new stage is a new deadline."""

    def __init__(self, context: RequestContext) -> None:
        """Nothing is done yet."""
        self._enter = context.enter
        self._last = -1

    def reached(self, stage: str) -> bool:
        """Take note of a stage; tell whether it is one, and none that was left before."""
        number = list(STAGES).index(stage) if stage in STAGES else -1
        if number > self._last:
            self._enter(Phase.TRANSFER, STAGES[stage])
        known = number >= self._last and number >= 0
        self._last = max(self._last, number)
        return known


def pulled_here(wanted: Reference, store: Store, context: RequestContext) -> Steps:
    """Pull, put each layer into the store, and return the records, the lowest layer's first."""
    stages = Stages(context)
    # Layers that are there already count as well: which ones these are is known only once they are made.
    limits = PullLimits(
        compressed=min(PullLimits().compressed, store.limits.image_bytes), stored=store.left()
    )
    with store.workspace() as directory:

        def run(tell: Tell) -> Pulled:
            def progress(stage: str, done: int, total: int) -> None:
                stages.reached(stage)
                tell({"stage": stage, "done": done, **({"total": total} if total else {})})

            return pull.pull(wanted, directory, progress=progress, limits=limits)

        pulled = yield run
        with closing(pulled):
            records = []
            for layer in pulled.layers:
                stages.reached(STORE)
                records.append((yield from stored(wanted, pulled, layer, store, context)))
            image = PulledImage(pulled.provenance, tuple(record.digest for record in records))
            # The last of all: by now everything is verified and there. By its digest alone, no tag moves.
            store.remember(image, wanted.tag, pulled.resolved)
            return records


def stored(
    wanted: Reference, pulled: Pulled, layer: Layer, store: Store, context: RequestContext
) -> Generator[dict[str, object], None, Record]:
    """Put a layer into the store, where it is root's."""

    def judge(fd: int, _: str) -> Known:
        try:
            return Known(recognise_image(fd, layer.size, confined=True))
        except UnsupportedFileSystem:
            return Known()

    name = str(wanted)
    steps = store.adding(
        layer.erofs_fd.fileno(),
        layer.size,
        OF_ROOT,
        name=name if len(name) <= MAXIMUM_NAME else None,
        provenance=pulled.provenance,
        judge=judge,
        within_slot=True,
    )
    moving = transferred(steps, layer.size, context)
    with closing(moving):
        while True:
            try:
                told = next(moving)["progress"]
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            yield {"stage": STORE, **(told if isinstance(told, dict) else {})}


def pulled_there(wanted: Reference, store: Store, context: RequestContext, path: Path) -> Steps:
    """Have the other instance pull; return the records of what it says that it has stored.

    Raises what it refuses with, and NotSupported where it cannot be asked.
    """
    stages = Stages(context)
    reply: dict[str, object] = {}
    context.enter(Phase.TRANSFER, STAGES[RESOLVE])
    try:
        with Client(str(path), timeout=SILENT_SECONDS) as client:
            for reply in client.call_more(METHOD, {"reference": str(wanted)}, []):
                stage = reply.get("stage")
                if isinstance(stage, str) and stages.reached(stage):
                    yield given(stage=stage, done=number(reply, "done"), total=number(reply, "total"))
    except (ProtocolError, InvalidParameter) as error:
        raise not_asked(error) from None
    except MountdError as error:
        # What has no name on the wire is of this connection.
        raise (error if error.wire_name else not_asked(error)) from None
    context.enter(Phase.VERIFY)
    layers = reply.get("layers")
    images = layers if isinstance(layers, list) and layers else [reply.get("image")]
    return [record_of(image, wanted, store) for image in images]


def record_of(image: object, wanted: Reference, store: Store) -> Record:
    """Return the record of an image that another instance says that it has pulled. Raises NotFound."""
    digest = image.get("digest") if isinstance(image, dict) else None
    if isinstance(digest, str) and DIGEST.fullmatch(digest):
        record = store.record(digest)
        # From where need not be compared: bytes that are a whole image elsewhere keep that as their origin.
        if record.belongs_to(ROOT) and record.provenance is not None:
            return record
    raise NotFound(f"{wanted} after it was pulled", hint="the journal of mountd-pull.service has more")


def number(reply: dict[str, object], field: str) -> int | None:
    """Return a number of a reply, None for what is none."""
    value = reply.get(field)
    return value if type(value) is int else None


def not_asked(error: MountdError) -> NotSupported:
    """Return the error for an instance that pulls and does not answer as it should."""
    return NotSupported(f"{PULLING}: {error}", hint="the journal of mountd-pull.service says why")


METHODS: dict[str, Handler] = {METHOD: pull_image}
# All that is served by the instance that only pulls.
FOR_OTHERS: dict[str, Handler] = {METHOD: pull_for_others}
