"""Making an overlay of mounts that are attached nowhere: each is handed over as a descriptor."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mountd.errors import InvalidParameter, NotSupported, SyscallError
from mountd.execute.naming import is_name
from mountd.kernel import capabilities
from mountd.kernel.acting import acting_as
from mountd.kernel.fs_context import FsContext

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mountd.execute.naming import Naming
    from mountd.execute.top import Top
    from mountd.plan.operations import MakeOverlay

    Option = tuple[str, str]

TYPE = "overlay"
SOURCE = "mountd"  # which an overlay shows and does nothing with, where there is no name for it
LAYER, DATA = "lowerdir+", "datadir+"
UPPER, WORK = "upperdir", "workdir"
# By what kernels refuse mounts that are attached nowhere: when they are named, or when it is made.
NOT_TAKEN = (errno.EBADF, errno.EINVAL)
SAME = "two of the layers are the same directory, or lie within each other"
UNKNOWN = "Unknown parameter"  # what a kernel says that has no such option
HINT = "use Linux 6.8 or newer"


def create(
    operation: MakeOverlay, layers: Sequence[int], naming: Naming | None = None, top: Top | None = None
) -> FsContext:
    """Return the context of a new overlay; `layers`, borrowed, are mounts, the topmost first.

    `top`, borrowed, is there if it is planned. Raises as `create_of` does.
    """
    if len(layers) != operation.layers or (None if top is None else top.owner) != operation.owner:
        raise ValueError("there are not as many layers as were planned, or not that top")
    names = [LAYER] * len(layers)
    parameter = "source.layers" if top is None else "source.top"
    reason = SAME if top is None else f"it and one of the layers lie within each other, or {SAME}"
    with refusing_loops(parameter, reason):
        return create_of(operation.options, names, layers, naming, "a stack", top, source=operation.name)


@contextmanager
def refusing_loops(parameter: str, reason: str) -> Iterator[None]:
    """Raise InvalidParameter for what is refused as the kernel would come to the same directory twice."""
    try:
        yield
    except SyscallError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InvalidParameter(parameter, reason) from None


def create_of(
    options: Iterable[Option],
    names: Sequence[str],
    layers: Sequence[int],
    naming: Naming | None,
    what: str,
    top: Top | None = None,
    *,
    source: str | None = None,
) -> FsContext:
    """Return the context of a new overlay with these options; `names` say what each of `layers` is to it.

    It has clones of the layers and of the `top`, which are borrowed, so that they can be closed. Before
    Linux 6.15, overlay takes none that is attached nowhere; then they are where `naming` puts them
    meanwhile. `what` is it for, for people; `source` is what it shows as such, if
    it can be a name. Raises SyscallError, and NotSupported for a kernel without
    overlay, or whose overlay cannot have its layers one by one.
    """
    options = tuple(options)
    try:
        return made_of(options, names, layers, top, source=source)
    except SyscallError as error:
        if error.errno == errno.ENODEV:
            raise NotSupported(f"overlay, which {what} needs", hint="have root load the module") from None
        if error.errno not in NOT_TAKEN:
            raise
        if naming is None:
            raise NotSupported(f"making {what} by the overlay of this kernel", hint=HINT) from None
    try:
        with naming.attached([*layers, *(() if top is None else (top.mount.fileno(),))]) as paths:
            return made_of(options, names, paths[: len(layers)], top, source=source, by_name=True)
    except SyscallError as error:
        if not any(UNKNOWN in line for line in error.log):
            raise
        raise NotSupported(f"making {what} by the overlay of this kernel", hint=HINT) from None


def made_of(
    options: Iterable[Option],
    names: Sequence[str],
    layers: Iterable[int | str],
    top: Top | None = None,
    *,
    source: str | None = None,
    by_name: bool = False,
) -> FsContext:
    """Return the context of one of these layers, which are descriptors or paths. Raises SyscallError.

    The directories of the top are handed over as descriptors, or with `by_name` by what the kernel calls
    these: a path could lead elsewhere by now.
    """
    context = FsContext.open(TYPE)
    try:
        context.set_string("source", source if source is not None and is_name(source) else SOURCE)
        if top is None:
            context.set_flag("ro")
        for name, value in options:
            context.set_string(name, value)
        for name, layer in zip(names, layers, strict=True):
            if isinstance(layer, int):
                context.set_fd(name, layer)
            else:
                context.set_string(name, layer)
        for name, fd in () if top is None else ((UPPER, top.upper.fileno()), (WORK, top.work.fileno())):
            if by_name:
                context.set_string(name, f"/proc/self/fd/{fd}")
            else:
                context.set_fd(name, fd)
        # The overlay keeps the rights of this moment.
        with (
            capabilities.reading_everything()
            if top is None
            else acting_as(*top.owner, as_root_of_its_files=True)
        ):
            context.create()
    except BaseException:
        context.close()
        raise
    return context
