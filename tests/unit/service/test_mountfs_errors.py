"""Errors in the words of io.systemd.MountFileSystem: every one of mountd's has a name that clients know."""

from __future__ import annotations

import errno
import inspect

import pytest

from mountd import errors
from mountd.errors import MountdError, RemoteError, Unreachable
from mountd.service.mountfs_errors import NAMES, NUMBERS, PREFIX, SYSTEM, in_their_words, of_image

OF_CLIENTS = (RemoteError, Unreachable)
# What no method of the interface can come to.
ELSEWHERE = {errors.AttachNotPermitted, errors.InUse, errors.RegistryFailed}


def every() -> list[type[MountdError]]:
    found = [each for each in vars(errors).values() if inspect.isclass(each)]
    named = [each for each in found if issubclass(each, MountdError) and each.wire_name]
    return [each for each in named if each not in OF_CLIENTS]


def made(kind: type[MountdError]) -> MountdError:
    """An error of this kind, with something for each argument that it needs."""
    values: dict[str, object] = {"int": 5, "str": "ENOSPC"}
    needed = [
        values[str(each.annotation)]
        for each in inspect.signature(kind).parameters.values()
        if each.default is inspect.Parameter.empty
    ]
    return kind(*needed)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", every())
def test_every_error_has_a_name(kind: type[MountdError]) -> None:
    said = in_their_words(made(kind))
    known = said.wire_name.startswith((PREFIX, "org.varlink.service.", "io.systemd.Interactive"))
    assert known or said.wire_name == SYSTEM
    assert said.parameters["reason"]
    assert in_their_words(said) is said
    if said.wire_name == SYSTEM and kind not in ELSEWHERE:
        assert said.parameters["errno"] != errno.EIO
        assert said.parameters["errnoName"] == errno.errorcode[int(str(said.parameters["errno"]))]


def test_nothing_is_named_twice() -> None:
    assert not set(NAMES) & set(NUMBERS)


def test_what_is_said_of_images() -> None:
    for error, name in (
        (errors.DeniedByPolicy("no"), "DeniedByImagePolicy"),
        (errors.NotImmutable("no"), "DeniedByImagePolicy"),
        (errors.UnsupportedFileSystem("no"), "IncompatibleImage"),
        (errors.UnsupportedFileSystem("no", file_system_type="gpt"), "RootPartitionNotFound"),
        (errors.NotSupported("no"), "IncompatibleImage"),
    ):
        assert of_image(error).wire_name == PREFIX + name
    kept = errors.TimedOut(3)
    assert of_image(kept) is kept


def test_hints_come_along() -> None:
    said = in_their_words(errors.DeniedByPolicy("no", rule="one", hint="ask somebody"))
    assert said.parameters["hint"] == "ask somebody"
    assert "one" in str(said.parameters["reason"])
