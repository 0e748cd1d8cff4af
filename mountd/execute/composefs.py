"""Making a composefs: an overlay of a mount of metadata over object directories, each as a descriptor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.execute.overlay import DATA, LAYER, create_of, refusing_loops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mountd.execute.naming import Naming
    from mountd.kernel.fs_context import FsContext
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
SAME = "two of the directories are the same, or lie within each other"
VERIFIED = ("verity", "require")


def create(operation: MakeComposefs, layers: Sequence[int], naming: Naming | None = None) -> FsContext:
    """Return the context of a new composefs of `layers`, borrowed: the metadata, then the directories.

    For objects, the mapping of their ids takes away the rights that overlay has. Raises as
    `overlay.create_of` does, and InvalidParameter.
    """
    if len(layers) != operation.objects + 1:
        raise ValueError("there are not as many object directories as were planned")
    options = (*OPTIONS, VERIFIED) if operation.verify else OPTIONS
    names = [LAYER] + [DATA] * operation.objects
    with refusing_loops("source.composefs.objectsFileDescriptors", SAME):
        return create_of(options, names, layers, naming, "a composefs", source=operation.name)
