"""Making an overlay of mounts that are attached nowhere: each is handed over as a descriptor."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from mountd.errors import NotSupported, SyscallError
from mountd.kernel import capabilities
from mountd.kernel.fs_context import FsContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mountd.plan.operations import MakeOverlay

TYPE = "overlay"
SOURCE = "mountd"  # which an overlay shows and does nothing with


def create(operation: MakeOverlay, layers: Sequence[int]) -> FsContext:
    """Return the context of a new overlay; `layers`, borrowed, are mounts, the topmost first.

    The overlay has clones of them, so that they can be closed. Raises SyscallError, and NotSupported for a
    kernel that has no overlay, or takes no descriptors of mounts that are attached nowhere (before Linux
    6.15).
    """
    if len(layers) != operation.layers:
        raise ValueError("there are not as many layers as were planned")
    try:
        context = FsContext.open(TYPE)
    except SyscallError as error:
        if error.errno != errno.ENODEV:
            raise
        raise NotSupported("overlay, which a stack needs", hint="have root load the module") from None
    try:
        context.set_string("source", SOURCE)
        context.set_flag("ro")
        for name, value in operation.options:
            context.set_string(name, value)
        for number, layer in enumerate(layers):
            add(context, layer, first=number == 0)
        # The overlay keeps the rights of this moment.
        with capabilities.reading_everything():
            context.create()
    except BaseException:
        context.close()
        raise
    return context


def add(context: FsContext, layer: int, *, first: bool) -> None:
    """Put a layer below those that are there."""
    try:
        context.set_fd("lowerdir+", layer)
    except SyscallError as error:
        # What one layer is refused for, all are; what only another one is refused for is its own fault.
        if not first or error.errno != errno.EINVAL:
            raise
        raise NotSupported(
            "making an overlay of mounts that are attached nowhere", hint="use Linux 6.15 or newer"
        ) from None
