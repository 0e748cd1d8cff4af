"""io.systemd.MountFileSystem.MountImage: every error."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mountd.fds import OwnedFd, close_all
from tests.container import RANGE, USER, user_namespace
from tests.daemon import Daemon
from tests.disks import Part, build_disk
from tests.e2e.mountfs.calls import INTERFACE, PARAMETER, PERMISSION, refusal

HASH = "0" * 64
# What is handed over, what is said about it, the error, and its parameter or a part of its reason.
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("erofs", {"verityRootHash": HASH}, PARAMETER, "verityDataFileDescriptor"),
    ("erofs+erofs", {"verityDataFileDescriptor": 1}, PARAMETER, "verityDataFileDescriptor"),
    ("erofs", {"verityRootHashSignature": "AAAA"}, PARAMETER, "verityRootHashSignature"),
    ("erofs+erofs", {"verityDataFileDescriptor": 1, "verityRootHash": "xy"}, PARAMETER, "verityRootHash"),
    ("erofs+erofs", {"verityDataFileDescriptor": 1, "verityRootHash": "ab"}, PARAMETER, "verityRootHash"),
    ("path", {}, f"{INTERFACE}.BadFileDescriptorFlags", "imageFileDescriptor"),
    ("append", {}, f"{INTERFACE}.BadFileDescriptorFlags", "imageFileDescriptor"),
    ("path+path", {"verityRootHash": HASH}, PARAMETER, "verityDataFileDescriptor"),
    ("path+pipe", {"userNamespaceFileDescriptor": 1}, f"{INTERFACE}.BadFileDescriptorFlags", "imageFileDe"),
    ("write", {}, "io.systemd.System", "writing only"),
    ("erofs+pipe", {"userNamespaceFileDescriptor": 1}, PARAMETER, "userNamespaceFileDescriptor"),
    (
        "erofs+path",
        {"userNamespaceFileDescriptor": 1},
        f"{INTERFACE}.BadFileDescriptorFlags",
        "userNamespaceFileDescriptor",
    ),
    ("erofs+mount", {"userNamespaceFileDescriptor": 1}, PARAMETER, "userNamespaceFileDescriptor"),
    ("erofs+others", {"userNamespaceFileDescriptor": 1}, PARAMETER, "userNamespaceFileDescriptor"),
    ("erofs", {"userNamespaceFileDescriptor": 0}, PARAMETER, "userNamespaceFileDescriptor"),
    ("erofs", {"imageFileDescriptor": 1}, PARAMETER, "imageFileDescriptor"),
    ("erofs", {"imageFileDescriptor": -1}, PARAMETER, "imageFileDescriptor"),
    ("erofs+erofs", {}, PARAMETER, "fileDescriptors"),
    ("erofs", {"imagePolicy": "root=what"}, PARAMETER, "imagePolicy"),
    ("erofs", {"mountOptions": {"attic": "ro"}}, PARAMETER, "mountOptions"),
    ("erofs", {"mountOptions": {"root": "acl"}}, PERMISSION, "acl"),
    ("erofs", {"nothing": 1}, PARAMETER, "nothing"),
    ("erofs", {"imagePolicy": "root=verity"}, f"{INTERFACE}.DeniedByImagePolicy", "own imagePolicy"),
    ("erofs", {"imagePolicy": "~"}, f"{INTERFACE}.DeniedByImagePolicy", "own imagePolicy"),
    ("elsewhere", {}, f"{INTERFACE}.DeniedByImagePolicy", "directory that a rule trusts"),
    ("noise", {}, f"{INTERFACE}.IncompatibleImage", ""),
    ("rootless", {}, f"{INTERFACE}.RootPartitionNotFound", "neither a root"),
]


@pytest.fixture(scope="module")
def sources(place: Path, images: dict[str, Path], disk: Path) -> dict[str, Callable[[], int]]:
    noise = place / "trusted/noise.raw"
    noise.write_bytes(bytes(range(256)) * 4096)
    elsewhere = place / "mountfs-elsewhere.raw"
    shutil.copy(images["erofs"], elsewhere)
    os.chown(elsewhere, USER, USER)
    rootless = build_disk(place / "trusted/rootless.raw", [Part("home", images["ext4"])])
    erofs = images["erofs"]

    def pipe() -> int:
        reader, writer = os.pipe()
        os.close(writer)
        return reader

    return {
        "erofs": lambda: os.open(erofs, os.O_RDONLY),
        "path": lambda: os.open(erofs, os.O_PATH),
        "append": lambda: os.open(erofs, os.O_RDWR | os.O_APPEND),
        "write": lambda: os.open(erofs, os.O_WRONLY),
        "directory": lambda: os.open(place, os.O_RDONLY | os.O_DIRECTORY),
        "pipe": pipe,
        "mount": lambda: os.open("/proc/self/ns/mnt", os.O_RDONLY),
        "others": lambda: user_namespace(RANGE, owner=USER + 1).take(),
        "elsewhere": lambda: os.open(elsewhere, os.O_RDONLY),
        "noise": lambda: os.open(noise, os.O_RDONLY),
        "rootless": lambda: os.open(rootless, os.O_RDONLY),
    }


@pytest.mark.parametrize(("what", "fields", "error", "text"), REFUSED)
def test_image_refused(
    serving: Daemon,
    sources: dict[str, Callable[[], int]],
    what: str,
    fields: dict[str, Any],
    error: str,
    text: str,
) -> None:
    fds = [OwnedFd(sources[each]()) for each in what.split("+")]
    try:
        wishes = {"imageFileDescriptor": 0, **fields}
        name, parameters = refusal(serving, "MountImage", [fd.fileno() for fd in fds], **wishes)
        assert name == error, parameters
        assert parameters["reason"]
        said = parameters.get("parameter", parameters["reason"])
        assert text in said, parameters
        if name == "io.systemd.System":
            assert (parameters["errno"], parameters["errnoName"], parameters["origin"]) == (
                9,
                "EBADF",
                "linux",
            )
    finally:
        close_all(fds)


def test_one_descriptor_for_two(serving: Daemon, sources: dict[str, Callable[[], int]]) -> None:
    wishes = {"verityDataFileDescriptor": 0, "verityRootHash": HASH}
    with OwnedFd(sources["erofs"]()) as fd:
        name, parameters = refusal(serving, "MountImage", [fd.fileno()], imageFileDescriptor=0, **wishes)
        assert name == PARAMETER
        assert "descriptor 0 is imageFileDescriptor already" in parameters["reason"]
        name, parameters = refusal(serving, "MountImage", [fd.fileno()], imageFileDescriptor=1)
        assert "no descriptor 1, only 1 came along" in parameters["reason"]
