"""Mount options: what is well-formed, what needs no grant, what nobody gets, and what a grant covers."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mountd.caller.model import Caller, UserNamespace
from mountd.errors import LimitExceeded, MountdError, OptionNotPermitted
from mountd.trust.options import (
    ALLOWED,
    LIFTING,
    MAXIMUM_OPTION_BYTES,
    MAXIMUM_OPTIONS,
    RESTRICTING,
    check_grant,
    granted,
    parse,
    permit,
    shown,
)

CALLER = Caller(1000, 100, frozenset(), 1, UserNamespace(4, 1, (), (), 0, True), 1000)


@pytest.mark.parametrize(
    ("options", "read_only", "attributes", "file_system"),
    [
        ([], True, set(), ()),
        (["defaults"], True, set(), ()),
        (["ro"], True, set(), ()),
        (
            ["nosuid", "nodev", "noexec", "nosymfollow"],
            True,
            {"nosuid", "nodev", "noexec", "nosymfollow"},
            (),
        ),
        (["noatime", "nodiratime", "noatime"], True, {"noatime", "nodiratime"}, ()),
        (["relatime"], True, set(), ()),
        (["strictatime"], True, {"strictatime"}, ()),
        (["acl", "ro", "compress=zstd:3"], True, set(), ("acl", "compress=zstd:3")),
        (["a=b=c", "é"], True, set(), ("a=b=c", "é")),
        (["x" * MAXIMUM_OPTION_BYTES], True, set(), ("x" * MAXIMUM_OPTION_BYTES,)),
    ],
)
def test_parse(
    options: list[str], read_only: bool, attributes: set[str], file_system: tuple[str, ...]
) -> None:
    parsed = parse(options, read_only=read_only)
    assert (parsed.read_only, parsed.attributes, parsed.file_system) == (read_only, attributes, file_system)


def test_read_only_and_read_write() -> None:
    assert not parse([], read_only=False).read_only
    assert not parse(["rw"], read_only=False).read_only
    assert parse(["ro"], read_only=False).read_only


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([""], "it is empty"),
        (["a,b"], "comma"),
        (["a\0b"], "control character"),
        (["a\nb"], "control character"),
        (["a\x1bb"], "control character"),
        (["a\x7fb"], "control character"),
        (["a\u2028b"], "control character"),
        (["a\ud800b"], "control character"),
        (["a\\054b"], "backslash"),
        (["x" * (MAXIMUM_OPTION_BYTES + 1)], "longer than 1024 bytes"),
        (["é" * 600], "longer than 1024 bytes"),
        (["=x"], "nothing on one side"),
        (["x="], "nothing on one side"),
        (["rw"], "the request is read-only"),
        (["noatime", "relatime"], "contradicts noatime"),
        (["strictatime", "relatime"], "contradicts relatime"),
        (["compress", "compress=no"], "more than once"),
        *((["nosuid", word], "only the host's administrator") for word in sorted(LIFTING)),
    ],
)
def test_parse_refuses(options: list[str], reason: str) -> None:
    with pytest.raises(OptionNotPermitted, match=reason) as raised:
        parse(options, read_only=True)
    assert str(raised.value).isprintable()


def test_ro_and_rw_contradict() -> None:
    with pytest.raises(OptionNotPermitted, match="read-only"):
        parse(["rw", "ro"], read_only=False)


def test_number_of_options_is_bounded() -> None:
    parse([f"o{number}" for number in range(MAXIMUM_OPTIONS)], read_only=True)
    with pytest.raises(LimitExceeded):
        parse(["nosuid"] * (MAXIMUM_OPTIONS + 1), read_only=True)


@given(st.lists(st.text(max_size=30) | st.sampled_from(sorted(RESTRICTING)), max_size=5), st.booleans())
def test_parse_passes_on_only_what_is_safe_to_quote(options: list[str], read_only: bool) -> None:
    try:
        parsed = parse(options, read_only=read_only)
    except MountdError as error:
        said, passed_on = error.message, ()
    else:
        assert parsed.read_only >= read_only
        said, passed_on = "", parsed.file_system
    assert said.isprintable()
    assert set(passed_on) <= set(options)
    assert all(re.search(r"[,\\\x00-\x1f]", option) is None for option in passed_on)


@pytest.mark.parametrize(
    ("grant", "option", "covered"),
    [
        ("compress", "compress", True),
        ("compress", "compress=zstd", True),
        ("compress=zstd", "compress=zstd", True),
        ("compress=zstd", "compress=zstd:3", False),
        ("compress=zstd", "compress", False),
        ("compress=", "compress", True),
        ("compress=", "compress=zstd", False),
        ("compress", "compress-force", False),
        ("compress-force", "compress", False),
        ("uid=$UID", "uid=1000", True),
        ("uid=$UID", "uid=1001", False),
        ("uid=$UID", "uid=$UID", False),
        ("gid=$GID", "gid=100", True),
        ("gid=$GID", "gid=1000", False),
        ("x=$UID:$GID", "x=1000:100", True),
    ],
)
def test_granted(grant: str, option: str, covered: bool) -> None:
    assert granted(grant, option, CALLER) is covered


@pytest.mark.parametrize(
    ("type", "option"),
    [
        ("erofs", "cache_strategy=readahead"),
        ("erofs", "noacl"),
        ("squashfs", "errors=continue"),
        ("squashfs", "threads=multi"),
        ("ext4", "lazytime"),
        ("xfs", "inode64"),
        ("btrfs", "compress"),
        ("btrfs", "compress-force=zstd:-15"),
        ("btrfs", "discard=async"),
        ("tmpfs", "huge=within_size"),
        ("tmpfs", "noswap"),
    ],
)
def test_permit(type: str, option: str) -> None:
    name = option.partition("=")[0]
    permit(option, type=type, rule="r", grants=["other", name], caller=CALLER)
    with pytest.raises(OptionNotPermitted, match="rule “r” does not grant it"):
        permit(option, type=type, rule="r", grants=[name + "=never"], caller=CALLER)


@pytest.mark.parametrize("type", [*ALLOWED, "vfat"])
@pytest.mark.parametrize(
    "option",
    [
        "context=x", "fscontext=x", "defcontext=x", "rootcontext=x", "data=journal", "journal_dev=8",
        "journal_path=/dev/sda", "errors=panic", "errors=remount-ro", "device=/dev/sda", "logdev=/dev/sda",
        "rtdev=/dev/sda", "usrquota", "grpquota", "uquota", "norecovery", "noload", "subvol=x", "subvolid=5",
        "rescue=all", "degraded", "size=1g", "nr_inodes=0", "mode=777", "uid=0", "domain_id=x", "fsid=x",
        "sb=1", "debug", "test_dummy_encryption", "dax", "source=/dev/sda", "lowerdir=/", "mpol=bind:0",
    ],
)  # fmt: skip
def test_never_passed(type: str, option: str) -> None:
    with pytest.raises(OptionNotPermitted, match=f"mountd (never )?passes it to {type}"):
        permit(option, type=type, rule="r", grants=[option, option.partition("=")[0]], caller=CALLER)


@pytest.mark.parametrize(
    ("type", "option"),
    [
        ("ext4", "acl=x"),
        ("btrfs", "compress=lzma"),
        ("tmpfs", "huge"),
        ("erofs", "cache_strategy=readahead\n"),
    ],
)
def test_value_is_checked(type: str, option: str) -> None:
    with pytest.raises(OptionNotPermitted, match="only if its value"):
        permit(option, type=type, rule="r", grants=[option.partition("=")[0]], caller=CALLER)


@pytest.mark.parametrize(
    ("grant", "types"),
    [("acl", ["ext4"]), ("acl", ["xfs", "erofs"]), ("compress=zstd", ["btrfs"]), ("compress=", ["btrfs"]),
     ("noatime", ["xfs"]), ("acl=", ["ext4"])],
)  # fmt: skip
def test_grant(grant: str, types: list[str]) -> None:
    check_grant(grant, types)


@pytest.mark.parametrize(
    ("grant", "types", "reason"),
    [
        ("", ["ext4"], "is not NAME"),
        ("=x", ["ext4"], "is not NAME"),
        ("acl,discard", ["ext4"], "is not NAME"),
        ("acl\n", ["ext4"], "is not NAME"),
        ("context", ["ext4"], "never passes “context”"),
        ("compress", ["ext4", "xfs"], "to ext4 or xfs"),
        ("compress=lzma", ["btrfs"], "with this value"),
        ("cache_strategy=", ["erofs"], "with this value"),
        ("compress=$HOME", ["btrfs"], "neither [$]UID nor [$]GID"),
        ("suid", ["ext4"], "never passes"),
        ("rw", ["ext4"], "never passes"),
    ],
)
def test_grant_of_nothing(grant: str, types: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_grant(grant, types)


def test_shown_fits_into_a_line() -> None:
    assert shown("a\nb\ud800") == "a\\nb\\ud800"
    assert shown("x" * 100) == "x" * 80 + "…"
