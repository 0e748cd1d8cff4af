"""One connection to mountd, and what comes over it: what mountd.client consists of, without the rest.

For programs that last for milliseconds, and know where they are: what most mounts do without, an error that
came over the wire, several partitions, attaching at all, is loaded where it turns up. Whoever may have
entered another mount namespace or root directory by then uses mountd.client, which has all of it loaded.
"""

from __future__ import annotations

import errno
import os
import time

from mountd.errors import (
    INTERFACE,
    MountdError,
    NotFound,
    ProtocolError,
    SyscallError,
    Unreachable,
)
from mountd.fds import OwnedFd, close_all
from mountd.kernel import sockets
from mountd.request import Request, given
from mountd.wire.framing import (
    MAX_FDS,
    MessageReader,
    boundary,
    encode,
    parse_reply,
    whole_message,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from mountd.kernel.sockets import Socket
    from mountd.wire.framing import Message

ENVIRONMENT = "MOUNTD_SOCKET"
SOCKETS = ("/run/mountd/io.mountd.Mount", "/run/host/mountd/io.mountd.Mount")
TIMEOUT = 90.0  # seconds; the daemon's own deadlines are shorter
CONSENT = 150.0  # in addition, for who may be asked by then
TRY_AGAIN = "try again; the journal of mountd says what it was doing"
EMPTY = "give the path of a directory"
ENDED = "it closed the connection without an answer"


def socket_paths() -> tuple[str, ...]:
    """Return where to look for the daemon, in order.

    The environment has no say in a program that runs with more rights than its caller has.
    """
    named = os.environ.get(ENVIRONMENT)
    if named and os.getuid() == os.geteuid() and os.getgid() == os.getegid():
        return (named,)
    return SOCKETS


def open_target(path: str) -> OwnedFd:
    """Open the directory to attach a mount at. Raises NotFound, OSError."""
    try:
        return OwnedFd(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except FileNotFoundError:
        raise NotFound(path or "“”", hint="make the directory first" if path else EMPTY) from None


def attach_at(mount_fd: int, directory_fd: int, path: str) -> None:
    """Attach a mount at an open directory; `path` is what errors call it. Raises SyscallError."""
    from mountd.kernel import moving  # who has mountd attach does without

    try:
        moving.attach(mount_fd, directory_fd)
    except SyscallError as error:
        # The numbers of descriptors would tell the user nothing.
        raise SyscallError(error.errno or 0, f"move_mount({path})", error.log) from None


def attach_reply(reply: MountReply, directory_fd: int, path: str) -> list[str]:
    """Attach all mounts of a reply at an open directory and below it; `path` is what errors call it.

    Returns the places of those that were left out (`attaching.attach_parts`). Raises NotFound, SyscallError.
    """
    if reply.places == [""]:
        attach_at(reply.mount.fileno(), directory_fd, path)
        return []
    from mountd.kernel import attaching

    return attaching.attach_tree(directory_fd, list(zip(reply.fds, reply.places, strict=True)))


class MountReply:
    """What Mount returned: `mount` belongs to whoever holds this; `mounts`, `decision` as on the wire.

    Of several, `others` are all but the first. In a with statement, the descriptors are closed at the end;
    what was attached stays.
    """

    __slots__ = ("decision", "mount", "mounts", "others")

    def __init__(
        self,
        mount: OwnedFd,
        mounts: Sequence[Mapping[str, object]],
        decision: Mapping[str, object],
        others: Sequence[OwnedFd] = (),
    ) -> None:
        """Take `mount` and `others` over."""
        self.mount = mount
        self.others = others
        self.mounts = mounts
        self.decision = decision

    @property
    def fds(self) -> list[int]:
        """All mounts, borrowed."""
        return [self.mount.fileno(), *(each.fileno() for each in self.others)]

    @property
    def places(self) -> list[str]:
        """Where each mount belongs, relative to the directory for the whole; "" is that itself."""
        return [str(each.get("mountPoint") or "") for each in self.mounts]

    def close(self) -> None:
        """Close the descriptors: a mount that was not attached is gone."""
        close_all([self.mount, *self.others])

    def __enter__(self) -> MountReply:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """One connection to the daemon, usable in a with statement."""

    def __init__(self, path: str | None = None, timeout: float = TIMEOUT) -> None:
        """Connect to `path`, or to the first socket that is there. Raises Unreachable."""
        self._timeout = timeout
        deadline = time.monotonic() + timeout
        failures = []
        for candidate in (path,) if path else socket_paths():
            try:
                self._socket = connect(candidate, deadline)
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
            mounts, decision = reply.get("mounts"), reply.get("decision")
            if (
                not (isinstance(mounts, list) and mounts and all(isinstance(each, dict) for each in mounts))
                or not isinstance(decision, dict)
                or [each.get("mountFileDescriptor") for each in mounts] != list(range(len(received)))
            ):
                raise ProtocolError("the reply is not what Mount returns")
            first, *others = received
            received.clear()
            return MountReply(first, mounts, decision, others)
        finally:
            close_all(received)

    def explain(
        self, source: Mapping[str, object], fds: list[OwnedFd], **fields: object
    ) -> dict[str, object]:
        """Call Explain, with the parameters of `mount`, but for the password. Raises the same."""
        fields.pop("password", None)
        reply, received = self.call("Explain", {"source": source, **fields}, fds)
        close_all(received)
        if not isinstance(reply.get("decision"), dict):
            raise ProtocolError("the reply is not what Explain returns")
        return reply

    def attach(
        self, source: Mapping[str, object] | None, fds: list[OwnedFd], **fields: object
    ) -> dict[str, object]:
        """Call Attach, with the parameters of `mount` and targetFileDescriptor (`Request.add_target`).

        Returns `id` and `decision`, of several mounts `mounts` and `leftOut` as well. Raises the same.
        """
        reply, received = self.call("Attach", {"source": source, **fields}, fds)
        close_all(received)
        if not (isinstance(reply.get("id"), int) and isinstance(reply.get("decision"), dict)):
            raise ProtocolError("the reply is not what Attach returns")
        return reply

    def detach(self, id: int, *, lazy: bool = False) -> None:
        """Call Detach for the mount with the unique `id`. Raises NotFound, InUse, and as `mount` does."""
        close_all(self.call("Detach", {"id": id, "lazy": lazy or None}, [])[1])

    def late_reply(self, seconds: float) -> dict[str, object] | None:
        """Return the reply to a call that was interrupted; None for an error, or none within `seconds`."""
        try:
            message = self._receive(time.monotonic() + seconds)
            message.close()
            return parse_reply(message.body)[0]
        except MountdError:
            return None

    def mount_image(self, source: str | os.PathLike[str], **wishes: Any) -> MountReply:
        """Mount the image at path `source`; `wishes` are the arguments of `Request`.

        The reply's mount is attached nowhere yet. Raises what `Request` and `mount` raise.
        """
        with Request(os.fspath(source), **wishes) as request:
            return self.mount(request.source, request.fds, **request.parameters)

    def explain_image(self, source: str | os.PathLike[str], **wishes: Any) -> dict[str, object]:
        """Say what `mount_image` would do, and why. Raises the same, but a refusal is an answer."""
        with Request(os.fspath(source), **wishes) as request:
            return self.explain(request.source, request.fds, **request.parameters)

    def call(
        self, method: str, parameters: Mapping[str, object], fds: list[OwnedFd]
    ) -> tuple[dict[str, object], list[OwnedFd]]:
        """Call any method of io.mountd.Mount and return the reply with its descriptors, which are owned.

        Another interface's is called by its full name, which has dots in it. Raises as `mount` does.
        """
        deadline = time.monotonic() + self._timeout + (CONSENT if parameters.get("interactive") else 0)
        self._send({"method": full_name(method), "parameters": given(parameters)}, fds, deadline)
        message = self._receive(deadline)
        try:
            reply, _ = parse_reply(message.body)
            received, message.fds = message.fds, []
            return reply, received
        finally:
            message.close()

    def call_more(
        self, method: str, parameters: Mapping[str, object], fds: list[OwnedFd]
    ) -> Iterator[dict[str, object]]:
        """Call a method that tells how far it is, and yield each reply, the last one as well.

        None of these have descriptors. The timeout is for each reply. Raises as `call` does; whoever stops
        before the last reply cannot use the connection any more.
        """
        timeout = self._timeout + (CONSENT if parameters.get("interactive") else 0)
        deadline = time.monotonic() + timeout
        call = {"method": full_name(method), "parameters": given(parameters), "more": True}
        self._send(call, fds, deadline)
        continues = True
        while continues:
            message = self._receive(deadline)
            try:
                reply, continues = parse_reply(message.body)
            finally:
                message.close()
            yield reply
            deadline = time.monotonic() + timeout

    def _send(self, call: Mapping[str, object], fds: list[OwnedFd], deadline: float) -> None:
        try:
            sockets.send(self._socket, encode(call), fds, deadline)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have answered before it closed: too busy, shutting down
        except OSError as error:
            raise Unreachable(error.strerror or str(error)) from None

    def _receive(self, deadline: float) -> Message:
        reader = MessageReader()
        try:
            # First: there is no answer yet.
            sockets.wait(self._socket, sockets.READABLE, deadline)
            while True:
                peeked = sockets.peek(self._socket, 65536, deadline)
                if not peeked:
                    raise Unreachable(ENDED, hint=TRY_AGAIN)
                end = boundary(peeked)
                data, fds, lost = sockets.receive(self._socket, end or len(peeked), MAX_FDS + 1)
                if len(data) == end and not lost and not reader.pending:
                    return whole_message(data, fds)
                reader.feed(data, fds)
                if lost:
                    raise ProtocolError("a descriptor was lost: this process has none left")
                message = reader.next_message()
                if message is not None:
                    return message
        except OSError as error:
            if error.errno == errno.ETIMEDOUT or isinstance(error, TimeoutError):
                raise Unreachable("it did not answer in time", hint=TRY_AGAIN) from None
            if error.errno == errno.ECONNRESET:
                raise Unreachable(ENDED, hint=TRY_AGAIN) from None
            raise Unreachable(error.strerror or str(error)) from None
        finally:
            reader.close()


def full_name(method: str) -> str:
    """Return the full name of a method, which is one of io.mountd.Mount if no interface is named."""
    return method if "." in method else f"{INTERFACE}.{method}"


def connect(path: str, deadline: float) -> Socket:
    """Return a connection to the daemon; while it has too many to accept, try again. Raises OSError."""
    while True:
        try:
            return sockets.connect(path, max(0.001, deadline - time.monotonic()))
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
