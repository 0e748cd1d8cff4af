"""umount.mountd(8): what umount(8) calls for a mount that mountd has attached for a user.

    umount.mountd DIR [-flnrv] [-t TYPE] [-N NAMESPACE]

umount(8) calls it as the user who called umount(8), where /run/mount/utab says “uhelper=mountd” of a mount,
and as root for “helper=mountd”. Its exit status is that of umount(8).

It asks mountd to detach what is mounted at DIR, which mountd does for whom it was attached. Who may unmount
by themselves do that.
"""

from __future__ import annotations

import errno
import os

from mountd.asking import Client
from mountd.cli.attaching import NO_MORE, can_attach, mount_at
from mountd.cli.helper import Place, carry_out, read_line, run_program, tell
from mountd.cli.helper import Wishes as CommandLine
from mountd.cli.report import IN_USE, tell_done
from mountd.errors import InUse, NotFound, SyscallError
from mountd.kernel import moving

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

PROGRAM = "umount.mountd"
USAGE = f"usage: {PROGRAM} DIR [-flnrv] [-t TYPE] [-N NAMESPACE]"


class Wishes(CommandLine):
    """The command line, read."""

    def __init__(self) -> None:
        """The defaults of umount.mountd."""
        super().__init__()
        self.lazy = self.force = False

    def read(self, argv: list[str]) -> None:
        """Read the command line. Raises UsageError."""
        flags, (directory,) = read_line(argv, "flnrvt:N:", names=["DIR"], usage=USAGE)
        given = dict(flags)
        # -n is about a file that umount(8) writes, -t about what mount(8) was told, and what is in use stays
        # as it is: there is nothing to be made read-only in its place (-r).
        self.lazy, self.force, self.verbose = "-l" in given, "-f" in given, "-v" in given
        self.namespace = given.get("-N")
        self.directory = directory


def run(argv: list[str]) -> int:
    """Do what the command line says and return the exit status. Raises KeyboardInterrupt."""
    wishes = Wishes()
    return carry_out(PROGRAM, USAGE, argv, wishes, lambda: unmount(wishes))


def unmount(wishes: Wishes) -> int:
    """Unmount what the command line names, and return 0. Raises MountdError, OSError."""
    take_away(wishes, wishes.directory)
    if not wishes.verbose:
        return 0
    told = f"{wishes.directory} unmounted"
    return tell_done(f"{PROGRAM}: {told}", NO_MORE, lambda: tell(PROGRAM, told), needed=False)


def take_away(wishes: Wishes, directory: str) -> None:
    """Unmount what is at `directory`. Raises MountdError, OSError."""
    with Place(wishes.namespace) as place, place.inside():
        # What lies on top of a mount is what its path leads to, and what umount2(2) takes.
        id = mount_at(directory)
        if can_attach():
            flags = moving.NOFOLLOW
            if wishes.lazy:
                flags |= moving.DETACH
            if wishes.force:
                flags |= moving.FORCE
            try:
                moving.unmount(directory, flags)
                return
            except SyscallError as error:
                if error.errno == errno.EBUSY:
                    raise busy(directory) from None
                if error.errno != errno.EPERM or place.path is not None:
                    raise
    with Client() as client:
        try:
            client.detach(id, lazy=wishes.lazy)
        except NotFound:
            raise NotFound(
                f"a mount at {directory} that mountd has attached for uid {os.getuid()}",
                hint="who mounted it can unmount it, and root",
            ) from None
        except InUse:
            raise busy(directory) from None


def busy(directory: str) -> InUse:
    """Return the error for what somebody uses."""
    return InUse(f"{directory}: it is in use", hint=IN_USE)


def main() -> NoReturn:
    """Entry point of the console script."""
    run_program(PROGRAM, run)


if __name__ == "__main__":
    main()
