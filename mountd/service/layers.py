"""Saying which layer of a stack an error is about."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from mountd.errors import MountdError, SyscallError

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = "source."
TEXTS = ("reason", "what", "feature")  # one of which an error has on the wire


def name_of(number: int) -> str:
    """Return what the layer with this index is called on the wire."""
    return f"source.layers[{number}]"


@contextmanager
def at_layer(number: int) -> Iterator[None]:
    """Have what goes wrong inside name this layer. Raises MountdError, SyscallError."""
    try:
        yield
    except MountdError as error:
        raise about_layer(error, number) from None
    except SyscallError as error:
        call = f"{name_of(number)}: {error.call}"
        raise SyscallError(error.errno or 0, call, error.log) from None


def about_layer(error: MountdError, number: int) -> MountdError:
    """Return the same error, with the layer in its text and in its parameters."""
    where = name_of(number)
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
