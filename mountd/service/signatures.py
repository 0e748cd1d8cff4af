"""Who has signed an image: the policy's keys, and a memory for what was verified before.

Verifying is done in a confined process, which takes longer than a mount. What it found is a function of the
signature, the digests and the keys, and is remembered; how long a certificate is valid is asked again every
few minutes.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from mountd.errors import KeyUnknown
from mountd.evidence import confined_signature

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mountd.evidence.model import Key, Signer
    from mountd.trust.policy import Policy

    Digests = Sequence[tuple[str, str]]

MAXIMUM_KNOWN = 256
SECONDS_KNOWN = 300

# By the signature, the digests, and the keys with their names -> when it was verified, and what came of it.
_known: dict[
    tuple[bytes, tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]], tuple[float, Signer]
] = {}


def prepare() -> None:
    """Load all that verifying needs, for this process and those that it forks."""
    confined_signature.prepare()


def verify(blob: bytes, digests: Digests, policy: Policy) -> Signer:
    """Return who has made the signature `blob` over one of `digests`, by a key of the policy.

    Raises SignatureInvalid, KeyUnknown, and OSError where no process can be made.
    """
    keys = tuple(policy.keys.values())
    if not keys:
        raise no_keys()
    marks = tuple((key.name, fingerprint(key)) for key in keys)
    case = (hashlib.sha256(blob).digest(), tuple(digests), marks)
    now = time.monotonic()
    if case in _known:
        since, known = _known[case]
        if now - since < SECONDS_KNOWN and not has_expired(known):
            return known
    signer = confined_signature.verify(blob, keys, digests, int(time.time()))
    signer = replace(signer, key_mark=fingerprint(policy.keys[signer.key]))
    if len(_known) >= MAXIMUM_KNOWN:
        _known.pop(next(iter(_known)))
    _known[case] = (now, signer)
    return signer


def no_keys() -> KeyUnknown:
    """Return the error for a signature where the policy has no keys at all."""
    return KeyUnknown("the policy has no keys", hint="an administrator can add one: [key.NAME]")


def still_known(signers: Sequence[Signer], policy: Policy) -> tuple[Signer, ...]:
    """Return those of recorded signers whose key the policy has as it was, if they have not expired."""
    return tuple(
        signer
        for signer in signers
        if signer.key in policy.keys
        and fingerprint(policy.keys[signer.key]) == signer.key_mark
        and not has_expired(signer)
    )


def has_expired(signer: Signer) -> bool:
    """Whether the certificate of a signer has expired since the signature was verified."""
    return signer.valid_until is not None and time.time() > signer.valid_until


def fingerprint(key: Key) -> str:
    """Return what tells a key from another that is given its name later."""
    found = hashlib.sha256(key.kind.encode())
    for each in key.data:
        found.update(hashlib.sha256(each).digest())
    return found.hexdigest()
