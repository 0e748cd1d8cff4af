"""The command line of mount.mountd."""

from __future__ import annotations

import getopt

import pytest

from mountd.cli.mount_helper import parse, read_type
from mountd.errors import OptionNotPermitted

USUAL = {
    "fake": False, "sloppy": False, "verbose": False, "json": False, "read_only": None, "type": None,
    "options": [], "userns": None, "idmap": None,
    "signature": None,
    "image_policy": None,
    "interactive": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("img dir", {}),
        ("img dir -o rw", {}),  # what mount(8) adds
        ("img dir -s -f -n -v -o ro -t mountd.erofs", {
            "sloppy": True, "fake": True, "verbose": True, "read_only": True, "type": "erofs",
        }),
        ("-sfnv img -o noexec,ro -o nodev dir", {
            "sloppy": True, "fake": True, "verbose": True, "read_only": True, "options": ["noexec", "nodev"],
        }),
        ("img dir -r", {"read_only": True}),
        ("img dir -w", {"read_only": False}),
        ("img dir -w -o ro", {"read_only": True}),
        ("img dir -o mountd.access=read-write", {"read_only": False}),
        ("img dir -o mountd.access=read-only,rw", {"read_only": True}),
        ("img dir -o ro=recursive,nosuid=recursive", {"read_only": True, "options": ["nosuid"]}),
        ("img dir -o ,,", {}),
        ("img dir -o defaults,auto,noauto,async,exec,_netdev,nofail,user,users,owner,group,nouser", {}),
        ("img dir -o user=anna,uhelper=mountd,helper=x,comment=y", {}),
        ("img dir -o mountd.userns=/proc/7/ns/user,mountd.idmap=caller", {
            "userns": "/proc/7/ns/user", "idmap": "caller",
        }),
        ("img dir -o mountd.userns=none", {"userns": "none"}),
        ("img dir -o compress=zstd:3,bogus", {"options": ["compress=zstd:3", "bogus"]}),
        ("img dir -o mountd.later=1 -s", {"sloppy": True}),
    ],
)  # fmt: skip
def test_parse(line: str, changed: dict[str, object]) -> None:
    wishes, positional = parse(line.split())
    assert vars(wishes) == USUAL | changed
    assert positional == ["img", "dir"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "SPEC and DIR are needed"),
        ("img", "SPEC and DIR are needed"),
        ("img dir more", "nothing else"),
        ("img dir -N /proc/1/ns/mnt", "-N is not supported"),
        ("img dir -x", "option -x not recognized"),
        ("img dir -o", "option -o requires argument"),
    ],
)
def test_wrong_usage(line: str, text: str) -> None:
    with pytest.raises(getopt.GetoptError, match=text):
        parse(line.split())


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("remount", "mount it again"),
        ("bind", "without -t mountd"),
        ("rbind", "without -t mountd"),
        ("move", "mount --move"),
        ("mountd.later=1", "mountd.userns=, mountd.idmap=, mountd.access="),
        ("mountd.userns", "path of a user namespace"),
        ("mountd.userns=", "path of a user namespace"),
        ("mountd.idmap=ranges", "none, namespace, caller"),
        ("mountd.access=rw", "read-only, read-write"),
    ],
)
def test_refused_option(option: str, hint: str) -> None:
    with pytest.raises(OptionNotPermitted) as caught:
        parse(["img", "dir", "-o", f"ro,{option}"])
    assert caught.value.parameters["option"] == option
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "type"),
    [
        ("mountd", None), ("mountd.", None), ("mountd.erofs", "erofs"), ("erofs", "erofs"),
        ("mountd.fuse.x", "fuse.x"), ("mountdx", "mountdx"), ("", None),
    ],
)  # fmt: skip
def test_type(text: str, type: str | None) -> None:
    assert read_type(text) == type
