"""What is not pulled from a real registry: whatever the system's policy does not ask for, and what lies."""

from __future__ import annotations

import json
import os
import shutil
import tarfile

import pytest

from tests import oci
from tests.oci import Layout, Member, archive
from tests.systemd.machine import eventually
from tests.systemd.registry import HOST, PLACE, POLICY, Registry, layer, rules


def test_unsigned(registry: Registry) -> None:
    for name in ("gpg/unsigned:1.0", "sigstore/unsigned:1.0"):
        registry.image(name)
        answer = registry.refused(f"oci:{HOST}/{name}", "SignatureInvalid")
        assert "is not signed" in answer["message"]
        assert "sign the image" in answer["hint"]


def test_signed_by_somebody_else(registry: Registry) -> None:
    registry.image("gpg/other:1.0", "--sign-by=other@example.com")
    registry.refused(f"oci:{HOST}/gpg/other:1.0", "KeyUnknown")
    registry.image(
        "sigstore/other:1.0",
        f"--sign-by-sigstore-private-key={PLACE}/stranger.private",
        f"--sign-passphrase-file={PLACE}/passphrase",
    )
    registry.refused(f"oci:{HOST}/sigstore/other:1.0", "SignatureInvalid")


def test_signature_of_another_image(registry: Registry, signed: str) -> None:
    digest = registry.image("gpg/app:1.1", archives=(layer(Member("evil", b"evil")),))
    lookaside = registry.machine.root / "var/lib/lookaside/gpg"
    source = lookaside / f"app@{signed.replace(':', '=')}"
    shutil.copytree(source, lookaside / f"app@{digest.replace(':', '=')}")
    registry.refused(f"oci:{HOST}/gpg/app:1.1", "SignatureInvalid")
    registry.refused(f"oci:{HOST}/gpg/app@{digest}", "SignatureInvalid")


def test_signature_of_another_tag_and_of_another_repository(registry: Registry, signed: str) -> None:
    """An old image, validly signed, under the name of a new one: skopeo looks at the tag that was signed."""
    old = (
        registry.machine.root
        / "var/lib/docker-registry/docker/registry/v2/repositories/gpg/app/_manifests/tags"
    )
    shutil.copytree(old / "1.0", old / "2.0")
    registry.refused(f"oci:{HOST}/gpg/app:2.0", "SignatureInvalid")
    registry.machine.run(
        [
            "skopeo",
            "--insecure-policy",
            "copy",
            "--quiet",
            f"docker://{HOST}/gpg/app:1.0",
            f"docker://{HOST}/gpg/copied:1.0",
        ]
    )
    lookaside = registry.machine.root / "var/lib/lookaside/gpg"
    name = signed.replace(":", "=")
    shutil.copytree(lookaside / f"app@{name}", lookaside / f"copied@{name}", dirs_exist_ok=True)
    registry.refused(f"oci:{HOST}/gpg/copied:1.0", "SignatureInvalid")


