"""Pulling with the installed units as an ordinary user, and mounting what was pulled by where it is from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.oci import Member, archive
from tests.systemd.machine import SERVICE, Machine
from tests.systemd.registry import HELLO, HOST, Registry

PULLS = "mountd-pull.service"
STRANGER = "mallory"
RULE = f"""
[[rule]]
name = "pulled"
image = {{ registry = "{HOST}/gpg/*" }}
caller = {{ users = ["alice"] }}
require = {{ integrity = ["stored"], signature = "containers-policy" }}
grant = {{ file-systems = ["erofs"], access = "read-only", idmap = ["none", "namespace"] }}
verdict = "allow"
"""


@pytest.fixture
def ruled(machine: Machine, registry: Registry, user: str) -> Iterator[Registry]:
    """The registry, for whose images there is a rule."""
    set_rules(machine, RULE)
    yield registry
    stopped = machine.run(["systemctl", "stop", PULLS], check=False)
    assert stopped.returncode == 0, stopped.stderr
    assert machine.sh("ls /var/lib/mountd/incoming") == ""


def publish(registry: Registry, name: str, *options: str) -> str:
    """Push an image whose contents are its own; return the digest of its manifest."""
    contents = archive(Member("hello", HELLO, mode=0o644), Member("name", name.encode(), mode=0o644))
    return registry.image(name, *options, archives=(contents,))


def set_rules(machine: Machine, text: str) -> None:
    (machine.root / "etc/mountd/policy.d/40-test.toml").write_text(text)
    machine.run(["systemctl", "stop", SERVICE])


def pull(machine: Machine, reference: str, user: str | None) -> dict[str, Any]:
    """Pull as a user; return the reply."""
    done = machine.run(["mountctl", "image", "pull", "--json", reference], user=user)
    reply = json.loads(done.stdout)
    assert isinstance(reply, dict)
    return reply


def refused(machine: Machine, command: list[str], error: str, user: str | None) -> dict[str, Any]:
    """Run what has to be refused with `error`; return its parameters."""
    done = machine.run(["mountctl", *command, "--json"], user=user, check=False)
    assert done.returncode != 0, done.stdout
    told = json.loads(done.stdout or done.stderr)
    assert error in json.dumps(told), told
    assert isinstance(told, dict)
    return told


def not_pulled(machine: Machine, reference: str, error: str, user: str) -> str:
    """Pull what has to be refused; return what is said."""
    before = machine.run(["mountctl", "image", "list", "--json"]).stdout
    told = refused(machine, ["image", "pull", reference], error, user)
    assert machine.run(["mountctl", "image", "list", "--json"]).stdout == before
    return json.dumps(told, ensure_ascii=False)


def read(machine: Machine, source: str, user: str) -> str:
    """Mount as a user, and read a file of the image."""
    script = f"mountctl mount {source} /mnt >/dev/null; cat /mnt/hello"
    return machine.sh(f"unshare -Urm sh -euc '{script}'", user=user)


def test_a_user_pulls_and_mounts(ruled: Registry, user: str) -> None:
    machine = ruled.machine
    manifest = publish(ruled, "gpg/joined:1.0", *ruled.sign_gpg)
    image = pull(machine, f"oci:{HOST}/gpg/joined:1.0", user)["image"]
    assert image["provenance"]["repository"] == f"{HOST}/gpg/joined"
    assert image["provenance"]["manifest"] == manifest
    assert image["provenance"]["requirement"] == "signedBy"
    assert (image["ownerUids"], image["fileSystem"]["type"]) == ([], "erofs")
    stored = f"stored:{image['digest']}"
    for source in (stored, f"oci:{HOST}/gpg/joined@{manifest}"):
        assert read(machine, source, user) == HELLO.decode()
        assert machine.explain(source, user=user)["verdict"] == "allow"
    # By the one who has the network, and may do nothing else.
    assert machine.state(PULLS) == "active"
    told = machine.sh(f"mountctl explain {stored}", user=user)
    assert f"{HOST}/gpg/joined@{manifest}" in told
    assert "/etc/keys/team.gpg" in told
    root = machine.run(["mountctl", "image", "inspect", image["digest"], "--json"])
    assert json.loads(root.stdout)["image"]["ownerUids"] == [0]
    assert pull(machine, f"oci:{HOST}/gpg/joined@{manifest}", user)["image"] == image | {
        "provenance": {**image["provenance"], "time": pytest.approx(image["provenance"]["time"], abs=60)}
    }


def test_a_tag_leads_to_what_was_pulled_last(ruled: Registry, user: str) -> None:
    """For everybody, and without the registry or the one who pulls."""
    machine = ruled.machine
    tagged = f"oci:{HOST}/gpg/moving:1.0"
    for said in (HELLO, b"moved"):
        ruled.image(
            "gpg/moving:1.0", *ruled.sign_gpg, archives=(archive(Member("hello", said, mode=0o644)),)
        )
        if said != HELLO:
            # That it was moved there is nothing to what was pulled.
            assert read(machine, tagged, user) == HELLO.decode()
        manifest = pull(machine, tagged, user)["image"]["provenance"]["manifest"]
        machine.run(["systemctl", "stop", PULLS])
        assert read(machine, tagged, user) == said.decode()
        assert machine.state(PULLS) == "inactive"
        assert f"{HOST}/gpg/moving@{manifest}" in machine.sh(f"mountctl explain {tagged}", user=user)
    assert machine.sh("stat -c %u:%a /var/lib/mountd/tags/sha256/*.json | sort -u").strip() == "0:400"


def test_programs_run_as_a_user_of_their_own(ruled: Registry, user: str) -> None:
    assert ruled.machine.sh("id -u mountd-pull").strip() not in ("0", "65534")


def test_run_in_a_pulled_image_needs_no_root(ruled: Registry, user: str) -> None:
    publish(ruled, "gpg/text:1.0", *ruled.sign_gpg)
    done = ruled.machine.run(["mountctl", "image", "pull", f"oci:{HOST}/gpg/text:1.0"], user=user)
    digest = done.stdout.strip()
    assert digest.startswith("sha256:")
    assert done.stderr == ""
    ran = ruled.machine.run(["mountctl", "run", f"stored:{digest}", "--", "/none"], user=user, check=False)
    # It has no program; but to find that out, it was mounted.
    assert "/none" in ran.stderr
    assert "denied" not in ran.stderr


@pytest.mark.parametrize("signer", [None, "other@example.com"])
def test_what_is_not_signed_as_the_system_wants(ruled: Registry, user: str, signer: str | None) -> None:
    name = f"gpg/wrong:{'other' if signer else 'none'}"
    publish(ruled, name, *([f"--sign-by={signer}"] if signer else []))
    said = not_pulled(
        ruled.machine, f"oci:{HOST}/{name}", "KeyUnknown" if signer else "SignatureInvalid", user
    )
    assert "hint" in said


def test_look_alike_hosts(ruled: Registry, user: str) -> None:
    for host in (
        "registry.example.com.evil.test:5000",
        "registry.exarnple.com:5000",
        "registry.example.com",
    ):
        said = not_pulled(ruled.machine, f"oci:{host}/gpg/app:1.0", "DeniedByPolicy", user)
        assert "no rule lets this caller" in said
    not_pulled(ruled.machine, "oci:Registry.example.com:5000/gpg/app:1.0", "InvalidParameter", user)
    # It was refused before anybody had the network.
    assert ruled.machine.state(PULLS) == "inactive"


def test_callers_and_repositories_that_no_rule_is_about(ruled: Registry, user: str) -> None:
    machine = ruled.machine
    machine.sh(f"useradd {STRANGER}")
    publish(ruled, "sigstore/joined:1.0", *ruled.sign_sigstore)
    not_pulled(machine, f"oci:{HOST}/sigstore/joined:1.0", "DeniedByPolicy", user)
    not_pulled(machine, f"oci:{HOST}/gpg/app:1.0", "DeniedByPolicy", STRANGER)
    # Root may pull it, and that makes it nobody's but root's to mount.
    image = pull(machine, f"oci:{HOST}/sigstore/joined:1.0", None)["image"]
    assert image["provenance"]["requirement"] == "sigstoreSigned"
    decision = machine.explain(f"stored:{image['digest']}", user=user)
    assert decision["verdict"] == "deny"
    assert (
        "sigstore/joined"
        in machine.run(["mountctl", "explain", f"stored:{image['digest']}"], user=user, check=False).stdout
    )


def test_labels_and_names_prove_nothing(ruled: Registry, user: str) -> None:
    machine = ruled.machine
    set_rules(
        machine,
        RULE
        + RULE.replace("pulled", "imports").replace(
            f'registry = "{HOST}/gpg/*"', 'digest = "sha256:' + "0" * 64 + '"'
        ),
    )
    machine.sh(
        f"cd /home/{user}; mkdir -p tree/etc; echo fake > tree/etc/hello;"
        " mkfs.erofs -L gpg-joined registry.example.com:5000-gpg-joined.erofs tree > /dev/null",
        user=user,
    )
    file = f"/home/{user}/registry.example.com:5000-gpg-joined.erofs"
    name = f"oci:{HOST}/gpg/joined:1.0"
    done = machine.run(["mountctl", "image", "import", "--name", name, file], user=user)
    for source in (file, f"stored:{done.stdout.strip()}"):
        assert machine.explain(source, user=user)["verdict"] == "deny"
    refused(machine, ["explain", f"oci:{HOST}/gpg/joined:never"], "NotFound", user)
    absent = f"oci:{HOST}/gpg/joined@{done.stdout.strip()}"
    refused(machine, ["explain", absent], "NotFound", user)


def test_several_layers_are_one_stack(ruled: Registry, user: str) -> None:
    machine = ruled.machine
    lowest = archive(Member("gone", b"1"), Member("kept", b"1"), Member("opaque/old", b"1"))
    upper = archive(Member(".wh.gone", b""), Member("opaque/.wh..wh..opq", b""), Member("opaque/new", b"2"))
    manifest = ruled.image("gpg/layers:1.0", *ruled.sign_gpg, archives=(lowest, upper))
    reply = pull(machine, f"oci:{HOST}/gpg/layers:1.0", user)
    assert len(reply["layers"]) == 2
    assert reply["image"] == reply["layers"][0]
    for each in reply["layers"]:
        told = refused(machine, ["explain", f"stored:{each['digest']}"], "NotSupported", user)
        assert "2 layers" in json.dumps(told)
    whole = f"oci:{HOST}/gpg/layers@{manifest}"
    assert machine.explain(whole, user=user)["verdict"] == "allow"
    script = f"mountctl mount {whole} /mnt > /dev/null; cd /mnt; find . -type f"
    found = machine.sh(f"unshare -Urm sh -euc '{script}'", user=user)
    assert sorted(found.split()) == ["./kept", "./opaque/new"]


def test_progress_on_a_terminal_only(ruled: Registry, user: str) -> None:
    publish(ruled, "gpg/told:1.0", *ruled.sign_gpg)
    command = f"mountctl image pull oci:{HOST}/gpg/told:1.0"
    shown = ruled.machine.sh(f"script -qec '{command}' /dev/null", user=user)
    assert "fetch" in shown
    assert ruled.machine.run(command.split(), user=user).stderr == ""


def test_leftovers_of_a_killed_pull_are_swept(ruled: Registry, user: str) -> None:
    machine = ruled.machine
    left = "/var/lib/mountd/incoming/pull.0123456789abcdef0123456789abcdef"
    machine.sh(
        f"mkdir -m 0700 {left} {left}/fetch; touch {left}/fetch/file; chown -R mountd-pull {left}/fetch"
    )
    # Whoever may not remove it has no trouble with it.
    assert "images" in json.loads(machine.run(["mountctl", "image", "list", "--json"]).stdout)
    machine.run(["mountctl", "image", "gc"])
    publish(ruled, "gpg/swept:1.0", *ruled.sign_gpg)
    pull(machine, f"oci:{HOST}/gpg/swept:1.0", user)
    assert machine.sh("ls /var/lib/mountd/incoming") == ""


def test_without_the_instance_that_pulls(ruled: Registry, user: str) -> None:
    """The service itself has no network, and says so in one line."""
    machine = ruled.machine
    machine.run(["systemctl", "stop", "mountd-pull.socket", PULLS])
    try:
        done = machine.run(["mountctl", "image", "pull", f"oci:{HOST}/gpg/app:1.0"], user=user, check=False)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
    finally:
        machine.run(["systemctl", "start", "mountd-pull.socket"])
