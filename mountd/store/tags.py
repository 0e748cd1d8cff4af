"""What the tags of registries led to, when an image was last pulled by them.

A tag proves nothing: a registry moves it as it likes. So it is never asked about one when something is
mounted, and no name or label of an image counts. There is one file for each tag, which only a pull writes,
after the image it led to was verified and is in the store: root's, as all of the store, and read as strictly
as a record. It is called by the digest of the name, so that no name can lead out of its directory, and says
the name as well, which has to be the one that was asked for.

A tag leads to the digest of a manifest, and from there it goes on as if that had been given. An image that
is removed takes its tags with it: they lead to nothing, and are swept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from mountd.errors import InvalidImage, InvalidParameter
from mountd.store import record, reference
from mountd.store.record import MAXIMUM_INTEGER, NoRecord
from mountd.store.reference import SCHEME

VERSION = 1
MAXIMUM = 4096  # bytes: a name of MAXIMUM_LENGTH, a digest, a time, and what they are called


@dataclass(frozen=True, slots=True)
class Tag:
    """What a tag led to: `manifest` of the same `repository`, "HOST[:PORT]/PATH".

    `resolved` is when the registry was asked, in nanoseconds since the epoch.
    """

    repository: str
    tag: str
    manifest: str
    resolved: int

    @property
    def name(self) -> str:
        """By what it is mounted, "oci:HOST/PATH:TAG"."""
        return f"{SCHEME}{self.repository}:{self.tag}"


def key_of(repository: str, tag: str) -> str:
    """Return what the file of a tag is called by: hexadecimal digits."""
    # Neither part of it can be taken for some of the other, as no tag has a “/”.
    return hashlib.sha256(f"{repository}:{tag}".encode("utf-8", "surrogatepass")).hexdigest()


def is_outdated(new: Tag, known: Tag, now: int) -> bool:
    """Tell whether of two pulls of one tag the one that ends now was the first to ask the registry.

    A time that is still to come is of a clock that was wrong, and holds up nobody.
    """
    return new.resolved < known.resolved <= now


def serialise(tag: Tag) -> bytes:
    """Return it as JSON. Raises InvalidImage if `parse` would not take it back."""
    data = json.dumps({"version": VERSION, **asdict(tag)}, sort_keys=True).encode()
    try:
        parse(data)
    except NoRecord as reason:
        raise InvalidImage(f"what its tag leads to cannot be recorded: {reason}") from None
    return data


def parse(data: bytes) -> Tag:
    """Read what `serialise` returned. Raises NoRecord, and nothing else."""
    told = record.read_json(data, MAXIMUM, VERSION, {"repository", "tag", "manifest", "resolved"})
    repository, tag, manifest, resolved = (
        told[name] for name in ("repository", "tag", "manifest", "resolved")
    )
    if not all(isinstance(each, str) for each in (repository, tag, manifest)):
        raise NoRecord("a name that is no text")
    if not record.DIGEST.fullmatch(manifest):
        raise NoRecord("it leads to no digest")
    if type(resolved) is not int or not 0 <= resolved <= MAXIMUM_INTEGER:
        raise NoRecord("its time is none")
    found = Tag(repository, tag, manifest, resolved)
    try:
        spelt = reference.parse(found.name)
    except InvalidParameter:
        raise NoRecord("it is not the name of an image in a registry") from None
    if (spelt.repository, spelt.tag) != (repository, tag):
        raise NoRecord("it is not the name that it seems")
    return found
