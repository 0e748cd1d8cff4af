"""The tables of a policy file: their keys, the types of their values, and what is said about a wrong one.

What the values mean together is checked by the types of `policy`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from mountd.trust.policy import NOT_SUPPORTED

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

# Keys that the design knows and this version does not: ignoring them would drop a condition.
LATER = {"image": {"network"}}
KEY_KINDS = ("x509", "ed25519", "ecdsa", "sigstore", "gpg")


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


# As a file may have them; the conversions above are not for the schema to find out.
TEXTS: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]
}
ID: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 0}]}
SIZE: dict[str, Any] = {
    "anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[0-9]{1,19}[KMGT]?$"}]
}
Texts = Annotated[list[str], BeforeValidator(as_list), WithJsonSchema(TEXTS)]
Ids = list[Annotated[str, BeforeValidator(as_id_text), WithJsonSchema(ID)]]
Size = Annotated[int, BeforeValidator(as_bytes), WithJsonSchema(SIZE)]


class Table(BaseModel):
    """What all tables have in common: no key beyond the known ones, and no conversions."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", alias_generator=lambda name: name.replace("_", "-")
    )


class ImageTable(Table):
    """`image` of a rule."""

    location: Texts | None = None
    signed: str | None = None
    digest: Texts | None = None
    registry: Texts | None = None
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
    units: Texts | None = None
    slices: Texts | None = None
    containers: Texts | None = None


class RequireTable(Table):
    """`require` of a rule."""

    integrity: list[str] | None = None
    ownership: list[str] | None = None
    signature: str | None = None
    min_strength: Literal["signed", "digest", "location"] | None = None


class GrantTable(Table):
    """`grant` of a rule."""

    file_systems: list[str] | None = None
    access: Literal["read-only", "read-write"] | None = None
    options: list[str] = []
    flags: list[str] = []
    idmap: list[str] = ["none"]
    max_size: Size | None = None
    max_inodes: int | None = None
    attach: list[str] = []
    max_mounts: int | None = None
    encrypted: bool = False


class RuleTable(Table):
    """One `[[rule]]`."""

    name: str
    image: ImageTable
    caller: CallerTable
    require: RequireTable | None = None
    grant: GrantTable | None = None
    verdict: Literal["allow", "deny", "ask"]


class KeyTable(Table):
    """One `[key.NAME]`."""

    x509: str | None = None
    ed25519: str | None = None
    ecdsa: str | None = None
    sigstore: str | None = None
    gpg: str | None = None


class PolicyTable(Table):
    """A whole file."""

    rule: list[RuleTable] = []
    key: dict[str, KeyTable] = Field(default_factory=dict)


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
