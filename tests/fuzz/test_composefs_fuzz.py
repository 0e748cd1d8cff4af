"""Whatever the description: one of our own errors, or lines in our form that are read the same once more."""

from __future__ import annotations

import io
import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mountd.errors import InvalidImage, LimitExceeded
from mountd.source.composefs_dump import FIELDS, Summary, rewrite

RELAXED = settings(
    max_examples=int(os.environ.get("MOUNTD_FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
HEAD = b"/ 0 40755 2 0 0 0 0.0 - - -\n"
NAMES = st.sampled_from([b"", b"/", b"/a", b"/a/b", b"/a/../c", b"/..", b"a", b"/\\x61", b"/c\\x2fd", b"-"])
NUMBERS = st.sampled_from([b"0", b"1", b"3", b"-1", b"00", b"4294967295", b"9" * 21, b"", b"0x1"])
MODES = st.sampled_from(
    [
        b"40755",
        b"100644",
        b"120777",
        b"20644",
        b"60644",
        b"10644",
        b"140755",
        b"@100644",
        b"@40755",
        b"0",
        b"@",
    ]
)
TIMES = st.sampled_from([b"0.0", b"1.999999999", b"1", b".", b"-1.0", b"1.1000000000"])
PAYLOADS = st.sampled_from([b"-", b"", b"a", b"a/b", b"../a", b"/a", b"\\x2d", b"a\\x00", b"abc"])
DIGESTS = st.sampled_from([b"-", b"", b"0a" * 32, b"0A" * 32, b"0a"])
ATTRIBUTES = st.lists(
    st.sampled_from([b"user.a=b", b"user.a", b"trusted.overlay.redirect=/a", b"user.\\x61=c", b"="]),
    max_size=3,
)
LINES = st.tuples(
    st.tuples(NAMES, NUMBERS, MODES, NUMBERS, NUMBERS, NUMBERS, NUMBERS, TIMES, PAYLOADS, PAYLOADS, DIGESTS),
    ATTRIBUTES,
).map(lambda parts: b" ".join([*parts[0], *parts[1]]))
# Most of a line is right, so that what comes after it is reached.
RIGHT = st.tuples(
    NAMES,
    MODES,
    PAYLOADS,
    st.sampled_from([b"-", b"abc"]),
    DIGESTS,
    ATTRIBUTES,
    st.sampled_from([b"0", b"3"]),
).map(
    lambda parts: b" ".join(
        [
            parts[0],
            parts[6],
            parts[1],
            b"1",
            b"0",
            b"0",
            b"0",
            b"0.0",
            parts[2],
            parts[3],
            parts[4],
            *parts[5],
        ]
    )
)


def read(text: bytes, piece: int = 1 << 18) -> tuple[bytes, Summary] | None:
    written = bytearray()
    source = io.BytesIO(text)
    try:
        summary = rewrite(lambda length: source.read(min(length, piece)), written.extend)
    except (InvalidImage, LimitExceeded):
        return None
    return bytes(written), summary


def check(text: bytes, piece: int) -> None:
    found = read(text, piece)
    assert found == read(text)
    if found is None:
        return
    written, summary = found
    assert read(written) == found
    lines = written.splitlines()
    assert len(lines) == summary.entries
    for line in lines:
        fields = line.split(b" ")
        assert len(fields) >= FIELDS
        assert all(32 < byte < 127 for field in fields for byte in field)
        assert all(field.startswith(b"user.") for field in fields[FIELDS:])
        assert b".." not in fields[0].split(b"/")
        assert fields[2].startswith((b"12", b"@")) or b".." not in fields[8].split(b"/")
        assert fields[6] == b"0"


@RELAXED
@given(st.lists(st.one_of(LINES, RIGHT), max_size=12), st.integers(1, 200))
def test_lines(lines: list[bytes], piece: int) -> None:
    check(HEAD + b"\n".join(lines), piece)


@RELAXED
@given(st.lists(RIGHT, max_size=6))
def test_lines_that_are_almost_right(lines: list[bytes]) -> None:
    check(HEAD + b"".join(line + b"\n" for line in lines), 64)


@RELAXED
@given(st.binary(max_size=300), st.integers(1, 50))
def test_bytes(data: bytes, piece: int) -> None:
    check(data, piece)
    check(HEAD + data, piece)
