"""Errors in the words of io.systemd.MountFileSystem, one table: its clients know these names and no others.

What its interface has no name for is io.systemd.System with an errno, as from any service of systemd. Unlike
there, reason and hint come along: clients pass over fields that they do not know, and people need them.
"""

from __future__ import annotations

import errno

from mountd import errors
from mountd.errors import MountdError

PREFIX = "io.systemd.MountFileSystem."
SYSTEM = "io.systemd.System"
PERMISSION_DENIED = "org.varlink.service.PermissionDenied"
INTERACTIVE = "io.systemd.InteractiveAuthenticationRequired"
INVALID_PARAMETER = errors.InvalidParameter.wire_name
BAD_FLAGS = f"{PREFIX}BadFileDescriptorFlags"
DENIED = f"{PREFIX}DeniedByImagePolicy"
INCOMPATIBLE = f"{PREFIX}IncompatibleImage"
NO_ROOT = f"{PREFIX}RootPartitionNotFound"
NAMESPACE_FIELD = "userNamespaceFileDescriptor"
PARTITION_TABLE = "gpt"

# What fields of the requests are called that mountd makes of its clients' (service.mountfs).
FIELDS = {
    "source.imageFileDescriptor": "imageFileDescriptor",
    "source.directoryFileDescriptor": "directoryFileDescriptor",
    "source.verity.dataFileDescriptor": "verityDataFileDescriptor",
    "source.verity.rootHash": "verityRootHash",
    "source.verity.signature": "verityRootHashSignature",
    "source.signature": "verityRootHashSignature",
    "options": "mountOptions",
    "interactive": "allowInteractiveAuthentication",
}
NAMES: dict[type[MountdError], str] = {
    errors.DeniedByPolicy: PERMISSION_DENIED,
    errors.NotImmutable: PERMISSION_DENIED,
    errors.OptionNotPermitted: PERMISSION_DENIED,
    errors.InteractiveAuthenticationRequired: INTERACTIVE,
    errors.SignatureInvalid: f"{PREFIX}VerityFailure",
    errors.VerityMismatch: f"{PREFIX}VerityFailure",
    errors.KeyUnknown: f"{PREFIX}KeyNotFound",
    errors.KeyRequired: f"{PREFIX}KeyNotFound",
    errors.InvalidImage: INCOMPATIBLE,
    errors.AmbiguousRoot: f"{PREFIX}MultipleRootPartitionsFound",
}
# Of an image; of anything else, they are errnos.
OF_IMAGES: dict[type[MountdError], str] = {
    errors.DeniedByPolicy: DENIED,
    errors.NotImmutable: DENIED,
    errors.UnsupportedFileSystem: INCOMPATIBLE,
    errors.NotSupported: INCOMPATIBLE,
}
NUMBERS: dict[type[MountdError], int] = {
    errors.LimitExceeded: errno.EUSERS,
    errors.NotFound: errno.ENOENT,
    errors.NotSupported: errno.EOPNOTSUPP,
    errors.PeerGone: errno.ESRCH,
    errors.ShuttingDown: errno.ECONNREFUSED,
    errors.StorageFull: errno.ENOSPC,
    errors.TimedOut: errno.ETIMEDOUT,
    errors.UnsupportedFileSystem: errno.EOPNOTSUPP,
    errors.WrongKey: errno.EKEYREJECTED,
}
# All that a caller can get.
WIRE_NAMES = {*NAMES.values(), *OF_IMAGES.values(), SYSTEM, INVALID_PARAMETER, BAD_FLAGS, NO_ROOT}


class TheirError(MountdError):
    """An error with a name of another interface than mountd's."""

    def __init__(self, name: str, reason: str, *, hint: str | None = None, **parameters: object) -> None:
        """`name` is the full name of the error."""
        super().__init__(reason, hint=hint, reason=reason, **parameters)
        self.wire_name = name


def system(number: int, reason: str, *, hint: str | None = None) -> TheirError:
    """Return what says an errno."""
    name = errno.errorcode.get(number, "EIO")
    return TheirError(SYSTEM, reason, hint=hint, origin="linux", errno=number, errnoName=name)


def of_image(error: MountdError) -> MountdError:
    """Return what says `error`, which is about an image."""
    if (
        isinstance(error, errors.UnsupportedFileSystem)
        and error.parameters.get("fileSystemType") == PARTITION_TABLE
    ):
        return TheirError(NO_ROOT, error.message, hint=error.hint)
    name = OF_IMAGES.get(type(error))
    return error if name is None else TheirError(name, error.message, hint=error.hint)


def in_their_words(error: MountdError) -> MountdError:
    """Return the error that clients of systemd's interface know for `error`."""
    if isinstance(error, TheirError):
        return error
    if isinstance(error, errors.InvalidParameter | errors.BadFileDescriptor | errors.ProtocolError):
        field = str(error.parameters["parameter"])
        reason = str(error.parameters["reason"])
        return TheirError(INVALID_PARAMETER, reason, hint=error.hint, parameter=FIELDS.get(field, field))
    if isinstance(error, errors.UserNamespaceNotPermitted):
        return TheirError(INVALID_PARAMETER, error.message, hint=error.hint, parameter=NAMESPACE_FIELD)
    if isinstance(error, errors.MountFailed):
        return system(number_of(str(error.parameters["errnoName"])), error.message, hint=error.hint)
    name = NAMES.get(type(error))
    if name is not None:
        return TheirError(name, error.message, hint=error.hint)
    return system(NUMBERS.get(type(error), errno.EIO), error.message, hint=error.hint)


def number_of(name: str) -> int:
    """Return the errno with this name, EIO for none."""
    return int(getattr(errno, name, errno.EIO)) if name in errno.errorcode.values() else errno.EIO
