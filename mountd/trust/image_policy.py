"""A client's own policy for its image, in the grammar of systemd.image-policy(7).

    policy := "" | "*" | "-" | "~" | rule (":" rule)…
    rule   := [designator] "=" ["-" | flag ("+" flag)…]

Blanks may be around designators and flags, and nowhere else. Without a designator, a rule is for all
partitions that no other names. The flags of use say what is allowed of a partition, and are alternatives:
that it is used without protection, with dm-verity, with dm-verity and a signature, encrypted, encrypted with
integrity; that it is there but not used; that it is absent. “open” is all of these, “ignore” the last two.
What cannot be so of a partition is not allowed either: only root and /usr can have dm-verity, and what
protects them has no protection of its own. The flags about read-only mounts, about growing and about types
of file systems narrow how it is used. Where a group of flags is left out, or “-” is in its place, all of the
group is allowed, except that what nothing is said about may only be unused or absent.

Such a policy comes from the caller and is no reason to allow anything. It is read strictly, and can refuse.
A backslash, which systemd drops from between other characters, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.errors import InvalidParameter
from mountd.trust.options import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

PARAMETER = "imagePolicy"
MAXIMUM_LENGTH = 4096
ROOT = "root"
DESIGNATORS = (
    ROOT,
    "usr",
    "home",
    "srv",
    "esp",
    "xbootldr",
    "swap",
    "root-verity",
    "root-verity-sig",
    "usr-verity",
    "usr-verity-sig",
    "tmp",
    "var",
)
NOT_USED = frozenset({"unused", "absent"})
# Programs of systemd 262 name the last in policies of their own; nothing that is mounted here is such.
USES = frozenset({"unprotected", "verity", "signed", "encrypted", "encryptedwithintegrity"}) | NOT_USED
READ_ONLY = frozenset({"read-only-on", "read-only-off"})
GROWING = frozenset({"growfs-on", "growfs-off"})
TYPES = frozenset({"ext4", "erofs", "squashfs", "btrfs", "xfs", "f2fs", "vfat"})
GROUPS = (USES, READ_ONLY, GROWING, TYPES)
HOW_USED = READ_ONLY | GROWING | TYPES
EVERYTHING = USES | HOW_USED
ALIASES = {"open": USES, "ignore": NOT_USED}
OPEN = "open"
NOTHING_SAID = ("", "-")
BLANKS = " \t\n\r"
WITH_VERITY = (ROOT, "usr")
VERITY = frozenset({"verity", "signed"})
PROTECTED = VERITY | {"encrypted", "encryptedwithintegrity"}

ALLOW, IGNORE, DENY = EVERYTHING, NOT_USED | HOW_USED, frozenset({"absent"}) | HOW_USED
WHOLE = {"*": ALLOW, "-": IGNORE, "~": DENY, "": IGNORE}


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """For each partition that is named, all flags that are allowed; `default` is for all others.

    No group of flags is left out here any more, and each has a member: there is no way to say “none”.
    """

    partitions: Mapping[str, frozenset[str]]
    default: frozenset[str]

    def flags(self, designator: str) -> frozenset[str]:
        """Return the flags allowed for a partition, without those that cannot be so of it.

        The data of dm-verity and its signature follow from the partition that they protect.
        """
        return possible(designator, self._said(designator))

    def _said(self, designator: str) -> frozenset[str]:
        if designator in self.partitions:
            return self.partitions[designator]
        for suffix, needed in (("-verity-sig", {"signed"}), ("-verity", {"verity", "signed"})):
            protected = designator.removesuffix(suffix)
            if protected != designator and protected in self.partitions:
                flags = self.partitions[protected]
                if flags & needed:
                    return flags & (NOT_USED | HOW_USED) | {"unprotected"}
                break
        return self.default


def possible(designator: str, flags: frozenset[str]) -> frozenset[str]:
    """Return `flags` without the protections that a partition cannot have."""
    if "-verity" in designator:
        return flags - PROTECTED
    return flags if designator in WITH_VERITY else flags - VERITY


def parse(text: str) -> ImagePolicy:
    """Read a policy. Raises InvalidParameter for what is not understood or said twice."""
    if len(text) > MAXIMUM_LENGTH:
        raise InvalidParameter(PARAMETER, f"it is longer than {MAXIMUM_LENGTH} characters")
    if text in WHOLE:
        return ImagePolicy({}, WHOLE[text])
    partitions: dict[str, frozenset[str]] = {}
    for rule in text.split(":"):
        designator, equals, flags = rule.partition("=")
        designator = designator.strip(BLANKS)
        if not equals:
            raise InvalidParameter(PARAMETER, f"“{shown(rule)}” is not DESIGNATOR=FLAGS")
        if designator and designator not in DESIGNATORS:
            raise InvalidParameter(PARAMETER, f"“{shown(designator)}” is no kind of partition")
        if designator in partitions:
            raise InvalidParameter(PARAMETER, f"“{designator}=” is there twice")
        partitions[designator] = parse_flags(flags)
    return ImagePolicy(partitions, partitions.pop("", IGNORE))


def parse_flags(text: str) -> frozenset[str]:
    """Return the flags of one rule, with all of each group that it says nothing about."""
    flags: set[str] = set()
    text = text.strip(BLANKS)
    for word in () if text in NOTHING_SAID else text.split("+"):
        flag = word.strip(BLANKS)
        if flag in ALIASES:
            flags |= ALIASES[flag]
        elif flag in EVERYTHING:
            flags.add(flag)
        else:
            raise InvalidParameter(PARAMETER, f"“{shown(flag)}” is no flag")
    for group in GROUPS:
        if not flags & group:
            flags |= group
    return frozenset(flags)


def described(policy: ImagePolicy) -> str:
    """Return a policy as text, as short as it can be; to read it again gives the same policy."""
    wanted = all_flags(policy)
    for text, flags in WHOLE.items():
        if policy.default == flags and all_flags(ImagePolicy({}, flags)) == wanted:
            return text
    named = dict(policy.partitions)
    for designator in policy.partitions:
        # Such as hash data and signatures of what is named, and what is as everything else.
        others = {name: each for name, each in named.items() if name != designator}
        if all_flags(ImagePolicy(others, policy.default)) == wanted:
            named = others
    rules = [
        f"{designator}={described_flags(designator, flags)}"
        for designator, flags in sorted(named.items(), key=in_order)
    ]
    if policy.default != IGNORE:
        rules.append(f"={described_flags('', policy.default)}")
    return ":".join(rules)


def all_flags(policy: ImagePolicy) -> list[frozenset[str]]:
    """Return what is allowed of each kind of partition."""
    return [policy.flags(designator) for designator in DESIGNATORS]


def in_order(rule: tuple[str, frozenset[str]]) -> int:
    """Tell the place of a rule among those of a policy."""
    return DESIGNATORS.index(rule[0])


def described_flags(designator: str, flags: frozenset[str]) -> str:
    """Return the flags of one rule as text, without the groups of which all are allowed.

    Raises ValueError for a group of which nothing is: left out, it would be allowed as a whole.
    """
    if not all(flags & group for group in GROUPS):
        raise ValueError("an image policy that cannot be said")
    every = USES if not designator else possible(designator, USES)
    words = [OPEN] if flags >= every else sorted(flags & USES)
    for group in GROUPS[1:]:
        words += [] if flags >= group else sorted(flags & group)
    return "+".join(words)


def refusal(
    policy: ImagePolicy,
    *,
    file_system_type: str | None,
    verity: bool,
    signed: bool,
    encrypted: bool = False,
) -> str | None:
    """Return why `policy` refuses a bare file system to be mounted, None if it does not.

    Such an image has no partitions, and is judged as the root partition would be; no table has set any flag
    of it. `verity` is whether
    dm-verity protects it, `signed` whether its root hash is signed as well. An `encrypted` one offers that
    and nothing else, and has a type once it was opened.
    """
    flags = policy.flags(ROOT)
    found = {"encrypted"} if encrypted else {"unprotected"}
    found |= ({"verity"} if verity or signed else set()) | ({"signed"} if signed else set())
    if not flags & USES - NOT_USED:
        return "it allows no use of a root partition, and a bare file system is one"
    if not flags & found:
        wanted = ", ".join(sorted(flags & USES - NOT_USED))
        best = strongest(verity, signed, encrypted)
        return f"it wants the root partition to be {wanted}, and the image is {best}"
    if file_system_type not in (None, *flags):
        allowed = ", ".join(sorted(flags & TYPES)) or "no type of file system"
        return f"it allows {allowed}, and the image is {file_system_type}"
    for flag in ("read-only", "growfs"):
        if f"{flag}-off" not in flags:
            return (
                f"it wants the flag {flag} of the root partition to be on, and a bare file system has none"
            )
    return None


def strongest(verity: bool, signed: bool, encrypted: bool) -> str:
    """Name the best protection that an image has."""
    if encrypted:
        return "encrypted"
    if signed:
        return "signed"
    return "protected by dm-verity" if verity else "unprotected"
