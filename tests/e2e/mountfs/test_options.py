"""Mount options by designator: each is for its partition, and for no other."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from mountd.fds import OwnedFd
from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from tests.container import RANGE, USER, in_container, user_namespace
from tests.daemon import Daemon
from tests.disks import Part, build_disk
from tests.e2e.calls import errno_of
from tests.e2e.mountfs.calls import INTERFACE, PARAMETER, PERMISSION, asked, opened, refusal
from tests.images import build_image, build_tree
from tests.rogue import Raw, call

FLAGS = {"noexec": os.ST_NOEXEC, "noatime": os.ST_NOATIME, "nosuid": os.ST_NOSUID, "ro": os.ST_RDONLY}


@pytest.fixture(scope="module")
def ext4(place: Path) -> Path:
    """A file system for partitions."""
    return build_image("ext4", build_tree(place / "options-tree"), place / "options-part.raw")


@pytest.fixture(scope="module")
def writable(place: Path, ext4: Path) -> Path:
    """A disk image of two partitions that may be written to."""
    return build_disk(place / "mountfs-writable/options.raw", [Part("root", ext4), Part("home", ext4)])


def flags_of(mount: OwnedFd) -> set[str]:
    """Those of FLAGS that a mount has."""
    found = os.fstatvfs(mount.fileno()).f_flag
    return {name for name, flag in FLAGS.items() if found & flag}


def flags(
    daemon: Daemon, image: Path, options: dict[str, str], access: int = os.O_RDONLY
) -> dict[str, set[str]]:
    """What the mount of each partition has, beyond nosuid, which all have."""
    with contextlib.ExitStack() as stack:
        wishes: dict[str, Any] = {"imageFileDescriptor": 0, "mountOptions": options}
        reply, fds = stack.enter_context(
            asked(daemon, "MountImage", [opened(stack, image, access)], **wishes)
        )
        found = {
            each["designator"]: flags_of(fds[each["mountFileDescriptor"]]) for each in reply["partitions"]
        }
        for each in reply["partitions"]:
            assert each["writable"] is ("ro" not in found[each["designator"]])
    assert all("nosuid" in each for each in found.values())
    return {name: each - {"nosuid"} for name, each in found.items()}


@pytest.mark.parametrize(
    ("options", "root", "home"),
    [
        ({}, {"ro"}, {"ro"}),
        ({"root": "noexec"}, {"ro", "noexec"}, {"ro"}),
        ({"home": "noexec,noatime"}, {"ro"}, {"ro", "noexec", "noatime"}),
        ({"home": "noexec", "root": "noatime"}, {"ro", "noatime"}, {"ro", "noexec"}),
        # Nothing to be put on is there, or it is never mounted.
        ({"srv": "noexec", "usr": "acl"}, {"ro"}, {"ro"}),
        ({"swap": "noexec", "root_verity": "suid", "usr-verity-sig": "x"}, {"ro"}, {"ro"}),
        ({"root": "", "home": ",,"}, {"ro"}, {"ro"}),
    ],
)
def test_each_is_for_its_partition(
    serving: Daemon, disk: Path, options: dict[str, str], root: set[str], home: set[str]
) -> None:
    assert flags(serving, disk, options) == {"root": root, "home": home}


def test_one_of_two_is_read_only(serving: Daemon, writable: Path) -> None:
    assert flags(serving, writable, {}, os.O_RDWR) == {"root": set(), "home": set()}
    assert flags(serving, writable, {"root": "ro"}, os.O_RDWR) == {"root": {"ro"}, "home": set()}
    assert flags(serving, writable, {"home": "ro,noexec"}, os.O_RDWR) == {
        "root": set(),
        "home": {"ro", "noexec"},
    }
    # With both, it is a read-only mount, which nobody gets who can write to the image meanwhile.
    both: dict[str, Any] = {"imageFileDescriptor": 0, "mountOptions": {"root": "ro", "home": "ro"}}
    with contextlib.ExitStack() as stack:
        name, said = refusal(serving, "MountImage", [opened(stack, writable, os.O_RDWR)], **both)
        assert (name, "O_RDONLY" in said["hint"]) == (f"{INTERFACE}.DeniedByImagePolicy", True)


def test_what_has_no_partitions_is_the_root(serving: Daemon, images: dict[str, Path]) -> None:
    assert flags(serving, images["ext4"], {"root": "noexec"}) == {"root": {"ro", "noexec"}}
    assert flags(serving, images["ext4"], {"home": "noexec", "usr": "suid"}) == {"root": {"ro"}}


def test_they_are_locked(serving: Daemon, disk: Path, containers: None) -> None:
    """As all that a mount has is when it leaves."""
    with contextlib.ExitStack() as stack:
        userns = stack.enter_context(user_namespace(RANGE, owner=USER)).fileno()
        wishes: dict[str, Any] = {
            "imageFileDescriptor": 0,
            "userNamespaceFileDescriptor": 1,
            "mountOptions": {"home": "noexec"},
        }
        fds = [opened(stack, disk), userns]
        _, (root, home) = stack.enter_context(asked(serving, "MountImage", fds, **wishes))
        found = [
            in_container(
                lambda each=each: errno_of(  # type: ignore[misc]
                    lambda: mount_api.mount_setattr(each.fileno(), clear=MountAttr.NOEXEC)
                )
            )
            for each in (root, home)
        ]
        assert found == ["", "EPERM"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"root": "suid"}, PERMISSION, "suid"),
        ({"home": "noexec,dev"}, PERMISSION, "dev"),
        ({"home": "acl"}, PERMISSION, "acl"),
        ({"root": "context=x"}, PERMISSION, "context"),
        ({"root": "noatime,strictatime"}, PERMISSION, "strictatime"),
        ({"home": "rw"}, PERMISSION, "rw"),
        ({"home": "x\ny"}, PERMISSION, "control character"),
        ({"attic": "ro"}, PARAMETER, "no kind of partition"),
        ({"": "ro"}, PARAMETER, "no kind of partition"),
        ({"Root": "ro"}, PARAMETER, "no kind of partition"),
        ({"root-verity": "ro", "root_verity": "rw"}, PARAMETER, "there twice"),
        ({"root": 1}, PARAMETER, ""),
    ],
)
def test_refused(serving: Daemon, disk: Path, options: dict[str, Any], error: str, text: str) -> None:
    """One that is refused is not left out: the image is not mounted at all."""
    with contextlib.ExitStack() as stack:
        wishes: dict[str, Any] = {"imageFileDescriptor": 0, "mountOptions": options}
        name, said = refusal(serving, "MountImage", [opened(stack, disk)], **wishes)
        assert name == error, said
        if name == PARAMETER and text:
            assert said["parameter"] == "mountOptions"
        assert text in said.get("reason", "")


def test_a_grant_is_for_the_type_of_the_partition(
    serving: Daemon, place: Path, ext4: Path, images: dict[str, Path]
) -> None:
    """What one file system may be told, another one is not."""
    image = place / "trusted/options-types.raw"
    build_disk(image, [Part("root", images["squashfs"]), Part("home", ext4)])
    with contextlib.ExitStack() as stack:
        for options, text in (({"root": "acl"}, "squashfs"), ({"home": "errors=continue"}, "ext4")):
            wishes: dict[str, Any] = {"imageFileDescriptor": 0, "mountOptions": options}
            name, said = refusal(serving, "MountImage", [opened(stack, image)], **wishes)
            assert (name, text in said["reason"]) == (PERMISSION, True), said


def test_the_own_interface_has_no_such_field(serving: Daemon, disk: Path) -> None:
    with contextlib.ExitStack() as stack, Raw(serving) as raw:
        parameters = {"source": {"imageFileDescriptor": 0}, "partitionOptions": {"root": ["noexec"]}}
        raw.send(call("io.mountd.Mount.Mount", parameters), [opened(stack, disk)])
        reply = raw.reply()
        assert reply is not None
        assert reply["error"].endswith("InvalidParameter")
        assert reply["parameters"]["parameter"] == "partitionOptions"
