"""The system's policy about registries, containers-policy.json(5): what an image has to pass.

skopeo enforces the policy. What happens here is that mountd knows *what* was enforced: the bytes that are
read here are the ones that skopeo is given, the scope is found by the same rules, and the requirement goes
into the record. The file is read as strictly as skopeo reads it: an unknown key, a duplicate key or an empty
list refuses everything. Only the system's files count, whatever the environment says.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.errors import DeniedByPolicy
from mountd.store import strict_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mountd.store.reference import Reference

PATHS = ("/etc/containers/policy.json", "/usr/share/containers/policy.json")
MAXIMUM_BYTES = 1 << 20
MAXIMUM_KEY_BYTES = 256 << 10
TRANSPORT = "docker"
ACCEPT_ANYTHING = "insecureAcceptAnything"
REJECT = "reject"
SIGNED_BY, SIGSTORE_SIGNED = "signedBy", "sigstoreSigned"
HINT = "see containers-policy.json(5), and give the repository a scope with signedBy or sigstoreSigned"

KEYS = ("keyPath", "keyPaths", "keyData", "keyDatas")
# Type of a requirement -> the keys it may have beside "type". One of the first group has to be there,
# exactly.
SOURCES = {SIGNED_BY: KEYS[:3], SIGSTORE_SIGNED: (*KEYS, "fulcio", "pki")}
OTHERS = {
    SIGNED_BY: ("keyType", "signedIdentity"),
    SIGSTORE_SIGNED: (
        "rekorPublicKeyPath",
        "rekorPublicKeyPaths",
        "rekorPublicKeyData",
        "rekorPublicKeyDatas",
        "signedIdentity",
    ),
}
LISTS = ("keyPaths", "keyDatas", "rekorPublicKeyPaths", "rekorPublicKeyDatas")
TABLES: dict[str, tuple[str, ...]] = {
    "fulcio": ("caPath", "caData", "oidcIssuer", "subjectEmail"),
    "pki": (
        "caRootsPath",
        "caRootsData",
        "caIntermediatesPath",
        "caIntermediatesData",
        "subjectEmail",
        "subjectHostname",
    ),
}
# Type of a signedIdentity -> its keys beside "type", all of which have to be there.
IDENTITIES = {
    "matchExact": (),
    "matchRepoDigestOrExact": (),
    "matchRepository": (),
    "exactReference": ("dockerReference",),
    "exactRepository": ("dockerRepository",),
    "remapIdentity": ("prefix", "signedPrefix"),
}


class ContainersPolicyError(DeniedByPolicy):
    """The system's policy about registries cannot be used; nothing can be pulled."""

    def __init__(self, path: str, reason: str) -> None:
        """`path` is the file."""
        super().__init__(reason, rule=path, hint="correct the file; see containers-policy.json(5)")


@dataclass(frozen=True, slots=True)
class Rule:
    """One requirement of the policy: its type, and where its keys are.

    `files` are the key files it names, `embedded` are digests of key data in the policy itself, `people` is
    whom a certificate has to be for.
    """

    type: str
    files: tuple[str, ...] = ()
    embedded: tuple[str, ...] = ()
    people: str | None = None


@dataclass(frozen=True, slots=True)
class ContainersPolicy:
    """A policy that was read: its exact bytes, and by transport and scope what has to pass, all of each."""

    path: str
    contents: bytes
    default: tuple[Rule, ...]
    transports: dict[str, dict[str, tuple[Rule, ...]]]


@dataclass(frozen=True, slots=True)
class Requirement:
    """What an image of one name has to pass: `scope` is where the policy says so, "default" included.

    `name` is the type of the requirement, several joined by "+". `signer` says whose signature that is; None
    if anything passes.
    """

    scope: str
    name: str
    signer: str | None


