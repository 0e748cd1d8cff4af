"""The ways to mount the tree: each by hand, as root does it, and as a container asks mountd for it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mountd import request
from mountd.client import Client, Request, attach, attach_reply, open_target
from mountd.fds import OwnedFd
from mountd.kernel import loop_device, mount_api
from mountd.kernel.flags import MountAttr, OpenTree
from mountd.kernel.fs_context import FsContext
from tests.bench.seed.images import MKCOMPOSEFS, Images

AT_FDCWD = -100
POLICY = """
[[rule]]
name = "images of the bench"
image = {{ location = ["{0}/*", "{0}/buffered/*"] }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["erofs"], idmap = ["namespace"] }}
verdict = "allow"

[[rule]]
name = "directories of the bench"
image = {{ kind = "directory", location = "{0}/*" }}
caller = {{ any = true }}
require = {{ ownership = ["root"] }}
grant = {{ idmap = ["namespace"] }}
verdict = "allow"
"""


@dataclass(frozen=True, slots=True)
class Way:
    """How to mount the tree: `direct` returns the mount, or None if it has attached it where it is told to.

    `source` and `wishes` are what mountd is asked for, as `Request` takes them. `direct_io` is what the loop
    device below has to be found doing, "0" or "1", None without one. `missing` says why it cannot be
    measured.
    """

    name: str
    direct: Callable[[Path], OwnedFd | None]
    source: str
    wishes: Mapping[str, Any] = field(default_factory=dict)
    direct_io: str | None = None
    missing: str | None = None

    def by_hand(self, target: Path) -> None:
        """Mount it as root."""
        mount = self.direct(target)
        if mount is not None:
            with mount:
                attach(mount.fileno(), str(target))

    def by_mountd(self, target: Path, socket: Path) -> None:
        """Ask mountd for it, mapped into the user namespace of this process."""
        with (
            open_target(str(target)) as directory,
            Client(str(socket)) as client,
            Request(self.source, **self.wishes) as asked,
            client.mount(asked.source, asked.fds, **asked.parameters) as reply,
        ):
            attach_reply(reply, directory.fileno(), str(target))


def ways(images: Images) -> list[Way]:
    """Return all of them, in the order of the table."""
    upper, lower = images.layers
    return [
        Way("plain directory", lambda _: bind(images.tree), str(images.tree)),
        Way("erofs, file-backed", lambda _: erofs(str(images.erofs)), str(images.erofs)),
        Way(
            "erofs on loop",
            lambda _: erofs_on_loop(images, images.buffered, direct_io=False),
            str(images.buffered),
            direct_io="0",
        ),
        Way(
            "erofs on loop with direct I/O",
            lambda _: erofs_on_loop(images, images.disk, direct_io=True),
            str(images.disk),
            direct_io="1",
        ),
        Way("overlay over erofs", lambda _: overlay(images.layers), str(lower), {"layers": [str(upper)]}),
        composefs(images),
    ]


def composefs(images: Images) -> Way:
    """COMPOSEFS: the one place that knows how it is asked for, and whether it can be."""
    image, objects = images.composefs, str(images.objects)
    name = "composefs"
    if not (shutil.which(MKCOMPOSEFS) and hasattr(request, "COMPOSEFS")):
        return Way(name, lambda _: None, "", missing="not built")
    command = ["mount.composefs", "-o", f"basedir={objects}", str(image)]

    def direct(target: Path) -> None:
        subprocess.run([*command, target], check=True, stdin=subprocess.DEVNULL)

    return Way(name, direct, f"composefs:{image}", {"objects": [objects]})


def bind(directory: Path) -> OwnedFd:
    """Return another mount of a directory."""
    return mount_api.open_tree(AT_FDCWD, str(directory), OpenTree.CLONE | OpenTree.CLOEXEC)


def erofs(source: str) -> OwnedFd:
    """Return a mount of an image or block device."""
    with FsContext.open("erofs") as context:
        context.set_string("source", source)
        context.set_flag("ro")
        context.create()
        return context.mount(MountAttr.RDONLY)


def erofs_on_loop(images: Images, disk: Path, *, direct_io: bool) -> OwnedFd:
    """Return a mount of the partition of a disk image."""
    with OwnedFd(os.open(disk, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        loop = loop_device.attach(
            fd.fileno(), read_only=True, direct_io=direct_io, offset=images.offset, size_limit=images.size
        )
        try:
            return erofs(loop.path)
        finally:
            loop.close()


def overlay(layers: tuple[Path, Path]) -> OwnedFd:
    """Return an overlay of images, the upper one first, with the kernel's defaults."""
    with ExitStack() as stack:
        context = stack.enter_context(FsContext.open("overlay"))
        context.set_flag("ro")
        for layer in layers:
            context.set_fd("lowerdir+", stack.enter_context(erofs(str(layer))).fileno())
        context.create()
        return context.mount(MountAttr.RDONLY)
