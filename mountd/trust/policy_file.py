"""The policy as files: TOML drop-ins that only root can have written.

Of files with the same name, the one in the earliest directory counts, and the others are masked. An empty
file, or a symbolic link to /dev/null, masks without adding anything. All files are taken in the order of
their names, whatever their directory. Anything that is not understood is an error that names the file and
the key: half a policy is worse than the previous one, which the caller of `load` keeps.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat
import tomllib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from mountd.trust.options import shown
from mountd.trust.policy import (
    NOT_SUPPORTED,
    TMPFS,
    Access,
    CallerMatch,
    Grant,
    ImageMatch,
    Policy,
    PolicyValueError,
    Require,
    Rule,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

    from pydantic_core import ErrorDetails

MAXIMUM_BYTES = 1 << 20
MAXIMUM_MESSAGE = 4096
MAXIMUM_ID = (1 << 32) - 2  # the one above is (uid_t) -1, "no change"
MASK = "/dev/null"
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

# Keys that the design knows and this version does not: ignoring them would drop a condition.
LATER = {
    "": {"key"},
    "image": {"signed", "digest", "registry", "network"},
    "caller": {"units", "slices", "containers"},
    "require": {"signature", "min-strength"},
    "grant": {"attach", "max-mounts"},
}


class PolicyError(ValueError):
    """A policy file that cannot be used: `key` is what is wrong in it, empty if all of it is."""

    def __init__(self, file: str, key: str, reason: str) -> None:
        """`reason` says what is wrong with the key and what would be right."""
        # Keys and values are quoted from the file, and may hold anything.
        self.file, self.key, self.reason = (shown(text, MAXIMUM_MESSAGE) for text in (file, key, reason))
        super().__init__(": ".join(part for part in (self.file, self.key, self.reason) if part))


def as_list(value: object) -> object:
    """Make a list of a single string."""
    return [value] if isinstance(value, str) else value


def as_id_text(value: object) -> object:
    """Make text of a number, so that a user can be given as either."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def as_bytes(value: object) -> object:
    """Make bytes of a size such as "64M"."""
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"([0-9]{1,19})([KMGT]?)", value)
    if parts is None:
        raise ValueError('give bytes, or a number with K, M, G or T, such as "64M"')
    return int(parts[1]) * UNITS[parts[2]]


Texts = Annotated[list[str], BeforeValidator(as_list)]
Ids = list[Annotated[str, BeforeValidator(as_id_text)]]


