"""mountctl(1): asking mountd from the command line."""

from __future__ import annotations

import sys

from mountd.cli.report import EXIT_INTERRUPTED, EXIT_USAGE, fail, printable, show_json
from mountd.client import Client, Request, attach
from mountd.errors import MountdError
from mountd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

IDMAPS = ("none", "namespace", "caller")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    import argparse

    top = argparse.ArgumentParser(prog="mountctl", description="Mount trusted images without being root.")
    top.add_argument("--version", action="version", version=f"mountctl {VERSION}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    mount = verbs.add_parser("mount", help="mount an image at a directory of your own mount namespace")
    add_request(mount)
    mount.add_argument("target", metavar="TARGET", help="an existing directory")
    run = verbs.add_parser("run", help="run a command in an image, in new user and mount namespaces")
    add_request(run)
    run.add_argument("command", metavar="COMMAND", nargs="+", help="the command and its arguments, after --")
    explain = verbs.add_parser("explain", help="say whether an image could be mounted, and why")
    add_request(explain)
    return top


def add_request(verb: argparse.ArgumentParser) -> None:
    """Add what all verbs have: the source, and how it shall be mounted."""
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.add_argument("-w", "--read-write", action="store_true", help="ask for a writable mount")
    verb.add_argument("-t", "--type", help="refuse to mount another type of file system")
    verb.add_argument("-o", "--options", metavar="OPTION[,…]", action="append", help="mount options")
    verb.add_argument("--userns", metavar="PATH", help="user namespace to map ids for, or “none”")
    verb.add_argument("--idmap", choices=IDMAPS, help="how to map ids")
    verb.add_argument("source", metavar="SOURCE", help="an image, or tmpfs:SIZE")


def request_of(options: argparse.Namespace) -> Request:
    """Return the request that the command line describes. Raises what `Request` does."""
    words = [word for group in options.options or () for word in group.split(",") if word]
    # The new namespace of `run` is handed over once it is there.
    userns = "none" if options.verb == "run" and options.userns is None else options.userns
    return Request(
        options.source,
        read_only=not options.read_write,
        file_system_type=options.type,
        options=words,
        userns=userns,
        idmap=options.idmap,
    )


def mount(options: argparse.Namespace, request: Request, client: Client) -> int:
    """Mount and attach."""
    reply = client.mount(request.source, request.fds, **request.parameters)
    with reply.mount:
        attach(reply.mount.fileno(), options.target)
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
        print(explanation(reply))  # noqa: T201
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
    lines.append("facts:")
    if isinstance(facts, dict):
        lines += [f"  {name}: {value}" for name, value in facts.items()]
    lines.append("rules, in order:")
    for step in steps if isinstance(steps, list) else ():
        mark = "applies" if step.get("applies") else "does not apply"
        lines.append(f"  “{step.get('rule')}” ({step.get('origin')}) {mark}: {step.get('reason')}")
        if step.get("hint"):
            lines.append(f"    hint: {step['hint']}")
    return "\n".join(printable(line) for line in lines)


VERBS = {"mount": mount, "run": run, "explain": explain}


def main() -> None:
    """Entry point of the console script."""
    options = parser().parse_args()
    try:
        with request_of(options) as request, Client() as client:
            sys.exit(VERBS[options.verb](options, request, client))
    except (MountdError, OSError) as error:
        sys.exit(fail("mountctl", error, as_json=options.json))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
