"""The top of a stack on the route of a request: what takes what is written, made for this one stack.

It was judged as a tmpfs or as a directory to write to. What is in a directory stays there when the stack is
gone, and is what the next one over it shows. Two at a time would take each other's work away, so that the
ledger sees to it that there is one.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mountd.caller.identify import given_namespace
from mountd.errors import NotSupported
from mountd.execute.run import Inputs, run
from mountd.execute.top import Top
from mountd.plan.top import plan_top
from mountd.service import directories
from mountd.service.layers import TOP, at_part

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mountd.fds import OwnedFd
    from mountd.service.context import RequestContext
    from mountd.service.mount import Judged

# That overlayfs can work in: it takes extended attributes, whiteouts and files without names.
FILE_SYSTEMS = ("bcachefs", "btrfs", "ext4", "f2fs", "tmpfs", "xfs")
MODE_BITS = 0o1777


@contextmanager
def made(judged: Judged | None, layers: Sequence[OwnedFd], context: RequestContext) -> Iterator[Top | None]:
    """Have the top that was allowed, if one was, over `layers`; what was made of it goes if that fails.

    Raises what `execute.run` and `directories.make` do, UserNamespaceNotPermitted, BadFileDescriptor,
    NotSupported, and InUse for a directory that another stack has for its top.
    """
    if judged is None:
        yield None
        return
    # The root directory of a stack has the mode that its topmost has, unless it has one from before.
    mode = os.fstat(layers[0].fileno()).st_mode & MODE_BITS
    with at_part(TOP):
        top = opened(judged, mode, context)
    try:
        with at_part(TOP):
            if judged.inspected.source.directory is not None and context.claim is not None:
                for name in top.names():
                    context.claim(name)
        yield top
    except BaseException:
        top.discard()
        raise
    finally:
        top.close()


def opened(judged: Judged, mode: int, context: RequestContext) -> Top:
    """Return the top with its two directories."""
    request, inspected = judged.request, judged.inspected
    userns_fd, directory = request.userns_fd, inspected.source.directory
    if directory is not None and directory.file_system not in FILE_SYSTEMS:
        raise NotSupported(
            f"writing to a directory on {directory.file_system}",
            hint=f"use one on {', '.join(FILE_SYSTEMS)}",
        )
    namespace = None if userns_fd is None else given_namespace(userns_fd, judged.caller).namespace
    plan, owner = plan_top(
        inspected.source,
        inspected.evidence.ownership,
        judged.decision,
        judged.caller,
        request.idmap.kind,
        namespace,
        judged.uids,
        judged.gids,
    )
    if directory is not None:
        mount = directories.run_plan(judged, plan, context)
    else:
        mount = run(plan, Inputs(image_fd=None, userns_fd=userns_fd, seal=context.seal))
    return Top(mount, owner, mode)
