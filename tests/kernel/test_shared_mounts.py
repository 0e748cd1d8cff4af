"""Keeping a mount for those who ask for the same, after a worker that was killed while it did."""

from __future__ import annotations

import os
from pathlib import Path

from mountd.execute import shared
from mountd.execute.shared import SharedMounts
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, MountAttr, Propagation
from mountd.kernel.fs_context import FsContext
from tests.container import forked


def test_a_name_that_was_never_given_is_not_in_the_way(scratch: Path) -> None:
    directory = scratch / "shared"

    def work() -> bool:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        shared.prepare(str(directory), 1)
        os.symlink("../0/0", directory / shared.NAMES / "name.0")
        mounts = SharedMounts(str(directory), 0, 60.0, mount_api.clone_mount)
        with FsContext.open("tmpfs") as context:
            context.create()
            with context.mount(MountAttr(0)) as mount:
                kept = mounts.keep("name", mount)
        found = mounts.find("name")
        if kept is None or found is None:
            return False
        kept.close()
        found.close()
        mounts.expire(0)
        return os.listdir(directory / shared.NAMES) == []

    assert forked(work)
