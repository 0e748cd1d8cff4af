"""What a descriptor is of comes first, with the errno that systemd has for it; then flags, then the rest."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mountd.fds import OwnedFd, close_all
from mountd.kernel import loop_device
from tests.container import USER
from tests.daemon import Daemon
from tests.e2e.mountfs.calls import INTERFACE, PARAMETER, asked, opened, refusal
from tests.fuse import Fuse, Op

FLAGS = f"{INTERFACE}.BadFileDescriptorFlags"
SYSTEM = "io.systemd.System"
IMAGE, PARENT = "imageFileDescriptor", "parentFileDescriptor"


@pytest.fixture
def made(place: Path, images: dict[str, Path], home: Path, tmp_path: Path) -> dict[str, Callable[[], int]]:
    """Ways to open one of each kind."""
    (tmp_path / "link").symlink_to("/etc")
    os.mkfifo(tmp_path / "fifo")
    return {
        "file": lambda: os.open(images["erofs"], os.O_RDONLY),
        "path": lambda: os.open(images["erofs"], os.O_PATH),
        "write": lambda: os.open(images["erofs"], os.O_WRONLY),
        "directory": lambda: os.open(home, os.O_RDONLY),
        "O_DIRECTORY": lambda: os.open(home, os.O_RDONLY | os.O_DIRECTORY),
        "link": lambda: os.open(tmp_path / "link", os.O_PATH | os.O_NOFOLLOW),
        "fifo": lambda: os.open(tmp_path / "fifo", os.O_RDWR | os.O_NONBLOCK),
        "socket": lambda: socket.socket(socket.AF_UNIX).detach(),
        "character device": lambda: os.open("/dev/null", os.O_RDONLY),
        "eventfd": lambda: os.eventfd(0, os.EFD_NONBLOCK),
    }


def said(daemon: Daemon, method: str, fds: list[int], **fields: Any) -> tuple[str, str]:
    """The error, and its errno or its parameter."""
    try:
        name, parameters = refusal(daemon, method, fds, **fields)
    finally:
        close_all([OwnedFd(fd) for fd in fds])
    if name == SYSTEM:
        assert parameters["errno"] == getattr(errno, parameters["errnoName"])
        assert parameters["origin"] == "linux"
        assert parameters["reason"]
        return name, parameters["errnoName"]
    return name, parameters["parameter"]


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("directory", (SYSTEM, "EISDIR")),
        # Before its flags.
        ("O_DIRECTORY", (SYSTEM, "EISDIR")),
        ("link", (SYSTEM, "ELOOP")),
        ("fifo", (SYSTEM, "EBADFD")),
        ("socket", (SYSTEM, "EBADFD")),
        ("character device", (SYSTEM, "EBADFD")),
        ("eventfd", (SYSTEM, "EBADFD")),
        ("path", (FLAGS, IMAGE)),
        ("write", (SYSTEM, "EBADF")),
    ],
)
def test_images(
    serving: Daemon, made: dict[str, Callable[[], int]], what: str, error: tuple[str, str]
) -> None:
    assert said(serving, "MountImage", [made[what]()], imageFileDescriptor=0) == error
    # Before the user namespace, which is wrong as well.
    for wrong in ("path", "fifo"):
        fields = {IMAGE: 0, "userNamespaceFileDescriptor": 1}
        assert said(serving, "MountImage", [made[what](), made[wrong]()], **fields) == error
    # After what the fields themselves say.
    bad = {"imagePolicy": "root=x"}
    assert said(serving, "MountImage", [made[what]()], imageFileDescriptor=0, **bad) == (
        PARAMETER,
        "imagePolicy",
    )


def test_a_block_device(serving: Daemon, images: dict[str, Path]) -> None:
    """Which mountd does not take."""
    with contextlib.ExitStack() as stack:
        image = opened(stack, images["erofs"])
        loop = stack.enter_context(contextlib.closing(loop_device.attach(image, read_only=True)))
        assert stat.S_ISBLK(os.fstat(loop.fd.fileno()).st_mode)
        path = f"/proc/self/fd/{loop.fd.fileno()}"
        fds = [os.open(path, os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)]
        fields = {IMAGE: 0, "userNamespaceFileDescriptor": 1}
        assert said(serving, "MountImage", fds, **fields) == (SYSTEM, "EBADFD")


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("file", (SYSTEM, "ENOTDIR")),
        ("path", (SYSTEM, "ENOTDIR")),
        ("write", (SYSTEM, "ENOTDIR")),
        ("link", (SYSTEM, "ELOOP")),
        ("fifo", (SYSTEM, "ENOTDIR")),
        ("eventfd", (SYSTEM, "ENOTDIR")),
    ],
)
def test_directories(
    serving: Daemon, made: dict[str, Callable[[], int]], what: str, error: tuple[str, str]
) -> None:
    fields: dict[str, Any] = {"directoryFileDescriptor": 0}
    assert said(serving, "MountDirectory", [made[what]()], **fields) == error
    fields["userNamespaceFileDescriptor"] = 1
    assert said(serving, "MountDirectory", [made[what](), made["fifo"]()], **fields) == error
    assert said(serving, "MakeDirectory", [made[what]()], parentFileDescriptor=0, name="x") == error


def test_the_field_is_the_one_of_the_method(serving: Daemon, place: Path, home: Path) -> None:
    """Also where it is refused for what mountd alone looks at."""
    with contextlib.ExitStack() as stack:
        fuse = stack.enter_context(Fuse(place / "kinds-fuse", b"x"))
        fuse.silence(Op.GETATTR)

        def on_fuse() -> int:
            return os.open(fuse.target, os.O_PATH | os.O_DIRECTORY)

        parent = {PARENT: 0, "name": "new"}
        assert said(serving, "MakeDirectory", [on_fuse()], **parent) == (PARAMETER, PARENT)
        assert said(serving, "MountDirectory", [on_fuse()], directoryFileDescriptor=0) == (
            PARAMETER,
            "directoryFileDescriptor",
        )
        nonblock = os.open(home, os.O_RDONLY | os.O_NONBLOCK)
        assert said(serving, "MakeDirectory", [nonblock], **parent) == (FLAGS, PARENT)
        assert said(serving, "MakeDirectory", [os.dup(0)], **{**parent, PARENT: 1}) == (PARAMETER, PARENT)


def test_what_is_right_is_mounted(serving: Daemon, made: dict[str, Callable[[], int]]) -> None:
    with contextlib.ExitStack() as stack:
        fds = [stack.enter_context(OwnedFd(made["file"]())).fileno()]
        stack.enter_context(asked(serving, "MountImage", fds, imageFileDescriptor=0))
        fds = [stack.enter_context(OwnedFd(made["directory"]())).fileno()]
        assert os.fstat(fds[0]).st_uid == USER
        stack.enter_context(asked(serving, "MountDirectory", fds, directoryFileDescriptor=0, readOnly=True))
