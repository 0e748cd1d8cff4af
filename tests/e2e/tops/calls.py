"""Asking for stacks that can be written to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mountd.client import MountReply
from mountd.kernel import mount_api
from mountd.request import open_directory
from tests.container import RANGE
from tests.daemon import Daemon
from tests.e2e.calls import Outcome, mount_fds, outcome

INNER_ROOT = RANGE[0][1]  # the root of a container, on the host
MIB = 1 << 20


def source_of(paths: list[Path], top: Path | int | None) -> tuple[dict[str, object], list[int]]:
    """The source, and the descriptors, which are the caller's; `top` is a directory, or so many bytes."""
    fds = [os.open(path, os.O_RDONLY) for path in paths]
    kinds = ["directoryFileDescriptor" if path.is_dir() else "imageFileDescriptor" for path in paths]
    layers = [{kind: number} for number, kind in enumerate(kinds)]
    source: dict[str, object] = {**layers[0]} if len(layers) == 1 else {"layers": layers}
    if isinstance(top, Path):
        source["top"] = {"directoryFileDescriptor": len(fds)}
        opened = open_directory(str(top))
        fds.append(os.dup(opened.fileno()))
        opened.close()
    elif top is not None:
        source["top"] = {"sizeBytes": top}
    return source, fds


def ask(
    daemon: Daemon,
    paths: list[Path],
    top: Path | int | None,
    *,
    own: bool = True,
    method: Callable[..., object] = mount_fds,
    **fields: object,
) -> object:
    """Ask for a stack, for the user namespace that this process is in, if `own`."""
    source, fds = source_of(paths, top)
    if own:
        fields["userNamespaceFileDescriptor"] = len(fds)
        fds.append(os.open("/proc/self/ns/user", os.O_RDONLY))
    try:
        return method(daemon.socket, source, fds, **{"readOnly": False, **fields})
    finally:
        for fd in fds:
            os.close(fd)


def mounted(daemon: Daemon, paths: list[Path], top: Path | int, **fields: object) -> MountReply:
    reply = ask(daemon, paths, top, **fields)  # type: ignore[arg-type]
    assert isinstance(reply, MountReply)
    return reply


def refusal(daemon: Daemon, paths: list[Path], top: Path | int | None, **fields: object) -> Outcome:
    return outcome(lambda: ask(daemon, paths, top, **fields))  # type: ignore[arg-type]


@contextlib.contextmanager
def at_mnt(reply: MountReply) -> Iterator[Path]:
    """Have the mount at /mnt, in a mount namespace of the test's own."""
    mount_api.move_mount(reply.mount.fileno(), "/mnt")
    try:
        yield Path("/mnt")
    finally:
        mount_api.umount("/mnt")
        reply.close()
