"""Who a caller is: its user, its user namespace, its control group, and that it is still there."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.caller.identify import given_namespace, identify, peer_namespace, pin
from mountd.caller.model import Caller
from mountd.caller.peer import Peer
from mountd.errors import BadFileDescriptor, PeerGone
from mountd.fds import OwnedFd
from mountd.kernel import compat, namespaces
from mountd.kernel.flags import Clone
from tests.container import USER, set_dumpable, user_namespace

WHOLE = ((0, 400000, 65536),)


@contextlib.contextmanager
def peer(
    become: Callable[[], object], later: Callable[[], object] = lambda: None
) -> Iterator[tuple[socket.socket, Callable[[], None]]]:
    """Return the accepted connection of a process that has become somebody, and what lets it go on."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                become()
                with socket.socket(socket.AF_UNIX) as mine:
                    mine.connect(listener.getsockname())
                    os.read(reader, 1)
                    later()
                    mine.send(b"x")
                    signal.pause()
            finally:
                os._exit(1)
        os.close(reader)
        connection, _ = listener.accept()

        def go_on() -> None:
            os.write(writer, b"x")
            connection.recv(1)

        try:
            with connection:
                yield connection, go_on
        finally:
            os.close(writer)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def identified(connection: socket.socket, connected_from: tuple[int, int] | None = None) -> Caller:
    with pin(connection) as pidfd:
        return identify(connection, pidfd.fileno(), connected_from)


def become(uid: int, groups: tuple[int, ...] = ()) -> None:
    os.setgroups(groups)
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def enter(*userns: OwnedFd, uid: int = 0) -> None:
    for each in userns:
        namespaces.setns(each.fileno(), Clone.NEWUSER)
    become(uid)


def test_a_user_of_the_host() -> None:
    with peer(lambda: become(USER, (7, 8))) as (connection, _):
        caller = identified(connection)
        assert (caller.uid, caller.gid, caller.groups) == (USER, USER, {7, 8})
        assert caller.on_host
        assert not caller.is_host_root
        assert caller.owner_uid == USER
        assert peer_namespace(connection) == (here(), (USER, 0))


def here() -> tuple[int, int]:
    status = os.stat("/proc/self/ns/user")
    return status.st_dev, status.st_ino


@pytest.mark.parametrize(("inside", "uid", "charged"), [(0, 400000, USER), (5, 400005, USER)])
def test_a_member_of_a_container(inside: int, uid: int, charged: int) -> None:
    with (
        user_namespace(WHOLE, owner=USER) as userns,
        peer(lambda: enter(userns, uid=inside)) as (connection, _),
    ):
        caller = identified(connection, namespaces.identity(userns.fileno()))
        assert (caller.uid, caller.gid, caller.owner_uid) == (uid, uid, charged)
        assert not caller.on_host
        space = caller.user_namespace
        assert (space.dev, space.ino) == namespaces.identity(userns.fileno())
        assert (space.owner_uid, space.host_uid(0), space.host_gid(65535)) == (USER, 400000, 465535)
        assert space.host_uid(65536) is None


def test_the_owner_of_the_outermost_namespace_pays() -> None:
    """And not those who made the ones in it, as whoever has a range can be any of them."""
    with (
        user_namespace(WHOLE, owner=USER) as outer,
        user_namespace(((0, 1000, 9),), owner=7, below=outer.fileno()) as middle,
        user_namespace(((0, 3, 1),), owner=2, below=middle.fileno()) as inner,
        peer(lambda: enter(outer, middle, inner)) as (connection, _),
    ):
        caller = identified(connection)
        assert (caller.uid, caller.owner_uid) == (401003, USER)
        assert peer_namespace(connection) == (namespaces.identity(inner.fileno()), (USER, 0))
        given = given_namespace(inner.fileno(), caller)
        chain = [(*namespaces.identity(each.fileno()), owner) for each, owner in
                 ((inner, 401002), (middle, 400007), (outer, USER))]  # fmt: skip
        assert list(given.chain) == chain
        assert given.namespace == caller.user_namespace
        above = given_namespace(middle.fileno(), caller)
        assert list(above.chain) == chain[1:]
        assert above.namespace.host_uid(8) == 401008


def test_who_has_moved_or_ended_is_gone() -> None:
    connected_from = here()
    with peer(lambda: None, lambda: namespaces.unshare(Clone.NEWUSER)) as (connection, go_on):
        identified(connection, connected_from)
        go_on()
        with pytest.raises(PeerGone, match="no longer in the user namespace"):
            identified(connection, connected_from)
    with peer(lambda: None) as (connection, _), pin(connection) as pidfd:
        signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
        deadline = time.monotonic() + 5
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                compat.check_alive(pidfd.fileno())  # a zombie answers; its namespaces are gone
                with contextlib.suppress(PeerGone):
                    identify(connection, pidfd.fileno())
                    continue
                break
        for ask in (lambda: identify(connection, pidfd.fileno()), lambda: peer_namespace(connection)):
            with pytest.raises(PeerGone, match="has ended"):
                ask()


def test_maps_that_are_written_after_the_first_request() -> None:
    """What is known of a peer is what holds; once both maps are there, nothing more can change."""

    def leave() -> None:
        become(USER)
        namespaces.unshare(Clone.NEWUSER)
        set_dumpable()

    with peer(leave) as (connection, _), Peer(connection) as known:
        first = known.identify()
        assert (first.user_namespace.uid_map, first.user_namespace.gid_map) == ((), ())
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{first.pid}/{name}").write_text(f"0 {USER} 1\n")
            space = known.identify().user_namespace
            assert space.host_uid(0) == USER
            assert space.host_gid(0) == (USER if name == "gid_map" else None)
        assert known.identify() is known.identify()


def test_a_given_descriptor_that_is_no_user_namespace() -> None:
    with peer(lambda: None) as (connection, _):
        caller = identified(connection)
        for path in ("/proc/self/ns/mnt", "/dev/null", "/"):
            with (
                OwnedFd(os.open(path, os.O_RDONLY)) as fd,
                pytest.raises(BadFileDescriptor, match="it is not a user namespace"),
            ):
                given_namespace(fd.fileno(), caller)


def test_the_control_group_of_a_caller() -> None:
    with peer(lambda: None) as (connection, _):
        caller = identified(connection)
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    (own,) = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    assert caller.cgroup == own


def test_a_unit_is_that_of_the_control_group_which_the_caller_is_in() -> None:
    root = next(
        Path(line.split()[4])
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.partition(" - ")[2].startswith("cgroup2 ")
    )
    service = root / "test.slice/test-mountd.slice/test-mountd.service"
    assert not service.parents[1].exists()
    service.mkdir(parents=True)
    try:

        def move() -> None:
            (service / "cgroup.procs").write_text(str(os.getpid()))

        with peer(move) as (connection, _):
            caller = identified(connection)
        assert (caller.unit, caller.slice) == ("test-mountd.service", "test-mountd.slice")
        assert caller.container is None
    finally:
        for each in (service, *list(service.parents)[:2]):
            remove_group(each)


def remove_group(path: Path) -> None:
    """Remove a control group, once its last process is gone from it."""
    for _ in range(100):
        try:
            path.rmdir()
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            time.sleep(0.02)
    path.rmdir()
