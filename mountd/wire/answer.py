"""What comes of a call, for whoever has to send it, count it and write it down."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mountd.wire.framing import shown

if TYPE_CHECKING:
    from varlink import VarlinkError  # type: ignore[import-untyped]  # the package has no types

    from mountd.errors import MountdError
    from mountd.fds import OwnedFd


class Failure(NamedTuple):
    """What a call was refused with: the last part of the error's name on the wire, and what it says."""

    name: str
    text: str


class Answer(NamedTuple):
    """The last reply with its NUL, and the descriptors to send along, owned.

    `failure` is None if the call was not refused. It is there if nobody is told, as well: a oneway call gets
    no bytes, whatever comes of it.
    """

    reply: bytes
    fds: list[OwnedFd]
    failure: Failure | None


def failure_of(error: MountdError, said: MountdError) -> Failure:
    """Return what an error comes to; `said` is the same in the words of the interface that was called."""
    return Failure(said.wire_name.rpartition(".")[2], error.message)


def unknown(error: VarlinkError) -> Failure:
    """Return what an error of the varlink package comes to: all of them are of what it does not know."""
    said = ", ".join(shown(str(value)) for value in (error.parameters() or {}).values())
    return Failure(str(error.error()).rpartition(".")[2], f"there is no such thing: {said}")
