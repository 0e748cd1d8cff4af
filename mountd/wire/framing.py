"""Bytes and descriptors become messages, and messages become bytes: varlink's framing, without any I/O.

Rules
-----
1. Nothing here reads or writes. A transport feeds what one recvmsg() returned; whoever wants to test a
   boundary cuts the same bytes differently.
2. The bytes come from an enemy. Whatever they are, the outcome is a message, a `ProtocolError`, a
   `LimitExceeded` or (above the framing, in `parse_call`) an `InvalidParameter`. Anything else is a bug.
3. Memory is bounded by the limits below, and the time is linear in the bytes that were fed.
4. A descriptor is owned by exactly one of: the list it is fed in, the reader, a `Message`. Every error
   closes all that the reader owns.
5. What two JSON parsers could read differently is refused: of two equal keys, which one counts? Of an
   integer past 64 bits, which digits? Nobody who asks in earnest sends such things.

Theory of operation
-------------------
A varlink message is a JSON object in UTF-8 that ends in a NUL byte. On an AF_UNIX stream, descriptors travel
with the bytes of one sendmsg(). The kernel ends a read *after* bytes that carried descriptors, but not
before them: a greedy recvmsg() returns the bytes of message 1 together with the bytes and the descriptors of
message 2, and nobody can tell any more whose they are. Hence the transport

* peeks (MSG_PEEK, without a control buffer, so that no descriptor is installed),
* asks `boundary()` how many of these bytes belong to the message in progress,
* reads exactly that many, with a control buffer, and feeds them together with what descriptors came along.

So one feed() never spans two messages, and its descriptors belong to the message that its first byte is in.
The reader does not rely on it: a feed that has descriptors and does span two messages is refused. A sender
that puts the end of one message and the beginning of the next into one sendmsg() with descriptors gives them
to the first of the two, which is where their first byte is.

The reader keeps one buffer, and the position in the stream at which each descriptor arrived. feed() only
counts: NULs, and the length of the message without one. next_message() cuts the first message off, gives it
the descriptors that arrived before its end, and decodes it. Errors are final: the stream has no way back to
a boundary that both sides agree on, so the reader raises the same error forever after.

Before json sees the bytes, the depth of their nesting is counted without recursion, which is why no input
reaches the interpreter's recursion limit.

Of the json package, only its scanner and its encoder in C are used. What it adds to them is for those who
want something else than strict JSON on one line, and loads regular expressions, which takes longer than a
mount.
"""

from __future__ import annotations

import _json

from mountd.errors import (
    INTERFACE,
    InvalidParameter,
    LimitExceeded,
    MountdError,
    ProtocolError,
    RemoteError,
)
from mountd.fds import close_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

    from mountd.fds import OwnedFd

IN_JSON = "\\\\"  # a backslash
MAX_MESSAGE = 1 << 20  # bytes of a message without its NUL; the longest real request has a few hundred
MAX_FDS = 16  # descriptors in a message; layers need the most of them
MAX_DEPTH = 32  # nesting; the deepest real request is layers within a source
MAX_METHOD = 255  # characters of a method's name, which error replies repeat

INTEGER_MIN = -(1 << 63)
INTEGER_MAX = (1 << 63) - 1
_INTEGER_DIGITS = len(str(INTEGER_MIN))  # JSON has no leading zeros, so more characters are a larger number
_SHOWN = 64  # characters of a name from the wire that an error repeats

_CALL_FIELDS = ("method", "parameters", "more", "oneway", "upgrade")
_REPLY_FIELDS = ("parameters", "continues", "error")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def boundary(peeked: bytes) -> int | None:
    """Return how many of the peeked bytes the first message has, its NUL included; None without a NUL."""
    end = peeked.find(b"\0")
    return None if end < 0 else end + 1


def shown(name: str) -> str:
    """Return a name from the wire as an error may repeat it: short, and on one line."""
    short = name if len(name) <= _SHOWN else name[:_SHOWN] + "…"
    return short if name and short.isprintable() else repr(short)


