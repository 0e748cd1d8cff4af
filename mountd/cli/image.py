"""mountctl image: mountd's store from the command line."""

from __future__ import annotations

import os
import sys
import time

from mountd.cli.agent import asking
from mountd.cli.report import printable, say, show_json
from mountd.cli.table import on_terminal, table, terminal_width, wants_colour
from mountd.client import STORED, Client, open_image
from mountd.errors import IMAGES_INTERFACE, InvalidParameter, ProtocolError
from mountd.fds import close_all
from mountd.request import read_signature
from mountd.wire.framing import is_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping
    from typing import Any

    from mountd.fds import OwnedFd

# The daemon's own deadline for a long transfer is an hour; between two replies there may be a slow disk.
TIMEOUT = 3700.0
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
MAXIMUM_AGE = (1 << 62) - 1
EXAMPLES = (
    "mountctl image import --name base base.raw",
    "mountctl image list",
    "mountctl image gc --age 30d",
)
WIDEST_BAR = 30  # columns
NARROWEST_BAR = 5


def add_image_verbs(verbs: Any) -> None:
    """Add the verbs below “image” to their subparsers."""
    from mountd.cli.manners import add_verb

    add = add_verb(
        verbs,
        "import",
        "copy an image into the store, or share its blocks",
        ("mountctl image import --name base /home/me/base.raw",
         "mountctl image import --signature base.raw.p7s base.raw"),
    )  # fmt: skip
    add.add_argument("--name", help="what to call it; names are for people, and prove nothing")
    add.add_argument("--signature", metavar="FILE", help="a detached signature over the image")
    add.add_argument(
        "--interactive",
        action="store_true",
        default=None,
        help="have an administrator asked if need be; the default on a terminal",
    )
    add.add_argument("file", metavar="FILE", help="the image")
    add = add_verb(
        verbs,
        "pull",
        "pull an image from a registry, as the system's policy has it verified",
        ("mountctl image pull oci:registry.example.com/team/base:1",),
    )
    add.add_argument("reference", metavar="REFERENCE", help="oci:HOST/REPOSITORY:TAG, or …@sha256:…")
    add_verb(
        verbs,
        "list",
        "list your images; as root, all",
        ("mountctl image list", "mountctl image list --json"),
    )
    for verb, help in (
        ("inspect", "show what is known about an image"),
        ("verify", "read an image anew and compare its digest"),
        ("remove", "remove an image that is not mounted"),
    ):
        add = add_verb(verbs, verb, help, (f"mountctl image {verb} sha256:…",))
        add.add_argument("digest", metavar="DIGEST", help="sha256:…")
    collect = add_verb(
        verbs,
        "gc",
        "remove images that nobody has used for long",
        ("mountctl image gc", "mountctl image gc --age 30d"),
    )
    collect.add_argument("--age", help="for how long, such as 12h or 30d; default: remove only left-overs")
    for parser in verbs.choices.values():
        parser.add_argument("--json", action="store_true", help="print JSON, for errors as well")


def import_image(options: argparse.Namespace) -> int:
    """Import, and print the digest."""
    signature = None if options.signature is None else read_signature(options.signature)
    fds = [open_image(options.file)]
    try:
        parameters = {"imageFileDescriptor": 0, "name": options.name, "signature": signature}
        image = asking(
            lambda wish: with_progress("Import", {**parameters, "interactive": wish}, fds, "importing"),
            options.interactive,
        )
    finally:
        close_all(fds)
    show(options, {"image": image}, str(image.get("digest")))
    return 0


def pull_image(options: argparse.Namespace) -> int:
    """Pull, and print the digest of each layer, the lowest first."""
    if not is_text(options.reference):
        raise InvalidParameter("REFERENCE", "it is no text")
    reply: dict[str, object] = {}
    meter = Meter("pulling")
    try:
        with Client(timeout=TIMEOUT) as client:
            parameters = {"reference": options.reference}
            for reply in client.call_more(f"{IMAGES_INTERFACE}.Pull", parameters, []):
                meter.show_stage(reply)
    finally:
        meter.clear()
    image, layers = image_of(reply), reply.get("layers")
    stored = [each for each in layers if isinstance(each, dict)] if isinstance(layers, list) else [image]
    told = {"image": image} if layers is None else {"image": image, "layers": layers}
    show(options, told, "\n".join(str(each.get("digest")) for each in stored))
    return 0


