"""Attach and Detach for users who may not attach a mount themselves (THREATS.md, C 45, 51 and 53)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.kernel.flags import MountAttr
from mountd.kernel.mount_info import statmount
from tests.daemon import Daemon
from tests.e2e.attaching import User, id_at, records
from tests.e2e.conftest import TMPFS_RULE, trusting

ALICE, BOB = 4210, 4211


@pytest.fixture(scope="module")
def grounds(place: Path) -> Path:
    """Root's directory, in which users have theirs."""
    path = place / "attach"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture(scope="module")
def own_daemon(place: Path, images: dict[str, Path], grounds: Path) -> Iterator[Daemon]:
    directory = place / "attach-daemon"
    grant = f'["{grounds}/$UID/**"]'
    policy = trusting(place / "trusted", attach=grant, access='"read-write"')
    daemon = Daemon(directory, policy + TMPFS_RULE.replace("max-size", f"attach = {grant}, max-size"))
    yield daemon
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


def user(daemon: Daemon, grounds: Path, uid: int) -> User:
    own = grounds / str(uid)
    if not own.exists():
        own.mkdir(mode=0o700)
        os.chown(own, uid, uid)
    return User(daemon, uid, own)


@pytest.fixture
def alice(own_daemon: Daemon, grounds: Path) -> User:
    return user(own_daemon, grounds, ALICE)


@pytest.fixture
def bob(own_daemon: Daemon, grounds: Path) -> User:
    return user(own_daemon, grounds, BOB)


def test_there_and_back(alice: User, images: dict[str, Path]) -> None:
    target = alice.directory("there")
    name, text, id = alice.attach(images["squashfs"], target)
    assert (name, text) == ("", "")
    try:
        assert (target / "hello").read_text() == "hello from the image\n"
        assert id_at(target) == id
        found = statmount(id)
        wanted = MountAttr.NOSUID | MountAttr.NODEV | MountAttr.RDONLY
        assert found.attributes & wanted == wanted
        assert records(alice.daemon) == [str(id)]
    finally:
        assert alice.detach(id) == ("", "", id)
    assert not (target / "hello").exists()
    assert records(alice.daemon) == []
    assert alice.detach(id)[0] == "NotFound"
