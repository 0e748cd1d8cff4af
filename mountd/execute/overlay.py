"""Making an overlay of mounts that are attached nowhere: each is handed over as a descriptor."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from mountd.errors import NotSupported, SyscallError
from mountd.kernel import capabilities
from mountd.kernel.fs_context import FsContext

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mountd.execute.naming import Naming
    from mountd.plan.operations import MakeOverlay

    Option = tuple[str, str]

TYPE = "overlay"
SOURCE = "mountd"  # which an overlay shows and does nothing with
LAYER, DATA = "lowerdir+", "datadir+"
# By what kernels refuse mounts that are attached nowhere: when they are named, or when it is made.
NOT_TAKEN = (errno.EBADF, errno.EINVAL)
UNKNOWN = "Unknown parameter"  # what a kernel says that has no such option
HINT = "use Linux 6.8 or newer"


def create(operation: MakeOverlay, layers: Sequence[int], naming: Naming | None = None) -> FsContext:
    """Return the context of a new overlay; `layers`, borrowed, are mounts, the topmost first.

    Raises as `create_of` does.
    """
    if len(layers) != operation.layers:
        raise ValueError("there are not as many layers as were planned")
    names = [LAYER] * len(layers)
    return create_of(operation.options, names, layers, naming, "a stack")


def create_of(
    options: Iterable[Option], names: Sequence[str], layers: Sequence[int], naming: Naming | None, what: str
) -> FsContext:
    """Return the context of a new overlay with these options; `names` say what each of `layers` is to it.

    It has clones of the layers, which are borrowed, so that they can be closed. Before Linux 6.15, overlay
    takes none that is attached nowhere; then they are where `naming` puts them meanwhile. `what` is it for,
    for people. Raises SyscallError, and NotSupported for a kernel without overlay, or whose overlay cannot
    have its layers one by one.
    """
    options = tuple(options)
    try:
        return made_of(options, names, layers)
    except SyscallError as error:
        if error.errno == errno.ENODEV:
            raise NotSupported(f"overlay, which {what} needs", hint="have root load the module") from None
        if error.errno not in NOT_TAKEN:
            raise
        if naming is None:
            raise NotSupported(f"making {what} by the overlay of this kernel", hint=HINT) from None
    try:
        with naming.attached(layers) as paths:
            return made_of(options, names, paths)
    except SyscallError as error:
        if not any(UNKNOWN in line for line in error.log):
            raise
        raise NotSupported(f"making {what} by the overlay of this kernel", hint=HINT) from None


def made_of(options: Iterable[Option], names: Sequence[str], layers: Iterable[int | str]) -> FsContext:
    """Return the context of one of these layers, which are descriptors or paths. Raises SyscallError."""
    context = FsContext.open(TYPE)
    try:
        context.set_string("source", SOURCE)
        context.set_flag("ro")
        for name, value in options:
            context.set_string(name, value)
        for name, layer in zip(names, layers, strict=True):
            if isinstance(layer, int):
                context.set_fd(name, layer)
            else:
                context.set_string(name, layer)
        # The overlay keeps the rights of this moment.
        with capabilities.reading_everything():
            context.create()
    except BaseException:
        context.close()
        raise
    return context
