"""Whatever the bytes of a record of the store: NoRecord, or one that is written and read as it is.

And so for the file that says which layers an image has.
"""

from __future__ import annotations

import json
import os
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mountd.evidence.model import Provenance, Signer
from mountd.source.model import FileSystem
from mountd.store import layering
from mountd.store.layering import PulledImage
from mountd.store.record import NoRecord, Owner, Record, parse, serialise

RELAXED = settings(
    max_examples=int(os.environ.get("MOUNTD_FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
DIGEST = "sha256:" + "0a" * 32
WHOLE = serialise(
    Record(
        digest=DIGEST,
        size=4096,
        owners=(Owner(1000, 1000), Owner(0, 0)),
        created=1,
        name="base",
        file_system=FileSystem("erofs", 4096, 512, "uuid", "label", False),
        provenance=Provenance("example.com/a", DIGEST, (DIGEST,), "signedBy", "team", 7),
        signers=(Signer("team", "CN=team", "image", DIGEST),),
    )
)
LAYERED = layering.serialise(
    PulledImage(Provenance("example.com/a", DIGEST, (DIGEST,) * 2, "signedBy", "team", 7), (DIGEST,) * 2)
)
PIECES = st.one_of(
    st.binary(max_size=8),
    st.sampled_from(
        [
            b'"',
            b"{",
            b"}",
            b"[",
            b"]",
            b",",
            b":",
            b"null",
            b"true",
            b"-1",
            b"1e999",
            b"NaN",
            b"\\ud800",
            b"\0",
        ]
        + [b"9" * 400, b"[" * 2000, b'{"a":' * 2000, b"\xff", b'"size": 1, ', DIGEST.encode()]
    ),
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from([DIGEST, "\ud800", "a" * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def check(data: bytes) -> None:
    try:
        record = parse(data)
    except NoRecord:
        return
    assert parse(serialise(record)) == record


def check_layered(data: bytes) -> None:
    try:
        pulled = layering.parse(data)
    except NoRecord:
        return
    assert layering.parse(layering.serialise(pulled)) == pulled


@RELAXED
@given(st.integers(0, len(LAYERED)), st.integers(0, 16), PIECES)
def test_layers_patched(offset: int, length: int, piece: bytes) -> None:
    check_layered(LAYERED[:offset] + piece + LAYERED[offset + length :])


@RELAXED
@given(st.sampled_from(sorted(json.loads(LAYERED))), VALUES)
def test_layers_with_anything_as_a_value(name: str, value: Any) -> None:
    check_layered(json.dumps({**json.loads(LAYERED), name: value}).encode("utf-8", "surrogatepass"))


@RELAXED
@given(st.integers(0, len(WHOLE)), st.integers(0, 16), PIECES)
def test_patched(offset: int, length: int, piece: bytes) -> None:
    check(WHOLE[:offset] + piece + WHOLE[offset + length :])


@RELAXED
@given(st.integers(0, len(WHOLE)))
def test_cut(length: int) -> None:
    check(WHOLE[:length])


@RELAXED
@given(st.data(), VALUES)
def test_another_value_somewhere(data: st.DataObject, value: Any) -> None:
    told = json.loads(WHOLE)
    at: Any = told
    while True:
        keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(at[key], dict | list) or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = value
    check(json.dumps(told).encode("utf-8", "surrogatepass"))
