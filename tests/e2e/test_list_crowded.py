"""Listing and taking back while somebody makes more mount namespaces, and mounts, than can be looked at."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation
from mountd.kernel.libc import call
from mountd.kernel.mount_info import (
    count_mounts,
    listmount,
    mount_id,
    mount_namespaces,
    namespace_id,
    namespace_of,
)
from mountd.ledger import find
from tests.container import USER, in_container, staying_in_container
from tests.daemon import Daemon
from tests.e2e.calls import mounted
from tests.e2e.conftest import trusting
from tests.e2e.test_list import listed, wait_for
from tests.e2e.test_revoke import attached_in_a_container, revoke
from tests.e2e.test_shared import ask_as

FEW = 64  # descriptors that the daemon may have, beside those that it starts with


@contextlib.contextmanager
def crowd(count: int, mounts: int = 0, owner: int = USER, depth: int = 0) -> Iterator[list[int]]:
    """A container that has made so many mount namespaces, each with so many mounts more; their ids."""

    def work(theirs: socket.socket) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        ids, held = [], []
        for _ in range(depth):
            namespaces.unshare(Clone.NEWUSER)
            for name, line in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
                Path(f"/proc/self/{name}").write_text(line)
        for _ in range(count):
            namespaces.unshare(Clone.NEWNS)
            mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
            held.append(os.open("/proc/self/ns/mnt", os.O_RDONLY))
            ids.append(namespace_id(held[-1]))
            for _ in range(mounts):
                with mount_api.clone_mount("/proc") as copy:
                    mount_api.move_mount(copy.fileno(), "/mnt")
        theirs.send(" ".join(map(str, ids)).encode())
        theirs.recv(1)

    with staying_in_container(work, owner=owner) as ours:
        yield [int(each) for each in ours.recv(1 << 20).split()]


@pytest.fixture
def serving(start: Callable[..., Daemon], images: dict[str, Path]) -> Daemon:
    return start(trusting(images["erofs"].parent))


def test_more_namespaces_than_descriptors(
    serving: Daemon, images: dict[str, Path], containers: None
) -> None:
    pids = [serving.process.pid, *serving.children(), serving.fork_server, *serving.workers]
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (FEW, FEW))
    with attached_in_a_container(serving, images["erofs"]) as (id, asking), crowd(2 * FEW):
        assert [each["id"] for each in listed(serving, everybody=True)] == [id]
        assert id in {place["id"] for place in revoke(serving, id=id)["detached"]}
        asking.send(b"?")
        assert asking.recv(100) == b"False False"
    wait_for(lambda: not listed(serving, everybody=True))


def test_who_makes_many_mounts_is_looked_at_last(containers: None) -> None:
    with crowd(1, 3000) as (many,), crowd(1) as (few,):
        spaces, complete = find.in_order(frozenset(), float("inf"))
        order = [id for id, _ in spaces]
        assert complete
        assert order.index(few) < order.index(many)
        with namespace_of("self") as space:
            own = space.id
        assert order.index(own) < order.index(few)
        assert own not in dict(find.in_order(frozenset({own}), float("inf"))[0])
        assert find.in_order(frozenset(), 0.0) == ([], False)
        assert count_mounts(many, 1 << 20) == len(listmount(namespace=many)) > 3000
        assert count_mounts(many, 5) >= 5


def test_who_makes_many_namespaces_is_not_looked_at_before_others(containers: None) -> None:
    with crowd(300) as many, crowd(2, 200, owner=USER + 1) as few:
        order = list(dict(find.in_order(frozenset(), float("inf"))[0]))
        assert set(order) >= {*many, *few}
        last = max(order.index(each) for each in few)
        assert len([each for each in many if order.index(each) < last]) <= 4


def test_a_path_that_is_too_long_is_nobodys_harm(
    serving: Daemon, images: dict[str, Path], containers: None
) -> None:
    """Neither that of a mount that is nothing to mountd, nor that of one that mountd has made."""

    def work() -> list[str]:
        call("mount", b"t", b"/mnt", b"tmpfs", 0, b"")
        os.chdir("/mnt")
        for _ in range(270):
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
        for name in ("other", "m"):
            os.mkdir(name)
        call("mount", b"t", b"other", b"tmpfs", 0, b"")
        with mounted(serving.socket, images["erofs"], userns="/proc/self/ns/user") as reply:
            mount_api.move_mount(reply.mount.fileno(), "m")
        return sorted(place["mountPoint"] for each in listed(serving) for place in each["attached"])

    with attached_in_a_container(serving, images["squashfs"]) as (id, _):
        assert find.TOO_LONG in in_container(work)
        assert id in {each["id"] for each in listed(serving, everybody=True)}
        assert id in {place["id"] for place in revoke(serving, id=id)["detached"]}
    wait_for(lambda: not listed(serving, everybody=True))


def test_whose_container_it_is(containers: None) -> None:
    """Of one in another as well, it is whoever has made the outer one; of those of root, each is one."""
    with crowd(1) as (inside,), crowd(1, owner=0) as (one,), crowd(1, owner=0) as (other,):
        found = {space.id: find.payer(space.fd) for space in mount_namespaces()}
    assert found[inside] == (USER, 0)
    roots = [found[each] or (-1, 0) for each in (one, other)]
    assert [uid for uid, _ in roots] == [0, 0]
    assert 0 != roots[0][1] != roots[1][1] != 0
    with namespace_of("self") as space:
        assert found[space.id] is None


def test_who_nests_user_namespaces_is_asked_about_them_once(
    containers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user can have tens of thousands of mount namespaces, each within 31 user namespaces."""
    asked: list[int] = []
    parent = find.parent
    with crowd(20, depth=8) as inside, monkeypatch.context() as patch:
        patch.setattr(find, "parent", lambda fd: asked.append(fd) or parent(fd))
        known: find.Payers = {}
        whose = [find.payer(space.fd, known) for space in mount_namespaces() if space.id in inside]
    assert whose == [(USER, 0)] * 20
    assert len(asked) == 9


