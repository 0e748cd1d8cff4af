"""Telling the user: one clear line on standard error, with the way out, and JSON for programs."""

from __future__ import annotations

import json
import os
import sys

from mountd.errors import (
    DeniedByPolicy,
    InvalidParameter,
    MountdError,
    NotFound,
    NotImmutable,
    OptionNotPermitted,
    SyscallError,
    Unreachable,
    UserNamespaceNotPermitted,
)

# mount(8), EXIT STATUS
EXIT_USAGE = 1  # incorrect invocation or permissions
EXIT_SYSTEM = 2  # out of memory, no daemon
EXIT_INTERRUPTED = 8
EXIT_FAILURE = 32  # mount failure

PERMISSION = (
    DeniedByPolicy,
    InvalidParameter,
    NotFound,
    NotImmutable,
    OptionNotPermitted,
    UserNamespaceNotPermitted,
)


def exit_status(error: BaseException) -> int:
    """Return the exit status that mount(8) documents for such an error."""
    if isinstance(error, (*PERMISSION, FileNotFoundError, PermissionError)):
        return EXIT_USAGE
    return EXIT_SYSTEM if isinstance(error, Unreachable) else EXIT_FAILURE


def explain_error(error: BaseException) -> tuple[str, str | None]:
    """Return the text of an error and the way out, if one is known."""
    if isinstance(error, SyscallError):
        hint = None
        if error.errno_name == "EPERM" and error.call.startswith("move_mount"):
            hint = (
                "attaching needs a mount namespace of your own: use “mountctl run”, "
                "or “unshare --user --map-root-user --mount”"
            )
        return str(error), hint
    if isinstance(error, MountdError):
        return error.message, error.hint
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}", None
    return str(error), None


def fail(program: str, error: BaseException, *, as_json: bool) -> int:
    """Report `error` and return the exit status."""
    text, hint = explain_error(error)
    line = f"{program}: {text}" + (f" (hint: {hint})" if hint else "")
    # Names of files may have been anything; the terminal gets one line.
    print(printable(line), file=sys.stderr)  # noqa: T201
    if as_json:
        name = getattr(error, "name", None) or getattr(error, "wire_name", "") or type(error).__name__
        parameters = error.parameters if isinstance(error, MountdError) else {}
        show_json({"error": name, "message": text, "hint": hint, "parameters": parameters})
    return exit_status(error)


def show_json(value: object) -> None:
    """Print one JSON document."""
    print(json.dumps(value, ensure_ascii=False))  # noqa: T201


def printable(text: str) -> str:
    """Return `text` with whatever could upset a terminal replaced."""
    return "".join(c if c.isprintable() else "?" for c in text)
