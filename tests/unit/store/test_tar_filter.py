"""What comes out of a layer's archive: what a layer may have, made anew, and nothing of anything else."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from typing import Any

import pytest

from mountd.errors import InvalidImage, LimitExceeded
from mountd.store import tar_header
from mountd.store.tar_filter import Filter, Limits, Summary
from mountd.store.tar_header import BLOCK, Entry, build, parse, parse_pax, record
from tests.oci import Member, archive, directory

DEVICE = Member("null", type=tarfile.CHRTYPE, device=(1, 3))
END = bytes(2 * BLOCK)


def run(data: bytes, *, piece: int = 1 << 20, **options: Any) -> tuple[bytes, Summary]:
    """Filter an archive that comes in pieces of a certain size."""
    source, sink = io.BytesIO(data), io.BytesIO()
    options = {"limits": Limits(), "lowest": True, "devices": False, **options}
    summary = Filter(lambda length: source.read(min(length, piece)), sink.write, **options).run()
    return sink.getvalue(), summary


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        return {member.name: member for member in file.getmembers()}


def contents(data: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        found = file.extractfile(name)
        assert found is not None
        return found.read()


def raw(name: bytes = b"a", type: bytes = b"0", size: int = 0, **fields: Any) -> bytes:
    """One header, as `build` would not make it."""
    return build(Entry(name, type, size=size, **fields))


FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("piece", [1, 511, 512, 1 << 20])
def test_what_is_allowed_survives(format: str, piece: int) -> None:
    long = "d/" * 20 + "n" * (60 if format == "ustar" else 200)
    data = archive(
        directory("./", mode=0o711),
        directory("./etc/", mode=0o700, uid=7),
        Member("./etc/a", b"hello", mode=0o4755, uid=0o7777777 if format == "ustar" else 3_000_000_000),
        Member(long, b"x" * 1000),
        Member("soft", type=tarfile.SYMTYPE, link="../../etc/shadow"),
        Member("hard", type=tarfile.LNKTYPE, link="./etc/a"),
        Member("pipe", type=tarfile.FIFOTYPE),
        format=FORMATS[format],
    )
    out, summary = run(data, piece=piece)
    found = members(out)
    assert found["etc"].isdir()
    assert (found["etc"].mode, found["etc"].uid) == (0o700, 7)
    assert found["."].mode == 0o711
    assert found["etc/a"].mode == 0o4755
    assert found["etc/a"].uid == (0o7777777 if format == "ustar" else 3_000_000_000)
    assert contents(out, "etc/a") == contents(out, "hard") == b"hello"
    assert contents(out, long) == b"x" * 1000
    assert found["soft"].linkname == "../../etc/shadow"
    assert found["hard"].linkname == "etc/a"
    assert found["pipe"].isfifo()
    assert len(out) % BLOCK == 0
    assert out.endswith(END)
    assert summary.content == 1005
    # What was made once is made the same again.
    assert run(out)[0] == run(run(out)[0])[0]


def test_times() -> None:
    out, _ = run(archive(Member("a", b"", mtime=-1.5), Member("b", b"", mtime=1.25), Member("c", b"")))
    times = {name: member.mtime for name, member in members(out).items()}
    assert (times["a"], times["b"], times["c"]) == (-1.5, 1.25, 1_700_000_000)


def test_missing_directories_are_roots() -> None:
    out, _ = run(archive(Member("a/b/c", b"", uid=5)))
    found = members(out)
    assert list(found) == [".", "a", "a/b", "a/b/c"]
    assert {(found[name].uid, found[name].mode) for name in (".", "a", "a/b")} == {(0, 0o755)}


def test_attributes() -> None:
    xattrs = {
        "user.a": "1",
        "user.overlay.opaque": "y",
        "trusted.overlay.opaque": "y",
        "trusted.overlay.redirect": "/etc",
        "security.capability": "x",
        "security.selinux": "x",
        "system.posix_acl_access": "x",
        "usera": "x",
    }
    out, summary = run(archive(Member("a", b"", xattrs=xattrs)))
    assert members(out)["a"].pax_headers == {"SCHILY.xattr.user.a": "1"}
    assert summary.xattrs_dropped == 7


def test_device_nodes() -> None:
    block = Member("disk", type=tarfile.BLKTYPE, device=(8, 0))
    hidden = Member("whiteout", type=tarfile.CHRTYPE, device=(0, 0))
    link = Member("again", type=tarfile.LNKTYPE, link="null")
    out, summary = run(archive(DEVICE, block, hidden, link))
    assert list(members(out)) == ["."]
    assert summary.devices_dropped == 3
    out, summary = run(archive(DEVICE, block, hidden, link), devices=True)
    assert list(members(out)) == [".", "null", "disk", "again"]
    assert (members(out)["disk"].devmajor, members(out)["disk"].devminor) == (8, 0)
    assert summary.devices_dropped == 1


WHITEOUTS = archive(
    Member(".wh.gone", b"ignored"),
    Member("d/.wh..wh..opq", b""),
    Member("d/new", b""),
    Member(".wh.file", b""),
    Member("file", b""),
    Member("dir/x", b""),
    Member(".wh.dir", b""),
    Member("deep/er/.wh.x", b""),
    Member(".wh..wh.plnk/1.2", b"aufs"),
    Member(".wh..wh.aufs", b"aufs"),
    Member(".wh.gone", b""),
)


def test_whiteouts_vanish_from_the_lowest_layer() -> None:
    out, summary = run(WHITEOUTS)
    assert list(members(out)) == [".", "d", "d/new", "file", "dir", "dir/x"]
    assert summary.whiteouts == 0


def test_whiteouts_come_last_and_hide_nothing_of_their_own_layer() -> None:
    out, summary = run(WHITEOUTS, lowest=False)
    assert list(members(out)) == [
        *(".", "d", "d/new", "file", "dir", "dir/x"),
        *(".wh.gone", "d/.wh..wh..opq", "deep", "deep/er", "deep/er/.wh.x", "dir/.wh..wh..opq"),
    ]
    assert all(member.size == 0 for name, member in members(out).items() if ".wh." in name)
    assert summary.whiteouts == 4


@pytest.mark.parametrize("more", [[], [Member(".wh.null", b"")]])
def test_what_was_dropped_hides_what_is_below(more: list[Member]) -> None:
    """As it would itself; whether the archive hides the same as well or not."""
    link = Member("dev/again", type=tarfile.LNKTYPE, link="null")
    data = archive(DEVICE, link, *more)
    out, summary = run(data, lowest=False)
    assert list(members(out)) == [".", "dev", ".wh.null", "dev/.wh.again"]
    assert (summary.devices_dropped, summary.whiteouts) == (1, 2)
    assert list(members(run(data)[0])) == [".", "dev"]
    assert list(members(run(data, lowest=False, devices=True)[0])) == [".", "null", "dev", "dev/again"]


def test_a_device_whose_name_has_no_room_to_be_hidden() -> None:
    device = archive(Member("n" * 252, type=tarfile.CHRTYPE, device=(1, 3)))
    assert run(device)[1].devices_dropped == 1
    with pytest.raises(InvalidImage, match="too long to be hidden"):
        run(device, lowest=False)


def pax(*records: tuple[bytes, bytes]) -> bytes:
    data = b"".join(record(key, value) for key, value in records)
    return raw(b"x", b"x", len(data)) + data + bytes(-len(data) % BLOCK)


def pax_raw(data: bytes) -> bytes:
    return raw(b"x", b"x", len(data)) + data + bytes(-len(data) % BLOCK) + raw() + END


def spoilt(at: int, value: bytes) -> bytes:
    """A header with other bytes at one place and the checksum that belongs to them."""
    block = bytearray(raw())
    block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + END


REFUSED: dict[str, tuple[bytes, str]] = {
    "absolute": (archive(Member("/etc/passwd", b"x")), "absolute"),
    "upwards": (archive(Member("../x", b"x")), "“..”"),
    "upwards inside": (archive(Member("a/../../x", b"x")), "“..”"),
    "upwards and back": (archive(Member("a/../a", b"x")), "“..”"),
    "absolute in pax": (pax((b"path", b"/x")) + raw() + END, "absolute"),
    "absolute in gnu": (raw(b"L", b"L", 3) + b"/x\0".ljust(BLOCK, b"\0") + raw() + END, "absolute"),
    "through a link": (
        archive(Member("a", type=tarfile.SYMTYPE, link="/etc"), Member("a/b", b"")),
        "through",
    ),
    "through a file": (archive(Member("a", b""), Member("a/b", b"")), "through"),
    "through a device": (archive(DEVICE, Member("null/x", b"")), "through"),
    "file twice": (archive(Member("a", b""), Member("./a", b"")), "twice"),
    "link in place of directory": (
        archive(directory("a"), Member("a", type=tarfile.SYMTYPE, link="/")),
        "twice",
    ),
    "directory in place of link": (
        archive(Member("a", type=tarfile.SYMTYPE, link="/"), directory("a")),
        "twice",
    ),
    "the root as a file": (raw(b".", b"0") + END, "the root"),
    "the root as a link": (raw(b"./", b"2", link=b"/") + END, "the root"),
    "link outside": (archive(Member("a", type=tarfile.LNKTYPE, link="../../etc/shadow")), "“..”"),
    "absolute link": (archive(Member("a", type=tarfile.LNKTYPE, link="/etc/shadow")), "absolute"),
    "link to nothing": (
        archive(Member("a", type=tarfile.LNKTYPE, link="b"), Member("b", b"")),
        "leads to nothing",
    ),
    "link to itself": (archive(Member("a", type=tarfile.LNKTYPE, link="a")), "leads to nothing"),
    "link to a directory": (
        archive(directory("d"), Member("a", type=tarfile.LNKTYPE, link="d")),
        "leads to",
    ),
    "empty soft link": (raw(b"a", b"2") + END, "symbolic link is empty"),
    "long component": (archive(Member("n" * 256, b"")), "too long"),
    "long path": (archive(Member("d/" * 20 + ("n" * 250 + "/") * 17, b"")), "too long"),
    "whiteout of nothing": (archive(Member(".wh.", b"")), "hides nothing"),
    "whiteout of this": (archive(Member(".wh..", b"")), "hides nothing"),
    "whiteout of above": (archive(Member("a/.wh...", b"")), "hides nothing"),
    "whiteout as directory": (archive(Member(".wh.a/b", b"")), "whiteout is a directory"),
    "directory with contents": (raw(b"a", b"5", 512) + bytes(512) + END, "has contents"),
    "link with contents": (raw(b"a") + raw(b"b", b"1", 5, link=b"a") + bytes(512) + END, "has contents"),
    "sparse": (raw(b"a", b"S", 0) + END, "unsupported type"),
    "multi-volume": (raw(b"a", b"M", 0) + END, "unsupported type"),
    "sparse in pax": (pax((b"GNU.sparse.major", b"1")) + raw() + END, "holes"),
    "sparse by star": (pax((b"SCHILY.realsize", b"1")) + raw() + END, "holes"),
    "global header": (
        raw(b"g", b"g", 20) + b"20 path=/etc/passwd\n".ljust(BLOCK, b"\0") + END,
        "for all entries",
    ),
    "two pax headers": (pax((b"path", b"a")) + pax((b"path", b"b")) + raw() + END, "unsupported type"),
    "two long names": (
        2 * (raw(b"L", b"L", 2) + b"b".ljust(BLOCK, b"\0")) + raw() + END,
        "unsupported type",
    ),
    "both notations": (
        raw(b"L", b"L", 2) + b"b".ljust(BLOCK, b"\0") + pax((b"path", b"a")) + raw() + END,
        "both GNU's and pax",
    ),
    "pax at the end": (pax((b"path", b"a")) + END, "ends after a header"),
    "no checksum": (bytes([1]) + raw()[1:] + END, "checksum"),
    "other magic": (spoilt(257, b"ustar\x0001"), "unknown format"),
    "number not octal": (spoilt(100, b"0000x00\0"), "not octal"),
    "number in the middle": (spoilt(124, b"00 00000000\0"), "not octal"),
    "negative size": (spoilt(124, b"\xff" * 12), "out of range"),
    "huge size": (spoilt(124, b"\x80" + b"\x7f" * 11), "out of range"),
    "huge owner": (spoilt(108, b"\x80\0\0\x01\0\0\0\0"), "id is too large"),
    "owner of nobody": (spoilt(108, b"\x80\0\0\0\xff\xff\xff\xff"), "id is too large"),
    "pax owner": (pax((b"uid", b"4294967295")) + raw() + END, "id is too large"),
    "pax size": (pax((b"size", b"-1")) + raw() + END, "malformed"),
    "pax size of letters": (pax((b"size", b"0x10")) + raw() + END, "malformed"),
    "pax size too large": (pax((b"size", b"9" * 19)) + raw() + END, "malformed"),
    "pax time": (pax((b"mtime", b"1e9")) + raw() + END, "malformed"),
    "pax path empty": (pax((b"path", b"")) + raw() + END, "empty or has a NUL"),
    "pax path with NUL": (pax((b"path", b"a\0b")) + raw() + END, "empty or has a NUL"),
    "pax record too long": (pax_raw(b"99 path=a\n"), "malformed record"),
    "pax record too short": (pax_raw(b"5 path=a\n"), "malformed record"),
    "pax record without end": (pax_raw(b"9 path=ab"), "malformed record"),
    "pax record without key": (pax_raw(b"5 =a\n"), "malformed record"),
    "pax record zero": (pax_raw(b"0 path=a\n"), "malformed record"),
    "pax key twice": (pax((b"path", b"a"), (b"path", b"b")) + raw() + END, "key twice"),
    "attribute without name": (pax((b"SCHILY.xattr.", b"")) + raw() + END, "attribute is malformed"),
    "attribute too long": (
        pax((b"SCHILY.xattr.user.a", b"x" * 65537)) + raw() + END,
        "attribute is malformed",
    ),
    "attributes": (
        pax(*((b"SCHILY.xattr.user.%d" % n, b"") for n in range(65))) + raw() + END,
        "more than 64",
    ),
    "after the end": (raw() + END + b"x", "goes on after its end"),
    "one block, then more": (raw() + bytes(BLOCK) + raw(b"b") + END, "goes on after its end"),
    "cut in a header": (raw()[:100], "ends inside a header"),
    "cut in a file": (raw(size=1000) + bytes(999), "ends inside a file"),
    "cut in padding": (raw(size=1000) + bytes(1010), "ends inside a file"),
    "cut in a whiteout": (raw(b".wh.a", size=1000) + bytes(999), "ends inside a file"),
    "cut in pax": (raw(b"x", b"x", 600) + bytes(600), "ends inside a header"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    data, reason = REFUSED[case]
    for piece in (1 << 20, 7):
        with pytest.raises(InvalidImage, match=reason):
            run(data, piece=piece)


def many(count: int, name: Callable[[int], bytes] = lambda number: b"%d" % number) -> bytes:
    return b"".join(raw(name(number)) for number in range(count)) + END


LIMITED: dict[str, tuple[bytes, Limits, str]] = {
    "entries": (many(11), Limits(entries=10), "entries in a layer"),
    "headers of headers": (
        b"".join(pax((b"comment", b"x")) + raw(b"%d" % n) for n in range(6)) + END,
        Limits(entries=10),
        "entries in a layer",
    ),
    "whiteouts": (many(11, lambda n: b".wh.%d" % n), Limits(entries=10), "entries in a layer"),
    "directories that were left out": (
        raw(b"a/" * 10 + b"b") + END,
        Limits(entries=10),
        "entries in a layer",
    ),
    "depth": (raw(b"a/" * 64 + b"b") + END, Limits(), "directories in one another"),
    "names": (many(20, lambda n: b"%099d" % n), Limits(names=1000), "bytes of names"),
    "bytes": (raw(size=2000) + bytes(2048) + END, Limits(bytes=1999), "bytes of files"),
    "bytes of whiteouts": (
        raw(b".wh.a", size=2000) + bytes(2048) + END,
        Limits(bytes=1999),
        "bytes of files",
    ),
    "8 EiB without contents": (
        spoilt(124, b"\x80" + bytes(3) + b"\x3f" + b"\xff" * 7),
        Limits(),
        "bytes of",
    ),
    "a header of headers": (raw(b"x", b"x", 2 << 20) + bytes(2 << 20), Limits(), "header of a tar archive"),
    "a long name": (raw(b"L", b"L", 2 << 20) + bytes(2 << 20), Limits(), "header of a tar archive"),
}


@pytest.mark.parametrize("case", LIMITED)
def test_limits(case: str) -> None:
    data, limits, reason = LIMITED[case]
    with pytest.raises(LimitExceeded, match=reason):
        run(data, limits=limits)


def test_just_within_limits() -> None:
    run(many(10), limits=Limits(entries=11))
    run(raw(size=2000) + bytes(2048) + END, limits=Limits(bytes=2000))
    run(raw(b"a/" * 63 + b"b") + END)


def test_an_archive_may_end_without_an_end() -> None:
    assert list(members(run(raw())[0])) == [".", "a"]
    assert list(members(run(raw() + bytes(BLOCK))[0])) == [".", "a"]
    assert list(members(run(raw() + bytes(20 * BLOCK))[0])) == [".", "a"]
    assert list(members(run(b"")[0])) == ["."]


def test_a_comment_for_all_is_ignored() -> None:
    data = record(b"comment", b"0123abcd")
    header = raw(b"g", b"g", len(data)) + data + bytes(-len(data) % BLOCK)
    assert list(members(run(header + raw() + END)[0])) == [".", "a"]


def test_old_archives() -> None:
    """From before there were formats: no magic, no type, a slash for a directory."""
    block = bytearray(raw(b"d/", b"\0"))
    block[257:345] = bytes(88)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    assert members(run(bytes(block) + END)[0])["d"].isdir()


@pytest.mark.parametrize("length", [*range(1, 130), 990, 991, 992, 993, 994, 995, 9990, 9991])
def test_pax_records_know_their_own_length(length: int) -> None:
    made = record(b"path", b"x" * length)
    assert parse_pax(made, 0) == {b"path": b"x" * length}


def test_headers_are_read_as_they_were_written() -> None:
    entry = Entry(b"a", tar_header.CHARACTER, mode=0o777, uid=1, gid=2, mtime=5 * 10**9, major=4095, minor=3)
    assert parse(build(entry), 0) == entry
