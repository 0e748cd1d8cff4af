"""Asking io.mountd.Admin as root does, for the tests of it."""

from __future__ import annotations

from typing import Any

from mountd.client import Client
from mountd.fds import close_all
from tests.daemon import Daemon

ADMIN = "io.mountd.Admin"


def ask(daemon: Daemon, method: str) -> dict[str, Any]:
    """Call a method that has no parameters."""
    with Client(str(daemon.socket)) as client:
        reply, fds = client.call(f"{ADMIN}.{method}", {}, [])
    close_all(fds)
    return reply


def counted(daemon: Daemon, method: str, result: str) -> int:
    """How often a method was answered like that so far; a short name is one of io.mountd.Mount."""
    name = method if "." in method or not method else f"io.mountd.Mount.{method}"
    return sum(
        each["count"]
        for each in ask(daemon, "Metrics")["requests"]
        if (each["method"], each["result"]) == (name, result)
    )
