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
# By what kernels refuse mounts that are attached nowhere: when they are named, or when it is made.
NOT_TAKEN = (errno.EBADF, errno.EINVAL)
WHAT = "making a composefs by the overlay of this kernel"
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
        return made_of(operation, layers)
    except SyscallError as error:
        if error.errno == errno.ENODEV:
            raise NotSupported("overlay, which composefs needs", hint="have root load the module") from None
        if error.errno not in NOT_TAKEN:
            raise
        if naming is None:
            raise NotSupported(WHAT, hint=HINT) from None
    try:
        with naming.attached(layers) as paths:
            return made_of(operation, paths)
    except SyscallError as error:
        if error.errno != errno.EINVAL:
            raise
        raise NotSupported(WHAT, hint=HINT) from None


def made_of(operation: MakeComposefs, layers: Sequence[int | str]) -> FsContext:
    """Return the context of one of these layers, which are descriptors or paths. Raises SyscallError."""
    context = FsContext.open(TYPE)
    try:
        context.set_string("source", SOURCE)
        context.set_flag("ro")
        for name, value in OPTIONS:
            context.set_string(name, value)
        if operation.verify:
            context.set_string("verity", "require")
        for number, layer in enumerate(layers):
            name = "datadir+" if number else "lowerdir+"
            if isinstance(layer, int):
                context.set_fd(name, layer)
            else:
                context.set_string(name, layer)
        # The overlay keeps the rights of this moment; for objects, the mapping of their ids takes them away.
        with capabilities.reading_everything():
            context.create()
    except BaseException:
        context.close()
        raise
    return context
