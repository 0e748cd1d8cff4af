"""Policy files: what they mean, what masks them, and that anything broken is named and refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.trust import location
from mountd.trust.policy import Access, CallerMatch, Grant, ImageMatch, Policy, Require, Verdict
from mountd.trust.policy_file import MAXIMUM_BYTES, PolicyError, load

DEFAULT = Path(__file__).parents[3] / "units/policy.d"
USERS = {"alice": 1000, "bob": 1001, "nobody": 65534}
GROUPS = {"dev": 500}

RULE = """
[[rule]]
name = "%s"
image = { location = "/srv/*" }
caller = { any = true }
verdict = "deny"
"""


def read(*directories: Path) -> Policy:
    return load(directories, resolve_user=USERS.__getitem__, resolve_group=GROUPS.__getitem__)


def names(*directories: Path) -> list[str]:
    return [rule.name for rule in read(*directories).rules]


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("etc", "usr"):
        (tmp_path / name).mkdir(mode=0o755)
    return tmp_path / "etc", tmp_path / "usr"


@pytest.fixture
def policy(directories: tuple[Path, Path]) -> Callable[[str], Policy]:
    def from_text(text: str) -> Policy:
        (directories[0] / "a.toml").write_text(text)
        return read(directories[0])

    return from_text


def test_default_policy() -> None:
    (rule,) = load([DEFAULT]).rules
    assert rule.verdict is Verdict.ALLOW
    assert rule.origin == f"{DEFAULT}/50-default.toml: rule 1"
    assert rule.require == Require(("root-owned",))
    assert rule.caller == CallerMatch(any=True)
    assert rule.grant is not None
    assert rule.grant.access is Access.READ_ONLY
    assert set(rule.grant.file_systems) == {"erofs", "squashfs", "ext4", "xfs", "btrfs"}
    for top in ("/usr/lib", "/usr/local/lib", "/var/lib"):
        for kind in ("machines", "portables", "extensions", "confexts"):
            assert f"{top}/{kind}/*" in rule.image.location


def test_all_keys(policy: Callable[[str], Policy]) -> None:
    first, second, third = policy(
        """
        [[rule]]
        name = "images"
        image = { location = ["/srv/*.raw", "/opt/[a-z]?"] }
        caller = { users = ["alice", 7, "8"], groups = ["dev"], user-namespace = "own", nested = true }
        require = { integrity = ["root-owned"] }
        verdict = "allow"
        [rule.grant]
        file-systems = ["ext4", "btrfs"]
        access = "read-write"
        options = ["acl", "compress=zstd"]
        flags = ["noexec"]
        idmap = ["namespace"]
        [[rule]]
        name = "memory"
        image = { kind = "tmpfs" }
        caller = { host = true, user-namespace = "none" }
        grant = { max-size = "64M", max-inodes = 1000, options = ["huge=never"] }
        verdict = "ask"
        [[rule]]
        name = "rest"
        image = { any = true }
        caller = { any = true }
        verdict = "deny"
        """.replace("\n                  ", " ")
    ).rules
    assert first.image == ImageMatch(location=("/srv/*.raw", "/opt/[a-z]?"))
    assert first.caller == CallerMatch(
        users=frozenset({1000, 7, 8}), groups=frozenset({500}), user_namespace="own", nested=True
    )
    assert first.grant == Grant(
        ("ext4", "btrfs"), Access.READ_WRITE, ("acl", "compress=zstd"), ("noexec",), ("namespace",)
    )
    assert second.image == ImageMatch(kind="tmpfs")
    assert second.verdict is Verdict.ASK
    assert second.grant == Grant(
        access=Access.READ_WRITE, options=("huge=never",), max_size=64 << 20, max_inodes=1000
    )
    assert (third.image, third.require, third.grant) == (ImageMatch(any=True), None, None)


def test_order_and_masks(directories: tuple[Path, Path]) -> None:
    etc, usr = directories
    for name in ("10", "20", "30", "40"):
        (usr / f"{name}.toml").write_text(RULE % f"usr {name}")
    assert names(etc, usr) == ["usr 10", "usr 20", "usr 30", "usr 40"]
    (etc / "15.toml").write_text(RULE % "etc 15")
    (etc / "20.toml").write_text(RULE % "etc 20")
    (etc / "30.toml").symlink_to("/dev/null")
    (etc / "40.toml").write_text("")
    assert names(etc, usr) == ["usr 10", "etc 15", "etc 20"]
    assert names(usr, etc) == ["usr 10", "etc 15", "usr 20", "usr 30", "usr 40"]


def test_what_is_masked_is_not_read(directories: tuple[Path, Path]) -> None:
    etc, usr = directories
    (etc / "a.toml").write_text(RULE % "etc")
    (usr / "a.toml").write_text("broken")
    assert names(etc, usr) == ["etc"]


def test_other_files_are_not_read(directories: tuple[Path, Path]) -> None:
    (directories[0] / "README").write_text("broken")
    (directories[0] / ".#a.toml").symlink_to("nowhere")
    assert names(directories[0]) == []


def test_no_policy_is_a_policy(directories: tuple[Path, Path], tmp_path: Path) -> None:
    assert read() == read(tmp_path / "missing", *directories) == Policy(())


def change(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


IMAGE = """
[[rule]]
name = "images"
image = { location = "/srv/*" }
caller = { any = true }
require = { integrity = ["root-owned"] }
grant = { file-systems = ["ext4"] }
verdict = "allow"
"""
TMPFS = """
[[rule]]
name = "memory"
image = { kind = "tmpfs" }
caller = { any = true }
grant = { max-size = 1000 }
verdict = "allow"
"""
LATER = "not supported by this version of mountd"

BROKEN = [
    (IMAGE, "[[rule]]", "[[rule]", "", "it is not TOML"),
    (IMAGE, "verdict =", 'name = "twice"\nverdict =', "", "it is not TOML"),
    (IMAGE, "[[rule]]", "[[rules]]", "rules", "unknown key"),
    (IMAGE, "[[rule]]", "[rule]", "rule", "valid list"),
    (IMAGE, "[[rule]]", "[key.team]\n[[rule]]", "key.team", "exactly one of x509"),
    (IMAGE, 'verdict = "allow"', 'verdict = "allow"\nkey = 1', "rule 1: key", "unknown key"),
    (IMAGE, 'verdict = "allow"', "", "rule 1: verdict", "it is missing"),
    (IMAGE, 'verdict = "allow"', 'verdict = "yes"', "rule 1: verdict", "'allow', 'deny' or 'ask'"),
    (IMAGE, 'verdict = "allow"', 'verdict = "deny"', "rule 1: require", "a rule that denies has none"),
    (TMPFS, 'verdict = "allow"', 'verdict = "deny"', "rule 1: grant", "a rule that denies has none"),
    (IMAGE, 'name = "images"', "", "rule 1: name", "it is missing"),
    (IMAGE, 'name = "images"', "name = 1", "rule 1: name", "valid string"),
    (IMAGE, '"images"', '""', "rule 1: name", "printable"),
    (IMAGE, '"images"', '" "', "rule 1: name", "printable"),
    (IMAGE, '"images"', r'"a\nb"', "rule 1: name", "printable"),
    (IMAGE, '"images"', '"' + "x" * 256 + '"', "rule 1: name", "1 to 255"),
    (IMAGE, "image = {", "other = 1\nimage = {", "rule 1: other", "unknown key"),
    (IMAGE, 'image = { location = "/srv/*" }', "", "rule 1: image", "it is missing"),
    (IMAGE, 'location = "/srv/*"', "", "rule 1: image", "exactly one"),
    (IMAGE, 'location = "/srv/*"', 'location = "/srv/*", any = true', "rule 1: image", "exactly one"),
    (IMAGE, 'location = "/srv/*"', "any = false", "rule 1: image.any", "only be true"),
    (IMAGE, 'location = "/srv/*"', "any = 1", "rule 1: image.any", "valid boolean"),
    (IMAGE, 'location = "/srv/*"', "location = []", "rule 1: image.location", "the list is empty"),
    (IMAGE, 'location = "/srv/*"', "location = 1", "rule 1: image.location", "valid list"),
    (IMAGE, '"/srv/*"', '"srv/*"', "rule 1: image.location", "not absolute"),
    (IMAGE, '"/srv/*"', '""', "rule 1: image.location", "not absolute"),
    (IMAGE, '"/srv/*"', '"/"', "rule 1: image.location", "empty"),
    (IMAGE, '"/srv/*"', '"/srv/"', "rule 1: image.location", "empty"),
    (IMAGE, '"/srv/*"', '"/srv//a"', "rule 1: image.location", "empty"),
    (IMAGE, '"/srv/*"', '"/srv/../a"', "rule 1: image.location", "empty"),
    (IMAGE, '"/srv/*"', '"/srv/**"', "rule 1: image.location", "“**” is not supported"),
    (IMAGE, '"/srv/*"', '"/srv/[a"', "rule 1: image.location", "without its"),
    (IMAGE, '"/srv/*"', '"/srv/[a/b]"', "rule 1: image.location", "without its"),
    (IMAGE, '"/srv/*"', '"/srv/[!]"', "rule 1: image.location", "without its"),
    (IMAGE, '"/srv/*"', r'"/srv/\\*"', "rule 1: image.location", "backslash"),
    (IMAGE, '"/srv/*"', r'"/srv/\u0007"', "rule 1: image.location", "control character"),
    (IMAGE, 'location = "/srv/*"', 'kind = "network"', "rule 1: image.kind", LATER),
    (IMAGE, 'location = "/srv/*"', 'registry = "x"', "rule 1: image.registry", "full name of a host"),
    (IMAGE, 'location = "/srv/*"', 'signed = "x"', "rule 1: image.signed", "there is no key “x”"),
    (IMAGE, 'location = "/srv/*"', 'digest = ["x"]', "rule 1: image.digest", "64 digits"),
    (IMAGE, 'location = "/srv/*"', 'network = "x"', "rule 1: image.network", LATER),
    (IMAGE, 'location = "/srv/*"', 'path = "x"', "rule 1: image.path", "unknown key"),
    (IMAGE, "caller = { any = true }", "", "rule 1: caller", "it is missing"),
    (IMAGE, "any = true", "", "rule 1: caller", "either any = true or"),
    (IMAGE, "any = true", "any = false", "rule 1: caller.any", "only be true"),
    (IMAGE, "any = true", "any = true, host = true", "rule 1: caller", "either any = true or"),
    (IMAGE, "any = true", "users = []", "rule 1: caller.users", "the list is empty"),
    (IMAGE, "any = true", "groups = []", "rule 1: caller.groups", "the list is empty"),
    (IMAGE, "any = true", 'users = ["carol"]', "rule 1: caller.users", "“carol” is unknown"),
    (IMAGE, "any = true", 'groups = ["alice"]', "rule 1: caller.groups", "“alice” is unknown"),
    (IMAGE, "any = true", 'users = "alice"', "rule 1: caller.users", "valid list"),
    (IMAGE, "any = true", "users = [true]", "rule 1: caller.users.0", "valid string"),
    (IMAGE, "any = true", "users = [-1]", "rule 1: caller.users", "not an id"),
    (IMAGE, "any = true", "users = [4294967295]", "rule 1: caller.users", "not an id"),
    (IMAGE, "any = true", 'users = ["nobody"]', "rule 1: caller.users", "never matches"),
    (IMAGE, "any = true", "groups = [65534]", "rule 1: caller.groups", "never matches"),
    (IMAGE, "any = true", 'user-namespace = "mine"', "rule 1: caller.user-namespace", "'own' or 'none'"),
    (IMAGE, "any = true", "user_namespace = 1", "rule 1: caller.user_namespace", "unknown key"),
    (IMAGE, "any = true", 'host = "yes"', "rule 1: caller.host", "valid boolean"),
    (IMAGE, "any = true", "host = true, nested = true", "rule 1: caller.nested", "both host and nested"),
    (IMAGE, "any = true", "host = false, nested = false", "rule 1: caller.nested", "or neither"),
    (IMAGE, "any = true", 'nested = true, user-namespace = "none"', "rule 1: caller.user-namespace",
     "no nested caller"),
    (IMAGE, "any = true", 'units = ["x"]', "rule 1: caller.units", "no name of a .service"),
    (IMAGE, "any = true", 'slices = ["x"]', "rule 1: caller.slices", "no name of a .slice"),
    (IMAGE, "any = true", 'containers = ["x"]', "rule 1: caller.containers", "MANAGER:NAME"),
    (IMAGE, 'require = { integrity = ["root-owned"] }', "", "rule 1: require", "it is missing"),
    (IMAGE, 'integrity = ["root-owned"]', "", "rule 1: require.integrity", "name some of"),
    (IMAGE, '["root-owned"]', "[]", "rule 1: require.integrity", "the list is empty"),
    (IMAGE, '["root-owned"]', '["none"]', "rule 1: require.integrity", "“none” is unknown"),
    (IMAGE, '["root-owned"]', '["root-owned"], signature = "x"', "rule 1: require.signature",
     "there is no key “x”"),
    (IMAGE, '["root-owned"]', '["root-owned"], min-strength = "x"', "rule 1: require.min-strength",
     "'signed', 'digest' or 'location'"),
    (IMAGE, 'grant = { file-systems = ["ext4"] }', "", "rule 1: grant", "it is missing"),
    (IMAGE, 'file-systems = ["ext4"]', "", "rule 1: grant.file-systems", "name some of"),
    (IMAGE, '["ext4"]', "[]", "rule 1: grant.file-systems", "name some of"),
    (IMAGE, '["ext4"]', '["vfat"]', "rule 1: grant.file-systems", "“vfat” is not one of"),
    (IMAGE, '["ext4"]', '["tmpfs"]', "rule 1: grant.file-systems", "“tmpfs” is not one of"),
    (IMAGE, '["ext4"]', '["ext4"], access = "rw"', "rule 1: grant.access", "'read-only' or 'read-write'"),
    (IMAGE, '["ext4"]', '["ext4"], flags = ["suid"]', "rule 1: grant.flags", "“suid” is not one of"),
    (IMAGE, '["ext4"]', r'["ext4"], flags = ["a\nb"]', "rule 1: grant.flags", r"“a\nb” is not one of"),
    (IMAGE, '["ext4"]', '["ext4"], flags = ["nosymfollow"]', "rule 1: grant.flags", "cannot be locked"),
    (IMAGE, '["ext4"]', '["ext4"], idmap = []', "rule 1: grant.idmap", "the list is empty"),
    (IMAGE, '["ext4"]', '["ext4"], idmap = ["all"]', "rule 1: grant.idmap", "“all” is not one of"),
    (IMAGE, '["ext4"]', '["ext4"], options = ["context"]', "rule 1: grant.options", "“context”"),
    (IMAGE, '["ext4"]', '["ext4"], options = ["compress"]', "rule 1: grant.options", "to ext4"),
    (IMAGE, '["ext4"]', '["ext4"], options = [1]', "rule 1: grant.options.0", "valid string"),
    (IMAGE, '["ext4"]', '["ext4"], max-size = 1', "rule 1: grant.max-size", "for a tmpfs only"),
    (IMAGE, '["ext4"]', '["ext4"], max-inodes = 1', "rule 1: grant.max-inodes", "for a tmpfs only"),
    (IMAGE, '["ext4"]', '["ext4"], attach = ["/"]', "rule 1: grant.attach", "whole system"),
    (IMAGE, '["ext4"]', '["ext4"], max-mounts = 0', "rule 1: grant.max-mounts", "out of range"),
    *(
        (IMAGE, '["ext4"]', f'["ext4"], max-mounts = {number}', "rule 1: grant.max-mounts", reason)
        for number, reason in [
            (-1, "out of range"), ((1 << 20) + 1, "out of range"), ('"1"', "valid integer"),
            ("true", "valid integer"),
        ]
    ),
    *(
        (IMAGE, '["ext4"]', f'["ext4"], attach = ["{pattern}"]', "rule 1: grant.attach", reason)
        for pattern, reason in [
            ("", "whole system"), ("/**", "whole system"), ("srv", "not absolute"), ("/srv/", "empty"),
            ("/srv/../etc", "empty"), ("/srv/**/x", "“**” is not supported"), ("/$HOME", "neither $HOME"),
            ("$HOME2/a", "neither $HOME"), ("/run/$USER", "neither $HOME"), ("$UID", "not absolute"),
            ("~/a", "not absolute"),
        ]
    ),
    *(
        (IMAGE, 'location = "/srv/*"', f"digest = {value}", "rule 1: image.digest", reason)
        for value, reason in [
            ("[]", "the list is empty"), ('["sha256:00"]', "64 digits"), (f'["{"0" * 64}"]', "64 digits"),
            (f'["sha256:{"A" * 64}"]', "64 digits"), (f'["sha512:{"0" * 64}"]', "64 digits"),
            (f'["sha256:{"0" * 65}"]', "64 digits"), (f'"sha256:{"0" * 64} "', "64 digits"),
        ]
    ),
    (IMAGE, 'location = "/srv/*"', "registry = []", "rule 1: image.registry", "the list is empty"),
    (IMAGE, 'location = "/srv/*"', 'registry = "R.example/a"', "rule 1: image.registry", "lower case"),
    (IMAGE, 'location = "/srv/*"', 'signed = ["x"]', "rule 1: image.signed", "valid string"),
    (IMAGE, 'location = "/srv/*"', 'registry = "r.example/a", any = true', "rule 1: image", "exactly one"),
    (IMAGE, "any = true", "units = []", "rule 1: caller.units", "the list is empty"),
    (IMAGE, "any = true", "slices = []", "rule 1: caller.slices", "the list is empty"),
    (IMAGE, "any = true", "containers = []", "rule 1: caller.containers", "the list is empty"),
    (IMAGE, "any = true", 'units = ["a/b.service"]', "rule 1: caller.units", "no name"),
    (IMAGE, "any = true", 'units = ["[a].service"]', "rule 1: caller.units", "no name"),
    (IMAGE, "any = true", 'units = ["a.slice"]', "rule 1: caller.units", "no name"),
    (IMAGE, "any = true", 'slices = ["a*.slice"]', "rule 1: caller.slices", "no name"),
    (IMAGE, "any = true", 'slices = ["a--b.slice"]', "rule 1: caller.slices", "no name"),
    (IMAGE, "any = true", 'containers = ["lxc:"]', "rule 1: caller.containers", "empty"),
    (IMAGE, "any = true", 'containers = ["rkt:a"]', "rule 1: caller.containers", "MANAGER:NAME"),
    (IMAGE, "any = true", 'containers = ["lxc:[a]"]', "rule 1: caller.containers", "character"),
    (IMAGE, '["root-owned"]', '["sealed", "sealed2"]', "rule 1: require.integrity", "“sealed2” is unknown"),
    (change(IMAGE, '["root-owned"]', '["stored"]'), '["ext4"]', '["ext4"], access = "read-write"',
     "rule 1: grant.access", "only what is “root-owned”"),
    (change(IMAGE, '["root-owned"]', '["root-owned"], min-strength = "digest"'), '["ext4"]',
     '["ext4"], access = "read-write"', "rule 1: grant.access", "trusted for its contents"),
    (change(IMAGE, 'location = "/srv/*"', 'registry = "r.example/a"'), '["ext4"]',
     '["ext4"], access = "read-write"', "rule 1: grant.access", "trusted for its contents"),
    (TMPFS, '"tmpfs"', '"network"', "rule 1: image.kind", LATER),
    (IMAGE, '["ext4"]', '["ext4"], max_size = 1', "rule 1: grant.max_size", "unknown key"),
    (TMPFS, "grant = { max-size = 1000 }", "", "rule 1: grant", "it is missing"),
    (TMPFS, "max-size = 1000", "", "rule 1: grant.max-size", "it is missing"),
    (TMPFS, "= 1000", "= 0", "rule 1: grant.max-size", "out of range"),
    (TMPFS, "= 1000", "= -1", "rule 1: grant.max-size", "out of range"),
    (TMPFS, "= 1000", '= "0M"', "rule 1: grant.max-size", "out of range"),
    (TMPFS, "= 1000", '= "9999999999T"', "rule 1: grant.max-size", "out of range"),
    (TMPFS, "= 1000", '= "64 MB"', "rule 1: grant.max-size", "give bytes"),
    (TMPFS, "= 1000", "= 1.5", "rule 1: grant.max-size", "valid integer"),
    (TMPFS, "= 1000", "= true", "rule 1: grant.max-size", "valid integer"),
    (TMPFS, "= 1000", f"= {'9' * 5000}", "", "it is not TOML"),
    (TMPFS, "= 1000", "= 1000, max-inodes = 0", "rule 1: grant.max-inodes", "out of range"),
    (TMPFS, "= 1000", '= 1000, file-systems = ["ext4"]', "rule 1: grant.file-systems", "remove it"),
    (TMPFS, "= 1000", '= 1000, options = ["acl"]', "rule 1: grant.options", "to tmpfs"),
    (TMPFS, "grant =", 'require = { integrity = ["root-owned"] }\ngrant =', "rule 1: require", "remove it"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "old", "new", "key", "reason"), BROKEN)
def test_broken(
    policy: Callable[[str], Policy],
    directories: tuple[Path, Path],
    text: str,
    old: str,
    new: str,
    key: str,
    reason: str,
) -> None:
    policy(text)
    with pytest.raises(PolicyError) as raised:
        policy(change(text, old, new))
    error = raised.value
    assert error.file == str(directories[0] / "a.toml")
    assert error.key == key
    assert reason in error.reason
    where = error.file if error.line is None else f"{error.file}:{error.line}"
    assert str(error) == ": ".join(filter(None, (where, key, error.reason)))
    assert str(error).isprintable()


def test_second_rule_is_named(policy: Callable[[str], Policy]) -> None:
    with pytest.raises(PolicyError) as raised:
        policy(IMAGE + change(TMPFS, "= 1000", "= 0"))
    assert raised.value.key == "rule 2: grant.max-size"


def test_names_are_unique_across_files(directories: tuple[Path, Path]) -> None:
    (directories[0] / "a.toml").write_text(RULE % "x")
    (directories[1] / "b.toml").write_text(RULE % "x")
    with pytest.raises(PolicyError, match="“x” is taken by .*/a.toml: rule 1") as raised:
        read(*directories)
    assert raised.value.key == "rule 1: name"


def test_not_utf8(directories: tuple[Path, Path]) -> None:
    (directories[0] / "a.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(PolicyError, match="not UTF-8 at byte 5"):
        read(directories[0])


def test_deep_nesting(policy: Callable[[str], Policy]) -> None:
    with pytest.raises(PolicyError, match="it is not TOML"):
        policy("a = " + "[" * 100000)


def make_directory(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_link(path: Path) -> None:
    path.symlink_to("b.txt")


def make_foreign(path: Path) -> None:
    path.write_text(RULE % "x")
    os.chown(path, 1000, 0)


def make_group_writable(path: Path) -> None:
    path.write_text(RULE % "x")
    path.chmod(0o664)


def make_world_writable(path: Path) -> None:
    path.write_text("")
    path.chmod(0o646)


def make_large(path: Path) -> None:
    path.write_text("#" * (MAXIMUM_BYTES + 1))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_directory, "not a regular file"),
        (make_pipe, "not a regular file"),
        (make_link, "symbolic link"),
        (make_foreign, "it belongs to uid 1000; chown it to root"),
        (make_group_writable, "its group or others can write to it"),
        (make_world_writable, "its group or others can write to it"),
        (make_large, "larger than 1048576 bytes"),
    ],
)
def test_unusable_file(directories: tuple[Path, Path], make: Callable[[Path], None], reason: str) -> None:
    (directories[0] / "b.txt").write_text(RULE % "x")
    make(directories[0] / "a.toml")
    with pytest.raises(PolicyError, match=reason) as raised:
        read(*directories)
    assert raised.value.file == str(directories[0] / "a.toml")


def test_largest_file(directories: tuple[Path, Path]) -> None:
    (directories[0] / "a.toml").write_text("#" * MAXIMUM_BYTES)
    assert names(*directories) == []


def test_unprintable_name(directories: tuple[Path, Path]) -> None:
    (directories[0] / "a\n.toml").write_text(RULE % "x")
    with pytest.raises(PolicyError, match="not printable") as raised:
        read(*directories)
    assert str(raised.value).isprintable()


def test_unusable_directory(directories: tuple[Path, Path], tmp_path: Path) -> None:
    etc, _ = directories
    etc.chmod(0o775)
    with pytest.raises(PolicyError, match="etc: its group or others can write to it"):
        read(*directories)
    etc.chmod(0o755)
    os.chown(etc, 1000, 0)
    with pytest.raises(PolicyError, match="etc: it belongs to uid 1000"):
        read(*directories)
    (tmp_path / "file").write_text("")
    with pytest.raises(PolicyError, match="Not a directory"):
        read(tmp_path / "file")


def test_system_resolvers(directories: tuple[Path, Path]) -> None:
    text = change(RULE % "x", "any = true", 'users = ["root"], groups = ["root"]')
    (directories[0] / "a.toml").write_text(text)
    (rule,) = load([directories[0]]).rules
    assert rule.caller == CallerMatch(users=frozenset({0}), groups=frozenset({0}))
    (directories[0] / "a.toml").write_text(text.replace("root", "no-such-name"))
    with pytest.raises(PolicyError, match="“no-such-name” is unknown on this system"):
        load([directories[0]])


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("/srv/*", "/srv/a", True),
        ("/srv/*", "/srv/a/b", False),
        ("/srv/*", "/srv", False),
        ("/srv/*", "/srv/", False),
        ("/srv/*", "srv/a", False),
        ("/srv/*", "/srv/.a", False),
        ("/srv/.*", "/srv/.a", True),
        ("/srv/[.]a", "/srv/.a", False),
        ("/srv/*.raw", "/srv/a.raw", True),
        ("/srv/*.raw", "/srv/a.RAW", False),
        ("/srv/*.raw", "/srv/a.raw\n", False),
        ("/srv/*.raw", "/srv/a\nb.raw", True),
        ("/srv/?", "/srv/a", True),
        ("/srv/?", "/srv//", False),
        ("/srv/[!a]", "/srv/b", True),
        ("/srv/[!a]", "/srv/a", False),
        ("/srv/[]]", "/srv/]", True),
        ("/srv/[[]a", "/srv/[a", True),
        ("/*/a", "/srv/a", True),
        ("/*/a", "/srv/x/a", False),
        ("/*/*", "/srv/..", False),
        ("/srv/a", "/srv/a (deleted)", False),
    ],
)
def test_location_patterns(pattern: str, path: str, matches: bool) -> None:
    location.check_pattern(pattern)
    assert location.matches(pattern, path) is matches
