"""io.systemd.MountFileSystem.MountImage as its clients call it, and what they get."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from tests.container import RANGE, USER, in_container, user_namespace
from tests.daemon import Daemon
from tests.disks import MIB, Part
from tests.e2e.calls import errno_of
from tests.e2e.mountfs.calls import INTERFACE, PARAMETER, asked, connect_as, hello, opened, refusal
from tests.e2e.trust import memfd
from tests.e2e.trust import rule as signed_rule
from tests.rogue import Raw, call
from tests.signing import Signatory
from tests.superblock import superblock

SEALS_OF_IMAGE = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def uuid_of(image: Path) -> dict[str, str]:
    """What clients are told of the UUID of its file system."""
    command = ["blkid", "--probe", "--match-tag", "UUID", "--output", "value", image]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {"imageUuid": found} if found else {}


@pytest.mark.parametrize("type", ["erofs", "ext4", "squashfs"])
def test_an_image_without_partitions(serving: Daemon, images: dict[str, Path], type: str) -> None:
    with contextlib.ExitStack() as stack:
        fd = opened(stack, images[type])
        reply, fds = stack.enter_context(asked(serving, "MountImage", [fd], imageFileDescriptor=0))
        (mount,) = fds
        size = images[type].stat().st_size
        assert reply == {
            "partitions": [
                {
                    "designator": "root",
                    "writable": False,
                    "growFileSystem": False,
                    "fileSystemType": type,
                    "size": size,
                    "offset": 0,
                    "mountFileDescriptor": 0,
                    "mountPoint": ["/"],
                }
            ],
            "singleFileSystem": True,
            "imagePolicy": "*",
            "imageSize": size,
            "sectorSize": 512,
            "imageName": type,
            **uuid_of(images[type]),
        }
        assert ("imageUuid" in reply) is (type != "squashfs")
        assert hello(mount)
        flags = os.fstatvfs(mount.fileno()).f_flag
        assert flags & os.ST_NOSUID
        assert flags & os.ST_RDONLY


def test_an_image_with_partitions(serving: Daemon, disk: Path) -> None:
    with contextlib.ExitStack() as stack:
        fd = opened(stack, disk, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        reply, fds = stack.enter_context(
            asked(serving, "MountImage", [fd], imageFileDescriptor=0, imagePolicy="root=open:home=open")
        )
        assert reply["singleFileSystem"] is False
        assert reply["imagePolicy"] == "root=open:home=open"
        assert reply["imageName"] == "disk-of-mountfs"
        root, home = reply["partitions"]
        assert (root["designator"], root["fileSystemType"], root["partitionLabel"]) == (
            "root",
            "erofs",
            "os",
        )
        assert (home["designator"], home["mountPoint"], home["partitionNumber"]) == ("home", ["/home"], 1)
        assert (root["architecture"], "architecture" in home) == (Part("root").architecture, False)
        assert home["offset"] == MIB
        assert len(root["partitionUuid"]) == len(reply["imageUuid"]) == 36
        assert [hello(each) != "" for each in fds] == [True, True]


def test_for_a_user_namespace(serving: Daemon, images: dict[str, Path], containers: None) -> None:
    """There is no nsresourced: then nobody has to be told. The host's namespace is none."""
    with contextlib.ExitStack() as stack:
        userns = stack.enter_context(user_namespace(RANGE, owner=USER)).fileno()
        fds = [opened(stack, images["ext4"]), userns]
        wishes = {"imageFileDescriptor": 0, "userNamespaceFileDescriptor": 1}
        _, (mount,) = stack.enter_context(asked(serving, "MountImage", fds, **wishes))
        assert os.fstat(mount.fileno()).st_uid == RANGE[0][1]
        lift = (MountAttr.RDONLY, MountAttr.NOSUID, MountAttr.NODEV)

        def work() -> list[str]:
            fd = mount.fileno()
            return [errno_of(lambda each=each: mount_api.mount_setattr(fd, clear=each)) for each in lift]  # type: ignore[misc]

        assert in_container(work) == ["EPERM"] * 3
        fds[1] = opened(stack, "/proc/self/ns/user")
        _, (mount,) = stack.enter_context(asked(serving, "MountImage", fds, **wishes))
        assert os.fstat(mount.fileno()).st_uid == 0


