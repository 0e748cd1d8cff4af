"""Every way in which mountd says no, and every way in which it fails.

A `MountdError` has a name and typed parameters, which are what the varlink interface declares; its text is
made here and nowhere else, so that the daemon's journal, the client library, the command line tools and
mount(8)'s helper all say the same words.
"""

from __future__ import annotations

import errno as errno_module
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

INTERFACE = "io.mountd.Mount"
IMAGES_INTERFACE = "io.mountd.Images"
ADMIN_INTERFACE = "io.mountd.Admin"


class MountdError(Exception):
    """Base of all errors that have a name on the wire.

    `parameters` maps the field names of the varlink error to JSON values; fields that are None are left out.
    `hint` says how to get out of it, where that is known.
    """

    wire_name = ""

    def __init__(self, message: str, *, hint: str | None = None, **parameters: object) -> None:
        """Make the error with its one-line text and its wire parameters."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.parameters = {key: value for key, value in parameters.items() if value is not None}
        if hint is not None:
            self.parameters["hint"] = hint

    def __str__(self) -> str:
        return self.message


def bug(error: BaseException) -> str:
    """Return how an error that nobody foresaw is told: without the text that was no text, maybe a secret."""
    if isinstance(error, UnicodeError):
        return f"{type(error).__name__}: {getattr(error, 'reason', '')}"
    return repr(error)


class DeniedByPolicy(MountdError):
    """The policy does not allow this image for this caller."""

    wire_name = "DeniedByPolicy"

    def __init__(self, reason: str, *, rule: str | None = None, hint: str | None = None) -> None:
        """`rule` is the name of the rule that decided; None where none applied, or none is asked."""
        where = f" (rule “{rule}”)" if rule is not None else ""
        super().__init__(f"denied by policy{where}: {reason}", hint=hint, rule=rule, reason=reason)


class NotImmutable(MountdError):
    """The image could be changed by its requester after it was judged."""

    wire_name = "NotImmutable"

    def __init__(self, reason: str, *, rule: str | None = None, hint: str | None = None) -> None:
        """`rule` is the rule that asked for immutability."""
        super().__init__(f"the image is not immutable: {reason}", hint=hint, rule=rule, reason=reason)


class SignatureInvalid(MountdError):
    """A signature does not belong to the image, or cannot be read."""

    wire_name = "SignatureInvalid"

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        """`reason` says what is wrong with it."""
        super().__init__(f"invalid signature: {reason}", hint=hint, reason=reason)


class KeyUnknown(MountdError):
    """A signature was made with a key that the policy does not name."""

    wire_name = "KeyUnknown"

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        """`reason` says which key is needed, or who made the signature."""
        super().__init__(f"unknown key: {reason}", hint=hint, reason=reason)


class KeyRequired(MountdError):
    """The image is encrypted, and no password came along."""

    wire_name = "KeyRequired"

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        """`reason` says what is encrypted."""
        super().__init__(f"a password is needed: {reason}", hint=hint, reason=reason)


class WrongKey(MountdError):
    """The password opens none of what is encrypted."""

    wire_name = "WrongKey"

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        """`reason` says what was tried, and never with what."""
        super().__init__(f"wrong password: {reason}", hint=hint, reason=reason)


class UnsupportedFileSystem(MountdError):
    """The image holds something that mountd does not mount."""

    wire_name = "UnsupportedFileSystem"

    def __init__(self, reason: str, *, file_system_type: str | None = None, hint: str | None = None) -> None:
        """`file_system_type` is what was recognised, None if nothing was."""
        super().__init__(
            f"unsupported file system: {reason}", hint=hint, reason=reason, fileSystemType=file_system_type
        )


class InvalidImage(MountdError):
    """The image is damaged, ambiguous or does not fit its own description."""

    wire_name = "InvalidImage"

    def __init__(self, reason: str, *, offset: int | None = None) -> None:
        """`offset` is where in the image, in bytes."""
        at = "" if offset is None else f" (at byte {offset})"
        super().__init__(f"invalid image: {reason}{at}", reason=reason, offset=offset)


class VerityMismatch(InvalidImage):
    """The data or the hash tree of an image does not fit the root hash, which is its description."""

    def __init__(self) -> None:
        """It shows when the first block is read, or at none."""
        super().__init__("its data or its hash tree does not fit the verity root hash", offset=0)


class AmbiguousRoot(InvalidImage):
    """Several partitions of an image could be the root, and none has the type for it."""

    def __init__(self) -> None:
        """It shows in the table of partitions."""
        super().__init__("GPT: several partitions could be the root: none has the type for it")


class BadFileDescriptor(MountdError):
    """A descriptor is of the wrong kind or was opened the wrong way."""

    wire_name = "BadFileDescriptor"

    def __init__(self, parameter: str, reason: str) -> None:
        """`parameter` is the field of the request that named the descriptor."""
        super().__init__(f"bad file descriptor in {parameter}: {reason}", parameter=parameter, reason=reason)


class UserNamespaceNotPermitted(MountdError):
    """The caller may not have ids mapped into this user namespace."""

    wire_name = "UserNamespaceNotPermitted"

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        """`reason` says which ownership or range rule failed."""
        super().__init__(f"user namespace not permitted: {reason}", hint=hint, reason=reason)


class OptionNotPermitted(MountdError):
    """A mount option is unknown, malformed or not granted."""

    wire_name = "OptionNotPermitted"

    def __init__(self, option: str, reason: str = "no rule grants it", *, hint: str | None = None) -> None:
        """`option` is the option as it was asked for."""
        super().__init__(
            f"mount option “{option}” not permitted: {reason}", hint=hint, option=option, reason=reason
        )


class AttachNotPermitted(MountdError):
    """Nothing is attached at this place for this caller."""

    wire_name = "AttachNotPermitted"

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        """`reason` says why the place is not the caller's to have something attached at."""
        super().__init__(f"attaching not permitted: {reason}", hint=hint, reason=reason)


