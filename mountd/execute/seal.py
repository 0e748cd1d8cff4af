"""Locking the attributes of a mount, so that whoever receives it cannot clear them.

The flags of a mount bind only those who do not own its mount namespace: a container that is root in its own
namespaces takes nosuid and nodev off a mount that it was handed, and opens a device node on it. The kernel
locks them only where it *copies* a mount into a less privileged mount namespace (mount_namespaces(7)).

So there is one process, the sealer, whose mount namespace belongs to a user namespace of its own and is a
slave copy of the daemon's. In both there is a staging directory, a shared mount, with one spot for each
worker:

    worker: attach the mount at the spot         it propagates into the sealer's copy and is locked there
    worker: ask                                  sealer: clone what is at the spot, send the clone
    worker: detach the spot                      it propagates as well; the clone stays

A clone of a locked mount is locked. An answer carries the number of its question, so that one that a dead
worker did not wait for is never taken for the answer to its successor's.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from typing import TYPE_CHECKING

from mountd.errors import NotSupported, SyscallError
from mountd.fds import close_all
from mountd.kernel import mount_api, namespaces, sockets
from mountd.kernel.flags import Clone, Propagation, Unmount
from mountd.kernel.libc import call

if TYPE_CHECKING:
    from mountd.fds import OwnedFd

QUESTION = struct.Struct("=Q")
ANSWER = struct.Struct("=Qi")  # number of the question, errno
PR_SET_PDEATHSIG = 1
MAXIMUM_DETACH = 16
NOT_A_MOUNT = 22  # EINVAL of umount2(2)


class Seal:
    """A worker's way to the sealer: its spot and its socket."""

    def __init__(self, spot: str, channel: socket.socket) -> None:
        """`channel` is borrowed from the `Staging`."""
        self.spot = spot
        self._channel = channel
        self._number = int.from_bytes(os.urandom(4), "little") << 32
        self._occupied = False

    def fileno(self) -> int:
        """Return the descriptor of the socket, which the worker keeps open."""
        return self._channel.fileno()

    def __call__(self, mount: OwnedFd) -> OwnedFd:
        """Take `mount` over and return a mount of the same with its attributes locked.

        `clear` has to follow; it is apart as it takes time that nobody need wait for. Raises SyscallError,
        and ConnectionError if the sealer has ended.
        """
        self.clear()
        try:
            mount_api.move_mount(mount.fileno(), self.spot)
            self._occupied = True
        finally:
            mount.close()
        return self._ask()

    def clear(self) -> None:
        """Detach what the last call has left at the spot. Raises SyscallError."""
        if self._occupied:
            mount_api.umount(self.spot)
            self._occupied = False

    def _ask(self) -> OwnedFd:
        self._number += 1
        self._channel.send(QUESTION.pack(self._number), socket.MSG_NOSIGNAL)
        while True:
            data, fds, _ = sockets.receive(self._channel, ANSWER.size, 1)
            if len(data) != ANSWER.size:
                close_all(fds)
                raise ConnectionResetError("the sealer has ended")
            number, failure = ANSWER.unpack(data)
            if number != self._number:
                close_all(fds)
                continue
            if failure or len(fds) != 1:
                close_all(fds)
                raise SyscallError(failure, "open_tree(spot of the sealer, OPEN_TREE_CLONE)")
            return fds.pop()


class Staging:
    """The staging directory in a mount namespace that is nobody else's, and the sealer process."""

    def __init__(self, directory: str, spots: int) -> None:
        """Leave the mount namespace for a private one, stage at `directory`, and start the sealer.

        Raises SyscallError, NotSupported and OSError.
        """
        self.directory = directory
        namespaces.unshare(Clone.NEWNS)
        # What happens outside still arrives; what is mounted here never leaves.
        mount_api.set_propagation("/", Propagation.SLAVE, recursive=True)
        call("mount", b"mountd", directory.encode(), b"tmpfs", 0, b"mode=0700,size=64k")
        mount_api.set_propagation(directory, Propagation.SHARED)
        self._channels: list[tuple[socket.socket, socket.socket]] = []
        for number in range(spots):
            os.mkdir(f"{directory}/{number}", 0o700)
            pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
            self._channels.append(pair)
        self.pid = self._start()

    def seal(self, number: int) -> Seal:
        """Return the way to the sealer for the worker with this number, in that worker."""
        return Seal(f"{self.directory}/{number}", self._channels[number][0])

    def clean(self, number: int) -> None:
        """Detach what a worker that was killed has left at its spot. Raises SyscallError."""
        for _ in range(MAXIMUM_DETACH):
            try:
                mount_api.umount(f"{self.directory}/{number}", Unmount.DETACH | Unmount.NOFOLLOW)
            except SyscallError as error:
                if error.errno == NOT_A_MOUNT:
                    return
                raise

    def _start(self) -> int:
        ready, started = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            try:
                os.close(ready)
                self._be_the_sealer(started)
            finally:
                os._exit(1)
        os.close(started)
        with open(ready, "rb") as file:
            answer = file.read(4)
        if answer != b"\0\0\0\0":
            os.waitpid(pid, 0)
            number = int.from_bytes(answer, "little")
            if number in (0, 38):
                raise NotSupported("user namespaces, which locking the flags of a mount needs")
            raise SyscallError(number, "unshare(NEWUSER|NEWNS)")
        for _, theirs in self._channels:
            theirs.close()
        return pid

    def _be_the_sealer(self, started: int) -> None:
        """Answer until the daemon is gone. Nothing is imported here, and no exception leaves."""
        keep = {started, *(theirs.fileno() for _, theirs in self._channels)}
        namespaces.close_all_but(keep)
        try:
            namespaces.unshare(Clone.NEWUSER | Clone.NEWNS)
        except SyscallError as error:
            os.write(started, (error.errno or 38).to_bytes(4, "little"))
            return
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.write(started, b"\0\0\0\0")
        os.close(started)
        spots = {theirs.fileno(): number for number, (_, theirs) in enumerate(self._channels)}
        poller = select.epoll()
        for fd in spots:
            poller.register(fd, select.EPOLLIN)
        while True:
            for fd, _ in poller.poll():
                self._answer(self._channels[spots[fd]][1], f"{self.directory}/{spots[fd]}")

    @staticmethod
    def _answer(channel: socket.socket, spot: str) -> None:
        question = channel.recv(QUESTION.size)
        if len(question) != QUESTION.size:
            os._exit(0)  # the daemon has ended
        (number,) = QUESTION.unpack(question)
        try:
            with mount_api.clone_mount(spot) as clone:
                sockets.send(channel, ANSWER.pack(number, 0), [clone])
        except SyscallError as error:
            sockets.send(channel, ANSWER.pack(number, error.errno or 5), [])
