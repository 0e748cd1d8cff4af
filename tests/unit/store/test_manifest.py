"""Manifests, indexes and configurations: by digest, complete, and of kinds that are understood."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mountd.errors import InvalidImage, LimitExceeded, MountdError, NotFound
from mountd.store import manifest
from mountd.store.manifest import Index, Manifest, diff_ids, digest_of, for_machine, parse

HEX = "ab" * 32


def descriptor(media_type: str, **other: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{HEX}", "size": 7, **other}


def image() -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": manifest.MANIFESTS[0],
        "config": descriptor(manifest.CONFIGURATIONS[0]),
        "layers": [descriptor(media_type) for media_type in manifest.LAYERS],
    }


def index() -> dict[str, Any]:
    def of(system: str, architecture: str, byte: str) -> dict[str, Any]:
        platform = {"os": system, "architecture": architecture}
        return descriptor(manifest.MANIFESTS[0], digest=f"sha256:{byte * 32}", platform=platform)

    return {
        "schemaVersion": 2,
        "manifests": [
            of("linux", "amd64", "01"),
            of("windows", "amd64", "02"),
            of("linux", "arm64", "03"),
            of("unknown", "unknown", "04"),
            descriptor("application/vnd.example.attestation"),
        ],
    }


def configuration(count: int) -> dict[str, Any]:
    listed = [f"sha256:{number:064x}" for number in range(count)]
    return {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": listed}}


def encode(value: object) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def read(value: object) -> Manifest | Index:
    data = encode(value)
    return parse(data, digest_of(data))


def test_an_image() -> None:
    found = read(image())
    assert isinstance(found, Manifest)
    assert found.digest == digest_of(encode(image()))
    assert found.configuration.digest == f"sha256:{HEX}"
    assert [each.media_type for each in found.layers] == list(manifest.LAYERS)
    without = image()
    del without["mediaType"]
    assert isinstance(read(without), Manifest)


def test_an_index() -> None:
    found = read(index())
    assert isinstance(found, Index)
    assert [each.digest for each in for_machine(found, "x86_64")] == [f"sha256:{'01' * 32}"]
    assert [each.digest for each in for_machine(found, "aarch64")] == [f"sha256:{'03' * 32}"]
    with pytest.raises(NotFound, match="linux/s390x") as caught:
        for_machine(found, "s390x")
    assert "linux/amd64" in str(caught.value.hint)


def test_other_bytes_than_those_asked_for() -> None:
    with pytest.raises(InvalidImage, match="was asked for"):
        parse(encode(image()), f"sha256:{HEX}")
    with pytest.raises(InvalidImage, match="was asked for"):
        diff_ids(encode(configuration(1)), read(image()))  # type: ignore[arg-type]


def changed(base: dict[str, Any], *path: Any, to: Any) -> dict[str, Any]:
    """The document with one value replaced; deleted for `...`."""
    at: Any = base
    for step in path[:-1]:
        at = at[step]
    if to is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return base


REFUSED: dict[str, tuple[object, str]] = {
    "no object": ([], "not a JSON object"),
    "no JSON": (b"\x1f\x8b", "UTF-8"),
    "twice": (b'{"schemaVersion": 2, "schemaVersion": 2}', "there twice"),
    "schema 1": (changed(image(), "schemaVersion", to=1), "schema version 2"),
    "schema true": (changed(image(), "schemaVersion", to=2.0), "schema version 2"),
    "no schema": (changed(image(), "schemaVersion", to=...), "schema version 2"),
    "both": ({**image(), "manifests": []}, "both at once"),
    "neither": ({"schemaVersion": 2}, "neither"),
    "another type": (changed(image(), "mediaType", to=manifest.INDEXES[0]), "says that it is of type"),
    "an index that is an image": (
        {**index(), "mediaType": manifest.MANIFESTS[0]},
        "says that it is of type",
    ),
    "type of no string": (changed(image(), "mediaType", to={}), "says that it is of type"),
    "no configuration": (changed(image(), "config", to=...), "configuration is not a JSON object"),
    "an artifact": (changed(image(), "config", "mediaType", to="application/x"), "configuration is of type"),
    "no layers": (changed(image(), "layers", to=[]), "no layers"),
    "layers of no list": (changed(image(), "layers", to={}), "not a JSON list"),
    "layer of no object": (changed(image(), "layers", 0, to="x"), "layer 1 is not a JSON object"),
    "foreign": (changed(image(), "layers", 0, "urls", to=["https://x"]), "fetched from elsewhere"),
    "encrypted": (changed(image(), "layers", 0, "mediaType", to="a+encrypted"), "which is not supported"),
    "short digest": (changed(image(), "layers", 0, "digest", to="sha256:abc"), "not a full SHA-256"),
    "other digest": (changed(image(), "layers", 0, "digest", to=f"sha512:{HEX * 2}"), "not a full SHA-256"),
    "upper digest": (changed(image(), "layers", 0, "digest", to=f"sha256:{HEX.upper()}"), "not a full"),
    "path as digest": (changed(image(), "layers", 0, "digest", to="sha256:../../etc/passwd"), "not a full"),
    "no digest": (changed(image(), "config", "digest", to=...), "not a full SHA-256"),
    "negative": (changed(image(), "layers", 0, "size", to=-1), "no size"),
    "huge": (changed(image(), "layers", 0, "size", to=1 << 80), "no size"),
    "a float": (changed(image(), "layers", 0, "size", to=7.0), "no size"),
    "a bool": (changed(image(), "layers", 0, "size", to=True), "no size"),
    "platform": (changed(index(), "manifests", 0, "platform", to=[]), "platform of image 1"),
    "platform of numbers": (changed(index(), "manifests", 0, "platform", "os", to=1), "made of strings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    value, reason = REFUSED[case]
    with pytest.raises(InvalidImage, match=reason):
        read(value)


def test_too_many() -> None:
    for value in (
        {**image(), "layers": image()["layers"][:1] * (manifest.MAXIMUM_LAYERS + 1)},
        {**index(), "manifests": index()["manifests"][:1] * (manifest.MAXIMUM_INSTANCES + 1)},
    ):
        with pytest.raises(LimitExceeded):
            read(value)
    with pytest.raises(InvalidImage, match="larger than"):
        read(b" " * (manifest.MAXIMUM_MANIFEST + 1))


def read_configuration(value: object, layers: int = 2) -> tuple[str, ...]:
    data = encode(value)
    document = image()
    document["layers"] = document["layers"][:layers]
    document["config"]["digest"] = digest_of(data)
    found = read(document)
    assert isinstance(found, Manifest)
    return diff_ids(data, found)


def test_a_configuration() -> None:
    assert read_configuration(configuration(2)) == (f"sha256:{0:064x}", f"sha256:{1:064x}")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (configuration(1), "has 1 layers, its manifest 2"),
        (configuration(3), "has 3 layers, its manifest 2"),
        (changed(configuration(2), "os", to="windows"), "“windows”"),
        (changed(configuration(2), "os", to=...), "not for linux"),
        (changed(configuration(2), "rootfs", to=...), "not a JSON object"),
        (changed(configuration(2), "rootfs", "type", to="x"), "of type “x”"),
        (changed(configuration(2), "rootfs", "diff_ids", to={}), "not a JSON list"),
        (changed(configuration(2), "rootfs", "diff_ids", 1, to=7), "not a full SHA-256"),
        (changed(configuration(2), "rootfs", "diff_ids", 1, to="sha256:00"), "not a full SHA-256"),
    ],
)
def test_refused_configurations(value: object, reason: str) -> None:
    with pytest.raises(InvalidImage, match=reason):
        read_configuration(value)


def test_what_strangers_write_is_fit_for_a_terminal() -> None:
    document = changed(image(), "config", "mediaType", to="\x1b[2J" + "x" * 10_000)
    with pytest.raises(MountdError) as caught:
        read(document)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
