"""Whose the directories of the layers below are, and who may enter them, for a layer that does not say.

An archive may leave a directory out that a layer below has, and name only what is in it. In an overlay the
directory of the upper layer is the one that counts: so it has to have the owner and the mode of the one
below, or a layer that removes a file from /root would open it for everybody. Hence such a layer is made for
those below it: on others it can become another image.

Only directories that are not as DEFAULT are remembered. Times and extended attributes are not.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from mountd.store.tar_header import MAXIMUM_ID

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAXIMUM_BYTES = 16 << 20  # of what one layer tells the next: more than a hundred thousand directories
MAXIMUM_MODE = 0o7777


class Access(NamedTuple):
    """The mode of a directory, and its owner."""

    mode: int
    uid: int
    gid: int


DEFAULT = Access(0o755, 0, 0)


def with_layer(
    below: Mapping[bytes, Access],
    own: Mapping[bytes, Access],
    replaced: Callable[[bytes], bool],
    opaque: Callable[[bytes], bool],
) -> dict[bytes, Access]:
    """Return what is there once a layer is over those `below`.

    `own` are the directories that it has itself. Nothing of those below shows at a path that is `replaced`,
    nor further down; nor below a directory that is `opaque`.
    """
    found = {path: access for path, access in below.items() if not _is_gone(path, replaced, opaque)}
    found.update(own)
    return {path: access for path, access in found.items() if access != DEFAULT}


def _is_gone(path: bytes, replaced: Callable[[bytes], bool], opaque: Callable[[bytes], bool]) -> bool:
    if replaced(path):
        return True
    while path:
        path = path.rpartition(b"/")[0]
        if replaced(path) or opaque(path):
            return True
    return False


def serialise(directories: Mapping[bytes, Access]) -> list[object] | None:
    """Return what `parse` reads, for JSON; None for too many."""
    told: list[object] = [[path.decode("latin-1"), *access] for path, access in directories.items()]
    return told if len(json.dumps(told)) <= MAXIMUM_BYTES else None


def parse(told: object) -> dict[bytes, Access] | None:
    """Read what `serialise` returned. Raises ValueError for anything else, whoever it is from."""
    if told is None:
        return None
    if not isinstance(told, list):
        raise ValueError("no list of directories")
    return dict(_parse_one(each) for each in told)


def _parse_one(told: object) -> tuple[bytes, Access]:
    if not isinstance(told, list) or len(told) != 4 or not isinstance(told[0], str):
        raise ValueError("no directory")
    for number, maximum in zip(told[1:], (MAXIMUM_MODE, MAXIMUM_ID, MAXIMUM_ID), strict=True):
        if type(number) is not int or not 0 <= number <= maximum:
            raise ValueError("no owner and mode of a directory")
    return told[0].encode("latin-1"), Access(*told[1:])
