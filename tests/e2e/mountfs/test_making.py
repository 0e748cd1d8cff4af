"""io.systemd.MountFileSystem.MakeDirectory: what is made, where nothing is, and who tries for more."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mountd.caller.model import FOREIGN
from tests.container import RANGE, USER, as_user, in_container, user_namespace
from tests.daemon import Daemon
from tests.e2e.calls import errno_of
from tests.e2e.conftest import trusting
from tests.e2e.mountfs.calls import (
    INTERFACE,
    PARAMETER,
    PERMISSION,
    Theirs,
    asked,
    connect_as,
    opened,
    refusal,
)
from tests.rogue import Raw, call

BASE = FOREIGN.start


def make(daemon: Daemon, parent: Path, name: str, uid: int | None = USER, **fields: Any) -> os.stat_result:
    with contextlib.ExitStack() as stack:
        fds = [opened(stack, parent, os.O_PATH | os.O_DIRECTORY)]
        reply, (made,) = stack.enter_context(
            asked(daemon, "MakeDirectory", fds, uid, parentFileDescriptor=0, name=name, **fields)
        )
        assert reply == {"directoryFileDescriptor": 0}
        found = os.fstat(made.fileno())
        assert (found.st_dev, found.st_ino) == ((parent / name).stat().st_dev, (parent / name).stat().st_ino)
        return found


def test_make_a_directory_and_fill_it(serving: Daemon, home: Path, containers: None) -> None:
    """As what unpacks an image without privileges does: make, mount for a container, write there."""
    made = make(serving, home, "machine")
    assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode)) == (BASE, BASE, 0o700)
    assert stat.S_IMODE(make(serving, home, "wide", mode=0o777).st_mode) == 0o775
    assert stat.S_IMODE(make(serving, home, "narrow", mode=0).st_mode) == 0
    assert sorted(os.listdir(home)) == ["machine", "mine", "narrow", "wide"]
    with contextlib.ExitStack() as stack:
        userns = stack.enter_context(user_namespace(RANGE, owner=USER)).fileno()
        fds = [opened(stack, home / "machine", os.O_PATH | os.O_DIRECTORY), userns]
        wishes: dict[str, Any] = {"directoryFileDescriptor": 0, "userNamespaceFileDescriptor": 1}
        _, (mount,) = stack.enter_context(asked(serving, "MountDirectory", fds, **wishes, mode="foreign"))

        def work() -> None:
            os.mkdir("etc", dir_fd=mount.fileno())
            os.chown("etc", 42, 42, dir_fd=mount.fileno())

        in_container(work)
        name, _ = refusal(serving, "MountDirectory", fds, **wishes, mode="root")
        assert name == PARAMETER
    assert (home / "machine/etc").stat().st_uid == BASE + 42
    assert as_user(lambda: errno_of(lambda: os.listdir(home / "machine"))) == "EACCES"


NAMES = ["", ".", "..", "a/b", "/etc", "x" * 256]


@pytest.mark.parametrize("name", NAMES)
def test_no_name(serving: Daemon, home: Path, name: str) -> None:
    with contextlib.ExitStack() as stack:
        fds = [opened(stack, home, os.O_PATH)]
        error, said = refusal(serving, "MakeDirectory", fds, parentFileDescriptor=0, name=name)
        assert (error, said["parameter"]) == (PARAMETER, "name")


def test_directories_that_are_not_made(serving: Daemon, home: Path, place: Path) -> None:
    """Nor in anybody else's, over what is there, and with no more rights than the caller has there."""
    before = sorted(os.listdir(home))
    theirs = home / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    os.chown(theirs, USER + 1, USER + 1)
    with contextlib.ExitStack() as stack:

        def refused(parent: Path, name: str, **fields: Any) -> tuple[str, dict[str, Any]]:
            fds = [opened(stack, parent, os.O_PATH)]
            return refusal(serving, "MakeDirectory", fds, parentFileDescriptor=0, name=name, **fields)

        assert refused(theirs, "new")[0] == PERMISSION
        assert refused(place, "new")[0] == PERMISSION
        assert refused(Path("/tmp"), "new")[0] == PERMISSION
        error, said = refused(home, "mine")
        assert (error, said["errnoName"]) == ("io.systemd.System", "EEXIST")
        for mode in (-1, 0o1000, 0o4755, 0o7777):
            error, said = refused(home, "new", mode=mode)
            assert (error, said["parameter"]) == (PARAMETER, "mode")
        # Its group would be one that is not the caller's to give away.
        os.chown(home, USER, 0)
        home.chmod(0o2755)
        assert refused(home, "new")[0] == "io.systemd.System"
    assert sorted(os.listdir(home)) == sorted([*before, "theirs"])
    assert os.listdir(theirs) == []
    os.chown(home, USER, USER)


def test_what_no_rule_lets_be_mounted_is_not_made(
    start: Callable[..., Daemon], place: Path, home: Path
) -> None:
    daemon = start(trusting(place / "trusted"), "--mountfs-socket", str(place / "mountfs-strict"))
    with Raw(daemon, fd=connect_as(place / "mountfs-strict")) as raw, contextlib.ExitStack() as stack:
        fields = {"parentFileDescriptor": 0, "name": "new"}
        raw.send(call(f"{INTERFACE}.MakeDirectory", fields), [opened(stack, home, os.O_PATH)])
        reply = raw.reply()
        assert reply is not None
        assert reply["error"] == PERMISSION
    assert not (home / "new").exists()


def test_swapping_what_is_made(serving: Daemon, home: Path, place: Path) -> None:
    """Whoever renames as fast as it can what is being made loses, or gives away what is its own."""
    precious = place / "mountfs-precious"
    precious.mkdir(exist_ok=True)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for name in os.listdir(home):
                if name.startswith(".#"):
                    with contextlib.suppress(OSError):
                        os.rename(home / name, home / "taken")
                        os.symlink(precious, home / name)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for number in range(100):
            with contextlib.ExitStack() as stack, Theirs(serving) as raw:
                fields = {"parentFileDescriptor": 0, "name": f"n{number}"}
                raw.send(call(f"{INTERFACE}.MakeDirectory", fields), [opened(stack, home, os.O_PATH)])
                assert raw.reply() is not None
    finally:
        stop.set()
        thread.join()
    assert precious.stat().st_uid == 0
    assert stat.S_IMODE(precious.stat().st_mode) == 0o755