def list_images(options: argparse.Namespace) -> int:
    """Print one line for each image."""
    images: list[Any] = []
    after: object = None
    with Client() as client:
        while True:
            reply = call(client, "List", {"after": after})
            page, after = reply.get("images"), reply.get("next")
            if not isinstance(page, list) or not all(isinstance(each, dict) for each in page):
                raise ProtocolError("the reply is not what List returns")
            images += page
            if after is None:
                break
    if options.json or not on_terminal() or not images:
        show(options, {"images": images}, "\n".join(line_of(image) for image in images))
    else:
        head = ["DIGEST", "SIZE", "TYPE", "NAME"]
        rows = [row_of(image) for image in images]
        spare = ("TYPE", "SIZE", "NAME")
        say(table(rows, head, width=terminal_width(), colour=wants_colour(), spare=spare))
    return 0


def inspect_image(options: argparse.Namespace) -> int:
    """Print what is known about an image."""
    with Client() as client:
        image = image_of(call(client, "Inspect", {"digest": digest_of(options.digest)}))
    show(options, {"image": image}, "\n".join(details(image)))
    return 0


def verify_image(options: argparse.Namespace) -> int:
    """Print that the image is what it was."""
    image = with_progress("Verify", {"digest": digest_of(options.digest)}, [], "verifying")
    show(options, {"image": image}, f"{image.get('digest')} is as it was stored")
    return 0


def remove_image(options: argparse.Namespace) -> int:
    """Remove, and print nothing."""
    with Client() as client:
        call(client, "Remove", {"digest": digest_of(options.digest)})
    show(options, {}, "")
    return 0


def collect_garbage(options: argparse.Namespace) -> int:
    """Print what was removed, and what stayed as it is in use."""
    age = None if options.age is None else parse_age(options.age)
    with Client(timeout=TIMEOUT) as client:
        reply = call(client, "CollectGarbage", {"maximumAge": age})
    lines = [
        *(f"removed {digest}" for digest in strings(reply.get("removed"))),
        *(f"in use: {digest}" for digest in strings(reply.get("inUse"))),
        f"{size_of(reply.get('freed'))} freed",
    ]
    show(options, reply, "\n".join(lines))
    return 0


def call(client: Client, method: str, parameters: Mapping[str, object]) -> dict[str, object]:
    """Call a method of io.mountd.Images that has no descriptors."""
    reply, fds = client.call(f"{IMAGES_INTERFACE}.{method}", parameters, [])
    close_all(fds)
    return reply


def with_progress(
    method: str, parameters: Mapping[str, object], fds: list[OwnedFd], doing: str
) -> dict[str, object]:
    """Call a long method, show on a terminal how far it is, and return the image."""
    reply: dict[str, object] = {}
    meter = Meter(doing)
    try:
        with Client(timeout=TIMEOUT) as client:
            for reply in client.call_more(f"{IMAGES_INTERFACE}.{method}", parameters, fds):
                meter.show(reply.get("progress"))
    finally:
        meter.clear()
    return image_of(reply)


class Meter:
    """One line on standard error, if that is a terminal, which is gone at the end."""

    def __init__(self, doing: str) -> None:
        """`doing` says what takes so long."""
        self._doing = doing
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._shown = False

    def show(self, progress: object) -> None:
        """Show {done, total}, if it is that."""
        if not self._terminal or not isinstance(progress, dict):
            return
        done, total = progress.get("done"), progress.get("total")
        if type(done) is int and type(total) is int and total > 0:
            if done >= total:
                # Who has to consent to what was read is asked then, on this terminal maybe.
                self.clear()
                return
            text = f"{done * 100 // total} % of {size_of(total)}"
            bar = bar_of(done, total, self._columns() - len(f"{self._doing}: [] {text}") - 1)
            self._write(f"\r{self._doing}: {bar}{text}\x1b[K")
            self._shown = True

    def show_stage(self, reply: Mapping[str, object]) -> None:
        """Show {stage, done?, total?}, if it is that."""
        stage, total = reply.get("stage"), reply.get("total")
        if not self._terminal or not isinstance(stage, str):
            return
        self._doing = printable(stage)
        if type(total) is int and total > 0 and reply.get("done") != total:
            self.show(reply)
        else:
            self._write(f"\r{self._doing}\x1b[K")
            self._shown = True

    def _columns(self) -> int:
        """Return how wide the terminal is by now."""
        try:
            return os.get_terminal_size(sys.stderr.fileno()).columns
        except (OSError, ValueError):
            return 0

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            self._write("\r\x1b[K")
            self._shown = False

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            self._terminal = self._shown = False


