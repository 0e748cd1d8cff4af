"""The policy as files: TOML drop-ins that only root can have written.

Of files with the same name, the one in the earliest directory counts, and the others are masked. An empty
file, or a symbolic link to /dev/null, masks without adding anything. All files are taken in the order of
their names, whatever their directory. Anything that is not understood is an error that names the file and
the key: half a policy is worse than the previous one, which the caller of `load` keeps.

The keys that verify signatures are read along with the rules, so that nothing but the policy itself has to
be read again to know what holds.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from mountd.evidence.model import Key
from mountd.trust.options import shown
from mountd.trust.policy import (
    CONTAINERS_POLICY,
    KEY_NAME,
    TMPFS,
    Access,
    CallerMatch,
    Grant,
    ImageMatch,
    Policy,
    PolicyValueError,
    Require,
    Rule,
    Strength,
    Verdict,
    check_keys,
)
from mountd.trust.policy_tables import KEY_KINDS, PolicyTable, key_and_reason
from mountd.trust.root_files import PLAIN, ROOT, NotUsable, check_owner, opened, read_all, read_keys
from mountd.trust.toml_lines import line_of, line_of_syntax_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mountd.trust.policy_tables import GrantTable, ImageTable, KeyTable, RequireTable, RuleTable

MAXIMUM_BYTES = 1 << 20
MAXIMUM_MESSAGE = 4096
MAXIMUM_KEYS = 64
MAXIMUM_ID = (1 << 32) - 2  # the one above is (uid_t) -1, "no change"
MASK = "/dev/null"


class PolicyError(ValueError):
    """A policy file that cannot be used: `key` is what is wrong in it, empty if all of it is.

    `line` is where, from 1 on, as far as it is known.
    """

    def __init__(self, file: str, key: str, reason: str, line: int | None = None) -> None:
        """`reason` says what is wrong with the key and what would be right."""
        # Keys and values are quoted from the file, and may hold anything.
        self.file, self.key, self.reason = (shown(text, MAXIMUM_MESSAGE) for text in (file, key, reason))
        self.line = line
        where = self.file if line is None else f"{self.file}:{line}"
        super().__init__(": ".join(part for part in (where, self.key, self.reason) if part))


@dataclass(frozen=True, slots=True)
class DropIn:
    """A file of the policy that was read: its path, and its text."""

    file: str
    text: str

    def line(self, *path: str | int) -> int | None:
        """Return the line of a key, as far as it is known."""
        return line_of(self.text, path)


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A file that was found: whether it only masks others, and the file that counts in its place, if any."""

    path: str
    is_mask: bool = False
    masked_by: str | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """A rule or a key as it was written: its table, and where it stands, `path` being what to look for."""

    drop_in: DropIn
    path: tuple[str | int, ...]
    table: RuleTable | KeyTable

    @property
    def line(self) -> int | None:
        """The line on which it begins, as far as it is known."""
        return self.drop_in.line(*self.path)


@dataclass(frozen=True, slots=True)
class Loaded:
    """All that was read: the policy of what can be used, how it was written, and all that is wrong.

    `rules` and `keys` are by name.
    """

    policy: Policy
    rules: dict[str, Placed]
    keys: dict[str, Placed]
    problems: tuple[PolicyError, ...]
    files: tuple[PolicyFile, ...] = ()


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
    loaded = Loader(resolve_user, resolve_group).load(directories)
    if loaded.problems:
        raise loaded.problems[0]
    return loaded.policy