class Message:
    """One message: its JSON object, the bytes it was made of without the NUL, and its descriptors, owned."""

    __slots__ = ("body", "fds", "raw")

    def __init__(self, body: dict[str, object], raw: bytes, fds: list[OwnedFd]) -> None:
        """Take ownership of `fds`."""
        self.body = body
        self.raw = raw
        self.fds = fds

    def close(self) -> None:
        """Close the descriptors that were not taken."""
        close_all(self.fds)


def whole_message(data: bytes, fds: list[OwnedFd]) -> Message:
    """Return the message that one recvmsg() returned all of, its NUL included, and nothing else.

    As nearly every message is. `fds` are taken over, and closed if that fails: ProtocolError, LimitExceeded.
    """
    try:
        if len(fds) > MAX_FDS:
            raise LimitExceeded("descriptors in a message", MAX_FDS)
        raw = data[:-1]
        if len(raw) > MAX_MESSAGE:
            raise LimitExceeded("bytes in a message", MAX_MESSAGE)
        message = Message(decode(raw), raw, fds.copy())
    except BaseException:
        close_all(fds)
        raise
    fds.clear()
    return message


class MessageReader:
    """Cuts a stream into messages. Owns the descriptors that were fed until a message takes them."""

    __slots__ = ("_buffer", "_complete", "_error", "_fds", "_open_fds", "_open_length", "_position")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._position = 0  # of the buffer's first byte in the stream
        self._fds: list[tuple[int, OwnedFd]] = []  # and where in the stream each arrived, ascending
        self._complete = 0  # messages in the buffer that have their NUL
        self._open_length = 0  # bytes of the message that has none yet
        self._open_fds = 0  # descriptors of that message
        self._error: MountdError | None = None

    @property
    def pending(self) -> int:
        """The number of bytes that were fed and not returned yet.

        If it is not 0 at the end of the stream, a message was cut off.
        """
        return len(self._buffer)

    def feed(self, data: bytes, fds: list[OwnedFd]) -> None:
        """Take what one recvmsg() returned. The descriptors are the reader's now, and `fds` is left empty.

        Raises ProtocolError for descriptors that could belong to two messages, LimitExceeded, and whatever
        was raised before.
        """
        arrived = self._position + len(self._buffer)
        # First of all, so that whatever goes wrong from here on closes them.
        self._fds += [(arrived, fd) for fd in fds]
        count = len(fds)
        fds.clear()
        if self._error is not None:
            self._fail(self._error)
        if count:
            self._count_descriptors(data, count)
        self._count_messages(data)
        self._buffer += data

    def next_message(self) -> Message | None:
        """Return the next complete message, None if bytes are missing. Raises as `decode` and `feed` do."""
        if self._error is not None:
            self._fail(self._error)
        if not self._complete:
            return None
        end = self._buffer.index(0)
        raw = bytes(self._buffer[:end])
        # bytearray moves its start instead of its contents, so this stays linear over many messages.
        del self._buffer[: end + 1]
        self._position += end + 1
        self._complete -= 1
        try:
            body = decode(raw)
        except ProtocolError as error:
            self._fail(error)
        return Message(body, raw, self._take_descriptors())

    def close(self) -> None:
        """Close the descriptors and forget the bytes. Nothing can be fed afterwards."""
        if self._error is None:
            self._error = ProtocolError("the connection is closed")
        self._buffer.clear()
        while self._fds:
            self._fds.pop()[1].close()

    def _count_descriptors(self, data: bytes, count: int) -> None:
        if not data:
            self._fail(ProtocolError("descriptors without a byte"))
        end = boundary(data)
        if end is not None and end < len(data):
            self._fail(ProtocolError("descriptors with the bytes of more than one message"))
        self._open_fds += count
        if self._open_fds > MAX_FDS:
            self._fail(LimitExceeded("descriptors in a message", MAX_FDS))

    def _count_messages(self, data: bytes) -> None:
        start = 0
        while (end := data.find(b"\0", start)) >= 0:
            self._check_length(end - start)
            self._complete += 1
            self._open_length = 0
            self._open_fds = 0
            start = end + 1
        self._check_length(len(data) - start)
        self._open_length += len(data) - start

    def _check_length(self, more: int) -> None:
        if self._open_length + more > MAX_MESSAGE:
            self._fail(LimitExceeded("bytes in a message", MAX_MESSAGE))

    def _take_descriptors(self) -> list[OwnedFd]:
        count = 0
        while count < len(self._fds) and self._fds[count][0] < self._position:
            count += 1
        taken = [fd for _, fd in self._fds[:count]]
        del self._fds[:count]
        return taken

    def _fail(self, error: MountdError) -> NoReturn:
        self._error = error
        self.close()
        # Without its traceback, which would grow with every repetition.
        raise error.with_traceback(None)


