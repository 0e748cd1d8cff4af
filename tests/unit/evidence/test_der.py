"""The reader of DER: what it reads, and what it refuses that BER would allow."""

from __future__ import annotations

import pytest

from mountd.evidence.der import (
    MAXIMUM_DEPTH,
    SEQUENCE,
    DerError,
    Element,
    Reader,
    integer,
    object_identifier,
)


def element(content: bytes, tag: int = 0x02) -> Element:
    return Element(tag, content, bytes([tag, len(content)]) + content, 0, 0)


def test_elements_one_after_the_other() -> None:
    reader = Reader(b"\x02\x01\x07\x30\x03\x04\x01\x61")
    first = reader.take(0x02)
    assert (first.content, first.raw, first.offset) == (b"\x07", b"\x02\x01\x07", 0)
    assert reader.peek() == SEQUENCE
    assert reader.optional(0x04) is None
    inner = reader.take(SEQUENCE).reader()
    assert inner.at == 5
    assert inner.take(0x04).offset == 5
    inner.end()
    reader.end()
    assert reader.peek() is None
    assert reader.optional(0x04) is None


@pytest.mark.parametrize("length", [0, 1, 127, 128, 255, 256, 65535, 65536, 1 << 24])
def test_lengths(length: int) -> None:
    size = b"" if length < 128 else length.to_bytes((length.bit_length() + 7) // 8, "big")
    head = bytes([0x04, 0x80 | len(size)]) + size if size else bytes([0x04, length])
    assert len(Reader(head + bytes(length)).take().content) == length


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is cut off at byte 0"),
        (b"\x04", "it is cut off at byte 1"),
        (b"\x04\x02a", "1 bytes are missing"),
        (b"\x04\x82\x01", "it is cut off at byte 3"),
        (b"\x04\x84\xff\xff\xff\xff", "bytes are missing"),
        (b"\x04\x80a\x00\x00", "an indefinite or too long length at byte 1"),
        (b"\x04\x85\x01\x00\x00\x00\x00", "an indefinite or too long length at byte 1"),
        (b"\x04\xff", "an indefinite or too long length at byte 1"),
        (b"\x04\x81\x01a", "not in its shortest form at byte 1"),
        (b"\x04\x82\x00\x80" + bytes(128), "not in its shortest form at byte 1"),
        (b"\x1f\x81\x01\x00", "a tag of more than one byte at byte 0"),
        (b"\xbf\x01\x00", "a tag of more than one byte at byte 0"),
    ],
)
def test_what_is_no_der(data: bytes, reason: str) -> None:
    with pytest.raises(DerError, match=reason):
        Reader(data).take()


def test_what_is_not_expected() -> None:
    with pytest.raises(DerError, match="the tag 0x04 at byte 0, where an INTEGER has to be"):
        Reader(b"\x04\x00").take(0x02)
    with pytest.raises(DerError, match="the tag 0x04 at byte 0, where the tag 0xa0 has to be"):
        Reader(b"\x04\x00").take(0xA0)
    with pytest.raises(DerError, match="2 bytes at byte 0 that do not belong there"):
        Reader(b"\x04\x00").end()


def test_depth() -> None:
    data = b""
    for _ in range(MAXIMUM_DEPTH + 2):
        data = bytes([SEQUENCE, len(data)]) + data
    reader = Reader(data)
    for _ in range(MAXIMUM_DEPTH):
        reader = reader.take().reader()
    with pytest.raises(DerError, match=f"nested deeper than {MAXIMUM_DEPTH}"):
        reader.take().reader()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("2a864886f70d010702", "1.2.840.113549.1.7.2"),
        ("608648016503040201", "2.16.840.1.101.3.4.2.1"),
        ("2b6570", "1.3.101.112"),
        ("00", "0.0"),
        ("8837", "2.999"),
    ],
)
def test_object_identifiers(content: str, name: str) -> None:
    assert object_identifier(element(bytes.fromhex(content))) == name


@pytest.mark.parametrize("content", ["", "80", "2a86", "2a8001", "8001", "01" * 33])
def test_what_is_no_object_identifier(content: str) -> None:
    with pytest.raises(DerError, match="OBJECT IDENTIFIER"):
        object_identifier(element(bytes.fromhex(content)))


@pytest.mark.parametrize(
    ("content", "number"), [("00", 0), ("7f", 127), ("0080", 128), ("ff", -1), ("80", -128)]
)
def test_integers(content: str, number: int) -> None:
    assert integer(element(bytes.fromhex(content))) == number


@pytest.mark.parametrize("content", ["", "0001", "ff80", "01" * 65])
def test_what_is_no_integer(content: str) -> None:
    with pytest.raises(DerError, match="INTEGER"):
        integer(element(bytes.fromhex(content)))
