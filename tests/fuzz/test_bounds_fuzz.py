"""What the parsers of untrusted bytes cost: bounded, or in proportion to what they are given, for any of it.

Without a clock: bytes that are read, lines that are run, memory that is held. The parser of image policies
has this in test_image_policy_fuzz.py.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mountd.errors import InvalidImage, LimitExceeded, UnsupportedFileSystem
from mountd.source import composefs_dump, disk, gpt, signatures, superblock
from mountd.source.partition_types import GENERIC, TYPES
from tests.bounds import FOUR, check_in_proportion, cost
from tests.fuzz.test_composefs_fuzz import HEAD, RIGHT
from tests.fuzz.test_gpt_fuzz import SECTOR, SECTORS, build, header
from tests.fuzz.test_superblock_fuzz import FIELDS, VALUES

FEW = settings(
    max_examples=max(1, int(os.environ.get("MOUNTD_FUZZ_EXAMPLES", "300")) // 10),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
MIB = 1 << 20
REFUSED = (InvalidImage, UnsupportedFileSystem, LimitExceeded)
FIRST = 34 * SECTOR  # where the first partition begins
TYPE_UUIDS = [*TYPES, GENERIC]
# What a superblock may cost: a fixed number of signatures and fields, and the bytes that are read once.
SUPERBLOCK_LINES, SUPERBLOCK_MEMORY = 1000, 3 * superblock.MAXIMUM_READ
# For each entry of a table in use, for any table, and for whatever is looked at inside of partitions.
ENTRY_LINES, TABLE_LINES = 60, 3 * gpt.MAXIMUM_TABLE // 128
TABLE_MEMORY = 8 * gpt.MAXIMUM_READ
DISK_LINES = 13 * SUPERBLOCK_LINES
# Of a description, for each of its bytes.
BYTE_LINES, BYTE_MEMORY = 8, 16


class Reads:
    """The bytes of a sparse image, and how many of them were read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.bytes = 0
        self.calls = 0

    def __call__(self, offset: int, length: int) -> bytes:
        self.bytes += length
        self.calls += 1
        return self.data[offset : offset + length].ljust(length, b"\0")


def quietly(work: Callable[[], object]) -> Callable[[], None]:
    """The same, whether it is refused or not; anything else than a refusal of ours gets out."""

    def without_errors() -> None:
        try:
            work()
        except REFUSED:
            return

    return without_errors


def patched(length: int, patches: list[tuple[int, bytes]]) -> bytes:
    data = bytearray(length)
    for offset, value in patches:
        data[offset : offset + len(value)] = value
    return bytes(data[:length])


@FEW
@given(st.lists(st.tuples(FIELDS, VALUES), max_size=12), st.integers(1, 4096))
def test_superblocks(patches: list[tuple[int, bytes]], mebibytes: int) -> None:
    """The size of an image costs nothing."""
    data = patched(signatures.HEAD_LENGTH, patches)
    for size in (mebibytes * MIB, FOUR * mebibytes * MIB):
        read = Reads(data)
        work = quietly(lambda size=size, read=read: superblock.recognise(read, size))  # type: ignore[misc]
        work()
        assert read.bytes <= superblock.MAXIMUM_READ
        assert read.calls <= 32
        found = cost(work)
        assert found.lines <= SUPERBLOCK_LINES
        assert found.memory <= SUPERBLOCK_MEMORY


def image_of(types: list[str], patches: list[tuple[int, bytes]]) -> bytes:
    """A disk image with so many partitions, of 8 KiB each."""
    entries: list[tuple[str, int, int, int, str, tuple[int, bytes] | None]] = [
        (type, number, 16, 0, "", None) for number, type in enumerate(types)
    ]
    image = bytearray(SECTORS * SECTOR)
    table, last = build(entries), SECTORS - 1
    image[446:462] = bytes([0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF]) + b"\1\0\0\0" + last.to_bytes(4, "little")
    image[510:512] = b"\x55\xaa"
    image[512:604] = header(1, last, 2, table, [])
    image[1024 : 1024 + len(table)] = table
    image[(last - 32) * SECTOR : last * SECTOR] = table
    image[last * SECTOR : last * SECTOR + 92] = header(last, 1, last - 32, table, [])
    for offset, value in patches:
        image[offset : offset + len(value)] = value
    return bytes(image)


def test_an_image_for_these_tests_is_good() -> None:
    """Else all would be refused before they cost anything."""
    image = image_of(TYPE_UUIDS[:32], [])
    assert len(gpt.read(Reads(image), len(image)).entries) == 32


