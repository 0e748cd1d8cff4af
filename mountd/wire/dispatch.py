"""From a message to the handler of its method, and back: `varlink.Service` behind mountd's own transport.

The varlink package reads the interface files, answers introspection (org.varlink.service), routes each call,
and says MethodNotFound, InterfaceNotFound and MethodNotImplemented. What it does not do is done here:

* It coerces: 1.0 and true become 1, unknown fields of structs vanish, null becomes []. A privileged daemon
  must not guess, so `check_parameters` compares every value with its declared type first.
* It knows no descriptors. They, and the context of the connection, travel around it in an `_Exchange`.
* It would send progress after the fact. A handler of a long method is a generator: what it yields goes out
  at once, as replies that say that they continue, if the call allows that (more); what it returns is the
  last reply, and the only one otherwise.
* It lets the exceptions of handlers through. Here each becomes the error reply that it means, and what means
  none is a bug: reported by `on_bug`, and answered without its details.

Handlers come from a table that the daemon fills in. Only the package looks up an attribute by a name from
the wire, after it found the method declared, and on an object that has nothing but the handlers' adapters.

Whatever happens, the descriptors of a call stay with their message, and those of a reply are the caller's,
or closed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from inspect import isgeneratorfunction, signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from varlink import Service, VarlinkError, scanner  # type: ignore[import-untyped]  # the package has no types

from mountd.errors import (
    INTERFACE,
    InvalidParameter,
    LimitExceeded,
    MountdError,
    MountFailed,
    SyscallError,
)
from mountd.fds import OwnedFd, close_all
from mountd.version import VERSION
from mountd.wire.answer import Answer, Failure, failure_of, unknown
from mountd.wire.framing import (
    INTEGER_MAX,
    INTEGER_MIN,
    MAX_FDS,
    Message,
    encode,
    error_body,
    parse_call,
    shown,
)

# handler(parameters, descriptors, context) -> (parameters of the reply, its descriptors). A handler moves
# what it keeps out of the list, by `OwnedFd.take()` or list.pop(). The rest stays the message's.
Reply = tuple[dict[str, object], list[OwnedFd]]
# Sends the parameters of a reply that continues.
Tell = Callable[[dict[str, object]], None]
# A streaming handler yields the parameters of replies that continue, and returns the last reply. Where what
# it calls tells how far it is by a callback, it yields a function that is called with a `Tell` instead; its
# result, or what it raises, is what comes of the yield.
Stream = Generator[dict[str, object] | Callable[[Tell], object], Any, Reply]
Handler = Callable[[dict[str, Any], list[OwnedFd], Any], Reply | Stream]

Check = Callable[[object, str], None]

T = TypeVar("T")

# No process, descriptor, memory, space or device to be had.
SHORTAGES = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.ENXIO)

DESCRIPTOR_SUFFIXES = ("FileDescriptor", "FileDescriptors")


def interface_directory() -> Path:
    """Return where the interface files are: beside the modules once installed, in the checkout otherwise."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "protocol"
    return installed if installed.is_dir() else package.parent / "protocol"


class _Interface(scanner.Interface):  # type: ignore[misc]  # the package has no types
    """An interface whose values were checked already, so that nothing is left to coerce."""

    def filter_params(
        self, _name: str, _type: object, _namespaced: bool, args: object, _kwargs: object
    ) -> Any:
        """Return the values as they are."""
        return args


class _Exchange:
    """What belongs to one call and does not fit through the varlink package."""

    __slots__ = ("context", "fds", "parameters", "reply_fds", "send")

    def __init__(self, fds: list[OwnedFd], context: object) -> None:
        self.fds = fds
        self.context = context
        self.send: Callable[[bytes], None] | None = None  # for replies that continue, if they are wanted
        self.parameters: dict[str, object] = {}
        self.reply_fds: list[OwnedFd] = []


