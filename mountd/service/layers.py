"""Saying which part of a stack an error is about: a layer, or the top."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from mountd.errors import MountdError, SyscallError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

SOURCE = "source."
TOP = "source.top"
TEXTS = ("reason", "what", "feature")  # one of which an error has on the wire


def name_of(number: int) -> str:
    """Return what the layer with this index is called on the wire."""
    return f"source.layers[{number}]"


def at_layer(number: int) -> AbstractContextManager[None]:
    """Have what goes wrong inside name this layer. Raises MountdError, SyscallError."""
    return at_part(name_of(number))


@contextmanager
def at_part(where: str | None) -> Iterator[None]:
    """Have what goes wrong inside name this part of a stack, or none. Raises MountdError, SyscallError."""
    if where is None:
        yield
        return
    try:
        yield
    except MountdError as error:
        raise about_part(error, where) from None
    except SyscallError as error:
        raise SyscallError(error.errno or 0, f"{where}: {error.call}", error.log) from None


def about_part(error: MountdError, where: str) -> MountdError:
    """Return the same error, with the part of the stack in its text and in its parameters."""
    told = dict(error.parameters)
    parameter = told.get("parameter")
    if isinstance(parameter, str) and parameter.startswith(SOURCE):
        told["parameter"] = f"{where}.{parameter.removeprefix(SOURCE)}"
    for name in TEXTS:
        if name in told:
            told[name] = f"{where}: {told[name]}"
    hint = told.pop("hint", None)
    named = type(error).__new__(type(error))
    MountdError.__init__(
        named, f"{where}: {error.message}", hint=hint if isinstance(hint, str) else None, **told
    )
    return named
