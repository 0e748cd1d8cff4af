"""mount.mountd(8): what mount(8) calls for `mount -t mountd IMAGE DIR`.

    mount.mountd SPEC DIR [-sfnv] [-o OPTIONS] [-t TYPE] [-N NAMESPACE] [--json]

It starts in milliseconds, and so imports little. Its arguments and exit status are those that mount(8)
documents for helpers (EXTERNAL HELPERS, EXIT STATUS). What mount(8) never says is --json: that is for
who calls it directly, and prints what “mountctl mount --json” does.

Who may attach mounts gets the mount from mountd and attaches it; for everybody else mountd does so, as far
as its policy lets it. mount(8) calls this program as the user who called it. If somebody else calls it with
more rights than the user has, it gives them up first: what mountd judges is the user.
"""

from __future__ import annotations

import os

from mountd.asking import Client, attach_reply, open_target
from mountd.cli.agent import with_consent
from mountd.cli.attaching import attached, can_attach, drop, left_out_of, regretting
from mountd.cli.helper import Place, carry_out, failed, read_line, run_program, tell
from mountd.cli.helper import Wishes as CommandLine
from mountd.cli.report import UsageError, show_json, tell_done, tell_left_out
from mountd.errors import DeniedByPolicy, MountdError, OptionNotPermitted
from mountd.fds import OwnedFd
from mountd.request import COMPOSEFS, IDMAPS, TMPFS, Request, split_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn, TypeVar

    Reply = TypeVar("Reply")
    Made = Mapping[str, object]

PROGRAM = "mount.mountd"
USAGE = f"usage: {PROGRAM} SPEC DIR [-sfnvrw] [-o OPTIONS] [-t TYPE] [-N NAMESPACE] [--json]"
ACCESS = {"read-only": True, "read-write": False}
YES_OR_NO = {"yes": True, "no": False}
# What options of our own may say; None for anything.
OWN: Mapping[str, tuple[str, ...] | None] = {
    "mountd.userns": None,
    "mountd.idmap": IDMAPS,
    "mountd.access": tuple(ACCESS),
    "mountd.signature": None,
    "mountd.policy": None,
    "mountd.interactive": tuple(YES_OR_NO),
    "mountd.digest": None,
    "mountd.key-file": None,
    "mountd.objects": None,
    "mountd.verity": tuple(YES_OR_NO),
    "mountd.fsverity": None,
}
FREE = {
    "mountd.userns": "the path of a user namespace, or none",
    "mountd.signature": "the path of a detached signature",
    "mountd.policy": "a policy as in systemd.image-policy(7)",
    "mountd.key-file": "the path of a file with the password",
    "mountd.digest": "sha256: and 64 hexadecimal digits",
    "mountd.objects": "the paths of directories, with “:” between them",
    "mountd.fsverity": "64 hexadecimal digits",
}
# What the values of the others, which are taken as they are, are kept as.
TAKEN_AS = {
    "mountd.userns": "userns",
    "mountd.idmap": "idmap",
    "mountd.signature": "signature",
    "mountd.policy": "image_policy",
    "mountd.digest": "digest",
    "mountd.key-file": "key_file",
    "mountd.fsverity": "fs_verity",
}
DIGEST = "sha256:"
DIGEST_DIGITS = 64
OF_COMPOSEFS = "composefs"  # the type that SPEC is the metadata of
BETWEEN = ", "  # the digests of several layers
MANIFEST = "name it by the digest of its manifest, oci:NAME@sha256:…, and leave mountd.digest= out"
HASHED_AT_ONCE = 1 << 20  # bytes
# For mount(8), for the init system, or the default anyway.
IGNORED = {
    *("defaults", "auto", "noauto", "async", "loud", "silent", "nomand", "noiversion", "nolazytime"),
    # The kernel has no mandatory locks any more (since Linux 5.15).
    *("norelatime", "nostrictatime", "_netdev", "nofail", "loop", "mand"),
    *("user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup"),
}
# About how something is written: nothing is, to what is read-only.
ABOUT_WRITING = {"sync", "dirsync", "lazytime", "iversion"}
IGNORED_NAMES = {"user", "uhelper", "helper", "comment"}
IGNORED_PREFIXES = ("x-", "X-")
# They take back what was said before, and say what holds anyway.
TAKES_BACK = {"exec": "noexec", "atime": "noatime", "diratime": "nodiratime"}
RECURSIVE = "=recursive"  # a mount that is only just made has nothing below it
NOT_DONE = {
    "remount": "mount it again instead",
    "bind": "mount it without -t mountd",
    "rbind": "mount it without -t mountd",
    "move": "use “mount --move”",
    **dict.fromkeys(
        [r + kind for r in ("", "r") for kind in ("shared", "slave", "private", "unbindable")],
        "mount(8) does that; by hand, use “mount --make-private DIR” and its like afterwards",
    ),
}


