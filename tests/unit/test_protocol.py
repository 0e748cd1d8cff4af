"""The interface file and the errors of the code say the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from varlink.scanner import Interface

from mountd import errors

DIRECTORY = Path(__file__).parents[2] / "protocol"
FILES = [
    DIRECTORY / f"{name}.varlink"
    for name in (errors.INTERFACE, errors.IMAGES_INTERFACE, errors.ADMIN_INTERFACE)
]

EXAMPLES = [
    errors.DeniedByPolicy("reason", rule="rule", hint="hint"),
    errors.NotImmutable("reason", rule="rule", hint="hint"),
    errors.SignatureInvalid("reason", hint="hint"),
    errors.KeyUnknown("reason", hint="hint"),
    errors.KeyRequired("reason", hint="hint"),
    errors.WrongKey("reason", hint="hint"),
    errors.UnsupportedFileSystem("reason", file_system_type="vfat", hint="hint"),
    errors.InvalidImage("reason", offset=1080),
    errors.BadFileDescriptor("source.imageFileDescriptor", "reason"),
    errors.UserNamespaceNotPermitted("reason", hint="hint"),
    errors.OptionNotPermitted("suid", "reason", hint="hint"),
    errors.AttachNotPermitted("reason", hint="hint"),
    errors.LimitExceeded("descriptors in a message", 16, hint="hint"),
    errors.MountFailed("fsmount(3, 0)", "EINVAL", ["e xfs: no"]),
    errors.TimedOut(10),
    errors.InteractiveAuthenticationRequired(hint="hint"),
    errors.NotFound("it", hint="hint"),
    errors.InUse("it", hint="hint"),
    errors.NotSupported("statmount", hint="hint"),
    errors.RegistryFailed("registry.example.com:5000", "reason", hint="hint"),
    errors.StorageFull("reason", hint="hint"),
    errors.PeerGone("reason"),
    errors.ShuttingDown(),
]


def declared(file: Path) -> dict[str, set[str]]:
    interface = Interface(file.read_text())
    return {
        name: set(member.type.fields)
        for name, member in interface.members.items()
        if type(member).__name__ == "_Error"
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_error_has_exactly_the_declared_fields(file: Path) -> None:
    fields = declared(file)
    assert len(fields) > (5 if file.stem == errors.ADMIN_INTERFACE else 10)
    for error in EXAMPLES:
        if error.wire_name in fields:
            assert set(error.parameters) == fields[error.wire_name], error.wire_name


def test_every_error_class_has_an_example_and_a_declaration() -> None:
    classes = {
        cls.wire_name
        for cls in errors.MountdError.__subclasses__()
        if cls.wire_name and "." not in cls.wire_name
    }
    assert classes == {error.wire_name for error in EXAMPLES}
    names = {name for file in FILES for name in declared(file)}
    assert classes == names


def test_texts_are_one_line() -> None:
    for error in EXAMPLES:
        assert "\n" not in str(error)
        assert str(error)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_member_is_declared_twice(file: Path) -> None:
    # varlink's scanner lets a later member replace an earlier one of the same name without a word.
    names = [
        line.split()[1].rstrip("(")
        for line in file.read_text().splitlines()
        if line.split(" ")[0] in {"type", "method", "error"}
    ]
    names = [name.split("(")[0] for name in names]
    assert len(names) == len(set(names))