class LimitExceeded(MountdError):
    """A number that the caller controls would grow past its bound."""

    wire_name = "LimitExceeded"

    def __init__(self, limit: str, maximum: int, *, hint: str | None = None) -> None:
        """`limit` names what is bounded."""
        super().__init__(
            f"limit exceeded: at most {maximum} {limit}", hint=hint, limit=limit, maximum=maximum
        )


class MountFailed(MountdError):
    """The kernel refused; `log` is what it said about it."""

    wire_name = "MountFailed"

    def __init__(self, call: str, errno_name: str, log: Sequence[str] = ()) -> None:
        """`call` is the failing call as text, `errno_name` for example "EINVAL"."""
        said = "".join(f"; the kernel says: {line}" for line in log)
        super().__init__(
            f"mount failed: {call}: {errno_name}{said}", call=call, errnoName=errno_name, log=list(log)
        )


class TimedOut(MountdError):
    """The request took longer than its deadline, and its worker was given up."""

    wire_name = "TimedOut"

    def __init__(self, seconds: int) -> None:
        """`seconds` is the deadline that passed."""
        super().__init__(f"timed out after {seconds} seconds", seconds=seconds)


class InteractiveAuthenticationRequired(MountdError):
    """An administrator has to consent, and nobody could be asked."""

    wire_name = "InteractiveAuthenticationRequired"

    def __init__(self, *, hint: str | None = None) -> None:
        """`hint` says how somebody can be asked."""
        super().__init__("an administrator has to consent, and nobody could be asked", hint=hint)


class NotFound(MountdError):
    """What the request refers to does not exist."""

    wire_name = "NotFound"

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        """`what` is the missing thing."""
        super().__init__(f"not found: {what}", hint=hint, what=what)


