"""Directories on the route of a request: looking at one, and having it mounted.

A directory can be moved and change hands while it is judged. The clone has to be of what was judged, with
the same owner (`execute.run`); and whose it is is found out a second time once it is made, so that whatever
is moved in between is of no use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.caller.identify import given_namespace
from mountd.errors import BadFileDescriptor
from mountd.evidence.directory import collect_ownership
from mountd.execute.run import Inputs, run
from mountd.plan.directory import plan_directory
from mountd.service.requests import DIRECTORY_FIELD
from mountd.source.directory import inspect_directory
from mountd.source.model import Source, SourceKind
from mountd.trust.options import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from mountd.caller.model import Caller
    from mountd.evidence.model import Evidence
    from mountd.fds import OwnedFd
    from mountd.plan.operations import Plan
    from mountd.service.context import RequestContext
    from mountd.service.mount import Judged

MAXIMUM_SHOWN = 1024  # characters of a path in the journal


def look_at(
    fd: int, caller: Caller, context: RequestContext, parameter: str = DIRECTORY_FIELD
) -> tuple[Source, Evidence]:
    """Return what the directory `fd`, borrowed, is, and whose; `parameter` is the field that named it.

    Raises BadFileDescriptor, UnsupportedFileSystem, SyscallError.
    """
    directory = inspect_directory(fd, parameter)
    context.notes["source"] = shown(directory.path_hint or "a directory without a path", MAXIMUM_SHOWN)
    evidence = collect_ownership(fd, directory, caller, context.walker)
    return Source(SourceKind.DIRECTORY, None, None, None, directory=directory), evidence


def make(judged: Judged, context: RequestContext, note: Callable[[OwnedFd], None] | None = None) -> OwnedFd:
    """Carry out what was decided about a directory and return the detached mount.

    `note` is shown it before ids are mapped.

    Raises what `execute.run` does, UserNamespaceNotPermitted, and BadFileDescriptor for a directory that is
    not any more what was judged.
    """
    fd, caller = judged.request.directory_fd, judged.caller
    directory, ownership = judged.inspected.source.directory, judged.inspected.evidence.ownership
    if fd is None or directory is None or ownership is None:
        raise ValueError("there is no directory to be mounted")
    userns_fd = judged.request.userns_fd
    namespace = None if userns_fd is None else given_namespace(userns_fd, caller).namespace
    plan = plan_directory(
        directory,
        ownership,
        judged.decision,
        caller,
        judged.request.idmap.kind,
        namespace,
        judged.uids,
        judged.gids,
    )
    return run_plan(judged, plan, context, note)


def run_plan(
    judged: Judged, plan: Plan, context: RequestContext, note: Callable[[OwnedFd], None] | None = None
) -> OwnedFd:
    """Carry out the plan for a directory, and see that it still is what was judged; raises as `make`."""
    fd, caller = judged.request.directory_fd, judged.caller
    with context.peer.mount_namespace() as mount_namespace:
        inputs = Inputs(
            image_fd=fd,
            userns_fd=judged.request.userns_fd,
            seal=context.seal,
            note=note,
            mount_namespace_fd=mount_namespace.fileno(),
        )
        made = run(plan, inputs)
    try:
        if fd is None or look_at(fd, caller, context) != (
            judged.inspected.source,
            judged.inspected.evidence,
        ):
            raise BadFileDescriptor(DIRECTORY_FIELD, "it was moved or changed hands while it was judged")
    except BaseException:
        made.close()
        raise
    return made


def facts(judged: Judged) -> dict[str, object]:
    """Return what was found out about a directory, as text for people."""
    directory, evidence = judged.inspected.source.directory, judged.inspected.evidence
    if directory is None:
        return {}
    return {
        "owner": f"uid {directory.uid}, gid {directory.gid}",
        "whose": evidence.ownership if evidence.ownership_problem is None else evidence.ownership_problem,
        "path": evidence.root_owned_path if judged.caller.on_host else None,
    }
