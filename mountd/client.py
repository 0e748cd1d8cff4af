"""Asking mountd for a mount: the Python interface of io.mountd.Mount, standard library only.

with Client() as client, open_image("/var/lib/machines/base.raw") as image:
    reply = client.mount(image_source(), [image])
    with reply.mount:
        attach(reply.mount.fileno(), "/mnt")
"""

from __future__ import annotations

import errno
import os
import time

from mountd.errors import INTERFACE, InvalidParameter, NotFound, ProtocolError, SyscallError, Unreachable
from mountd.fds import OwnedFd, close_all
from mountd.kernel import mount_api, sockets
from mountd.kernel.flags import MoveMount
from mountd.wire.framing import MAX_FDS, MessageReader, boundary, encode, parse_reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mountd.wire.framing import Message

ENVIRONMENT = "MOUNTD_SOCKET"
SOCKETS = ("/run/mountd/io.mountd.Mount", "/run/host/mountd/io.mountd.Mount")
TIMEOUT = 90.0  # seconds; the daemon's own deadlines are shorter
HOST_ID_MAP = ["0", "0", "4294967295"]


def socket_paths() -> tuple[str, ...]:
    """Return where to look for the daemon, in order.

    The environment has no say in a program that runs with more rights than its caller has.
    """
    named = os.environ.get(ENVIRONMENT)
    if named and os.getuid() == os.geteuid() and os.getgid() == os.getegid():
        return (named,)
    return SOCKETS


def open_image(path: str, *, writable: bool = False) -> OwnedFd:
    """Open an image to hand it over. Raises NotFound, OSError."""
    access = os.O_RDWR if writable else os.O_RDONLY
    try:
        # Not to be held up by a pipe, or by a lease on the file.
        return OwnedFd(os.open(path, access | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK))
    except FileNotFoundError:
        raise NotFound(path) from None


def in_user_namespace() -> bool:
    """Tell whether this process is in a user namespace that does not map all ids, as the host's does."""
    with open("/proc/self/uid_map", encoding="utf-8") as file:
        return file.read().split() != HOST_ID_MAP


