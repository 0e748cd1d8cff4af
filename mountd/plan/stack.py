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
FORCED = (
    ("metacopy", "off"),
    ("redirect_dir", "nofollow"),
    ("index", "off"),
    ("nfs_export", "off"),
    ("xino", "off"),
    ("uuid", "null"),
)


def plan_stack(decision: Decision, caller: Caller, layers: int) -> Plan:
    """Return the operations for a stack of so many layers that were all allowed.

    Raises ValueError if it is to be writable.
    """
    if not decision.read_only:
        raise ValueError("a stack to write to was allowed")
    attributes = attributes_of(decision.attributes, decision.read_only)
    operations: list[Operation] = [MakeOverlay(layers, FORCED), MakeMount(attributes)]
    if not caller.is_host_root:
        operations.append(Seal())
    return Plan(tuple(operations))
