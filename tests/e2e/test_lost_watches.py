"""A daemon that has lost its watches, as where no service manager keeps them: what it still knows."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mountd.kernel import mount_api
from mountd.kernel.flags import Unmount
from mountd.kernel.libc import call
from tests.container import USER, as_user, staying_in_container
from tests.daemon import Daemon
from tests.e2e.calls import mounted
from tests.e2e.conftest import trusting
from tests.e2e.test_list import listed, wait_for
from tests.e2e.test_revoke import revoke


@pytest.fixture
def serving(start: Callable[..., Daemon], images: dict[str, Path]) -> Daemon:
    return start(trusting(images["erofs"].parent))


@contextmanager
def copied(daemon: Daemon, image: Path, *, gone: bool) -> Iterator[Callable[[], str]]:
    """A container with a mount at /mnt/a, unless that is `gone`, and a copy at /mnt/b.

    What is yielded returns at which of them something is mounted.
    """

    def work(theirs: socket.socket) -> None:
        call("mount", b"t", b"/mnt", b"tmpfs", 0, b"")
        for name in "ab":
            os.mkdir(f"/mnt/{name}")
        with mounted(daemon.socket, image, userns="/proc/self/ns/user") as reply:
            mount_api.move_mount(reply.mount.fileno(), "/mnt/a")
        with mount_api.clone_mount("/mnt/a") as copy:
            mount_api.move_mount(copy.fileno(), "/mnt/b")
        if gone:
            mount_api.umount("/mnt/a", Unmount.DETACH)
        theirs.send(b"ready")
        while theirs.recv(1):
            theirs.send(b"there: " + b"".join(n.encode() for n in "ab" if os.path.exists(f"/mnt/{n}/hello")))

    with staying_in_container(work) as ours:

        def look() -> str:
            ours.send(b"?")
            return ours.recv(100).decode().removeprefix("there: ")

        assert ours.recv(100) == b"ready"
        yield look


def lose(daemon: Daemon) -> None:
    daemon.stop()
    daemon.launch()


def places(mount: dict[str, object], name: str) -> list[str]:
    found = mount.get(name, [])
    assert isinstance(found, list)
    return sorted(each["mountPoint"] for each in found)


@pytest.mark.parametrize("type", ["erofs", "btrfs"])
def test_a_copy_alone_is_listed_but_not_taken_for_sure(
    serving: Daemon, images: dict[str, Path], containers: None, type: str
) -> None:
    with copied(serving, images[type], gone=True) as look:
        (found,) = listed(serving, everybody=True)
        assert places(found, "attached") == ["/mnt/b"]
        lose(serving)
        for _ in range(2):
            (found,) = listed(serving, everybody=True)
            assert (places(found, "attached"), places(found, "maybeAttached")) == ([], ["/mnt/b"])
        # It may be another's, of which nobody else is to know.
        (own,) = as_user(lambda: listed(serving), USER)
        assert own["id"] == found["id"]
        assert own.get("maybeAttached") is None
        assert own["attached"] == []
        reply = revoke(serving, id=found["id"])
        assert reply["detached"] == []
        assert reply["held"][0]["what"].startswith(
            "maybe a copy, or another's, at /mnt/b in mount namespace"
        )
        assert look() == "b"
    wait_for(lambda: not listed(serving, everybody=True))


def test_copies_of_what_is_there_belong_to_it(
    serving: Daemon, images: dict[str, Path], containers: None
) -> None:
    with copied(serving, images["squashfs"], gone=False) as look:
        lose(serving)
        (found,) = listed(serving, everybody=True)
        assert (places(found, "attached"), places(found, "maybeAttached")) == (["/mnt/a", "/mnt/b"], [])
        reply = revoke(serving, id=found["id"])
        assert places(reply, "detached") == ["/mnt/a", "/mnt/b"]
        assert look() == ""


def test_another_mount_of_the_same_number_is_no_copy(
    serving: Daemon, images: dict[str, Path], containers: None
) -> None:
    """While nobody serves, the first ends; the second may get its number, and has a watch."""
    with copied(serving, images["erofs"], gone=True):
        (first,) = listed(serving, everybody=True)
        serving.stop()
    serving.launch()
    with copied(serving, images["erofs"], gone=True):
        wait_for(lambda: len(listed(serving, everybody=True)) == 1)
        (second,) = listed(serving, everybody=True)
        assert second["id"] != first["id"]
        assert places(second, "attached") == ["/mnt/b"]
    wait_for(lambda: not listed(serving, everybody=True))