class InUse(MountdError):
    """What shall go away is still needed by somebody."""

    wire_name = "InUse"

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        """`what` says what is used, and how."""
        super().__init__(what, hint=hint, what=what)


class NotSupported(MountdError):
    """This kernel or this build cannot do what was asked."""

    wire_name = "NotSupported"

    def __init__(self, feature: str, *, hint: str | None = None) -> None:
        """`feature` names the missing thing: a system call, a kind of source."""
        super().__init__(f"not supported here: {feature}", hint=hint, feature=feature)


class RegistryFailed(MountdError):
    """A registry cannot be reached, does not prove who it is, or does not give what it was asked for."""

    wire_name = "RegistryFailed"

    def __init__(self, registry: str, reason: str, *, hint: str | None = None) -> None:
        """`registry` is its host and port."""
        super().__init__(f"registry {registry}: {reason}", hint=hint, registry=registry, reason=reason)


class StorageFull(MountdError):
    """There is no room left where images are kept."""

    wire_name = "StorageFull"

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        """`reason` says what did not fit."""
        super().__init__(f"no room left: {reason}", hint=hint, reason=reason)


class PeerGone(MountdError):
    """The process that connected has ended or is no longer what it was."""

    wire_name = "PeerGone"

    def __init__(self, reason: str) -> None:
        """`reason` says what no longer holds."""
        super().__init__(f"the calling process changed: {reason}", reason=reason)


class ShuttingDown(MountdError):
    """The daemon is stopping and takes no new request."""

    wire_name = "ShuttingDown"

    def __init__(self) -> None:
        """There is nothing more to say."""
        super().__init__(
            "mountd is shutting down", hint="try again: where systemd starts it, a new connection does"
        )
        del self.parameters["hint"]


class InvalidParameter(MountdError):
    """A field of the request is missing, of the wrong type or out of range (org.varlink.service)."""

    wire_name = "org.varlink.service.InvalidParameter"

    def __init__(self, parameter: str, reason: str = "invalid value") -> None:
        """`parameter` is the path of the field, for example "source.imageFileDescriptor"."""
        super().__init__(f"invalid parameter {parameter}: {reason}", parameter=parameter, reason=reason)


class ProtocolError(MountdError):
    """The bytes on the socket are not what the protocol allows; the connection cannot go on."""

    wire_name = "org.varlink.service.InvalidParameter"

    def __init__(self, reason: str) -> None:
        """`reason` says which limit or rule of the framing was broken."""
        super().__init__(f"protocol error: {reason}", parameter="message", reason=reason)


class SyscallError(OSError):
    """A system call failed. Its text is the call with its arguments, the error and what the kernel logged.

    `call` is the call as text, `log` the messages of the file system context, oldest first.
    """

    def __init__(self, number: int, call: str, log: Sequence[str] = ()) -> None:
        """`number` is the errno."""
        super().__init__(number, os.strerror(number))
        self.call = call
        self.log = tuple(log)

    @property
    def errno_name(self) -> str:
        """The symbolic name of the errno, such as "EINVAL"."""
        return errno_module.errorcode.get(self.errno or 0, str(self.errno))

    def __str__(self) -> str:
        said = "".join(f"; the kernel says: {line}" for line in self.log)
        return f"{self.call}: {self.errno_name} ({self.strerror}){said}"


class Unreachable(MountdError):
    """There is no daemon to ask, or it ended in the middle."""

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        """`reason` says where it was looked for and what happened."""
        usual = "start mountd.socket; in a container, have the host's /run/mountd at /run/host/mountd"
        super().__init__(f"cannot reach mountd: {reason}", hint=hint or usual)


class RemoteError(MountdError):
    """An error reply that this version of the client has no class for."""

    def __init__(self, name: str, parameters: Mapping[str, object]) -> None:
        """`name` is the full varlink name."""
        detail = ", ".join(f"{key}={value}" for key, value in parameters.items())
        super().__init__(f"{name}({detail})")
        self.name = name
        self.parameters = dict(parameters)