PARTITIONS = st.lists(st.sampled_from(TYPE_UUIDS), min_size=1, max_size=8)
PATCHES = st.lists(
    # In partitions: what makes one of two tables a broken one would compare what is not alike.
    st.tuples(st.integers(FIRST, (SECTORS - 64) * SECTOR), st.binary(min_size=1, max_size=16)),
    max_size=2,
)


@FEW
@given(PARTITIONS, PATCHES)
@example([GENERIC], [])
def test_partition_tables(types: list[str], patches: list[tuple[int, bytes]]) -> None:
    count = max(1, 32 // len(types))

    def work(size: int) -> Callable[[], None]:
        image = image_of(types * size, patches)
        return quietly(lambda: gpt.read(Reads(image), len(image)))

    check_in_proportion(work, count)
    read = Reads(image_of(types * count, patches))
    quietly(lambda: gpt.read(read, len(read.data)))()
    assert read.bytes <= gpt.MAXIMUM_READ
    found = cost(work(FOUR * count))
    assert found.lines <= TABLE_LINES + ENTRY_LINES * len(types) * FOUR * count
    assert found.memory <= TABLE_MEMORY


@FEW
@given(PARTITIONS, PATCHES, st.lists(st.tuples(FIELDS, VALUES), max_size=4))
def test_disks(types: list[str], patches: list[tuple[int, bytes]], inside: list[tuple[int, bytes]]) -> None:
    """However many partitions there are, one of each kind is looked at."""
    count = max(1, 32 // len(types))
    patches = [*patches, *((FIRST + offset, value) for offset, value in inside if offset < 4096)]

    def work(size: int) -> Callable[[], None]:
        image = image_of(types * size, patches)
        return quietly(lambda: disk.read(Reads(image), len(image), "x86_64"))

    check_in_proportion(work, count)
    assert cost(work(FOUR * count)).lines <= TABLE_LINES + ENTRY_LINES * 128 + DISK_LINES


@FEW
@given(st.binary(max_size=4096), st.integers(0, 1 << 62))
def test_any_bytes_as_a_disk(data: bytes, size: int) -> None:
    found = cost(quietly(lambda: disk.read(Reads(data), size, "x86_64")))
    assert found.lines <= TABLE_LINES
    assert found.memory <= TABLE_MEMORY


def rewriting(text: bytes) -> Callable[[], None]:
    """Have a description read, which came as a file does; what is written is thrown away."""
    source = io.BytesIO(text)

    def rewrite() -> None:
        source.seek(0)
        composefs_dump.rewrite(source.read, len)

    return quietly(rewrite)


# Most are right but for the path, which has to be another one on each line.
REST = RIGHT.map(lambda line: line.partition(b" ")[2])


@FEW
@given(st.lists(REST, min_size=1, max_size=4))
@example([b"0 40755 2 0 0 0 0.0 - - -"])
@example([b"3 100644 1 0 0 0 0.0 - abc - user.a=b user.c=d"])
def test_descriptions(rests: list[bytes]) -> None:
    def text(size: int) -> bytes:
        lines = (b"/%05d %b\n" % (number, rests[number % len(rests)]) for number in range(size))
        return HEAD + b"".join(lines)

    check_in_proportion(lambda size: rewriting(text(size)), 50)
    whole = text(200)
    found = cost(rewriting(whole))
    assert found.lines <= BYTE_LINES * len(whole)
    assert found.memory <= BYTE_MEMORY * len(whole)


@FEW
@given(st.binary(min_size=1, max_size=64))
@example(b"a")
@example(b" ")
@example(b"\\")
@example(b"\\x41")
@example(b"user.a=b ")
def test_lines_of_descriptions(piece: bytes) -> None:
    """Whatever a line repeats, in whichever field."""
    for head in (b"", HEAD, HEAD + b"/a", HEAD + b"/a 3 100644 1 0 0 0 0.0 - abc - "):
        check_in_proportion(lambda size, head=head: rewriting(head + piece * size), 400)  # type: ignore[misc]


@pytest.mark.parametrize("entries", [100, 400])
def test_good_descriptions_are_read_to_their_end(entries: int) -> None:
    """Else nothing of this would be about what takes long."""
    directories = b"".join(b"/%05d 0 40755 2 0 0 0 0.0 - - -\n" % number for number in range(entries))
    assert composefs_dump.rewrite(io.BytesIO(HEAD + directories).read, len).entries == entries + 1