def load(paths: Sequence[str] = PATHS) -> ContainersPolicy:
    """Return the policy of the system: the first of `paths` that exists.

    Raises ContainersPolicyError, and DeniedByPolicy if there is none.
    """
    for path in paths:
        try:
            contents = read_system_file(path, MAXIMUM_BYTES)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ContainersPolicyError(path, reason or "it cannot be read") from None
        return parse(path, contents)
    raise DeniedByPolicy(f"there is no policy about registries ({' or '.join(paths)})", hint=HINT)


def read_system_file(path: str, maximum: int) -> bytes:
    """Return the contents of a file that root alone can write to.

    Raises OSError, and ValueError with the reason for one that is not so or is too large.
    """
    # O_NONBLOCK, as a pipe in the place of a file would otherwise wait for a writer for ever.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_uid != 0:
            raise ValueError(f"it belongs to uid {status.st_uid}; chown it to root")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError("its group or others can write to it; chmod it go-w")
        contents = file.read(maximum + 1)
    if len(contents) > maximum:
        raise ValueError(f"it is larger than {maximum} bytes")
    return contents


def read_key_file(path: str) -> bytes:
    """Return the contents of a key file. Raises as `read_system_file` does."""
    if not os.stat(path).st_mode & stat.S_IROTH:
        raise ValueError(f"{path}: skopeo runs as another user, who cannot read it; chmod it o+r")
    try:
        return read_system_file(path, MAXIMUM_KEY_BYTES)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse(path: str, contents: bytes) -> ContainersPolicy:
    """Return what the bytes of the file `path` say. Raises ContainersPolicyError."""
    try:
        document = table("the policy", strict_json.loads(contents, MAXIMUM_BYTES), ("default", "transports"))
        if "default" not in document:
            raise ValueError("“default” is missing")
        transports = {}
        for transport, scopes in table("transports", document.get("transports", {}), None).items():
            transports[transport] = {
                scope: rules(f"{transport}: “{scope}”", value)
                for scope, value in table(transport, scopes, None).items()
            }
        return ContainersPolicy(path, contents, rules("default", document["default"]), transports)
    except ValueError as error:
        raise ContainersPolicyError(path, str(error)) from None


def table(what: str, value: object, keys: Sequence[str] | None) -> dict[str, object]:
    """Return a JSON object that has no other keys than `keys`. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{what}: this is not a JSON object")
    for key in value:
        if keys is not None and key not in keys:
            raise ValueError(f"{what}: “{key}” is unknown")
    return value


def rules(what: str, value: object) -> tuple[Rule, ...]:
    """Return the requirements of one scope. Raises ValueError, also for an empty list."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{what}: this is not a list of at least one requirement")
    return tuple(rule(f"{what}, requirement {number}", each) for number, each in enumerate(value, 1))


def rule(what: str, value: object) -> Rule:
    """Return one requirement. Raises ValueError."""
    type = table(what, value, None).get("type")
    if type in (ACCEPT_ANYTHING, REJECT):
        table(what, value, ("type",))
        return Rule(str(type))
    if not isinstance(type, str) or type not in SOURCES:
        raise ValueError(f"{what}: the type is unknown")
    fields = table(what, value, ("type", *SOURCES[type], *OTHERS[type]))
    check_fields(what, fields)
    given = [key for key in SOURCES[type] if key in fields]
    if len(given) != 1:
        raise ValueError(f"{what}: give exactly one of {', '.join(SOURCES[type])}")
    if type == SIGNED_BY and fields.get("keyType") != "GPGKeys":
        raise ValueError(f"{what}: keyType is not “GPGKeys”")
    return sources(type, given[0], fields[given[0]])


def check_fields(what: str, fields: dict[str, object]) -> None:
    """Refuse values of another kind than the keys have. Raises ValueError."""
    for key, value in fields.items():
        inner = f"{what}: {key}"
        if key == "signedIdentity":
            identity = table(inner, value, None)
            type = identity.get("type")
            if not isinstance(type, str) or type not in IDENTITIES:
                raise ValueError(f"{inner}: the type is unknown")
            if set(identity) != {"type", *IDENTITIES[type]}:
                raise ValueError(f"{inner}: the keys are not those of “{type}”")
            strings(inner, list(identity.values()))
        elif key in TABLES:
            strings(inner, list(table(inner, value, TABLES[key]).values()))
        elif key in LISTS:
            strings(inner, value)
        else:
            strings(inner, [value])


