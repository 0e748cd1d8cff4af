"""umount.mountd(8): what umount(8) calls for a mount that mountd has attached for a user.

    umount.mountd DIR [-flnrv] [-t TYPE] [-N NAMESPACE]

umount(8) calls it as the user who called umount(8), where /run/mount/utab says “uhelper=mountd” of a mount,
and as root for “helper=mountd”. Its exit status is that of umount(8).

It asks mountd to detach what is mounted at DIR, which mountd does for whom it was attached. Who may unmount
by themselves do that, and ask mountd for what the kernel says is in use, as a tree of several mounts is.
"""

from __future__ import annotations

import errno
import os

from mountd.asking import TIMEOUT, Client
from mountd.cli.attaching import NO_MORE, SECONDS_TO_DETACH, can_attach, mount_at
from mountd.cli.helper import Place, carry_out, read_line, run_program, tell
from mountd.cli.helper import Wishes as CommandLine
from mountd.cli.report import IN_USE, tell_done
from mountd.errors import InUse, NotFound, SyscallError, Unreachable
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
    # Out here: in another mount namespace, the file that says so may be anything.
    able = can_attach()
    in_use = False
    with Place(wishes.namespace) as place, place.inside():
        # What lies on top of a mount is what its path leads to, and what umount2(2) takes.
        id = mount_at(directory)
        if able:
            try:
                moving.unmount(directory, flags_of(wishes))
                return
            except SyscallError as error:
                # Of what is attached in other mount namespaces than this one, mountd takes nothing away.
                in_use = error.errno == errno.EBUSY
                if in_use and place.path is not None:
                    raise busy(directory) from None
                if not in_use and (error.errno != errno.EPERM or place.path is not None):
                    raise
    have_detached(wishes, directory, id, in_use=in_use)


def flags_of(wishes: Wishes) -> int:
    """Return the flags of umount2(2) for what the command line asks for."""
    flags = moving.NOFOLLOW
    if wishes.lazy:
        flags |= moving.DETACH
    if wishes.force:
        flags |= moving.FORCE
    return flags


def have_detached(wishes: Wishes, directory: str, id: int, *, in_use: bool) -> None:
    """Have mountd detach the mount with this id. Raises MountdError.

    `in_use` is whether the kernel has said so, as it does of a tree of mounts, too: mountd takes down those
    that it has attached, and of all others the kernel's word holds.
    """
    try:
        with Client(timeout=SECONDS_TO_DETACH if in_use else TIMEOUT) as client:
            client.detach(id, lazy=wishes.lazy)
    except InUse:
        raise
    except (NotFound, Unreachable) as error:
        if in_use:
            raise busy(directory) from None
        if not isinstance(error, NotFound):
            raise
        raise NotFound(
            f"a mount at {directory} that mountd has attached for uid {os.getuid()}",
            hint="who mounted it can unmount it, and root",
        ) from None


def busy(directory: str) -> InUse:
    """Return the error for what somebody uses."""
    return InUse(f"{directory}: it is in use", hint=IN_USE)


def main() -> NoReturn:
    """Entry point of the console script."""
    run_program(PROGRAM, run)


if __name__ == "__main__":
    main()
