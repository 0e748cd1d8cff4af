"""Taking mounts back from somebody who would rather keep them, and has mounted something in the way."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from mountd.kernel import mount_api
from mountd.kernel.child import end_with_parent
from mountd.kernel.flags import OpenTree
from mountd.kernel.libc import call
from mountd.kernel.mount_info import mount_id
from tests.container import USER, staying_in_container
from tests.daemon import Daemon
from tests.e2e.attaching import User, granting, id_at, user_of
from tests.e2e.calls import mounted
from tests.e2e.conftest import TMPFS_RULE, trusting
from tests.e2e.test_list import listed, wait_for
from tests.e2e.test_revoke import revoke
from tests.fuse import IN_HEADER, NEVER_ANSWERED, OUT_HEADER, Op

ALICE = 4281
CALLS = 8  # of which each gets further, where the one before had no more time
HELLO = "m/hello"
FUSE = "/dev/fuse"
ATTRIBUTES = struct.Struct("=6Q10I")


def tmpfs(path: str) -> None:
    call("mount", b"t", path.encode(), b"tmpfs", 0, b"")


@contextlib.contextmanager
def holder(daemon: Daemon, image: Path, hide: Callable[[], int]) -> Iterator[tuple[int, Callable[[], bool]]]:
    """A container that has the image at /mnt/sub/m and something in the way; its id, and whether it is read.

    `hide` returns a descriptor of a directory that the image is seen below by the holder, as `HELLO`.
    """

    def work(theirs: socket.socket) -> None:
        tmpfs("/mnt")
        os.makedirs("/mnt/sub/m")
        with mounted(daemon.socket, image, userns="/proc/self/ns/user") as reply:
            mount_api.move_mount(reply.mount.fileno(), "/mnt/sub/m")
            id = mount_id(reply.mount.fileno())
        sub = hide()
        theirs.send(str(id).encode())
        while theirs.recv(1):
            try:
                os.stat(HELLO, dir_fd=sub)
                theirs.send(b"y")
            except OSError:
                theirs.send(b"n")

    with staying_in_container(work) as ours:
        yield int(ours.recv(100)), lambda: is_read(ours)


def is_read(asking: socket.socket) -> bool:
    asking.send(b"?")
    return asking.recv(1) == b"y"


def directory(path: str = "/mnt/sub") -> int:
    return os.open(path, os.O_PATH)


def over_itself() -> int:
    sub = directory()
    with mount_api.clone_mount("/mnt/sub/m") as copy:  # so that the holder still sees it somewhere
        os.mkdir("/mnt/sub/n")
        mount_api.move_mount(copy.fileno(), "/mnt/sub/n")
    tmpfs("/mnt/sub/m")
    tmpfs("/mnt/sub/n")
    return sub


def over_the_parent() -> int:
    sub = directory()
    tmpfs("/mnt/sub")
    return sub


def over_the_root() -> int:
    sub = directory()
    tmpfs("/")
    return sub


def over_everything() -> int:
    sub = directory()
    for path in ("/mnt/sub", "/mnt", "/"):
        for _ in range(20):
            tmpfs(path)
    return sub


def deep_below() -> int:
    """More mounts on one another than there is time to climb down, and the image on the top of them."""
    sub = directory()
    for _ in range(4000):
        with mount_api.clone_mount("/mnt/sub") as copy:
            mount_api.move_mount(copy.fileno(), "/mnt/sub")
    with mount_api.open_tree(sub, "m", OpenTree.CLONE) as copy:
        mount_api.move_mount(copy.fileno(), "/mnt/sub/m")
    return directory()


@pytest.fixture
def fuse_for_all() -> Iterator[None]:
    """The device as systemd-tmpfiles leaves it on every system that it has been started on."""
    mode = os.stat(FUSE).st_mode
    os.chmod(FUSE, 0o666)
    yield
    os.chmod(FUSE, mode)


HIDES = [over_itself, over_the_parent, over_the_root, over_everything, deep_below]


@pytest.fixture
def serving(start: Callable[..., Daemon], images: dict[str, Path]) -> Daemon:
    return start(trusting(images["erofs"].parent))


@pytest.mark.parametrize("hide", HIDES)
def test_what_is_mounted_over_it_goes_first(
    serving: Daemon, images: dict[str, Path], containers: None, hide: Callable[[], int]
) -> None:
    with holder(serving, images["erofs"], hide) as (id, is_read):
        if hide is not over_itself:
            assert is_read()
        reply = revoke(serving, id=id)
        detached = reply["detached"]
        for _ in range(CALLS):
            if not any("no more time" in each["what"] for each in reply["held"]):
                break
            reply = revoke(serving, id=id)
            detached += reply["detached"]
        assert id in {place["id"] for place in detached}
        assert reply["held"] == []
        assert not is_read()
        assert not [each for each in listed(serving, everybody=True) if each["attached"]]
    wait_for(lambda: not listed(serving, everybody=True))


def serve_directories(device: int, silent: int, unanswered: mmap.mmap) -> NoReturn:
    """A FUSE server of directories in directories, which says nothing any more once `silent` can be read.

    What it is asked then becomes the first byte of `unanswered`.
    """
    os.set_blocking(silent, False)
    try:
        end_with_parent()
        while True:
            request = os.read(device, 1 << 17)
            _, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
            if opcode in NEVER_ANSWERED:
                continue
            with contextlib.suppress(BlockingIOError):
                if os.read(silent, 1):
                    unanswered[0] = opcode
                    os.set_blocking(silent, True)
                    os.read(silent, 1)  # until the test ends
            failure, body = 0, b""
            if opcode == Op.INIT:
                body = struct.pack("=IIIIHHIIHHI28x", 7, 31, 65536, 0, 0, 0, 65536, 1, 0, 0, 0)
            elif opcode in (Op.LOOKUP, Op.GETATTR):
                found = node + 1 if opcode == Op.LOOKUP else node
                attributes = ATTRIBUTES.pack(found, *([0] * 8), 0o40755, 2, 0, 0, 0, 4096, 0)
                entry = struct.pack("=QQQQII", found, 0, 0, 0, 0, 0)
                body = (entry if opcode == Op.LOOKUP else bytes(16)) + attributes
            elif opcode == Op.STATFS:
                body = struct.pack("=5Q4I24x", *([0] * 5), 4096, 255, 4096, 0)
            else:
                failure = 38  # ENOSYS
            os.write(device, OUT_HEADER.pack(OUT_HEADER.size + len(body), -failure, unique) + body)
    finally:
        os._exit(0)


@contextlib.contextmanager
def below_a_server(
    daemon: Daemon, images: dict[str, Path], *, overlay: bool
) -> Iterator[tuple[int, int, Callable[[], bool], mmap.mmap]]:
    """A container with an image below its own silent FUSE, or an overlay over that, and one at /mnt/o.

    Yields the ids of both, whether the second is read, and what the server has been asked and is silent on.
    """
    unanswered = mmap.mmap(-1, 1)

    def work(theirs: socket.socket) -> None:
        tmpfs("/mnt")
        for name in ("f", "o", "w", "l", "l/d"):
            os.mkdir(f"/mnt/{name}")
        device = os.open(FUSE, os.O_RDWR)
        reader, writer = os.pipe()
        # An overlay judges by the mode that the root directory has when it is mounted: nobody has asked the
        # server for it by then.
        options = f"fd={device},rootmode=40755,user_id=0,group_id=0"
        call("mount", b"test", b"/mnt/f", b"fuse", 0, options.encode())
        if os.fork() == 0:
            os.close(writer)
            serve_directories(device, reader, unanswered)
        os.close(device)
        os.close(reader)
        if overlay:
            call("mount", b"o", b"/mnt/w", b"overlay", 0, b"lowerdir=/mnt/f:/mnt/l,userxattr")
        below = "/mnt/w/d" if overlay else "/mnt/f/d"
        with (
            mounted(daemon.socket, images["squashfs"], userns="/proc/self/ns/user") as other,
            mounted(daemon.socket, images["erofs"], userns="/proc/self/ns/user") as reply,
        ):
            mount_api.move_mount(reply.mount.fileno(), below)
            mount_api.move_mount(other.mount.fileno(), "/mnt/o")
            ids = [mount_id(each.mount.fileno()) for each in (reply, other)]
        os.write(writer, b"s")
        theirs.send(" ".join(map(str, ids)).encode())
        while theirs.recv(1):
            theirs.send(b"y" if os.path.exists("/mnt/o/hello") else b"n")

    with staying_in_container(work) as ours:
        one, other = map(int, ours.recv(100).split())
        yield one, other, lambda: is_read(ours), unanswered


def test_a_server_that_is_silent_is_not_asked(
    serving: Daemon, images: dict[str, Path], containers: None, fuse_for_all: None
) -> None:
    with below_a_server(serving, images, overlay=False) as (one, other, is_read, unanswered):
        assert is_read()
        reply = revoke(serving, uid=USER)
        assert {place["id"] for place in reply["detached"]} >= {one, other}
        assert reply["held"] == []
        assert not is_read()
        assert not unanswered[0]
    wait_for(lambda: not listed(serving, everybody=True))


def hung(daemon: Daemon) -> list[int]:
    """The children of the workers, also those that have ended and were not reaped."""
    return [child for worker in daemon.workers for child in daemon.children(worker)]


def test_one_that_has_to_be_asked_holds_up_nothing_else(
    serving: Daemon, images: dict[str, Path], containers: None, fuse_for_all: None
) -> None:
    """What is left is said, with the processes that are to be ended.

    An overlay asks the file system below it with the rights of whoever mounted it, for a visitor as well,
    who asks by a user id that the container maps. That one waits until the server has ended, and mountd is
    rid of it then, whether or not it is asked for something else.
    """
    with below_a_server(serving, images, overlay=True) as (one, other, is_read, unanswered):
        reply = revoke(serving, uid=USER)
        assert [place["id"] for place in reply["detached"]] == [other]
        assert not is_read()
        assert "end the processes there" in reply["held"][0]["what"]
        assert any(each["pid"] for each in reply["held"])
        assert [each["id"] for each in listed(serving, everybody=True)] == [one]
        assert unanswered[0] == Op.LOOKUP
        assert hung(serving)
    wait_for(lambda: not hung(serving))
    wait_for(lambda: not listed(serving, everybody=True))


@pytest.fixture
def alice(place: Path, images: dict[str, Path]) -> Iterator[User]:
    """Somebody who may attach images and a tmpfs below a directory of the host."""

    def policy(grant: str) -> str:
        return trusting(images["erofs"].parent, attach=grant) + TMPFS_RULE.replace(
            "max-size", f"attach = {grant}, max-size"
        )

    with granting(place, "revoke-hidden", policy) as scene:
        yield user_of(*scene, ALICE)


def test_in_the_hosts_namespace_only_what_mountd_has_given_goes(
    alice: User, images: dict[str, Path]
) -> None:
    above = alice.directory("above")
    below = alice.directory("above/below")
    _, text, id = alice.attach(images["erofs"], below)
    assert id, text
    _, text, cover = alice.attach("tmpfs:64K", above)
    assert cover, text
    reply = revoke(alice.daemon, id=id)
    assert [place["id"] for place in reply["detached"]] == [id]
    assert listed(alice.daemon, everybody=True) == []
    for gone in (id, cover):
        assert alice.detach(gone)[0] == "NotFound"
    # What root has mounted there is root's to take away.
    id = alice.attach(images["erofs"], below)[2]
    tmpfs(str(above))
    try:
        roots = id_at(above)
        reply = revoke(alice.daemon, id=id)
        assert reply["detached"] == []
        assert "unmount what is above it" in reply["held"][0]["what"]
        assert id_at(above) == roots
    finally:
        mount_api.umount(str(above))
    assert [place["id"] for place in revoke(alice.daemon, id=id)["detached"]] == [id]
    assert alice.detach(id)[0] == "NotFound"
