"""The directory of the ledger is removed: List and Revoke go on, with what can be found out otherwise."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.errors import LimitExceeded
from mountd.kernel.flags import Ioctl
from tests.container import USER, as_user
from tests.daemon import Daemon
from tests.e2e.attaching import User, granting, user_of
from tests.e2e.calls import outcome
from tests.e2e.conftest import trusting
from tests.e2e.test_list import listed, wait_for
from tests.e2e.test_revoke import attached_in_a_container, revoke
from tests.e2e.test_shared import ask_as
from tests.seccomp import lose

ALICE = 4236
NOBODY = 0xFFFFFFFF


def running(daemon: Daemon) -> None:
    shutil.rmtree(daemon.directory / "run/ledger")


def stopped(daemon: Daemon) -> None:
    daemon.stop()
    running(daemon)
    daemon.launch()


LOSSES = pytest.mark.parametrize("lose", [running, stopped])


IOCTL = {"x86_64": 16, "aarch64": 29}[os.uname().machine]
KERNELS = {
    "this kernel": None,
    "without ids of all kinds of namespaces": lambda: lose(IOCTL, errno.ENOTTY, (1, Ioctl.NS_GET_ID)),
}


@pytest.fixture(params=KERNELS)
def alice(request: pytest.FixtureRequest, place: Path, tmp_path: Path) -> Iterator[User]:
    """With a daemon of its own, since that is started again."""

    def policy(grant: str) -> str:
        return trusting(place / "trusted", attach=grant)

    name = f"lostledger-{tmp_path.name}"
    lacking = KERNELS[request.param]
    with granting(place, name, policy, "--max-mounts", "2", preexec_fn=lacking) as (daemon, grounds):
        yield user_of(daemon, grounds, ALICE)


@LOSSES
def test_what_mountd_has_attached(
    alice: User, images: dict[str, Path], lose: Callable[[Daemon], None]
) -> None:
    """It is its owner's, and counts for him."""
    daemon, target = alice.daemon, alice.directory("target")
    with alice.attached(images["erofs"], target) as id:
        (before,) = as_user(lambda: listed(daemon), ALICE)
        lose(daemon)
        (after,) = as_user(lambda: listed(daemon), ALICE)
        lost = {"source": "unknown", "idMap": "unknown"}
        for name in ("digest", "signer", "trustedBy"):
            before.pop(name, None)
        assert after == before | lost
        other, third = (alice.directory(each) for each in ("other", "third"))
        with alice.attached(images["squashfs"], other):
            assert alice.attach(images["erofs"], third)[0] == LimitExceeded.__name__
        assert [each["mountPoint"] for each in revoke(daemon, id=id)["detached"]] == [str(target)]
        wait_for(lambda: not listed(daemon, everybody=True))


def test_it_is_written_anew_for_the_next_mount(alice: User, images: dict[str, Path]) -> None:
    """Not only for who asks what there is."""
    daemon = alice.daemon
    one, two, three = (alice.directory(name) for name in ("one", "two", "three"))
    with alice.attached(images["erofs"], one):
        running(daemon)
        with alice.attached(images["squashfs"], two):
            assert len(as_user(lambda: listed(daemon), ALICE)) == 2
            assert alice.attach(images["squashfs"], three)[0] == LimitExceeded.__name__
    wait_for(lambda: not listed(daemon, everybody=True))


def test_what_a_container_has_attached_is_nobodys(
    start: Callable[..., Daemon], images: dict[str, Path], containers: None
) -> None:
    """Its superblock is still watched, so that it can be taken back."""
    daemon = start(trusting(images["erofs"].parent))
    with attached_in_a_container(daemon, images["erofs"]) as (id, asking):
        running(daemon)
        (found,) = listed(daemon, everybody=True)
        assert (found["id"], found["uid"], found["fileSystemType"]) == (id, NOBODY, "erofs")
        assert as_user(lambda: listed(daemon), USER) == []
        assert len(revoke(daemon, id=id)["detached"]) == 2
        asking.send(b"?")
        assert asking.recv(100) == b"False False"
    wait_for(lambda: not listed(daemon, everybody=True))


def test_nothing_was_there(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    daemon = start(trusting(images["erofs"].parent))
    for _ in range(2):
        assert listed(daemon, everybody=True) == []
        running(daemon)
        assert outcome(lambda: revoke(daemon, id=5))[0] == "NotFound"
        running(daemon)
        with ask_as(daemon, images["erofs"], USER):
            assert len(listed(daemon, everybody=True)) == 1
    assert (daemon.directory / "run/ledger").stat().st_mode & 0o777 == 0o700
