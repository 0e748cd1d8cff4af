"""Whatever the bytes: one of two errors or a file system that fits, and never more read than promised."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mountd.errors import InvalidImage, UnsupportedFileSystem
from mountd.source import signatures
from mountd.source.superblock import CHECKS, MAXIMUM_READ, recognise

MIB = 1 << 20
# The fixture is made once and never changed.
RELAXED = settings(
    max_examples=int(os.environ.get("MOUNTD_FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Where the fields of the five superblocks are, so that most patches hit one.
FIELDS = st.one_of(
    st.integers(0, 512),
    st.integers(1024, 1024 + 0x160),
    st.integers(0x10000, 0x10000 + 560),
    st.sampled_from(sorted({offset for _, offsets, _ in signatures.MAGICS for offset in offsets})),
    st.integers(0, signatures.HEAD_LENGTH),
)
VALUES = st.one_of(
    st.binary(min_size=1, max_size=16),
    st.sampled_from(sorted({magic for _, _, magics in signatures.MAGICS for magic in magics})),
    st.sampled_from(
        [b"\0", b"\0" * 4, b"\0" * 8, b"\xff", b"\xff" * 2, b"\xff" * 4, b"\xff" * 8, b"\x53\xef"]
    ),
)
SIZES = st.one_of(
    st.integers(0, 3 * signatures.HEAD_LENGTH),
    st.integers(0, (1 << 63) - 1),
    st.integers(-(1 << 65), 1 << 65),
    st.sampled_from([8 * MIB, 128 * MIB, 300 * MIB]),
)


class Heads(dict[str, tuple[bytes, int]]):
    """The first bytes and the size of an image of each type."""

    def __repr__(self) -> str:
        return "Heads()"  # hypothesis prints the arguments of what failed


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Heads:
    root = tmp_path_factory.mktemp("images")
    tree = root / "tree"
    tree.mkdir()
    (tree / "noise").write_bytes(bytes(range(256)) * 300)
    for type, size in (("ext4", 8 * MIB), ("xfs", 300 * MIB), ("btrfs", 128 * MIB)):
        (root / type).touch()
        os.truncate(root / type, size)
        run(f"mkfs.{type}", "-q", root / type)
    run("mkfs.erofs", "--quiet", root / "erofs", tree)
    run("mksquashfs", tree, root / "squashfs", "-quiet", "-no-progress")
    found = Heads()
    for type in CHECKS:
        with (root / type).open("rb") as file:
            found[type] = (file.read(signatures.HEAD_LENGTH), (root / type).stat().st_size)
    return found


def judge(data: bytes, size: int, *, sparse: bool) -> None:
    """Recognise it. A sparse image has zeros up to its size; any other one may end earlier than it says."""
    lengths: list[int] = []

    def read(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert length > 0
        assert offset + length <= size
        lengths.append(length)
        found = data[offset : offset + length]
        return found.ljust(length, b"\0") if sparse else found

    try:
        found = recognise(read, size)
    except (InvalidImage, UnsupportedFileSystem) as error:
        offset = error.parameters.get("offset", 0)
    else:
        offset = 0
        assert found.type in CHECKS
        assert 0 < found.size <= size
        assert 512 <= found.block_size <= MIB
        assert found.label is None or found.label.isprintable()
    assert isinstance(offset, int)
    # The field of a superblock that is cut off lies past the end of the image.
    assert 0 <= offset <= max(size, signatures.HEAD_LENGTH)
    assert sum(lengths) <= MAXIMUM_READ
    assert len(lengths) <= 32


@RELAXED
@given(data=st.binary(max_size=4096), size=st.none() | SIZES, sparse=st.booleans())
def test_random_bytes(data: bytes, size: int | None, sparse: bool) -> None:
    judge(data, len(data) if size is None else size, sparse=sparse)


@RELAXED
@given(patches=st.lists(st.tuples(FIELDS, VALUES), max_size=8), size=SIZES, sparse=st.booleans())
def test_random_signatures(patches: list[tuple[int, bytes]], size: int, sparse: bool) -> None:
    data = bytearray(signatures.HEAD_LENGTH)
    for offset, value in patches:
        data[offset : offset + len(value)] = value
    judge(bytes(data), size, sparse=sparse)


@RELAXED
@pytest.mark.parametrize("type", CHECKS)
@given(patches=st.lists(st.tuples(FIELDS, VALUES), max_size=4), size=st.none() | SIZES, sparse=st.booleans())
def test_patched_superblocks(
    heads: Heads,
    type: str,
    patches: list[tuple[int, bytes]],
    size: int | None,
    sparse: bool,
) -> None:
    data = bytearray(heads[type][0])
    for offset, value in patches:
        data[offset : offset + len(value)] = value
    judge(bytes(data), heads[type][1] if size is None else size, sparse=sparse)
