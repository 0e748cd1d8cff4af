"""Headers of LUKS that somebody has made up: nothing but our own errors, and within bounds."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mountd.errors import InvalidImage, UnsupportedFileSystem
from mountd.source import luks
from tests.unit.source.test_luks import DOCUMENT, SIZE, header_1, header_2

RELAXED = settings(
    max_examples=int(os.environ.get("MOUNTD_FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
NUMBERS = st.sampled_from([0, 1, 512, 4096, 32768, 1 << 24, (1 << 32) - 1, 1 << 63, -1])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    NUMBERS.map(str),
    st.integers(),
    st.text(max_size=8),
    st.sampled_from([*luks.CIPHERS, *luks.HASHES, "argon2i", "pbkdf2", "dynamic", "crypt", "luks2"]),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
)
CHANGES = st.lists(st.tuples(st.integers(0, 200), JSON), min_size=1, max_size=4)


def check_text(text: str) -> None:
    assert text.isprintable()
    assert len(text) < 500


def judge(head: bytes, size: int = SIZE) -> None:
    lengths: list[int] = []

    def read(offset: int, length: int) -> bytes:
        assert offset >= 0
        lengths.append(length)
        return head[offset : offset + length]

    try:
        found = luks.read(read, size)
    except (InvalidImage, UnsupportedFileSystem) as error:
        check_text(str(error))
        return
    finally:
        assert sum(lengths) <= luks.LENGTH_1 + luks.BINARY_2 + max(luks.METADATA_SIZES)
    assert luks.from_plain(json.loads(json.dumps(luks.to_plain(found))), size) == found
    assert found.label is None or found.label.isprintable()
    # What is done with it afterwards.
    assert 0 < found.header_size <= found.offset < found.offset + found.size <= size
    assert found.header_size <= luks.MAXIMUM_HEADER
    assert found.metadata_size * 2 <= found.header_size
    assert found.key_size in luks.CIPHERS[found.cipher]
    assert found.size % found.sector_size == found.offset % found.sector_size == 0
    assert 0 <= found.iv_offset < 1 << 63
    assert found.memory <= luks.MAXIMUM_MEMORY


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all members of a document."""
    found = [way] if way else []
    for key in value if isinstance(value, dict) else ():
        found += places(value[key], (*way, key))
    return found


PLACES = places(DOCUMENT)


@RELAXED
@given(st.binary(max_size=6000), st.integers(0, 1 << 63))
def test_any_bytes(data: bytes, size: int) -> None:
    for start in (b"", luks.MAGIC, luks.MAGIC + b"\0\1", luks.MAGIC + b"\0\2"):
        judge(start + data, min(size, len(data)))
        judge(start + data)


@RELAXED
@given(JSON)
def test_any_document(document: object) -> None:
    judge(header_2(json.dumps(document).encode()[: 12 << 10]))


@RELAXED
@given(CHANGES, st.integers(0, 2 * SIZE))
def test_a_document_with_changes(changes: list[tuple[int, object]], size: int) -> None:
    document = copy.deepcopy(DOCUMENT)
    for number, value in changes:
        *way, last = PLACES[number % len(PLACES)]
        place: Any = document
        for name in way:
            place = place.get(name) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[last] = value
    judge(header_2(document))
    judge(header_2(document), size)


@RELAXED
@given(st.lists(st.tuples(st.integers(0, luks.LENGTH_1 - 1), st.binary(min_size=1, max_size=8)), max_size=4))
def test_version_1_with_changes(patches: list[tuple[int, bytes]]) -> None:
    head = bytearray(header_1())
    for offset, patch in patches:
        head[offset : offset + len(patch)] = patch
    judge(bytes(head[: luks.LENGTH_1]))
