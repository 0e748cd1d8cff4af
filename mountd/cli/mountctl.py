"""mountctl(1): asking mountd from the command line."""

from __future__ import annotations

import sys

from mountd.cli import image
from mountd.cli.report import EXIT_USAGE, UsageError, end, fail, printable, say, show_json
from mountd.client import IDMAPS, Client, Request, attach_at, open_target
from mountd.errors import MountdError
from mountd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any, NoReturn

PROGRAM = "mountctl"
EXAMPLES = """\
examples:
  mountctl explain /var/lib/machines/base.raw
  mountctl run /var/lib/machines/base.raw -- ls -l /
  unshare --user --map-root-user --mount mountctl mount /var/lib/machines/base.raw /mnt
  mountctl mount -o noexec tmpfs:64M /mnt
  mountctl policy check
  mountctl image import --name base /home/me/base.raw
  mountctl mount stored:sha256:… /mnt

exit status:
  0 done, 1 wrong usage or not allowed, 2 mountd cannot be reached, 8 interrupted, 32 the mount failed.
  “run” returns that of the command, 126 or 127 if it cannot be run, 128+N if signal N ended it.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    import argparse

    class Parser(argparse.ArgumentParser):
        """One line for an error, and no options that only begin like one."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(allow_abbrev=False, **settings)

        def error(self, message: str) -> NoReturn:
            raise UsageError(message, hint=f"see “{self.prog} --help”")

    top = Parser(
        prog=PROGRAM,
        description="Mount trusted images without being root.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    mount = verbs.add_parser("mount", help="mount an image at a directory of your own mount namespace")
    add_request(mount)
    add_namespace(mount)
    mount.add_argument("target", metavar="TARGET", help="an existing directory")
    run = verbs.add_parser(
        "run",
        help="run a command in an image, in new user and mount namespaces",
        usage="%(prog)s [OPTION…] SOURCE [--] COMMAND [ARGUMENT…]",
    )
    add_request(run)
    run.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="the command, after --")
    explain = verbs.add_parser("explain", help="say whether an image could be mounted, and why")
    add_request(explain)
    add_namespace(explain)
    # Only for the list of verbs: its own command line is read by the program that it is.
    verbs.add_parser("policy", add_help=False, help="check and show policy files")
    images = verbs.add_parser("image", help="get images into mountd's store, and see to those in it")
    image.add_image_verbs(images.add_subparsers(dest="image_verb", required=True, metavar="VERB"))
    return top


def add_request(verb: argparse.ArgumentParser) -> None:
    """Add what all verbs have: the source, and how it shall be mounted."""
    verb.add_argument("--json", action="store_true", help="print JSON, for errors as well")
    verb.add_argument("-w", "--read-write", action="store_true", help="ask for a writable mount")
    verb.add_argument("-t", "--type", help="refuse to mount another type of file system")
    verb.add_argument("-o", "--options", metavar="OPTION[,…]", action="append", help="mount options")
    verb.add_argument("--idmap", choices=IDMAPS, help="how to map ids")
    verb.add_argument("--signature", metavar="FILE", help="a detached signature of the image")
    verb.add_argument("--image-policy", metavar="POLICY", help="what to demand: systemd.image-policy(7)")
    verb.add_argument("--verity", metavar="FILE", help="hash data of dm-verity, with --root-hash")
    verb.add_argument("--root-hash", metavar="HEX", help="the root hash of the hash data")
    verb.add_argument("--root-hash-signature", metavar="FILE", help="a detached signature of the root hash")
    verb.add_argument(
        "source",
        metavar="SOURCE",
        help="an image, a directory, stored:sha256:…, oci:HOST/REPO@sha256:…, or tmpfs:SIZE (tmpfs:64M)",
    )


