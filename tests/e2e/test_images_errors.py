"""Each error of io.mountd.Images by its name, from the socket: of the disk, the store, a signature."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.errors import (
    InvalidImage,
    KeyUnknown,
    LimitExceeded,
    MountdError,
    NotFound,
    SignatureInvalid,
)
from mountd.fds import OwnedFd
from mountd.store.disk import image_path, record_path
from mountd.store.record import Owner
from mountd.store.store import Store
from mountd.wire.framing import encode
from tests.container import USER, as_user
from tests.daemon import Daemon
from tests.e2e.calls import mount_fds, outcome
from tests.images import build_image, build_tree
from tests.signing import Signatory

IMAGES = "io.mountd.Images"
MIB = 1 << 20
STORED = """
[[rule]]
name = "stored"
image = { any = true }
caller = { any = true }
require = { integrity = ["stored"] }
grant = { file-systems = ["erofs"], idmap = ["none"] }
verdict = "allow"
"""


def call(daemon: Daemon, method: str, fds: tuple[int, ...] = (), **parameters: object) -> dict[str, object]:
    with contextlib.ExitStack() as stack:
        owned = [stack.enter_context(OwnedFd(os.dup(fd))) for fd in fds]
        with Client(str(daemon.socket)) as client:
            return client.call(f"{IMAGES}.{method}", parameters, owned)[0]


def put(daemon: Daemon, path: Path, **parameters: object) -> dict[str, object]:
    with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
        return call(daemon, "Import", (fd.fileno(),), imageFileDescriptor=0, **parameters)


@pytest.fixture(scope="module")
def image(place: Path) -> Path:
    return build_image("erofs", build_tree(place / "tree-errors"), place / "errors.raw")


@pytest.fixture
def stored(start: Callable[..., Daemon], image: Path) -> tuple[Daemon, str]:
    """A daemon with the image in its store, by its digest."""
    daemon = start(STORED)
    found = put(daemon, image)["image"]
    return daemon, str(found["digest"])  # type: ignore[index]


class TestSignature:
    @pytest.fixture
    def keys(self, place: Path) -> Iterator[Path]:
        path = Path(place / "keys-errors")
        path.mkdir(mode=0o755)
        yield path
        for each in path.iterdir():
            each.unlink()
        path.rmdir()

    def test_import(self, start: Callable[..., Daemon], keys: Path, image: Path, place: Path) -> None:
        """What does not hold is no reason to store the image without it."""
        own, foreign = Signatory(keys, "own"), Signatory(keys, "foreign")
        (keys / "own.crt").write_bytes(own.pem.read_bytes())
        daemon = start(f'[key.own]\nx509 = "{keys}/own.crt"\n' + STORED)
        digits = hashlib.sha256(image.read_bytes()).hexdigest().encode()
        good = own.cms(digits)
        for signature, error in (
            (foreign.cms(digits), KeyUnknown),
            (own.cms(b"0" * 64), SignatureInvalid),
            (good[:-10], SignatureInvalid),
            (b"nonsense", SignatureInvalid),
        ):
            with pytest.raises(error):
                put(daemon, image, signature=base64.b64encode(signature).decode())
            assert call(daemon, "List") == {"images": []}
        found = put(daemon, image, signature=base64.b64encode(good).decode())["image"]
        assert [each["key"] for each in found["signers"]] == ["own"]  # type: ignore[index]


class TestDamage:
    """What is wrong in the store is said, and never handed out."""

    def test_another_image_in_its_place(self, stored: tuple[Daemon, str]) -> None:
        daemon, digest = stored
        path = daemon.directory / "state" / image_path(digest)
        size = path.stat().st_size
        with OwnedFd(os.open(path, os.O_WRONLY)) as fd:
            os.pwrite(fd.fileno(), b"x", size - 1)
        with pytest.raises(InvalidImage, match="the store is damaged"):
            call(daemon, "Verify", digest=digest)
        # To mount an image is not to read all of it; its length and whose it is are looked at each time.
        os.truncate(path, size - 1)
        check_mount(daemon, digest, "InvalidImage", f"{size - 1} bytes instead of {size}")
        with pytest.raises(InvalidImage, match=f"{size - 1} bytes instead of {size}"):
            call(daemon, "Verify", digest=digest)

    @pytest.mark.parametrize("how", ["mode", "owner", "linked"])
    def test_a_file_that_is_not_roots_alone(self, stored: tuple[Daemon, str], how: str) -> None:
        daemon, digest = stored
        path = daemon.directory / "state" / image_path(digest)
        if how == "mode":
            path.chmod(0o644)
        elif how == "owner":
            os.chown(path, USER, USER)
        else:
            os.link(path, daemon.directory / "second")
        check_mount(daemon, digest, "InvalidImage", "is not root's alone")
        with pytest.raises(InvalidImage, match="is not root's alone"):
            call(daemon, "Verify", digest=digest)

    def test_a_file_that_is_gone(self, stored: tuple[Daemon, str]) -> None:
        daemon, digest = stored
        (daemon.directory / "state" / image_path(digest)).unlink()
        check_mount(daemon, digest, "NotFound", "")
        with pytest.raises(NotFound):
            call(daemon, "Verify", digest=digest)
        call(daemon, "CollectGarbage")
        assert call(daemon, "List") == {"images": []}

    @pytest.mark.parametrize("contents", [b"", b"{}", b"[" * 5000, b"\xff", b"another"])
    def test_a_record_that_is_none(self, stored: tuple[Daemon, str], contents: bytes) -> None:
        daemon, digest = stored
        path = daemon.directory / "state" / record_path(digest)
        if contents == b"another":
            contents = path.read_bytes().replace(digest.encode(), b"sha256:" + b"0" * 64)
        path.write_bytes(contents)
        for method in ("Inspect", "Verify", "Remove"):
            with pytest.raises(InvalidImage, match="the store is damaged"):
                call(daemon, method, digest=digest)
        check_mount(daemon, digest, "InvalidImage", "the store is damaged")
        assert call(daemon, "List") == {"images": []}
        # It is swept, with its image.
        call(daemon, "CollectGarbage")
        with pytest.raises(NotFound):
            call(daemon, "Inspect", digest=digest)


def check_mount(daemon: Daemon, digest: str, name: str, text: str) -> None:
    source = {"reference": f"stored:{digest}"}
    found = as_user(lambda: outcome(lambda: mount_fds(daemon.socket, source, [])))
    assert (found[0], text in found[1]) == (name, True), found


class TestLimits:
    def test_transfers_at_once(self, stored: tuple[Daemon, str], image: Path) -> None:
        daemon, digest = stored
        store = Store(daemon.directory / "state")
        with contextlib.ExitStack() as slots:
            for _ in range(store.limits.transfers):
                slots.enter_context(store.slot(Owner(0, 0)))
            with pytest.raises(LimitExceeded, match="transfers at the same time"):
                put(daemon, image)
            with pytest.raises(LimitExceeded, match="transfers at the same time"):
                call(daemon, "Verify", digest=digest)
            assert call(daemon, "Inspect", digest=digest)
        assert call(daemon, "Verify", digest=digest)

    def test_transfers_of_one_owner(self, start: Callable[..., Daemon], image: Path) -> None:
        daemon = start(STORED)
        store = Store(daemon.directory / "state")

        def work() -> str:
            return outcome(lambda: put(daemon, image))[0]

        with contextlib.ExitStack() as slots:
            for _ in range(store.limits.owner_transfers):
                slots.enter_context(store.slot(Owner(USER, USER)))
            assert as_user(work) == "LimitExceeded"
            assert as_user(work, uid=USER + 1) == ""
        assert as_user(work) == ""

    def test_images_of_one_owner(self, start: Callable[..., Daemon], image: Path) -> None:
        daemon = start(STORED)
        store = Store(daemon.directory / "state")
        with OwnedFd(os.memfd_create("image", os.MFD_CLOEXEC)) as fd:
            for number in range(store.limits.owner_images):
                os.pwrite(fd.fileno(), number.to_bytes(2), 0)
                store.add(fd.fileno(), 2, Owner(USER, USER))
        found = as_user(lambda: outcome(lambda: put(daemon, image)))
        assert (found[0], "images of one owner" in found[1]) == ("LimitExceeded", True)
        assert put(daemon, image)

    def test_a_full_disk(self, start: Callable[..., Daemon], place: Path, image: Path) -> None:
        disk = place / "small-disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M,mode=0755", "tmpfs", disk], check=True)
        try:
            daemon = start(STORED, "--state-dir", str(disk / "state"))
            large = place / "large-image"
            large.write_bytes(os.urandom(2 * MIB))
            with pytest.raises(LimitExceeded, match="bytes on the disk of the store") as raised:
                put(daemon, large)
            assert "an administrator has to make room" in str(raised.value.hint)
            assert call(daemon, "List") == {"images": []}
            assert list((disk / "state/incoming").iterdir()) == []
            assert put(daemon, image)
            assert daemon.stop() == 0
            large.unlink()
        finally:
            subprocess.run(["umount", disk], check=True)
            disk.rmdir()


METHODS = {
    "Import": {"imageFileDescriptor": 0},
    "List": {},
    "Inspect": {"digest": "sha256:" + "0" * 64},
    "Verify": {"digest": "sha256:" + "0" * 64},
    "Remove": {"digest": "sha256:" + "0" * 64},
    "CollectGarbage": {},
    "Pull": {"reference": "registry.example.com/a:latest"},
}


def declared(daemon: Daemon) -> str:
    """The interface as the daemon itself tells it."""
    with Client(str(daemon.socket)) as client:
        request = {
            "method": "org.varlink.service.GetInterfaceDescription",
            "parameters": {"interface": IMAGES},
        }
        client._socket.sendall(encode(request))
        data = b""
        while not data.endswith(b"\0"):
            data += client._socket.recv(65536)
    return str(json.loads(data[:-1])["parameters"]["description"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "wrong", [{"unknown": 1}, {"digest": 5}, {"name": []}, {"reference": None, "x": {}}]
)
def test_parameters_that_are_none(shared_daemon: Daemon, method: str, wrong: dict[str, object]) -> None:
    with (
        OwnedFd(os.memfd_create("image", os.MFD_CLOEXEC)) as fd,
        pytest.raises(MountdError) as raised,
    ):
        call(shared_daemon, method, (fd.fileno(),), **{**METHODS[method], **wrong})
    assert type(raised.value).__name__ == "InvalidParameter", raised.value


def test_these_are_all_methods(shared_daemon: Daemon) -> None:
    description = declared(shared_daemon)
    lines = [line.strip() for line in description.splitlines()]
    names = {line.split()[1].partition("(")[0] for line in lines if line.startswith("method ")}
    assert names == METHODS.keys()


@pytest.mark.parametrize("method", ["List", "Inspect", "Verify", "Remove", "CollectGarbage", "Pull"])
def test_a_descriptor_that_nobody_asked_for(shared_daemon: Daemon, method: str) -> None:
    with (
        OwnedFd(os.memfd_create("image", os.MFD_CLOEXEC)) as fd,
        pytest.raises(MountdError) as raised,
    ):
        call(shared_daemon, method, (fd.fileno(),), **METHODS[method])
    assert type(raised.value).__name__ == "InvalidParameter", raised.value
