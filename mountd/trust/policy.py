"""The policy: rules, in order, of which the first that matches image and caller decides.

These are plain facts, and each of them refuses to exist half: a rule that allows something without saying
what proves it, or grants nothing, cannot be made. Where they come from is the business of `policy_file`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from mountd.caller.model import OVERFLOW_ID
from mountd.trust import attach as attach_pattern
from mountd.trust import location as location_pattern
from mountd.trust import registry as registry_pattern
from mountd.trust.options import CLEARABLE, RESTRICTING, check_grant, shown
from mountd.trust.wishes import IDMAP_KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mountd.evidence.model import Key

NOT_SUPPORTED = "not supported by this version of mountd"
NOT_ENCRYPTED = "what mountd makes itself is not encrypted"

MAXIMUM_NAME = 255
FILE_SYSTEMS = ("btrfs", "erofs", "ext4", "squashfs", "xfs")
TMPFS = "tmpfs"
IMAGE = "image"
DIRECTORY = "directory"
COMPOSEFS = "composefs"
ROOT_OWNED = "root-owned"
# The kinds of immutability, as they are called in `require.integrity` and as `Proof.kind`.
INTEGRITY = (ROOT_OWNED, "sealed", "dm-verity", "fs-verity", "stored", "regenerated", "composefs-verity")
# Those that what mountd makes of a description has; no image that somebody hands over does.
OF_DESCRIPTIONS = ("regenerated", "composefs-verity")
NAMESPACES = ("own", "none")
# What a signature is required to be by, if it is not a key of the policy: containers-policy.json(5).
CONTAINERS_POLICY = "containers-policy"
KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
UNIT = re.compile(r"[A-Za-z0-9:_.\\@*-]+\.(service|scope)")
SLICE = re.compile(r"-|[A-Za-z0-9:_.\\@]+(-[A-Za-z0-9:_.\\@]+)*")
# Whose directories a rule can trust, as in `Evidence.ownership`.
OWNERSHIP = ("root", "caller", "foreign")
CONTAINER_MANAGERS = ("containerd", "cri-o", "docker", "lxc", "nspawn", "podman")
MAXIMUM_MOUNTS = 1 << 20


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


class Strength(StrEnum):
    """Who vouches for it that an image is the one that it should be, the strongest first.

    SIGNED: a key of the policy, or one that containers-policy.json(5) wants, has signed these very bytes.
    DIGEST: the rule, or the record of a pull, names these very bytes by their digest. LOCATION: root put
    them where they lie, whatever they are. Each is as good as the ones after it as well.
    """

    SIGNED = "signed"
    DIGEST = "digest"
    LOCATION = "location"

    def reaches(self, other: Strength) -> bool:
        """Whether this is at least as strong as `other`."""
        order = list(Strength)
        return order.index(self) <= order.index(other)


@dataclass(frozen=True, slots=True)
class ImageMatch:
    """What a rule is about, by exactly one of its fields.

    Images at one of the `location` patterns; images that the key named `signed` has signed; images whose
    bytes have one of the digests `digest` ("sha256:HEX"); images that were pulled from one of the `registry`
    patterns; a `kind` of source; or `any` source at all. With the kind “directory”, those at one of the
    `location` patterns, if there are any.
    """

    location: tuple[str, ...] = ()
    kind: str | None = None
    any: bool = False
    signed: str | None = None
    digest: tuple[str, ...] = ()
    registry: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        named = (self.location, self.digest, self.registry)
        # A rule about directories may say where they lie.
        kind = self.kind is not None and not (self.kind == DIRECTORY and self.location)
        if sum(map(bool, named)) + kind + (self.signed is not None) + self.any != 1:
            raise PolicyValueError(
                "image", "give exactly one of location, signed, digest, registry, kind and any = true"
            )
        if self.kind not in (None, TMPFS, IMAGE, DIRECTORY, COMPOSEFS):
            raise PolicyValueError(
                "image.kind",
                f"“{self.kind}” is {NOT_SUPPORTED}; “{IMAGE}”, “{DIRECTORY}”, “{COMPOSEFS}” and “{TMPFS}” "
                "are",
            )
        check_patterns("image.location", self.location, location_pattern.check_pattern)
        check_patterns("image.registry", self.registry, registry_pattern.check_pattern)
        for digest in self.digest:
            if DIGEST.fullmatch(digest) is None:
                raise PolicyValueError(
                    "image.digest", f"“{shown(digest)}” is not sha256: and 64 digits in lower case"
                )

    @property
    def names_bytes(self) -> bool:
        """Whether it is about what is in the image, and not about where it lies."""
        return self.signed is not None or bool(self.digest or self.registry)


@dataclass(frozen=True, slots=True)
class CallerMatch:
    """Whom a rule is about: all that is given has to match, of `users` and of `groups` one member each.

    `users` and `groups` are host ids. `units` are names of systemd's units, `containers` are "MANAGER:NAME",
    in both of which `*` stands for any characters; of `slices`, those below them count as well.
    `user_namespace` is "own" (the caller is in a user namespace of its own, or handed one over) or "none";
    `host` and `nested` are whether it is in the host's user namespace.
    """

    any: bool = False
    users: frozenset[int] | None = None
    groups: frozenset[int] | None = None
    user_namespace: str | None = None
    host: bool | None = None
    nested: bool | None = None
    units: tuple[str, ...] | None = None
    slices: tuple[str, ...] | None = None
    containers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        lists = {
            "users": self.users,
            "groups": self.groups,
            "units": self.units,
            "slices": self.slices,
            "containers": self.containers,
        }
        given = (*lists.values(), self.user_namespace, self.host, self.nested)
        narrowed = any(value is not None for value in given)
        if self.any == narrowed:
            raise PolicyValueError("caller", "give either any = true or at least one other key")
        for key, values in lists.items():
            if values is not None and not values:
                raise PolicyValueError(f"caller.{key}", "the list is empty; name somebody")
            if OVERFLOW_ID in (values or ()):
                raise PolicyValueError(
                    f"caller.{key}",
                    f"{OVERFLOW_ID} stands for every unknown id and never matches; remove it",
                )
        check_patterns("caller.units", self.units or (), check_unit)
        check_patterns("caller.slices", self.slices or (), check_slice)
        check_patterns("caller.containers", self.containers or (), check_container)
        if self.user_namespace not in (None, *NAMESPACES):
            raise PolicyValueError("caller.user-namespace", f"it is not one of {', '.join(NAMESPACES)}")
        if self.host is not None and self.host == self.nested:
            raise PolicyValueError("caller.nested", "no caller is both host and nested, or neither")
        if self.user_namespace == "none" and (self.host is False or self.nested is True):
            raise PolicyValueError("caller.user-namespace", "no nested caller is without a user namespace")


def check_patterns(key: str, patterns: tuple[str, ...], check: Callable[[str], None]) -> None:
    """Raise PolicyValueError for the first of `patterns` that `check` raises ValueError for."""
    for pattern in patterns:
        try:
            check(pattern)
        except ValueError as error:
            raise PolicyValueError(key, f"“{shown(pattern)}”: {error}") from None


def check_unit(name: str) -> None:
    """Raise ValueError unless a caller can be in a unit of this name."""
    if UNIT.fullmatch(name) is None or len(name) > MAXIMUM_NAME:
        raise ValueError("it is no name of a .service or a .scope")


def check_slice(name: str) -> None:
    """Raise ValueError unless there can be a slice of this name (systemd.slice(5))."""
    if not name.endswith(".slice") or SLICE.fullmatch(name[: -len(".slice")]) is None:
        raise ValueError("it is no name of a .slice")


def check_container(name: str) -> None:
    """Raise ValueError unless a container can be called so."""
    manager, colon, inner = name.partition(":")
    if manager not in CONTAINER_MANAGERS or not colon:
        raise ValueError(f"it is not MANAGER:NAME; the managers are {', '.join(CONTAINER_MANAGERS)}")
    if not inner or not inner.isprintable() or set(inner) & set("?[]/"):
        raise ValueError("its name is empty, or has a character that no container's has")


@dataclass(frozen=True, slots=True)
class Require:
    """What has to be proven of an image.

    One of `integrity`, so that nobody can change it any more. `signature` names the key that has to have
    signed it, or is CONTAINERS_POLICY: then it has to come from a registry, and a requirement of
    containers-policy.json(5) that checks a signature has to have been met. `min_strength` is who has to
    vouch for it at least.

    Of a directory, `ownership` says whose it has to be, and nothing else can be required.
    """

    integrity: tuple[str, ...]
    signature: str | None = None
    min_strength: Strength | None = None
    ownership: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.check_ownership()
        if not self.integrity and not self.ownership:
            raise PolicyValueError(
                "require.integrity", f"the list is empty; name some of {', '.join(INTEGRITY)}"
            )
        for name in self.integrity:
            if name not in INTEGRITY:
                raise PolicyValueError(
                    "require.integrity", f"“{shown(name)}” is unknown; {', '.join(INTEGRITY)} are known"
                )

    def check_ownership(self) -> None:
        """Refuse what directories cannot be required to have."""
        for name in self.ownership:
            if name not in OWNERSHIP:
                raise PolicyValueError(
                    "require.ownership", f"“{shown(name)}” is unknown; {', '.join(OWNERSHIP)} are known"
                )
        if self.ownership and (
            self.integrity or self.signature is not None or self.min_strength is not None
        ):
            raise PolicyValueError(
                "require.ownership", "it is about directories, and nothing else is required of these"
            )

    @property
    def names_bytes(self) -> bool:
        """Whether it requires anything of what is in the image."""
        return self.signature is not None or self.min_strength in (Strength.SIGNED, Strength.DIGEST)


@dataclass(frozen=True, slots=True)
class Grant:
    """What may be done with an image. `options` are option grants, `flags` are locked on top of the usual.

    `max_size` in bytes and `max_inodes` bound a tmpfs. `attach` are patterns of the directories at which
    mountd may attach a mount for a caller that cannot do so itself; without any, nowhere. `max_mounts` is
    how many mounts one user may have by the rule, None for as many as the daemon's own limits let it.
    `encrypted` is whether what is encrypted may be opened with a password that the caller has.
    """

    file_systems: tuple[str, ...] = ()
    access: Access = Access.READ_ONLY
    options: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    idmap: tuple[str, ...] = ("none",)
    max_size: int | None = None
    max_inodes: int | None = None
    attach: tuple[str, ...] = ()
    max_mounts: int | None = None
    encrypted: bool = False

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
        check_patterns("grant.attach", self.attach, attach_pattern.check_pattern)
        if self.max_mounts is not None and not 0 < self.max_mounts <= MAXIMUM_MOUNTS:
            raise PolicyValueError(
                "grant.max-mounts", f"it is out of range; give a number from 1 to {MAXIMUM_MOUNTS}"
            )


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
        elif self.image.kind == DIRECTORY:
            self.check_directory(self.grant)
        else:
            self.check_image(self.grant)

    def check_image(self, grant: Grant) -> None:
        """Refuse what a rule about images cannot have, and what it cannot lack."""
        if self.require is None:
            raise PolicyValueError("require", f'it is missing; give integrity = ["{ROOT_OWNED}"]')
        if self.require.ownership:
            raise PolicyValueError(
                "require.ownership", f'it is about directories; give image = {{ kind = "{DIRECTORY}" }}'
            )
        if grant.access is Access.READ_WRITE:
            self.check_writable(self.require)
        if self.image.kind == COMPOSEFS:
            self.check_composefs(self.require, grant)
        elif not self.image.any and set(self.require.integrity) <= set(OF_DESCRIPTIONS):
            raise PolicyValueError(
                "require.integrity", f'it is about descriptions; give image = {{ kind = "{COMPOSEFS}" }}'
            )
        if not grant.file_systems:
            raise PolicyValueError("grant.file-systems", f"name some of {', '.join(FILE_SYSTEMS)}")
        self.check_absent(
            "it is for a tmpfs only",
            **{"grant.max-size": grant.max_size, "grant.max-inodes": grant.max_inodes},
        )
        self.check_options(grant, grant.file_systems)

    def check_composefs(self, require: Require, grant: Grant) -> None:
        """Refuse what a rule about descriptions of composefs cannot have, and what it cannot lack."""
        if not set(require.integrity) <= set(OF_DESCRIPTIONS):
            raise PolicyValueError(
                "require.integrity",
                f"what mountd makes itself is immutable by {' or '.join(OF_DESCRIPTIONS)}; remove others",
            )
        if require.signature is not None or require.min_strength is not None:
            raise PolicyValueError("require", "nobody signs what mountd makes itself; give integrity only")
        if grant.file_systems != ("erofs",):
            raise PolicyValueError("grant.file-systems", 'what mountd makes is erofs; give ["erofs"]')
        self.check_absent(NOT_ENCRYPTED, **{"grant.encrypted": grant.encrypted or None})

    def check_directory(self, grant: Grant) -> None:
        """Refuse what a rule about directories cannot have, and what it cannot lack."""
        if self.require is None or not self.require.ownership:
            raise PolicyValueError(
                "require.ownership", f"it is missing; say whose directories: {', '.join(OWNERSHIP)}"
            )
        if self.image.location and self.require.ownership != ("root",):
            raise PolicyValueError(
                "require.ownership", 'where a directory lies proves something of root\'s only; give ["root"]'
            )
        if grant.access is Access.READ_WRITE and self.require.ownership == ("root",):
            raise PolicyValueError("grant.access", "what is root's is never writable; remove it")
        self.check_absent(
            "a directory has none",
            **{
                "grant.file-systems": grant.file_systems or None,
                "grant.options": grant.options or None,
                "grant.max-size": grant.max_size,
                "grant.max-inodes": grant.max_inodes,
                "grant.encrypted": grant.encrypted or None,
            },
        )

    def check_tmpfs(self, grant: Grant) -> None:
        """Refuse what a rule about a tmpfs cannot have, and what it cannot lack."""
        self.check_absent(
            "a tmpfs is made empty and has none",
            **{
                "require": self.require,
                "grant.file-systems": grant.file_systems or None,
                "grant.encrypted": grant.encrypted or None,
            },
        )
        if grant.max_size is None:
            raise PolicyValueError("grant.max-size", 'it is missing; bound the tmpfs, such as by "64M"')
        self.check_options(grant, (TMPFS,))

    def check_writable(self, require: Require) -> None:
        """Refuse to let be written to what is trusted for what is in it, or what cannot be written to."""
        if ROOT_OWNED not in require.integrity:
            raise PolicyValueError(
                "grant.access", f"only what is “{ROOT_OWNED}” can be written to; add that, or remove this"
            )
        # Whoever may write to an image can change it between the check and the mount.
        if self.image.names_bytes or require.names_bytes:
            raise PolicyValueError(
                "grant.access",
                "what is trusted for its contents (signed, digest, registry) can have no writers; remove it",
            )

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
    """All rules in the order in which they are tried, and the keys that they name.

    Without any rule, everything is denied. `integrity` are the kinds of immutability that rules require.
    """

    rules: tuple[Rule, ...]
    keys: Mapping[str, Key] = field(default_factory=dict)
    integrity: frozenset[str] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        kinds = (kind for rule in self.rules if rule.require is not None for kind in rule.require.integrity)
        object.__setattr__(self, "integrity", frozenset(kinds))
        for rule in self.rules:
            check_keys(rule, self.keys)


def check_keys(rule: Rule, keys: Mapping[str, Key]) -> None:
    """Raise PolicyValueError if `rule` names a key that is none of `keys`."""
    named = {"image.signed": rule.image.signed}
    if rule.require is not None and rule.require.signature != CONTAINERS_POLICY:
        named["require.signature"] = rule.require.signature
    for key, name in named.items():
        if name is not None and name not in keys:
            raise PolicyValueError(key, f"there is no key “{shown(name)}”; add a section [key.NAME] for it")