class Wishes(CommandLine):
    """The command line, read."""

    def __init__(self) -> None:
        """The defaults of mount.mountd."""
        super().__init__()
        self.spec = ""
        self.fake = self.sloppy = False
        self.read_only: bool | None = None
        self.type: str | None = None
        self.options: list[str] = []
        self.userns: str | None = None
        self.idmap: str | None = None
        self.signature: str | None = None
        self.image_policy: str | None = None
        self.interactive: bool | None = None
        self.digest: str | None = None
        self.key_file: str | None = None
        self.objects: list[str] = []
        self.check_contents: bool | None = None
        self.fs_verity: str | None = None

    def read(self, argv: list[str]) -> None:
        """Read the command line. Raises UsageError, OptionNotPermitted."""
        self.json = asks_for_json(argv)
        flags, (self.spec, directory) = read_line(
            argv, "sfnvrwo:t:N:", ["json"], names=["SPEC", "DIR"], usage=USAGE
        )
        given = {flag for flag, _ in flags}
        self.json, self.verbose = "--json" in given, "-v" in given
        self.sloppy, self.fake = "-s" in given, "-f" in given
        for flag, value in flags:
            if flag == "-N":
                self.namespace = value
            elif flag in ("-r", "-w"):
                self.read_only = flag == "-r"
            elif flag == "-t":
                self.type = read_type(value)
            elif flag == "-o":
                for option in split_options(value):
                    self.read_option(option)
        self.directory = directory
        self._read_composefs()
        if self.read_only or (self.read_only is None and not self.spec.startswith(TMPFS)):
            self.options = [each for each in self.options if each not in ABOUT_WRITING]

    def _read_composefs(self) -> None:
        """Have what is about a composefs come together. Raises UsageError."""
        if self.type == OF_COMPOSEFS:
            self.type = None
            self.spec = self.spec if self.spec.startswith(COMPOSEFS) else f"{COMPOSEFS}{self.spec}"
        if self.spec.startswith(COMPOSEFS):
            if not self.objects:
                raise UsageError(
                    "a composefs needs directories with its contents", hint="give mountd.objects=DIR[:DIR]"
                )
        elif self.objects or self.fs_verity is not None or self.check_contents is not None:
            raise UsageError(
                "mountd.objects=, mountd.verity= and mountd.fsverity= are about a composefs",
                hint="give the type mountd.composefs",
            )

    def read_option(self, option: str) -> None:
        """Take one entry of -o. Raises OptionNotPermitted."""
        option = option.removesuffix(RECURSIVE)
        name, _, value = option.partition("=")
        if option == "ro":
            self.read_only = True
        elif option == "rw":
            return  # mount(8) says so whenever nobody asked for ro
        elif option in IGNORED or name in IGNORED_NAMES or name.startswith(IGNORED_PREFIXES):
            return
        elif option in TAKES_BACK:
            self.options = [each for each in self.options if each != TAKES_BACK[option]]
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
        wrong = name in MADE_OF and not MADE_OF[name](value)
        if not value or wrong or (allowed is not None and value not in allowed):
            words = ", ".join(allowed) if allowed is not None else FREE[name]
            raise OptionNotPermitted(option, "it does not have such a value", hint=f"give {words}")
        if name == "mountd.access":
            self.read_only = ACCESS[value]
        elif name == "mountd.interactive":
            self.interactive = YES_OR_NO[value]
        elif name == "mountd.verity":
            self.check_contents = YES_OR_NO[value]
        elif name == "mountd.objects":
            self.objects = value.split(":")
        else:
            setattr(self, TAKEN_AS[name], value)


