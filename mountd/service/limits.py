"""The limits that `mountctl status` shows, each by the name that LimitExceeded has for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.execute import luks
from mountd.ledger.book import LIMIT
from mountd.service import consent, encrypted
from mountd.service.pulled import MAXIMUM_STACKED
from mountd.service.requests import MAXIMUM_LAYERS, MAXIMUM_OBJECTS
from mountd.source.composefs_dump import MAXIMUM_DUMP
from mountd.store import manifest
from mountd.store.composefs_build import MAXIMUM_IMAGE
from mountd.trust.options import MAXIMUM_OPTIONS

if TYPE_CHECKING:
    from mountd.service.context import RequestContext


def limits_of_requests(context: RequestContext) -> dict[str, int]:
    """Return all that hold for requests; the daemon has others, of connections and workers."""
    return {**mount_limits(context), **people_limits(context), **store_limits(context)}


def mount_limits(context: RequestContext) -> dict[str, int]:
    """Return the limits of mounts, and of what one is made of."""
    return {
        **({} if context.ledger is None else {LIMIT: context.ledger.maximum}),
        "layers of a stack": MAXIMUM_LAYERS,
        "layers of a stack, with those of its images": MAXIMUM_STACKED,
        "layers of an image": manifest.MAXIMUM_LAYERS,
        "object directories of a composefs": MAXIMUM_OBJECTS,
        "bytes of a composefs description": MAXIMUM_DUMP,
        "bytes in an image of a composefs": MAXIMUM_IMAGE,
        "mount options": MAXIMUM_OPTIONS,
    }


def people_limits(context: RequestContext) -> dict[str, int]:
    """Return the limits of questions and of keys; none for an instance that has neither."""
    if context.questions is None:
        return {}
    return {
        consent.QUESTIONS: consent.MAXIMUM,
        consent.QUESTIONS_OF_OWNER: consent.MAXIMUM_PER_OWNER,
        consent.IMPORT_QUESTIONS: consent.MAXIMUM_IMPORTS,
        consent.IMPORT_QUESTIONS_OF_OWNER: consent.MAXIMUM_IMPORTS_PER_OWNER,
        encrypted.OPENED: encrypted.PLACES,
        encrypted.OPENED_OF_OWNER: 1,
        luks.DERIVING: int(luks.SECONDS),
    }


def store_limits(context: RequestContext) -> dict[str, int]:
    """Return the limits of the store."""
    if context.store is None:
        return {}
    limits = context.store.limits
    return {
        "bytes in the store": limits.total_bytes,
        "bytes of one owner in the store": limits.owner_bytes,
        "bytes in an image of the store": limits.image_bytes,
        "images in the store": limits.images,
        "images of one owner in the store": limits.owner_images,
        "transfers at the same time": limits.transfers,
        "transfers of one owner at the same time": limits.owner_transfers,
    }
