"""mountd.client as programs use it."""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
import textwrap
import threading
from pathlib import Path

import pytest

from mountd import client
from mountd.client import Client, attach, mount_image
from mountd.errors import DeniedByPolicy, NotFound, OptionNotPermitted, ProtocolError, Unreachable
from tests.container import in_container
from tests.daemon import Daemon


@pytest.fixture
def target(place: Path) -> Path:
    path = place / "client target"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(autouse=True)
def _environment(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOUNTD_SOCKET", str(daemon.socket))


def test_examples_of_the_documentation(images: dict[str, Path], target: Path, containers: None) -> None:
    blocks = [part for part in inspect.getdoc(client).split("\n\n") if part.startswith("    ")]  # type: ignore[union-attr]
    assert len(blocks) == 2
    names = {"/var/lib/machines/base.raw": str(images["erofs"]), "/mnt": str(target)}

    def work() -> list[str]:
        texts = []
        for block in blocks:
            program = textwrap.dedent(block)
            for name, path in names.items():
                assert name in program
                program = program.replace(name, path)
            exec(program, dict(vars(client)))
            texts.append((target / "hello").read_text())
        return texts

    assert in_container(work) == ["hello from the image\n"] * 2


def test_mount_image_says_what_was_decided_and_leaves_no_descriptor(
    images: dict[str, Path], target: Path, containers: None
) -> None:
    def work() -> object:
        before = os.listdir("/proc/self/fd")
        reply = mount_image(images["squashfs"], target, file_system_type="squashfs", options=["noexec"])
        return reply.mount.closed, reply.decision["rule"], os.listdir("/proc/self/fd") == before

    assert in_container(work) == (True, "trusted in the test", True)


@pytest.mark.parametrize(
    ("source", "wishes", "error"),
    [
        ("/nowhere", {}, NotFound),
        ("tmpfs:1G", {}, DeniedByPolicy),
        ("IMAGE", {"options": ["\udcff"]}, OptionNotPermitted),
        ("IMAGE", {"options": ["bogus"]}, OptionNotPermitted),
        ("/etc/passwd", {"read_only": False}, Exception),
    ],
)
def test_errors_leave_nothing_open(
    daemon: Daemon, images: dict[str, Path], source: str, wishes: dict[str, object], error: type[Exception]
) -> None:
    path = str(images["erofs"]) if source == "IMAGE" else source
    with Client() as connection:
        if source == "tmpfs:1G":
            error = Exception  # which limit it is, is the policy's matter
        with pytest.raises(error):
            connection.mount_image(path, **wishes)
        # The connection goes on.
        decision = connection.explain_image(images["erofs"])["decision"]
        assert isinstance(decision, dict)
        assert decision["verdict"] == "allow"


def test_target_is_looked_at_before_anything_is_mounted(daemon: Daemon, images: dict[str, Path]) -> None:
    before = daemon.log
    with pytest.raises(NotFound):
        mount_image(images["erofs"], "/nowhere")
    with pytest.raises(NotADirectoryError):
        mount_image(images["erofs"], "/etc/passwd")
    assert daemon.log == before


def test_attach_names_the_directory(images: dict[str, Path], target: Path) -> None:
    with (
        open(images["erofs"], "rb") as no_mount,
        pytest.raises(OSError, match=r"move_mount\(.*client target\)"),
    ):
        attach(no_mount.fileno(), str(target))


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (b"", Unreachable, "closed the connection without an answer"),
        (b"{", Unreachable, "closed the connection without an answer"),
        (b"{\0", ProtocolError, "not JSON"),
        (b"{}\0", ProtocolError, "the reply is not what Mount returns"),
        (b'{"parameters":{"mounts":[],"decision":{}}}\0', ProtocolError, "not what Mount returns"),
        (b'{"parameters":{"mounts":[1],"decision":{}}}\0', ProtocolError, "not what Mount returns"),
        (b'{"error":"io.mountd.Mount.NotFound","parameters":{"what":"x"}}\0', NotFound, "not found: x"),
    ],
)
def test_daemon_that_talks_nonsense(
    place: Path, answer: bytes, error: type[Exception], text: str, images: dict[str, Path]
) -> None:
    path = str(place / "nonsense")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                _, fds, _, _ = socket.recv_fds(connection, 65536, 4)
                for fd in fds:
                    os.close(fd)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with Client(path) as connection, pytest.raises(error, match=text):
            connection.mount_image(images["erofs"])
        thread.join()
    os.unlink(path)


def test_daemon_that_does_not_answer(place: Path, images: dict[str, Path]) -> None:
    path = str(place / "silent")
    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as waiting:
        listening.bind(path)
        listening.listen(1)
        with Client(path, timeout=0.2) as connection, pytest.raises(Unreachable, match="not answer in time"):
            connection.mount_image(images["erofs"])
        # Nobody accepts: the others wait in the queue, and the last for a place in it.
        waiting.enter_context(Client(path))
        with pytest.raises(Unreachable, match="temporarily unavailable"):
            Client(path, timeout=0.2)
    os.unlink(path)
