"""Asking mountd for a mount: the Python interface of io.mountd.Mount, standard library only.

    from mountd.client import mount_image
    mount_image("/var/lib/machines/base.raw", "/mnt")

mounts an image in the mount namespace of this process. To have the mount itself, and attach it later or pass
it on:

    with Client() as client, client.mount_image("/var/lib/machines/base.raw") as reply:
        attach(reply.mount.fileno(), "/mnt")

Every refusal is a MountdError: its text is one line, and `hint` says how to get out of it.
"""

from __future__ import annotations

import binascii
import errno
import os
import time

from mountd.errors import (
    INTERFACE,
    InvalidParameter,
    MountdError,
    NotFound,
    OptionNotPermitted,
    ProtocolError,
    SyscallError,
    Unreachable,
)
from mountd.fds import OwnedFd, close_all
from mountd.kernel import mount_api, sockets
from mountd.kernel.flags import MoveMount
from mountd.wire.framing import (
    MAX_FDS,
    MessageReader,
    boundary,
    encode,
    is_text,
    parse_reply,
    whole_message,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from mountd.wire.framing import Message

    # The path of the hash data, the root hash in hexadecimal, the path of a signature of the root hash.
    Verity = tuple[str, str, str | None]

ENVIRONMENT = "MOUNTD_SOCKET"
SOCKETS = ("/run/mountd/io.mountd.Mount", "/run/host/mountd/io.mountd.Mount")
TIMEOUT = 90.0  # seconds; the daemon's own deadlines are shorter
HOST_ID_MAP = ["0", "0", "4294967295"]
IDMAPS = ("none", "namespace", "caller")  # those that need no ranges
TMPFS = "tmpfs:"
STORED = "stored:"
OCI = "oci:"
TRY_AGAIN = "try again; the journal of mountd says what it was doing"
ENDED = "it closed the connection without an answer"
MAXIMUM_SIGNATURE = 256 << 10  # bytes
MAXIMUM_INTEGER = (1 << 63) - 1


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


def open_directory(path: str) -> OwnedFd:
    """Open a directory to hand it over; one that cannot be read, in a way that proves no access."""
    flags = os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return OwnedFd(os.open(path, flags | os.O_RDONLY))
    except PermissionError:
        return OwnedFd(os.open(path, flags | os.O_PATH))


def in_user_namespace() -> bool:
    """Tell whether this process is in a user namespace that does not map all ids, as the host's does."""
    with open("/proc/self/uid_map", encoding="utf-8") as file:
        return file.read().split() != HOST_ID_MAP


def open_target(path: str) -> OwnedFd:
    """Open the directory to attach a mount at. Raises NotFound, OSError."""
    try:
        return OwnedFd(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except FileNotFoundError:
        raise NotFound(path, hint="make the directory first") from None


def attach_at(mount_fd: int, directory_fd: int, path: str) -> None:
    """Attach a mount at an open directory; `path` is what errors call it. Raises SyscallError."""
    flags = MoveMount.F_EMPTY_PATH | MoveMount.T_EMPTY_PATH
    try:
        mount_api.move_mount(mount_fd, "", to_dir_fd=directory_fd, flags=flags)
    except SyscallError as error:
        # The numbers of descriptors would tell the user nothing.
        raise SyscallError(error.errno or 0, f"move_mount({path})", error.log) from None


def attach(mount_fd: int, target: str) -> None:
    """Attach a mount at the directory `target`, in this process's mount namespace.

    Raises NotFound, NotADirectoryError, SyscallError (EPERM without CAP_SYS_ADMIN over the mount namespace).
    """
    with open_target(target) as directory:
        attach_at(mount_fd, directory.fileno(), target)


def mount_image(source: str | os.PathLike[str], target: str | os.PathLike[str], **wishes: Any) -> MountReply:
    """Mount `source` at the directory `target`, and return what mountd decided.

    `wishes` are the arguments of `Request`. Raises what `Client`, `Client.mount_image` and `attach` raise.
    """
    path = os.fspath(target)
    with open_target(path) as directory, Client() as client, client.mount_image(source, **wishes) as reply:
        attach_at(reply.mount.fileno(), directory.fileno(), path)
        return reply


class MountReply:
    """What Mount returned: `mount` belongs to whoever holds this; `mounts`, `decision` as on the wire.

    In a with statement, the descriptor is closed at the end; what was attached stays.
    """

    __slots__ = ("decision", "mount", "mounts")

    def __init__(
        self, mount: OwnedFd, mounts: Sequence[Mapping[str, object]], decision: Mapping[str, object]
    ) -> None:
        """Take `mount` over."""
        self.mount = mount
        self.mounts = mounts
        self.decision = decision

    def close(self) -> None:
        """Close the descriptor: a mount that was not attached is gone."""
        self.mount.close()

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
                or len(received) != 1
            ):
                raise ProtocolError("the reply is not what Mount returns")
            return MountReply(received.pop(), mounts, decision)
        finally:
            close_all(received)

    def explain(
        self, source: Mapping[str, object], fds: list[OwnedFd], **fields: object
    ) -> dict[str, object]:
        """Call Explain, with the parameters of `mount`. Raises the same."""
        reply, received = self.call("Explain", {"source": source, **fields}, fds)
        close_all(received)
        if not isinstance(reply.get("decision"), dict):
            raise ProtocolError("the reply is not what Explain returns")
        return reply

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
        deadline = time.monotonic() + self._timeout
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
        deadline = time.monotonic() + self._timeout
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
            deadline = time.monotonic() + self._timeout

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


def given(parameters: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters that are not None."""
    return {name: value for name, value in parameters.items() if value is not None}


def connect(path: str, deadline: float) -> socket.socket:
    """Return a connection to the daemon; while it has too many to accept, try again. Raises OSError."""
    while True:
        try:
            return sockets.connect(path, max(0.001, deadline - time.monotonic()))
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


class Request:
    """What a command line asked for, turned into the parameters of Mount and Explain.

    Owns the descriptors that go along.
    """

    __slots__ = ("fds", "parameters", "source")

    def __init__(
        self,
        source: str,
        *,
        read_only: bool | None = None,
        file_system_type: str | None = None,
        options: Sequence[str] = (),
        userns: str | None = None,
        idmap: str | None = None,
        image_policy: str | None = None,
        signature: str | None = None,
        verity: Verity | None = None,
    ) -> None:
        """Open what has to be opened.

        `source` is the path of an image or of a directory, "stored:sha256:…" for one of mountd's store,
        "oci:HOST/REPOSITORY@sha256:…" for one that was pulled into it, or "tmpfs:SIZE".
        `read_only` is None for what fits: images are mounted read-only, a tmpfs is not. `userns` is the path
        of a user namespace, "none" for none, None for that of this process if it is not the host's.
        `image_policy` is in the grammar of systemd.image-policy(7), `signature` the path of a detached
        signature of the image, `verity` the paths of hash data and of the signature of the root hash. Raises
        NotFound, InvalidParameter, OptionNotPermitted and OSError.
        """
        check_text(options, file_system_type)
        if image_policy is not None and not is_text(image_policy):
            raise InvalidParameter("imagePolicy", "it is no text")
        if read_only is None:
            read_only = not source.startswith(TMPFS)
        self.fds: list[OwnedFd] = []
        self.parameters: dict[str, object] = {
            "readOnly": read_only,
            "fileSystemType": file_system_type,
            "options": list(options) or None,
            "idMap": {"kind": idmap} if idmap else None,
            "imagePolicy": image_policy,
        }
        try:
            self.source = self._read_source(source, read_only)
            self._add_companions(signature, verity)
            if userns is None and idmap in (None, "namespace") and in_user_namespace():
                userns = "/proc/self/ns/user"
            if userns not in (None, "none"):
                self.parameters["userNamespaceFileDescriptor"] = self._add(open_image(str(userns)))
        except BaseException:
            self.close()
            raise

    def _read_source(self, source: str, read_only: bool) -> dict[str, object]:
        if source.startswith(TMPFS):
            return {"tmpfs": {"size": parse_size(source.removeprefix(TMPFS))}}
        if source.startswith((STORED, OCI)):
            if not is_text(source):
                raise InvalidParameter("SOURCE", "it is no text")
            return {"reference": source}
        try:
            if os.path.isdir(source):
                return {"directoryFileDescriptor": self._add(open_directory(source))}
            return {"imageFileDescriptor": self._add(open_image(source, writable=not read_only))}
        except OSError as error:
            if read_only or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
                raise
            reason = f"{source}: {error.strerror}"
            raise OptionNotPermitted("rw", reason, hint="ask for a read-only mount") from None

    def _add_companions(self, signature: str | None, verity: Verity | None) -> None:
        if (signature or verity) and "imageFileDescriptor" not in self.source:
            raise InvalidParameter("SOURCE", "a signature and dm-verity go with the file of an image only")
        if signature is not None:
            self.source["signature"] = read_signature(signature)
        if verity is not None:
            data, root_hash, of_root_hash = verity
            self.source["verity"] = given(
                {
                    "dataFileDescriptor": self._add(open_image(data)),
                    "rootHash": root_hash,
                    "signature": None if of_root_hash is None else read_signature(of_root_hash),
                }
            )

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


def read_signature(path: str) -> str:
    """Return a detached signature in base64. Raises NotFound, InvalidParameter, OSError."""
    with open_image(path) as fd:
        data = os.read(fd.fileno(), MAXIMUM_SIGNATURE + 1)
    if not 0 < len(data) <= MAXIMUM_SIGNATURE:
        raise InvalidParameter("signature", f"{path} has not 1 to {MAXIMUM_SIGNATURE} bytes")
    return binascii.b2a_base64(data, newline=False).decode()


def check_text(options: Sequence[str], file_system_type: str | None) -> None:
    """Raise OptionNotPermitted or InvalidParameter for what cannot be said on the wire, which is UTF-8."""
    for option in options:
        if not is_text(option):
            raise OptionNotPermitted(option, "it is no text", hint="write it in UTF-8")
    if file_system_type is not None and not is_text(file_system_type):
        raise InvalidParameter("fileSystemType", "it is no text")


def parse_size(text: str) -> int:
    """Return a number of bytes; K, M, G and T are powers of 1024. Raises InvalidParameter."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    unit = units.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    size = int(digits) * unit if digits.isdecimal() and len(digits) <= 18 else 0
    if not 0 < size <= MAXIMUM_INTEGER:
        raise InvalidParameter("SOURCE", f"“{TMPFS}{text}” has no size such as 64M")
    return size


__all__ = [
    "Client",
    "MountReply",
    "MountdError",
    "Request",
    "SyscallError",
    "attach",
    "in_user_namespace",
    "mount_image",
    "open_image",
    "socket_paths",
]
