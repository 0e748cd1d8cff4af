"""Whatever the bytes: one of our own errors or a table that fits, and never more read than promised."""

from __future__ import annotations

import os
import struct
import uuid
from zlib import crc32

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mountd.errors import InvalidImage, UnsupportedFileSystem
from mountd.source import disk, gpt, superblock, version_order
from mountd.source.model import Luks
from mountd.source.partition_types import GENERIC, TYPES
from mountd.trust import image_policy, partitions
from mountd.trust.image_policy import DESIGNATORS, EVERYTHING

RELAXED = settings(
    max_examples=int(os.environ.get("MOUNTD_FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
SECTOR = 512
SECTORS = 4096
TYPE_UUIDS = [*TYPES, GENERIC, str(uuid.UUID(int=1))]
MAGICS = [(0, b"hsqs"), (1024, b"\xe2\xe1\xf5\xe0"), (0, b"XFSB"), (0, b"LUKS\xba\xbe"), (0, b"verity\0\0")]

NUMBERS = st.one_of(st.integers(0, SECTORS + 2), st.sampled_from([0, 1, (1 << 63) - 1, (1 << 64) - 1]))
ENTRIES = st.lists(
    st.tuples(
        st.sampled_from(TYPE_UUIDS),
        st.integers(0, 40),
        st.integers(0, 16),
        st.sampled_from([0, gpt.READ_ONLY, gpt.GROW, gpt.NO_AUTO, gpt.NO_BLOCK_IO, (1 << 64) - 1]),
        st.text(max_size=12),
        st.one_of(st.none(), st.sampled_from(MAGICS)),
    ),
    max_size=16,
)
PATCHES = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 3 * SECTOR), st.integers(0, SECTORS * SECTOR - 1)),
        st.binary(min_size=1, max_size=16),
    ),
    max_size=4,
)
FIELDS = st.lists(st.tuples(st.sampled_from([24, 32, 40, 48, 72, 80, 84]), NUMBERS), max_size=2)


def header(own: int, other: int, table: int, entries: bytes, fields: list[tuple[int, int]]) -> bytes:
    made = bytearray(92)
    struct.pack_into("<8sIIII", made, 0, gpt.MAGIC, gpt.REVISION, 92, 0, 0)
    struct.pack_into("<QQQQ", made, 24, own, other, 34, SECTORS - 34)
    struct.pack_into("<QIII", made, 72, table, 128, 128, crc32(entries))
    for offset, value in fields:
        wide = offset not in (80, 84)
        struct.pack_into("<Q" if wide else "<I", made, offset, value & ((1 << 64 if wide else 1 << 32) - 1))
    struct.pack_into("<I", made, 16, crc32(made))
    return bytes(made)


def build(entries: list[tuple[str, int, int, int, str, tuple[int, bytes] | None]]) -> bytes:
    return b"".join(
        uuid.UUID(type).bytes_le
        + uuid.UUID(int=number + 1).bytes_le
        + struct.pack("<QQQ", 34 + 16 * start, 33 + 16 * start + length, attributes)
        + label.encode("utf-16-le", "surrogatepass")[:72].ljust(72, b"\0")
        for number, (type, start, length, attributes, label, _) in enumerate(entries)
    ).ljust(16384, b"\0")