@pytest.mark.parametrize(
    ("access", "read_only", "writable"),
    [
        (os.O_RDWR, False, True),
        (os.O_RDWR, None, True),
        (os.O_RDONLY, False, False),
    ],
)
def test_who_may_write(
    serving: Daemon,
    place: Path,
    images: dict[str, Path],
    access: int,
    read_only: bool | None,
    writable: bool,
) -> None:
    """`readOnly` is what it says, and the descriptor is what proves that one may write."""
    image = place / "mountfs-writable/ext4.raw"
    shutil.copy(images["ext4"], image)
    with contextlib.ExitStack() as stack:
        fd = opened(stack, image, access)
        wishes = {"imageFileDescriptor": 0, "readOnly": read_only}
        reply, (mount,) = stack.enter_context(asked(serving, "MountImage", [fd], **wishes))
        assert reply["partitions"][0]["writable"] is writable
        assert bool(os.fstatvfs(mount.fileno()).f_flag & os.ST_RDONLY) is not writable


def test_bytes_that_cannot_change_are_read_only_whatever_is_wished(
    serving: Daemon, images: dict[str, Path]
) -> None:
    """A client may wish to write where it cannot: the reply says so."""
    with contextlib.ExitStack() as stack:
        fds = [stack.enter_context(memfd(images["squashfs"].read_bytes(), SEALS_OF_IMAGE))]
        wishes: dict[str, Any] = {"imageFileDescriptor": 0, "readOnly": False}
        reply, (mount,) = stack.enter_context(asked(serving, "MountImage", fds, **wishes))
        assert reply["partitions"][0]["writable"] is False
        assert "imageName" in reply
        assert hello(mount)
        fds = [stack.enter_context(memfd(images["squashfs"].read_bytes(), 0))]
        assert refusal(serving, "MountImage", fds, **wishes)[0] == f"{INTERFACE}.DeniedByImagePolicy"
        fds = [opened(stack, images["ext4"], os.O_RDWR)]
        name, said = refusal(serving, "MountImage", fds, **wishes)
        assert name == f"{INTERFACE}.DeniedByImagePolicy"
        assert "open the image read-only" in said["hint"]


def test_root_hashes(start: Callable[..., Daemon], place: Path, images: dict[str, Path]) -> None:
    """Which are signed with which key is found out before the kernel sees any of it."""
    keys = place / "mountfs-keys"
    keys.mkdir()
    own, foreign = (Signatory(keys, name) for name in ("mountfs-own", "mountfs-foreign"))
    image, tree, digits = images["erofs"], place / "mountfs-verified.tree", "ab" * 32
    blocks = image.stat().st_size // 4096
    tree.write_bytes(superblock(data_blocks=blocks).ljust((blocks // 64 + 8) * 4096, b"\0"))
    shutil.copy(own.pem, keys / "key.pem")
    policy = f'[key.one]\nx509 = "{keys}/key.pem"\n' + signed_rule("signed", 'signed = "one"', '"dm-verity"')
    socket_path = place / "mountfs-signed"
    daemon = start(policy, "--mountfs-socket", str(socket_path))

    def error(root_hash: str, signature: bytes | None) -> str:
        with contextlib.ExitStack() as stack, Raw(daemon, fd=connect_as(socket_path)) as raw:
            fields: dict[str, Any] = {"verityDataFileDescriptor": 1, "verityRootHash": root_hash}
            if signature is not None:
                fields["verityRootHashSignature"] = base64.b64encode(signature).decode()
            fds = [opened(stack, image), opened(stack, tree)]
            raw.send(call(f"{INTERFACE}.MountImage", {"imageFileDescriptor": 0, **fields}), fds)
            reply = raw.reply()
            assert reply is not None
            return f"{reply.get('error')} {reply['parameters'].get('parameter', '')}".strip()

    assert error(digits, foreign.cms(digits.encode())) == f"{INTERFACE}.KeyNotFound"
    assert error(digits, own.cms(b"0" * 64)) == f"{INTERFACE}.VerityFailure"
    assert error(digits.upper(), b"nonsense") == f"{INTERFACE}.VerityFailure"
    assert error(digits, None) == f"{INTERFACE}.DeniedByImagePolicy"
    assert error("ab" * 64, own.cms(digits.encode())) == f"{PARAMETER} verityRootHash"
    # What is right gets as far as the kernel, which may have no dm-verity, or finds that it does not fit.
    named = {f"{INTERFACE}.{name}" for name in ("KeyNotFound", "VerityFailure", "DeniedByImagePolicy")}
    assert error(digits, own.cms(digits.encode())) not in named


def test_options(serving: Daemon, images: dict[str, Path]) -> None:
    with contextlib.ExitStack() as stack:
        fds = [opened(stack, images["ext4"])]
        options = {"root": "noexec,nosuid"}
        _, (mount,) = stack.enter_context(
            asked(serving, "MountImage", fds, imageFileDescriptor=0, mountOptions=options)
        )
        assert os.fstatvfs(mount.fileno()).f_flag & os.ST_NOEXEC
