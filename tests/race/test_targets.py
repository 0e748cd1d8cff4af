"""Where a mount is attached: not outside of the image, though a name in it becomes a link meanwhile."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from mountd.cli.container import attach_below
from mountd.errors import SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, MountAttr, MoveMount, OpenTree, Propagation, Unmount
from mountd.kernel.fs_context import FsContext
from tests.container import forked
from tests.race.swapping import Ground, Seen, loses, never_wins

Attach = Callable[[int, Path, int], None]


def a_tmpfs() -> OwnedFd:
    with FsContext.open("tmpfs") as context:
        context.create()
        return context.mount(MountAttr.RDONLY)


def with_names(root: int, path: Path, tree: int) -> None:
    attach_below(root, path.name, tree)


def naive(_: int, path: Path, tree: int) -> None:
    """By name, once the name was seen to be a directory."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        # As mount(2) would, which follows links.
        flags = MoveMount.F_EMPTY_PATH | MoveMount.T_SYMLINKS
        mount_api.move_mount(tree, str(path), flags=flags)


@pytest.mark.parametrize(("attach", "judge"), [(with_names, never_wins), (naive, loses)])
def test_a_directory_of_the_image(ground: Ground, attach: Attach, judge: Callable[..., None]) -> None:
    """Where a mount is attached, /proc says."""
    outside = ground.theirs / "outside"
    root, inner, link = ground.trusted / "root", ground.trusted / "root/proc", ground.trusted / "root/link"
    outside.mkdir()
    inner.mkdir(parents=True)
    link.symlink_to(outside)

    def work() -> None:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with OwnedFd(os.open(root, os.O_RDONLY | os.O_DIRECTORY)) as root_fd, a_tmpfs() as source:

            def check() -> Seen:
                flags = OpenTree.CLONE | OpenTree(0x1000)  # AT_EMPTY_PATH
                with mount_api.open_tree(source.fileno(), "", flags) as tree:
                    with suppress(SyscallError):
                        attach(root_fd.fileno(), inner, tree.fileno())
                    name = f"/proc/self/fd/{tree.fileno()}"
                    place = os.readlink(name)
                    if place == "/":
                        return Seen.REFUSED  # attached nowhere
                    mount_api.umount(name, Unmount.DETACH)
                    return Seen.WON if place == str(outside) else Seen.GOOD

            judge(inner, link, check)

    forked(work)
