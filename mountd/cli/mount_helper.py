"""mount.mountd(8): what mount(8) calls for `mount -t mountd IMAGE DIR`.

    mount.mountd SPEC DIR [-sfnv] [-o OPTIONS] [-t TYPE] [-N NAMESPACE]

It starts in milliseconds, and so imports little. Its arguments and exit status are those that mount(8)
documents for helpers (EXTERNAL HELPERS, EXIT STATUS).
"""

from __future__ import annotations

import getopt
import sys

from mountd.cli.report import EXIT_INTERRUPTED, EXIT_USAGE, fail
from mountd.client import Client, Request, attach
from mountd.errors import DeniedByPolicy, MountdError, OptionNotPermitted
from mountd.version import VERSION

USAGE = "usage: mount.mountd SPEC DIR [-sfnvrw] [-o OPTIONS] [-t TYPE]"
# For mount(8), for the init system, or without meaning here.
IGNORED = {"defaults", "auto", "noauto", "_netdev", "nofail", "user", "nouser", "users", "owner", "group"}
IGNORED_NAMES = {"user", "uhelper", "helper", "comment"}
NOT_DONE = {
    "remount": "mount it again instead",
    "bind": "mount it without -t mountd",
    "move": "use mount(8) -M",
}


class Wishes:
    """The command line, read."""

    def __init__(self) -> None:
        """The defaults of mount.mountd."""
        self.fake = self.sloppy = self.verbose = False
        self.read_only = True
        self.type: str | None = None
        self.options: list[str] = []
        self.userns: str | None = None
        self.idmap: str | None = None

    def read_option(self, option: str) -> None:
        """Take one entry of -o. Raises OptionNotPermitted."""
        name, _, value = option.partition("=")
        if option in ("ro", "rw"):
            self.read_only = option == "ro"
        elif option in IGNORED or name in IGNORED_NAMES:
            return
        elif option in NOT_DONE:
            raise OptionNotPermitted(option, "mount.mountd does not do that", hint=NOT_DONE[option])
        elif name == "mountd.userns" and value:
            self.userns = value
        elif name == "mountd.idmap" and value:
            self.idmap = value
        elif name.startswith("mountd."):
            if not self.sloppy:
                raise OptionNotPermitted(
                    option, "mount.mountd does not know it", hint="it knows mountd.userns= and mountd.idmap="
                )
        else:
            self.options.append(option)


def parse(argv: list[str]) -> tuple[Wishes, list[str]]:
    """Read the command line. Raises getopt.GetoptError, OptionNotPermitted."""
    flags, positional = getopt.gnu_getopt(argv, "sfnvrwhVo:t:N:", ["help", "version"])
    wishes = Wishes()
    wishes.sloppy = any(flag == "-s" for flag, _ in flags)
    for flag, value in flags:
        if flag in ("-h", "--help"):
            print(USAGE)  # noqa: T201
            sys.exit(0)
        elif flag in ("-V", "--version"):
            print(f"mount.mountd {VERSION}")  # noqa: T201
            sys.exit(0)
        elif flag == "-N":
            raise getopt.GetoptError("-N is not supported: run it within the mount namespace instead")
        elif flag in ("-r", "-w"):
            wishes.read_only = flag == "-r"
        elif flag == "-f":
            wishes.fake = True
        elif flag == "-v":
            wishes.verbose = True
        elif flag == "-t":
            wishes.type = value.removeprefix("mountd").removeprefix(".") or None
        elif flag == "-o":
            for option in filter(None, value.split(",")):
                wishes.read_option(option)
    if len(positional) != 2:
        raise getopt.GetoptError("SPEC and DIR are needed")
    return wishes, positional


def run(argv: list[str]) -> int:
    """Do what the command line says and return the exit status."""
    try:
        wishes, (spec, directory) = parse(argv)
    except getopt.GetoptError as error:
        print(f"mount.mountd: {error}; {USAGE}", file=sys.stderr)  # noqa: T201
        return EXIT_USAGE
    except MountdError as error:
        return fail("mount.mountd", error, as_json=False)
    try:
        with (
            Request(
                spec,
                read_only=wishes.read_only,
                file_system_type=wishes.type,
                options=wishes.options,
                userns=wishes.userns,
                idmap=wishes.idmap,
            ) as request,
            Client() as client,
        ):
            return act(client, request, wishes, directory)
    except (MountdError, OSError) as error:
        return fail(f"mount.mountd: {directory}", error, as_json=False)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def act(client: Client, request: Request, wishes: Wishes, directory: str) -> int:
    """Mount and attach, or with -f only ask whether that would be allowed."""
    if wishes.fake:
        decision = client.explain(request.source, request.fds, **request.parameters)["decision"]
        if isinstance(decision, dict) and decision.get("verdict") != "allow":
            raise DeniedByPolicy(
                str(decision.get("reason")), rule=decision.get("rule"), hint=decision.get("hint")
            )
        return 0
    reply = client.mount(request.source, request.fds, **request.parameters)
    with reply.mount:
        attach(reply.mount.fileno(), directory)
    if wishes.verbose:
        kind = reply.mounts[0].get("fileSystemType")
        rule = reply.decision.get("rule")
        print(f"mount.mountd: {kind} mounted on {directory} (rule “{rule}”)")  # noqa: T201
    return 0


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
