"""The command line of mount.mountd."""

from __future__ import annotations

import pytest

from mountd.cli.mount_helper import OtherImage, Wishes, check_digest, read_type
from mountd.cli.report import UsageError
from mountd.errors import OptionNotPermitted
from mountd.request import Request

USUAL = {
    "spec": "img", "directory": "dir",
    "fake": False, "sloppy": False, "verbose": False, "json": False, "read_only": None, "type": None,
    "options": [], "userns": None, "idmap": None,
    "signature": None,
    "image_policy": None,
    "interactive": None,
    "digest": None, "key_file": None, "namespace": None,
    "objects": [], "check_contents": None, "fs_verity": None,
}  # fmt: skip


def parse(argv: list[str]) -> Wishes:
    wishes = Wishes()
    wishes.read(argv)
    return wishes


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
        ("-fo ro img -tmountd.xfs -- dir", {"fake": True, "read_only": True, "type": "xfs"}),
        ("-onoexec --json -vtx img dir", {
            "options": ["noexec"], "json": True, "verbose": True, "type": "x",
        }),
        ("img dir -o -- -t --json -v", {"options": ["--"], "type": "--json", "verbose": True}),
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
        ("img dir -N /proc/1/ns/mnt", {"namespace": "/proc/1/ns/mnt"}),
        ("img dir -o loop,nofail,x-systemd.automount,X-mount.mkdir,silent,nousers,nogroup", {}),
        ("img dir -o sync,dirsync,lazytime,iversion,mand,noexec", {"options": ["noexec"]}),
        ("img dir -o lazytime,mand,mountd.access=read-write", {"options": ["lazytime"], "read_only": False}),
        ("img dir -o sync -w -r", {"read_only": True}),
        ("tmpfs:1M dir -o sync,mand", {"spec": "tmpfs:1M", "options": ["sync"]}),
        ("tmpfs:1M dir -o sync,ro", {"spec": "tmpfs:1M", "read_only": True}),
        ("img dir -o noexec,nosuid,nodev,user,exec", {"options": ["nosuid", "nodev"]}),
        ("img dir -o exec,noexec", {"options": ["noexec"]}),
        ("img dir -o noatime,atime,nodiratime,diratime,nosymfollow", {"options": ["nosymfollow"]}),
        ("img dir -o mountd.key-file=/etc/key", {"key_file": "/etc/key"}),
        ("img dir -o mountd.digest=sha256:" + 64 * "a", {"digest": "sha256:" + 64 * "a"}),
        ("img dir -t mountd.composefs -o mountd.objects=/a:b", {
            "spec": "composefs:img", "objects": ["/a", "b"],
        }),
        ("img dir -o mountd.verity=yes,mountd.objects=a,mountd.fsverity=" + 64 * "b" + " -t composefs", {
            "spec": "composefs:img", "objects": ["a"], "check_contents": True, "fs_verity": 64 * "b",
        }),
        ("composefs:a dir -t mountd.composefs -o mountd.objects=a,mountd.verity=no", {
            "spec": "composefs:a", "objects": ["a"], "check_contents": False,
        }),
        ("composefs:a dir -t mountd -o mountd.objects=b", {"spec": "composefs:a", "objects": ["b"]}),
        # What is so called is a file.
        ("oci:a.example/b dir -t mountd.composefs -o mountd.objects=b", {
            "spec": "composefs:oci:a.example/b", "objects": ["b"],
        }),
    ],
)  # fmt: skip
def test_parse(line: str, changed: dict[str, object]) -> None:
    assert vars(parse(line.split())) == USUAL | changed


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "SPEC and DIR are needed"),
        ("img", "SPEC and DIR are needed"),
        ("img dir more", "nothing else"),
        ("img dir -x", "option -x not recognized"),
        ("img dir -o", "option -o requires argument"),
        ("img dir -so", "option -o requires argument"),
        ("img dir -sx", "option -x not recognized"),
        ("img dir -:", "option -: not recognized"),
        ("img dir --bogus", "option --bogus not recognized"),
        ("img dir --js", "option --js not recognized"),
        ("img dir --json=1", "option --json=1 not recognized"),
        ("img -- dir --json", "nothing else"),
        ("img dir -t mountd.composefs", "directories with its contents"),
        ("composefs:img dir -o mountd.verity=yes", "directories with its contents"),
        ("img dir -o mountd.objects=a", "about a composefs"),
        ("img dir -o mountd.verity=no", "about a composefs"),
        ("img dir -t mountd.erofs -o mountd.fsverity=" + 64 * "a", "about a composefs"),
    ],
)
def test_wrong_usage(line: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        parse(line.split())


def test_names_may_look_like_options_or_be_a_dash() -> None:
    wishes = parse(["-v", "-", "--", "-x"])
    assert (wishes.spec, wishes.directory, wishes.verbose) == ("-", "-x", True)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("remount", "mount it again"),
        ("bind", "without -t mountd"),
        ("rbind", "without -t mountd"),
        ("move", "mount --move"),
        ("mountd.later=1", "mountd.userns=, mountd.idmap=, mountd.access="),
        ("shared", "mount --make-private DIR"),
        ("rslave", "mount --make-private DIR"),
        ("mountd.key-file", "the path of a file with the password"),
        ("mountd.digest", "64 hexadecimal digits"),
        ("mountd.digest=sha256:", "64 hexadecimal digits"),
        ("mountd.digest=sha256:" + 64 * "A", "64 hexadecimal digits"),
        ("mountd.digest=" + 64 * "a", "64 hexadecimal digits"),
        ("mountd.digest=sha512:" + 64 * "a", "64 hexadecimal digits"),
        ("mountd.objects", "paths of directories"),
        ("mountd.objects=", "paths of directories"),
        ("mountd.objects=a:", "paths of directories"),
        ("mountd.objects=:a", "paths of directories"),
        ("mountd.objects=a::b", "paths of directories"),
        ("mountd.verity", "yes, no"),
        ("mountd.verity=true", "yes, no"),
        ("mountd.fsverity", "64 hexadecimal digits"),
        ("mountd.fsverity=sha256:" + 64 * "a", "64 hexadecimal digits"),
        ("mountd.fsverity=" + 63 * "a", "64 hexadecimal digits"),
        ("mountd.fsverity=" + 64 * "A", "64 hexadecimal digits"),
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


def test_a_digest_of_what_has_several() -> None:
    """No digest is that of an image of several layers; what it is named by instead is the way out."""
    layers = ["sha256:" + 64 * "a", "sha256:" + 64 * "b"]
    with Request("oci:registry.example.com/app:1") as request:
        check_digest(layers[0], {"digest": layers[0]}, request)
        for wanted in (*layers, "sha256:" + 64 * "c"):
            with pytest.raises(OtherImage, match="several layers, each with a digest") as caught:
                check_digest(wanted, {"digest": ", ".join(layers)}, request)
            assert "oci:NAME@sha256:" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "type"),
    [
        ("mountd", None), ("mountd.", None), ("mountd.erofs", "erofs"), ("erofs", "erofs"),
        ("mountd.fuse.x", "fuse.x"), ("mountdx", "mountdx"), ("", None),
    ],
)  # fmt: skip
def test_type(text: str, type: str | None) -> None:
    assert read_type(text) == type