def attach(mount_fd: int, target: str) -> None:
    """Attach a mount at the directory `target`, in this process's mount namespace.

    Raises NotFound, NotADirectoryError, SyscallError (EPERM without CAP_SYS_ADMIN over the mount namespace).
    """
    try:
        directory = OwnedFd(os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except FileNotFoundError:
        raise NotFound(target) from None
    with directory:
        flags = MoveMount.F_EMPTY_PATH | MoveMount.T_EMPTY_PATH
        mount_api.move_mount(mount_fd, "", to_dir_fd=directory.fileno(), flags=flags)


class MountReply:
    """What Mount returned: `mount` belongs to whoever holds this; `mounts`, `decision` as on the wire."""

    __slots__ = ("decision", "mount", "mounts")

    def __init__(
        self, mount: OwnedFd, mounts: Sequence[Mapping[str, object]], decision: Mapping[str, object]
    ) -> None:
        """Take `mount` over."""
        self.mount = mount
        self.mounts = mounts
        self.decision = decision


class Client:
    """One connection to the daemon, usable in a with statement."""

    def __init__(self, path: str | None = None, timeout: float = TIMEOUT) -> None:
        """Connect to `path`, or to the first socket that is there. Raises Unreachable."""
        self._timeout = timeout
        failures = []
        for candidate in (path,) if path else socket_paths():
            try:
                self._socket = sockets.connect(candidate, timeout)
                return
            except OSError as error:
                failures.append(f"{candidate}: {error.strerror or error}")
        raise Unreachable("; ".join(failures))

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def mount(self, source: Mapping[str, object], fds: list[OwnedFd], **fields: object) -> MountReply:
        """Call Mount; `fields` are its parameters as the interface file names them, None ones left out.

        `fds` are borrowed. Raises the error that the daemon names, Unreachable, ProtocolError.
        """
        reply, received = self.call("Mount", {"source": source, **fields}, fds)
        try:
            mounts = reply["mounts"]
            decision = reply["decision"]
            if not isinstance(mounts, list) or not isinstance(decision, dict) or len(received) != 1:
                raise ProtocolError("the reply is not what Mount returns")
            return MountReply(received.pop(), mounts, decision)
        except KeyError:
            raise ProtocolError("the reply is not what Mount returns") from None
        finally:
            close_all(received)

    def explain(
        self, source: Mapping[str, object], fds: list[OwnedFd], **fields: object
    ) -> dict[str, object]:
        """Call Explain, with the parameters of `mount`. Raises the same."""
        reply, received = self.call("Explain", {"source": source, **fields}, fds)
        close_all(received)
        return reply

    def call(
        self, method: str, parameters: Mapping[str, object], fds: list[OwnedFd]
    ) -> tuple[dict[str, object], list[OwnedFd]]:
        """Call any method of io.mountd.Mount and return the reply with its descriptors, which are owned."""
        given = {name: value for name, value in parameters.items() if value is not None}
        request = encode({"method": f"{INTERFACE}.{method}", "parameters": given})
        deadline = time.monotonic() + self._timeout
        try:
            sockets.send(self._socket, request, fds, deadline)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have answered before it closed: too busy, shutting down
        except OSError as error:
            raise Unreachable(error.strerror or str(error)) from None
        message = self._receive(deadline)
        try:
            reply, _ = parse_reply(message.body)
            received, message.fds = message.fds, []
            return reply, received
        finally:
            message.close()

    def _receive(self, deadline: float) -> Message:
        reader = MessageReader()
        try:
            while True:
                sockets.set_deadline(self._socket, deadline)
                peeked = sockets.peek(self._socket, 65536)
                if not peeked:
                    raise Unreachable("it closed the connection without an answer")
                data, fds, lost = sockets.receive(self._socket, boundary(peeked) or len(peeked), MAX_FDS + 1)
                reader.feed(data, fds)
                if lost:
                    raise ProtocolError("a descriptor was lost: this process has none left")
                message = reader.next_message()
                if message is not None:
                    return message
        except OSError as error:
            if error.errno == errno.ETIMEDOUT or isinstance(error, TimeoutError):
                raise Unreachable("it did not answer in time") from None
            raise Unreachable(error.strerror or str(error)) from None
        finally:
            reader.close()


class Request:
    """What a command line asked for, turned into the parameters of Mount and Explain.

    Owns the descriptors that go along.
    """

    __slots__ = ("fds", "parameters", "source")

    def __init__(
        self,
        source: str,
        *,
        read_only: bool = True,
        file_system_type: str | None = None,
        options: Sequence[str] = (),
        userns: str | None = None,
        idmap: str | None = None,
    ) -> None:
        """Open what has to be opened.

        `source` is the path of an image or "tmpfs:SIZE"; `userns` the path of a user namespace, "none" for
        none, None for that of this process if it is not the host's. Raises NotFound, InvalidParameter and
        OSError.
        """
        self.fds: list[OwnedFd] = []
        self.parameters: dict[str, object] = {
            "readOnly": read_only,
            "fileSystemType": file_system_type,
            "options": list(options) or None,
            "idMap": {"kind": idmap} if idmap else None,
        }
        try:
            self.source = self._read_source(source, read_only)
            if userns is None and idmap in (None, "namespace", "ranges") and in_user_namespace():
                userns = "/proc/self/ns/user"
            if userns not in (None, "none"):
                self.parameters["userNamespaceFileDescriptor"] = self._add(open_image(str(userns)))
        except BaseException:
            self.close()
            raise

    def _read_source(self, source: str, read_only: bool) -> dict[str, object]:
        if source.startswith("tmpfs:"):
            return {"tmpfs": {"size": parse_size(source.removeprefix("tmpfs:"))}}
        return {"imageFileDescriptor": self._add(open_image(source, writable=not read_only))}

    def add_namespace(self, userns: OwnedFd) -> None:
        """Have ids mapped into this user namespace, which is taken over."""
        self.parameters["userNamespaceFileDescriptor"] = self._add(userns)

    def _add(self, fd: OwnedFd) -> int:
        self.fds.append(fd)
        return len(self.fds) - 1

    def close(self) -> None:
        """Close the descriptors."""
        close_all(self.fds)

    def __enter__(self) -> Request:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parse_size(text: str) -> int:
    """Return a number of bytes; K, M, G and T are powers of 1024. Raises InvalidParameter."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    unit = units.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdecimal() or len(digits) > 15:
        raise InvalidParameter("SOURCE", f"“tmpfs:{text}” has no size such as 64M")
    return int(digits) * unit


__all__ = [
    "Client",
    "MountReply",
    "Request",
    "SyscallError",
    "attach",
    "in_user_namespace",
    "open_image",
    "socket_paths",
]