class Dispatcher:
    """Answers messages, with the handlers of a table."""

    def __init__(
        self,
        interface_dir: Path,
        handlers: Mapping[str, Handler],
        on_bug: Callable[[Exception], None],
        translate: Callable[[MountdError], MountdError] | None = None,
    ) -> None:
        """`handlers` maps full method names ("io.mountd.Mount.Mount"), whose interfaces are then offered.

        `on_bug` gets every exception that no error reply stands for. `translate` says errors in the words of
        another interface. Raises ValueError for a handler whose method is not declared, OSError for an
        interface file that cannot be read.
        """
        self._on_bug = on_bug
        self._translate = translate or (lambda error: error)
        self._streaming = {name for name, handler in handlers.items() if isgeneratorfunction(handler)}
        self._service = Service(
            vendor="mountd",
            product="mountd",
            version=VERSION,
            url="https://mountd.io/",
            interface_dir=str(interface_dir),
        )
        for name in dict.fromkeys(method.rpartition(".")[0] for method in handlers):
            # Not with Service.interface(): it reads the file in the encoding of the locale.
            text = (interface_dir / f"{name}.varlink").read_text(encoding="utf-8")
            self._service.interfaces[name] = _Interface(text)
            self._service.interfaces_handlers[name] = SimpleNamespace()
        self._checks = {
            f"{interface.name}.{member.name}": _compile(interface, member.in_type, {})
            for interface in self._service.interfaces.values()
            for member in interface.members.values()
            if isinstance(member, scanner._Method)
        }
        for method, handler in handlers.items():
            interface, declared = self._find(method)
            if interface is None or declared is None:
                raise ValueError(f"{method} is not declared in {interface_dir}")
            methods = self._service.interfaces_handlers[interface.name]
            setattr(methods, declared.name, _adapter(interface, declared, handler))

    def handle(
        self, message: Message, context: object, send: Callable[[bytes], None] | None = None
    ) -> Answer:
        """Answer one message.

        `send` gets each reply before that, with its NUL, as soon as it is there; what it raises ends the
        call, as an exception of the handler does. None is for a transport that cannot.

        What descriptors `message` still has are its owner's to close, after the reply was sent: closing one
        can take as long as a hostile server likes.
        """
        exchange = _Exchange(message.fds, context)
        try:
            reply, failure = self._reply(message, exchange, send)
            if message.body.get("oneway") is True:
                # Also if the call was refused: a reply would be taken for that of the next call.
                return Answer(b"", [], failure)
            fds, exchange.reply_fds = exchange.reply_fds, []
            return Answer(reply, fds, failure)
        finally:
            close_all(exchange.reply_fds)

    def _reply(
        self, message: Message, exchange: _Exchange, send: Callable[[bytes], None] | None
    ) -> tuple[bytes, Failure | None]:
        """Return the reply, which for every exception is an error without descriptors."""
        failure: MountdError
        try:
            return self._run(message, exchange, send)
        except MountdError as error:
            failure = error
        except SyscallError as error:
            failure = MountFailed(error.call, error.errno_name, error.log)
        except OSError as error:
            # A shortage is neither the request's fault nor a bug.
            short = error.errno in SHORTAGES
            failure = MountFailed("getting what it needs", errno_name(error)) if short else self._bug(error)
        except Exception as error:  # noqa: BLE001 - a bug in a handler must not end the worker without a reply
            failure = self._bug(error)
        close_all(exchange.reply_fds)
        try:
            said = self._translate(failure)
            reply = encode(error_body(said, self._error_interface(message, said)), is_reply=True)
        except (MountdError, TypeError, ValueError) as error:
            # The error itself cannot be said: it is too long, or its parameters are no JSON.
            failure = self._bug(error)
            said = self._translate(failure)
            reply = encode(error_body(said), is_reply=True)
        return reply, failure_of(failure, said)

    def _run(
        self, message: Message, exchange: _Exchange, send: Callable[[bytes], None] | None
    ) -> tuple[bytes, Failure | None]:
        """Check the call, let the package route it, and return the last reply."""
        call = parse_call(message.body)
        more = call.more and call.method not in self._streaming
        for flag, refused in (("more", more), ("upgrade", call.upgrade)):
            if refused:
                raise InvalidParameter(flag, "this method does not offer it")
        interface, method = self._find(call.method)
        if method is not None:
            self._checks[call.method](call.parameters, "")
            if call.oneway and _has_descriptors(interface, method.out_type):
                # Not even begun: its whole result would be closed at once.
                raise InvalidParameter("oneway", "nobody would get the descriptors that it returns")
        exchange.parameters = call.parameters
        if call.more and not call.oneway:
            exchange.send = send
        routed = self._route({**message.body, "parameters": dict(call.parameters)}, message.raw, exchange)
        if len(exchange.reply_fds) > MAX_FDS:
            raise LimitExceeded("descriptors in a message", MAX_FDS)
        return routed

    def _route(
        self, body: dict[str, object], raw: bytes, exchange: _Exchange
    ) -> tuple[bytes, Failure | None]:
        """Have the package find and call the handler of a decoded call, which it changes; return the reply.

        Service.handle() is the same around another decoding of the message, by rules that are less strict.
        """
        for reply in self._service._handle(body, raw, None, exchange):
            # The first is the only one: no adapter is a generator.
            if isinstance(reply, VarlinkError):
                return encode(reply.as_dict(), is_reply=True), unknown(reply)
            return encode(reply, is_reply=True), None
        return b"", None

    def _error_interface(self, message: Message, failure: MountdError) -> str:
        """Return the interface of the call if it declares such an error, the usual one otherwise."""
        interface, _ = self._find(str(message.body.get("method")))
        if interface is not None and isinstance(interface.members.get(failure.wire_name), scanner._Error):
            return str(interface.name)
        return INTERFACE

    def _bug(self, error: Exception) -> MountdError:
        self._on_bug(error)
        return MountFailed("internal error, see the journal", "EIO")

    def _find(self, method: str) -> tuple[scanner.Interface | None, scanner._Method | None]:
        interface_name, _, name = method.rpartition(".")
        interface = self._service.interfaces.get(interface_name)
        member = interface.members.get(name) if interface is not None else None
        return interface, member if isinstance(member, scanner._Method) else None


