"""Which images of the store are the layers of an image of a registry, in which order, and where it is from.

The record of a layer cannot say that: the same layer is in many images, and may be in one of them twice. So
there is one file for each image that was pulled, under its name: the repository and the digest of the
manifest. It is written when all layers are there. Should one be removed later, it leads nowhere, and is
swept. It is read as strictly as a record.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache

from mountd.errors import InvalidImage
from mountd.evidence.model import Provenance
from mountd.store import record
from mountd.store.record import REMEMBERED, NoRecord

VERSION = 1
MAXIMUM = 128 << 10  # bytes: two digests for each of record.MAXIMUM_LAYERS, and the rest


@dataclass(frozen=True, slots=True)
class PulledImage:
    """An image of a registry: where it is from, and the digests of its layers in the store, lowest first.

    There are as many as `provenance.layers`, which are the digests that the registry has for the same.
    """

    provenance: Provenance
    stored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """An image of the store as a layer of one that was pulled: `name` is that one's, with its digest.

    `wanted` is what was asked for, by which it is pulled again.
    """

    digest: str
    name: str
    wanted: str
    provenance: Provenance


def key_of(repository: str, manifest: str) -> str:
    """Return what the file of an image is called by: hexadecimal digits."""
    return hashlib.sha256(f"{repository}@{manifest}".encode("utf-8", "surrogatepass")).hexdigest()


def serialise(pulled: PulledImage) -> bytes:
    """Return it as JSON. Raises InvalidImage if `parse` would not take it back."""
    told = {"version": VERSION, "provenance": asdict(pulled.provenance), "stored": pulled.stored}
    data = json.dumps(told, sort_keys=True).encode()
    try:
        parse(data)
    except NoRecord as reason:
        raise InvalidImage(f"where it is from cannot be recorded: {reason}") from None
    return data


# The same bytes say the same; an image of many layers has as many records.
@lru_cache(maxsize=REMEMBERED)
def parse(data: bytes) -> PulledImage:
    """Read what `serialise` returned. Raises NoRecord, and nothing else."""
    told = record.read_json(data, MAXIMUM, VERSION, {"provenance", "stored"})
    provenance = record.read_provenance(told["provenance"])
    stored = record.read_digests(told["stored"], "stored")
    if not stored or len(stored) != len(provenance.layers):
        raise NoRecord("it has not as many layers as the manifest")
    return PulledImage(provenance, stored)
