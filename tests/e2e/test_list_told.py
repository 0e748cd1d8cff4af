"""What List tells whom: nobody but the host's root gets to know what others have, or call theirs."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mountd.caller.model import Caller, IdExtent, UserNamespace
from mountd.fds import OwnedFd
from mountd.kernel import mount_api
from mountd.ledger.record import Record
from mountd.service.listing import belongs_to
from tests.container import USER, as_user, drop_capabilities, forked, in_container, staying_in_container
from tests.daemon import Daemon
from tests.e2e.calls import mounted
from tests.e2e.conftest import trusting
from tests.e2e.test_list import listed, wait_for
from tests.e2e.test_shared import ask_as

BOB = 4001
SECRET = "/mnt"  # what Bob calls it
EVERYTHING = (IdExtent(0, 0, 1 << 32),)
HOST = UserNamespace(0, 1, EVERYTHING, EVERYTHING, 0, is_host=True)
POWERLESS = Caller(0, 0, frozenset(), 1, HOST, 0, unit="a.scope")
MADE = Record(1, 1, (0, 1), 0, 0, 1, "/image", "erofs", True, "none", 1, unit="a.scope")


@pytest.fixture
def serving(start: Callable[..., Daemon], images: dict[str, Path]) -> Daemon:
    return start(trusting(images["erofs"].parent))


def paths(mounts: list[dict[str, Any]]) -> list[str]:
    return sorted({place["mountPoint"] for each in mounts for place in each["attached"]})


def test_what_others_call_the_copies_that_came_to_them(
    serving: Daemon, images: dict[str, Path], place: Path, containers: None
) -> None:
    """Their number is told, and to root the paths as well."""
    own = place / "alice"
    own.mkdir()

    def copying(theirs: socket.socket) -> None:
        with mount_api.clone_mount(str(own)) as copy:
            mount_api.move_mount(copy.fileno(), SECRET)
        theirs.send(b"!")
        theirs.recv(1)

    def in_a_container_of_hers() -> list[dict[str, Any]]:
        with mount_api.clone_mount(str(own)) as copy:
            mount_api.move_mount(copy.fileno(), SECRET)
        return listed(serving)

    with ask_as(serving, images["erofs"], USER) as mount:
        mount_api.move_mount(mount.fileno(), str(own))
    try:
        with staying_in_container(copying, owner=BOB) as ours:
            assert ours.recv(1) == b"!"
            ((hers,), (all_of_it,)) = as_user(lambda: listed(serving)), listed(serving, everybody=True)
            assert paths([hers]) == [str(own)]
            assert hers["unlisted"] == 2
            assert paths([all_of_it]) == [SECRET, str(own)]
            assert "unlisted" not in all_of_it
        wait_for(lambda: as_user(lambda: "unlisted" not in listed(serving)[0]))
        # The ids of the user who has asked are not mapped there: nothing is the container's own.
        assert in_container(in_a_container_of_hers) == []
        wait_for(lambda: len(listed(serving, everybody=True)[0]["attached"]) == 1)
    finally:
        mount_api.umount(str(own))
    wait_for(lambda: not listed(serving, everybody=True))


def test_the_places_of_a_container_of_ones_own(
    serving: Daemon, images: dict[str, Path], containers: None
) -> None:
    def attaching(theirs: socket.socket) -> None:
        with mounted(serving.socket, images["erofs"], userns="/proc/self/ns/user") as reply:
            mount_api.move_mount(reply.mount.fileno(), SECRET)
        theirs.send(str(paths(listed(serving))).encode())
        theirs.recv(1)

    with staying_in_container(attaching) as ours:
        assert ours.recv(100) == str([SECRET]).encode()
        assert paths(as_user(lambda: listed(serving))) == [SECRET]
    wait_for(lambda: not listed(serving, everybody=True))


def test_a_uid_0_that_is_not_the_hosts_root_sees_nothing_of_it(
    serving: Daemon, images: dict[str, Path], held: list[OwnedFd], containers: None
) -> None:
    """Nor of the containers that it has made."""

    def staying(theirs: socket.socket) -> None:
        with mounted(serving.socket, images["erofs"]):
            theirs.send(b"!")
            theirs.recv(1)

    def powerless() -> list[dict[str, Any]]:
        drop_capabilities()
        return listed(serving)

    held.append(ask_as(serving, images["erofs"], 0))
    with staying_in_container(staying, owner=0) as ours:
        assert ours.recv(1) == b"!"
        assert len(listed(serving)) == 2
        assert forked(powerless) == []


def test_a_uid_0_that_is_not_the_hosts_root_sees_what_its_unit_has() -> None:
    """Containers without a user namespace are told apart by it; without one, nothing is anybody's."""
    assert belongs_to(MADE, POWERLESS)
    for other in (
        replace(MADE, unit="b.scope"),
        replace(MADE, unit=None),
        replace(MADE, roots_namespace=7),
        replace(MADE, owner=USER),
    ):
        assert not belongs_to(other, POWERLESS)
        assert belongs_to(other, replace(POWERLESS, sys_admin=True))
    assert not belongs_to(replace(MADE, unit=None), replace(POWERLESS, unit=None))
