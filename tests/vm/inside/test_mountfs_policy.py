"""The image policy that clients of systemd are told was followed, where dm-verity speaks for an image."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from mountd.client import Client
from mountd.errors import RemoteError
from mountd.fds import OwnedFd, close_all
from tests.container import USER
from tests.daemon import Daemon
from tests.disks import Part, build_disk, protected
from tests.verity import Verified
from tests.vm.inside.test_daemon import Signatory

POLICY = """
[key.team]
x509 = "{keys}/team.crt"

[[rule]]
name = "trusted places"
image = {{ location = "{trusted}/*" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["erofs"] }}
verdict = "allow"

[[rule]]
name = "signed"
image = {{ any = true }}
caller = {{ any = true }}
require = {{ integrity = ["dm-verity"], signature = "team" }}
grant = {{ file-systems = ["erofs"] }}
verdict = "allow"
"""
ONLY_SIGNED = "root=absent+signed+unused:usr=absent+signed+unused"
DENIED = "DeniedByImagePolicy"


@dataclass(frozen=True, slots=True)
class Scene:
    """A daemon with its second socket, who signs, and the same disk image where it is trusted and not."""

    socket: Path
    team: Signatory
    users: Path
    trusted: Path


@pytest.fixture(scope="module")
def scene(scratch: Path, verified: dict[str, Verified]) -> Iterator[Scene]:
    work = scratch / "mountfs-policy"
    for directory in (work, work / "trusted"):
        directory.mkdir(mode=0o755)
    team, source = Signatory("team"), verified["erofs"]
    (work / "team.crt").write_bytes(team.certificate.public_bytes(Encoding.PEM))
    parts = [*protected(source, team.sign(source.root_hash)), Part("home", source.image)]
    users, trusted = (build_disk(path / "disk.raw", parts) for path in (work, work / "trusted"))
    os.chown(users, USER, USER)
    daemon = Daemon(
        work / "daemon",
        POLICY.format(keys=work, trusted=work / "trusted"),
        ["--mountfs-socket", str(work / "socket")],
    )
    yield Scene(work / "socket", team, users, trusted)
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log, daemon.log
    shutil.rmtree(work)


def call(scene: Scene, paths: list[Path], **fields: Any) -> tuple[str, list[str]]:
    """The policy that was followed, and what is mounted; or the error, and nothing."""
    fds = [OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) for path in paths]
    parameters = {"imageFileDescriptor": 0, **fields}
    try:
        with Client(str(scene.socket)) as client:
            reply, mounts = client.call("io.systemd.MountFileSystem.MountImage", parameters, fds)
    except RemoteError as error:
        return error.name.rpartition(".")[2], []
    finally:
        close_all(fds)
    close_all(mounts)
    partitions: Any = reply["partitions"]
    return str(reply["imagePolicy"]), [each["designator"] for each in partitions]


@pytest.mark.parametrize(
    ("wished", "followed"),
    [
        (None, ONLY_SIGNED),
        ("*", ONLY_SIGNED),
        # It was told as “root=”, which everything is allowed by.
        ("root=verity", "root=signed"),
        ("root=signed:home=ignore", "root=signed"),
        ("root=unprotected+verity+absent", "root=absent+signed"),
    ],
)
def test_an_image_that_speaks_for_itself(scene: Scene, wished: str | None, followed: str) -> None:
    assert call(scene, [scene.users], imagePolicy=wished) == (followed, ["root"])
    # What was told has the same mounted once more.
    assert call(scene, [scene.users], imagePolicy=followed) == (followed, ["root"])


@pytest.mark.parametrize("wished", ["root=verity:home=unprotected", "root=encrypted", "", "root=absent"])
def test_what_it_cannot_be_is_refused(scene: Scene, wished: str) -> None:
    assert call(scene, [scene.users], imagePolicy=wished) == (DENIED, [])


def test_an_image_that_is_trusted_for_its_place(scene: Scene) -> None:
    assert call(scene, [scene.trusted]) == ("*", ["root", "home"])
    assert call(scene, [scene.trusted], imagePolicy=" root = verity ") == ("root=verity", ["root"])


def test_hash_data_that_comes_along(scene: Scene, verified: dict[str, Verified]) -> None:
    source = verified["erofs"]
    fields = {
        "verityDataFileDescriptor": 1,
        "verityRootHash": source.root_hash.hex(),
        "verityRootHashSignature": base64.b64encode(scene.team.sign(source.root_hash)).decode(),
    }
    paths = [source.image, source.tree]
    assert call(scene, paths, **fields) == ("root=absent+signed+unused", ["root"])
    assert call(scene, paths, imagePolicy="root=verity:usr=open", **fields) == (
        "root=signed:usr=open",
        ["root"],
    )
    assert call(scene, paths, imagePolicy="root=encrypted", **fields) == (DENIED, [])
