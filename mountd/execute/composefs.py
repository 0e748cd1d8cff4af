"""Making a composefs: an overlay of a mount of metadata over object directories, each as a descriptor."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from mountd.errors import NotSupported, SyscallError
from mountd.execute.overlay import SOURCE, TYPE
from mountd.kernel import capabilities
from mountd.kernel.fs_context import FsContext

if TYPE_CHECKING:
    from collections.abc import Sequence

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
HINT = "use Linux 6.15 or newer"


def create(operation: MakeComposefs, layers: Sequence[int]) -> FsContext:
    """Return the context of a new composefs of `layers`, borrowed: the metadata, then the directories.

    It has clones of them, so that they can be closed. Raises SyscallError, and NotSupported for a kernel
    without overlay, or whose overlay has no data-only layers or takes no mounts that are attached nowhere.
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
        set_layers(context, layers, verify=operation.verify)
        # The overlay keeps the rights of this moment; for objects, the mapping of their ids takes them away.
        with capabilities.reading_everything():
            context.create()
    except BaseException:
        context.close()
        raise
    return context


def set_layers(context: FsContext, layers: Sequence[int], *, verify: bool) -> None:
    """Say which mounts it is of. Raises SyscallError, NotSupported."""
    metadata, *objects = layers
    try:
        if verify:
            context.set_string("verity", "require")
        context.set_fd("lowerdir+", metadata)
        for layer in objects:
            context.set_fd("datadir+", layer)
    except SyscallError as error:
        if error.errno != errno.EINVAL:
            raise
        raise NotSupported("making a composefs of mounts that are attached nowhere", hint=HINT) from None