def decode(raw: bytes) -> dict[str, object]:
    """Decode the bytes of one message, without its NUL. Raises ProtocolError, and nothing else."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProtocolError(f"not UTF-8 at byte {error.start}") from None
    _check_depth(raw)
    start = len(text) - len(text.lstrip(_BLANKS))
    try:
        body, end = _scan(text, start)
    except StopIteration as stop:
        raise ProtocolError(f"not JSON at character {stop.value}: Expecting value") from None
    except ValueError as error:  # json's JSONDecodeError
        position, said = getattr(error, "pos", start), getattr(error, "msg", str(error))
        raise ProtocolError(f"not JSON at character {position}: {said}") from None
    rest = text[end:].lstrip(_BLANKS)
    if rest:
        raise ProtocolError(f"not JSON at character {len(text) - len(rest)}: Extra data")
    if not isinstance(body, dict):
        raise ProtocolError("not a JSON object")
    # Only an escape can make these: UTF-8 has no surrogates, and json takes no control character as it is.
    if "\\u" in text:
        _check_text(body)
    return body


def encode(body: Mapping[str, object], *, is_reply: bool = False) -> bytes:
    """Encode one message, with its NUL.

    What is no Unicode text in a reply, such as the name of a directory that somebody has made, is written as
    “\\xff”: nobody may keep others from being told of it. Raises LimitExceeded if it is too long,
    ProtocolError if it holds what is no Unicode text or no number.
    """
    try:
        # One for each message: it remembers what it is in the middle of.
        encoder = _json.make_encoder(
            {}, _not_json, _json.encode_basestring, None, ":", ",", False, False, False
        )
        text = "".join(encoder(body, 0))
        raw = (plain(text, IN_JSON) if is_reply else text).encode("utf-8")
    except ValueError as error:
        raise ProtocolError(f"cannot be said in JSON: {error}") from None
    if len(raw) > MAX_MESSAGE:
        raise LimitExceeded("bytes in a message", MAX_MESSAGE)
    return raw + b"\0"


def _check_depth(raw: bytes) -> None:
    """Count brackets outside of strings.

    Bytes that are no JSON may be counted wrongly, but only after the place where json stops reading: up to
    there, backslashes are in strings only, and no bracket closes more than was opened.
    """
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return  # as nearly always: not that many, wherever they are
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(unescaped.split(b'"')[::2])
    depth = 0
    for bracket in outside.translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ProtocolError(f"nested deeper than {MAX_DEPTH}")


def _check_text(body: dict[str, object]) -> None:
    waiting: list[object] = [body]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, str):
            if "\0" in value:
                raise ProtocolError("a NUL in a string")
            if not is_text(value):
                raise ProtocolError("half of a surrogate pair in a string")


def plain(text: str, backslash: str = "\\") -> str:
    """Return `text` with the bytes that are no UTF-8, as os.fsdecode() has them, as “\\xff”.

    `backslash` is how one is written where the text is for.
    """
    if is_text(text):
        return text
    return "".join(_escape(each, backslash) if "\ud800" <= each <= "\udfff" else each for each in text)


def _escape(half: str, backslash: str) -> str:
    number = ord(half)
    return (
        f"{backslash}x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else f"{backslash}u{number:04x}"
    )


def is_text(value: str) -> bool:
    """Return whether a string can be said in UTF-8, that is, has no lone surrogates."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ProtocolError("the same key twice in an object")
    return made


