"""Descriptions of a composefs: what is let through, in which form, and what is refused."""

from __future__ import annotations

import io

import pytest

from mountd.errors import InvalidImage, LimitExceeded
from mountd.source import composefs_dump
from mountd.source.composefs_dump import Summary, rewrite

HEAD = b"/ 4096 40755 3 0 0 0 1.5 - - -\n"
DIGEST = b"0a" * 32


def read(text: bytes, piece: int = 1 << 18) -> tuple[bytes, Summary]:
    written: list[bytes] = []
    source = io.BytesIO(text)
    summary = rewrite(lambda length: source.read(min(length, piece)), written.append)
    return b"".join(written), summary


GOOD = [
    b"/d 0 42755 2 1000 1000 0 1.0 - - -",
    b"/f 0 100644 1 0 0 0 0.999999999 - - -",
    b"/f 3 100644 1 0 0 0 0.0 - abc -",
    b"/f 300 104755 1 0 0 0 0.0 0a/0b - " + DIGEST,
    b"/f 300 100644 1 0 0 0 0.0 0a/0b - -",
    b"/f 1 100644 1 0 0 0 0.0 - \\x2d -",
    b"/s 3 120777 1 0 0 0 0.0 a/b - -",
    b"/w 0 20644 1 0 0 0 0.0 - - -",
    b"/p 0 10644 1 0 0 0 0.0 - - -",
    b"/a\\x20b\\x3d\\x0a\\xff 0 100644 1 0 0 0 0.0 - - - user.x=\\x00\\x0a user.\\x3dy=z",
    b"/f 0 100644 1 0 0 0 -100000.5 - - -",
    b"/f 0 100644 1 0 0 0 -9223372036854775808.0 - - -",
    b"/f 0 100644 1 0 0 0 0.0 - - - user.a=" + b"1" * 32742,
    b"/f 0 100644 1 0 0 0 0.0 - - - user.a=" + b"\\xff" * 16382,
    b"/f 0 100644 1 4294967294 4294967294 0 9223372036854775807.0 - - -",
]


@pytest.mark.parametrize("line", GOOD)
def test_what_is_in_our_form_stays_as_it_is(line: bytes) -> None:
    text = HEAD + line.replace(b"\\x3d\\x0a\\xff", b"=\\x0a\\xff") + b"\n"
    assert read(text)[0] == text
    # Nor does it matter where it is cut, or whether the last line has an end.
    assert read(text, 7)[0] == text
    assert read(text[:-1])[0] == text


def test_other_forms_become_ours() -> None:
    line = b"/a\\tb\\n\\r\\\\\x01\xc3\xa4= 00003 0100644 01 0 0 0 07.01 - a\\x62c - user.k=v=\n"
    ours = b"/a\\x09b\\x0a\\x0d\\x5c\\x01\\xc3\\xa4= 3 100644 1 0 0 0 7.1 - abc - user.k=v=\n"
    assert read(HEAD + line)[0] == HEAD + ours
    # The length of a symbolic link is that of its target.
    assert read(HEAD + b"/s 9 120777 1 0 0 0 0.0 abc - -\n")[0].endswith(
        b"/s 3 120777 1 0 0 0 0.0 abc - -\n"
    )
    assert read(HEAD + b"/e 0 100644 1 0 0 0 0.0  - \n")[0].endswith(b"/e 0 100644 1 0 0 0 0.0 - - -\n")


def test_the_mark_of_whiteouts_is_left_out() -> None:
    marked = b" trusted.overlay.opaque=x user.overlay.opaque=x\n"
    line = b"/d 0 40755 2 0 0 0 0.0 - - -"
    assert read(HEAD.rstrip(b"\n") + marked + line + marked)[0] == (
        HEAD.rstrip(b"\n") + b" user.overlay.opaque=x\n" + line + b" user.overlay.opaque=x\n"
    )


def test_hard_links() -> None:
    first = b"/f 300 100644 2 0 0 0 0.0 0a - -\n"
    text = HEAD + first + b"/g 300 @100644 2 7 7 0 1.1 /f - - user.a=b\n"
    written, summary = read(text)
    assert written == HEAD + first + b"/g 0 @100644 1 0 0 0 0.0 /f - -\n"
    assert summary == Summary(3, 1, 1)
    for target in (b"/g", b"/later", b"/", b"-", b"f"):
        with pytest.raises(InvalidImage, match="hard link"):
            read(HEAD + first + b"/g 0 @100644 2 0 0 0 0.0 " + target + b" - -\n")
    with pytest.raises(InvalidImage, match="hard link"):
        read(text + b"/h 0 @100644 2 0 0 0 0.0 /g - -\n")
    with pytest.raises(InvalidImage, match="hard link"):
        read(HEAD + b"/d 0 40755 2 0 0 0 0.0 - - -\n/h 0 @40755 2 0 0 0 0.0 /d - -\n")