def test_names_that_are_no_text(serving: Daemon, images: dict[str, Path], containers: None) -> None:
    """And more places, with longer names, than there is room for: root is told of all the rest."""

    def work() -> None:
        name = b"\xff" * 250
        places = [b"/mnt/" + name + str(number).encode() for number in range(40)]
        call("mount", b"t", b"/mnt", b"tmpfs", 0, b"")
        for place in places:
            os.mkdir(place)
        with mounted(serving.socket, images["erofs"], userns="/proc/self/ns/user") as reply:
            mount_api.move_mount(reply.mount.fileno(), places[0])
            for place in places[1:]:
                with mount_api.clone_mount(places[0]) as copy:
                    mount_api.move_mount(copy.fileno(), place)
        (found,) = listed(serving)
        shown = {each["mountPoint"] for each in found["attached"]}
        assert f"/mnt/{chr(92)}xff" in min(shown)
        assert len(found["attached"]) + found["unlisted"] == len(places)
        assert found["unlisted"] > 0

    in_container(work)
    wait_for(lambda: not listed(serving, everybody=True))


def test_what_is_after_an_id(serving: Daemon, images: dict[str, Path], held: list[OwnedFd]) -> None:
    held += [ask_as(serving, images[type], USER) for type in ("erofs", "squashfs", "ext4")]
    ids = [mount_id(each.fileno()) for each in held]
    with Client(str(serving.socket)) as client:
        found = [client.call("List", {"all": True, "after": after}, [])[0] for after in (0, *ids)]
    assert [[each["id"] for each in page["mounts"]] for page in found] == [ids, ids[1:], ids[2:], []]


def test_it_ends_when_there_is_no_more_time() -> None:
    everything, complete = find.attachments(set(), set(listmount()), frozenset())
    assert complete
    assert len(everything) >= len(listmount())
    found, complete = find.attachments(set(), set(listmount()), frozenset(), 0.0)
    assert not complete
    assert len(found) < len(everything)
