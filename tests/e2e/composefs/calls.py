"""Asking for a composefs."""

from __future__ import annotations

from pathlib import Path

from mountd.client import Client, MountReply, Request
from tests.daemon import Daemon
from tests.e2e.calls import Outcome, outcome
from tests.e2e.directories import peer


def ask(daemon: Daemon, source: Path, *objects: Path, **wishes: object) -> MountReply:
    with (
        Client(str(daemon.socket)) as client,
        Request(f"composefs:{source}", objects=[str(each) for each in objects], **wishes) as request,  # type: ignore[arg-type]
    ):
        return client.mount(request.source, request.fds, **request.parameters)


def ask_as_user(daemon: Daemon, source: Path, *objects: Path, **wishes: object) -> MountReply:
    with peer():
        return ask(daemon, source, *objects, **wishes)


def refusal(daemon: Daemon, source: Path, *objects: Path, **wishes: object) -> Outcome:
    return outcome(lambda: ask_as_user(daemon, source, *objects, **wishes))
