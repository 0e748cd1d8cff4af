"""A call that asks for a top: what it may say, and what becomes of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mountd.errors import InvalidParameter, NotSupported
from mountd.fds import OwnedFd, close_all
from mountd.plan.idmap import IdMapKind
from mountd.service.requests import MountRequest
from mountd.source.model import SourceKind, Tmpfs

IMAGE = {"imageFileDescriptor": 0}
STORED = {"reference": "stored:sha256:" + "0a" * 32}
IN_MEMORY = {"sizeBytes": 4096}
OF_CALLER = {"directoryFileDescriptor": 1}
OBJECTS = {"dumpFileDescriptor": 0, "objectsFileDescriptors": [1]}


@pytest.fixture(scope="module")
def fds() -> Iterator[list[OwnedFd]]:
    owned = [OwnedFd(os.open("/dev/null", os.O_RDONLY)) for _ in range(3)]
    yield owned
    close_all(owned)


def request(fds: list[OwnedFd], count: int, source: Mapping[str, Any], **parameters: Any) -> MountRequest:
    return MountRequest.from_call({"source": source, "readOnly": False, **parameters}, fds[:count])


def test_one_image_and_its_top(fds: list[OwnedFd]) -> None:
    found = request(fds, 2, {**IMAGE, "top": OF_CALLER}, options=["noexec", "acl", "rw"])
    assert (found.kind, found.image_fd) == (SourceKind.STACK, None)
    assert not found.wishes.read_only
    (layer,) = found.layers
    assert (layer.kind, layer.image_fd, layer.top) == (SourceKind.IMAGE, fds[0].fileno(), None)
    assert (layer.wishes.read_only, layer.wishes.options) == (True, ("noexec", "acl"))
    assert found.top is not None
    assert (found.top.kind, found.top.directory_fd) == (SourceKind.DIRECTORY, fds[1].fileno())
    assert found.top.image_fd is None
    # What is for the file systems of images is not for it.
    assert (found.top.wishes.read_only, found.top.wishes.options) == (False, ("noexec", "rw"))
    assert (found.top.layers, found.top.top) == ((), None)


def test_layers_and_a_top_in_memory(fds: list[OwnedFd]) -> None:
    top = {"sizeBytes": 4096, "inodes": 7}
    found = request(
        fds,
        1,
        {"layers": [STORED, STORED], "top": top},
        fileSystemType="overlay",
        imagePolicy="root=unprotected",
        userNamespaceFileDescriptor=0,
    )
    assert found.top is not None
    assert found.top.tmpfs == Tmpfs(4096, 7, 0o755)
    assert found.top.idmap.kind is IdMapKind.NAMESPACE
    # It is no image.
    assert found.top.wishes.image_policy is None
    assert [layer.wishes.read_only for layer in found.layers] == [True, True]
    assert all(layer.wishes.image_policy is not None for layer in found.layers)
    assert all(layer.wishes.file_system_type is None for layer in (*found.layers, found.top))
    assert len(request(fds, 0, {"layers": [STORED], "top": top}).layers) == 1


def test_a_composefs_and_a_top(fds: list[OwnedFd]) -> None:
    found = request(fds, 2, {"composefs": OBJECTS, "top": IN_MEMORY})
    (layer,) = found.layers
    assert (found.composefs, layer.kind) == (None, SourceKind.COMPOSEFS)
    assert layer.composefs is not None
    assert layer.wishes.read_only


@pytest.mark.parametrize(
    ("source", "count", "parameter"),
    [
        ({**IMAGE, "top": {}}, 1, "source.top"),
        ({**IMAGE, "top": {"sizeBytes": 4096, **OF_CALLER}}, 2, "source.top"),
        ({**IMAGE, "top": {"sizeBytes": 0}}, 1, "source.top.sizeBytes"),
        ({**IMAGE, "top": {"sizeBytes": -1}}, 1, "source.top.sizeBytes"),
        ({**IMAGE, "top": {"sizeBytes": 1, "inodes": 0}}, 1, "source.top.inodes"),
        ({**IMAGE, "top": {**OF_CALLER, "inodes": 9}}, 2, "source.top.inodes"),
        ({**IMAGE, "top": {"directoryFileDescriptor": 0}}, 1, "source.top.directoryFileDescriptor"),
        ({**IMAGE, "top": {"directoryFileDescriptor": 1}}, 1, "source.top.directoryFileDescriptor"),
        ({**IMAGE, "top": {"directoryFileDescriptor": -1}}, 1, "source.top.directoryFileDescriptor"),
        ({"tmpfs": {"size": 4096}, "top": IN_MEMORY}, 0, "source.top"),
        ({"top": IN_MEMORY}, 0, "source"),
        ({"layers": [], "top": IN_MEMORY}, 0, "source.layers"),
        ({"layers": [STORED, {**STORED, "top": IN_MEMORY}]}, 0, "source.layers[1].top"),
        ({"layers": [{**STORED, "top": IN_MEMORY}], "top": IN_MEMORY}, 0, "source.layers[0].top"),
    ],
)
def test_no_top(fds: list[OwnedFd], source: dict[str, Any], count: int, parameter: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        request(fds, count, source)
    assert caught.value.parameters["parameter"] == parameter


@pytest.mark.parametrize("wish", [{"readOnly": True}, {"readOnly": None}, {"options": ["ro"]}])
def test_it_is_there_to_be_written_to(fds: list[OwnedFd], wish: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match="readOnly"):
        request(fds, 1, {**IMAGE, "top": IN_MEMORY}, **wish)


def test_it_makes_an_overlay(fds: list[OwnedFd]) -> None:
    with pytest.raises(InvalidParameter, match="fileSystemType"):
        request(fds, 1, {**IMAGE, "top": IN_MEMORY}, fileSystemType="erofs")
    for source, count in (({"layers": [STORED] * 2}, 0), ({"composefs": OBJECTS}, 2)):
        with pytest.raises(NotSupported) as caught:
            request(fds, count, source)
        assert "source.top" in (caught.value.hint or "")


numbers = st.none() | st.integers(-2, 3) | st.integers()
tops = st.fixed_dictionaries(
    {}, optional={name: numbers for name in ("sizeBytes", "inodes", "directoryFileDescriptor")}
)
sources = st.sampled_from([IMAGE, STORED, {"layers": [IMAGE, STORED]}, {"layers": [STORED]}, {}])


@given(source=sources, top=tops, count=st.integers(0, 3), read_only=st.none() | st.booleans())
def test_whatever_it_says(
    fds: list[OwnedFd], source: dict[str, Any], top: dict[str, Any], count: int, read_only: bool | None
) -> None:
    """It is one request with one top, or the error names what is wrong."""
    try:
        found = request(fds, count, {**source, "top": top}, readOnly=read_only)
    except InvalidParameter:
        return
    assert found.top is not None
    assert (found.top.tmpfs is None) is not (found.top.directory_fd is None)
    assert found.top.tmpfs is None or found.top.tmpfs.size > 0
    assert found.layers
    assert all(layer.wishes.read_only and layer.top is None for layer in found.layers)
