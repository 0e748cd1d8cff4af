"""Calling io.mountd.Images."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from mountd.client import Client, Request
from mountd.errors import InUse
from mountd.fds import OwnedFd
from mountd.store.store import Store
from tests.daemon import Daemon
from tests.process import in_child

MIB = 1 << 20
IMAGES = "io.mountd.Images"


def empty(store: Store) -> None:
    for record in list(store.records()):
        deadline = time.monotonic() + 5
        while True:
            try:
                store.remove(record.digest, 0)
                break
            except InUse:  # the worker closes what it was handed a moment later
                assert time.monotonic() < deadline
                time.sleep(0.02)


def call(daemon: Daemon, method: str, fds: tuple[int, ...] = (), **parameters: object) -> dict[str, object]:
    owned = [OwnedFd(os.dup(fd)) for fd in fds]
    try:
        with Client(str(daemon.socket)) as client:
            reply, received = client.call(f"{IMAGES}.{method}", parameters, owned)
            assert received == []
            return reply
    finally:
        for fd in owned:
            fd.close()


def more(
    daemon: Daemon, method: str, fds: tuple[int, ...] = (), **parameters: object
) -> list[dict[str, object]]:
    owned = [OwnedFd(os.dup(fd)) for fd in fds]
    try:
        with Client(str(daemon.socket)) as client:
            return list(client.call_more(f"{IMAGES}.{method}", parameters, owned))
    finally:
        for fd in owned:
            fd.close()


def import_file(daemon: Daemon, path: Path, **parameters: object) -> dict[str, object]:
    with path.open("rb") as file:
        reply = call(daemon, "Import", (file.fileno(),), imageFileDescriptor=0, **parameters)
    image = reply["image"]
    assert isinstance(image, dict)
    return image


def digest_of(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def as_uid(uid: int, work: Callable[[], object]) -> None:
    def become() -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        work()

    in_child(become)


def mount(daemon: Daemon, source: str, **wishes: object) -> object:
    with Client(str(daemon.socket)) as client, Request(source, **wishes) as request:  # type: ignore[arg-type]
        return client.mount(request.source, request.fds, **request.parameters)
