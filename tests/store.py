"""Images for the store, and what is in it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mountd.fds import OwnedFd
from mountd.store.quota import Limits
from mountd.store.record import Owner, Record, serialise
from mountd.store.store import Store

MIB = 1 << 20
ROOT = Owner(0, 0)
USER = Owner(1000, 1000)
OTHER = Owner(1001, 1001)


def limited(home: Path, **limits: int) -> Store:
    made = Store(home / "state", Limits(**limits))
    made.prepare()
    return made


def content(size: int, seed: int = 1) -> bytes:
    block = hashlib.shake_128(bytes([seed])).digest(min(size, MIB))
    return (block * (size // MIB + 1))[:size]


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def put(store: Store, data: bytes, owner: Owner = USER, **fields: object) -> Record:
    with opened(data) as fd:
        return store.add(fd, len(data), owner, **fields)  # type: ignore[arg-type]


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[int]:
    """An unnamed file in memory with `data`."""
    with OwnedFd(os.memfd_create("image", os.MFD_CLOEXEC)) as fd:
        with open(os.dup(fd.fileno()), "wb") as file:
            file.write(data)
        yield fd.fileno()


def tree(home: Path) -> set[str]:
    """All files of the store but its lock and slots, whose presence means nothing."""
    state = home / "state"
    return {
        str(path.relative_to(state))
        for path in state.rglob("*")
        if path.is_file() and path.relative_to(state).parts[0] not in ("lock", "slots")
    }


def files(*digests: str) -> set[str]:
    """The files that these images consist of, and nothing else."""
    hexes = [digest.partition(":")[2] for digest in digests]
    return {f"images/sha256/{each}" for each in hexes} | {f"records/sha256/{each}.json" for each in hexes}


def age(home: Path, digest: str) -> None:
    """Make an image one that was imported, and used last, a day ago."""
    path = home / "state/images/sha256" / digest[7:]
    yesterday = int(time.time()) - 86400
    os.utime(path, (yesterday, yesterday))
    record = home / "state/records/sha256" / f"{digest[7:]}.json"
    made = Store(home / "state").record(digest)
    record.chmod(0o600)
    record.write_bytes(serialise(replace(made, created=yesterday)))
    record.chmod(0o400)