def _integer(digits: str) -> int:
    # The length first: int() is quadratic, and refuses thousands of digits with an error of its own.
    if len(digits) <= _INTEGER_DIGITS:
        number = int(digits)
        if INTEGER_MIN <= number <= INTEGER_MAX:
            return number
    raise ProtocolError("an integer of more than 64 bits")


def _float(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ProtocolError("a number out of range")
    return number


def _constant(name: str) -> NoReturn:
    raise ProtocolError(f"{name} is no JSON")


class _Strictly:
    """What the scanner makes of what it reads."""

    strict = True
    object_hook = None
    object_pairs_hook = staticmethod(_object)
    parse_int = staticmethod(_integer)
    parse_float = staticmethod(_float)
    parse_constant = staticmethod(_constant)


def _not_json(value: object) -> NoReturn:
    raise TypeError(f"{type(value).__name__} cannot be said in JSON")


_BLANKS = " \t\n\r"
_scan = _json.make_scanner(_Strictly)  # type: ignore[arg-type]  # anything with these attributes will do


class Call:
    """A method call: the method's full name, its parameters, and what the caller expects in return."""

    __slots__ = ("method", "more", "oneway", "parameters", "upgrade")

    def __init__(
        self,
        method: str,
        parameters: dict[str, object],
        more: bool = False,
        oneway: bool = False,
        upgrade: bool = False,
    ) -> None:
        self.method = method
        self.parameters = parameters
        self.more = more
        self.oneway = oneway
        self.upgrade = upgrade


def parse_call(body: Mapping[str, object]) -> Call:
    """Read a decoded message as a call. Raises InvalidParameter, which names the field."""
    for key in body:
        if key not in _CALL_FIELDS:
            raise InvalidParameter(shown(key), "a call has no such field")
    method = body.get("method")
    if not isinstance(method, str):
        raise InvalidParameter("method", "missing, or not a string")
    if len(method) > MAX_METHOD:
        raise InvalidParameter("method", f"longer than {MAX_METHOD} characters")
    parameters = body.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise InvalidParameter("parameters", "not an object")
    flags = {}
    for name in ("more", "oneway", "upgrade"):
        flag = body.get(name, False)
        if not isinstance(flag, bool):
            raise InvalidParameter(name, "not a bool")
        flags[name] = flag
    return Call(method, parameters, **flags)


def parse_reply(body: Mapping[str, object]) -> tuple[dict[str, object], bool]:
    """Read a decoded message as a reply: its parameters, and whether more replies follow.

    An error reply is raised as the MountdError it was made of, or as RemoteError where this version knows no
    such error or no such parameters. Raises ProtocolError for what is no reply at all.
    """
    for key in body:
        if key not in _REPLY_FIELDS:
            raise ProtocolError(f"a reply has no field {shown(key)}")
    parameters = body.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise ProtocolError("the parameters of a reply are not an object")
    if "error" in body:
        name = body["error"]
        if not isinstance(name, str):
            raise ProtocolError("the error of a reply is not a string")
        # Most replies are none, and who waits for them does not wait for this.
        from mountd.wire.rebuilding import rebuild

        raise rebuild(name, parameters)
    continues = body.get("continues", False)
    if not isinstance(continues, bool):
        raise ProtocolError("“continues” of a reply is not a bool")
    return parameters, continues


def error_body(error: MountdError, interface: str = INTERFACE) -> dict[str, object]:
    """Return the error reply that says `error`, by the name that it has in `interface`.

    Raises ValueError if it has no name on the wire.
    """
    name = error.name if isinstance(error, RemoteError) else error.wire_name
    if not name:
        raise ValueError(f"{type(error).__name__} has no name on the wire")
    full = name if "." in name else f"{interface}.{name}"
    return {"error": full, "parameters": dict(error.parameters)}
