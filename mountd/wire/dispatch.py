"""From a message to the handler of its method, and back: `varlink.Service` behind mountd's own transport.

The varlink package reads the interface files, answers introspection (org.varlink.service), routes each call,
and says MethodNotFound, InterfaceNotFound and MethodNotImplemented. What it does not do is done here:

* It coerces: 1.0 and true become 1, unknown fields of structs vanish, null becomes []. A privileged daemon
  must not guess, so `check_parameters` compares every value with its declared type first.
* It knows no descriptors. They, and the context of the connection, travel around it in an `_Exchange`.
* It lets the exceptions of handlers through. Here each becomes the error reply that it means, and what means
  none is a bug: reported by `on_bug`, and answered without its details.

Handlers come from a table that the daemon fills in. Only the package looks up an attribute by a name from
the wire, after it found the method declared, and on an object that has nothing but the handlers' adapters.

Whatever happens, the descriptors of a call stay with their message, and those of a reply are the caller's,
or closed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from varlink import Service, scanner  # type: ignore[import-untyped]  # the package has no types

from mountd.errors import InvalidParameter, LimitExceeded, MountdError, MountFailed, SyscallError
from mountd.fds import OwnedFd, close_all
from mountd.version import VERSION
from mountd.wire.framing import (
    INTEGER_MAX,
    INTEGER_MIN,
    MAX_FDS,
    MAX_MESSAGE,
    Message,
    encode,
    error_body,
    is_text,
    parse_call,
    shown,
)

# handler(parameters, descriptors, context) -> (parameters of the reply, its descriptors). A handler moves
# what it keeps out of the list, by `OwnedFd.take()` or list.pop(). The rest stays the message's.
Handler = Callable[[dict[str, Any], list[OwnedFd], Any], tuple[dict[str, object], list[OwnedFd]]]

T = TypeVar("T")

# No process, descriptor, memory, space or device to be had.
SHORTAGES = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.ENXIO)

DESCRIPTOR_SUFFIXES = ("FileDescriptor", "FileDescriptors")


def interface_directory() -> Path:
    """Return where the interface files are: beside the modules once installed, in the checkout otherwise."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "protocol"
    return installed if installed.is_dir() else package.parent / "protocol"


class _Exchange:
    """What belongs to one call and does not fit through the varlink package."""

    __slots__ = ("context", "fds", "parameters", "reply_fds")

    def __init__(self, fds: list[OwnedFd], context: object) -> None:
        self.fds = fds
        self.context = context
        self.parameters: dict[str, object] = {}
        self.reply_fds: list[OwnedFd] = []


class Dispatcher:
    """Answers messages, with the handlers of a table."""

    def __init__(
        self, interface_dir: Path, handlers: Mapping[str, Handler], on_bug: Callable[[Exception], None]
    ) -> None:
        """`handlers` maps full method names ("io.mountd.Mount.Mount"), whose interfaces are then offered.

        `on_bug` gets every exception that no error reply stands for. Raises ValueError for a handler whose
        method is not declared, OSError for an interface file that cannot be read.
        """
        self._on_bug = on_bug
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
            self._service.interfaces[name] = scanner.Interface(text)
            self._service.interfaces_handlers[name] = SimpleNamespace()
        for method, handler in handlers.items():
            interface, declared = self._find(method)
            if interface is None or declared is None:
                raise ValueError(f"{method} is not declared in {interface_dir}")
            methods = self._service.interfaces_handlers[interface.name]
            setattr(methods, declared.name, _adapter(interface, declared, handler))

    def handle(self, message: Message, context: object) -> tuple[bytes, list[OwnedFd]]:
        """Answer one message: the reply with its NUL, and the descriptors to send along, owned.

        A oneway call gets no bytes, whatever comes of it. What descriptors `message` still has are its
        owner's to close, after the reply was sent: closing one can take as long as a hostile server likes.
        """
        exchange = _Exchange(message.fds, context)
        try:
            reply = self._reply(message, exchange)
            if message.body.get("oneway") is True:
                # Also if the call was refused: a reply would be taken for that of the next call.
                return b"", []
            fds, exchange.reply_fds = exchange.reply_fds, []
            return reply, fds
        finally:
            close_all(exchange.reply_fds)

    def _reply(self, message: Message, exchange: _Exchange) -> bytes:
        """Return the reply, which for every exception is an error without descriptors."""
        failure: MountdError
        try:
            return self._run(message, exchange)
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
            return encode(error_body(failure))
        except (MountdError, TypeError, ValueError) as error:
            # The error itself cannot be said: it is too long, or its parameters are no JSON.
            return encode(error_body(self._bug(error)))

    def _run(self, message: Message, exchange: _Exchange) -> bytes:
        """Check the call, let the package route it, and return the reply."""
        call = parse_call(message.body)
        for flag, wanted in (("more", call.more), ("upgrade", call.upgrade)):
            if wanted:
                raise InvalidParameter(flag, "this method does not offer it")
        interface, method = self._find(call.method)
        if method is not None:
            check_parameters(interface, method.in_type, call.parameters)
            if call.oneway and _has_descriptors(interface, method.out_type):
                # Not even begun: its whole result would be closed at once.
                return b""
        exchange.parameters = call.parameters
        # At most one: only a handler that is a generator makes more of them.
        reply = b"".join(self._service.handle(message.raw, _request=exchange))
        if len(reply) > MAX_MESSAGE:
            raise LimitExceeded("bytes in a message", MAX_MESSAGE)
        if len(exchange.reply_fds) > MAX_FDS:
            raise LimitExceeded("descriptors in a message", MAX_FDS)
        return reply + b"\0"

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

    def adapter(*_fields: object, _request: _Exchange) -> dict[str, object]:
        # The checked parameters instead of the fields, which went through the package's coercion.
        reply, _request.reply_fds = handler(_request.parameters, _request.fds, _request.context)
        try:
            check_parameters(interface, method.out_type, reply)
        except InvalidParameter as error:
            # Not the client's fault, and not to be blamed on a field of its call.
            raise ValueError(f"the reply of {method.name} is not as declared: {error}") from error
        return reply

    # The package looks at the signature for each call; it need not be worked out each time.
    adapter.__signature__ = signature(adapter)  # type: ignore[attr-defined]
    return adapter


