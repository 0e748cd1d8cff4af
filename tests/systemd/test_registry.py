"""Pulling from a real registry with the real skopeo what the system's policy accepts."""

from __future__ import annotations

import json
import os
import tarfile

import pytest

from tests import oci
from tests.oci import Layout, Member, archive, directory
from tests.systemd.registry import HELLO, HOST, PLACE, Registry, check_provenance, key_digest, look


def test_gpg_signed(registry: Registry, signed: str) -> None:
    answer = registry.pull(f"oci:{HOST}/gpg/app:1.0")
    provenance = check_provenance(registry, answer, "gpg/app", signed)
    assert provenance["requirement"] == "signedBy"
    assert provenance["signer"] == f"/etc/keys/team.gpg ({key_digest(registry, 'team.gpg')})"
    assert len(answer["layers"]) == 1


def test_sigstore_signed_by_skopeo(registry: Registry) -> None:
    digest = registry.image("sigstore/app:1.0", *registry.sign_sigstore)
    answer = registry.pull(f"oci:{HOST}/sigstore/app:1.0")
    provenance = check_provenance(registry, answer, "sigstore/app", digest)
    assert provenance["requirement"] == "sigstoreSigned"
    assert provenance["signer"] == f"/etc/keys/sigstore.pub ({key_digest(registry, 'sigstore.pub')})"


def test_signed_by_cosign(registry: Registry) -> None:
    digest = registry.image("cosign/app:1.0")
    registry.refused(f"oci:{HOST}/cosign/app:1.0", "SignatureInvalid")
    registry.cosign("cosign/app", digest)
    answer = registry.pull(f"oci:{HOST}/cosign/app:1.0")
    provenance = check_provenance(registry, answer, "cosign/app", digest)
    assert provenance["requirement"] == "sigstoreSigned"
    assert provenance["signer"] == f"/etc/keys/cosign.pub ({key_digest(registry, 'cosign.pub')})"


def test_two_requirements(registry: Registry) -> None:
    registry.image("both/app:1.0", *registry.sign_gpg)
    registry.refused(f"oci:{HOST}/both/app:1.0", "SignatureInvalid")
    parameters = registry.machine.root / f"{PLACE}/parameters.yaml".lstrip("/")
    parameters.write_text(
        f"privateKeyFile: {PLACE}/sigstore.private\nprivateKeyPassphraseFile: {PLACE}/passphrase\n"
    )
    both = (*registry.sign_gpg, f"--sign-by-sigstore={PLACE}/parameters.yaml")
    digest = registry.image("both/app:2.0", *both)
    answer = registry.pull(f"oci:{HOST}/both/app:2.0")
    provenance = check_provenance(registry, answer, "both/app", digest)
    assert provenance["requirement"] == "signedBy+sigstoreSigned"


def test_what_is_in_the_image(registry: Registry, signed: str) -> None:
    answer = registry.pull(f"oci:{HOST}/gpg/app@{signed}")
    script = r"""
cat etc/hello; stat -c '%a %u %g %h %Y' etc/hello; stat -c '%a %u' etc .
stat -c '%a %u %g %Y' deep deep/er; readlink link; wc -c < deep/er/than/that
getfattr -d -m - etc/hello capable 2> /dev/null || python3 -c '
import os
import tarfile
print({name: os.getxattr(path, name) for path in ("etc/hello", "capable") for name in os.listxattr(path)})'
ls; find . -name 'nnn*' -printf '%s %T@\n'
"""
    lines = look(registry, answer["work"], "layer-0.erofs", script).splitlines()
    assert lines == [
        HELLO.decode().strip(),
        f"640 1000 1000 2 {oci.TIME}",
        "700 7",
        "755 0",
        f"755 0 0 {oci.TIME}",
        f"755 0 0 {oci.TIME}",
        "/etc/hello",
        "100000",
        "{'user.colour': b'blue'}",
        "capable",
        "deep",
        "etc",
        "hard",
        "link",
        "long",
        f"4 {oci.TIME}.5000000000",
    ]
    summary = answer["layers"][0]["summary"]
    assert (summary["devices_dropped"], summary["xattrs_dropped"], summary["whiteouts"]) == (1, 2, 0)


def test_device_nodes_that_are_granted(registry: Registry, signed: str) -> None:
    answer = registry.pull(f"oci:{HOST}/gpg/app@{signed}", options={"devices": True})
    found = look(registry, answer["work"], "layer-0.erofs", "stat -c '%F %t %T' null")
    assert found == "character special file 1 3\n"


