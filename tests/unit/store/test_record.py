"""Records: what is written comes back, and nothing else is taken for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mountd.errors import InvalidImage, InvalidParameter
from mountd.evidence.model import Provenance, Signer
from mountd.source.model import FileSystem
from mountd.store import record as records
from mountd.store.record import NoRecord, Owner, Record, check_name, hex_of, parse, serialise

DIGEST = "sha256:" + "0123456789abcdef" * 4
FULL = Record(
    digest=DIGEST,
    size=4096,
    owners=(Owner(1000, 1000), Owner(100000, 1001)),
    created=1_700_000_000,
    name="base – ünï",
    file_system=FileSystem("erofs", 4096, 512, "uuid", None, False),
    provenance=Provenance("r.example.com/team/a", DIGEST, (DIGEST, DIGEST), "signedBy", "team", 7),
    signers=(Signer("team", "CN=team", "image", DIGEST),),
)


@pytest.mark.parametrize("record", [FULL, Record(DIGEST, 1, (Owner(0, 0),), 0)])
def test_a_record_comes_back(record: Record) -> None:
    assert parse(serialise(record)) == record


def test_owners() -> None:
    assert FULL.owner_uid == 1000
    assert FULL.belongs_to(100000)
    assert not FULL.belongs_to(1001)  # who pays is not who may


def changed(**fields: object) -> bytes:
    return json.dumps(json.loads(serialise(FULL)) | fields).encode()


def within(field: str, **fields: object) -> bytes:
    told = json.loads(serialise(FULL))
    (told[field][0] if isinstance(told[field], list) else told[field]).update(fields)
    return json.dumps(told).encode()


def dropped(field: str) -> bytes:
    told = json.loads(serialise(FULL))
    del told[field]
    return json.dumps(told).encode()


DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b'"\xff"',
    "deep": b"[" * 100_000,
    "long": b" " * (records.MAXIMUM_RECORD + 1),
    "a list": b"[]",
    "a number of many digits": changed(size=0).replace(b'"size": 0', b'"size": ' + b"9" * 5000),
    "a key twice": serialise(FULL).replace(b'"size": ', b'"size": 1, "size": ', 1),
    "a key too many": changed(more=1),
    "another version": changed(version=2),
    "version as bool": changed(version=True),
    "NaN": changed(size=float("nan")),
    "size as text": changed(size="1"),
    "size as bool": changed(size=True),
    "size as float": changed(size=1.0),
    "negative size": changed(size=-1),
    "large size": changed(size=1 << 63),
    "digest in capitals": changed(digest=DIGEST.upper()),
    "digest with more": changed(digest=DIGEST + "\n"),
    "digest that is a path": changed(digest="sha256:../../../../etc/passwd"),
    "another algorithm": changed(digest="sha512:" + "0" * 128),
    "no owners": changed(owners=[]),
    "too many owners": changed(owners=[{"uid": 1, "charged": 1}] * (records.MAXIMUM_OWNERS + 1)),
    "owner that is none": changed(owners=[{"uid": (1 << 32) - 1, "charged": 0}]),
    "owner without field": changed(owners=[{"uid": 1}]),
    "owner as number": changed(owners=[1]),
    "empty name": changed(name=""),
    "name of two lines": changed(name="a\nb"),
    "long name": changed(name="a" * 256),
    "surrogate": changed(name="\ud800"),
    "file system as text": changed(file_system="erofs"),
    "file system with more": within("file_system", more=1),
    "recovery as number": within("file_system", needs_recovery=1),
    "NUL in the label": within("file_system", label="\0"),
    "long label": within("file_system", label="a" * 4097),
    "layer that is none": within("provenance", layers=["x"]),
    "too many layers": within("provenance", layers=[DIGEST] * 257),
    "provenance without time": within("provenance", time=None),
    "signer with a number": within("signers", key=1),
    "too many signers": changed(signers=[json.loads(serialise(FULL))["signers"][0]] * 17),
    **{f"without {field}": dropped(field) for field in json.loads(serialise(FULL))},
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged_is_no_record(data: bytes) -> None:
    with pytest.raises(NoRecord):
        parse(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(sorted(json.loads(serialise(FULL)))), JSON)
def test_a_field_of_any_other_kind_is_refused_or_kept(field: str, value: Any) -> None:
    try:
        record = parse(changed(**{field: value}))
    except NoRecord:
        return
    assert parse(serialise(record)) == record


@given(st.binary(max_size=200))
def test_bytes_are_no_record(data: bytes) -> None:
    with pytest.raises(NoRecord):
        parse(data)


UNWRITABLE: list[Callable[[], Record]] = [
    lambda: replace(FULL, owners=()),
    lambda: replace(FULL, size=-1),
    lambda: replace(FULL, name="\n"),
    lambda: replace(FULL, signers=FULL.signers * 17),
]


@pytest.mark.parametrize("make", UNWRITABLE)
def test_what_would_not_be_read_is_not_written(make: Callable[[], Record]) -> None:
    with pytest.raises(InvalidImage):
        serialise(make())


@pytest.mark.parametrize("digest", ["", "sha256:", DIGEST[:-1], DIGEST + "0", "SHA256" + DIGEST[6:], "../x"])
def test_a_digest_is_exactly_one(digest: str) -> None:
    with pytest.raises(InvalidParameter):
        hex_of(digest)


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "\x1b[2J", "ü" * 128])
def test_a_name_is_one_short_line(name: str) -> None:
    with pytest.raises(InvalidParameter):
        check_name(name)
