"""Containers for tests: a process in user and mount namespaces of its own, that runs a piece of the test."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import struct
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces, sockets
from mountd.kernel.flags import Clone, Propagation

T = TypeVar("T")
IdMap = Sequence[tuple[int, int, int]]

USER = 4000  # who starts a container; not known to the system
RANGE = ((0, 400000, 65536),)  # what its root and its users are on the host
STAYING_SECONDS = 60
NAMESPACES = Clone.NEWUSER | Clone.NEWNS


def as_user(work: Callable[[], T], uid: int = USER, gid: int | None = None, groups: Sequence[int] = ()) -> T:
    """Run `work` in a process with these ids and return what it returns."""

    def become() -> T:
        os.setgroups(list(groups))
        gid_ = uid if gid is None else gid
        os.setresgid(gid_, gid_, gid_)
        os.setresuid(uid, uid, uid)
        # Tests read each other's /proc; a change of ids would have forbidden it.
        set_dumpable()
        return work()

    return forked(become)


def in_container(
    work: Callable[[], T],
    *,
    uids: IdMap = RANGE,
    gids: IdMap | None = None,
    owner: int = USER,
    kinds: Clone = NAMESPACES,
) -> T:
    """Run `work` as root of a container that the user `owner` made; the maps are written by root.

    `work` runs in a fork: what it returns has to be picklable, and it sees all objects of the test.
    """
    return forked(lambda: make_container(work, uids, uids if gids is None else gids, kinds), owner)


@contextlib.contextmanager
def staying_in_container(
    work: Callable[[socket.socket], object], *, uids: IdMap = RANGE, owner: int = USER
) -> Iterator[socket.socket]:
    """A container that does `work` while the test goes on, which gets the other end of the work's socket.

    The work ends by itself once that is closed: it reads from it.
    """
    ours, theirs = socket.socketpair()
    ours.settimeout(STAYING_SECONDS)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            in_container(lambda: work(theirs), uids=uids, owner=owner)
        finally:
            os._exit(0)
    theirs.close()
    try:
        with ours:
            yield ours
    finally:
        os.waitpid(pid, 0)


def make_container(work: Callable[[], T], uids: IdMap, gids: IdMap, kinds: Clone = NAMESPACES) -> T:
    """From within any process: leave for new namespaces, be mapped by the test, and run `work` there."""
    namespaces.unshare(kinds)
    request_maps(uids, gids)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    set_dumpable()
    mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
    return work()


def user_namespace(
    uids: IdMap,
    gids: IdMap | None = None,
    *,
    owner: int | None = None,
    below: int | None = None,
) -> OwnedFd:
    """Return a user namespace without processes that `owner` made, with maps written by this process.

    An empty map is not written. `below` is the namespace to make it in, whose maps are then written as its
    root would; `owner` is a number of that one.
    """
    if below is not None:
        return _made_below(uids, uids if gids is None else gids, owner, below)
    maps = {"uid_map": uids, "gid_map": uids if gids is None else gids}
    entered, enters = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            if owner is not None:
                os.setresgid(owner, owner, owner)
                os.setresuid(owner, owner, owner)
            namespaces.unshare(Clone.NEWUSER)
            set_dumpable()
            os.write(enters, b"k")
            signal.pause()
        finally:
            os._exit(1)
    os.close(enters)
    try:
        assert os.read(entered, 1) == b"k", "there is no namespace"
        for name, rows in maps.items():
            if rows:
                with open(f"/proc/{pid}/{name}", "w") as file:
                    file.write("".join(f"{a} {b} {c}\n" for a, b, c in rows))
        return OwnedFd(os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC))
    finally:
        os.close(entered)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _made_below(uids: IdMap, gids: IdMap, owner: int | None, below: int) -> OwnedFd:
    """Make it in a child that has entered `below`, and take it over from there."""
    ours, theirs = socket.socketpair()

    def enter() -> None:
        namespaces.setns(below, Clone.NEWUSER)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        set_dumpable()
        with user_namespace(uids, gids, owner=owner) as made:
            sockets.send(theirs, b"k", [made])

    with ours, theirs:
        forked(enter)
        _, fds, _ = sockets.receive(ours, 1, 1)
        return fds[0]


_mapper: list[tuple[int, int]] = []  # pipe ends of the process that writes maps: (to it, from it)


def request_maps(uids: IdMap, gids: IdMap) -> None:
    """Have root write this process's maps, as newuidmap(1) would."""
    ask, answer = _mapper[-1]
    os.write(ask, pickle.dumps((os.getpid(), list(uids), list(gids))).ljust(4096, b"\0"))
    said = os.read(answer, 1)
    assert said == b"k", "the maps were not written"


@contextlib.contextmanager
def mapper() -> Iterator[None]:
    """Have a root process at hand that writes the maps of containers; needed around `in_container`."""
    questions, ask = os.pipe2(os.O_CLOEXEC)
    answer, answers = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(ask)
        os.close(answer)
        while data := os.read(questions, 4096):
            target, uids, gids = pickle.loads(data)
            said = b"k"
            for name, rows in (("uid_map", uids), ("gid_map", gids)):
                try:
                    with open(f"/proc/{target}/{name}", "w") as file:
                        file.write("".join(f"{a} {b} {c}\n" for a, b, c in rows))
                except OSError:
                    said = b"e"
            os.write(answers, said)
        os._exit(0)
    os.close(questions)
    os.close(answers)
    _mapper.append((ask, answer))
    try:
        yield
    finally:
        _mapper.pop()
        os.close(ask)
        os.close(answer)
        os.waitpid(pid, 0)


def drop_capabilities() -> None:
    """Have none of root's capabilities any more, and get none back (capset(2), capabilities(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    assert libc.capset(header, bytes(24)) == 0


def forked(work: Callable[[], T], uid: int | None = None) -> T:
    """Run `work` in a fork, as `uid`, and return what it returns or fail with its traceback."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                set_dumpable()
            result = (True, work())
        except BaseException:  # noqa: BLE001 - the parent raises it
            result = (False, traceback.format_exc())
        try:
            with open(writer, "wb") as file:
                pickle.dump(result, file)
        finally:
            os._exit(0)
    os.close(writer)
    try:
        with open(reader, "rb") as file:
            data = file.read()
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.waitpid(pid, 0)
    assert data, "the process has ended without a word"
    good, value = pickle.loads(data)
    assert good, value
    return value  # type: ignore[no-any-return]


def set_dumpable() -> None:
    """Let others of the same user look into /proc of this process, and itself write its maps."""
    from mountd.kernel.libc import call

    call("prctl", namespaces.PR_SET_DUMPABLE, 1, 0, 0, 0)
