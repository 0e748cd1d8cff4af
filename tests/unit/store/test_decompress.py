"""Uncompressing within bounds, whatever the pieces, and knowing the digest of what came out."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zlib

import pytest

from mountd.errors import InvalidImage, LimitExceeded
from mountd.store import decompress
from mountd.store.decompress import Gunzip, Measured

DATA = os.urandom(300_000) + bytes(300_000)


def read_all(data: bytes, *, piece: int = 1 << 20, wanted: int = 10_000) -> bytes:
    source = io.BytesIO(data)
    gunzip = Gunzip(lambda length: source.read(min(length, piece)))
    out = bytearray()
    while found := gunzip.read(wanted):
        assert len(found) <= wanted
        out += found
    return bytes(out)


@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_one_member_and_several(piece: int) -> None:
    data = DATA if piece > 1 else DATA[299_000:301_000]
    assert read_all(gzip.compress(data), piece=piece) == data
    assert (
        read_all(gzip.compress(data) + gzip.compress(b"") + gzip.compress(b"end"), piece=piece)
        == data + b"end"
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut off"),
        (gzip.compress(DATA)[:-1], "cut off"),
        (gzip.compress(DATA)[:1000], "cut off"),
        (gzip.compress(DATA) + b"rubbish", "not compressed as it says"),
        (gzip.compress(DATA) + b"\0", "cut off"),
        (gzip.compress(DATA)[:-8] + bytes(8), "not compressed as it says"),
        (zlib.compress(DATA), "not compressed as it says"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "not compressed as it says"),
        (DATA, "not compressed as it says"),
    ],
)
def test_refused(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidImage, match=reason):
        read_all(data)


def drain(found: Measured) -> None:
    while found.read(1000):
        pass


def measured(data: bytes, maximum: int, compressed: int) -> Measured:
    found = Measured(io.BytesIO(data).read, maximum, compressed)
    drain(found)
    return found


def test_measure() -> None:
    found = measured(DATA, len(DATA), 1)
    assert (found.count, found.digest) == (len(DATA), "sha256:" + hashlib.sha256(DATA).hexdigest())
    with pytest.raises(LimitExceeded, match="uncompressed layer"):
        measured(DATA, len(DATA) - 1, len(DATA))


def test_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompress, "ALWAYS_ALLOWED", 1000)
    measured(bytes(200_000), 1 << 30, 1000)
    with pytest.raises(LimitExceeded, match="may grow"):
        measured(bytes(200_001), 1 << 30, 1000)


def test_a_bomb_is_stopped_before_it_is_in_memory() -> None:
    """A gigabyte of nothing: what is uncompressed at once is never more than what was asked for."""
    bomb = gzip.compress(bytes(64 << 20), 9) * 16
    source = io.BytesIO(bomb)
    found = Measured(Gunzip(source.read).read, 1 << 40, len(bomb))
    with pytest.raises(LimitExceeded, match="may grow"):
        drain(found)
    assert found.count < max(decompress.ALWAYS_ALLOWED, len(bomb) * decompress.MAXIMUM_RATIO) + (1 << 20)
