"""Errors that come over the wire become what they were raised as."""

from __future__ import annotations

from mountd import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mountd.errors import MountdError

# How an error is made again from its parameters: its class, and the fields as they are called on the wire. A
# question mark is a field that may be missing; what is no string is listed in _KINDS.
ERRORS: Sequence[tuple[type[MountdError], str]] = (
    (errors.DeniedByPolicy, "reason rule? hint?"),
    (errors.NotImmutable, "reason rule? hint?"),
    (errors.SignatureInvalid, "reason hint?"),
    (errors.KeyUnknown, "reason hint?"),
    (errors.KeyRequired, "reason hint?"),
    (errors.WrongKey, "reason hint?"),
    (errors.UnsupportedFileSystem, "reason fileSystemType? hint?"),
    (errors.InvalidImage, "reason offset?"),
    (errors.BadFileDescriptor, "parameter reason"),
    (errors.UserNamespaceNotPermitted, "reason hint?"),
    (errors.OptionNotPermitted, "option reason hint?"),
    (errors.AttachNotPermitted, "reason hint?"),
    (errors.LimitExceeded, "limit maximum hint?"),
    (errors.MountFailed, "call errnoName log"),
    (errors.TimedOut, "seconds"),
    (errors.InteractiveAuthenticationRequired, "hint?"),
    (errors.NotFound, "what hint?"),
    (errors.InUse, "what hint?"),
    (errors.NotSupported, "feature hint?"),
    (errors.RegistryFailed, "registry reason hint?"),
    (errors.StorageFull, "reason hint?"),
    (errors.PeerGone, "reason"),
    (errors.ShuttingDown, ""),
    (errors.InvalidParameter, "parameter reason?"),
)
_KINDS: Mapping[str, type] = {"offset": int, "maximum": int, "seconds": int, "log": list}
_ARGUMENTS = {"fileSystemType": "file_system_type", "errnoName": "errno_name"}
_BY_NAME = {
    cls.wire_name if "." in cls.wire_name else f"{interface}.{cls.wire_name}": (cls, fields.split())
    for cls, fields in ERRORS
    for interface in (errors.INTERFACE, errors.IMAGES_INTERFACE, errors.ADMIN_INTERFACE)
}


def rebuild(name: str, parameters: dict[str, object]) -> MountdError:
    """Return the error that a reply names, as RemoteError where its name or its parameters are not known."""
    if name not in _BY_NAME:
        return errors.RemoteError(name, parameters)
    cls, fields = _BY_NAME[name]
    arguments = {}
    for field in fields:
        key = field.rstrip("?")
        value = parameters.get(key)
        if value is None and field.endswith("?"):
            continue
        # The exact type: a bool is an int to isinstance.
        if type(value) is not _KINDS.get(key, str) or not _strings(value):
            return errors.RemoteError(name, parameters)
        arguments[_ARGUMENTS.get(key, key)] = value
    if cls is errors.InvalidParameter and arguments["parameter"] == "message" and "reason" in arguments:
        # What ProtocolError looks like on the wire, where it has no name of its own.
        return errors.ProtocolError(str(arguments["reason"]))
    return cls(**arguments)  # type: ignore[arg-type]  # the table above says which arguments a class has


def _strings(value: object) -> bool:
    return not isinstance(value, list) or all(isinstance(item, str) for item in value)
