"""Taking mounts back, wherever they have got to."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mountd.client import Client
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces, sockets
from mountd.kernel.flags import Clone
from mountd.kernel.libc import call
from mountd.kernel.mount_info import mount_id
from tests.container import USER, as_user, in_container, staying_in_container
from tests.daemon import Daemon
from tests.e2e.calls import mounted, outcome, refused
from tests.e2e.conftest import trusting
from tests.e2e.test_list import listed, wait_for
from tests.e2e.test_shared import ask_as


def revoke(daemon: Daemon, **which: object) -> dict[str, Any]:
    with Client(str(daemon.socket)) as client:
        reply, _ = client.call("io.mountd.Admin.Revoke", which, [])
    return reply


@pytest.fixture
def serving(start: Callable[..., Daemon], images: dict[str, Path]) -> Daemon:
    return start(trusting(images["erofs"].parent))


@contextlib.contextmanager
def attached_in_a_container(daemon: Daemon, image: Path) -> Iterator[tuple[int, socket.socket]]:
    """A container, and one in it with a copy of its mounts; the id, and a socket that ends them, or asks.

    Whatever is sent makes it say what is in /mnt of both.
    """

    def work(theirs: socket.socket) -> None:
        with mounted(daemon.socket, image, userns="/proc/self/ns/user") as reply:
            mount_api.move_mount(reply.mount.fileno(), "/mnt")
            id = mount_id(reply.mount.fileno())
        above = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        namespaces.unshare(Clone.NEWNS)
        theirs.send(str(id).encode())
        while theirs.recv(1):
            inner = os.path.exists("/mnt/hello")
            below = os.open("/proc/self/ns/mnt", os.O_RDONLY)
            namespaces.setns(above, Clone.NEWNS)
            outer = os.path.exists("/mnt/hello")
            namespaces.setns(below, Clone.NEWNS)
            os.close(below)
            theirs.send(f"{inner} {outer}".encode())

    with staying_in_container(work) as ours:
        yield int(ours.recv(100)), ours


@pytest.mark.parametrize("by", ["id", "uid"])
def test_detached_everywhere(serving: Daemon, images: dict[str, Path], containers: None, by: str) -> None:
    with attached_in_a_container(serving, images["erofs"]) as (id, asking):
        asking.send(b"?")
        assert asking.recv(100) == b"True True"
        reply = revoke(serving, **{by: {"id": id, "uid": USER}[by]})
        asking.send(b"?")
        assert asking.recv(100) == b"False False"
    assert [place["mountPoint"] for place in reply["detached"]] == ["/mnt", "/mnt"]
    assert id in [place["id"] for place in reply["detached"]]
    assert reply["held"] == []
    wait_for(lambda: not listed(serving, everybody=True))


@pytest.mark.parametrize("type", ["erofs", "btrfs"])
def test_what_is_open_is_named(serving: Daemon, images: dict[str, Path], type: str) -> None:
    with ask_as(serving, images[type], USER) as mount:
        reply = revoke(serving, id=mount_id(mount.fileno()))
        assert reply["detached"] == []
        assert {"pid": os.getpid(), "what": f"fd {mount.fileno()}"} in [
            {"pid": each["pid"], "what": each["what"]} for each in reply["held"]
        ]


def test_what_nobody_seems_to_have_is_not_said_to_be_gone(serving: Daemon, images: dict[str, Path]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with ask_as(serving, images["squashfs"], USER) as mount:
            id = mount_id(mount.fileno())
            socket.send_fds(ours, [b"x"], [mount.fileno()])
        reply = revoke(serving, id=id)
        assert reply["detached"] == []
        ((pid, what),) = [(each["pid"], each["what"]) for each in reply["held"]]
        assert pid == 0
        assert what.startswith("no process shows it")
    wait_for(lambda: not listed(serving, everybody=True))


def test_others_keep_theirs(serving: Daemon, images: dict[str, Path], containers: None) -> None:
    with (
        attached_in_a_container(serving, images["erofs"]) as (one, first),
        attached_in_a_container(serving, images["squashfs"]) as (two, second),
    ):
        revoke(serving, id=one)
        for asking, expected in ((first, b"False False"), (second, b"True True")):
            asking.send(b"?")
            assert asking.recv(100) == expected
        assert [each["id"] for each in listed(serving, everybody=True) if each["attached"]] == [two]


def test_by_digest(start: Callable[..., Daemon], images: dict[str, Path], place: Path) -> None:
    import hashlib

    digest = f"sha256:{hashlib.sha256(images['erofs'].read_bytes()).hexdigest()}"
    daemon = start(
        f'[[rule]]\nname = "named"\nimage = {{ digest = ["{digest}"] }}\ncaller = {{ any = true }}\n'
        'require = { integrity = ["root-owned"] }\ngrant = { file-systems = ["erofs"] }\nverdict = "allow"\n'
    )
    with ask_as(daemon, images["erofs"], USER) as mount:
        assert [each["digest"] for each in listed(daemon, everybody=True)] == [digest]
        reply = revoke(daemon, digest=digest)
        assert [each["pid"] for each in reply["held"]] == [os.getpid()]
        assert mount_id(mount.fileno())
    assert outcome(lambda: revoke(daemon, digest=f"sha512:{'0' * 128}"))[0] == "NotFound"


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:00", "0" * 64, f"sha256:{'A' * 64}", ", "])
def test_what_is_no_digest_is_that_of_no_mount(
    serving: Daemon, images: dict[str, Path], containers: None, digest: str
) -> None:
    """Such as an empty one, of a variable that nobody has set: many mounts have none."""
    with attached_in_a_container(serving, images["erofs"]) as (_, asking):
        refused(lambda: revoke(serving, digest=digest), "InvalidParameter", "it has to be whole")
        asking.send(b"?")
        assert asking.recv(100) == b"True True"


@pytest.mark.parametrize("own", [True, False])
def test_in_the_way_in_a_container_that_root_has_made(
    serving: Daemon, images: dict[str, Path], containers: None, own: bool
) -> None:
    """It loses what is in the way of its own mounts, and nothing for those of others that root has made."""

    def attach(mount: OwnedFd) -> None:
        for path in ("/mnt", "/mnt/sub"):
            call("mount", b"t", path.encode(), b"tmpfs", 0, b"")
            os.makedirs("/mnt/sub/m", exist_ok=True)
        mount_api.move_mount(mount.fileno(), "/mnt/sub/m")
        call("mount", b"t", b"/mnt/sub", b"tmpfs", 0, b"")
        Path("/mnt/sub/data").touch()

    def receiving(theirs: socket.socket) -> None:
        theirs.send(b"!")
        _, (mount, *_), _ = sockets.receive(theirs, 1, 1)
        with mount:
            attach(mount)
        theirs.send(b"!")
        while theirs.recv(1):
            theirs.send(f"{os.path.exists('/mnt/sub/data')}".encode())

    def asking(theirs: socket.socket) -> None:
        with mounted(serving.socket, images["erofs"], userns="/proc/self/ns/user") as reply:
            if own:
                attach(reply.mount)
            else:
                sockets.send(theirs, b"!", [reply.mount])
        while theirs.recv(1):
            theirs.send(f"{os.path.exists('/mnt/sub/data')}".encode())

    with (
        staying_in_container(asking, owner=0) as one,
        staying_in_container(receiving, owner=0) as other,
    ):
        holder = one
        if not own:
            _, (mount, *_), _ = sockets.receive(one, 1, 1)
            with mount:
                assert other.recv(1) == b"!"
                sockets.send(other, b"!", [mount])
            assert other.recv(1) == b"!"
            holder = other
        wait_for(lambda: any(each["attached"] for each in listed(serving, everybody=True)))
        (found,) = listed(serving, everybody=True)
        reply = revoke(serving, id=found["id"])
        assert bool(reply["detached"]) == own
        assert bool(reply["held"]) == (not own)
        holder.send(b"?")
        assert holder.recv(10) == (b"False" if own else b"True")
    wait_for(lambda: not listed(serving, everybody=True))


def test_only_root_and_only_one_of_them(serving: Daemon, images: dict[str, Path], containers: None) -> None:
    def ask() -> tuple[str, str]:
        return outcome(lambda: revoke(serving, id=1))

    assert as_user(ask)[0] == "DeniedByPolicy"
    assert in_container(ask)[0] == "DeniedByPolicy"
    assert ask()[0] == "NotFound"
    for which in ({}, {"id": 1, "uid": 1}):
        assert outcome(lambda which=which: revoke(serving, **which))[0] == "InvalidParameter"


def test_copies_that_are_locked_are_told(serving: Daemon, images: dict[str, Path], containers: None) -> None:
    """In a user namespace in the container's, all that it began with is, for the host's root as well."""

    def work(theirs: socket.socket) -> None:
        with mounted(serving.socket, images["erofs"], userns="/proc/self/ns/user") as reply:
            mount_api.move_mount(reply.mount.fileno(), "/mnt")
        namespaces.unshare(Clone.NEWUSER | Clone.NEWNS)
        theirs.send(str(os.getpid()).encode())
        theirs.recv(1)

    with staying_in_container(work) as ours:
        assert ours.recv(16)
        (mount,) = listed(serving, everybody=True)
        assert {place["mountPoint"] for place in mount["attached"]} == {"/mnt"}
        reply = revoke(serving, id=mount["id"])
        assert reply["detached"] == []
        place, *holders = reply["held"]
        assert place["what"].startswith("attached at /mnt in mount namespace ")
        assert "it is locked there: end the processes there" in place["what"]
        assert any(each["pid"] for each in holders)
    wait_for(lambda: not listed(serving, everybody=True))
