"""Making a composefs: an overlay of a mount of metadata over object directories, each as a descriptor."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mountd.errors import NotSupported, SyscallError
from mountd.execute.overlay import SOURCE, TYPE
from mountd.kernel import capabilities
from mountd.kernel.fs_context import FsContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mountd.execute.naming import Naming
    from mountd.plan.operations import MakeComposefs

# Where the contents of a file are is what the metadata says in trusted.overlay.redirect and .metacopy, and
# it is all that it may say: there is no other layer that a directory could lead to. The rest is as for a
# stack.
OPTIONS = (
    ("metacopy", "on"),
    ("redirect_dir", "on"),
    ("index", "off"),
    ("nfs_export", "off"),
    ("xino", "off"),
    ("uuid", "null"),
)
HINT = "use Linux 6.8 or newer"


def create(operation: MakeComposefs, layers: Sequence[int], naming: Naming | None = None) -> FsContext:
    """Return the context of a new composefs of `layers`, borrowed: the metadata, then the directories.

    It has clones of them, so that they can be closed. Before Linux 6.15, overlay takes none that is attached
    nowhere; then they are where `naming` puts them meanwhile. Raises SyscallError, and NotSupported for a
    kernel without overlay, or whose overlay has no data-only layers.
    """
    if len(layers) != operation.objects + 1:
        raise ValueError("there are not as many object directories as were planned")
    try:
        context = FsContext.open(TYPE)
    except SyscallError as error:
        if error.errno != errno.ENODEV:
            raise
        raise NotSupported("overlay, which composefs needs", hint="have root load the module") from None
    try:
        context.set_string("source", SOURCE)
        context.set_flag("ro")
        for name, value in OPTIONS:
            context.set_string(name, value)
        with ExitStack() as stack:
            set_layers(context, layers, naming, stack, verify=operation.verify)
            # The overlay keeps the rights of this moment; for objects, the mapping of ids takes them away.
            with capabilities.reading_everything():
                context.create()
    except BaseException:
        context.close()
        raise
    return context


def set_layers(
    context: FsContext, layers: Sequence[int], naming: Naming | None, stack: ExitStack, *, verify: bool
) -> None:
    """Say which mounts it is of; `stack` is for what has to last until it is made.

    Raises SyscallError, NotSupported.
    """
    names = ["lowerdir+", *["datadir+"] * (len(layers) - 1)]
    try:
        if verify:
            context.set_string("verity", "require")
        if takes_descriptors(context, layers[0]) or naming is None:
            for name, layer in zip(names[1:], layers[1:], strict=True):
                context.set_fd(name, layer)
        else:
            for name, path in zip(names, stack.enter_context(naming.attached(layers)), strict=True):
                context.set_string(name, path)
    except SyscallError as error:
        if error.errno != errno.EINVAL:
            raise
        raise NotSupported("making a composefs by the overlay of this kernel", hint=HINT) from None


def takes_descriptors(context: FsContext, lowest: int) -> bool:
    """Add the mount `lowest`, borrowed, and return whether that was possible. Raises SyscallError."""
    try:
        context.set_fd("lowerdir+", lowest)
    except SyscallError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
