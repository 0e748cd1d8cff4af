"""Namespaces and sockets against the running kernel."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from mountd.errors import NotSupported, SyscallError
from mountd.fds import OwnedFd, close_all
from mountd.kernel import compat, libc, namespaces, sockets
from mountd.kernel.flags import Clone
from tests.process import in_child

MAP = [(0, 200000, 1000), (5000, 300000, 1)]


def test_made_namespace_has_the_maps_and_root_as_owner() -> None:
    with namespaces.make_user_namespace(MAP, [(0, 400000, 7)]) as userns:
        assert namespaces.is_user_namespace(userns.fileno())
        assert namespaces.owner_uid(userns.fileno()) == 0
        assert namespaces.read_id_maps(userns.fileno()) == (MAP, [(0, 400000, 7)])
        assert namespaces.namespace_id(userns.fileno())
        outer = namespaces.parent(userns.fileno())
        assert outer is not None
        assert namespaces.identity(outer.fileno()) == (
            os.stat("/proc/self/ns/user").st_dev,
            os.stat("/proc/self/ns/user").st_ino,
        )
        assert namespaces.parent(outer.fileno()) is None
        outer.close()


def test_overlapping_maps_are_the_kernels_no() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        namespaces.make_user_namespace([(0, 1000, 10), (5, 2000, 10)], [(0, 1000, 10)])


def test_what_is_no_user_namespace() -> None:
    for path in ("/proc/self/ns/mnt", "/dev/null", "/etc/passwd"):
        with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
            assert not namespaces.is_user_namespace(fd.fileno())


def test_entering_fails_with_the_childs_error() -> None:
    with (
        OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY)) as fd,
        pytest.raises(SyscallError, match="EINVAL"),
    ):
        namespaces.read_id_maps(fd.fileno())


def test_the_child_in_a_foreign_namespace_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        namespaces.make_user_namespace(MAP, MAP) as userns,
        namespaces.Child(
            lambda: namespaces.setns(userns.fileno(), Clone.NEWUSER), [userns.fileno()]
        ) as child,
    ):
        held = os.listdir(f"/proc/{child.pid}/fd")
        assert len(held) == 2  # the namespace and the pipe that it answered on
        assert os.stat(f"/proc/{child.pid}/environ").st_uid == 0  # not dumpable: root's


def test_peer_is_pinned() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        credentials = sockets.peer_credentials(ours)
        assert (credentials.pid, credentials.uid, credentials.gid) == (os.getpid(), 0, 0)
        assert sockets.peer_groups(ours) >= set(os.getgroups())
        with sockets.peer_pidfd(ours) as pidfd, namespaces.namespace_of(pidfd.fileno(), "user") as userns:
            assert namespaces.identity(userns.fileno())[1] == os.stat("/proc/self/ns/user").st_ino
            compat.check_alive(pidfd.fileno())


def test_many_groups() -> None:
    def work() -> None:
        os.setgroups(range(1000, 1300))
        ours, _theirs = socket.socketpair()
        assert sockets.peer_groups(ours) == frozenset(range(1000, 1300))

    in_child(work)


def test_dead_peer_has_no_namespaces() -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    with namespaces.pidfd_open(pid) as pidfd:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with pytest.raises(SyscallError, match="ESRCH"):
            namespaces.namespace_of(pidfd.fileno(), "user")
        with pytest.raises(SyscallError, match="ESRCH"):
            compat.check_alive(pidfd.fileno())
        with pytest.raises(SyscallError, match="ESRCH"):
            namespaces.pidfd_open(pid)


def test_fallbacks_of_older_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> OwnedFd:
        raise NotSupported("it")

    monkeypatch.setattr(compat, "peer_pidfd", unknown)
    monkeypatch.setitem(libc.inject, "ioctl PIDFD_GET_USER_NAMESPACE", 25)
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        compat.pidfd_of_peer(ours) as pidfd,
        compat.user_namespace_of(pidfd.fileno(), os.getpid()) as userns,
    ):
        assert namespaces.is_user_namespace(userns.fileno())


def test_received_descriptors_are_close_on_exec() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, OwnedFd(os.open("/dev/null", os.O_RDONLY)) as null:
        sockets.send(theirs, b"hello", [null, null])
        assert sockets.peek(ours, 10) == b"hello"
        data, fds, truncated = sockets.receive(ours, 3, 16)
        assert data == b"hel"
        assert len(fds) == 2
        assert not truncated
        assert not any(os.get_inheritable(fd.fileno()) for fd in fds)
        close_all(fds)
        assert sockets.receive(ours, 10, 16) == (b"lo", [], False)


def test_truncation_is_seen_and_what_came_is_owned() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, OwnedFd(os.open("/dev/null", os.O_RDONLY)) as null:
        sockets.send(theirs, b"x", [null] * 5)
        _, fds, truncated = sockets.receive(ours, 1, 2)
        assert truncated
        close_all(fds)


def test_send_ends_at_its_deadline() -> None:
    import time

    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with ours, theirs, pytest.raises(TimeoutError):
        sockets.send(ours, b"x" * (1 << 20), [], time.monotonic() + 0.1)


def test_a_message_larger_than_the_buffer_arrives_whole() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sent = os.urandom(300_009)
    pid = os.fork()
    if pid == 0:
        sockets.send(ours, sent, [])
        os._exit(0)
    ours.close()
    got = b""
    while chunk := theirs.recv(65536):
        got += chunk
    theirs.close()
    os.waitpid(pid, 0)
    assert got == sent


def test_map_files_are_parsed() -> None:
    text = Path("/proc/self/uid_map").read_text()
    assert namespaces.parse_id_map(text) == [(0, 0, 4294967295)]