def add_namespace(verb: argparse.ArgumentParser) -> None:
    """Add what a verb has that makes no user namespace itself."""
    verb.add_argument(
        "--userns", metavar="PATH", help="user namespace to map ids for, “none” for none; default: your own"
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line. Raises UsageError, and SystemExit after --help and --version."""
    if argv[:1] == ["run"] and "--" in argv:
        # argparse has changed its mind about what becomes of these more than once.
        cut = list(argv).index("--")
        options = parser().parse_args(argv[:cut])
        options.command += argv[cut if options.command else cut + 1 :]
    else:
        options = parser().parse_args(argv)
    if options.verb == "run" and not options.command:
        raise UsageError("there is no COMMAND", hint="write it after SOURCE and --")
    if options.verb in VERBS:
        check_verity(options)
    return options


def check_verity(options: argparse.Namespace) -> None:
    """Have the options of dm-verity come together. Raises UsageError."""
    if (options.verity is None) != (options.root_hash is None):
        raise UsageError("--verity and --root-hash go together", hint="“veritysetup format” prints the hash")
    if options.root_hash_signature is not None:
        if options.verity is None:
            raise UsageError("--root-hash-signature needs --verity and --root-hash")
        if options.signature is not None:
            raise UsageError("with --root-hash-signature, --signature has nothing to sign")


def request_of(options: argparse.Namespace) -> Request:
    """Return the request that the command line describes. Raises what `Request` does."""
    words = [word for group in options.options or () for word in group.split(",") if word]
    read_only = None
    if options.read_write or "rw" in words:
        read_only = False
    elif "ro" in words:
        read_only = True
    return Request(
        options.source,
        read_only=read_only,
        file_system_type=options.type,
        options=words,
        # The new namespace of `run` is handed over once it is there.
        userns="none" if options.verb == "run" else options.userns,
        idmap=options.idmap,
        image_policy=options.image_policy,
        signature=options.signature,
        verity=None
        if options.verity is None
        else (options.verity, options.root_hash, options.root_hash_signature),
    )


def mount(options: argparse.Namespace, request: Request, client: Client) -> int:
    """Mount and attach."""
    with (
        open_target(options.target) as target,
        client.mount(request.source, request.fds, **request.parameters) as reply,
    ):
        attach_at(reply.mount.fileno(), target.fileno(), options.target)
    if options.json:
        show_json({"target": options.target, "mounts": reply.mounts, "decision": reply.decision})
    return 0


def run(options: argparse.Namespace, request: Request, client: Client) -> int:
    """Run a command in the image."""
    from mountd.cli.container import run_in_image

    return run_in_image(request, client, options.command)


def explain(options: argparse.Namespace, request: Request, client: Client) -> int:
    """Print the decision and how it came about; the exit status is 0 for allow, 1 for everything else."""
    reply = client.explain(request.source, request.fds, **request.parameters)
    if options.json:
        show_json(reply)
    else:
        say(explanation(reply))
    decision = reply.get("decision")
    return 0 if isinstance(decision, dict) and decision.get("verdict") == "allow" else EXIT_USAGE


def explanation(reply: dict[str, object]) -> str:
    """Return the reply of Explain as text for people."""
    decision, facts, steps = reply.get("decision"), reply.get("facts"), reply.get("steps")
    lines = []
    if isinstance(decision, dict):
        by = f"by rule “{decision['rule']}”" if decision.get("rule") else "no rule applies"
        lines.append(f"{decision.get('verdict')}: {by}: {decision.get('reason')}")
        if decision.get("hint"):
            lines.append(f"hint: {decision['hint']}")
    if isinstance(facts, dict):
        lines += ["facts:", *(f"  {name}: {value}" for name, value in facts.items())]
    if isinstance(steps, list) and steps:
        lines.append("rules, in order:")
    for step in steps if isinstance(steps, list) else ():
        mark = "applies" if step.get("applies") else "does not apply"
        lines.append(f"  “{step.get('rule')}” ({step.get('origin')}) {mark}: {step.get('reason')}")
        if step.get("hint"):
            lines.append(f"    hint: {step['hint']}")
    return "\n".join(printable(line) for line in lines)


VERBS = {"mount": mount, "run": run, "explain": explain}


def act(argv: Sequence[str]) -> int:
    """Do what the command line says and return the exit status. Raises KeyboardInterrupt, SystemExit."""
    as_json = "--json" in argv[: argv.index("--") if "--" in argv else None]
    try:
        if argv[:1] == ["policy"]:
            from mountd.cli.policy import become_policy_tool

            become_policy_tool(argv[1:])
        options = parse(argv)
        as_json = options.json
        if options.verb == "image":
            return image.VERBS[options.image_verb](options)
        with request_of(options) as request, Client() as client:
            return VERBS[options.verb](options, request, client)
    except (MountdError, OSError) as error:
        return fail(PROGRAM, error, as_json=as_json)


def main() -> None:
    """Entry point of the console script."""
    end(PROGRAM, lambda: act(sys.argv[1:]))


if __name__ == "__main__":
    main()
