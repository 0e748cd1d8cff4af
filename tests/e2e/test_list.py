"""Which mounts there are, by the kernel's word, and whose they are."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mountd.client import Client
from mountd.daemon.limits import MAXIMUM_WORKERS
from mountd.errors import LimitExceeded
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation
from mountd.kernel.mount_info import mount_id
from tests.container import USER, as_user, forked, in_container, staying_in_container
from tests.daemon import Daemon
from tests.e2e.calls import mount, mounted, outcome
from tests.e2e.conftest import trusting
from tests.e2e.loops import wait_until_dropped
from tests.e2e.test_shared import ask_as

OTHER = 4001
HOARDED = 1024
LONG = ("--shared-seconds", "60")


def listed(daemon: Daemon, *, everybody: bool = False) -> list[dict[str, Any]]:
    """What this process gets to see."""
    with Client(str(daemon.socket)) as client:
        reply, fds = client.call("List", {"all": True} if everybody else {}, [])
    assert not fds
    found = reply["mounts"]
    assert isinstance(found, list)
    return found


def listed_as(daemon: Daemon, uid: int) -> list[int]:
    return as_user(lambda: [each["id"] for each in listed(daemon)], uid)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def serving(start: Callable[..., Daemon], images: dict[str, Path]) -> Daemon:
    return start(trusting(images["erofs"].parent))


@pytest.mark.parametrize("type", ["erofs", "squashfs", "ext4", "xfs", "btrfs"])
def test_a_mount_is_listed_while_it_is_there(
    serving: Daemon, images: dict[str, Path], held: list[OwnedFd], type: str
) -> None:
    before = int(time.time())
    held.append(ask_as(serving, images[type], USER))
    (found,) = as_user(lambda: listed(serving))
    assert found.pop("id") == mount_id(held[0].fileno())
    assert before <= found.pop("since") <= time.time()
    assert found == {
        "uid": USER,
        "owner": USER,
        "source": str(images[type]),
        "fileSystemType": type,
        "readOnly": True,
        "rule": "trusted in the test",
        "trustedBy": "root-owned",
        "idMap": "none",
        "attached": [],
    }
    held.pop().close()
    wait_for(lambda: not listed_as(serving, USER))


def test_everybody_sees_their_own_and_root_sees_all(
    serving: Daemon, images: dict[str, Path], held: list[OwnedFd]
) -> None:
    for uid in (USER, OTHER, 0):
        held.append(ask_as(serving, images["erofs"], uid))
    ids = [mount_id(each.fileno()) for each in held]
    assert [listed_as(serving, uid) for uid in (USER, OTHER)] == [[ids[0]], [ids[1]]]
    assert [each["id"] for each in listed(serving)] == [ids[2]]
    assert {each["id"] for each in listed(serving, everybody=True)} == set(ids)
    refusal = as_user(lambda: outcome(lambda: listed(serving, everybody=True)))
    assert refusal[0] == "DeniedByPolicy"
    assert "only the host's root" in refusal[1]


def test_where_it_is_attached(serving: Daemon, images: dict[str, Path], containers: None) -> None:
    """As the container that attached it sees it; copies in namespaces below count, too."""

    def work() -> tuple[list[Any], list[Any], int]:
        with mounted(serving.socket, images["erofs"], userns="/proc/self/ns/user") as reply:
            mount_api.move_mount(reply.mount.fileno(), "/mnt")
        before = listed(serving)
        namespaces.unshare(Clone.NEWNS)
        after = listed(serving)
        return before, after, reply.mounts[0]["id"]  # type: ignore[return-value]

    before, after, id = in_container(work)
    assert [each["id"] for each in before] == [each["id"] for each in after] == [id]
    ((place,),) = [each["attached"] for each in before]
    assert place["mountPoint"] == "/mnt"
    assert place["id"] == id
    assert before[0]["idMap"] == "namespace"
    # The namespace that it was attached in is gone; its copy is there, under another id.
    ((copy,),) = [each["attached"] for each in after]
    assert copy["mountPoint"] == "/mnt"
    assert copy["id"] != id
    assert copy["mountNamespace"] != place["mountNamespace"]
    wait_for(lambda: not listed(serving, everybody=True))


def test_one_container_does_not_see_another_of_its_owner(
    serving: Daemon, images: dict[str, Path], containers: None
) -> None:
    """Their owner on the host sees both."""

    def container() -> list[int]:
        with mounted(serving.socket, images["erofs"], userns="/proc/self/ns/user") as reply:
            found = [each["id"] for each in listed(serving)]
            assert reply.mounts[0]["id"] in found
            return found

    def staying(theirs: socket.socket) -> None:
        with mounted(serving.socket, images["erofs"], userns="/proc/self/ns/user"):
            theirs.send(b"!")
            theirs.recv(1)

    with staying_in_container(staying, uids=((0, 300000, 65536),)) as ours:
        assert ours.recv(1) == b"!"
        assert len(in_container(container)) == 1
        assert len(listed_as(serving, USER)) >= 1


@contextlib.contextmanager
def busy_container(daemon: Daemon, image: Path, number: int) -> Iterator[None]:
    """A container that root has made, and that holds as many mounts."""

    def work(theirs: socket.socket) -> None:
        mounts = [mount(daemon.socket, image).mount for _ in range(number)]
        theirs.send(b"!")
        theirs.recv(1)
        del mounts

    with staying_in_container(work, owner=0) as ours:
        assert ours.recv(1) == b"!"
        yield


def test_containers_that_root_has_made_are_nothing_to_each_other(
    start: Callable[..., Daemon], images: dict[str, Path], containers: None
) -> None:
    """Though their owner is one, and the ids that they map are: limits, superblocks, lists."""
    daemon = start(trusting(images["erofs"].parent), "--max-mounts", "2", *LONG)

    def other() -> tuple[list[int], list[int], int]:
        before = [each["id"] for each in listed(daemon)]
        with mounted(daemon.socket, images["erofs"]) as reply:
            return before, [each["id"] for each in listed(daemon)], mount_id(reply.mount.fileno())

    with busy_container(daemon, images["erofs"], 2):
        before, after, id = in_container(other, owner=0)
        assert (before, after) == ([], [id])
        assert len({each["owner"] for each in listed(daemon, everybody=True)}) == 1


def test_what_is_closed_at_once_and_what_never_arrives(serving: Daemon, images: dict[str, Path]) -> None:
    def drop() -> None:
        for _ in range(300):
            mount(serving.socket, images["erofs"]).mount.close()

    as_user(drop)
    wait_for(lambda: not listed(serving, everybody=True))


def test_records_of_what_shares_a_superblock_are_told_apart(
    start: Callable[..., Daemon], images: dict[str, Path], held: list[OwnedFd]
) -> None:
    daemon = start(trusting(images["erofs"].parent), *LONG)
    held += [ask_as(daemon, images["erofs"], USER) for _ in range(3)]
    assert len({os.fstat(each.fileno()).st_dev for each in held}) == 1
    ids = [mount_id(each.fileno()) for each in held]
    assert listed_as(daemon, USER) == ids
    held.pop(1).close()
    wait_for(lambda: listed_as(daemon, USER) == [ids[0], ids[2]])


def test_what_was_dropped_is_gone_though_its_superblock_is_kept(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    """However many in a row: none of them counts any longer, neither for the list nor for the bound."""
    # A worker may have the last one that it has made for a moment longer than whoever asked.
    daemon = start(trusting(images["erofs"].parent), "--max-mounts", str(MAXIMUM_WORKERS + 1), *LONG)

    def drop() -> None:
        for _ in range(600):
            mount(daemon.socket, images["erofs"]).mount.close()

    as_user(drop)
    wait_for(lambda: not listed(daemon, everybody=True))
    with ask_as(daemon, images["erofs"], USER), ask_as(daemon, images["erofs"], USER):
        assert len(listed_as(daemon, USER)) == 2


def test_a_copy_of_what_was_dropped_is_listed(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path
) -> None:
    """Whoever has made a copy of its mount has one for as long as any copy is there, and counts for it."""
    daemon = start(trusting(images["erofs"].parent), "--max-mounts", "1", *LONG)
    target = place / "copied"
    target.mkdir()

    def work() -> None:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with ask_as(daemon, images["erofs"], USER) as first:
            id = mount_id(first.fileno())
            mount_api.move_mount(first.fileno(), str(target))
        with mount_api.clone_mount(str(target)) as copy:
            mount_api.umount(str(target))
            assert mount_id(copy.fileno()) != id
            assert listed_as(daemon, USER) == [id]
            with pytest.raises(LimitExceeded):
                ask_as(daemon, images["squashfs"], USER)
        wait_for(lambda: not listed_as(daemon, USER))

    forked(work)


def test_numbers_of_mounts_that_are_used_again(
    start: Callable[..., Daemon], images: dict[str, Path], held: list[OwnedFd]
) -> None:
    """The kernel gives the number of a mark to a later mount, which is not the earlier one for it."""
    daemon = start(trusting(images["erofs"].parent), *LONG)
    for _ in range(5):
        held += [ask_as(daemon, images["erofs"], user) for user in (USER, OTHER)]
        ids = [mount_id(each.fileno()) for each in held]
        assert [listed_as(daemon, USER), listed_as(daemon, OTHER)] == [[ids[0]], [ids[1]]]
        while held:
            held.pop().close()
        wait_for(lambda: not listed(daemon, everybody=True))


def test_files_in_the_ledger_that_are_none_of_its_own(
    serving: Daemon, images: dict[str, Path], held: list[OwnedFd]
) -> None:
    held.append(ask_as(serving, images["erofs"], USER))
    directory = serving.directory / f"run/ledger/{USER}"
    (name,) = (each for each in os.listdir(directory) if each.isdecimal())
    record = json.loads((directory / name).read_text())
    for number, text in enumerate(
        (
            "",
            "{",
            "[]",
            "null",
            json.dumps({name: value for name, value in record.items() if name != "since"}),
            json.dumps({**record, "id": "x"}),
            json.dumps({**record, "device": [1]}),
            json.dumps({**record, "watch": 999, "id": 5}),
            json.dumps({**record, "device": [0, 1], "id": 6}),
            json.dumps({**record, "id": 1 << 64, "watch": 0}),
            json.dumps({**record, "since": -1}),
            "[" * 30000,
        ),  # fmt: skip
        5000,
    ):
        (directory / str(number)).write_text(text)
    (directory / "6000").symlink_to("/etc/passwd")
    os.mkfifo(directory / "6001")
    (directory / "6002").mkdir()
    assert listed_as(serving, USER) == [record["id"]]


def test_records_of_another_version(serving: Daemon, images: dict[str, Path], held: list[OwnedFd]) -> None:
    """What it did not know, and what this one does not, are no reason to forget a mount."""
    held.append(ask_as(serving, images["erofs"], USER))
    directory = serving.directory / f"run/ledger/{USER}"
    (name,) = (each for each in os.listdir(directory) if each.isdecimal())
    record = json.loads((directory / name).read_text())
    del record["mark"], record["rule"]
    (directory / name).write_text(json.dumps({**record, "more": 1}))
    assert listed_as(serving, USER) == [record["id"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_daemon_that_starts_again_knows_what_is_left(
    serving: Daemon, images: dict[str, Path], held: list[OwnedFd], containers: None, number: int
) -> None:
    """Without a service manager that keeps the watches, too: what it finds attached, or open, is there."""
    held += [ask_as(serving, images[type], USER) for type in ("erofs", "squashfs")]
    ids = [mount_id(each.fileno()) for each in held]
    serving.process.send_signal(number)
    serving.process.wait(20)
    held.pop().close()
    serving.launch()
    time.sleep(0.1)
    # The other may be taken for one that is on its way, for a few seconds.
    assert ids[0] in listed_as(serving, USER)
    wait_for(lambda: listed_as(serving, USER) == ids[:1])
    held.append(ask_as(serving, images["squashfs"], USER))
    assert listed_as(serving, USER) == [ids[0], mount_id(held[1].fileno())]


def test_what_no_process_seems_to_have_open_is_still_there(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    """A descriptor on its way between two sockets keeps a mount, and /proc does not show it."""
    daemon = start(trusting(images["erofs"].parent), "--max-mounts", "1")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with ask_as(daemon, images["erofs"], USER) as sent:
            id = mount_id(sent.fileno())
            socket.send_fds(ours, [b"x"], [sent.fileno()])
        assert listed_as(daemon, USER) == [id]
        with pytest.raises(LimitExceeded):
            ask_as(daemon, images["squashfs"], USER)
    wait_for(lambda: not listed_as(daemon, USER))


class TestLimits:
    def test_of_an_owner(
        self, start: Callable[..., Daemon], images: dict[str, Path], held: list[OwnedFd]
    ) -> None:
        daemon = start(trusting(images["erofs"].parent), "--max-mounts", "5")
        held += [ask_as(daemon, images["erofs"], USER) for _ in range(5)]
        with pytest.raises(LimitExceeded, match="at most 5 mounts of one user") as refusal:
            ask_as(daemon, images["squashfs"], USER)
        assert refusal.value.hint is not None
        # Before anything is made, and for nobody else.
        assert not [
            each for each in os.listdir("/sys/block") if str(images["squashfs"]) in backing_file(each)
        ]
        held.append(ask_as(daemon, images["erofs"], OTHER))
        held.append(ask_as(daemon, images["erofs"], 0))
        held.pop(0).close()
        wait_for(lambda: errno_or_name(daemon, images["erofs"], held) == "")

    def test_of_a_rule(
        self, start: Callable[..., Daemon], images: dict[str, Path], held: list[OwnedFd]
    ) -> None:
        daemon = start(trusting(images["erofs"].parent, max_mounts="2"))
        for _ in range(3):
            held += [ask_as(daemon, images["erofs"], USER) for _ in range(2)]
            with pytest.raises(LimitExceeded, match="at most 2 mounts of one user at a time by the rule"):
                ask_as(daemon, images["erofs"], USER)
            while held:
                held.pop().close()
            wait_for(lambda: not listed(daemon, everybody=True))

    def test_however_many_ask_at_the_same_time(
        self, start: Callable[..., Daemon], images: dict[str, Path]
    ) -> None:
        daemon = start(trusting(images["erofs"].parent), "--max-mounts", "20")

        released, release = os.pipe()

        def client(writer: int) -> None:
            mounts = []
            for _ in range(10):
                try:
                    mounts.append(mount(daemon.socket, images["erofs"]).mount)
                except LimitExceeded:
                    continue
            os.write(writer, bytes([len(mounts)]))
            os.read(released, 1)  # until all have asked

        readers = []
        for _ in range(8):
            reader, writer = os.pipe()
            if os.fork() == 0:
                try:
                    os.close(release)
                    as_user(lambda writer=writer: client(writer))  # type: ignore[misc]
                finally:
                    os._exit(0)
            os.close(writer)
            readers.append(reader)
        counts = [os.read(reader, 1)[0] for reader in readers]
        for fd in (release, released, *readers):
            os.close(fd)
        for _ in readers:
            os.wait()
        assert sum(counts) == 20, counts

    def test_a_worker_that_is_killed_keeps_no_place(
        self, start: Callable[..., Daemon], images: dict[str, Path]
    ) -> None:
        daemon = start(trusting(images["erofs"].parent), "--max-mounts", "1")
        directory = daemon.directory / f"run/ledger/{USER}"
        directory.mkdir(parents=True)
        with open(directory / "0", "wb") as place:
            fcntl.flock(place, fcntl.LOCK_EX)
            with pytest.raises(LimitExceeded):
                ask_as(daemon, images["erofs"], USER)
        # As the lock is, with the process that had it.
        ask_as(daemon, images["erofs"], USER).close()

    def test_66_somebody_who_keeps_as_many_as_it_can(
        self, start: Callable[..., Daemon], images: dict[str, Path]
    ) -> None:
        """By the usual bound, with one loop device for each image; all is free once it has ended."""
        daemon = start(trusting(images["squashfs"].parent), "--max-mounts", str(HOARDED))

        def hoard() -> tuple[int, int]:
            resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
            kept: list[OwnedFd] = []
            with contextlib.suppress(LimitExceeded):
                while len(kept) <= HOARDED:
                    kept.append(mount(daemon.socket, images["squashfs"]).mount)
            loops = [
                each for each in os.listdir("/sys/block") if str(images["squashfs"]) in backing_file(each)
            ]
            return len(kept), len(loops)

        kept, loops = as_user(hoard)
        assert kept == HOARDED
        assert loops <= MAXIMUM_WORKERS
        ask_as(daemon, images["squashfs"], OTHER).close()
        wait_for(lambda: not listed(daemon, everybody=True))
        daemon.stop()
        wait_until_dropped(images["squashfs"])


def test_47_two_tenants_with_options_that_contradict_each_other(
    serving: Daemon, images: dict[str, Path], held: list[OwnedFd]
) -> None:
    """Each has its own superblock and its own flags, whatever the other asks for before and afterwards."""
    for uid, options in ((USER, ["noexec"]), (OTHER, ["noatime"]), (USER, ["noexec"]), (OTHER, ["noatime"])):
        held.append(ask_as(serving, images["ext4"], uid, options=options))
    flags = [os.fstatvfs(each.fileno()).f_flag & (os.ST_NOEXEC | os.ST_NOATIME) for each in held]
    assert flags == [os.ST_NOEXEC, os.ST_NOATIME] * 2
    devices = [os.fstat(each.fileno()).st_dev for each in held]
    assert set(devices[::2]).isdisjoint(devices[1::2])


def errno_or_name(daemon: Daemon, image: Path, held: list[OwnedFd]) -> str:
    """The name of the error that asking comes to; the mount is held otherwise."""
    try:
        held.append(ask_as(daemon, image, USER))
    except LimitExceeded as error:
        return type(error).__name__
    return ""


def backing_file(device: str) -> str:
    path = Path(f"/sys/block/{device}/loop/backing_file")
    try:
        return path.read_text()
    except OSError:
        return ""
