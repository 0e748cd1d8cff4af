"""Attach and Detach as users call them: what they import is here already when they have become others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mountd.client import Client, Request
from mountd.errors import MountdError
from mountd.fds import OwnedFd
from mountd.kernel.mount_info import mount_id
from tests.container import as_user
from tests.daemon import Daemon

DIRECTORY = os.O_PATH | os.O_DIRECTORY
Answer = tuple[str, str, int]  # the error's name and text, "" if it worked; the id of the mount


def asked(socket: Path, image: Path | str, target: int, **wishes: object) -> Answer:
    """Ask for `image` at the open directory `target`, which is borrowed."""
    try:
        with Client(str(socket)) as client, Request(str(image), **wishes) as request:  # type: ignore[arg-type]
            request.add_target(OwnedFd(os.dup(target)))
            reply = client.attach(request.source, request.fds, **request.parameters)
    except MountdError as error:
        return type(error).__name__, str(error), 0
    assert isinstance(reply["id"], int)
    return "", "", reply["id"]


def detached(socket: Path, id: int, *, lazy: bool = False) -> Answer:
    """Ask for the end of an attachment."""
    try:
        with Client(str(socket)) as client:
            client.detach(id, lazy=lazy)
    except MountdError as error:
        return type(error).__name__, str(error), 0
    return "", "", id


def id_at(path: Path) -> int:
    """The unique id of the mount that is seen at `path`."""
    with OwnedFd(os.open(path, os.O_PATH)) as fd:
        return mount_id(fd.fileno())


@dataclass(frozen=True, slots=True)
class User:
    """One user of the host, with a directory of its own below a place that the policy grants."""

    daemon: Daemon
    uid: int
    own: Path
    groups: Sequence[int] = ()

    def directory(self, name: str, mode: int = 0o755) -> Path:
        """Return a new directory of the user's."""
        path = self.own / name
        path.mkdir()
        path.chmod(mode)
        os.chown(path, self.uid, self.uid)
        return path

    def attach(self, image: Path | str, target: Path | int, **wishes: object) -> Answer:
        """Ask for `image` at `target`, which is opened by the user, or open already."""

        def work() -> Answer:
            if isinstance(target, int):
                return asked(self.daemon.socket, image, target, **wishes)
            with OwnedFd(os.open(target, DIRECTORY)) as fd:
                return asked(self.daemon.socket, image, fd.fileno(), **wishes)

        return as_user(work, self.uid, groups=self.groups)

    def detach(self, id: int, *, lazy: bool = False) -> Answer:
        """Ask for the end of an attachment."""
        return as_user(lambda: detached(self.daemon.socket, id, lazy=lazy), self.uid, groups=self.groups)

    @contextmanager
    def attached(self, image: Path | str, target: Path, **wishes: object) -> Iterator[int]:
        """Have it attached for a while; yields the id."""
        name, text, id = self.attach(image, target, **wishes)
        assert name == "", text
        try:
            yield id
        finally:
            self.detach(id, lazy=True)


def user_of(daemon: Daemon, grounds: Path, uid: int, mode: int = 0o700) -> User:
    """The user `uid`, whose directory in `grounds` is made if it is not there."""
    own = grounds / str(uid)
    if not own.exists():
        own.mkdir(mode=mode)
        os.chown(own, uid, uid)
    return User(daemon, uid, own)


@contextmanager
def granting(
    place: Path, name: str, policy: Callable[[str], str], *arguments: str, **run: object
) -> Iterator[tuple[Daemon, Path]]:
    """A daemon whose policy lets users attach below directories of theirs, and where these are."""
    grounds = place / name
    grounds.mkdir(mode=0o755)
    daemon = Daemon(place / f"{name}-daemon", policy(f'["{grounds}/$UID/**"]'), arguments, **run)
    yield daemon, grounds
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log
    left = records(daemon)
    assert not left, left


def records(daemon: Daemon) -> list[str]:
    """The names of the files that say what is attached."""
    directory = daemon.directory / "run/attached"
    return sorted(os.listdir(directory)) if directory.exists() else []
