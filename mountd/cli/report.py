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

EXPLAIN = "“mountctl explain SOURCE” says what each rule wants to see"
IN_USE = "“fuser -vm DIR” says by whom; or “umount --lazy DIR”"
VERSIONS = "mountd and this program may be of different versions: “mountctl doctor” compares them"
# The ways out for errors that come without one: by class, and by words in their text; the first one counts.
WAYS_OUT: Sequence[tuple[type[BaseException], str, str]] = (
    (errors.AttachNotPermitted, "", "use a directory of your own, below directories of your own"),
    (
        errors.BadFileDescriptor,
        "block device",
        "give the file itself, and leave the option “loop” out: mountd makes the loop device itself",
    ),
    (errors.BadFileDescriptor, "FUSE", "use a copy on a file system of the kernel's own"),
    (errors.BadFileDescriptor, "user namespace", "give a path such as /proc/PID/ns/user"),
    (errors.BadFileDescriptor, "", "SOURCE is a regular file or a directory, and TARGET a directory"),
    (errors.DeniedByPolicy, "", EXPLAIN),
    (errors.InteractiveAuthenticationRequired, "", "ask on a terminal, or in a session with an agent"),
    (errors.InUse, "", IN_USE),
    (errors.InvalidImage, "was asked for", "ask for no type, or for the one that it has"),
    (errors.InvalidImage, "", "use another copy of it, or make it anew"),
    (errors.InvalidParameter, "", "mountctl(1) and mount.mountd(8) say what can be given"),
    (errors.KeyRequired, "", "give it with --key-file, or mountd.key-file="),
    (errors.KeyUnknown, "", EXPLAIN),
    (errors.LimitExceeded, "", "“mountctl status” shows the limits, for root"),
    (errors.MountFailed, "", "“journalctl -u mountd.service” and “dmesg” may say more"),
    (errors.NotFound, "", "see that the name is right"),
    (errors.NotImmutable, "", EXPLAIN),
    (errors.NotSupported, "", "“mountctl doctor” says what this machine lacks"),
    (errors.OptionNotPermitted, "", "leave it out; “mountctl explain” says what a rule grants"),
    (errors.PeerGone, "", "run it again"),
    (errors.ProtocolError, "", VERSIONS),
    (errors.RegistryFailed, "", "“journalctl -u mountd-pull.service” may say more; or try again later"),
    (errors.RemoteError, "", VERSIONS),
    (errors.SignatureInvalid, "", "have the image signed anew, as it is now"),
    (errors.StorageFull, "", "“mountctl image gc” makes room"),
    (errors.TimedOut, "", "try again; “journalctl -u mountd.service” says what it was doing"),
    (errors.UnsupportedFileSystem, "was asked for", "ask for no type, or for the one that it has"),
    (
        errors.UnsupportedFileSystem,
        "",
        "“blkid -p IMAGE” says what it is; mountd mounts erofs, squashfs, ext4, xfs and btrfs, "
        "and disk images with these",
    ),
    (errors.UserNamespaceNotPermitted, "", "use one of your own, or “none”"),
    (errors.WrongKey, "", "try another one"),
    (FileNotFoundError, "", "see that the path is right"),
    (IsADirectoryError, "", "give a file"),
    (NotADirectoryError, "", "give a directory that is there"),
    (OSError, "name too long", "give a shorter path, such as one from a directory that is nearer to it"),
    (PermissionError, "", "mountd opens nothing for you: it takes the right to do that yourself"),
)

ATTACHING = (
    "attaching needs a mount namespace of your own: use “mountctl run”, "
    "or “unshare --user --map-root-user --mount”"
)


class UsageError(MountdError):
    """The command line cannot be understood."""

    exit_status = EXIT_USAGE

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Without a hint, the help is one."""
        super().__init__(message, hint=hint or "see “--help”")


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
        elif error.errno_name == "EBUSY" and error.call.startswith("umount2"):
            hint = IN_USE
        return str(error), hint
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{os.fsdecode(error.filename) or '“”'}: {error.strerror}"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    return text, getattr(error, "hint", None) or way_out(error, text)


def way_out(error: BaseException, text: str) -> str | None:
    """Return what is to be done about an error that does not say that itself, None where nobody knows."""
    for kind, words, hint in WAYS_OUT:
        if isinstance(error, kind) and words in text:
            return hint
    return None


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


def tell_done(line: str, hint: str, print_it: Callable[[], None], *, needed: bool) -> int:
    """Print the outcome of what was done, which stays done if it cannot be printed; return the exit status.

    `line` says so on standard error then, `hint` how it is undone; `needed` is whether whoever called cannot
    do without what is printed, as programs that read JSON.
    """
    try:
        print_it()
    except OSError as error:
        complain(f"{line}, though this cannot be told: {explain_error(error)[0]} (hint: {hint})")
        return EXIT_SYSTEM if needed else 0
    return 0


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
        complain(f"{program}: this is a bug of mountd, please report it: {errors.bug(error)}")
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
