"""JSON whose meaning does not depend on the reader: no key twice, no NaN, bounded size and depth.

Two programs that read a document with a duplicate key may see two documents; skopeo checks the one, mountd
would act on the other.
"""

from __future__ import annotations

import json
import re
from typing import NoReturn

MAXIMUM_DEPTH = 32
MAXIMUM_SHOWN = 64  # of a key, in messages
BRACKETS = re.compile(rb"[][{}]")
OPENING = (b"[", b"{")


class JSONError(ValueError):
    """The document is not one; the text says why."""


def loads(data: bytes, maximum: int) -> object:
    """Return what `data`, of at most `maximum` bytes, says. Raises JSONError and nothing else."""
    if len(data) > maximum:
        raise JSONError(f"it is larger than {maximum} bytes")
    if depth(data) > MAXIMUM_DEPTH:
        raise JSONError(f"it is nested deeper than {MAXIMUM_DEPTH} levels")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant)
    except JSONError:
        raise
    except UnicodeDecodeError as error:
        raise JSONError(f"it is not UTF-8 at byte {error.start}") from None
    # ValueError, as a number of too many digits is not a JSONDecodeError.
    except (ValueError, RecursionError) as error:
        raise JSONError(f"it is not JSON: {error}") from None


def depth(data: bytes) -> int:
    """Return how deep the brackets of `data` nest, whether they match or not."""
    level = deepest = 0
    for piece in outside_strings(data):
        for bracket in BRACKETS.findall(piece):
            level += 1 if bracket in OPENING else -1
            deepest = max(deepest, level)
    return deepest


def outside_strings(data: bytes) -> list[bytes]:
    """Return the pieces of `data` between its strings. An escaped quote ends no string."""
    return data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object of its pairs. Raises JSONError for a key that is there twice."""
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise JSONError(f"the key {json.dumps(key[:MAXIMUM_SHOWN])} is there twice")
        found[key] = value
    return found


def refuse_constant(name: str) -> NoReturn:
    """Refuse what JavaScript has and JSON does not."""
    raise JSONError(f"{name} is not JSON")