def strings(what: str, value: object) -> None:
    """Raise ValueError unless this is a list of at least one string, none of them empty."""
    if not isinstance(value, list) or not value or not all(each and isinstance(each, str) for each in value):
        raise ValueError(f"{what}: this is not text")


def sources(type: str, key: str, value: object) -> Rule:
    """Return the requirement whose keys come from `key`, all values of which were checked."""
    if isinstance(value, dict):
        people = [value[name] for name in ("subjectEmail", "subjectHostname") if name in value]
        issuer = f" of {value['oidcIssuer']}" if "oidcIssuer" in value else ""
        return Rule(type, people=f"{key} {' '.join(people)}{issuer}")
    texts = [value] if isinstance(value, str) else value
    assert isinstance(texts, list)
    if key in ("keyPath", "keyPaths"):
        return Rule(type, files=tuple(texts))
    return Rule(type, embedded=tuple(hashlib.sha256(text.encode()).hexdigest() for text in texts))


def scopes(reference: Reference) -> list[str]:
    """Return the scopes that cover an image, the most specific first (containers-policy.json(5), docker:).

    The full name, the repository, each name above it up to the host, and then wildcards of the host's name
    without its port. The scope "" covers all of the transport.
    """
    found = [reference.identity]
    name = reference.repository
    while True:
        found.append(name)
        name, slash, _ = name.rpartition("/")
        if not slash:
            break
    domain = reference.host.partition(":")[0]
    while "." in domain:
        domain = domain.partition(".")[2]
        found.append(f"*.{domain}")
    return [*found, ""]


def find(policy: ContainersPolicy, reference: Reference) -> tuple[str, tuple[Rule, ...]]:
    """Return the most specific scope that covers the image, "default" if none does, and what it asks for."""
    by_scope = policy.transports.get(TRANSPORT, {})
    for scope in scopes(reference):
        if scope in by_scope:
            return f"{TRANSPORT}:{scope}", by_scope[scope]
    return "default", policy.default


def require(
    policy: ContainersPolicy,
    reference: Reference,
    *,
    accept_anything: bool = False,
    read_key: Callable[[str], bytes] = read_key_file,
) -> Requirement:
    """Return what the image has to pass.

    Raises DeniedByPolicy if it can pass nothing, and, without `accept_anything`, if anything would pass:
    that proves nothing about the image. Raises ContainersPolicyError for a key file that somebody else than
    root can write to, or that cannot be read.
    """
    scope, wanted = find(policy, reference)
    where = f"{policy.path}, {scope}"
    if any(each.type == REJECT for each in wanted):
        raise DeniedByPolicy(f"the system's policy rejects {reference}", rule=where, hint=HINT)
    proving = [each for each in wanted if each.type != ACCEPT_ANYTHING]
    if not proving:
        if not accept_anything:
            reason = f"the system's policy accepts anything for {reference}, which proves nothing"
            raise DeniedByPolicy(reason, rule=where, hint=HINT)
        return Requirement(scope, ACCEPT_ANYTHING, None)
    try:
        signers = [signer(each, read_key) for each in proving]
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else str(error)
        raise ContainersPolicyError(policy.path, f"{scope}: a key cannot be used: {problem}") from None
    return Requirement(scope, "+".join(each.type for each in proving), "; ".join(signers))


def signer(rule: Rule, read_key: Callable[[str], bytes]) -> str:
    """Return whose signature satisfies a requirement: any of the keys named, with their digests.

    The digest says later which key that was, when another one lies at the same place.
    """
    named = [f"{path} (sha256:{hashlib.sha256(read_key(path)).hexdigest()})" for path in rule.files]
    named += [f"key data (sha256:{digest})" for digest in rule.embedded]
    if rule.people is not None:
        named.append(rule.people)
    return " or ".join(named)
