"""Directories on file systems other than the host's: overlays, and what a container has mounted itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.client import attach
from mountd.fds import OwnedFd
from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from tests.container import RANGE, USER, in_container
from tests.daemon import Daemon
from tests.e2e.calls import Outcome, explain, mount_fds, outcome
from tests.e2e.directories import peer, rule

Start = Callable[..., Daemon]
SOURCE = {"directoryFileDescriptor": 0}
OWN = rule("own", '"caller", "foreign"', ', access = "read-write"')


@pytest.fixture
def home(place: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="elsewhere-", dir=place))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def overlay(home: Path, *options: str) -> Iterator[Path]:
    """An overlay with a file in it, below `home`."""
    for name in ("lower", "upper", "work", "merged"):
        (home / name).mkdir()
    (home / "lower/hello").write_text("hello")
    with FsContext.open("overlay") as context:
        context.set_string("lowerdir", f"{home}/lower")
        context.set_string("upperdir", f"{home}/upper")
        context.set_string("workdir", f"{home}/work")
        for option in options:
            context.set_flag(option)
        context.create()
        with context.mount(MountAttr(0)) as mount:
            attach(mount.fileno(), str(home / "merged"))
    try:
        yield home / "merged"
    finally:
        mount_api.umount(str(home / "merged"))


def in_memory(at: Path) -> None:
    with FsContext.open("tmpfs") as context:
        context.create()
        with context.mount(MountAttr(0)) as mount:
            attach(mount.fileno(), str(at))


def ask(daemon: Daemon, path: Path, **fields: object) -> Outcome:
    with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
        return outcome(lambda: mount_fds(daemon.socket, SOURCE, [fd.fileno()], **fields))


def test_a_directory_on_an_overlay(start: Start, home: Path) -> None:
    """The kernel maps no ids there, so that there is no idmap to leave out."""
    daemon = start(OWN)
    with overlay(home) as merged:
        os.chown(merged, USER, USER)
        with OwnedFd(os.open(merged, os.O_RDONLY)) as fd, peer():
            assert explain(daemon.socket, SOURCE, [fd.fileno()])["decision"]["verdict"] == "allow"
            with mount_fds(daemon.socket, SOURCE, [fd.fileno()], readOnly=False) as reply:
                os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=reply.mount.fileno()))
                assert sorted(os.listdir(f"/proc/self/fd/{reply.mount.fileno()}")) == ["hello", "new"]
            found = outcome(
                lambda: mount_fds(daemon.socket, SOURCE, [fd.fileno()], idMap={"kind": "caller"})
            )
    assert found[0] == "UnsupportedFileSystem"
    assert "the kernel maps no ids on overlay" in found[1]


def test_a_directory_on_an_overlay_of_a_containers(start: Start, home: Path, containers: None) -> None:
    daemon = start(OWN)

    def work() -> list[Outcome]:
        in_memory(home)
        with overlay(home, "userxattr") as merged:
            (merged / "own").mkdir()
            return [ask(daemon, merged / "own"), ask(daemon, merged / "own", readOnly=False)]

    assert in_container(work) == [("", ""), ("", "")]


def test_times_that_are_locked_stay_as_they_are(start: Start, home: Path, containers: None) -> None:
    """What a user namespace has got from outside: it may be mounted, and keeps times as it did."""
    os.chown(home, RANGE[0][1], RANGE[0][1])
    wished, ruled = start(OWN), start(OWN.replace("grant = {", 'grant = { flags = ["noatime", "noexec"],'))

    def flags(daemon: Daemon, options: list[str]) -> int:
        with (
            OwnedFd(os.open(home, os.O_RDONLY)) as fd,
            mount_fds(daemon.socket, SOURCE, [fd.fileno()], options=options) as reply,
        ):
            return os.fstatvfs(reply.mount.fileno()).f_flag

    def work() -> list[int]:
        return [flags(wished, ["noatime", "noexec"]), flags(wished, ["nodiratime"]), flags(ruled, [])]

    outside = os.statvfs(home).f_flag & os.ST_NOATIME
    found = in_container(work)
    assert [each & os.ST_NOATIME for each in found] == [outside] * 3
    assert [bool(each & os.ST_NOEXEC) for each in found] == [True, False, True]


@pytest.mark.parametrize("kind", ["namespace", "caller", "none"])
def test_ids_of_a_file_system_of_a_user_namespaces(
    start: Start, home: Path, containers: None, kind: str
) -> None:
    """The kernel reads an idmap there as one of that namespace's ids, of which others are the caller's."""
    daemon = start(OWN)

    def work() -> Outcome:
        in_memory(home)
        (home / "own").mkdir()
        fields: dict[str, object] = {"readOnly": False, "idMap": {"kind": kind}}
        fds = [os.open(home / "own", os.O_RDONLY)]
        if kind == "namespace":
            fds.append(os.open("/proc/self/ns/user", os.O_RDONLY))
            fields["userNamespaceFileDescriptor"] = 1
        return outcome(lambda: mount_fds(daemon.socket, SOURCE, fds, **fields))

    name, text = in_container(work, uids=((0, USER, 1), (1, 400000, 65535)))
    if kind == "none":
        assert (name, text) == ("", "")
    else:
        assert name == "NotSupported"
        assert "mounted in a user namespace" in text


def test_ids_that_are_the_same_inside_and_outside(start: Start, home: Path, containers: None) -> None:
    """Then it does not matter whose ids they are."""
    daemon = start(OWN)

    def work() -> Outcome:
        in_memory(home)
        (home / "own").mkdir()
        os.chown(home / "own", USER, USER)
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        return ask(daemon, home / "own", idMap={"kind": "caller"})

    assert in_container(work, uids=((0, 400000, USER), (USER, USER, 1))) == ("", "")
