"""What was found out about an image that can make it trustworthy, as plain facts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mountd.errors import MountdError


@dataclass(frozen=True, slots=True)
class Proof:
    """One kind of immutability, proven: `kind` is its name in the policy.

    `digest` is what the proof says of the contents, as "ALGORITHM:HEX", None for one that says nothing of
    them.
    """

    kind: str
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the policy, under its name there, as plain bytes that were read when the policy was loaded.

    `kind` is "x509", "ed25519", "ecdsa", "sigstore" or "gpg". `data` are the contents of its files, in PEM
    or DER (armoured or binary for "gpg"), `origin` says where they were read, for messages.
    """

    name: str
    kind: str
    data: tuple[bytes, ...]
    origin: str


@dataclass(frozen=True, slots=True)
class Signer:
    """A signature that was verified: with the policy's key of the name `key`, over `digest`.

    `subject` says who that is, as the key itself has it. `covers` is what `digest` ("ALGORITHM:HEX") is of:
    "image", "root-hash" or "fs-verity". `key_mark` tells the key from another that is given its name later,
    `valid_until` is when the signer's certificate expires, in seconds since the epoch, None for never.
    """

    key: str
    subject: str
    covers: str
    digest: str
    key_mark: str | None = None
    valid_until: int | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an image of the store was pulled from, as recorded when it was verified.

    `repository` is "HOST[:PORT]/PATH" in its canonical form, `manifest` and `layers` are digests,
    `requirement` names the one of containers-policy.json(5) that passed, `signer` who passed it; `time` is
    in seconds since the epoch.
    """

    repository: str
    manifest: str
    layers: tuple[str, ...]
    requirement: str
    signer: str | None
    time: int


class Ownership(StrEnum):
    """Whose a directory is, from the caller's point of view; the first three can be trusted by a rule.

    ROOT: root's, and nobody else can write to any directory above it. CALLER: the caller's own. FOREIGN: of
    the range that belongs to nobody, below a directory of the caller's.
    """

    ROOT = "root"
    CALLER = "caller"
    FOREIGN = "foreign"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Objects:
    """What speaks for a directory of a composefs in which the contents of files lie.

    `ownership` says whose it is, `problem` why it is not root's with all that is in it; `unverifiable` is
    why fs-verity cannot check what is in it, None if it can.
    """

    ownership: Ownership
    problem: str | None
    unverifiable: str | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The facts about one source.

    `root_owned_path` is the absolute path of the image in the daemon's mount namespace, every component of
    which belongs to root and is writable by nobody else, and which was proven to lead to this very inode. It
    is None if that is not so, and `location_problem` then says why. `descriptor_writable` is whether the
    caller's descriptor can write to the image, wherever it lies.

    `proofs` are the kinds of immutability beside that one that were proven, `unproven` says of each other
    kind, by name, why it was not. `digest` is that of the image's bytes, where it is known. `signers` are
    the signatures that came along and hold, `signature_error` is what is wrong with one that does not.
    `signed_partitions` are the designators of the partitions whose root hash one of them covers.

    `ownership` is there for a directory, and `ownership_problem` says of OTHER why it is nothing better.
    `objects` is there for a composefs.
    """

    root_owned_path: str | None
    location_problem: str | None
    descriptor_writable: bool
    proofs: tuple[Proof, ...] = ()
    unproven: tuple[tuple[str, str], ...] = ()
    digest: str | None = None
    signers: tuple[Signer, ...] = ()
    signature_error: MountdError | None = None
    provenance: Provenance | None = None
    signed_partitions: frozenset[str] = frozenset()
    ownership: Ownership | None = None
    ownership_problem: str | None = None
    objects: tuple[Objects, ...] = ()