def test_the_same_layer_makes_the_same_image(registry: Registry, signed: str) -> None:
    once, again = (registry.pull(f"oci:{HOST}/gpg/app:1.0")["layers"][0]["sha256"] for _ in range(2))
    assert once == again


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_compressions(registry: Registry, compression: str) -> None:
    name = f"gpg/{compression}:1.0"
    registry.image(name, *registry.sign_gpg, compression=compression)
    answer = registry.pull(f"oci:{HOST}/{name}")
    assert look(registry, answer["work"], "layer-0.erofs", "cat etc/hello") == HELLO.decode()


def test_docker_schema_2(registry: Registry) -> None:
    digest = registry.image("gpg/docker:1.0", "--format=v2s2", *registry.sign_gpg)
    assert "docker" in json.loads(registry.blob(digest).read_text())["mediaType"]
    answer = registry.pull(f"oci:{HOST}/gpg/docker:1.0")
    check_provenance(registry, answer, "gpg/docker", digest)


def test_an_index_gives_the_image_for_this_machine(registry: Registry) -> None:
    host, path = registry.inside("layout")
    layout = Layout(host)
    manifests = {
        name: layout.image([archive(Member(name, b"x"))], architecture=name)
        for name in ("amd64", "arm64", "s390x")
    }
    layout.close(layout.index(manifests), oci.INDEX)
    top = registry.push(path, "gpg/many:1.0", "--all", *registry.sign_gpg)
    own = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    for reference in (f"oci:{HOST}/gpg/many:1.0", f"oci:{HOST}/gpg/many@{top}"):
        answer = registry.pull(reference)
        check_provenance(registry, answer, "gpg/many", oci.digest(manifests[own]))
        assert look(registry, answer["work"], "layer-0.erofs", "ls").split() == [own]
    layout = Layout(registry.inside("layout")[0])
    path = "/" + str(layout.path.relative_to(registry.machine.root))
    layout.close(layout.index({"s390x": layout.image([archive()], architecture="s390x")}), oci.INDEX)
    registry.push(path, "gpg/foreign:1.0", "--all", *registry.sign_gpg)
    registry.refused(f"oci:{HOST}/gpg/foreign:1.0", "NotFound")


def test_layers_stack_with_their_whiteouts(registry: Registry) -> None:
    lowest = archive(
        Member("gone", b"1"),
        Member("kept", b"1"),
        Member("replaced/old", b"1"),
        Member("opaque/old", b"1"),
        Member("changed", b"1"),
        Member("device", b"1"),
        directory("closed/", mode=0o700, uid=7),
        Member("closed/gone", b"1"),
        Member(".wh.nothing", b""),
    )
    upper = archive(
        Member(".wh.gone", b""),
        Member(".wh.replaced", b""),
        Member("replaced/new", b"2"),
        Member("opaque/.wh..wh..opq", b""),
        Member("opaque/new", b"2"),
        Member("changed", b"2"),
        Member(".wh.changed", b""),
        Member("device", type=tarfile.CHRTYPE, device=(1, 3)),
        Member("closed/.wh.gone", b""),
    )
    registry.image("gpg/stack:1.0", *registry.sign_gpg, archives=(lowest, upper))
    answer = registry.pull(f"oci:{HOST}/gpg/stack:1.0")
    assert [each["summary"]["whiteouts"] for each in answer["layers"]] == [0, 5]
    found = registry.machine.sh(
        f"""
mkdir -p /tmp/0 /tmp/1
for n in 0 1; do mount -t erofs -o loop,ro {answer["work"]}/layer-$n.erofs /tmp/$n; done
mount -t overlay -o lowerdir=/tmp/1:/tmp/0 overlay /mnt
cd /mnt; find . -type f -printf '%P ' -exec cat {{}} \\; -printf '\\n'
stat -c '%n %a %u' closed
cd /; umount /mnt /tmp/0 /tmp/1
"""
    )
    assert sorted(found.splitlines()) == [
        *("changed 2", "closed 700 7", "kept 1", "opaque/new 2", "replaced/new 2")
    ]


def test_a_tag_with_a_digest(registry: Registry, signed: str) -> None:
    answer = registry.pull(f"oci:{HOST}/gpg/app:1.0@{signed}")
    assert answer["provenance"]["manifest"] == signed
    registry.refused(f"oci:{HOST}/gpg/app:1.0@sha256:{'0' * 64}", "RegistryFailed")
