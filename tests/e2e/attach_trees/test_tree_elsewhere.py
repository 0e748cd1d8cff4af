"""An attached tree in other mount namespaces, at the limits of the kernel, and taken back."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from mountd.client import Client
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, moving, namespaces
from mountd.kernel.flags import Clone, Propagation
from mountd.kernel.mount_info import listmount, statmount
from mountd.kernel.numbers import NUMBERS
from tests.container import as_user, forked
from tests.daemon import Daemon
from tests.e2e.attach_trees.asking import TINA, list_of
from tests.e2e.attaching import DIRECTORY, User, asked, detached, records, user_of
from tests.e2e.conftest import trusting
from tests.e2e.test_sources import loops_over
from tests.e2e.trees import PLACES, ids_at, seen
from tests.rogue import eventually
from tests.seccomp import lose

MOST = 300  # mounts of a namespace: more than are in any that mountd itself has


def in_a_place_of_its_own(work: Callable[[], object]) -> object:
    """Do `work` where everything that is mounted is shared, and with nobody else."""

    def enter() -> object:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        mount_api.set_propagation("/", Propagation.SHARED, recursive=True)
        return work()

    return forked(enter)


@contextlib.contextmanager
def follower(*options: str) -> Iterator[Callable[[Path], list[str]]]:
    """Another mount namespace that gets what is mounted here; yields what is seen there below a path."""
    command = ["unshare", "--mount", "--propagation", "slave", *options, "sh", "-c", "echo; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()

        def below(path: Path) -> list[str]:
            lines = Path(f"/proc/{process.pid}/mountinfo").read_text().splitlines()
            return sorted(line.split()[4] for line in lines if line.split()[4].startswith(str(path)))

        yield below
        process.kill()


def test_copies_elsewhere_go_with_it(tina: User, disk: Path) -> None:
    """Other mount namespaces, of root and of others, get a copy of it and keep none."""
    target = tina.directory("elsewhere")
    places = sorted(str(target / place) for place in PLACES.values())

    def work() -> list[object]:
        said: list[object] = []
        with follower() as ours, follower("--map-root-user") as theirs:
            for lazy in (False, True):
                name, _, id = as_user(lambda: attach(tina, disk, target), TINA)
                said += [name, ours(target) == places, theirs(target) == places]
                ids = ids_at(target)
                said.append(
                    [name for name, id in ids.items() if statmount(id).propagation != Propagation.PRIVATE]
                )
                said.append(as_user(lambda: detached(tina.daemon.socket, id, lazy=lazy), TINA)[0])  # noqa: B023
                said += [ours(target), theirs(target)]
        return said

    once = ["", True, True, ["root", "var"], "", [], []]
    assert in_a_place_of_its_own(work) == [*once, *once]


def attach(user: User, image: Path, target: Path) -> tuple[str, str, int]:
    """Attach, by whoever this is."""
    with OwnedFd(os.open(target, DIRECTORY)) as fd:
        return asked(user.daemon.socket, image, fd.fileno())


def test_as_many_as_the_kernel_lets_a_namespace_have(tina: User, disk: Path) -> None:
    """Where there is room for some of it, none of it is attached."""
    target = tina.directory("full")
    maximum = Path("/proc/sys/fs/mount-max")
    before = maximum.read_text()

    def work() -> list[object]:
        while len(listmount()) < MOST:
            with mount_api.clone_mount("/tmp") as one:
                mount_api.move_mount(one.fileno(), "/tmp")
        said: list[object] = []
        for room in (len(PLACES) - 1, len(PLACES)):
            maximum.write_text(str(len(listmount()) + 1 + room))  # the first one of all is not listed
            name, text, id = as_user(lambda: attach(tina, disk, target), TINA)
            said += [name, "ENOSPC" in text, len(seen(target)), len(records(tina.daemon))]
        return [*said, as_user(lambda: detached(tina.daemon.socket, id), TINA)[0]]

    try:
        found = in_a_place_of_its_own(work)
    finally:
        maximum.write_text(before)
    assert found == ["MountFailed", True, 0, 0, "", False, len(PLACES), len(PLACES), ""]


def test_it_is_revoked_as_a_whole(tina: User, disk: Path) -> None:
    """By its user all of it is, and each mount is told of; by the id of the first, nothing stays either."""
    target = tina.directory("revoked")
    for by in ("uid", "id"):
        with tina.attached(disk, target) as id, Client(str(tina.daemon.socket)) as client:
            ids = set(ids_at(target).values())
            said = client.call("io.mountd.Admin.Revoke", {by: TINA if by == "uid" else id}, [])[0]
            assert said["held"] == []
            found = {each["id"] for each in said["detached"]}  # type: ignore[attr-defined]
            assert found == (ids if by == "uid" else {id})
            assert os.listdir(target) == []
            assert list_of(tina) == {}
            tina.detach(id)
            for name in records(tina.daemon):
                assert tina.detach(int(name))[0] == "NotFound"


def test_a_kernel_that_puts_no_trees_together(place: Path, disk: Path, start: Callable[..., Daemon]) -> None:
    """Before Linux 6.15, nothing is attached to what is attached nowhere; the error says what to do."""
    grounds = place / "trees-old"
    grounds.mkdir(mode=0o755)

    def refuse() -> None:
        lose(NUMBERS["move_mount"], errno.EINVAL, (4, moving.ATTACH))

    daemon = start(trusting(place / "trusted", attach=f'["{grounds}/$UID/**"]'), preexec_fn=refuse)
    user = user_of(daemon, grounds, TINA)
    target = user.directory("old")
    name, text, _ = user.attach(disk, target)
    assert (name, "several partitions for a caller (Linux 6.15)" in text) == ("NotSupported", True)
    assert os.listdir(target) == records(daemon) == []
    assert list_of(user) == {}
    assert eventually(lambda: not loops_over(disk), 5)
