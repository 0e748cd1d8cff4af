"""The keys of the policy, made usable: from the bytes of their files to certificates and public keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from mountd.errors import KeyUnknown
from mountd.evidence import certificate, openpgp, public_key
from mountd.evidence.certificate import CertificateError
from mountd.evidence.public_key import WeakKey

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mountd.evidence.certificate import Certificate
    from mountd.evidence.model import Key
    from mountd.evidence.public_key import PublicKey

T = TypeVar("T")


class KeyProblem(Exception):
    """A key of the policy cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """A key under its name in the policy, and what was read of it."""

    name: str
    value: T


def certificates(key: Key) -> list[Certificate]:
    """Return the certificates of a key of the kind "x509". Raises KeyProblem."""
    try:
        return certificate.read_all(key.data)
    except CertificateError as error:
        raise KeyProblem(str(error)) from None


def public_keys(key: Key) -> list[PublicKey]:
    """Return the public keys of a key of the kinds "ed25519", "ecdsa" and "sigstore". Raises KeyProblem."""
    wanted = ed25519.Ed25519PublicKey if key.kind == "ed25519" else ec.EllipticCurvePublicKey
    found: list[PublicKey] = []
    for data in key.data:
        try:
            each = public_key.load(data)
        except WeakKey as error:
            raise KeyProblem(str(error)) from None
        if not isinstance(each, wanted):
            raise KeyProblem(f"a public key that is not of the kind {key.kind}")
        curve = each.curve.name if isinstance(each, ec.EllipticCurvePublicKey) else None
        if key.kind == "sigstore" and curve != "secp256r1":
            raise KeyProblem(f"a key on the curve {curve}, where it has to be P-256")
        found.append(each)
    if not found:
        raise KeyProblem("no public key")
    return found


def keyring(key: Key) -> bytes:
    """Return the binary keyring of a key of the kind "gpg". Raises KeyProblem."""
    try:
        return b"".join(openpgp.public_keys(data) for data in key.data)
    except openpgp.OpenPgpError as error:
        raise KeyProblem(str(error)) from None


LOADERS: dict[str, Callable[[Key], object]] = {
    "x509": certificates,
    "ed25519": public_keys,
    "ecdsa": public_keys,
    "sigstore": public_keys,
    "gpg": keyring,
}


def check(key: Key) -> None:
    """Have a key be usable, for whoever loads it. Raises KeyProblem, ValueError for an unknown kind."""
    if key.kind not in LOADERS:
        raise ValueError(f"no kind of key: {key.kind}")
    LOADERS[key.kind](key)


def usable(
    keys: Sequence[Key], kinds: Sequence[str], load: Callable[[Key], T], what: str
) -> list[Loaded[T]]:
    """Return those of `keys` that are of one of `kinds` and can be used.

    `what` is what the signature is called. Raises KeyUnknown if there is none.
    """
    found: list[Loaded[T]] = []
    problems: list[str] = []
    for key in keys:
        if key.kind not in kinds:
            continue
        try:
            found.append(Loaded(key.name, load(key)))
        except KeyProblem as error:
            problems.append(f"the key “{key.name}” from {key.origin} cannot be used: {error}")
    if found:
        return found
    if problems:
        raise KeyUnknown("; ".join(problems))
    raise KeyUnknown(
        f"it is {what}, and none of the keys that count is of the kind {' or '.join(kinds)}",
        hint="have it signed with a key that the policy names, or name its key in a [key.NAME] section",
    )
