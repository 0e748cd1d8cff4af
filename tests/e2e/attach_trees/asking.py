"""What these tests ask, and of whom."""

from __future__ import annotations

import os
from pathlib import Path

from mountd.client import Client, Request
from mountd.fds import OwnedFd
from mountd.kernel.flags import MountAttr
from tests.container import as_user
from tests.daemon import Daemon
from tests.e2e.attaching import DIRECTORY, User
from tests.e2e.trees import PLACES

TINA, TOBY = 4260, 4261
Scene = tuple[Daemon, Path]
WHOLE = {name: name for name in PLACES}
WANTED = MountAttr.NOSUID | MountAttr.NODEV | MountAttr.RDONLY


def ask(user: User, image: Path, target: Path, **wishes: object) -> dict[str, object]:
    """The whole reply of Attach."""

    def work() -> dict[str, object]:
        fd = OwnedFd(os.open(target, DIRECTORY))
        with Client(str(user.daemon.socket)) as client, Request(str(image), **wishes) as request:  # type: ignore[arg-type]
            request.add_target(fd)
            return client.attach(request.source, request.fds, **request.parameters)

    return as_user(work, user.uid)


def list_of(user: User) -> dict[int, list[str]]:
    """Where each mount of the user's is attached, by id."""

    def work() -> object:
        with Client(str(user.daemon.socket)) as client:
            return client.call("List", {}, [])[0]["mounts"]

    return {each["id"]: [at["mountPoint"] for at in each["attached"]] for each in as_user(work, user.uid)}  # type: ignore[attr-defined]
