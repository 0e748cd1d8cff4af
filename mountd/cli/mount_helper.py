"""mount.mountd(8): what mount(8) calls for `mount -t mountd IMAGE DIR`.

    mount.mountd SPEC DIR [-sfnv] [-o OPTIONS] [-t TYPE] [-N NAMESPACE] [--json]

It starts in milliseconds, and so imports little. Its arguments and exit status are those that mount(8)
documents for helpers (EXTERNAL HELPERS, EXIT STATUS). What mount(8) never says is --json: that is for
who calls it directly, and prints what “mountctl mount --json” does.
"""

from __future__ import annotations

import getopt
import sys

from mountd.cli.report import UsageError, end, fail, printable, say, show_json, tell_left_out
from mountd.client import IDMAPS, Client, Request, attach_reply, open_target
from mountd.errors import DeniedByPolicy, MountdError, OptionNotPermitted
from mountd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeVar

    Reply = TypeVar("Reply")

PROGRAM = "mount.mountd"
USAGE = f"usage: {PROGRAM} SPEC DIR [-sfnvrw] [-o OPTIONS] [-t TYPE] [--json]"
ACCESS = {"read-only": True, "read-write": False}
# What options of our own may say; None for anything.
OWN: Mapping[str, tuple[str, ...] | None] = {
    "mountd.userns": None,
    "mountd.idmap": IDMAPS,
    "mountd.access": tuple(ACCESS),
    "mountd.signature": None,
    "mountd.policy": None,
}
FREE = {
    "mountd.userns": "the path of a user namespace, or none",
    "mountd.signature": "the path of a detached signature",
    "mountd.policy": "a policy as in systemd.image-policy(7)",
}
# For mount(8), for the init system, or the default anyway.
IGNORED = {
    *("defaults", "auto", "noauto", "async", "exec", "loud", "nomand", "_netdev", "nofail"),
    *("user", "nouser", "users", "owner", "group"),
}
IGNORED_NAMES = {"user", "uhelper", "helper", "comment"}
RECURSIVE = "=recursive"  # a mount that is only just made has nothing below it
NOT_DONE = {
    "remount": "mount it again instead",
    "bind": "mount it without -t mountd",
    "rbind": "mount it without -t mountd",
    "move": "use “mount --move”",
}


class Wishes:
    """The command line, read."""

    def __init__(self) -> None:
        """The defaults of mount.mountd."""
        self.fake = self.sloppy = self.verbose = self.json = False
        self.read_only: bool | None = None
        self.type: str | None = None
        self.options: list[str] = []
        self.userns: str | None = None
        self.idmap: str | None = None
        self.signature: str | None = None
        self.image_policy: str | None = None

    def read_option(self, option: str) -> None:
        """Take one entry of -o. Raises OptionNotPermitted."""
        option = option.removesuffix(RECURSIVE)
        name, _, value = option.partition("=")
        if option == "ro":
            self.read_only = True
        elif option == "rw":
            return  # mount(8) says so whenever nobody asked for ro
        elif option in IGNORED or name in IGNORED_NAMES:
            return
        elif option in NOT_DONE:
            raise OptionNotPermitted(option, f"{PROGRAM} does not do that", hint=NOT_DONE[option])
        elif name.startswith("mountd."):
            self._read_own(option, name, value)
        else:
            self.options.append(option)

    def _read_own(self, option: str, name: str, value: str) -> None:
        if name not in OWN:
            if not self.sloppy:
                known = "=, ".join(OWN)
                raise OptionNotPermitted(option, "there is no such option", hint=f"there are {known}=")
            return
        allowed = OWN[name]
        if not value or (allowed is not None and value not in allowed):
            words = ", ".join(allowed) if allowed is not None else FREE[name]
            raise OptionNotPermitted(option, "it does not have such a value", hint=f"give {words}")
        if name == "mountd.userns":
            self.userns = value
        elif name == "mountd.idmap":
            self.idmap = value
        elif name == "mountd.signature":
            self.signature = value
        elif name == "mountd.policy":
            self.image_policy = value
        else:
            self.read_only = ACCESS[value]