class Loader:
    """Reads a policy and notes all that is wrong with it."""

    def __init__(
        self,
        resolve_user: Callable[[str], int] = user_id,
        resolve_group: Callable[[str], int] = group_id,
        owners: frozenset[int] = ROOT,
    ) -> None:
        """`owners` are the uids whose files are read; the daemon itself reads root's only."""
        self._resolve_user = resolve_user
        self._resolve_group = resolve_group
        self._owners = owners
        self._rules: list[tuple[Rule, Placed]] = []
        self._keys: dict[str, Key] = {}
        self._places: dict[str, Placed] = {}
        self._named: set[str] = set()  # the keys that were tried, be they usable or not
        self._problems: list[PolicyError] = []
        self._files: list[PolicyFile] = []

    def load(self, directories: Sequence[Path]) -> Loaded:
        """Return what the drop-ins of `directories` say."""
        found: dict[str, DropIn] = {}
        for directory in directories:
            found |= self._drop_ins(directory, masked_by=found)
        for _, drop_in in sorted(found.items()):
            self._take(drop_in)
        rules = []
        for rule, placed in self._rules:
            # A key that could not be read is a problem of its own.
            if not self._named >= keys_named_by(rule):
                try:
                    check_keys(rule, self._keys)
                except PolicyValueError as error:
                    self._note_value(placed, error)
            elif self._keys.keys() >= keys_named_by(rule):
                rules.append(rule)
        return Loaded(
            Policy(tuple(rules), self._keys),
            {rule.name: placed for rule, placed in self._rules},
            self._places,
            tuple(self._problems),
            tuple(self._files),
        )

    def _note(self, file: str, key: str, reason: str, line: int | None = None) -> None:
        self._problems.append(PolicyError(file, key, reason, line))

    def _note_value(self, placed: Placed, error: PolicyValueError) -> None:
        """Note a value that the rule at `placed` cannot have."""
        line = placed.drop_in.line(*placed.path, *error.key.split("."))
        self._note(placed.drop_in.file, f"rule {rule_number(placed)}: {error.key}", error.reason, line)

    def _drop_ins(self, directory: Path, *, masked_by: Mapping[str, DropIn]) -> dict[str, DropIn]:
        """Return the drop-ins of a directory but those whose names are in `masked_by`."""
        found = {}
        try:
            with opened(str(directory), os.O_RDONLY | os.O_DIRECTORY) as directory_fd:
                check_owner(os.fstat(directory_fd), self._owners)
                for name in sorted(os.listdir(directory_fd)):
                    # A dot starts the names of what editors leave lying about.
                    if not name.endswith(".toml") or name.startswith("."):
                        continue
                    file = str(directory / name)
                    if name in masked_by:
                        self._files.append(PolicyFile(file, masked_by=masked_by[name].file))
                        continue
                    found[name] = self._drop_in(file, name, directory_fd)
                    self._files.append(PolicyFile(file, is_mask=not found[name].text.strip()))
        except FileNotFoundError:
            return {}
        except (OSError, NotUsable) as error:
            self._note(str(directory), "", text_of(error))
        return found

    def _drop_in(self, file: str, name: str, directory_fd: int) -> DropIn:
        """Return one drop-in, which is empty if it is a mask or cannot be used."""
        try:
            contents = read_drop_in(file, name, directory_fd, self._owners)
            return DropIn(file, contents.decode())
        except UnicodeDecodeError as error:
            self._note(file, "", f"it is not UTF-8 at byte {error.start}")
        except (OSError, NotUsable) as error:
            self._note(file, "", text_of(error))
        return DropIn(file, "")

    def _take(self, drop_in: DropIn) -> None:
        """Add the rules and keys of one file."""
        table = self._parse(drop_in)
        if table is None:
            return
        for name, key in table.key.items():
            self._take_key(name, key, Placed(drop_in, ("key", name), key))
        for index, rule in enumerate(table.rule):
            self._take_rule(rule, Placed(drop_in, ("rule", index), rule))

    def _parse(self, drop_in: DropIn) -> PolicyTable | None:
        """Return the tables of a file, checked one by one but not against each other; None if wrong."""
        try:
            document = tomllib.loads(drop_in.text)
        # ValueError, as a number of too many digits is not a TOMLDecodeError.
        except (ValueError, RecursionError) as error:
            self._note(drop_in.file, "", f"it is not TOML: {error}", line_of_syntax_error(str(error)))
            return None
        try:
            return PolicyTable.model_validate(document)
        except ValidationError as error:
            # An unknown key may be the reason why another one is missing, so it is named first.
            for each in sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden"):
                self._note(drop_in.file, *key_and_reason(each), drop_in.line(*each["loc"]))
        return None

    def _take_key(self, name: str, table: KeyTable, placed: Placed) -> None:
        """Read one key."""
        try:
            self._named.add(name)
            if name in self._places:
                other = self._places[name].drop_in.file
                raise PolicyValueError("", f"it is in {other} too; choose another name")
            self._places[name] = placed
            if len(self._keys) >= MAXIMUM_KEYS:
                raise PolicyValueError("", f"there are more than {MAXIMUM_KEYS} keys")
            self._keys[name] = make_key(name, table, self._owners)
        except PolicyValueError as error:
            parts = [part for part in ("key", name, error.key) if part]
            self._note(placed.drop_in.file, ".".join(parts), error.reason, placed.drop_in.line(*parts))

    def _take_rule(self, table: RuleTable, placed: Placed) -> None:
        """Make one rule."""
        origin = f"{placed.drop_in.file}: rule {rule_number(placed)}"
        try:
            rule = make_rule(table, origin, self._resolve_user, self._resolve_group)
            for other, _ in self._rules:
                if other.name == rule.name:
                    raise PolicyValueError(
                        "name", f"“{rule.name}” is taken by {other.origin}; choose another"
                    )
        except PolicyValueError as error:
            self._note_value(placed, error)
        else:
            self._rules.append((rule, placed))