def bar_of(done: int, total: int, columns: int) -> str:
    """Return a bar and a blank that fit into `columns`, "" where there is no room for one."""
    length = min(WIDEST_BAR, columns)
    if length < NARROWEST_BAR:
        return ""
    full = min(length, done * length // total)
    return f"[{'#' * full}{'-' * (length - full)}] "


def image_of(reply: Mapping[str, object]) -> dict[str, object]:
    """Return the image of a last reply. Raises ProtocolError."""
    image = reply.get("image")
    if not isinstance(image, dict):
        raise ProtocolError("the reply has no image")
    return image


def show(options: argparse.Namespace, reply: Mapping[str, object], text: str) -> None:
    """Print the reply as JSON, or text for people."""
    if options.json:
        show_json(reply)
    elif text:
        say("\n".join(printable(line) for line in text.split("\n")))


def line_of(image: Mapping[str, Any]) -> str:
    """Return one line about an image, in which the digest is never cut."""
    digest, size, type, name = row_of(image)
    return f"{digest} {size:>11} {type:8} {name}".rstrip()


def row_of(image: Mapping[str, Any]) -> list[str]:
    """Return the cells about one image."""
    file_system = image.get("fileSystem")
    type = file_system.get("type") if isinstance(file_system, dict) else "unknown"
    return [str(image.get("digest")), size_of(image.get("size")), str(type), name_of(image)]


def name_of(image: Mapping[str, Any]) -> str:
    """Return by what an image is mounted that was pulled; what another one was called by who imported it.

    The tag that it was pulled by may lead elsewhere by now.
    """
    tags, origin = strings(image.get("tags")), image.get("provenance")
    if tags:
        return ", ".join(tags)
    if isinstance(origin, dict):
        return f"oci:{origin.get('repository')}@{origin.get('manifest')}"
    return str(image.get("name") or "")


def details(image: Mapping[str, Any]) -> list[str]:
    """Return all about an image as lines."""
    lines = []
    for name, value in image.items():
        if name == "created" and type(value) is int:
            lines.append(f"created: {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(value))}")
        elif isinstance(value, dict):
            lines += [f"{name}:", *(f"  {key}: {flat(inner)}" for key, inner in value.items())]
        elif not isinstance(value, list):
            lines.append(f"{name}: {value}")
        elif value:
            lines += [f"{name}:", *(f"  {flat(inner)}" for inner in value)]
    return lines


def flat(value: object) -> str:
    """Return a value of a reply on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def strings(value: object) -> list[str]:
    """Return a list of strings, empty for what is none."""
    return [str(each) for each in value] if isinstance(value, list) else []


def size_of(size: object) -> str:
    """Return a number of bytes for people."""
    if type(size) is not int:
        return "?"
    number, unit = float(size), 0
    while number >= 1024 and unit + 1 < len(UNITS):
        number, unit = number / 1024, unit + 1
    return f"{size} bytes" if unit == 0 else f"{number:.1f} {UNITS[unit]}"


def digest_of(text: str) -> str:
    """Return a digest as the interface has it; the reference by which it is mounted will do as well."""
    digest = text.removeprefix(STORED)
    if not digest.isascii():
        raise InvalidParameter("DIGEST", "it has to be “sha256:” and 64 hexadecimal digits")
    return digest


def parse_age(text: str) -> int:
    """Return a span of time in seconds: a number, and s, m, h, d or w. Raises InvalidParameter."""
    unit = SPANS.get(text[-1:])
    digits = text[:-1] if unit is not None else text
    if not digits.isascii() or not digits.isdecimal() or len(digits) > 12:
        raise InvalidParameter("--age", f"“{text}” is no time such as 12h or 30d")
    return min(int(digits) * (unit or 1), MAXIMUM_AGE)


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "import": import_image,
    "pull": pull_image,
    "list": list_images,
    "inspect": inspect_image,
    "verify": verify_image,
    "remove": remove_image,
    "gc": collect_garbage,
}
