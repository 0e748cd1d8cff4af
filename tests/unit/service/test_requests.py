"""The rules of a call that its types cannot say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from mountd.errors import InvalidParameter, LimitExceeded, NotSupported
from mountd.fds import OwnedFd, close_all
from mountd.plan.idmap import IdMapKind, IdRange
from mountd.service.requests import MAXIMUM_LAYERS, SOURCES, SUPPORTED_SOURCES, MountRequest
from mountd.source.model import SourceKind, Tmpfs
from mountd.store.reference import Reference

IMAGE = {"imageFileDescriptor": 0}
RANGES = [{"first": 0, "target": 5, "count": 1}]


@pytest.fixture
def fds() -> Iterator[list[OwnedFd]]:
    owned = [OwnedFd(os.open("/dev/null", os.O_RDONLY)) for _ in range(2)]
    yield owned
    close_all(owned)


def request(fds: list[OwnedFd], count: int = 1, **parameters: Any) -> MountRequest:
    return MountRequest.from_call({"source": IMAGE, **parameters}, fds[:count])


def test_defaults(fds: list[OwnedFd]) -> None:
    found = request(fds)
    assert found.kind is SourceKind.IMAGE
    assert found.image_fd == fds[0].fileno()
    assert found.wishes.read_only
    assert found.idmap.kind is IdMapKind.NONE
    assert not found.wishes.namespace_given


def test_a_namespace_makes_the_default_idmap(fds: list[OwnedFd]) -> None:
    found = request(fds, 2, userNamespaceFileDescriptor=1)
    assert found.userns_fd == fds[1].fileno()
    assert found.idmap.kind is IdMapKind.NAMESPACE
    assert found.wishes.namespace_given


def test_explicit_ranges(fds: list[OwnedFd]) -> None:
    found = request(fds, idMap={"kind": "ranges", "uidRanges": RANGES, "gidRanges": RANGES})
    assert found.idmap.uid_ranges == found.idmap.gid_ranges == (IdRange(0, 5, 1),)


def test_tmpfs() -> None:
    found = MountRequest.from_call({"source": {"tmpfs": {"size": 4096, "mode": 0o1777}}}, [])
    assert (found.kind, found.tmpfs) == (SourceKind.TMPFS, Tmpfs(4096, None, 0o1777))


@pytest.mark.parametrize(
    ("parameters", "count", "parameter"),
    [
        ({"source": {}}, 0, "source"),
        ({"source": {"imageFileDescriptor": 0, "tmpfs": {"size": 1}}}, 1, "source"),
        ({"source": {"imageFileDescriptor": 1}}, 1, "source.imageFileDescriptor"),
        ({"source": {"imageFileDescriptor": -1}}, 1, "source.imageFileDescriptor"),
        ({"source": {"imageFileDescriptor": 1 << 62}}, 1, "source.imageFileDescriptor"),
        ({"userNamespaceFileDescriptor": 0}, 1, "userNamespaceFileDescriptor"),
        ({}, 2, "fileDescriptors"),
        ({"idMap": {"kind": "namespace"}}, 1, "userNamespaceFileDescriptor"),
        ({"idMap": {"kind": "none", "uidRanges": RANGES}}, 1, "idMap.uidRanges"),
        ({"idMap": {"kind": "caller", "gidRanges": []}}, 1, "idMap.gidRanges"),
        ({"source": {"tmpfs": {"size": 0}}}, 0, "source.tmpfs.size"),
        ({"source": {"tmpfs": {"size": 1, "inodes": 0}}}, 0, "source.tmpfs.inodes"),
        ({"source": {"tmpfs": {"size": 1, "mode": 0o4755}}}, 0, "source.tmpfs.mode"),
        ({"source": {"tmpfs": {"size": 1, "mode": -1}}}, 0, "source.tmpfs.mode"),
    ],
)
def test_refused(fds: list[OwnedFd], parameters: dict[str, Any], count: int, parameter: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        request(fds, count, **parameters)
    assert caught.value.parameters["parameter"] == parameter


def test_a_stored_image() -> None:
    digest = "sha256:" + "0a" * 32
    found = MountRequest.from_call({"source": {"reference": f"stored:{digest}"}}, [])
    assert (found.kind, found.stored, found.image_fd) == (SourceKind.IMAGE, digest, None)


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../lock", "sha512:" + "0" * 64, "0a" * 32])
def test_a_stored_image_is_named_by_its_whole_digest(digest: str) -> None:
    with pytest.raises(InvalidParameter, match="source.reference"):
        MountRequest.from_call({"source": {"reference": f"stored:{digest}"}}, [])


@pytest.mark.parametrize("reference", ["", "docker://example.com/a:1", "example.com/a:1"])
def test_another_reference_is_not_supported(reference: str) -> None:
    with pytest.raises(NotSupported, match="source.reference"):
        MountRequest.from_call({"source": {"reference": reference}}, [])


def test_a_pulled_image_is_named_by_the_digest_of_its_manifest() -> None:
    digest = "sha256:" + "0a" * 32
    found = MountRequest.from_call({"source": {"reference": f"oci:example.com/a@{digest}"}}, [])
    assert isinstance(found.stored, Reference)
    assert (found.stored.repository, found.stored.digest) == ("example.com/a", digest)


@pytest.mark.parametrize(("end", "tag"), [("", "latest"), (":1", "1"), (":1@sha256:" + "0a" * 32, "1")])
def test_a_pulled_image_is_named_by_its_tag(end: str, tag: str) -> None:
    found = MountRequest.from_call({"source": {"reference": f"oci:example.com/a{end}"}}, [])
    assert isinstance(found.stored, Reference)
    assert (found.stored.repository, found.stored.tag) == ("example.com/a", tag)


@pytest.mark.parametrize("end", ["a@sha256:0a", "A:1", "a@sha512:" + "0a" * 64, "../a:1"])
def test_a_name_in_a_registry_that_is_none(end: str) -> None:
    with pytest.raises(InvalidParameter, match="source.reference"):
        MountRequest.from_call({"source": {"reference": f"oci:example.com/{end}"}}, [])


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in SUPPORTED_SOURCES])
def test_sources_of_later_versions_are_named(fds: list[OwnedFd], name: str) -> None:
    with pytest.raises(NotSupported, match=f"source.{name}"):
        request(fds, 0, source={name: 0})


HASH = "ab" * 32
VERITY = {"dataFileDescriptor": 1, "rootHash": HASH}


def test_what_vouches_for_an_image(fds: list[OwnedFd]) -> None:
    found = request(fds, source={**IMAGE, "signature": "c2lnbmVk"}, imagePolicy="root=signed")
    assert found.signature == b"signed"
    assert found.wishes.image_policy is not None
    found = request(fds, 2, source={**IMAGE, "verity": {**VERITY, "signature": "c2lnbmVk"}})
    assert found.verity is not None
    assert (found.verity.hash_fd, found.verity.root_hash) == (fds[1].fileno(), bytes.fromhex(HASH))
    assert found.signature == b"signed"


@pytest.mark.parametrize(
    ("source", "count", "parameter"),
    [
        ({**IMAGE, "signature": "no base64!"}, 1, "source.signature"),
        ({**IMAGE, "signature": "A" * 400_000}, 1, "source.signature"),
        ({**IMAGE, "verity": {**VERITY, "rootHash": "AB" * 32}}, 2, "source.verity.rootHash"),
        ({**IMAGE, "verity": {**VERITY, "rootHash": "ab" * 31}}, 2, "source.verity.rootHash"),
        ({**IMAGE, "verity": {**VERITY, "rootHash": HASH + "\n"}}, 2, "source.verity.rootHash"),
        ({**IMAGE, "verity": {**VERITY, "dataFileDescriptor": 0}}, 2, "source.verity.dataFileDescriptor"),
        ({**IMAGE, "verity": {**VERITY, "signature": "!"}}, 2, "source.verity.signature"),
        ({**IMAGE, "signature": "", "verity": {**VERITY, "signature": ""}}, 2, "source.signature"),
        ({"tmpfs": {"size": 1}, "signature": ""}, 0, "source.signature"),
        ({"reference": f"stored:sha256:{HASH}", "verity": VERITY}, 2, "source.verity"),
    ],
)
def test_what_does_not_go_together(
    fds: list[OwnedFd], source: dict[str, Any], count: int, parameter: str
) -> None:
    with pytest.raises(InvalidParameter) as raised:
        request(fds, count, source=source)
    assert raised.value.parameters["parameter"] == parameter


@pytest.mark.parametrize(
    "text", [" ", "root", "root=everything", "root=signed:root=verity", "*:*", "x" * 10_000]
)
def test_an_image_policy_that_is_not_understood_is_refused(fds: list[OwnedFd], text: str) -> None:
    with pytest.raises(InvalidParameter, match="imagePolicy"):
        request(fds, imagePolicy=text)


LAYERS = {"layers": [{"imageFileDescriptor": 0}, {"directoryFileDescriptor": 1}]}
STORED = {"reference": "stored:sha256:" + "0a" * 32}


def test_a_stack(fds: list[OwnedFd]) -> None:
    found = request(fds, 2, source=LAYERS, options=["noexec"], idMap={"kind": "caller"})
    assert (found.kind, found.image_fd, found.stored) == (SourceKind.STACK, None, None)
    top, bottom = found.layers
    assert (top.kind, top.image_fd) == (SourceKind.IMAGE, fds[0].fileno())
    assert (bottom.kind, bottom.directory_fd) == (SourceKind.DIRECTORY, fds[1].fileno())
    for layer in found.layers:
        assert layer.wishes == found.wishes
        assert layer.idmap == found.idmap
        assert layer.layers == ()


@pytest.mark.parametrize(
    ("layers", "count", "parameter"),
    [
        ([], 0, "source.layers"),
        ([STORED], 0, "source.layers"),
        ([STORED, {}], 0, "source"),
        ([STORED, {"tmpfs": {"size": 1}}], 0, "source.layers[1].tmpfs"),
        ([{"layers": [STORED, STORED]}, STORED], 0, "source.layers[0].layers"),
        ([IMAGE, IMAGE], 1, "source.layers[1].imageFileDescriptor"),
        ([STORED, {**IMAGE, "signature": "!"}], 1, "source.layers[1].signature"),
        ([{"reference": "stored:sha256:0"}, STORED], 0, "source.layers[0].reference"),
        ([STORED, STORED], 1, "fileDescriptors"),
    ],
)
def test_no_stack(fds: list[OwnedFd], layers: list[dict[str, Any]], count: int, parameter: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        request(fds, count, source={"layers": layers})
    assert caught.value.parameters["parameter"] == parameter


def test_a_stack_is_bounded_read_only_and_an_overlay(fds: list[OwnedFd]) -> None:
    with pytest.raises(LimitExceeded):
        request(fds, 0, source={"layers": [STORED] * (MAXIMUM_LAYERS + 1)})
    with pytest.raises(NotSupported, match="write"):
        request(fds, 0, source={"layers": [STORED] * 2}, readOnly=False)
    with pytest.raises(InvalidParameter, match="fileSystemType"):
        request(fds, 0, source={"layers": [STORED] * 2}, fileSystemType="erofs")
    found = request(fds, 0, source={"layers": [STORED] * 2}, fileSystemType="overlay")
    assert found.layers[0].wishes.file_system_type is None


OBJECTS = {"dumpFileDescriptor": 0, "objectsFileDescriptors": [1]}


def test_a_composefs(fds: list[OwnedFd]) -> None:
    found = request(fds, 2, source={"composefs": {**OBJECTS, "digest": HASH}}, fileSystemType="overlay")
    assert (found.kind, found.image_fd, found.wishes.file_system_type) == (SourceKind.COMPOSEFS, None, None)
    assert found.composefs is not None
    assert found.composefs.description_fd == fds[0].fileno()
    assert found.composefs.objects_fds == (fds[1].fileno(),)
    assert (found.composefs.digest, found.composefs.verity) == (HASH, False)
    of_image = {"imageFileDescriptor": 0, "objectsFileDescriptors": [1], "verity": True}
    found = request(fds, 2, source={"composefs": of_image, "signature": "c2lnbmVk"})
    assert (found.kind, found.image_fd, found.signature) == (SourceKind.IMAGE, fds[0].fileno(), b"signed")


@pytest.mark.parametrize(
    ("composefs", "parameter"),
    [
        ({"objectsFileDescriptors": [0, 1]}, "source.composefs"),
        ({**OBJECTS, "imageFileDescriptor": 0}, "source.composefs.dumpFileDescriptor"),
        ({**OBJECTS, "objectsFileDescriptors": []}, "source.composefs.objectsFileDescriptors"),
        ({**OBJECTS, "objectsFileDescriptors": [2]}, "source.composefs.objectsFileDescriptors[0]"),
        ({**OBJECTS, "objectsFileDescriptors": [1, 1]}, "source.composefs.objectsFileDescriptors[1]"),
        ({**OBJECTS, "digest": HASH.upper()}, "source.composefs.digest"),
        ({**OBJECTS, "digest": f"sha256:{HASH}"}, "source.composefs.digest"),
    ],
)
def test_no_composefs(fds: list[OwnedFd], composefs: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        request(fds, 2, source={"composefs": composefs})
    assert caught.value.parameters["parameter"] == parameter


def test_a_composefs_is_bounded_read_only_and_unsigned(fds: list[OwnedFd]) -> None:
    with pytest.raises(LimitExceeded):
        request(fds, 2, source={"composefs": {**OBJECTS, "objectsFileDescriptors": [1] * 16}})
    with pytest.raises(NotSupported, match="write"):
        request(fds, 2, source={"composefs": OBJECTS}, readOnly=False)
    with pytest.raises(InvalidParameter, match="fileSystemType"):
        request(fds, 2, source={"composefs": OBJECTS}, fileSystemType="erofs")
    with pytest.raises(InvalidParameter, match="signature"):
        request(fds, 2, source={"composefs": OBJECTS, "signature": "c2lnbmVk"})