def rule_number(placed: Placed) -> int:
    """Return the number of a rule within its file, from 1 on."""
    return int(placed.path[1]) + 1


def keys_named_by(rule: Rule) -> set[str]:
    """Return the names of the keys that `rule` needs."""
    named = {rule.image.signed}
    if rule.require is not None and rule.require.signature != CONTAINERS_POLICY:
        named.add(rule.require.signature)
    return {name for name in named if name is not None}


def text_of(error: Exception) -> str:
    """Return what is wrong with a file."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def read_drop_in(file: str, name: str, directory_fd: int, owners: frozenset[int]) -> bytes:
    """Return the contents of one drop-in, which are empty for a mask. Raises NotUsable, OSError."""
    if not file.isprintable():
        raise NotUsable("its name is not printable; rename it")
    if stat.S_ISLNK(os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_mode):
        if os.readlink(name, dir_fd=directory_fd) == MASK:
            return b""
        raise NotUsable(f"it is a symbolic link; only one to {MASK} is allowed")
    with opened(name, PLAIN, directory_fd) as fd:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise NotUsable("it is not a regular file")
        check_owner(status, owners)
        return read_all(fd, MAXIMUM_BYTES)


def make_key(name: str, table: KeyTable, owners: frozenset[int]) -> Key:
    """Return the key of a section [key.NAME]. Raises PolicyValueError."""
    if KEY_NAME.fullmatch(name) is None or name == CONTAINERS_POLICY:
        raise PolicyValueError(
            "", f"it is no name for a key; give letters, digits and “._-”, and not “{CONTAINERS_POLICY}”"
        )
    given = {kind: getattr(table, kind) for kind in KEY_KINDS if getattr(table, kind) is not None}
    if len(given) != 1:
        raise PolicyValueError("", f"give exactly one of {', '.join(KEY_KINDS)}")
    ((kind, path),) = given.items()
    try:
        data = read_keys(path, directory_too=kind == "x509", owners=owners)
    except NotUsable as error:
        raise PolicyValueError(kind, str(error)) from None
    return Key(name, kind, data, path)


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
            units=tuple(caller.units) if caller.units is not None else None,
            slices=tuple(caller.slices) if caller.slices is not None else None,
            containers=tuple(caller.containers) if caller.containers is not None else None,
        ),
        require=make_require(table.require) if table.require is not None else None,
        grant=make_grant(table.grant, table.image.kind) if table.grant is not None else None,
        verdict=Verdict(table.verdict),
    )


def make_image(table: ImageTable) -> ImageMatch:
    """Return what `image` of a rule matches."""
    lists = {"location": table.location, "digest": table.digest, "registry": table.registry}
    for key, values in lists.items():
        if values == []:
            raise PolicyValueError(f"image.{key}", "the list is empty; name something")
    return ImageMatch(
        location=tuple(table.location or ()),
        kind=table.kind,
        any=only_true("image.any", table.any),
        signed=table.signed,
        digest=tuple(table.digest or ()),
        registry=tuple(table.registry or ()),
    )


def make_require(table: RequireTable) -> Require:
    """Return what `require` of a rule requires."""
    strength = Strength(table.min_strength) if table.min_strength is not None else None
    for key, names in (("integrity", table.integrity), ("ownership", table.ownership)):
        if names == []:
            raise PolicyValueError(f"require.{key}", "the list is empty; name something")
    return Require(tuple(table.integrity or ()), table.signature, strength, tuple(table.ownership or ()))


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
        attach=tuple(table.attach),
        max_mounts=table.max_mounts,
        encrypted=table.encrypted,
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
