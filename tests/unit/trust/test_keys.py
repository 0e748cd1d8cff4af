"""The keys of a policy: sections, files, and that nobody but root can have put them there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.evidence.model import Key
from mountd.trust.policy import CONTAINERS_POLICY, ImageMatch, Policy, PolicyValueError, Strength
from mountd.trust.policy_file import MAXIMUM_KEYS, Loader, PolicyError, load
from mountd.trust.root_files import MAXIMUM_CERTIFICATES, MAXIMUM_KEY_BYTES

RULE = """
[[rule]]
name = "team"
image = { signed = "team" }
caller = { any = true }
require = { integrity = ["stored", "fs-verity"], signature = "team", min-strength = "signed" }
grant = { file-systems = ["erofs"], attach = ["$HOME/**", "/run/user/$UID/a"], max-mounts = 64 }
verdict = "allow"
"""


class Files:
    """A directory with a policy, and one with keys."""

    def __init__(self, top: Path) -> None:
        self.policy = top / "policy.d"
        self.keys = top / "keys"
        for directory in (self.policy, self.keys):
            directory.mkdir(mode=0o755)
        self.key = self.keys / "team.crt"
        self.key.write_bytes(b"key")

    def load(self, *sections: str, name: str = "a.toml") -> Policy:
        (self.policy / name).write_text("\n".join(sections))
        return load([self.policy])


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def section(path: object, kind: str = "x509", name: str = "team") -> str:
    return f'[key.{name}]\n{kind} = "{path}"\n'


@pytest.mark.parametrize("kind", ["x509", "ed25519", "ecdsa", "sigstore", "gpg"])
def test_a_key_is_read_along_with_the_rules(files: Files, kind: str) -> None:
    policy = files.load(RULE, section(files.key, kind))
    assert policy.keys == {"team": Key("team", kind, (b"key",), str(files.key))}
    (rule,) = policy.rules
    assert rule.image == ImageMatch(signed="team")
    assert rule.require is not None
    assert (rule.require.signature, rule.require.min_strength) == ("team", Strength.SIGNED)
    assert rule.grant is not None
    assert (rule.grant.attach, rule.grant.max_mounts) == (("$HOME/**", "/run/user/$UID/a"), 64)


def test_a_key_may_stand_in_another_file(files: Files) -> None:
    (files.policy / "z.toml").write_text(section(files.key))
    assert files.load(RULE).keys["team"].data == (b"key",)


def test_a_directory_of_certificates(files: Files) -> None:
    for name in ("b.crt", ".c.crt", "d.pem", "a.crt"):
        (files.keys / name).write_text(name)
    policy = files.load(section(files.keys))
    assert policy.keys["team"].data == (b"a.crt", b"b.crt", b"key")
    with pytest.raises(PolicyError, match="not a regular file"):
        files.load(section(files.keys, "gpg"))


def test_containers_policy_needs_no_key(files: Files) -> None:
    text = RULE.replace('signed = "team"', 'registry = "r.example/*"')
    policy = files.load(text.replace('signature = "team"', f'signature = "{CONTAINERS_POLICY}"'))
    assert policy.rules[0].require is not None
    assert policy.rules[0].require.signature == CONTAINERS_POLICY


def test_a_missing_key_is_named(files: Files) -> None:
    with pytest.raises(PolicyError) as raised:
        files.load(RULE)
    assert raised.value.key == "rule 1: image.signed"
    assert raised.value.line == 4
    assert "there is no key “team”" in raised.value.reason
    with pytest.raises(PolicyError) as raised:
        files.load(RULE.replace('signed = "team"', "any = true"))
    assert raised.value.key == "rule 1: require.signature"
    assert raised.value.line == 6


def test_no_policy_can_be_made_that_names_a_missing_key(files: Files) -> None:
    policy = files.load(RULE, section(files.key))
    with pytest.raises(PolicyValueError):
        Policy(policy.rules)


def broken_by(make: Callable[[Path], object]) -> Callable[[Files], object]:
    return lambda files: make(files.key)


def link(files: Files) -> None:
    files.key.rename(files.keys / "real")
    files.key.symlink_to("real")


def link_above(files: Files) -> None:
    files.keys.rename(files.keys.parent / "real")
    files.keys.symlink_to("real")


def pipe(files: Files) -> None:
    files.key.unlink()
    os.mkfifo(files.key)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (broken_by(Path.unlink), "team.crt: No such file"),
        (broken_by(lambda key: key.write_bytes(b"")), "it is empty"),
        (broken_by(lambda key: key.write_bytes(bytes(MAXIMUM_KEY_BYTES + 1))), "larger than 65536 bytes"),
        (broken_by(lambda key: key.chmod(0o664)), "team.crt: its group or others can write"),
        (broken_by(lambda key: key.chmod(0o646)), "team.crt: its group or others can write"),
        (broken_by(lambda key: os.chown(key, 1000, 0)), "team.crt: it belongs to uid 1000"),
        (lambda files: files.keys.chmod(0o777), "keys: its group or others can write"),
        (lambda files: os.chown(files.keys, 1000, 0), "keys: it belongs to uid 1000"),
        (lambda files: os.chown(files.keys.parent, 1000, 0), "it belongs to uid 1000"),
        (link, "team.crt: it is a symbolic link"),
        (link_above, "keys: it is a symbolic link"),
        (pipe, "not a regular file"),
    ],
)
def test_a_key_that_is_not_only_roots_is_refused(
    files: Files, make: Callable[[Files], object], reason: str
) -> None:
    files.load(RULE, section(files.key))
    make(files)
    with pytest.raises(PolicyError, match=reason) as raised:
        files.load(RULE, section(files.key))
    assert raised.value.key == "key.team.x509"
    assert raised.value.file == str(files.policy / "a.toml")
    assert raised.value.line == 11


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda keys: (keys / "team.crt").unlink(), "no .crt file"),
        (lambda keys: (keys / "a.crt").symlink_to("team.crt"), "a.crt: it is a symbolic link"),
        (lambda keys: (keys / "a.crt").mkdir(), "a.crt: it is not a regular file"),
        (lambda keys: (keys / "a.crt").write_bytes(b""), "a.crt: it is empty"),
        (
            lambda keys: [(keys / f"{n}.crt").write_text("x") for n in range(MAXIMUM_CERTIFICATES)],
            "more than",
        ),
        (lambda keys: keys.chmod(0o1777), "its group or others can write"),
    ],
)
def test_a_directory_that_is_not_usable(files: Files, make: Callable[[Path], object], reason: str) -> None:
    files.load(section(files.keys))
    make(files.keys)
    with pytest.raises(PolicyError, match=reason):
        files.load(section(files.keys))


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("[key.team]", "key.team", "give exactly one of"),
        ('[key.team]\nx509 = "/a"\ngpg = "/a"', "key.team", "give exactly one of"),
        ('[key.team]\nrsa = "/a"', "key.team.rsa", "unknown key"),
        ("[key.team]\nx509 = 1", "key.team.x509", "valid string"),
        ('key = "/a"', "key", "valid dictionary"),
        ('[key]\nx509 = "/a"', "key.x509", "valid dictionary"),
        ('[key.team]\nx509 = "team.crt"', "key.team.x509", "not a plain absolute path"),
        ('[key.team]\nx509 = "/a/../b"', "key.team.x509", "not a plain absolute path"),
        ('[key.team]\nx509 = "/"', "key.team.x509", "not a plain absolute path"),
        ('[key.team]\nx509 = "/nowhere/at/all"', "key.team.x509", "/nowhere: No such file"),
        ('[key.team]\nx509 = "' + "/a" * 65 + '"', "key.team.x509", "more than 64 components"),
        (f'[key.{CONTAINERS_POLICY}]\nx509 = "/a"', f"key.{CONTAINERS_POLICY}", "no name for a key"),
        ('[key."a b"]\nx509 = "/a"', "key.a b", "no name for a key"),
        ('[key.""]\nx509 = "/a"', "key", "no name for a key"),
        (r'[key."a\n"]' + '\nx509 = "/a"', r"key.a\n", "no name for a key"),
    ],
)
def test_broken_section(files: Files, text: str, key: str, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason) as raised:
        files.load(text)
    assert raised.value.key == key
    assert str(raised.value).isprintable()


def test_a_name_is_taken_once(files: Files) -> None:
    files.load(section(files.key))
    with pytest.raises(PolicyError, match="it is in .*/a.toml too") as raised:
        files.load(section(files.key), name="b.toml")
    assert (raised.value.key, raised.value.line) == ("key.team", 1)


def test_keys_are_few(files: Files) -> None:
    sections = [section(files.key, name=f"k{number}") for number in range(MAXIMUM_KEYS)]
    assert len(files.load(*sections).keys) == MAXIMUM_KEYS
    with pytest.raises(PolicyError, match="more than 64 keys"):
        files.load(*sections, section(files.key))


def test_all_that_is_wrong_is_found(files: Files) -> None:
    (files.policy / "a.toml").write_text("x = = 1")
    (files.policy / "b.toml").write_text(
        RULE + RULE.replace('"team"\nimage', '"two"\nimage').replace("any = true", "users = []")
    )
    (files.policy / "c.toml").write_text(section(files.keys / "none") + "[[rule]]\n")
    loaded = Loader().load([files.policy])
    found = [(Path(each.file).name, each.line, each.key) for each in loaded.problems]
    assert found[:2] == [("a.toml", 1, ""), ("b.toml", 13, "rule 2: caller.users")]
    assert {each[2] for each in found[2:]} == {
        "rule 1: name", "rule 1: image", "rule 1: caller", "rule 1: verdict", "rule 1: image.signed",
    }  # fmt: skip
    assert loaded.policy.rules == ()
    with pytest.raises(PolicyError, match="it is not TOML"):
        load([files.policy])


def test_another_owner_can_be_accepted_for_a_check(files: Files) -> None:
    files.load(section(files.key))
    for path in (files.policy, files.policy / "a.toml", files.keys, files.key, files.keys.parent):
        os.chown(path, 1000, 1000)
    assert Loader().load([files.policy]).problems
    loaded = Loader(owners=frozenset({0, 1000})).load([files.policy])
    assert not loaded.problems
    assert list(loaded.policy.keys) == ["team"]