def judge(data: bytes, size: int) -> disk.Disk | None:
    lengths: list[int] = []

    def read(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert length > 0
        lengths.append(length)
        return data[offset : offset + length]

    try:
        table = gpt.read(read, size)
        assert sum(lengths) <= gpt.MAXIMUM_READ
        for entry in table.entries:
            assert 0 < entry.start < entry.start + entry.size <= size
            assert entry.label.isprintable() or not entry.label
        found = disk.read(read, size, "x86_64")
    except InvalidImage as error:
        offset = error.parameters.get("offset")
        assert offset is None or 0 <= offset <= size
        return None
    except UnsupportedFileSystem:
        return None
    finally:
        kinds = len(DESIGNATORS)
        assert sum(lengths) <= 2 * gpt.MAXIMUM_READ + kinds * (
            superblock.MAXIMUM_READ + disk.MAXIMUM_SIGNATURE
        )
    assert disk.from_plain(disk.to_plain(found), size) == found
    return found


@RELAXED
@given(st.binary(max_size=4096), st.integers(0, 1 << 63))
def test_any_bytes(data: bytes, size: int) -> None:
    judge(data, min(size, len(data)))
    judge(data, len(data))


@RELAXED
@given(ENTRIES, FIELDS, FIELDS, PATCHES, st.integers(0, SECTORS * SECTOR))
def test_tables_that_are_nearly_good(
    entries: list[tuple[str, int, int, int, str, tuple[int, bytes] | None]],
    first: list[tuple[int, int]],
    second: list[tuple[int, int]],
    patches: list[tuple[int, bytes]],
    cut: int,
) -> None:
    image = bytearray(SECTORS * SECTOR)
    table = build(entries)
    for number, (_, start, length, _, _, magic) in enumerate(entries):
        if magic is not None and length:
            at = (34 + 16 * start) * SECTOR + magic[0]
            image[at : at + len(magic[1])] = magic[1]
        assert number < 16
    image[446:462] = bytes([0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF]) + struct.pack("<II", 1, SECTORS - 1)
    image[510:512] = b"\x55\xaa"
    last = SECTORS - 1
    image[512:604] = header(1, last, 2, table, first)
    image[1024 : 1024 + len(table)] = table
    image[(last - 32) * SECTOR : last * SECTOR] = table
    image[last * SECTOR : last * SECTOR + 92] = header(last, 1, last - 32, table, second)
    for offset, data in patches:
        image[offset : offset + len(data)] = data
    for size in (len(image), cut):
        judge(bytes(image[:size]), size)


@RELAXED
@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_versions_have_an_order(first: str, second: str, third: str) -> None:
    assert version_order.compare(first, first) == 0
    assert version_order.compare(first, second) == -version_order.compare(second, first)
    ordered = sorted((first, second, third), key=version_order.key)  # type: ignore[arg-type]
    assert version_order.compare(ordered[0], ordered[2]) <= 0


FLAGS = st.lists(st.sampled_from([*sorted(EVERYTHING), "open"]), max_size=4).map("+".join)
RULES = st.dictionaries(st.sampled_from(["", *DESIGNATORS]), FLAGS, max_size=5)


@RELAXED
@given(RULES, st.frozensets(st.sampled_from(["root", "usr"])), st.booleans(), st.booleans(), st.booleans())
def test_a_policy_is_never_exceeded(
    rules: dict[str, str], signed: frozenset[str], read_only: bool, only_verity: bool, luks: bool
) -> None:
    """Whatever is used, the policy has it so; and nothing but our own refusals comes out."""
    policy = image_policy.parse(":".join(f"{name}={flags}" for name, flags in rules.items()) or "*")
    window = disk.Window(1, 1)
    kind = disk.FileSystem("ext4", 1, 1, None, None, False)
    hashes = disk.VeritySuperblock(4096, 4096, 1, 1, "sha256", b"", None)
    verity = disk.PartitionVerity(hashes, bytes(32), window, window)
    plain = disk.Partition("home", 2, "", "", None, window, True, False, kind)
    volume = Luks(2, None, None, "aes-xts-plain64", 64, 512, 1 << 18, 1 << 18, 0, 1 << 17, 1 << 14, 0)
    made = disk.Disk(
        512,
        "",
        (
            disk.Partition("root", 1, "", "", None, window, False, True, kind, None, verity),
            disk.replace(plain, file_system=None, contents="crypto_LUKS", luks=volume) if luks else plain,
            disk.Partition("esp", 3, "", "", None, window, False, False, None, "vfat"),
            disk.Partition("root-verity", 4, "", "", None, window, False, False),
        ),
        only_verity,
    )
    try:
        found = partitions.uses(made, policy, signed, read_only=read_only)
    except (partitions.DeniedByPolicy, partitions.UnsupportedFileSystem):
        return
    assert found
    for use in found:
        flags = policy.flags(use.partition.designator)
        have = (
            {"verity", *(["signed"] if use.partition.designator in signed else [])} if use.verity else set()
        )
        assert flags & (have | {"encrypted" if use.partition.luks else "unprotected"})
        assert use.verity or not only_verity
        assert use.read_only or not (read_only or use.partition.read_only)
        assert use.read_only or use.partition.designator != "root"  # which has hash data
        assert "ext4" in flags or use.is_locked
        assert ("read-only-on" if use.partition.read_only else "read-only-off") in flags
        assert ("growfs-on" if use.partition.grow else "growfs-off") in flags
    used = {use.partition.designator for use in found}
    for designator in ("usr", "srv", "swap"):
        assert "absent" in policy.flags(designator)
    for designator in {"home"} - used:
        assert "unused" in policy.flags(designator)
    # Others use it.
    assert policy.flags("esp") & {"unused", "unprotected"}
