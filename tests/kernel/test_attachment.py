"""Attaching a mount by a throw-away child that does not live to tell of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mountd.errors import SyscallError
from mountd.execute import attachment
from mountd.fds import OwnedFd
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from mountd.kernel.mount_info import listmount

IDS = (4290, 4290, ())


@pytest.mark.parametrize("attached", [False, True], ids=["before", "afterwards"])
def test_a_child_that_is_ended_leaves_nothing_attached(tmp_path: Path, attached: bool) -> None:  # noqa: FBT001
    """What is said to have failed is not there."""
    before = listmount()

    def problem(mounted: int | None) -> str | None:
        if (mounted is not None) is attached:
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    with FsContext.open("tmpfs") as context:
        context.create()
        mount = context.mount(MountAttr(0))
    with (
        mount,
        OwnedFd(os.open(tmp_path, os.O_PATH)) as target,
        OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY)) as namespace,
    ):
        with pytest.raises(SyscallError, match="ECHILD"):
            attachment.attach(mount.fileno(), target.fileno(), namespace.fileno(), IDS, problem)
        assert listmount() == before
