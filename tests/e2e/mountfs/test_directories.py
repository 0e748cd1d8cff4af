"""io.systemd.MountFileSystem.MountDirectory: what is given, and every error."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.container import RANGE, USER, in_container, user_namespace
from tests.daemon import Daemon
from tests.e2e.directories import rule
from tests.e2e.mountfs.calls import INTERFACE, PARAMETER, PERMISSION, asked, connect_as, opened, refusal
from tests.rogue import Raw, call


@pytest.mark.parametrize("flags", [os.O_RDONLY | os.O_DIRECTORY, os.O_PATH | os.O_DIRECTORY])
@pytest.mark.parametrize("mode", [None, "auto", "root"])
def test_a_directory_of_ones_own(
    serving: Daemon, home: Path, containers: None, flags: int, mode: str | None
) -> None:
    with contextlib.ExitStack() as stack:
        userns = stack.enter_context(user_namespace(RANGE, owner=USER)).fileno()
        fds = [opened(stack, home, flags), userns]
        wishes: dict[str, Any] = {"directoryFileDescriptor": 0, "userNamespaceFileDescriptor": 1}
        if mode is not None:
            wishes["mode"] = mode
        reply, (mount,) = stack.enter_context(asked(serving, "MountDirectory", fds, **wishes))
        assert reply == {"mountFileDescriptor": 0}

        def work() -> int:
            made = os.open("made", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=mount.fileno())
            os.close(made)
            return os.fstat(mount.fileno()).st_uid

        assert in_container(work) == 0
        assert (home / "made").stat().st_uid == USER


def test_a_directory_as_it_is(serving: Daemon, home: Path) -> None:
    """identity, or no user namespace at all; read-only where it is said."""
    with contextlib.ExitStack() as stack:
        userns = stack.enter_context(user_namespace(RANGE, owner=USER)).fileno()
        fds = [opened(stack, home, os.O_DIRECTORY), userns]
        for wishes in (
            {"userNamespaceFileDescriptor": 1, "mode": "identity", "readOnly": True},
            {"mode": "root", "readOnly": True},
            {"readOnly": True},
        ):
            given = fds if "userNamespaceFileDescriptor" in wishes else fds[:1]
            all_wishes: dict[str, Any] = {"directoryFileDescriptor": 0, **wishes}
            _, (mount,) = stack.enter_context(asked(serving, "MountDirectory", given, **all_wishes))
            assert os.fstat(mount.fileno()).st_uid == USER
            assert os.fstatvfs(mount.fileno()).f_flag & os.ST_RDONLY


def test_read_only_where_nothing_else_is_granted(
    start: Callable[..., Daemon], place: Path, home: Path
) -> None:
    socket = place / "mountfs-reading"
    daemon = start(rule("to read", '"caller"'), "--mountfs-socket", str(socket))
    wishes: list[dict[str, Any]] = [{}, {"readOnly": False}, {"readOnly": True}]
    for wished in wishes:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(Raw(daemon, fd=connect_as(socket)))
            fields = {"directoryFileDescriptor": 0, **wished}
            raw.send(call(f"{INTERFACE}.MountDirectory", fields), [opened(stack, home, os.O_DIRECTORY)])
            assert raw.reply() == {"parameters": {"mountFileDescriptor": 0}}
            assert os.fstatvfs(raw.fds[0].fileno()).f_flag & os.ST_RDONLY


def test_a_directory_on_a_read_only_mount(serving: Daemon, home: Path, containers: None) -> None:
    """What the client has cannot be written to either."""
    (home / "inside").mkdir()
    os.chown(home / "inside", USER, USER)
    subprocess.run(["mount", "--bind", "-o", "ro", home, home], check=True)
    try:
        with contextlib.ExitStack() as stack:
            userns = stack.enter_context(user_namespace(RANGE, owner=USER)).fileno()
            fds = [opened(stack, home / "inside", os.O_DIRECTORY), userns]
            fields = {"directoryFileDescriptor": 0, "userNamespaceFileDescriptor": 1}
            _, (mount,) = stack.enter_context(asked(serving, "MountDirectory", fds, **fields))
            assert os.fstatvfs(mount.fileno()).f_flag & os.ST_RDONLY
    finally:
        # The worker may still have the descriptors that came, for a moment after its reply.
        subprocess.run(["umount", "--lazy", home], check=True)


DIRECTORIES: list[tuple[str, dict[str, Any], str, str]] = [
    ("home", {"mode": "foreign", "userNamespaceFileDescriptor": 1}, PARAMETER, "mode"),
    ("home", {"mode": "all"}, PARAMETER, "mode"),
    ("nonblock", {}, f"{INTERFACE}.BadFileDescriptorFlags", "directoryFileDescriptor"),
    ("file", {}, "io.systemd.System", "a regular file, not a directory"),
    ("theirs", {}, PERMISSION, "the caller is"),
    ("roots", {}, PERMISSION, ""),
    ("proc", {}, "io.systemd.System", "file system"),
]


@pytest.mark.parametrize(("what", "fields", "error", "text"), DIRECTORIES)
def test_directory_refused(
    serving: Daemon,
    home: Path,
    images: dict[str, Path],
    what: str,
    fields: dict[str, Any],
    error: str,
    text: str,
) -> None:
    theirs = home / "theirs"
    theirs.mkdir()
    os.chown(theirs, USER + 1, USER + 1)
    paths: dict[str, tuple[Path, int]] = {
        "home": (home, os.O_DIRECTORY),
        "nonblock": (home, os.O_NONBLOCK),
        "file": (images["erofs"], os.O_RDONLY),
        "theirs": (theirs, os.O_DIRECTORY),
        "roots": (Path("/etc"), os.O_DIRECTORY),
        "proc": (Path("/proc"), os.O_DIRECTORY),
    }
    with contextlib.ExitStack() as stack:
        fds = [opened(stack, *paths[what])]
        if "userNamespaceFileDescriptor" in fields:
            fds.append(stack.enter_context(user_namespace(RANGE, owner=USER)).fileno())
        wishes = {"directoryFileDescriptor": 0, **fields}
        name, said = refusal(serving, "MountDirectory", fds, **wishes)
        assert name == error, said
        assert text in said.get("parameter", said["reason"]), said