def check_parameters(
    interface: scanner.Interface, varlink_type: object, value: object, path: str = ""
) -> None:
    """Compare a JSON value with the type that `interface` declares for it, strictly and to the bottom.

    Raises InvalidParameter with the path of the first field that does not fit: "source.layers[2].verity".
    """
    declared = _resolve(interface, varlink_type)
    if isinstance(declared, scanner._Maybe):
        if value is not None:
            check_parameters(interface, declared.element_type, value, path)
    elif isinstance(declared, scanner._Struct):
        _check_struct(interface, declared.fields, _expect(dict, "an object", value, path), path)
    elif isinstance(declared, scanner._Array):
        for index, item in enumerate(_expect(list, "an array", value, path)):
            check_parameters(interface, declared.element_type, item, f"{path}[{index}]")
    elif isinstance(declared, scanner._Dict):
        for key, item in _expect(dict, "an object", value, path).items():
            check_parameters(interface, declared.element_type, item, f"{path}[{shown(key)}]")
    elif isinstance(declared, set):
        for key, item in _expect(dict, "a set", value, path).items():
            if item != {}:
                raise InvalidParameter(f"{path}[{shown(key)}]", "a member of a set is an empty object")
    else:
        _check_simple(declared, value, path)


def _resolve(interface: scanner.Interface, varlink_type: object) -> object:
    while isinstance(varlink_type, scanner._CustomType):
        alias = interface.members.get(varlink_type.name)
        if not isinstance(alias, scanner._Alias):
            raise ValueError(f"{interface.name} uses the type {varlink_type.name} and does not declare it")
        varlink_type = alias.type
    return varlink_type


def _check_struct(
    interface: scanner.Interface, fields: Mapping[str, object], value: dict[str, object], path: str
) -> None:
    prefix = f"{path}." if path else ""
    for name in value:
        if name not in fields:
            raise InvalidParameter(prefix + shown(name), "there is no such field")
    for name, varlink_type in fields.items():
        if name in value:
            check_parameters(interface, varlink_type, value[name], prefix + name)
        elif not isinstance(_resolve(interface, varlink_type), scanner._Maybe):
            raise InvalidParameter(prefix + name, "missing")


def _check_simple(declared: object, value: object, path: str) -> None:
    """The scanner has a value of the Python type stand for the type: False, 0, 0.0 or an empty string."""
    if isinstance(declared, scanner._Enum):
        if _expect(str, "a string", value, path) not in declared.fields:
            raise InvalidParameter(path, f"none of {', '.join(declared.fields)}")
    elif isinstance(declared, scanner._Object):
        _expect(dict, "an object", value, path)
    elif isinstance(declared, bool):
        _expect(bool, "a bool", value, path)
    elif isinstance(declared, int):
        if not INTEGER_MIN <= _expect(int, "an int", value, path) <= INTEGER_MAX:
            raise InvalidParameter(path, "more than 64 bits")
    elif isinstance(declared, float):
        if type(value) is not int:  # JSON writes 1.0 as 1 if it likes
            _expect(float, "a float", value, path)
    elif isinstance(declared, str):
        if not is_text(_expect(str, "a string", value, path)):
            raise InvalidParameter(path, "half of a surrogate pair")
    else:
        raise ValueError(f"{path}: the varlink package has a type that mountd does not know: {declared!r}")


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
