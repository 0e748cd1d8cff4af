"""A mountd as a service manager has it: what it writes down about mounts is in memory (/run)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from tests.daemon import Daemon


class Serving(Daemon):
    """One instance; its runtime directory is a file system of its own, which goes with it."""

    def __init__(self, directory: Path, policy: str, arguments: Sequence[str] = ()) -> None:
        """As `Daemon`."""
        self._runtime = directory / "run"
        self._runtime.mkdir(parents=True, mode=0o755)
        with FsContext.open("tmpfs") as context:
            context.set_string("mode", "0755")
            context.create()
            with context.mount(MountAttr.NOSUID | MountAttr.NODEV) as mount:
                mount_api.move_mount(mount.fileno(), str(self._runtime))
        try:
            super().__init__(directory, policy, arguments)
        except BaseException:
            mount_api.umount(str(self._runtime))
            raise

    def stop(self) -> int:
        """As `Daemon`."""
        status = super().stop()
        if self._runtime.is_mount():
            mount_api.umount(str(self._runtime))
        return status
