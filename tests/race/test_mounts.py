"""From the socket to the mount: what is mounted is the file handed over, not what its name leads to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.client import Client, Request
from mountd.errors import MountdError
from tests.bench.bare import mount_and_map
from tests.container import RANGE, user_namespace
from tests.daemon import Daemon
from tests.images import build_image, build_tree
from tests.race.swapping import ATTACKER, Ground, Seen, loses, never_wins

GOOD, EVIL = "hello from the image\n", "hello from the attacker\n"
POLICY = """
[[rule]]
name = "trusted"
image = {{ location = "{}/*" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["erofs", "squashfs"], idmap = ["none"] }}
verdict = "allow"
"""


def images(ground: Ground, type: str) -> tuple[Path, Path]:
    """The same name on both sides."""
    tree = build_tree(ground.trusted / "tree")
    good = build_image(type, tree, ground.trusted / f"{type}.raw")
    (tree / "hello").write_text(EVIL)
    evil = build_image(type, tree, ground.theirs / f"{type}.raw")
    os.chown(evil, ATTACKER, ATTACKER)
    os.sync()
    return good, evil


@pytest.fixture
def daemon(ground: Ground) -> Iterator[Daemon]:
    directory = ground.trusted / "daemon"
    running = Daemon(directory, POLICY.format(ground.trusted))
    yield running
    assert running.stop() == 0, running.log
    assert "internal error" not in running.log
    shutil.rmtree(directory)


def told(mount: int) -> Seen:
    with open(os.open("hello", os.O_RDONLY, dir_fd=mount), encoding="utf-8") as file:
        return {GOOD: Seen.GOOD, EVIL: Seen.WON}[file.read()]


# A loop device is taken and given back for each mount of a squashfs.
@pytest.mark.parametrize("type", ["erofs", "squashfs"])
def test_mount(ground: Ground, daemon: Daemon, type: str) -> None:
    good, evil = images(ground, type)
    with Client(str(daemon.socket)) as client:

        def check() -> Seen:
            with Request(str(good), userns="none") as request:
                try:
                    reply = client.mount(request.source, request.fds, **request.parameters)
                except MountdError:
                    return Seen.REFUSED
            with reply:
                return told(reply.mount.fileno())

        never_wins(good, evil, check)


def test_a_naive_mount_loses(ground: Ground) -> None:
    """By name, once the name was seen to be root's."""
    good, evil = images(ground, "erofs")
    with user_namespace(RANGE) as userns:

        def check() -> Seen:
            if os.stat(good).st_uid != 0:
                return Seen.REFUSED
            mount = mount_and_map(os.fsencode(good), userns.fileno())
            try:
                return told(mount)
            finally:
                os.close(mount)

        loses(good, evil, check)
