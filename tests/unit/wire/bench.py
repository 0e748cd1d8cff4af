"""A dispatcher whose handlers remember what they got."""

from __future__ import annotations

import os

import pytest

from mountd.errors import MountdError
from mountd.fds import OwnedFd, close_all
from mountd.wire.answer import Failure
from mountd.wire.dispatch import Dispatcher, interface_directory
from mountd.wire.framing import Message, decode, encode, parse_reply

MOUNT = "io.mountd.Mount.Mount"
EXPLAIN = "io.mountd.Mount.Explain"
DECISION: dict[str, object] = {"verdict": "allow", "reason": "because"}
MOUNTED: dict[str, object] = {
    "mounts": [{"mountFileDescriptor": 0, "fileSystemType": "erofs", "readOnly": True, "id": 7}],
    "decision": DECISION,
}
EXPLAINED: dict[str, object] = {"decision": DECISION, "facts": {"a": "b"}, "steps": []}
SOURCE: dict[str, object] = {"imageFileDescriptor": 0}


def descriptor() -> OwnedFd:
    return OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))


class Recorder:
    """A handler that remembers what it got, and does what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, object], int, object]] = []
        self.fails: Exception | None = None
        self.reply = MOUNTED
        self.made: list[OwnedFd] = []
        self.makes = 1

    def __call__(
        self, parameters: dict[str, object], fds: list[OwnedFd], context: object
    ) -> tuple[dict[str, object], list[OwnedFd]]:
        self.calls.append((parameters, len(fds), context))
        if self.fails is not None:
            raise self.fails
        self.made = [descriptor() for _ in range(self.makes)]
        return self.reply, list(self.made)


class Bench:
    """A dispatcher with two recorders, and what it reported."""

    def __init__(self) -> None:
        self.mount = Recorder()
        self.explain = Recorder()
        self.explain.reply = EXPLAINED
        self.explain.makes = 0
        self.bugs: list[Exception] = []
        self.failure: Failure | None = None  # of the last call
        self.dispatcher = Dispatcher(
            interface_directory(), {MOUNT: self.mount, EXPLAIN: self.explain}, self.bugs.append
        )

    def handle(self, body: dict[str, object], fds: int = 1) -> tuple[bytes, list[OwnedFd]]:
        raw = encode(body)[:-1]
        message = Message(decode(raw), raw, [descriptor() for _ in range(fds)])
        owned = list(message.fds)
        try:
            reply, reply_fds, self.failure = self.dispatcher.handle(message, "context")
        finally:
            message.close()
        assert message.fds == []
        assert all(fd.closed for fd in owned)
        return reply, reply_fds

    def call(self, body: dict[str, object], fds: int = 1) -> dict[str, object]:
        """The parameters of the reply, or the error that it says, raised."""
        reply, reply_fds = self.handle(body, fds)
        close_all(reply_fds)
        assert reply.endswith(b"\0")
        parameters, continues = parse_reply(decode(reply[:-1]))
        assert not continues
        return parameters

    def refused(self, body: dict[str, object]) -> MountdError:
        reply, reply_fds = self.handle(body)
        assert reply_fds == []
        with pytest.raises(MountdError) as raised:
            parse_reply(decode(reply[:-1]))
        return raised.value


def mount_call(**parameters: object) -> dict[str, object]:
    return {"method": MOUNT, "parameters": {"source": SOURCE, **parameters}}
