"""The policy: rules, in order, of which the first that matches image and caller decides.

These are plain facts, and each of them refuses to exist half: a rule that allows something without saying
what proves it, or grants nothing, cannot be made. Where they come from is the business of `policy_file`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mountd.caller.model import OVERFLOW_ID
from mountd.trust import location as location_pattern
from mountd.trust.options import CLEARABLE, RESTRICTING, check_grant
from mountd.trust.wishes import IDMAP_KINDS

NOT_SUPPORTED = "not supported by this version of mountd"

MAXIMUM_NAME = 255
FILE_SYSTEMS = ("btrfs", "erofs", "ext4", "squashfs", "xfs")
TMPFS = "tmpfs"
ROOT_OWNED = "root-owned"
LATER_INTEGRITY = ("fs-verity", "dm-verity", "stored", "sealed")
NAMESPACES = ("own", "none")


class PolicyValueError(ValueError):
    """A value that no rule can have; `key` is where it stands within the rule, such as "image.location"."""

    def __init__(self, key: str, reason: str) -> None:
        """`reason` says what is wrong and what would be right."""
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason


class Verdict(StrEnum):
    """What a rule says of the requests that it matches."""

    ALLOW = "allow"
    DENY = "deny"
    ASK = "ask"


class Access(StrEnum):
    """Whether a rule lets a mount be written to."""

    READ_ONLY = "read-only"
    READ_WRITE = "read-write"


@dataclass(frozen=True, slots=True)
class ImageMatch:
    """What a rule is about: images at one of the `location` patterns, a `kind`, or `any` source at all."""

    location: tuple[str, ...] = ()
    kind: str | None = None
    any: bool = False

    def __post_init__(self) -> None:
        if bool(self.location) + (self.kind is not None) + self.any != 1:
            raise PolicyValueError("image", "give exactly one of location, kind and any = true")
        if self.kind not in (None, TMPFS):
            raise PolicyValueError("image.kind", f"“{self.kind}” is {NOT_SUPPORTED}; only “{TMPFS}” is")
        for pattern in self.location:
            try:
                location_pattern.check_pattern(pattern)
            except ValueError as error:
                raise PolicyValueError("image.location", f"“{pattern}”: {error}") from None


@dataclass(frozen=True, slots=True)
class CallerMatch:
    """Whom a rule is about: all that is given has to match, of `users` and of `groups` one member each.

    `users` and `groups` are host ids. `user_namespace` is "own" (the caller is in a user namespace of its
    own, or handed one over) or "none"; `host` and `nested` are whether it is in the host's user namespace.
    """

    any: bool = False
    users: frozenset[int] | None = None
    groups: frozenset[int] | None = None
    user_namespace: str | None = None
    host: bool | None = None
    nested: bool | None = None

    def __post_init__(self) -> None:
        given = (self.users, self.groups, self.user_namespace, self.host, self.nested)
        narrowed = any(value is not None for value in given)
        if self.any == narrowed:
            raise PolicyValueError("caller", "give either any = true or at least one other key")
        for key, ids in (("users", self.users), ("groups", self.groups)):
            if ids is not None and not ids:
                raise PolicyValueError(f"caller.{key}", "the list is empty; name somebody")
            if OVERFLOW_ID in (ids or ()):
                raise PolicyValueError(
                    f"caller.{key}",
                    f"{OVERFLOW_ID} stands for every unknown id and never matches; remove it",
                )
        if self.user_namespace not in (None, *NAMESPACES):
            raise PolicyValueError("caller.user-namespace", f"it is not one of {', '.join(NAMESPACES)}")
        if self.host is not None and self.host == self.nested:
            raise PolicyValueError("caller.nested", "no caller is both host and nested, or neither")
        if self.user_namespace == "none" and (self.host is False or self.nested is True):
            raise PolicyValueError("caller.user-namespace", "no nested caller is without a user namespace")


@dataclass(frozen=True, slots=True)
class Require:
    """What has to be proven of an image: one of `integrity`, so that nobody can change it any more."""

    integrity: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.integrity:
            raise PolicyValueError("require.integrity", f"the list is empty; name at least “{ROOT_OWNED}”")
        for name in self.integrity:
            if name in LATER_INTEGRITY:
                raise PolicyValueError("require.integrity", f"“{name}” is {NOT_SUPPORTED}")
            if name != ROOT_OWNED:
                raise PolicyValueError("require.integrity", f"“{name}” is unknown; “{ROOT_OWNED}” is known")


@dataclass(frozen=True, slots=True)
class Grant:
    """What may be done with an image. `options` are option grants, `flags` are locked on top of the usual.

    `max_size` in bytes and `max_inodes` bound a tmpfs.
    """

    file_systems: tuple[str, ...] = ()
    access: Access = Access.READ_ONLY
    options: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    idmap: tuple[str, ...] = ("none",)
    max_size: int | None = None
    max_inodes: int | None = None

    def __post_init__(self) -> None:
        for flag in CLEARABLE.intersection(self.flags):
            raise PolicyValueError(
                "grant.flags",
                f"“{flag}” cannot be locked: the kernel lets whoever receives the mount clear it; remove it",
            )
        for key, values, known in (
            ("file-systems", self.file_systems, FILE_SYSTEMS),
            ("flags", self.flags, tuple(sorted(RESTRICTING - CLEARABLE))),
            ("idmap", self.idmap, IDMAP_KINDS),
        ):
            for value in values:
                if value not in known:
                    raise PolicyValueError(f"grant.{key}", f"“{value}” is not one of {', '.join(known)}")
        if not self.idmap:
            raise PolicyValueError("grant.idmap", "the list is empty; leave the key out for “none”")
        for key, number in (("max-size", self.max_size), ("max-inodes", self.max_inodes)):
            if number is not None and not 0 < number < 1 << 63:
                raise PolicyValueError(f"grant.{key}", "it is out of range; give a number from 1 on")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; `origin` is where it stands, for messages."""

    name: str
    origin: str
    image: ImageMatch
    caller: CallerMatch
    require: Require | None
    grant: Grant | None
    verdict: Verdict

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.name.isprintable() or len(self.name) > MAXIMUM_NAME:
            raise PolicyValueError("name", f"give 1 to {MAXIMUM_NAME} printable characters")
        if self.verdict is Verdict.DENY:
            self.check_absent("a rule that denies has none", require=self.require, grant=self.grant)
        elif self.grant is None:
            raise PolicyValueError("grant", "it is missing; say what the rule grants")
        elif self.image.kind == TMPFS:
            self.check_tmpfs(self.grant)
        else:
            self.check_image(self.grant)

    def check_image(self, grant: Grant) -> None:
        """Refuse what a rule about images cannot have, and what it cannot lack."""
        if self.require is None:
            raise PolicyValueError("require", f'it is missing; give integrity = ["{ROOT_OWNED}"]')
        if not grant.file_systems:
            raise PolicyValueError("grant.file-systems", f"name some of {', '.join(FILE_SYSTEMS)}")
        self.check_absent(
            "it is for a tmpfs only",
            **{"grant.max-size": grant.max_size, "grant.max-inodes": grant.max_inodes},
        )
        self.check_options(grant, grant.file_systems)

    def check_tmpfs(self, grant: Grant) -> None:
        """Refuse what a rule about a tmpfs cannot have, and what it cannot lack."""
        self.check_absent(
            "a tmpfs is made empty and has none",
            **{"require": self.require, "grant.file-systems": grant.file_systems or None},
        )
        if grant.max_size is None:
            raise PolicyValueError("grant.max-size", 'it is missing; bound the tmpfs, such as by "64M"')
        self.check_options(grant, (TMPFS,))

    def check_options(self, grant: Grant, types: tuple[str, ...]) -> None:
        """Refuse option grants that none of the file systems `types` can use."""
        for entry in grant.options:
            try:
                check_grant(entry, types)
            except ValueError as error:
                raise PolicyValueError("grant.options", str(error)) from None

    def check_absent(self, reason: str, **values: object) -> None:
        """Refuse the first key of `values` that has one, for `reason`."""
        for key, value in values.items():
            if value is not None:
                raise PolicyValueError(key, f"{reason}; remove it")


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules in the order in which they are tried. Without any, everything is denied."""

    rules: tuple[Rule, ...]
