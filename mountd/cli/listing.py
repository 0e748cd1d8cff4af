"""mountctl list and revoke: which mounts there are, and taking them back."""

from __future__ import annotations

import time

from mountd.cli.report import EXIT_USAGE, UsageError, printable, say, show_json
from mountd.cli.table import table, terminal_width, wants_colour
from mountd.client import Client
from mountd.errors import ADMIN_INTERFACE, ProtocolError
from mountd.fds import close_all
from mountd.request import MAXIMUM_INTEGER

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

HEAD = ["ID", "USER", "AGE", "TYPE", "ACCESS", "RULE", "SOURCE", "ATTACHED AT"]
WHOLE = ("ID",)  # what “mountctl revoke” takes
# What a narrow terminal does without, in this order.
SPARE = ("RULE", "ACCESS", "TYPE", "AGE", "USER", "SOURCE", "ATTACHED AT")
LIST_EXAMPLES = (
    "mountctl list",
    "mountctl list --all",
    "mountctl list --long --all",
    "mountctl list --json | jq '.mounts[].source'",
)
REVOKE_EXAMPLES = (
    "mountctl revoke 4711",
    "mountctl revoke --digest sha256:…",
    "mountctl revoke --uid gus",
    "",
    "exit status: 1 if something still holds a mount",
)
MOMENT = "%Y-%m-%d %H:%M:%S UTC"
NOWHERE = "(held by a descriptor)"
NOT_ALL = "(not all looked at)"  # nobody knows whether it is attached somewhere
PARTLY = "there are too many mounts on this system to look at all: there may be other places"
DIGITS = 20  # more than any id has
MAXIMUM_UID = (1 << 32) - 2
NO_LIST = "the reply is not what List returns"
STEPS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def add_verbs(verbs: Any) -> None:
    """Add the verbs to those of mountctl."""
    from mountd.cli.manners import add_verb

    add = add_verb(verbs, "list", "list your live mounts, and where they are attached", LIST_EXAMPLES)
    how = add.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON, for errors as well")
    how.add_argument("-l", "--long", action="store_true", help="all that is known about each, line by line")
    add.add_argument("--all", action="store_true", help="those of all users, for root")
    add = add_verb(verbs, "revoke", "detach mounts wherever they are attached, for root", REVOKE_EXAMPLES)
    add.add_argument("--json", action="store_true", help="print JSON, for errors as well")
    which = add.add_mutually_exclusive_group(required=True)
    which.add_argument("id", metavar="ID", nargs="?", type=id_of, help="the mount with this id")
    which.add_argument("--digest", metavar="DIGEST", help="all mounts of the image with this digest")
    which.add_argument("--uid", metavar="USER", type=uid_of, help="all mounts of this user, a name or a uid")


def id_of(text: str) -> int:
    """Return the id that the command line names. Raises UsageError."""
    if text.isascii() and text.isdecimal() and len(text) < DIGITS and int(text) <= MAXIMUM_INTEGER:
        return int(text)
    raise UsageError(f"“{text}” is no id of a mount", hint="“mountctl list --all” shows them")


def uid_of(text: str) -> int:
    """Return the uid of a user who is named, or the number itself. Raises UsageError."""
    import pwd

    if text.isascii() and text.isdecimal() and len(text) < DIGITS and int(text) <= MAXIMUM_UID:
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):
        raise UsageError(
            f"there is no user “{text}”", hint="“getent passwd” lists them, or give a uid"
        ) from None


def call(method: str, parameters: Mapping[str, object]) -> dict[str, Any]:
    """Call a method. Raises what `Client` and `Client.call` raise."""
    with Client() as client:
        reply, fds = client.call(method, parameters, [])
    close_all(fds)
    return reply


def all_mounts(everybody: bool) -> list[Any]:
    """Return the live mounts, of all replies that it takes. Raises what `Client` and `Client.call` raise."""
    found: list[Any] = []
    after = None
    with Client() as client:
        while True:
            reply, fds = client.call("List", {"all": everybody or None, "after": after}, [])
            close_all(fds)
            page, after = reply.get("mounts"), reply.get("next")
            if not isinstance(page, list) or not (after is None or (page and isinstance(after, int))):
                raise ProtocolError(NO_LIST)
            found += page
            if after is None:
                return found


