"""Images that were pulled on the route of a request: from their name to the images of the store they are of.

An image of several layers is a stack of these: each is judged as an image of the store that was pulled from
where the whole is from, and all have to be allowed. Which layers there are, and in which order, was written
down when the manifest was verified, and is not the caller's to say; so was to which manifest a tag led, and
no registry is asked again. What is judged, and told to the journal, has the digest in its name. A layer that
is named by itself was not pulled: its owner has vouched for the whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mountd.errors import LimitExceeded, NotFound, NotSupported
from mountd.service.requests import What
from mountd.source.model import SourceKind
from mountd.store.layering import StoredLayer
from mountd.store.record import ROOT
from mountd.store.reference import Reference

if TYPE_CHECKING:
    from mountd.evidence.model import Provenance
    from mountd.service.context import RequestContext
    from mountd.service.requests import MountRequest
    from mountd.store.record import Record
    from mountd.store.store import Store

# The kernel has room for 500 in an overlay; runtimes make no image of more than 127.
MAXIMUM_STACKED = 160


def expand(request: MountRequest, context: RequestContext) -> MountRequest:
    """Return the request with the layers of each image that was pulled in its place, the topmost first.

    Raises NotFound for one that was not, LimitExceeded, NotSupported for one to write to, InvalidParameter.
    """
    if request.layers:
        if not any(isinstance(each.stored, Reference) for each in request.layers):
            return request
        above = [layer for each in request.layers for layer in parts(each, context)]
        if len(above) > MAXIMUM_STACKED:
            raise LimitExceeded("layers of a stack, with those of its images", MAXIMUM_STACKED)
        once = without_repeats(above)
        # Of one alone there is no stack: whoever has asked for that is told.
        return replace(request, layers=tuple(above if len(once) == 1 and request.top is None else once))
    found = parts(request, context)
    if len(found) == 1:
        return found[0]
    made = replace(request, kind=SourceKind.STACK, stored=None)
    return made.stacked(tuple(What(SourceKind.IMAGE, stored=each.stored) for each in found))


def parts(request: MountRequest, context: RequestContext) -> list[MountRequest]:
    """Return a request for each layer of the image that was pulled, or the one request for anything else.

    A layer that comes twice is needed once: the upper one shows, and hides, all that the lower one could.
    """
    named = request.stored
    if not isinstance(named, Reference):
        return [request]
    layers = dict.fromkeys(reversed(layers_of(named, context)))
    return [replace(request, stored=each) for each in layers]


def without_repeats(layers: list[MountRequest]) -> list[MountRequest]:
    """Return the layers without those of images that come again further down.

    That is what most images have in common, their base, and `parts` says why once is enough.
    """
    digests: set[str] = set()
    found = []
    for each in layers:
        if isinstance(each.stored, StoredLayer):
            if each.stored.digest in digests:
                continue
            digests.add(each.stored.digest)
        found.append(each)
    return found


def layers_of(wanted: Reference, context: RequestContext) -> list[StoredLayer]:
    """Return the layers of an image, the lowest first, all of which are root's. Raises NotFound."""
    store = context.store
    if store is None:
        raise NotFound("the store", hint="the journal of mountd says why it has none")
    # The caller's word for a tag of the digest is not worth repeating.
    wanted = wanted if wanted.digest is None else replace(wanted, tag=None)
    at = leads_to(wanted, store)
    found = store.pulled(at.repository, at.digest or "")
    if found is None:
        return [single(at, str(wanted), store)]
    return [StoredLayer(digest, str(at), str(wanted), found.provenance) for digest in found.stored]


def leads_to(wanted: Reference, store: Store) -> Reference:
    """Return the reference with the digest that its tag led to at the last pull. Raises NotFound."""
    if wanted.digest is not None:
        return wanted
    digest = store.tagged(wanted.repository, wanted.tag or "")
    if digest is None:
        raise missing(str(wanted), str(wanted))
    return replace(wanted, digest=digest)


def single(at: Reference, wanted: str, store: Store) -> StoredLayer:
    """Return an image of one layer that is known by its record only. Raises NotFound."""
    for record in store.records():
        provenance = provenance_of(record)
        if provenance is None or provenance.manifest != at.digest:
            continue
        if provenance.repository == at.repository and record.belongs_to(ROOT):
            return StoredLayer(record.digest, str(at), wanted, provenance)
    raise missing(str(at), wanted)


def missing(name: str, wanted: str) -> NotFound:
    """Return the error for an image that was not pulled, or of which a layer was removed."""
    return NotFound(f"{name} in the store", hint=f"“mountctl image pull {wanted}” puts it there")


def provenance_of(record: Record) -> Provenance | None:
    """Return where a stored image was pulled from.

    A part of an image is none that was pulled, whoever has imported the same bytes.
    """
    whole = record.provenance is not None and len(record.provenance.layers) == 1
    return record.provenance if whole else None


def check_whole(provenance: Provenance | None) -> None:
    """Raise NotSupported for what is only a part of an image."""
    if provenance is not None and len(provenance.layers) > 1:
        whole = f"oci:{provenance.repository}@{provenance.manifest}"
        raise NotSupported(
            f"mounting one of the {len(provenance.layers)} layers of an image",
            hint=f"mount all of it, as “{whole}”",
        )