def test_what_it_comes_to() -> None:
    lines = HEAD + b"/a 9 100644 1 0 0 0 0.0 a - -\n/b 9 100644 1 0 0 0 0.0 b - " + DIGEST
    assert read(lines)[1] == Summary(3, 2, 1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"", "11 are needed"),
        (b"/x 0 100644 1 0 0 0 0.0 - -", "11 are needed"),
        (b"x 0 100644 1 0 0 0 0.0 - - -", "absolute"),
        (b"/ 0 40755 1 0 0 0 0.0 - - -", "already"),
        (b"/d/ 0 100644 1 0 0 0 0.0 - - -", "absolute"),
        (b"/d/. 0 100644 1 0 0 0 0.0 - - -", "absolute"),
        (b"/d/.. 0 100644 1 0 0 0 0.0 - - -", "absolute"),
        (b"/../x 0 100644 1 0 0 0 0.0 - - -", "no directory"),
        (b"//x 0 100644 1 0 0 0 0.0 - - -", "absolute"),
        (b"/d//x 0 100644 1 0 0 0 0.0 - - -", "no directory"),
        (b"/f/x 0 100644 1 0 0 0 0.0 - - -", "no directory"),
        (b"/f 0 100644 1 0 0 0 0.0 - - -", "already"),
        (b"/\\x66 0 100644 1 0 0 0 0.0 - - -", "already"),
        (b"/x\\x2f.. 0 100644 1 0 0 0 0.0 - - -", "absolute"),
        (b"/" + b"x" * 256 + b" 0 100644 1 0 0 0 0.0 - - -", "absolute"),
        (b"/x\\x00 0 100644 1 0 0 0 0.0 - - -", "zero"),
        (b"/x\\q 0 100644 1 0 0 0 0.0 - - -", "stands for nothing"),
        (b"/x\\x1 0 100644 1 0 0 0 0.0 - - -", "stands for nothing"),
        (b"/x\\ 0 100644 1 0 0 0 0.0 - - -", "stands for nothing"),
        (b"/x 0 000644 1 0 0 0 0.0 - - -", "mode"),
        (b"/x 0 1100644 1 0 0 0 0.0 - - -", "mode"),
        (b"/x 0 100999 1 0 0 0 0.0 - - -", "mode"),
        (b"/x 0 -1 1 0 0 0 0.0 - - -", "mode"),
        (b"/x -1 100644 1 0 0 0 0.0 - - -", "size"),
        (b"/x 0x1 100644 1 0 0 0 0.0 - - -", "size"),
        (b"/x 99999999999999999999 100644 1 0 0 0 0.0 a - -", "size"),
        (b"/x 0 100644 4294967296 0 0 0 0.0 - - -", "links"),
        (b"/x 0 100644 1 4294967295 0 0 0.0 - - -", "uid"),
        (b"/x 0 100644 1 0 4294967295 0 0.0 - - -", "gid"),
        (b"/x 0 100644 1 0 0 5 0.0 - - -", "--skip-devices"),
        (b"/x 0 20666 1 0 0 259 0.0 - - -", "--skip-devices"),
        (b"/x 0 60666 1 0 0 0 0.0 - - -", "--skip-devices"),
        (b"/x 0 100644 1 0 0 0 0 - - -", "time"),
        (b"/x 0 100644 1 0 0 0 --1.0 - - -", "time"),
        (b"/x 0 100644 1 0 0 0 -.0 - - -", "time"),
        (b"/x 0 100644 1 0 0 0 1.-1 - - -", "nanoseconds"),
        (b"/x 0 100644 1 0 0 0 9223372036854775808.0 - - -", "time"),
        (b"/x 0 100644 1 0 0 0 -9223372036854775809.0 - - -", "time"),
        (b"/x 0 100644 1 0 0 0 0.0 - - -\r", "carriage return; lines end in a line feed alone"),
        (b"/x 0 100644 1 0 0 0 0.0 - - - user.a=b\r", "carriage return"),
        (b"/x 0 100644 1 0 0 0 0.1000000000 - - -", "nanoseconds"),
        (b"/x 9 100644 1 0 0 0 0.0 - - -", "neither"),
        (b"/x 9 100644 1 0 0 0 0.0 /etc/shadow - -", "relative"),
        (b"/x 9 100644 1 0 0 0 0.0 ../a - -", "relative"),
        (b"/x 9 100644 1 0 0 0 0.0 a/../b - -", "relative"),
        (b"/x 9 100644 1 0 0 0 0.0 a//b - -", "relative"),
        (b"/x 9 100644 1 0 0 0 0.0 a/ - -", "relative"),
        (b"/x 9 100644 1 0 0 0 0.0 a\\x00b - -", "zero"),
        (b"/x 2 100644 1 0 0 0 0.0 - abc -", "3 bytes of contents"),
        (b"/x 5001 100644 1 0 0 0 0.0 - " + b"a" * 5001 + b" -", "5000 at most"),
        (b"/x 9 100644 1 0 0 0 0.0 a - " + DIGEST.upper(), "digest"),
        (b"/x 9 100644 1 0 0 0 0.0 a - " + DIGEST[2:], "digest"),
        (b"/s 0 120777 1 0 0 0 0.0 - - -", "target"),
        (b"/s 0 120777 1 0 0 0 0.0 a a -", "contents"),
        (b"/s 0 120777 1 0 0 0 0.0 " + b"a" * 4096 + b" - -", "target"),
        (b"/p 0 10644 1 0 0 0 0.0 a - -", "a pipe"),
        (b"/x 0 100644 1 0 0 0 0.0 - - - trusted.overlay.redirect=/x", "user.*"),
        (b"/x 0 100644 1 0 0 0 0.0 - - - trusted.overlay.opaque=x", "user.*"),
        (b"/x 0 40755 1 0 0 0 0.0 - - - trusted.overlay.opaque=y", "user.*"),
        (b"/x 0 100644 1 0 0 0 0.0 - - - security.capability=x", "user.*"),
        (b"/x 0 100644 1 0 0 0 0.0 - - - system.posix_acl_access=x", "user.*"),
        (b"/x 0 100644 1 0 0 0 0.0 - - - user.=x", "user.*"),
        (b"/x 0 100644 1 0 0 0 0.0 - - - user.a", "="),
        (b"/x 0 100644 1 0 0 0 0.0 - - - user.a=1 user.\\x61=2", "twice"),
        (b"/x 0 100644 1 0 0 0 0.0 - - - user.a=" + b"1" * 32743, "32755 bytes together"),
        (b"/x 0 100644 1 0 0 0 0.0 - - - user.a=" + b"\xff" * 16383, "65535 bytes as text"),
        (b"/x 0 100644 1 0 0 0 0.0 - - -" + b" user.a=" * 65, "more than"),
    ],
)
def test_refused(line: bytes, said: str) -> None:
    before = HEAD + b"/d 0 40755 2 0 0 0 0.0 - - -\n/f 0 100644 1 0 0 0 0.0 - - -\n"
    with pytest.raises(InvalidImage) as caught:
        read(before + line + b"\n")
    assert said in caught.value.message
    assert "line 4 of the description" in caught.value.message


@pytest.mark.parametrize("text", [b"", b"/d 0 40755 2 0 0 0 0.0 - - -\n", b"/ 0 100644 2 0 0 0 0.0 - - -\n"])
def test_it_begins_with_the_root(text: bytes) -> None:
    with pytest.raises(InvalidImage):
        read(text)


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimitExceeded, match="one line"):
        read(b"x" * (composefs_dump.MAXIMUM_LINE + 1))
    deep = b"".join(b"/d" * level + b" 0 40755 2 0 0 0 0.0 - - -\n" for level in range(1, 258))
    with pytest.raises(InvalidImage, match="longer"):
        read(HEAD + deep)
    monkeypatch.setattr(composefs_dump, "MAXIMUM_ENTRIES", 2)
    with pytest.raises(LimitExceeded, match="lines"):
        read(HEAD + GOOD[0] + b"\n" + GOOD[1] + b"\n")
    monkeypatch.setattr(composefs_dump, "MAXIMUM_DUMP", 40)
    with pytest.raises(LimitExceeded, match="bytes"):
        read(HEAD + GOOD[0])
