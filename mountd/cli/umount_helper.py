"""umount.mountd(8): what umount(8) calls for a mount that mountd has attached for a user.

    umount.mountd DIR [-flnrv] [-t TYPE] [-N NAMESPACE]

umount(8) calls it as the user who called umount(8), where /run/mount/utab says “uhelper=mountd” of a mount,
and as root for “helper=mountd”. Its exit status is that of umount(8).

It asks mountd to detach what is mounted at DIR, which mountd does for whom it was attached. Who may unmount
by themselves do that.
"""

from __future__ import annotations

import errno
import getopt
import os
import sys

from mountd.cli.attaching import can_attach, mount_at
from mountd.cli.helper import Place, become_caller, failed, tell
from mountd.cli.report import UsageError, end, say
from mountd.client import Client
from mountd.errors import InUse, MountdError, NotFound, SyscallError
from mountd.kernel import mount_api
from mountd.kernel.flags import Unmount
from mountd.version import VERSION

PROGRAM = "umount.mountd"
USAGE = f"usage: {PROGRAM} DIR [-flnrv] [-t TYPE] [-N NAMESPACE]"


class Wishes:
    """The command line, read."""

    def __init__(self) -> None:
        """The defaults of umount.mountd."""
        self.lazy = self.force = self.verbose = False
        self.namespace: str | None = None


def parse(argv: list[str]) -> tuple[Wishes, str]:
    """Read the command line. Raises getopt.GetoptError."""
    flags, positional = getopt.gnu_getopt(argv, "flnrvt:N:")
    wishes = Wishes()
    for flag, value in flags:
        if flag == "-l":
            wishes.lazy = True
        elif flag == "-f":
            wishes.force = True
        elif flag == "-v":
            wishes.verbose = True
        elif flag == "-N":
            wishes.namespace = value
        # -n is about a file that umount(8) writes, -t about what mount(8) was told, and what is in use stays
        # as it is: there is nothing to be made read-only in its place (-r).
    if len(positional) != 1:
        raise getopt.GetoptError("DIR is needed, and nothing else")
    return wishes, positional[0]


def run(argv: list[str]) -> int:
    """Do what the command line says and return the exit status. Raises KeyboardInterrupt."""
    if argv[:1] in (["-h"], ["--help"]):
        say(USAGE)
        return 0
    if argv[:1] in (["-V"], ["--version"]):
        say(f"{PROGRAM} {VERSION}")
        return 0
    directory = ""
    try:
        wishes, directory = parse(argv)
        unmount(wishes, directory)
        if wishes.verbose:
            tell(PROGRAM, f"{directory} unmounted")
        return 0
    except getopt.GetoptError as error:
        return failed(PROGRAM, UsageError(str(error), hint=USAGE))
    except (MountdError, OSError) as error:
        return failed(PROGRAM, error, where=directory)


def unmount(wishes: Wishes, directory: str) -> None:
    """Unmount what is at `directory`. Raises MountdError, OSError."""
    with Place(wishes.namespace) as place, place.inside():
        # What lies on top of a mount is what its path leads to, and what umount2(2) takes.
        id = mount_at(directory)
        if can_attach():
            flags = Unmount.NOFOLLOW
            if wishes.lazy:
                flags |= Unmount.DETACH
            if wishes.force:
                flags |= Unmount.FORCE
            try:
                mount_api.umount(directory, flags)
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
    return InUse(f"{directory}: it is in use", hint="“fuser -vm DIR” says by whom; or “umount --lazy DIR”")


def main() -> None:
    """Entry point of the console script."""
    become_caller()
    end(PROGRAM, lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