def errno_name(error: OSError) -> str:
    """Return the symbolic name of an error, such as "EMFILE"."""
    return errno.errorcode.get(error.errno or 0, "EIO")


def _adapter(
    interface: scanner.Interface, method: scanner._Method, handler: Handler
) -> Callable[..., dict[str, object]]:
    """Make of a handler what the varlink package calls: with the fields in order, and what came along."""

    compiled = _compile(interface, method.out_type, {})

    def adapter(*_fields: object, _request: _Exchange) -> dict[str, object]:
        # The checked parameters instead of the fields, which went through the package's coercion.
        made = handler(_request.parameters, _request.fds, _request.context)
        if not isinstance(made, tuple):
            made = _run_stream(made, check, _request.send)
        reply, _request.reply_fds = made
        check(reply)
        return reply

    def check(reply: dict[str, object]) -> None:
        try:
            compiled(reply, "")
        except InvalidParameter as error:
            # Not the client's fault, and not to be blamed on a field of its call.
            raise ValueError(f"the reply of {method.name} is not as declared: {error}") from error

    # The package looks at the signature for each call; it need not be worked out each time.
    adapter.__signature__ = signature(adapter)  # type: ignore[attr-defined]
    return adapter


def _run_stream(
    stream: Stream, check: Callable[[dict[str, object]], None], send: Callable[[bytes], None] | None
) -> Reply:
    """Send what `stream` yields, if that is wanted, and return what it returns."""

    def tell(parameters: dict[str, object]) -> None:
        check(parameters)
        if send is not None:
            send(encode({"parameters": parameters, "continues": True}, is_reply=True))

    with closing(stream):
        try:
            step = next(stream)
            while True:
                if not callable(step):
                    tell(step)
                    step = next(stream)
                    continue
                try:
                    found = step(tell)
                except Exception as error:  # noqa: BLE001 - it is the stream's to handle
                    step = stream.throw(error)
                else:
                    step = stream.send(found)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def check_parameters(
    interface: scanner.Interface, varlink_type: object, value: object, path: str = ""
) -> None:
    """Compare a JSON value with the type that `interface` declares for it, strictly and to the bottom.

    Raises InvalidParameter with the path of the first field that does not fit: "source.layers[2].verity".
    """
    _compile(interface, varlink_type, {})(value, path)


def _compile(interface: scanner.Interface, varlink_type: object, known: dict[int, list[Check]]) -> Check:
    """Return a function that checks a value and its path: what is declared is looked at once, not each time.

    `known` has the structs that were begun, as a type may contain itself; each is a list that gets the
    finished function.
    """
    declared = _resolve(interface, varlink_type)
    if isinstance(declared, scanner._Maybe):
        return _maybe(_compile(interface, declared.element_type, known))
    if isinstance(declared, scanner._Struct):
        if id(declared) in known:
            finished = known[id(declared)]
            return lambda value, path: finished[0](value, path)
        known[id(declared)] = []
        fields = {name: _compile(interface, each, known) for name, each in declared.fields.items()}
        optional = [
            isinstance(_resolve(interface, each), scanner._Maybe) for each in declared.fields.values()
        ]
        required = frozenset(name for name, maybe in zip(fields, optional, strict=True) if not maybe)
        known[id(declared)].append(_struct(fields, required))
        return known[id(declared)][0]
    if isinstance(declared, scanner._Array):
        return _array(_compile(interface, declared.element_type, known))
    if isinstance(declared, scanner._Dict):
        return _dict(_compile(interface, declared.element_type, known))
    if isinstance(declared, set):
        return _check_set
    return _simple(declared)