class OtherImage(MountdError):
    """The image is not the one that was asked for; not an error of the daemon's."""

    def __init__(self, wanted: str, found: str) -> None:
        """Both are digests; of an image of several layers, those of all."""
        several = BETWEEN in found
        super().__init__(
            f"this is another image: its digest is {found}, not {wanted}"
            if not several
            else f"this image has several layers, each with a digest of its own: {found}",
            hint=MANIFEST if several else "see that SPEC is the right image, or correct mountd.digest=",
        )


def is_digest(text: str) -> bool:
    """Tell whether `text` is a digest as mountd writes them."""
    digits = text.removeprefix(DIGEST)
    return text == DIGEST + digits and is_hexadecimal(digits)


def is_hexadecimal(text: str) -> bool:
    """Tell whether `text` is the digits of a digest."""
    return len(text) == DIGEST_DIGITS and set(text) <= set("0123456789abcdef")


# What the values of some options have to be like.
MADE_OF: Mapping[str, Callable[[str], bool]] = {
    "mountd.digest": is_digest,
    "mountd.fsverity": is_hexadecimal,
    "mountd.objects": lambda paths: all(paths.split(":")),
}


def read_type(text: str) -> str | None:
    """Return the type of file system that -t asks for: “mountd.erofs” is an erofs, “mountd” anything."""
    own, _, subtype = text.partition(".")
    return (subtype if own == "mountd" else text) or None


def run(argv: list[str]) -> int:
    """Do what the command line says and return the exit status. Raises KeyboardInterrupt."""
    wishes = Wishes()
    return carry_out(PROGRAM, USAGE, argv, wishes, lambda: mount(wishes))


def asks_for_json(argv: list[str]) -> bool:
    """Tell whether a command line that may be wrong asks for JSON."""
    return "--json" in argv[: argv.index("--") if "--" in argv else None]


def mount(wishes: Wishes) -> int:
    """Mount and attach, or with -f only ask whether that would be allowed. Raises MountdError, OSError."""
    directory = wishes.directory
    with (
        Place(wishes.namespace) as place,
        open_within(place, directory) as target,
        Request(
            wishes.spec,
            read_only=wishes.read_only,
            file_system_type=wishes.type,
            options=wishes.options,
            userns=wishes.userns,
            idmap=wishes.idmap,
            signature=wishes.signature,
            image_policy=wishes.image_policy,
            interactive=wishes.interactive,
            key_file=wishes.key_file,
            objects=wishes.objects,
            digest=wishes.fs_verity,
            check_contents=wishes.check_contents,
        ) as request,
        Client() as client,
    ):
        request.asks = request.asks and not wishes.json
        if wishes.fake:
            explained = ask(client.explain, request, wishes.sloppy)
            return judge(explained["decision"], directory, wishes, request)
        if place.path is None and not can_attach():
            reply = have_attached(client, request, target, wishes)
        else:
            reply = attach_ourselves(client, request, target, wishes, (place, directory))

    def print_it() -> None:
        if wishes.json:
            show_json({"target": directory, **reply})
        elif wishes.verbose:
            tell(PROGRAM, success(reply, directory))

    line, hint = f"{PROGRAM}: {directory}: it is mounted and stays so", f"“umount {directory}” unmounts it"
    return tell_done(line, hint, print_it, needed=wishes.json)


def open_within(place: Place, directory: str) -> OwnedFd:
    """Open the directory to mount at, where that is. Raises NotFound, OSError, UsageError."""
    with place.inside():
        return open_target(directory)


def success(reply: Mapping[str, object], directory: str) -> str:
    """Return what -v says."""
    decision, mounts = reply["decision"], reply.get("mounts")
    by = f"(rule “{decision.get('rule') if isinstance(decision, dict) else None}”)"
    if not isinstance(mounts, list):
        return f"mounted on {directory} {by}"
    made = mounts[0]
    how = "read-only" if made.get("readOnly") else "read-write"
    return f"{made['fileSystemType']} mounted {how} on {directory} {by}"


