"""Asking in the terminal: an administrator for consent where mountd wants that, the user for a password.

A desktop has an agent of polkit's that asks; in a terminal pkttyagent(1) does, for as long as this process
waits for the answer. It is started only once mountd has said that somebody has to be asked.
"""

from __future__ import annotations

import os
import sys

from mountd.errors import InteractiveAuthenticationRequired, InvalidParameter, KeyRequired, WrongKey

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from mountd.request import Request

    Reply = TypeVar("Reply")

PROGRAM = "/usr/bin/pkttyagent"
SECONDS_TO_START = 10.0
TRIES = 3  # to say the password
# What it needs to know of the terminal; nothing else of the environment concerns it.
ENVIRONMENT = ("TERM", "LANG", "LC_ALL", "LC_MESSAGES")


def with_consent(method: Callable[..., Reply], request: Request) -> Reply:
    """Call a method with a request, as `asking` does; a password that it needs is asked for on the terminal.

    That is where the request lets it, and a few times if it is wrong. Raises what `method` raises.
    """
    tries = TRIES if request.asks else 0
    while True:
        try:
            return without_password(method, request)
        except (KeyRequired, WrongKey) as error:
            if not tries or not on_terminal():
                raise
            if isinstance(error, WrongKey):
                sys.stderr.write("This is not the password.\n")
        tries -= 1
        request.parameters["password"] = asked_for()


def asked_for() -> str:
    """Ask for the password on the terminal; an end of input is an interrupt.

    Raises InvalidParameter, KeyboardInterrupt.
    """
    from getpass import getpass

    try:
        password = getpass("Password of the encrypted image: ")
        password.encode()
    except EOFError:
        raise KeyboardInterrupt from None
    except UnicodeError:
        # Without what it quotes.
        raise InvalidParameter("password", "what was typed is no text in UTF-8") from None
    return password


def without_password(method: Callable[..., Reply], request: Request) -> Reply:
    """Call a method with a request as it is; an administrator may be asked. Raises what `method` raises."""

    def call(interactive: bool | None) -> Reply:
        request.parameters["interactive"] = interactive
        return method(request.source, request.fds, **request.parameters)

    return asking(call, request.parameters.get("interactive"))


def asking(call: Callable[[bool | None], Reply], wish: object) -> Reply:
    """Return `call(wish)`; if somebody has to be asked and can be, call once more with True.

    Nobody is asked if the wish is False, nor if it is None and this process has no terminal. Raises what
    `call` raises.
    """
    try:
        return call(wish if isinstance(wish, bool) else None)
    except InteractiveAuthenticationRequired:
        if wish is False or not on_terminal():
            raise
    with Agent():
        return call(True)


def on_terminal() -> bool:
    """Tell whether there is a person at this process's terminal."""
    streams = (sys.stdin, sys.stderr)
    return all(stream is not None and stream.isatty() for stream in streams)


class Agent:
    """pkttyagent(1), if there is one, from the beginning of a with statement to its end."""

    def __init__(self) -> None:
        """Not started yet."""
        self._pid = 0
        self._terminal: list[Any] | None = None  # how it was

    def __enter__(self) -> Agent:
        """Start it and wait until it is known to polkit, or has given up."""
        if not os.access(PROGRAM, os.X_OK):
            return self
        import contextlib
        import select
        import termios

        with contextlib.suppress(termios.error):
            self._terminal = termios.tcgetattr(0)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            os.set_inheritable(writer, True)
            words = [PROGRAM, "--process", str(os.getpid()), "--notify-fd", str(writer)]
            if "XDG_SESSION_ID" in os.environ:
                # The agent of a desktop comes first. Outside of a session polkit does not look for a second.
                words.append("--fallback")
            environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
            with contextlib.suppress(OSError):
                self._pid = os.posix_spawn(PROGRAM, words, environment)
        finally:
            os.close(writer)
        try:
            # It closes its end once it is known.
            poll = select.poll()
            poll.register(reader, select.POLLIN)
            poll.poll(SECONDS_TO_START * 1000)
        except BaseException:
            self._stop()
            raise
        finally:
            os.close(reader)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        """End it: by SIGTERM, so that it gives the terminal back as it was."""
        import contextlib
        import signal

        pid, self._pid = self._pid, 0
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGCONT)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        if self._terminal is not None:
            import termios

            # It may have had no time to let what is typed be seen again.
            with contextlib.suppress(termios.error):
                termios.tcsetattr(0, termios.TCSADRAIN, self._terminal)
