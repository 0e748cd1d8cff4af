"""What is seen of a composefs, and what is seen of it by its own tools."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation
from tests.container import forked
from tests.e2e.composefs.trees import Trees

Told = dict[str, tuple[object, ...]]


def listing(root: int | str) -> Told:
    """All that can be seen of a tree, by root."""
    top = root if isinstance(root, str) else f"/proc/self/fd/{root}"
    found: Told = {}
    for directory, directories, files in os.walk(f"{top}/."):
        for name in (".", *directories, *files):
            path = f"{directory}/{name}"
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            contents: object = None
            if kind == stat.S_IFREG:
                contents = Path(path).read_bytes()
            elif kind == stat.S_IFLNK:
                contents = os.readlink(path)
            attributes = [
                (each, os.getxattr(path, each, follow_symlinks=False))
                for each in os.listxattr(path, follow_symlinks=False)
            ]
            found[os.path.normpath(path.removeprefix(top))] = (
                oct(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_size if kind == stat.S_IFREG else None,
                status.st_mtime_ns,
                contents,
                attributes,
            )
    return found


def in_mount_namespace(work: Callable[[], Told]) -> Told:
    """What `work` returns in a mount namespace of its own."""

    def there() -> Told:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        return work()

    return forked(there)


def by_mount_composefs(trees: Trees) -> Told:
    """What root sees that mounts it with the tool of composefs."""

    def work() -> Told:
        # It makes a mount of its own below /tmp, where else it would stay for a while.
        command = ["mount.composefs", "-o", f"basedir={trees.objects}", trees.image, "/mnt"]
        subprocess.run(command, check=True)
        return listing("/mnt")

    return in_mount_namespace(work)