def test_tampered_layer(registry: Registry) -> None:
    digest = registry.image("gpg/tampered:1.0", *registry.sign_gpg, archives=(layer(Member("t", b"t")),))
    blob = registry.blob(json.loads(registry.blob(digest).read_text())["layers"][0]["digest"])
    contents = bytearray(blob.read_bytes())
    contents[len(contents) // 2] ^= 1
    blob.write_bytes(contents)
    registry.refused(f"oci:{HOST}/gpg/tampered:1.0", "InvalidImage")


def test_tampered_manifest(registry: Registry) -> None:
    digest = registry.image("gpg/forged:1.0", *registry.sign_gpg, archives=(layer(Member("f", b"f")),))
    blob = registry.blob(digest)
    blob.write_bytes(blob.read_bytes().replace(b'"schemaVersion": 2', b'"schemaVersion":  2'))
    answer = registry.pull(f"oci:{HOST}/gpg/forged:1.0")
    assert answer["error"] in ("SignatureInvalid", "RegistryFailed", "InvalidImage"), answer
    assert answer["left"] == []


# A skopeo that enforces the policy, says that all is well, and leaves something else.
ROGUES = {
    "another layer": ("InvalidImage", 'cp /etc/passwd "$layer"'),
    "a changed layer": ("InvalidImage", 'printf x | dd of="$layer" bs=1 seek=20 conv=notrunc 2> /dev/null'),
    "a longer layer": ("InvalidImage", 'printf x >> "$layer"'),
    "no layer": ("InvalidImage", 'rm "$layer"'),
    "a link": ("InvalidImage", 'mv "$layer" /tmp/x; ln -s /tmp/x "$layer"'),
    "a link outside": ("InvalidImage", 'rm "$layer"; ln -s /etc/passwd "$layer"'),
    "a pipe": ("InvalidImage", 'rm "$layer"; mkfifo "$layer"'),
    "a directory": ("InvalidImage", 'rm "$layer"; mkdir "$layer"'),
    "another manifest": ("RegistryFailed", "echo >> image/manifest.json"),
    "no manifest": ("InvalidImage", "rm image/manifest.json"),
    "a huge manifest": ("InvalidImage", "head -c 10000000 /dev/zero > image/manifest.json"),
    "no image": ("InvalidImage", "rm -r image"),
    "a linked image": ("InvalidImage", "mv image other; ln -s other image"),
    "another configuration": ("InvalidImage", 'echo >> "$configuration"'),
    "many files": (
        "LimitExceeded",
        "i=0; while [ $i -lt 1100 ]; do : > image/$i; i=$((i + 1)); done; sleep 5",
    ),
    "nothing at all": ("InvalidImage", "rm -r /tmp/*"),
}


@pytest.mark.parametrize("case", ROGUES)
def test_mountd_believes_nothing_that_skopeo_leaves(registry: Registry, signed: str, case: str) -> None:
    error, script = ROGUES[case]
    manifest = json.loads(registry.blob(signed).read_text())
    layer, configuration = (
        "image/" + each["digest"].removeprefix("sha256:")
        for each in (manifest["layers"][0], manifest["config"])
    )
    rogue = registry.machine.root / "usr/sbin/skopeo"
    rogue.write_text(
        f"""#!/bin/sh -eu
/usr/bin/skopeo "$@"
cd /tmp
layer={layer} configuration={configuration}
case " $* " in *" copy "*) {script} ;; esac
"""
    )
    rogue.chmod(0o755)
    try:
        registry.refused(f"oci:{HOST}/gpg/app:1.0", error)
    finally:
        rogue.unlink()


def test_the_user_for_pulls(registry: Registry, signed: str) -> None:
    registry.machine.sh("userdel mountd-pull")
    work, owner = registry.inside("work")[1], registry.inside("owner")[1]
    look_at = f"stat -c %U {work}/resolve > {owner}"
    registry.pull(f"oci:{HOST}/gpg/app:1.0", work=work, between=look_at)
    assert registry.machine.sh(f"cat {owner}") == "nobody\n"
    registry.machine.sh("useradd --system --user-group mountd-pull")
    try:
        work = registry.inside("work")[1]
        look_at = f"stat -c %U {work}/resolve > {owner}"
        registry.pull(f"oci:{HOST}/gpg/app:1.0", work=work, between=look_at)
        assert registry.machine.sh(f"cat {owner}") == "mountd-pull\n"
    finally:
        registry.machine.sh("systemd-sysusers mountd.conf")


def test_layer_that_is_not_what_the_configuration_says(registry: Registry) -> None:
    """Signed by the right key, and yet not what it says: only mountd looks at that."""
    host, path = registry.inside("layout")
    layout = Layout(host)
    manifest = json.loads(layout.image([layer()]))
    other = oci.compress(layer(Member("other", b"x")), "gzip")
    layout.blob(other)
    manifest["layers"] = [oci.descriptor(f"{oci.LAYER}+gzip", other)]
    layout.close(layout.document(manifest))
    registry.push(path, "gpg/mismatch:1.0", *registry.sign_gpg)
    answer = registry.refused(f"oci:{HOST}/gpg/mismatch:1.0", "InvalidImage")
    assert "as configured" in answer["message"]


HOSTILE = {
    "absolute": [Member("/etc/passwd", b"x")],
    "upwards": [Member("a/../../etc/passwd", b"x")],
    "through a link": [Member("a", type=tarfile.SYMTYPE, link="/etc"), Member("a/passwd", b"x")],
    "hard link outside": [Member("a", type=tarfile.LNKTYPE, link="../../etc/passwd")],
    "hard link to nothing": [Member("a", type=tarfile.LNKTYPE, link="etc/passwd")],
    "twice": [Member("a", b"x"), Member("a", b"y")],
}


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_layers(registry: Registry, case: str, compression: str) -> None:
    name = f"gpg/hostile:{case.replace(' ', '-')}-{compression}"
    registry.image(name, *registry.sign_gpg, archives=(archive(*HOSTILE[case]),), compression=compression)
    answer = registry.refused(f"oci:{HOST}/{name}", "InvalidImage")
    assert "tar archive" in answer["message"] or "hard link" in answer["message"]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_bombs(registry: Registry, compression: str) -> None:
    bomb = archive(Member("zeros", bytes(96 << 20)))
    registry.image(f"gpg/bomb:{compression}", *registry.sign_gpg, archives=(bomb,), compression=compression)
    answer = registry.refused(f"oci:{HOST}/gpg/bomb:{compression}", "LimitExceeded")
    assert "may grow" in answer["message"]


def test_image_that_is_too_large(registry: Registry) -> None:
    registry.image(
        "gpg/large:1.0", *registry.sign_gpg, archives=(archive(Member("r", os.urandom(200_000))),)
    )
    registry.refused(f"oci:{HOST}/gpg/large:1.0", "LimitExceeded", limits={"compressed": 100_000})


def test_look_alike_hosts(registry: Registry, signed: str) -> None:
    for host in (
        "registry.example.com.evil.test:5000",
        "registry.example.com.:5000",
        "registry.exarnple.com",
    ):
        error = "InvalidParameter" if ".:" in host else "DeniedByPolicy"
        registry.refused(f"oci:{host}/gpg/app:1.0", error)


def test_policy_that_rejects(registry: Registry, signed: str) -> None:
    registry.refused(f"oci:{HOST}/nobody/knows:1.0", "DeniedByPolicy")
    registry.refused(f"oci:{HOST}/open/closed:1.0", "DeniedByPolicy")
    # The scope of one tag is more special than that of its repository.
    changed = rules()
    changed["transports"]["docker"][f"{HOST}/gpg/app:1.0"] = [{"type": "reject"}]
    registry.policy(changed)
    registry.refused(f"oci:{HOST}/gpg/app:1.0", "DeniedByPolicy")
    assert "provenance" in registry.pull(f"oci:{HOST}/gpg/app@{signed}")


def test_policy_that_accepts_anything_is_no_evidence(registry: Registry) -> None:
    registry.image("open/app:1.0")
    answer = registry.refused(f"oci:{HOST}/open/app:1.0", "DeniedByPolicy")
    assert "proves nothing" in answer["message"]
    answer = registry.pull(f"oci:{HOST}/open/app:1.0", options={"accept_anything": True})
    assert answer["provenance"]["requirement"] == "insecureAcceptAnything"
    assert answer["provenance"]["signer"] is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"default": []}',
        '{"default": [{"type": "insecureAcceptAnything"}], "default": [{"type": "reject"}]}',
        '{"default": [{"type": "insecureAcceptAnything"}], "transport": {}}',
    ],
)
def test_policy_that_cannot_be_read(registry: Registry, signed: str, text: str) -> None:
    registry.policy(text)
    registry.refused(f"oci:{HOST}/gpg/app:1.0", "ContainersPolicyError")


