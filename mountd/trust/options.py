"""Mount options: which ones a request may have, and what a rule's option grants mean.

An option passes in three steps. It has to be well-formed. Words of the VFS, which hold for every file
system, need no grant as long as they restrict; what they would lift is refused to everybody. All other
options go to the file system's own parser in the kernel, so they have to be in the table of those that are
known to be harmless (ALLOWED), and a rule has to grant them. No policy can let through what is not in the
table: the options of the kernel open other devices, relabel files and panic machines.

A grant is `opt` (with any value or none), `opt=value` (with this value only) or `opt=` (only without value);
`$UID` and `$GID` in the value stand for the caller's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.errors import LimitExceeded, OptionNotPermitted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mountd.caller.model import Caller

MAXIMUM_OPTION_BYTES = 1024
MAXIMUM_OPTIONS = 64  # far more than all tables together have

# Each of these takes something away from whoever uses the mount.
RESTRICTING = frozenset({"nosuid", "nodev", "noexec", "nosymfollow", "noatime", "nodiratime"})
# The kernel has no lock for these (MNT_LOCK_* in linux/mount.h): whoever receives the mount clears them.
CLEARABLE = frozenset({"nosymfollow"})
LIFTING = frozenset({"suid", "dev", "exec", "symfollow"})
# Only one of these can hold; relatime is what the kernel does by itself.
ACCESS_TIMES = ("noatime", "relatime", "strictatime")

FLAG = ""  # the pattern of an option that takes no value
SWITCHES = {"user_xattr": FLAG, "nouser_xattr": FLAG, "acl": FLAG, "noacl": FLAG}
COMPRESSION = r"(no|none|lzo|zlib(:[0-9])?|zstd(:-?[0-9]{1,2})?)?"

# File system -> option -> the pattern that its whole value has to match.
ALLOWED: Mapping[str, Mapping[str, str]] = {
    "erofs": {**SWITCHES, "cache_strategy": r"disabled|readahead|readaround"},
    "squashfs": {"errors": r"continue", "threads": r"single|multi|percpu|[1-9][0-9]{0,2}"},
    "ext4": {**SWITCHES, "discard": FLAG, "nodiscard": FLAG, "lazytime": FLAG},
    "xfs": {
        "discard": FLAG,
        "nodiscard": FLAG,
        "inode32": FLAG,
        "inode64": FLAG,
        "largeio": FLAG,
        "nolargeio": FLAG,
    },
    "btrfs": {
        "compress": COMPRESSION,
        "compress-force": COMPRESSION,
        "discard": r"(sync|async)?",
        "nodiscard": FLAG,
        "space_cache": r"(v1|v2)?",
    },
    "tmpfs": {"huge": r"never|always|within_size|advise", "noswap": FLAG},
}


@dataclass(frozen=True, slots=True)
class ParsedOptions:
    """The options of a request, sorted.

    `attributes` are words of the VFS, without `relatime`, which is the default. `file_system` are the
    entries for the file system itself, as they were asked for.
    """

    read_only: bool
    attributes: frozenset[str]
    file_system: tuple[str, ...]


def parse(options: Sequence[str], *, read_only: bool) -> ParsedOptions:
    """Sort the options of a request whose readOnly is `read_only`; whether a rule grants them is open.

    Raises OptionNotPermitted for what is malformed, contradictory or refused to everybody, and LimitExceeded
    if there are too many.
    """
    if len(options) > MAXIMUM_OPTIONS:
        raise LimitExceeded("mount options", MAXIMUM_OPTIONS)
    for option in options:
        check_form(option)
    words = frozenset(options)
    for option in options:
        if option in LIFTING:
            raise OptionNotPermitted(
                option, "only the host's administrator decides that", hint="leave the option out"
            )
    if "rw" in words and (read_only or "ro" in words):
        raise OptionNotPermitted(
            "rw", "the request is read-only", hint="set readOnly to false, or leave the option out"
        )
    times = [word for word in ACCESS_TIMES if word in words]
    if len(times) > 1:
        raise OptionNotPermitted(times[1], f"it contradicts {times[0]}", hint="give only one of them")
    file_system = tuple(option for option in options if not is_generic(option))
    names = [option.partition("=")[0] for option in file_system]
    for name, option in zip(names, file_system, strict=True):
        if names.count(name) > 1:
            raise OptionNotPermitted(option, "it is given more than once", hint="give it only once")
    attributes = words & (RESTRICTING | {"strictatime"})
    return ParsedOptions(read_only or "ro" in words, attributes, file_system)


def check_form(option: str) -> None:
    """Raise OptionNotPermitted if `option` could not be passed on as it is."""
    if not option:
        raise OptionNotPermitted(option, "it is empty", hint="leave it out")
    # Lone surrogates, which JSON can carry, are not printable either, so it can be encoded from here on.
    if not option.isprintable() or "\\" in option:
        raise OptionNotPermitted(shown(option), "it contains a control character or a backslash")
    if len(option.encode()) > MAXIMUM_OPTION_BYTES:
        raise OptionNotPermitted(shown(option), f"it is longer than {MAXIMUM_OPTION_BYTES} bytes")
    if "," in option:
        raise OptionNotPermitted(shown(option), "it contains a comma", hint="give one option per entry")
    name, separator, value = option.partition("=")
    if not name or (separator and not value):
        raise OptionNotPermitted(
            shown(option), "it has a “=” with nothing on one side", hint="write NAME or NAME=VALUE"
        )


def is_generic(option: str) -> bool:
    """Whether `option` is a word of the VFS and not of a file system."""
    return option in RESTRICTING or option in ACCESS_TIMES or option in ("ro", "rw", "defaults")


def shown(text: str, length: int = 80) -> str:
    """Return `text` in a form that fits into one line of a message."""
    cut = text if len(text) <= length else text[:length] + "…"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def permit(option: str, *, type: str, rule: str, grants: Iterable[str], caller: Caller) -> None:
    """Raise OptionNotPermitted unless the file system `type` may get `option` by the `grants` of `rule`."""
    name, _, value = option.partition("=")
    known = ALLOWED.get(type, {})
    if name not in known:
        raise OptionNotPermitted(
            option,
            f"mountd never passes it to {type}",
            hint=f"these can be granted: {', '.join(sorted(known))}" if known else "leave it out",
        )
    if re.fullmatch(known[name], value) is None:
        form = f"matches {known[name]}" if known[name] else "is left out"
        raise OptionNotPermitted(
            option, f"mountd passes it to {type} only if its value {form}", hint="correct the value"
        )
    if not any(granted(grant, option, caller) for grant in grants):
        raise OptionNotPermitted(
            option,
            f"rule “{rule}” does not grant it",
            hint="leave it out, or ask an administrator to add it to the options of the rule",
        )


def granted(grant: str, option: str, caller: Caller) -> bool:
    """Whether the option grant `grant` covers `option`."""
    name, separator, value = grant.partition("=")
    asked_name, _, asked_value = option.partition("=")
    if name != asked_name:
        return False
    return not separator or asked_value == expand(value, caller.uid, caller.gid)


def expand(value: str, uid: int, gid: int) -> str:
    """Put the ids in for `$UID` and `$GID`."""
    return re.sub(r"\$([UG])ID", lambda found: str(uid if found[1] == "U" else gid), value)


def check_grant(grant: str, types: Iterable[str]) -> None:
    """Raise ValueError, saying why, if `grant` could never let any option through to one of `types`."""
    name, separator, value = grant.partition("=")
    if not name or not grant.isprintable() or "," in grant or "\\" in grant:
        raise ValueError(f"“{shown(grant)}” is not NAME, NAME=VALUE or NAME=")
    # These need no grant; a rule may say so all the same.
    if grant in RESTRICTING:
        return
    patterns = [ALLOWED[type][name] for type in types if name in ALLOWED.get(type, {})]
    if not patterns:
        raise ValueError(f"mountd never passes “{name}” to {' or '.join(types)}; remove it")
    example = expand(value, 1, 1)
    if "$" in example:
        raise ValueError(f"“{grant}” contains a “$” that is neither $UID nor $GID")
    if separator and not any(re.fullmatch(pattern, example) for pattern in patterns):
        raise ValueError(f"mountd never passes “{name}” with this value; it takes {' or '.join(patterns)}")