class Table(BaseModel):
    """What all tables have in common: no key beyond the known ones, and no conversions."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", alias_generator=lambda name: name.replace("_", "-")
    )


class ImageTable(Table):
    """`image` of a rule."""

    location: Texts | None = None
    kind: str | None = None
    any: bool | None = None


class CallerTable(Table):
    """`caller` of a rule."""

    any: bool | None = None
    users: Ids | None = None
    groups: Ids | None = None
    user_namespace: Literal["own", "none"] | None = None
    host: bool | None = None
    nested: bool | None = None


class RequireTable(Table):
    """`require` of a rule."""

    integrity: list[str]


class GrantTable(Table):
    """`grant` of a rule."""

    file_systems: list[str] | None = None
    access: Literal["read-only", "read-write"] | None = None
    options: list[str] = []
    flags: list[str] = []
    idmap: list[str] = ["none"]
    max_size: Annotated[int, BeforeValidator(as_bytes)] | None = None
    max_inodes: int | None = None


class RuleTable(Table):
    """One `[[rule]]`."""

    name: str
    image: ImageTable
    caller: CallerTable
    require: RequireTable | None = None
    grant: GrantTable | None = None
    verdict: Literal["allow", "deny", "ask"]


class PolicyTable(Table):
    """A whole file."""

    rule: list[RuleTable] = []


def user_id(name: str) -> int:
    """Return the uid of a user; raise KeyError if there is none of this name."""
    return pwd.getpwnam(name).pw_uid


def group_id(name: str) -> int:
    """Return the gid of a group; raise KeyError if there is none of this name."""
    return grp.getgrnam(name).gr_gid


def load(
    directories: Sequence[Path],
    *,
    resolve_user: Callable[[str], int] = user_id,
    resolve_group: Callable[[str], int] = group_id,
) -> Policy:
    """Return the policy of the drop-ins in `directories`, the first of which have precedence.

    The resolvers return the id of a name and raise KeyError for an unknown one. Directories that do not
    exist are passed over. Raises PolicyError for the first thing that is wrong.
    """
    found: dict[str, tuple[str, bytes]] = {}
    for directory in directories:
        found |= drop_ins(directory, masked=found.keys())
    rules: list[Rule] = []
    origins: dict[str, str] = {}
    for _, (file, contents) in sorted(found.items()):
        for number, table in enumerate(parse(file, contents).rule, start=1):
            where = f"rule {number}"
            try:
                rule = make_rule(table, f"{file}: {where}", resolve_user, resolve_group)
            except PolicyValueError as error:
                raise PolicyError(file, f"{where}: {error.key}", error.reason) from None
            if rule.name in origins:
                raise PolicyError(
                    file,
                    f"{where}: name",
                    f"“{rule.name}” is taken by {origins[rule.name]}; choose another",
                )
            origins[rule.name] = rule.origin
            rules.append(rule)
    return Policy(tuple(rules))


def drop_ins(directory: Path, *, masked: Collection[str]) -> dict[str, tuple[str, bytes]]:
    """Return the contents of all drop-ins of a directory but those whose names are in `masked`."""
    found = {}
    try:
        with opened(str(directory), os.O_RDONLY | os.O_DIRECTORY) as directory_fd:
            check_owner(str(directory), os.fstat(directory_fd))
            for name in sorted(os.listdir(directory_fd)):
                # A dot starts the names of what editors leave lying about.
                if name.endswith(".toml") and not name.startswith(".") and name not in masked:
                    found[name] = read_drop_in(directory, name, directory_fd)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise PolicyError(str(directory), "", error.strerror or str(error)) from error
    return found


def read_drop_in(directory: Path, name: str, directory_fd: int) -> tuple[str, bytes]:
    """Return the path of one drop-in, for messages, and its contents, which are empty for a mask."""
    file = str(directory / name)
    if not file.isprintable():
        raise PolicyError(file, "", "its name is not printable; rename it")
    try:
        if stat.S_ISLNK(os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_mode):
            if os.readlink(name, dir_fd=directory_fd) == MASK:
                return file, b""
            raise PolicyError(file, "", f"it is a symbolic link; only one to {MASK} is allowed")
        # O_NONBLOCK, as a pipe in the place of a file would otherwise wait for a writer for ever.
        with opened(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, directory_fd) as fd:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise PolicyError(file, "", "it is not a regular file")
            check_owner(file, status)
            return file, read_all(file, fd)
    except OSError as error:
        raise PolicyError(file, "", error.strerror or str(error)) from error


def read_all(file: str, fd: int) -> bytes:
    """Return the bytes of `fd`, which are few."""
    contents = bytearray()
    while chunk := os.read(fd, MAXIMUM_BYTES + 1 - len(contents)):
        contents += chunk
        if len(contents) > MAXIMUM_BYTES:
            raise PolicyError(file, "", f"it is larger than {MAXIMUM_BYTES} bytes; split it")
    return bytes(contents)


@contextmanager
def opened(path: str, flags: int, directory_fd: int | None = None) -> Iterator[int]:
    """Open a file, and close it again at the end of the block."""
    fd = os.open(path, flags | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def check_owner(file: str, status: os.stat_result) -> None:
    """Raise PolicyError if somebody else than root could have written this."""
    if status.st_uid != 0:
        raise PolicyError(file, "", f"it belongs to uid {status.st_uid}; chown it to root")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PolicyError(file, "", "its group or others can write to it; chmod it go-w")


def parse(file: str, contents: bytes) -> PolicyTable:
    """Return the tables of a file, checked one by one but not against each other."""
    try:
        document = tomllib.loads(contents.decode())
    except UnicodeDecodeError as error:
        raise PolicyError(file, "", f"it is not UTF-8 at byte {error.start}") from None
    # ValueError, as a number of too many digits is not a TOMLDecodeError.
    except (ValueError, RecursionError) as error:
        raise PolicyError(file, "", f"it is not TOML: {error}") from None
    try:
        return PolicyTable.model_validate(document)
    except ValidationError as error:
        # An unknown key may be the reason why another one is missing, so it is named first.
        errors = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        raise PolicyError(file, *key_and_reason(errors[0])) from None


def key_and_reason(error: ErrorDetails) -> tuple[str, str]:
    """Return where pydantic found something wrong, in the words of the file, and what."""
    location = list(error["loc"])
    where = ""
    if location[:1] == ["rule"] and len(location) > 1 and isinstance(location[1], int):
        where = f"rule {location[1] + 1}: "
        location = location[2:]
    key = where + ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        table = ".".join(str(part) for part in location[:-1])
        # Within a rule, the keys of no table are not those of the file.
        later = LATER.get(table, set()) if table or not where else set()
        return key, NOT_SUPPORTED if location[-1] in later else "unknown key; remove it or correct it"
    if error["type"] == "missing":
        return key, "it is missing"
    return key, error["msg"].removeprefix("Value error, ")


def make_rule(
    table: RuleTable,
    origin: str,
    resolve_user: Callable[[str], int],
    resolve_group: Callable[[str], int],
) -> Rule:
    """Return the rule that `table` describes. Raises PolicyValueError if there can be no such rule."""
    caller = table.caller
    return Rule(
        name=table.name,
        origin=origin,
        image=make_image(table.image),
        caller=CallerMatch(
            any=only_true("caller.any", caller.any),
            users=resolve("caller.users", caller.users, resolve_user),
            groups=resolve("caller.groups", caller.groups, resolve_group),
            user_namespace=caller.user_namespace,
            host=caller.host,
            nested=caller.nested,
        ),
        require=Require(tuple(table.require.integrity)) if table.require is not None else None,
        grant=make_grant(table.grant, table.image.kind) if table.grant is not None else None,
        verdict=Verdict(table.verdict),
    )


def make_image(table: ImageTable) -> ImageMatch:
    """Return what `image` of a rule matches."""
    if table.location == []:
        raise PolicyValueError("image.location", "the list is empty; name a directory's contents")
    return ImageMatch(
        location=tuple(table.location or ()), kind=table.kind, any=only_true("image.any", table.any)
    )


def make_grant(table: GrantTable, kind: str | None) -> Grant:
    """Return what `grant` of a rule grants; a tmpfs would be of no use without being written to."""
    usual = Access.READ_WRITE if kind == TMPFS else Access.READ_ONLY
    return Grant(
        file_systems=tuple(table.file_systems or ()),
        access=Access(table.access) if table.access is not None else usual,
        options=tuple(table.options),
        flags=tuple(table.flags),
        idmap=tuple(table.idmap),
        max_size=table.max_size,
        max_inodes=table.max_inodes,
    )


def only_true(key: str, value: bool | None) -> bool:
    """Return whether `any` is given. Raises PolicyValueError for "any = false", which says nothing."""
    if value is False:
        raise PolicyValueError(key, "it can only be true; remove it")
    return value is True


def resolve(key: str, names: list[str] | None, resolver: Callable[[str], int]) -> frozenset[int] | None:
    """Return the ids of names and numbers, None if there is no list."""
    if names is None:
        return None
    ids = set()
    for name in names:
        try:
            number = int(name) if re.fullmatch(r"-?[0-9]{1,20}", name) else resolver(name)
        except (KeyError, ValueError):
            raise PolicyValueError(key, f"“{name}” is unknown on this system; create or remove it") from None
        if not 0 <= number <= MAXIMUM_ID:
            raise PolicyValueError(key, f"{number} is not an id; give one from 0 to {MAXIMUM_ID}")
        ids.add(number)
    return frozenset(ids)