def test_policy_or_key_that_somebody_else_can_write(registry: Registry, signed: str) -> None:
    (registry.machine.root / POLICY).chmod(0o666)
    registry.refused(f"oci:{HOST}/gpg/app:1.0", "ContainersPolicyError")
    registry.policy(rules())
    key = registry.machine.root / "etc/keys/team.gpg"
    key.chmod(0o666)
    try:
        registry.refused(f"oci:{HOST}/gpg/app:1.0", "ContainersPolicyError")
    finally:
        key.chmod(0o644)


def test_policy_in_a_home_directory_is_nobodys(registry: Registry) -> None:
    registry.image("gpg/home:1.0")
    home = registry.machine.root / "root/.config/containers"
    home.mkdir(parents=True)
    try:
        (home / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        registry.refused(f"oci:{HOST}/gpg/home:1.0", "SignatureInvalid")
    finally:
        shutil.rmtree(registry.machine.root / "root/.config")


def test_tag_that_moves_while_it_is_pulled(registry: Registry) -> None:
    registry.image("gpg/moving:1.0", *registry.sign_gpg)
    host, path = registry.inside("layout")
    layout = Layout(host)
    layout.close(layout.image([archive(Member("moved", b"x"))]))
    move = (
        f"umask 022; export GNUPGHOME={PLACE}/gnupg;"
        f" skopeo --insecure-policy copy --quiet {' '.join(registry.sign_gpg)}"
        f" oci:{path} docker://{HOST}/gpg/moving:1.0"
    )
    answer = registry.refused(f"oci:{HOST}/gpg/moving:1.0", "RegistryFailed", between=move)
    assert "moved while it was pulled" in answer["message"]
    assert "provenance" in registry.pull(f"oci:{HOST}/gpg/moving:1.0")


def test_registry_that_does_not_prove_who_it_is(registry: Registry, signed: str) -> None:
    answer = registry.refused("oci:unproven.example.com:5000/gpg/app:1.0", "RegistryFailed")
    assert "does not prove who it is" in answer["message"]
    assert "/etc/containers/certs.d/unproven.example.com:5000/ca.crt" in answer["hint"]


def test_registry_that_is_not_there(registry: Registry) -> None:
    answer = registry.refused("oci:registry.example.com:5999/app:1.0", "RegistryFailed")
    assert "cannot be reached" in answer["message"]


def test_image_that_is_not_there(registry: Registry) -> None:
    registry.refused(f"oci:{HOST}/gpg/absent:1.0", "NotFound")
    registry.refused(f"oci:{HOST}/gpg/app:none", "NotFound")


def test_registry_that_does_not_answer(registry: Registry) -> None:
    listen = "import socket, time\ns = socket.create_server(('127.0.0.1', 5999))\ntime.sleep(600)"
    registry.machine.run(["systemd-run", "--quiet", "--unit=silent", "python3", "-c", listen])
    try:
        eventually(lambda: ":5999" in registry.machine.sh("ss -ltn"))
        answer = registry.refused(
            "oci:registry.example.com:5999/app:1.0", "TimedOut", limits={"resolve_seconds": 3}
        )
        assert "3 seconds" in answer["message"]
    finally:
        registry.machine.run(["systemctl", "stop", "silent"])
    assert registry.machine.run(["pgrep", "skopeo"], check=False).stdout == ""


@pytest.mark.parametrize("kilobytes", [150, 350, 550])
def test_no_room_left(registry: Registry, kilobytes: int) -> None:
    """Where it runs full: while fetching, while copying, while building."""
    contents = os.urandom(200_000)
    registry.image("gpg/room:1.0", *registry.sign_gpg, archives=(archive(Member("r", contents)),))
    _, work = registry.inside("small")
    registry.machine.sh(f"mkdir {work}; mount -t tmpfs -o size={kilobytes}k,mode=0700 tmpfs {work}")
    try:
        registry.refused(f"oci:{HOST}/gpg/room:1.0", "StorageFull", work=work)
    finally:
        registry.machine.sh(f"umount {work}")