def list_mounts(options: argparse.Namespace) -> int:
    """Print the live mounts."""
    mounts = all_mounts(options.all)
    if options.json:
        show_json({"mounts": mounts})
        return 0
    now = time.time()
    try:
        if options.long:
            text = "\n\n".join("\n".join(block(mount, now)) for mount in mounts)
        else:
            rows = [row(mount, now) for mount in mounts]
            width, colour = terminal_width(), wants_colour()
            text = table(rows, HEAD, width=width, colour=colour, whole=WHOLE, spare=SPARE)
            if any(mount.get("partly") for mount in mounts):
                text += f"\n{PARTLY}"
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, OSError):
        raise ProtocolError(NO_LIST) from None
    if mounts:
        say(text)
    return 0


def block(mount: Mapping[str, Any], now: float) -> list[str]:
    """Return all that is known about one mount, as lines of “field: value”."""
    since = time.strftime(MOMENT, time.gmtime(mount["since"]))
    fields = [
        ("id", mount["id"]),
        ("user", mount["uid"]),
        ("owner", mount["owner"]),
        ("source", mount["source"]),
        ("type", mount["fileSystemType"]),
        ("access", access(mount)),
        ("rule", mount.get("rule")),
        ("trusted by", mount.get("trustedBy")),
        ("signer", mount.get("signer")),
        ("digest", mount.get("digest")),
        ("id map", mount["idMap"]),
        ("since", f"{since} ({age(now - mount['since'])})"),
    ]
    for name, places in (("attached at", mount["attached"]), ("maybe at", mount.get("maybeAttached", ()))):
        for place in places:
            where = f"{place['mountPoint']} (mount namespace {place['mountNamespace']}, mount {place['id']})"
            fields.append((name, where))
    if mount.get("unlisted"):
        fields.append(("not listed", f"{mount['unlisted']} more places"))
    if mount.get("partly"):
        fields.append(
            ("not looked at", "there are too many mounts on this system, it may be in other places")
        )
    if not any(mount.get(name) for name in ("attached", "maybeAttached", "unlisted", "partly")):
        fields.append(("attached at", NOWHERE))
    return [printable(f"{name}: {'-' if value is None else value}") for name, value in fields]


def access(mount: Mapping[str, Any]) -> str:
    """Return how a mount can be used."""
    return "read-only" if mount["readOnly"] else "writable"


def row(mount: Mapping[str, Any], now: float) -> list[str]:
    """Return the cells of one mount."""
    return [
        str(mount["id"]),
        str(mount["uid"]),
        age(now - mount["since"]),
        mount["fileSystemType"],
        access(mount),
        mount.get("rule") or "-",
        mount["source"],
        whereabouts(mount),
    ]


def whereabouts(mount: Mapping[str, Any]) -> str:
    """Return where a mount is attached, as far as anybody knows."""
    places = mount_points(mount["attached"])
    if mount.get("unlisted"):
        places += f"{' and ' if places else ''}{mount['unlisted']} more"
    if places:
        return places
    if maybe := mount_points(mount.get("maybeAttached", ())):
        return f"maybe {maybe}"
    return NOT_ALL if mount.get("partly") else NOWHERE


def mount_points(places: Iterable[Mapping[str, Any]]) -> str:
    """Return each directory once, whatever mount namespaces it is in."""
    return ", ".join(sorted({place["mountPoint"] for place in places}))


def age(seconds: float) -> str:
    """Return a span of time in its largest unit."""
    for size, unit in STEPS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return "0 s"


def revoke(options: argparse.Namespace) -> int:
    """Revoke, and say what was done and what still holds the mounts."""
    wanted = {"id": options.id, "digest": options.digest, "uid": options.uid}
    reply = call(f"{ADMIN_INTERFACE}.Revoke", wanted)
    try:
        held = list(reply["held"])
        lines = [
            f"detached from {place['mountPoint']} in mount namespace {place['mountNamespace']}"
            for place in reply["detached"]
        ]
        if reply.get("unlisted"):
            lines.append(f"detached from {reply['unlisted']} more places")
        for each in held:
            who = f"process {each['pid']} ({each['command']}): " if each["pid"] else ""
            lines.append(f"still there: {who}{each['what']}")
    except (KeyError, TypeError):
        raise ProtocolError("the reply is not what Revoke returns") from None
    if options.json:
        show_json(reply)
    else:
        say("\n".join(printable(line) for line in lines or ["it was attached nowhere"]))
    return EXIT_USAGE if held else 0


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {"list": list_mounts, "revoke": revoke}