def attach_ourselves(
    client: Client, request: Request, target: OwnedFd, wishes: Wishes, where: tuple[Place, str]
) -> Made:
    """Get the mount and attach it, or have that done if it turns out that this process may not.

    Raises MountdError, OSError.
    """
    place, directory = where

    def attach() -> list[str]:
        with place.inside():
            try:
                return attach_reply(made, target.fileno(), directory)
            except KeyboardInterrupt:
                drop(made.mount)  # which from out here can be done only where it is attached
                raise

    with ask(client.mount, request, wishes.sloppy) as made:
        if wishes.digest is not None:
            check_digest(wishes.digest, made.decision, request)
        reply = attached(made, attach, or_ask=place.path is None)
    if reply is None:
        return have_attached(client, request, target, wishes)
    tell_left_out(PROGRAM, left_out_of(reply))
    return reply


def have_attached(client: Client, request: Request, target: OwnedFd, wishes: Wishes) -> Made:
    """Have mountd mount and attach. Raises MountdError, OSError."""
    if wishes.digest is not None:
        explained = ask(client.explain, request, wishes.sloppy)["decision"]
        check_digest(wishes.digest, explained if isinstance(explained, dict) else {}, request)
    request.add_target(OwnedFd(os.dup(target.fileno())))
    reply = regretting(client, lambda: ask(client.attach, request, wishes.sloppy))
    if wishes.digest is not None and "reference" in request.source:
        check_attached(wishes.digest, client, reply, request)
    tell_left_out(PROGRAM, left_out_of(reply))
    return {"attachedBy": "mountd", **reply}


def check_attached(wanted: str, client: Client, reply: Mapping[str, object], request: Request) -> None:
    """Detach what was attached for a name, if that has come to lead elsewhere since it was asked about.

    Raises OtherImage, and what Detach raises.
    """
    decision = reply.get("decision")
    try:
        check_digest(wanted, decision if isinstance(decision, dict) else {}, request)
    except OtherImage:
        client.detach(int(str(reply["id"])), lazy=True)
        raise


def check_digest(wanted: str, decision: Mapping[str, object], request: Request) -> None:
    """Raise OtherImage unless the image that was mounted has this digest, whatever else speaks for it.

    mountd does not read the whole of an image whose place is enough to trust it. Nobody but those who are
    trusted can have changed that since. Raises OSError.
    """
    found = decision.get("digest")
    image = request.source.get("imageFileDescriptor")
    if found != wanted and isinstance(image, int):
        if request.parameters.get("readOnly") is False:
            raise OptionNotPermitted(f"mountd.digest={wanted}", "a writable image has none that stays")
        found = digest_of(request.fds[image].fileno())
    if found != wanted:
        raise OtherImage(wanted, str(found or "not known"))


def digest_of(fd: int) -> str:
    """Return the digest of an open file. Raises OSError."""
    import hashlib

    digest, offset = hashlib.sha256(), 0
    while data := os.pread(fd, HASHED_AT_ONCE, offset):
        digest.update(data)
        offset += len(data)
    return DIGEST + digest.hexdigest()


def ask(method: Callable[..., Reply], request: Request, sloppy: bool) -> Reply:
    """Call Mount or Explain; with -s, without the options that are not permitted. Raises what it raises."""
    while True:
        try:
            return with_consent(method, request)
        except OptionNotPermitted as error:
            options = request.parameters["options"]
            refused = error.parameters.get("option")
            if not sloppy or not isinstance(options, list) or refused not in options:
                raise
            request.parameters["options"] = [each for each in options if each != refused]


def judge(decision: object, directory: str, wishes: Wishes, request: Request) -> int:
    """Return the exit status of a call with -f, and say why it is not 0.

    Raises OtherImage, OptionNotPermitted, OSError.
    """
    fields = decision if isinstance(decision, dict) else {}
    if fields.get("verdict") == "allow":
        if wishes.digest is not None:
            check_digest(wishes.digest, fields, request)
        if wishes.json:
            show_json({"target": directory, "mounts": [], "decision": fields})
        return 0
    error = DeniedByPolicy(str(fields.get("reason")), rule=fields.get("rule"), hint=fields.get("hint"))
    return failed(PROGRAM, error, where=directory, as_json=wishes.json)


def main() -> NoReturn:
    """Entry point of the console script."""
    run_program(PROGRAM, run)


if __name__ == "__main__":
    main()