def _resolve(interface: scanner.Interface, varlink_type: object) -> object:
    while isinstance(varlink_type, scanner._CustomType):
        alias = interface.members.get(varlink_type.name)
        if not isinstance(alias, scanner._Alias):
            raise ValueError(f"{interface.name} uses the type {varlink_type.name} and does not declare it")
        varlink_type = alias.type
    return varlink_type


def _maybe(check: Check) -> Check:
    def check_maybe(value: object, path: str) -> None:
        if value is not None:
            check(value, path)

    return check_maybe


def _struct(fields: Mapping[str, Check], required: frozenset[str]) -> Check:
    def check_struct(value: object, path: str) -> None:
        given = _expect(dict, "an object", value, path)
        prefix = f"{path}." if path else ""
        for name in given:
            if name not in fields:
                raise InvalidParameter(prefix + shown(name), "there is no such field")
        for name, check in fields.items():
            if name in given:
                check(given[name], prefix + name)
            elif name in required:
                raise InvalidParameter(prefix + name, "missing")

    return check_struct


def _array(check: Check) -> Check:
    def check_array(value: object, path: str) -> None:
        for index, item in enumerate(_expect(list, "an array", value, path)):
            check(item, f"{path}[{index}]")

    return check_array


def _dict(check: Check) -> Check:
    def check_dict(value: object, path: str) -> None:
        for key, item in _expect(dict, "an object", value, path).items():
            check(item, f"{path}[{shown(key)}]")

    return check_dict


def _check_set(value: object, path: str) -> None:
    for key, item in _expect(dict, "a set", value, path).items():
        if item != {}:
            raise InvalidParameter(f"{path}[{shown(key)}]", "a member of a set is an empty object")


def _simple(declared: object) -> Check:
    """The scanner has a value of the Python type stand for the type: False, 0, 0.0 or an empty string."""

    def check_enum(value: object, path: str) -> None:
        if _expect(str, "a string", value, path) not in fields:
            raise InvalidParameter(path, f"none of {', '.join(fields)}")

    fields = declared.fields if isinstance(declared, scanner._Enum) else ()
    if isinstance(declared, scanner._Enum):
        return check_enum
    if isinstance(declared, scanner._Object):
        return lambda value, path: _ignore(_expect(dict, "an object", value, path))
    for kind, check in _SIMPLE:
        if isinstance(declared, kind):
            return check
    raise ValueError(f"the varlink package has a type that mountd does not know: {declared!r}")


def _ignore(_: object) -> None:
    """Make a statement of an expression."""


def _check_bool(value: object, path: str) -> None:
    _expect(bool, "a bool", value, path)


def _check_int(value: object, path: str) -> None:
    if not INTEGER_MIN <= _expect(int, "an int", value, path) <= INTEGER_MAX:
        raise InvalidParameter(path, "more than 64 bits")


def _check_float(value: object, path: str) -> None:
    if type(value) is not int:  # JSON writes 1.0 as 1 if it likes
        _expect(float, "a float", value, path)


def _check_str(value: object, path: str) -> None:
    # A call with what is no Unicode text is no message, and a reply with it is written otherwise (framing).
    _expect(str, "a string", value, path)


# In this order: a bool is an int to isinstance.
_SIMPLE: tuple[tuple[type, Check], ...] = (
    (bool, _check_bool),
    (int, _check_int),
    (float, _check_float),
    (str, _check_str),
)


def _expect(kind: type[T], name: str, value: object, path: str) -> T:
    # The exact type: a bool is an int to isinstance.
    if type(value) is not kind:
        raise InvalidParameter(path or "parameters", "must not be null" if value is None else f"not {name}")
    return value


def _has_descriptors(interface: scanner.Interface, varlink_type: object) -> bool:
    """Whether values of this type name descriptors, at any depth."""
    seen: set[int] = set()
    waiting = [varlink_type]
    while waiting:
        declared = _resolve(interface, waiting.pop())
        if id(declared) in seen:
            continue
        seen.add(id(declared))
        if isinstance(declared, scanner._Struct):
            if any(name.endswith(DESCRIPTOR_SUFFIXES) for name in declared.fields):
                return True
            waiting.extend(declared.fields.values())
        elif isinstance(declared, scanner._Maybe | scanner._Array | scanner._Dict):
            waiting.append(declared.element_type)
    return False
