"""Telling the user: one clear line on standard error, with the way out, and JSON for programs."""

from __future__ import annotations

import errno
import os
import sys

from mountd import errors
from mountd.errors import MountdError, SyscallError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

# mount(8), EXIT STATUS
EXIT_USAGE = 1  # incorrect invocation or permissions
EXIT_SYSTEM = 2  # out of memory, no daemon
EXIT_BUG = 4
EXIT_INTERRUPTED = 8
EXIT_FAILURE = 32  # mount failure

PERMISSION = (
    errors.AttachNotPermitted,
    errors.BadFileDescriptor,
    errors.DeniedByPolicy,
    errors.InteractiveAuthenticationRequired,
    errors.InvalidParameter,
    errors.KeyRequired,
    errors.KeyUnknown,
    errors.NotFound,
    errors.NotImmutable,
    errors.OptionNotPermitted,
    errors.SignatureInvalid,
    errors.UserNamespaceNotPermitted,
    errors.WrongKey,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
SYSTEM = (
    errors.LimitExceeded,
    errors.PeerGone,
    errors.ProtocolError,
    errors.RegistryFailed,
    errors.ShuttingDown,
    errors.StorageFull,
    errors.TimedOut,
    errors.Unreachable,
)
EXHAUSTED = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EIO)

ATTACHING = (
    "attaching needs a mount namespace of your own: use “mountctl run”, "
    "or “unshare --user --map-root-user --mount”"
)


class UsageError(MountdError):
    """The command line cannot be understood."""

    exit_status = EXIT_USAGE


def exit_status(error: BaseException) -> int:
    """Return the exit status that mount(8) documents for such an error."""
    own = getattr(error, "exit_status", None)
    if isinstance(own, int):
        return own
    if isinstance(error, PERMISSION):
        return EXIT_USAGE
    if isinstance(error, SYSTEM) or (isinstance(error, OSError) and error.errno in EXHAUSTED):
        return EXIT_SYSTEM
    return EXIT_FAILURE


def explain_error(error: BaseException) -> tuple[str, str | None]:
    """Return the text of an error and the way out, if one is known."""
    if isinstance(error, SyscallError):
        hint = None
        if error.errno_name == "EPERM" and error.call.startswith("move_mount"):
            hint = ATTACHING
        return str(error), hint
    if isinstance(error, MountdError):
        return error.message, error.hint
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}", None
    if isinstance(error, OSError) and error.strerror:
        return error.strerror, None
    return str(error), None


def fail(program: str, error: BaseException, *, where: str = "", as_json: bool = False) -> int:
    """Report `error`, which happened to the target `where`, and return the exit status."""
    text, hint = explain_error(error)
    complain(line_about(program, error, where))
    if as_json:
        name = getattr(error, "name", None) or getattr(error, "wire_name", "") or type(error).__name__
        parameters = error.parameters if isinstance(error, MountdError) else {}
        show_json({"error": name, "message": text, "hint": hint, "parameters": parameters})
    return exit_status(error)


def line_about(program: str, error: BaseException, where: str = "") -> str:
    """Return what is said about `error`, which happened to the target `where`."""
    text, hint = explain_error(error)
    named = not where or text.startswith(f"{where}: ") or text.endswith(f": {where}")
    about = "" if named else f"{where}: "
    return f"{program}: {about}{text}" + (f" (hint: {hint})" if hint else "")


def complain(line: str) -> None:
    """Print one line on standard error, if there is one."""
    if sys.stderr is not None:
        try:
            # Names of files may have been anything; the terminal gets one line.
            print(printable(line), file=sys.stderr, flush=True)  # noqa: T201
        except OSError:
            discard(2)


def tell_left_out(program: str, places: Sequence[str]) -> None:
    """Say which partitions of an image are not mounted, as it has no directory for them."""
    for place in places:
        complain(f"{program}: the image has no directory {place}, so that partition is left out")


def say(text: str) -> None:
    """Print `text` on standard output, if somebody listens. Raises OSError."""
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)  # noqa: T201
    except BrokenPipeError:
        discard(1)  # who has read enough has gone, as with “| head”
    except OSError as error:
        discard(1)
        raise OSError(error.errno, error.strerror, "standard output") from None


def show_json(value: object) -> None:
    """Print one JSON document. Raises OSError."""
    import json

    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding if sys.stdout is not None else "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    say(text)


def printable(text: str) -> str:
    """Return `text` with whatever could upset a terminal replaced."""
    return "".join(c if c.isprintable() else "?" for c in text)


def discard(fd: int) -> None:
    """Lead a standard descriptor into nothing, or Python would try to write to it once more at its end."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, fd)
    os.close(null)


def occupy_standard_descriptors() -> None:
    """Keep whatever is opened from being taken for standard input, output or error."""
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        pass
    os.close(fd)


def end(program: str, work: Callable[[], int]) -> None:
    """Do `work` and end with the status it returns; whatever goes wrong is one line. Never returns."""
    sys.exit(finish(program, work))


def finish(program: str, work: Callable[[], int]) -> int:
    """Do `work` and return the exit status; whatever goes wrong is one line."""
    status = EXIT_BUG
    try:
        occupy_standard_descriptors()
        status = work()
    except (MountdError, OSError) as error:
        status = fail(program, error)
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - a user has no use for a traceback
        complain(f"{program}: this is a bug of mountd, please report it: {error!r}")
    return status


def leave(status: int) -> NoReturn:
    """End the process at once. What it holds, the kernel takes back sooner than the interpreter would."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            continue  # who reads it has gone; that was found out when it was written
    os._exit(status)
