"""What skopeo says, and what it means to the one who wanted an image."""

from __future__ import annotations

import pytest

from mountd.errors import (
    DeniedByPolicy,
    InvalidImage,
    KeyUnknown,
    MountdError,
    NotFound,
    RegistryFailed,
    SignatureInvalid,
    StorageFull,
)
from mountd.store import reference
from mountd.store.program import MAXIMUM_EXCERPT, excerpt
from mountd.store.skopeo import MESSAGE, explain, source

APP = reference.parse("oci:registry.example.com:5000/app:1.0")
REJECTED = "Source image rejected: "
GPG = REJECTED + 'Invalid GPG signature: {Fingerprint:"01AB", Status:gpgme.Error'
SAID: dict[str, type[MountdError]] = {
    f"{REJECTED}A signature was required, but no signature exists": SignatureInvalid,
    f"{REJECTED}Running image docker://h.example/app:1.0 is rejected by policy.": DeniedByPolicy,
    f"{REJECTED}Signature by key 0123ABCD is not accepted": KeyUnknown,
    GPG + "{err:0x9}, …": KeyUnknown,
    GPG + "{err:0x8}, …": SignatureInvalid,
    f"{REJECTED}cryptographic signature verification failed: invalid signature": SignatureInvalid,
    f"{REJECTED}Signature for identity x is not accepted": SignatureInvalid,
    "writing blob: write /tmp/image/a: no space left on device": StorageFull,
    "Get https://h.example/v2/: tls: failed to verify certificate: x509: unknown": RegistryFailed,
    "http: server gave HTTP response to HTTPS client": RegistryFailed,
    "reading manifest 1.0 in registry.example.com/app: manifest unknown": NotFound,
    "reading manifest: name unknown: repository name not known to registry": NotFound,
    "pinging container registry: dial tcp 127.0.0.1:5000: connect: connection refused": RegistryFailed,
    "dial tcp: lookup registry.example.com: no such host": RegistryFailed,
    "unauthorized: authentication required": RegistryFailed,
    "copying layer: Digest did not match, expected sha256:a, got sha256:b": InvalidImage,
    "something new": RegistryFailed,
}


@pytest.mark.parametrize("said", SAID)
def test_each_failure_has_its_name(said: str) -> None:
    error = explain(APP, said, said)
    assert type(error) is SAID[said]
    assert "registry.example.com:5000" in str(error)


@pytest.mark.parametrize("said", [said for said in SAID if said != "something new" and "Digest" not in said])
def test_each_failure_has_a_way_out(said: str) -> None:
    assert explain(APP, said, said).hint


def test_the_fatal_line_is_taken_out_of_the_log() -> None:
    log = 'time="x" level=warning msg="a"\ntime="y" level=fatal msg="b \\"c\\" d"\n'
    assert MESSAGE.findall(log) == ['b \\"c\\" d']


def test_excerpts_are_fit_for_a_terminal() -> None:
    assert excerpt("first\n  last\x1b[2J \n\n", 1) == "last\N{REPLACEMENT CHARACTER}[2J"
    assert excerpt("", 3) == "it ended with status 3"
    assert excerpt(" \n", -9) == "it ended with signal 9"
    assert len(excerpt("x" * 10_000, 1)) == MAXIMUM_EXCERPT


def test_a_tag_is_fetched_by_the_tag() -> None:
    digest = f"sha256:{'0' * 64}"
    assert source(APP) == "docker://registry.example.com:5000/app:1.0"
    assert source(reference.parse(f"oci:h.example/app:1@{digest}")) == "docker://h.example/app:1"
    assert source(reference.parse(f"oci:h.example/app@{digest}")) == f"docker://h.example/app@{digest}"
