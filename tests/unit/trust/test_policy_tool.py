"""“mountctl policy”: what it says of right, wrong and useless files; what it shows is the policy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mountd.trust import policy_tool
from mountd.trust.policy_file import load
from mountd.trust.policy_tables import PolicyTable
from mountd.trust.policy_tool import link_in, main
from tests.container import as_user

DEFAULT = Path(__file__).parents[3] / "units/policy.d"

RULE = """
[[rule]]
name = "%s"
image = { %s }
caller = { %s }
require = { integrity = ["root-owned"] }
grant = { file-systems = ["ext4"] }
verdict = "allow"
"""


def rule(name: str, image: str = 'location = "/srv/*"', caller: str = "any = true") -> str:
    return RULE % (name, image, caller)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "policy.d"
    made.mkdir(mode=0o755)
    return made


class Checked:
    def __init__(self, directory: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
        (directory / "a.toml").write_text(text)
        self.status = main(["check", str(directory)])
        self.lines = capfd.readouterr().out.replace(f"{directory}/", "").splitlines()


def test_the_default_policy_has_no_findings(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(DEFAULT)]) == 0
    assert capfd.readouterr().out == ""


def test_each_error_has_its_line(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (
        rule("a", 'location = "srv"') + rule("b", "any = true, other = 1") + rule("c", caller="users = []")
    )
    checked = Checked(directory, text, capfd)
    assert checked.status == 1
    # A file with an unknown key is not read any further.
    assert checked.lines == ["a.toml:12: rule 2: image.other: unknown key; remove it or correct it"]
    checked = Checked(directory, text.replace(", other = 1", ""), capfd)
    assert checked.status == 1
    assert [line.partition(";")[0] for line in checked.lines] == [
        "a.toml:4: rule 1: image.location: “srv”: it is not absolute",
        "a.toml:21: rule 3: caller.users: the list is empty",
    ]


def test_an_unknown_user_is_named(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checked = Checked(directory, rule("a", caller='users = ["no-such-user"]'), capfd)
    assert checked.status == 1
    assert checked.lines[0].startswith("a.toml:5: rule 1: caller.users: “no-such-user” is unknown")


def test_a_registry_that_is_not_canonical_is_named(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checked = Checked(directory, rule("a", 'registry = "Registry.example.com/a"'), capfd)
    assert checked.status == 1
    assert checked.lines[0].startswith("a.toml:4: rule 1: image.registry: “Registry.example.com/a”")


@pytest.mark.parametrize(
    ("first", "second", "hidden"),
    [
        (("any = true", "any = true"), ('location = "/srv/*"', "any = true"), True),
        (("any = true", "any = true"), ('kind = "image"', "host = true"), True),
        (('kind = "image"', "any = true"), ('registry = "r.example/*"', "any = true"), True),
        (('kind = "image"', "any = true"), ("any = true", "any = true"), False),
        (("any = true", "users = [1, 2]"), ('location = "/srv/*"', "users = [1]"), True),
        (("any = true", "users = [1]"), ('location = "/srv/*"', "users = [1, 2]"), False),
        (("any = true", "users = [1]"), ('location = "/srv/*"', "any = true"), False),
        (("any = true", "users = [1]"), ('location = "/srv/*"', "users = [1], groups = [2]"), True),
        (("any = true", "users = [1], groups = [2]"), ('location = "/srv/*"', "users = [1]"), False),
        (("any = true", "host = true"), ('location = "/srv/*"', "nested = false"), True),
        (("any = true", "host = true"), ('location = "/srv/*"', "nested = true"), False),
        (("any = true", 'units = ["a.service"]'), ("any = true", 'units = ["a.service"]'), True),
        (("any = true", 'slices = ["a.slice"]'), ("any = true", 'slices = ["b.slice"]'), False),
        (("any = true", 'containers = ["lxc:a", "lxc:b"]'), ("any = true", 'containers = ["lxc:b"]'), True),
        (("any = true", 'user-namespace = "own"'), ("any = true", 'user-namespace = "own"'), True),
        (("any = true", 'user-namespace = "own"'), ("any = true", 'user-namespace = "none"'), False),
        (('location = ["/srv/*", "/a"]', "any = true"), ('location = "/a"', "users = [1]"), True),
        (('location = "/srv/*"', "any = true"), ('location = "/srv/a"', "any = true"), False),
        (('registry = "r.example/*"', "any = true"), ('registry = "r.example/*"', "any = true"), True),
    ],
)
def test_hidden_rules(
    directory: Path,
    capfd: pytest.CaptureFixture[str],
    first: tuple[str, str],
    second: tuple[str, str],
    hidden: bool,
) -> None:
    checked = Checked(directory, rule("a", *first) + rule("b", *second), capfd)
    assert checked.status == 0
    expected = (
        [f"a.toml:10: warning: rule 2: it can never match: “a” ({directory}/a.toml: rule 1) comes first "
         "and matches too".replace(f"{directory}/", "")]
        if hidden
        else []
    )  # fmt: skip
    assert checked.lines == expected


def test_what_can_never_be_is_a_warning(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    key = directory.parent / "key"
    key.write_text("x")
    sealed = rule("a").replace("root-owned", "sealed")
    checked = Checked(directory, f'[key.team]\nx509 = "{key}"\n' + sealed, capfd)
    assert checked.status == 0
    assert checked.lines == [
        "a.toml:8: warning: rule 1: require.integrity: it can never allow anything: "
        "a memfd lies at no location",
        "a.toml:1: warning: key.team: no rule uses the key",
    ]
    strong = rule("a").replace('"root-owned"]', '"root-owned"], min-strength = "%s"')
    checked = Checked(directory, strong % "signed", capfd)
    assert checked.lines == [
        "a.toml:6: warning: rule 1: require.min-strength: it can never allow anything but pulled images: "
        "the policy has no keys"
    ]
    assert Checked(directory, f'[key.team]\nx509 = "{key}"\n' + strong % "signed", capfd).lines == []
    checked = Checked(directory, strong % "location", capfd)
    assert "alone says as much" in checked.lines[0]
    asks = rule("a").replace('verdict = "allow"', 'verdict = "ask"')
    assert Checked(directory, asks, capfd).lines == []
    checked = Checked(
        directory, asks.replace("{ any = true }\nrequire", "{ nested = true }\nrequire"), capfd
    )
    assert checked.lines == [
        "a.toml:8: warning: rule 1: verdict: it can never allow anything: "
        "polkit knows nobody who is in a user namespace"
    ]
    assert Checked(directory, "", capfd).lines == ["warning: there are no rules: everything is denied"]


def test_a_location_behind_a_link_is_a_warning(
    directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    checked = Checked(directory, rule("a", f'location = "{tmp_path}/link/x/*"'), capfd)
    assert checked.status == 0
    assert f"{tmp_path}/link is a symbolic link" in checked.lines[0]
    assert checked.lines[0].startswith("a.toml:4: warning: rule 1: image.location:")
    assert link_in(f"{tmp_path}/real/*") is None
    assert link_in(f"{tmp_path}/*/link/x") is None
    assert link_in(f"{tmp_path}/real/link") is None


def test_whose_files_are_accepted(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (directory / "a.toml").write_text(rule("a"))
    for path in (directory, directory / "a.toml"):
        os.chown(path, 1000, 1000)
    assert main(["check", str(directory)]) == 1
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["check", str(directory)]) == 0
    # But not where the daemon would refuse them, however that is written.
    monkeypatch.setattr(policy_tool, "POLICY_DIRS", (directory,))
    assert main(["check"]) == 1
    assert main(["check", f"{directory}/../policy.d"]) == 1
    assert "it belongs to uid 1000" in capfd.readouterr().out


def test_findings_as_json(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (directory / "a.toml").write_text(rule("a", "any = true") + rule("b", "any = 1"))
    assert main(["check", "--json", str(directory)]) == 1
    (found,) = json.loads(capfd.readouterr().out)
    assert found["level"] == "error"
    assert (found["file"], found["line"], found["key"]) == (
        str(directory / "a.toml"), 12, "rule 2: image.any",
    )  # fmt: skip


def test_a_directory_that_is_not_there_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for verb in ("check", "show"):
        assert main([verb, str(tmp_path / "none")]) == 1
        said = capfd.readouterr()
        assert (
            said.out if verb == "check" else said.err
        ) == f"{tmp_path}/none: there is no such directory\n"
        assert (said.err if verb == "check" else said.out) == ""


def test_the_systems_directories_are_the_default(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(policy_tool, "POLICY_DIRS", (directory, directory / "none"))
    (directory / "a.toml").write_text(rule("here"))
    assert main(["check"]) == 0
    assert main(["show"]) == 0
    assert 'name = "here"' in capfd.readouterr().out


def test_what_is_shown_is_the_policy(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    key = directory.parent / "key"
    key.write_text("x")
    text = (
        f'[key.team]\ned25519 = "{key}"\n'
        + rule(
            r"quotes \" and \\ and é", 'location = ["/srv/[a]*", "/a/é"]', 'users = [1, "root"], host = true'
        )
        + rule("signed", 'signed = "team"')
        + '[[rule]]\nname = "m"\nimage = { kind = "tmpfs" }\ncaller = { any = true }\n'
        'grant = { max-size = "64M", max-inodes = 5 }\nverdict = "allow"\n'
    )
    (directory / "a.toml").write_text(text)
    before = load([directory])
    assert main(["show", str(directory)]) == 0
    shown = capfd.readouterr().out
    assert f"# {directory}/a.toml:4\n[[rule]]" in shown
    (directory / "a.toml").write_text(shown)
    assert load([directory]) == before


def test_show_has_the_order_and_the_origins(
    directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "usr"
    other.mkdir()
    (other / "a.toml").write_text(rule("masked"))
    (other / "0.toml").write_text(rule("first"))
    (directory / "a.toml").write_text(rule("second"))
    assert main(["show", "--json", str(directory), str(other)]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [(each["file"], each["line"], each["rule"], each["table"]["name"]) for each in found] == [
        (f"{other}/0.toml", 2, 1, "first"),
        (f"{directory}/a.toml", 2, 1, "second"),
    ]
    assert found[0]["table"]["grant"] == {"file-systems": ["ext4"]}


def test_a_broken_policy_is_not_shown(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (directory / "a.toml").write_text("x = 1")
    assert main(["show", str(directory)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "a.toml:1: x: unknown key" in err


def test_of_a_broken_policy_json_is_an_error(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (directory / "a.toml").write_text("x = 1\ny = 1")
    assert main(["show", "--json", str(directory)]) == 1
    out, err = capfd.readouterr()
    error = json.loads(out)
    assert error["error"] == "InvalidPolicy"
    assert error["message"] == f"the policy is broken: {err.splitlines()[0]}"
    assert error["hint"] == error["parameters"]["hint"] == "“mountctl policy check” says all that is wrong"
    assert [(each["line"], each["key"]) for each in error["parameters"]["faults"]] == [(1, "x"), (2, "y")]


def test_no_policy_is_shown_as_such(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(directory)]) == 0
    assert capfd.readouterr().out == "# There are no rules: everything is denied.\n"


def test_the_schema_has_every_key_and_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capfd.readouterr().out)
    assert schema["$schema"].endswith("2020-12/schema")
    tables = schema["$defs"] | {"PolicyTable": schema}
    assert set(schema["properties"]) == set(PolicyTable.model_fields) == {"rule", "key"}
    for name, keys in {
        "RuleTable": {"name", "image", "caller", "require", "grant", "verdict"},
        "ImageTable": {"location", "signed", "digest", "registry", "kind", "any"},
        "CallerTable": {"any", "users", "groups", "units", "slices", "containers", "user-namespace", "host",
                        "nested"},
        "RequireTable": {"integrity", "signature", "min-strength", "ownership"},
        "GrantTable": {"file-systems", "access", "options", "flags", "idmap", "max-size", "max-inodes",
                       "attach", "max-mounts", "encrypted"},
        "KeyTable": {"x509", "ed25519", "ecdsa", "sigstore", "gpg"},
    }.items():  # fmt: skip
        assert set(tables[name]["properties"]) == keys
        assert tables[name]["additionalProperties"] is False
    # One text or several, whether or not pydantic makes one list of the choices.
    location = json.dumps(tables["ImageTable"]["properties"]["location"])
    assert '"type": "string"' in location
    assert '"type": "array"' in location
    assert set(tables["RuleTable"]["required"]) == {"name", "image", "caller", "verdict"}


@pytest.mark.parametrize("line", ["", "bogus", "check --bogus", "schema x", "show --jso"])
def test_wrong_usage(line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 1
    said = capfd.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("line", ["--json", "bogus --json", "check --json --bogus"])
def test_wrong_usage_in_json(line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 1
    said = capfd.readouterr()
    error = json.loads(said.out)
    assert error["error"] == "UsageError"
    assert said.err == f"mountctl policy: {error['message']} (hint: {error['hint']})\n"


@pytest.mark.parametrize("verb", ["check", "show"])
def test_what_may_not_be_looked_at(verb: str, directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory.parent.chmod(0o700)
    assert as_user(lambda: main([verb, "--json", str(directory)])) == 1
    said = capfd.readouterr()
    denied = f"{directory}: Permission denied; look at it as its owner or root"
    if verb == "check":
        assert [each["reason"] for each in json.loads(said.out)] == [denied.partition(": ")[2]]
    else:
        assert said.err == f"{denied}\n"
        assert json.loads(said.out)["message"] == f"the policy is broken: {denied}"
    assert as_user(lambda: main([verb, str(directory)])) == 1
    said = capfd.readouterr()
    assert said.out + said.err == f"{denied}\n"


def test_output_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(text: str, fd: int = 1) -> None:
        if fd == 1:
            raise OSError(28, "No space left on device")
        say(text, fd)

    say = policy_tool.say
    monkeypatch.setattr(policy_tool, "say", refuse)
    assert main(["show", "--json", str(DEFAULT)]) == 2
    assert capfd.readouterr().err == "mountctl policy: No space left on device\n"
