"""Opening what is encrypted, between the decision and the mount.

1. A request is decided while it is not known yet what is in the volume; the password is not looked at. Where
it is allowed, and consented to, each volume that is used is opened: its header is copied, and read once more
from the copy, to be the one that was judged; then its key is derived and a device made (execute/luks).
2. What the device shows is recognised, as any image is: in a process that can do no harm.
3. With that, the same rule decides again. Types, options and writing are what it judges now.

Of a stack, that holds for each layer: all that is encrypted has the one password, each layer is judged again
by the rule that has allowed it, and the stack by what these say.

So a password is needed for each mount, and proves nothing but itself: whoever may not have the image learns
nothing about its password. Whatever is made here goes with the mount, or with the request.

Deriving a key takes as much memory and time as its maker wanted. So there are few at a time, one for an
owner, and all keys of a request have the time of one.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage, KeyRequired, LimitExceeded, NotSupported
from mountd.execute import luks
from mountd.execute.run import refuse_lease
from mountd.fds import OwnedFd
from mountd.plan.operations import Encryption
from mountd.service import stacks
from mountd.service.consent import lock
from mountd.service.layers import at_part
from mountd.service.phase import Phase
from mountd.source import luks as header
from mountd.source.confined import read_luks, recognise_image
from mountd.trust.policy import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mountd.caller.model import Caller
    from mountd.service.context import RequestContext
    from mountd.service.mount import Judged
    from mountd.source.model import FileSystem, Luks, Partition, Window

    Volume = tuple[Window | None, Luks]  # where in the image it is, None for all of it, and its header
    Part = tuple[str | None, Judged]  # a layer, with what it is called, or what is none

HINT = "give it with --key-file, or on a terminal; in a call, as “password”"
PLACES_FILE = "opening"  # in the runtime directory; a place is a lock on a byte of it
PLACES = 2
OWNER_PLACES = 1 << 16  # where those of owners begin
OPENED = "encrypted images that are opened at once"
OPENED_OF_OWNER = "encrypted images of one owner that are opened at once"
SECONDS_TO_WAIT = 20.0
SECONDS_TO_ATTACH = 20.0  # with luks.SECONDS, less than clients wait
PAUSE = 0.05


def is_encrypted(judged: Judged) -> bool:
    """Tell whether anything that is used of an image is encrypted, or of a layer of a stack."""
    return any(volumes(part) for _, part in parts_of(judged))


def parts_of(judged: Judged) -> list[Part]:
    """Return the layers of a stack, the topmost first, or what is no stack. No top is encrypted."""
    return stacks.parts_of(judged.layers or (judged,), None)


@contextmanager
def opened(judged: Judged, context: RequestContext) -> Iterator[Judged]:
    """Have what is encrypted of an image that is allowed opened; what goes on is about what is in it.

    A password that nothing needs is refused. Raises KeyRequired, WrongKey, InvalidParameter, InvalidImage,
    UnsupportedFileSystem, NotSupported, LimitExceeded, SyscallError, and what the second decision says; of a
    stack, naming the layer.
    """
    password = needed_password(judged)
    if password is None:
        yield judged
        return
    with ExitStack() as stack:
        stack.callback(luks.wipe, password)
        luks.check_available()
        parts = parts_of(judged)
        for where, part in parts:
            if volumes(part):
                with at_part(where):
                    refuse_lease(fd_of(part))
        # The kernel may have to load what decrypts, and to test it, so that no shorter phase begins before.
        context.enter(Phase.TRANSFER, int(SECONDS_TO_WAIT + luks.SECONDS + SECONDS_TO_ATTACH))
        found = []
        for (where, part), keys in zip(parts, keys_to(parts, password, context, stack), strict=True):
            with at_part(where):
                found.append(seen(part, keys, context, stack))
        context.enter(Phase.MOUNT)
        yield decided(judged, found, context)


def keys_to(
    parts: Sequence[Part], password: bytearray, context: RequestContext, stack: ExitStack
) -> list[list[bytearray]]:
    """Return the keys to the volumes of each part, which `stack` wipes at last. Raises what `opened` does.

    They have one place and one time together, however many there are.
    """
    found = []
    with place(parts[0][1].caller, context):
        deadline = time.monotonic() + luks.SECONDS
        for where, part in parts:
            keys = []
            with at_part(where):
                for window, volume in volumes(part):
                    key = key_to(part, volume, window, password, deadline - time.monotonic())
                    stack.callback(luks.wipe, key)
                    keys.append(key)
            found.append(keys)
    return found


def seen(judged: Judged, keys: Sequence[bytearray], context: RequestContext, stack: ExitStack) -> Judged:
    """Return a request with what is in its volumes, and judged by that; `stack` has their devices."""
    inside: dict[Window | None, FileSystem] = {}
    paths: dict[Window | None, str] = {}
    for (window, found), key in zip(volumes(judged), keys, strict=True):
        volume, read_only = Encryption.of(found, window), is_read_only(judged, window)
        device = stack.enter_context(luks.attach(fd_of(judged), volume, key, read_only=read_only))
        luks.wipe(key)
        inside[window] = recognise_image(device.fd.fileno(), found.size, confined=True)
        paths[window] = device.path
    return replace(judged_again(judged, inside, context), opened=paths) if inside else judged


def needed_password(judged: Judged) -> bytearray | None:
    """Return the password, None where nothing is encrypted. Raises KeyRequired and InvalidParameter."""
    first = next(((where, part) for where, part in parts_of(judged) if volumes(part)), None)
    if first is None:
        judged.request.refuse_password()
        return None
    if judged.request.password is None:
        where, part = first
        whole = part.inspected.source.luks is not None
        with at_part(where):
            raise KeyRequired(
                f"{'the image' if whole else 'a partition that is used'} is encrypted", hint=HINT
            )
    return judged.request.password


def volumes(judged: Judged) -> list[Volume]:
    """Return what is to be opened of an image or a layer."""
    whole = judged.inspected.source.luks
    if whole is not None:
        return [(None, whole)]
    parts = [use.partition for use in judged.decision.uses]
    return [(part.window, part.luks) for part in parts if part.luks is not None]


def fd_of(judged: Judged) -> int:
    """Return the descriptor of the image."""
    if judged.inspected.image_fd is None:
        raise NotSupported("an encrypted source that is no image")
    return judged.inspected.image_fd


def is_read_only(judged: Judged, window: Window | None) -> bool:
    """Tell whether a volume is opened read-only."""
    uses = [use for use in judged.decision.uses if use.partition.window == window]
    return uses[0].read_only if uses else judged.decision.read_only


def key_to(
    judged: Judged, found: Luks, window: Window | None, password: bytearray, seconds: float
) -> bytearray:
    """Return the key to a volume, in `seconds`, in which its header is copied as well.

    Raises InvalidImage if that is not the one that was judged.
    """
    deadline = time.monotonic() + seconds
    volume = Encryption.of(found, window)
    with luks.copy_header(fd_of(judged), volume, header.second_of) as copy:
        size = volume.offset + volume.size
        again = read_luks(copy.fileno(), size)
        if Encryption.of(again, window) != volume:
            raise InvalidImage("LUKS: its header is not the one that was judged", offset=volume.start)
        return luks.derive(copy.fileno(), password, volume, deadline - time.monotonic())


def judged_again(judged: Judged, inside: dict[Window | None, FileSystem], context: RequestContext) -> Judged:
    """Return a request with what is in its volumes, and with the decision about that."""
    source = judged.inspected.source
    if source.disk is not None:

        def known(part: Partition) -> Partition:
            return part if part.window not in inside else replace(part, file_system=inside[part.window])

        parts = tuple(known(part) for part in source.disk.partitions)
        source = replace(source, disk=replace(source.disk, partitions=parts))
    else:
        source = replace(source, file_system=inside[None])
    inspected = replace(judged.inspected, source=source)
    decision = context.policy.decide(judged.caller, source, inspected.evidence, judged.request.wishes)
    if decision.verdict is Verdict.ASK and decision.rule == judged.decision.rule:
        # Whoever is asked has consented before.
        decision = replace(decision, verdict=Verdict.ALLOW, error=None, hint=None)
    return replace(judged, inspected=inspected, decision=decision)


def decided(judged: Judged, parts: Sequence[Judged], context: RequestContext) -> Judged:
    """Return a request with `parts`, which are known by now, or the one that it is, and the decision.

    Raises the error of a refusal.
    """
    if judged.layers:
        for where, part in stacks.parts_of(parts, None):
            with at_part(where):
                stacks.check_uses(part.decision)
        judged = stacks.of_layers(replace(judged, layers=tuple(parts)), context)
    else:
        (judged,) = parts
        inside = judged.inspected.source.file_system
        context.note_decision(judged.decision, "gpt" if inside is None else inside.type)
    if judged.decision.error is not None:
        raise judged.decision.error
    context.writable = not judged.decision.read_only
    return judged


@contextmanager
def place(caller: Caller, context: RequestContext) -> Iterator[None]:
    """Have one of the places for those who derive keys; wait a while for one. Raises LimitExceeded."""
    if context.questions is None:
        raise NotSupported("opening encrypted images by what only pulls")
    path = context.questions.with_name(PLACES_FILE)
    deadline = time.monotonic() + SECONDS_TO_WAIT
    with OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)) as fd:
        own = OWNER_PLACES + caller.owner_uid
        for name, offsets in ((OPENED_OF_OWNER, [own]), (OPENED, range(PLACES))):
            while not any(lock(fd.fileno(), offset) for offset in offsets):
                if time.monotonic() > deadline:
                    raise LimitExceeded(name, len(offsets), hint="try again later")
                time.sleep(PAUSE)
        yield