def parse(argv: list[str]) -> tuple[Wishes, list[str]]:
    """Read the command line. Raises getopt.GetoptError, OptionNotPermitted."""
    flags, positional = getopt.gnu_getopt(argv, "sfnvrwo:t:N:", ["json"])
    wishes = Wishes()
    wishes.sloppy = any(flag == "-s" for flag, _ in flags)
    for flag, value in flags:
        if flag == "-N":
            raise getopt.GetoptError("-N is not supported, run it within the mount namespace instead")
        if flag in ("-r", "-w"):
            wishes.read_only = flag == "-r"
        elif flag == "-f":
            wishes.fake = True
        elif flag == "-v":
            wishes.verbose = True
        elif flag == "--json":
            wishes.json = True
        elif flag == "-t":
            wishes.type = read_type(value)
        elif flag == "-o":
            for option in filter(None, value.split(",")):
                wishes.read_option(option)
    if len(positional) != 2:
        raise getopt.GetoptError("SPEC and DIR are needed, and nothing else")
    return wishes, positional


def read_type(text: str) -> str | None:
    """Return the type of file system that -t asks for: “mountd.erofs” is an erofs, “mountd” anything."""
    own, _, subtype = text.partition(".")
    return (subtype if own == "mountd" else text) or None


def run(argv: list[str]) -> int:
    """Do what the command line says and return the exit status. Raises KeyboardInterrupt."""
    if argv[:1] in (["-h"], ["--help"]):
        say(USAGE)
        return 0
    if argv[:1] in (["-V"], ["--version"]):
        say(f"{PROGRAM} {VERSION}")
        return 0
    as_json = asks_for_json(argv)
    directory = ""
    try:
        wishes, (spec, directory) = parse(argv)
        as_json = wishes.json
        return mount(wishes, spec, directory)
    except getopt.GetoptError as error:
        return fail(PROGRAM, UsageError(str(error), hint=USAGE), as_json=as_json)
    except (MountdError, OSError) as error:
        return fail(PROGRAM, error, where=directory, as_json=as_json)


def asks_for_json(argv: list[str]) -> bool:
    """Tell whether a command line that may be wrong asks for JSON."""
    return "--json" in argv[: argv.index("--") if "--" in argv else None]


def mount(wishes: Wishes, spec: str, directory: str) -> int:
    """Mount and attach, or with -f only ask whether that would be allowed. Raises MountdError, OSError."""
    with (
        open_target(directory) as target,
        Request(
            spec,
            read_only=wishes.read_only,
            file_system_type=wishes.type,
            options=wishes.options,
            userns=wishes.userns,
            idmap=wishes.idmap,
            signature=wishes.signature,
            image_policy=wishes.image_policy,
        ) as request,
        Client() as client,
    ):
        if wishes.fake:
            explained = ask(client.explain, request, wishes.sloppy)
            return judge(explained["decision"], directory, wishes)
        with ask(client.mount, request, wishes.sloppy) as reply:
            left_out = attach_reply(reply, target.fileno(), directory)
    tell_left_out(PROGRAM, left_out)
    if wishes.verbose and not wishes.json:
        made = reply.mounts[0]
        how = "read-only" if made.get("readOnly") else "read-write"
        rule = reply.decision.get("rule")
        kind = made.get("fileSystemType")
        say(printable(f"{PROGRAM}: {kind} mounted {how} on {directory} (rule “{rule}”)"))
    if wishes.json:
        show_json({"target": directory, "mounts": reply.mounts, "decision": reply.decision})
    return 0


def ask(method: Callable[..., Reply], request: Request, sloppy: bool) -> Reply:
    """Call Mount or Explain; with -s, without the options that are not permitted. Raises what it raises."""
    while True:
        try:
            return method(request.source, request.fds, **request.parameters)
        except OptionNotPermitted as error:
            options = request.parameters["options"]
            refused = error.parameters.get("option")
            if not sloppy or not isinstance(options, list) or refused not in options:
                raise
            request.parameters["options"] = [each for each in options if each != refused]


def judge(decision: object, directory: str, wishes: Wishes) -> int:
    """Return the exit status of a call with -f, and say why it is not 0. Raises OSError."""
    fields = decision if isinstance(decision, dict) else {}
    if fields.get("verdict") == "allow":
        if wishes.json:
            show_json({"target": directory, "mounts": [], "decision": fields})
        return 0
    error = DeniedByPolicy(str(fields.get("reason")), rule=fields.get("rule"), hint=fields.get("hint"))
    return fail(PROGRAM, error, where=directory, as_json=wishes.json)


def main() -> None:
    """Entry point of the console script."""
    end(PROGRAM, lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
