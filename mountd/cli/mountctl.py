"""mountctl(1): asking mountd from the command line."""

from __future__ import annotations

import os
import sys

from mountd.cli import attaching, image, listing
from mountd.cli.report import EXIT_USAGE, UsageError, end, fail, printable, say, show_json
from mountd.client import IDMAPS, Client, Request
from mountd.errors import MountdError, NotFound
from mountd.request import split_options
from mountd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

PROGRAM = "mountctl"
EXAMPLES = (
    "mountctl mount /var/lib/machines/base.raw ~/base",
    "mountctl list",
    "mountctl umount ~/base",
    "mountctl explain /var/lib/machines/base.raw",
    "mountctl run /var/lib/machines/base.raw -- ls -l /",
    "unshare --user --map-root-user --mount mountctl mount /var/lib/machines/base.raw /mnt",
    "mountctl mount -o noexec tmpfs:64M /mnt",
    "mountctl policy check",
    "mountctl image import --name base /home/me/base.raw",
    "mountctl mount stored:sha256:… /mnt",
    "mountctl doctor",
    "",
    "Each verb has examples of its own: mountctl mount --help",
)
EXIT_STATUS = """

exit status:
  0 done, 1 wrong usage or not allowed, 2 mountd cannot be reached or is too busy, 4 a bug of mountd,
  8 interrupted, 32 the mount failed.
  “run” returns that of the command, 126 or 127 if it cannot be run, 128+N if signal N ended it.
  “explain” returns 0 for allow and 1 for everything else; “policy check” 1 if there are errors;
  “doctor” 0 if all is well, 1 if there are warnings, 2 if something fails.

What --json prints is described by JSON Schemas in /usr/lib/mountd/json, one for each verb.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    import argparse

    from mountd.cli import admin
    from mountd.cli.manners import Parser, add_verb

    top = Parser(prog=PROGRAM, description="Mount trusted images without being root.", examples=EXAMPLES)
    top.epilog = f"{top.epilog}{EXIT_STATUS}"
    top.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    mount = add_verb(verbs, "mount", "mount an image at a directory", MOUNT_EXAMPLES)
    add_request(mount)
    add_namespace(mount)
    add_key(mount)
    mount.add_argument("target", metavar="TARGET", help="an existing directory")
    umount = add_verb(
        verbs, "umount", "detach what “mount” has mounted at a directory", ("mountctl umount ~/base",)
    )
    umount.add_argument("--json", action="store_true", help="print JSON, for errors as well")
    umount.add_argument("-l", "--lazy", action="store_true", help="also if it is in use; it ends with that")
    umount.add_argument("target", metavar="TARGET", help="the directory")
    listing.add_verbs(verbs)
    run = add_verb(
        verbs,
        "run",
        "run a command in an image, in new user and mount namespaces",
        RUN_EXAMPLES,
        usage="%(prog)s [OPTION…] SOURCE [--] COMMAND [ARGUMENT…]",
    )
    add_request(run)
    add_key(run)
    run.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="the command, after --")
    explain = add_verb(verbs, "explain", "say whether an image could be mounted, and why", EXPLAIN_EXAMPLES)
    add_request(explain)
    add_namespace(explain)
    explain.add_argument("--as", dest="user", metavar="USER", help="for another user, as root")
    # Only “reload” is read here, everything else by the program that it is.
    policies = add_verb(verbs, "policy", "check, show and reload policy files", add_help=False)
    admin.add_reload(policies.add_subparsers(dest="policy_verb", required=True, metavar="VERB"))
    images = add_verb(
        verbs, "image", "get images into mountd's store, and see to those in it", image.EXAMPLES
    )
    image.add_image_verbs(images.add_subparsers(dest="image_verb", required=True, metavar="VERB"))
    admin.add_admin_verbs(verbs)
    return top


MOUNT_EXAMPLES = (
    "mountctl mount /var/lib/machines/base.raw ~/base",
    "unshare --user --map-root-user --mount mountctl mount /var/lib/machines/base.raw /mnt",
    "mountctl mount -o noexec tmpfs:64M /mnt",
    "mountctl mount --top tmpfs:64M /var/lib/machines/base.raw /mnt",
    "mountctl mount --verity base.verity --root-hash 0123… base.raw /mnt",
    "mountctl mount --objects ~/objects composefs:tree.dump /mnt",
)
RUN_EXAMPLES = (
    "mountctl run /var/lib/machines/base.raw -- ls -l /",
    "mountctl run --idmap namespace stored:sha256:… /bin/sh",
    "mountctl run --top ~/changes oci:registry.example.com/base:1.0 /bin/sh",
)
EXPLAIN_EXAMPLES = (
    "mountctl explain /home/me/base.raw",
    "mountctl explain --json /var/lib/machines/base.raw",
)


def add_request(verb: argparse.ArgumentParser) -> None:
    """Add what all verbs have: the source, and how it shall be mounted."""
    verb.add_argument("--json", action="store_true", help="print JSON, for errors as well")
    verb.add_argument("-w", "--read-write", action="store_true", help="ask for a writable mount")
    verb.add_argument("-t", "--type", help="refuse to mount another type of file system")
    verb.add_argument("-o", "--options", metavar="OPTION[,…]", action="append", help="mount options")
    verb.add_argument("--idmap", choices=IDMAPS, help="how to map ids")
    verb.add_argument(
        "--layer",
        metavar="SOURCE",
        action="append",
        help="lay this over SOURCE; may be repeated, the topmost comes first",
    )
    verb.add_argument(
        "--top",
        metavar="tmpfs[:SIZE]|DIRECTORY",
        help="what takes what is written: memory, or a directory of yours, in which it stays",
    )
    verb.add_argument(
        "--objects",
        metavar="DIRECTORY",
        action="append",
        help="where the contents of a composefs lie; may be repeated",
    )
    verb.add_argument("--digest", metavar="HEX", help="the fs-verity digest that a composefs has to have")
    verb.add_argument(
        "--check-contents",
        action="store_true",
        default=None,
        help="have fs-verity check the contents of a composefs",
    )
    verb.add_argument("--signature", metavar="FILE", help="a detached signature of the image")
    verb.add_argument("--image-policy", metavar="POLICY", help="what to demand: systemd.image-policy(7)")
    verb.add_argument("--verity", metavar="FILE", help="hash data of dm-verity, with --root-hash")
    verb.add_argument("--root-hash", metavar="HEX", help="the root hash of the hash data")
    verb.add_argument("--root-hash-signature", metavar="FILE", help="a detached signature of the root hash")
    verb.add_argument(
        "--interactive",
        action="store_true",
        default=None,
        help="have an administrator asked if need be; the default on a terminal",
    )
    verb.add_argument(
        "source",
        metavar="SOURCE",
        help="an image, a directory, stored:sha256:…, oci:HOST/REPO:TAG, composefs:FILE, tmpfs:64M",
    )


def add_key(verb: argparse.ArgumentParser) -> None:
    """Add what opens an encrypted image."""
    verb.add_argument(
        "--key-file",
        metavar="FILE",
        help="password of an encrypted image, “-” for the standard input; default: asked on a terminal",
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
        hint = "“veritysetup format” prints the hash, a signature partition names it as rootHash"
        raise UsageError("--verity and --root-hash go together", hint=hint)
    if options.root_hash_signature is not None:
        if options.verity is None:
            raise UsageError("--root-hash-signature needs --verity and --root-hash")
        if options.signature is not None:
            raise UsageError("with --root-hash-signature, --signature has nothing to sign")


def request_of(options: argparse.Namespace) -> Request:
    """Return the request that the command line describes. Raises what `Request` does."""
    words = [word for group in options.options or () for word in split_options(group)]
    read_only = None
    if options.read_write or "rw" in words:
        read_only = False
    elif "ro" in words:
        read_only = True
    request = Request(
        options.source,
        read_only=read_only,
        file_system_type=options.type,
        options=words,
        # The new namespace of `run` is handed over once it is there.
        userns="none" if options.verb == "run" else options.userns,
        idmap=options.idmap,
        image_policy=options.image_policy,
        interactive=options.interactive,
        signature=options.signature,
        layers=options.layer or (),
        top=options.top,
        objects=options.objects or (),
        digest=options.digest,
        check_contents=options.check_contents,
        verity=None
        if options.verity is None
        else (options.verity, options.root_hash, options.root_hash_signature),
        key_file=getattr(options, "key_file", None),
    )
    request.asks = request.asks and not options.json
    return request


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


def become(name: str) -> None:
    """Be another user for the rest of this process, so that mountd finds that one calling.

    The image was opened before; whether that user may open it is not asked. Raises NotFound, UsageError,
    OSError.
    """
    import pwd

    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise NotFound(f"a user “{name}”", hint="“getent passwd” lists them") from None
    try:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    except PermissionError:
        raise UsageError(
            f"--as {name} is for root, who may be another user",
            hint="run it as root, or without --as for yourself",
        ) from None


def explanation(reply: dict[str, object]) -> str:
    """Return the reply of Explain as text for people."""
    decision, facts, steps = reply.get("decision"), reply.get("facts"), reply.get("steps")
    lines = []
    if isinstance(decision, dict):
        by = f"by rule “{decision['rule']}”" if decision.get("rule") else "no rule applies"
        lines.append(f"{decision.get('verdict')}: {by}: {decision.get('reason')}")
        if decision.get("hint"):
            lines.append(f"hint: {decision['hint']}")
        if decision.get("signer"):
            lines.append(f"signed by: {decision['signer']}")
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


def own_verb(options: argparse.Namespace) -> int:
    """Do what is not about a request."""
    if options.verb == "doctor":
        from mountd.cli.doctor import doctor

        return doctor(options)
    if options.verb in listing.VERBS:
        return listing.VERBS[options.verb](options)
    from mountd.cli import admin

    return admin.reload(options) if options.verb == "policy" else admin.VERBS[options.verb](options)


VERBS = {"mount": attaching.mount, "run": run, "explain": explain}
OWN_VERBS = ("status", "metrics", "doctor", "policy", *listing.VERBS)


def act(argv: Sequence[str]) -> int:
    """Do what the command line says and return the exit status. Raises KeyboardInterrupt, SystemExit."""
    as_json = "--json" in argv[: argv.index("--") if "--" in argv else None]
    try:
        if argv[:1] == ["policy"] and argv[1:2] != ["reload"]:
            from mountd.cli.policy import become_policy_tool

            become_policy_tool(argv[1:])
        options = parse(argv)
        as_json = options.json
        if options.verb in OWN_VERBS:
            return own_verb(options)
        if options.verb == "umount":
            return attaching.umount(options)
        if options.verb == "image":
            return image.VERBS[options.image_verb](options)
        with request_of(options) as request:
            if getattr(options, "user", None) is not None:
                become(options.user)
            with Client() as client:
                return VERBS[options.verb](options, request, client)
    except (MountdError, OSError) as error:
        return fail(PROGRAM, error, as_json=as_json)


def main() -> None:
    """Entry point of the console script."""
    end(PROGRAM, lambda: act(sys.argv[1:]))


if __name__ == "__main__":
    main()
