"""The operations for a stack: one overlay over mounts that were made before, each with its ids mapped.

An overlay cannot have its ids mapped itself; it shows those of its layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.plan.operations import MakeMount, MakeOverlay, Plan, Seal
from mountd.plan.planner import attributes_of

if TYPE_CHECKING:
    from mountd.caller.model import Caller
    from mountd.plan.operations import Operation
    from mountd.trust.decide import Decision

# What an image says in its extended attributes trusted.overlay.* must not lead anywhere: neither to another
# directory of another layer (redirect_dir), nor to the contents of another file (metacopy, verity), nor to
# another inode (index, nfs_export, uuid). Each is said, as the defaults are the kernel configuration's. What
# they do say is which directories and files of lower layers are hidden. Those named user.overlay.* say
# nothing, as userxattr is not asked for. With xino, inode numbers would tell one layer from another.
#
# The same holds for what lies in a top that the caller can write to from outside. There, too, the kernel
# goes by trusted.overlay.*, which neither the caller nor the root of a container can set (it takes
# CAP_SYS_ADMIN on the host), and not by user.overlay.*, which both can. With an upper directory,
# redirect_dir=nofollow also means that none are made: a directory of a layer cannot be renamed (EXDEV), as
# mv(1) is used to. Without metacopy, a file is copied up as a whole. An index would bind the top to these
# very layers.
FORCED = (
    ("metacopy", "off"),
    ("redirect_dir", "nofollow"),
    ("index", "off"),
    ("nfs_export", "off"),
    ("xino", "off"),
    ("uuid", "null"),
)


def plan_stack(
    decision: Decision,
    caller: Caller,
    layers: int,
    owner: tuple[int, int] | None = None,
    name: str | None = None,
) -> Plan:
    """Return the operations for a stack of so many layers that were all allowed.

    `owner` is there for one with a top, by whose ids it is made; `name` is what the mount table is to call
    it. Raises ValueError if it is to be writable without a top. It is never shared: another request has a
    top of its own.
    """
    if decision.read_only is not (owner is None):
        raise ValueError("a stack to write to was allowed without a top, or one with a top to be read only")
    attributes = attributes_of(decision.attributes, decision.read_only)
    operations: list[Operation] = [MakeOverlay(layers, FORCED, owner, name), MakeMount(attributes)]
    if not caller.is_host_root:
        operations.append(Seal())
    return Plan(tuple(operations))
