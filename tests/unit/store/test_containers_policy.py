"""The system's policy about registries: read strictly, and the most specific scope alone counts."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mountd.errors import DeniedByPolicy
from mountd.store import reference
from mountd.store.containers_policy import (
    ContainersPolicyError,
    find,
    load,
    parse,
    read_key_file,
    require,
    scopes,
)

GPG = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/k"}
SIGSTORE = {"type": "sigstoreSigned", "keyPath": "/s"}
REJECT = {"type": "reject"}
ANYTHING = {"type": "insecureAcceptAnything"}
APP = reference.parse("oci:registry.example.com:5000/team/web/app:1.0")


def policy(default: Any = None, scopes: Any = None, **other: Any) -> bytes:
    document = {"default": [REJECT] if default is None else default, **other}
    if scopes is not None:
        document["transports"] = {"docker": scopes}
    return json.dumps(document).encode()


def read_key(path: str) -> bytes:
    return f"the key {path}".encode()


def named(path: str) -> str:
    return f"{path} (sha256:{hashlib.sha256(read_key(path)).hexdigest()})"


def test_scopes_from_the_most_specific_on() -> None:
    assert scopes(APP) == [
        "registry.example.com:5000/team/web/app:1.0",
        "registry.example.com:5000/team/web/app",
        "registry.example.com:5000/team/web",
        "registry.example.com:5000/team",
        "registry.example.com:5000",
        "*.example.com",
        "*.com",
        "",
    ]
    by_digest = reference.parse(f"oci:localhost/app@sha256:{'0' * 64}")
    assert scopes(by_digest) == [f"localhost/app@sha256:{'0' * 64}", "localhost/app", "localhost", ""]


@pytest.mark.parametrize("number", range(8))
def test_the_most_specific_scope_counts_alone(number: int) -> None:
    all = scopes(APP)
    given = {scope: [REJECT] for scope in all[number + 1 :]} | {all[number]: [GPG]}
    found = require(parse("p", policy([ANYTHING], given)), APP, read_key=read_key)
    assert (found.scope, found.name, found.signer) == (f"docker:{all[number]}", "signedBy", named("/k"))


@pytest.mark.parametrize(
    "scope",
    [
        "registry.example.com",
        "registry.example.com:500",
        "registry.example.com:5000/tea",
        "registry.example.com:5000/team/web/app:1",
        "registry.example.com:5000/team/",
        "example.com",
        "*.registry.example.com",
        "*.example.com:5000",
        "*",
        "REGISTRY.example.com:5000",
        "registry.example.com:5000.evil.test",
    ],
)
def test_scopes_that_only_look_alike(scope: str) -> None:
    found = parse("p", policy([REJECT], {scope: [ANYTHING]}))
    assert find(found, APP)[0] == "default"
    with pytest.raises(DeniedByPolicy):
        require(found, APP, accept_anything=True)


def test_other_transports_are_none_of_it() -> None:
    found = parse("p", policy(transports={"oci": {"": [ANYTHING]}, "dir": {"/x": [GPG]}}))
    with pytest.raises(DeniedByPolicy, match="rejects"):
        require(found, APP, accept_anything=True)


def test_the_default() -> None:
    found = require(parse("p", policy([SIGSTORE])), APP, read_key=read_key)
    assert (found.scope, found.name, found.signer) == ("default", "sigstoreSigned", named("/s"))


def test_what_accepts_anything_proves_nothing() -> None:
    found = parse("p", policy([ANYTHING]))
    with pytest.raises(DeniedByPolicy, match="proves nothing") as caught:
        require(found, APP)
    assert "signedBy" in str(caught.value.hint)
    accepted = require(found, APP, accept_anything=True)
    assert (accepted.name, accepted.signer) == ("insecureAcceptAnything", None)


def test_all_of_a_list_have_to_pass() -> None:
    found = require(parse("p", policy([ANYTHING, GPG, SIGSTORE])), APP, read_key=read_key)
    assert found.name == "signedBy+sigstoreSigned"
    assert found.signer == f"{named('/k')}; {named('/s')}"
    with pytest.raises(DeniedByPolicy, match="rejects"):
        require(parse("p", policy([GPG, REJECT])), APP, read_key=read_key)


ACCEPTED = [
    GPG,
    {"type": "signedBy", "keyType": "GPGKeys", "keyPaths": ["/a", "/b"]},
    {"type": "signedBy", "keyType": "GPGKeys", "keyData": "a2V5"},
    {**GPG, "signedIdentity": {"type": "matchExact"}},
    {**GPG, "signedIdentity": {"type": "exactReference", "dockerReference": "a/b:c"}},
    {**GPG, "signedIdentity": {"type": "remapIdentity", "prefix": "a", "signedPrefix": "b"}},
    {"type": "sigstoreSigned", "keyDatas": ["a", "b"], "rekorPublicKeyPath": "/r"},
    {
        "type": "sigstoreSigned",
        "fulcio": {"caPath": "/f", "oidcIssuer": "https://i", "subjectEmail": "a@b"},
        "rekorPublicKeyData": "x",
    },
    {"type": "sigstoreSigned", "pki": {"caRootsPath": "/r", "subjectHostname": "h"}},
]


@pytest.mark.parametrize("value", ACCEPTED, ids=repr)
def test_requirements(value: dict[str, Any]) -> None:
    found = require(parse("p", policy([value])), APP, read_key=read_key)
    assert found.name == value["type"]
    assert found.signer


def test_signers() -> None:
    def signer(value: dict[str, Any]) -> str | None:
        return require(parse("p", policy([value])), APP, read_key=read_key).signer

    assert signer(ACCEPTED[1]) == f"{named('/a')} or {named('/b')}"
    assert signer(ACCEPTED[2]) == f"key data (sha256:{hashlib.sha256(b'a2V5').hexdigest()})"
    assert signer(ACCEPTED[7]) == "fulcio a@b of https://i"
    assert signer(ACCEPTED[8]) == "pki h"


REFUSED = {
    b"": "not JSON",
    b"[]": "not a JSON object",
    b"{}": "“default” is missing",
    b'{"default": []}': "at least one",
    b'{"default": {}}': "at least one",
    b'{"default": [{}]}': "type is unknown",
    b'{"default": ["reject"]}': "not a JSON object",
    b'{"default": [{"type": "Reject"}]}': "type is unknown",
    b'{"default": [{"type": ["reject"]}]}': "type is unknown",
    b'{"default": [{"type": "signedBaseLayer"}]}': "type is unknown",
    b'{"default": [{"type": "reject"}], "Default": []}': "“Default” is unknown",
    b'{"default": [{"type": "reject"}], "default": [{"type": "reject"}]}': "there twice",
    b'{"default": [{"type": "reject", "type": "insecureAcceptAnything"}]}': "there twice",
    b'{"default": [{"type": "reject", "keyPath": "/x"}]}': "“keyPath” is unknown",
    policy(transports=[]): "not a JSON object",
    policy(transports={"docker": []}): "not a JSON object",
    policy(scopes={"a": []}): "at least one",
    policy(scopes={"a": [{"type": "no"}]}): "type is unknown",
    policy(transports={"oci": {"/x": [{"type": "no"}]}}): "type is unknown",
    policy([{"type": "signedBy", "keyType": "GPGKeys"}]): "exactly one of",
    policy([{**GPG, "keyData": "x"}]): "exactly one of",
    policy([{**GPG, "keyDatas": ["x"]}]): "“keyDatas” is unknown",
    policy([{"type": "signedBy", "keyPath": "/k"}]): "GPGKeys",
    policy([{**GPG, "keyType": "signedByGPGKeys"}]): "GPGKeys",
    policy([{**GPG, "keyPath": ""}]): "not text",
    policy([{**GPG, "keyPath": 1}]): "not text",
    policy([{**GPG, "keyPath": ["/k"]}]): "not text",
    policy([{**GPG, "signedIdentity": "matchExact"}]): "not a JSON object",
    policy([{**GPG, "signedIdentity": {"type": "match"}}]): "type is unknown",
    policy([{**GPG, "signedIdentity": {"type": "exactReference"}}]): "not those of",
    policy([{**GPG, "signedIdentity": {"type": "matchExact", "x": "y"}}]): "not those of",
    policy([{"type": "sigstoreSigned"}]): "exactly one of",
    policy([{**SIGSTORE, "keyType": "GPGKeys"}]): "“keyType” is unknown",
    policy([{**SIGSTORE, "fulcio": {"caPath": "/x"}}]): "exactly one of",
    policy([{"type": "sigstoreSigned", "fulcio": {"capath": "/x"}}]): "“capath” is unknown",
    policy([{"type": "sigstoreSigned", "keyPaths": []}]): "not text",
    b" " * (1 << 21): "larger than",
}


@pytest.mark.parametrize("contents", REFUSED, ids=lambda contents: repr(contents[:80]))
def test_refused(contents: bytes) -> None:
    with pytest.raises(ContainersPolicyError, match=REFUSED[contents]) as caught:
        parse("/etc/containers/policy.json", contents)
    assert caught.value.parameters["rule"] == "/etc/containers/policy.json"


def test_the_first_file_that_exists(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(DeniedByPolicy, match="no policy about registries"):
        load([str(first), str(second)])
    second.write_bytes(policy([ANYTHING]))
    assert load([str(first), str(second)]).path == str(second)
    first.write_bytes(policy([REJECT]))
    found = load([str(first), str(second)])
    assert (found.path, found.contents) == (str(first), policy([REJECT]))
    # A broken first one is no reason to look further.
    first.write_bytes(b"{")
    with pytest.raises(ContainersPolicyError):
        load([str(first), str(second)])


def test_files_that_are_not_roots_alone(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(policy())
    for mode in (0o666, 0o664, 0o646):
        path.chmod(mode)
        with pytest.raises(ContainersPolicyError, match="can write to it"):
            load([str(path)])
    path.chmod(0o644)
    os.chown(path, 1000, 0)
    with pytest.raises(ContainersPolicyError, match="belongs to uid 1000"):
        load([str(path)])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ContainersPolicyError, match="not a regular file"):
        load([str(path)])


def test_keys_that_cannot_be_used(tmp_path: Path) -> None:
    key = tmp_path / "key"
    found = parse("p", policy([{**GPG, "keyPath": str(key)}]))
    with pytest.raises(ContainersPolicyError, match="No such file"):
        require(found, APP)
    key.write_bytes(b"key")
    key.chmod(0o600)
    with pytest.raises(ContainersPolicyError, match=r"chmod it o\+r"):
        require(found, APP)
    key.chmod(0o646)
    with pytest.raises(ContainersPolicyError, match="can write to it"):
        require(found, APP)
    key.chmod(0o644)
    assert require(found, APP).signer == f"{key} (sha256:{hashlib.sha256(b'key').hexdigest()})"
    assert read_key_file(str(key)) == b"key"
