"""What io.mountd.Images refuses, and what is left of an import that comes to no end."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.errors import (
    BadFileDescriptor,
    DeniedByPolicy,
    InvalidImage,
    InvalidParameter,
    KeyUnknown,
    MountdError,
    NotFound,
)
from mountd.fds import OwnedFd
from mountd.kernel import sockets
from mountd.store.store import Store
from mountd.wire.framing import encode
from tests.daemon import Daemon
from tests.e2e.stored import IMAGES, MIB, call, import_file, mount
from tests.fuse import Fuse


class TestRefused:
    def test_descriptors(self, daemon: Daemon, images: dict[str, Path], place: Path, clean: Store) -> None:
        with contextlib.ExitStack() as stack:
            for flags, path in (
                (os.O_PATH, images["erofs"]),
                (os.O_WRONLY, images["erofs"]),
                (os.O_RDONLY | os.O_DIRECTORY, place),
                (os.O_RDONLY, Path("/dev/zero")),
            ):
                fd = stack.enter_context(OwnedFd(os.open(path, flags | os.O_CLOEXEC)))
                with pytest.raises(BadFileDescriptor):
                    call(daemon, "Import", (fd.fileno(),), imageFileDescriptor=0)
        with pytest.raises(InvalidParameter):
            call(daemon, "Import", imageFileDescriptor=0)
        with images["erofs"].open("rb") as file, pytest.raises(InvalidParameter):
            call(daemon, "List", (file.fileno(),))

    def test_a_file_of_fuse(self, daemon: Daemon, place: Path, clean: Store) -> None:
        with (
            Fuse(place / "fuse", b"x" * 4096) as fuse,
            fuse.path.open("rb") as file,
            pytest.raises(BadFileDescriptor, match="FUSE"),
        ):
            call(daemon, "Import", (file.fileno(),), imageFileDescriptor=0)

    def test_8_eib(self, daemon: Daemon, place: Path, clean: Store) -> None:
        with OwnedFd(os.memfd_create("image", os.MFD_CLOEXEC)) as fd:
            os.ftruncate(fd.fileno(), (1 << 63) - 1)
            with pytest.raises(MountdError, match="at most .* bytes in an image"):
                call(daemon, "Import", (fd.fileno(),), imageFileDescriptor=0)

    @pytest.mark.parametrize(
        ("method", "parameters"),
        [
            ("Inspect", {"digest": "sha256:../../lock"}),
            ("Verify", {"digest": ""}),
            ("Remove", {"digest": "stored:x"}),
            ("CollectGarbage", {"maximumAge": -1}),
            ("List", {"after": "x"}),
        ],
    )
    def test_parameters(self, daemon: Daemon, method: str, parameters: dict[str, object]) -> None:
        with pytest.raises(InvalidParameter):
            call(daemon, method, **parameters)

    @pytest.mark.parametrize(
        ("field", "value", "error"),
        [
            ("name", "two\nlines", InvalidParameter),
            ("name", "", InvalidParameter),
            ("signature", "not base64!", InvalidParameter),
            ("signature", "A" * 400_000, InvalidParameter),
        ],
    )
    def test_fields(
        self,
        daemon: Daemon,
        images: dict[str, Path],
        clean: Store,
        field: str,
        value: str,
        error: type[MountdError],
    ) -> None:
        with pytest.raises(error, match=field):
            import_file(daemon, images["erofs"], **{field: value})
        assert list(clean.records()) == []

    def test_a_signature_without_a_key(self, daemon: Daemon, images: dict[str, Path], clean: Store) -> None:
        with pytest.raises(KeyUnknown, match="the policy has no keys"):
            import_file(daemon, images["erofs"], signature=base64.b64encode(b"x").decode())
        assert list(clean.records()) == []

    def test_a_damaged_image(
        self, daemon: Daemon, images: dict[str, Path], place: Path, clean: Store
    ) -> None:
        path = place / "damaged"
        path.write_bytes(images["erofs"].read_bytes()[:8192])
        with pytest.raises(InvalidImage):
            import_file(daemon, path)
        assert list(clean.records()) == []
        path.write_bytes(b"no file system at all" * 500)
        assert "fileSystem" not in import_file(daemon, path)

    def test_without_a_store(
        self, start: Callable[..., Daemon], place: Path, images: dict[str, Path]
    ) -> None:
        """The daemon serves mounts all the same."""
        (place / "a file").write_text("")
        daemon = start("", "--state-dir", str(place / "a file"))
        with pytest.raises(NotFound, match="the store"):
            call(daemon, "List")
        with pytest.raises(DeniedByPolicy):
            mount(daemon, str(images["erofs"]))
        assert "there is no store" in daemon.log


def test_an_abandoned_import_leaves_nothing(
    daemon: Daemon, place: Path, images: dict[str, Path], clean: Store
) -> None:
    path = place / "large"
    with path.open("wb") as file:
        file.truncate(2048 * MIB)
    incoming = daemon.directory / "state/incoming"
    with path.open("rb") as file, Client(str(daemon.socket)) as client:
        owned = [OwnedFd(os.dup(file.fileno()))]
        steps = client.call_more(f"{IMAGES}.Import", {"imageFileDescriptor": 0}, owned)
        assert "progress" in next(steps)
        assert len(list(incoming.iterdir())) == 1
        owned[0].close()
    gone(incoming)
    path.unlink()
    assert list(clean.records()) == []


def gone(incoming: Path) -> None:
    deadline = time.monotonic() + 5
    while list(incoming.iterdir()):
        assert time.monotonic() < deadline, list(incoming.iterdir())
        time.sleep(0.02)


def test_who_does_not_read_progress_gets_the_image(
    daemon: Daemon, images: dict[str, Path], clean: Store
) -> None:
    with (
        contextlib.closing(sockets.connect(str(daemon.socket), 10)) as connection,
        images["ext4"].open("rb") as file,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        body = {"method": f"{IMAGES}.Import", "parameters": {"imageFileDescriptor": 0}, "more": True}
        with OwnedFd(os.dup(file.fileno())) as fd:
            sockets.send(connection, encode(body), [fd])
        deadline = time.monotonic() + 10
        while not list(clean.records()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        data = b""
        while b'"image"' not in data or not data.endswith(b"\0"):
            data += connection.recv(65536)
        *steps, last = [json.loads(each) for each in data.split(b"\0")[:-1]]
        assert all(step["continues"] for step in steps)
        assert not last.get("continues")


def test_a_killed_worker_leaves_nothing(start: Callable[..., Daemon], place: Path) -> None:
    daemon = start("")
    path = place / "large"
    with path.open("wb") as file:
        file.truncate(4096 * MIB)
    incoming = daemon.directory / "state/incoming"
    with path.open("rb") as file, Client(str(daemon.socket)) as client:
        with OwnedFd(os.dup(file.fileno())) as fd:
            steps = client.call_more(f"{IMAGES}.Import", {"imageFileDescriptor": 0}, [fd])
            next(steps)
        for pid in daemon.workers:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(MountdError, match="its process ended"):
            list(steps)
    assert len(list(incoming.iterdir())) == 1
    # The next import sweeps, and so does the next start.
    (place / "small").write_bytes(b"x" * 5000)
    import_file(daemon, place / "small")
    gone(incoming)
    path.unlink()
