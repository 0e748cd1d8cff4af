"""The installed programs, run as their users run them: as ordinary users, and in containers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from mountd.kernel.libc import call
from tests.container import RANGE, USER, IdMap, forked, in_container

COMMANDS = ("sh", "cat", "echo", "env", "id", "kill", "ls", "sleep", "stat", "touch", "true", "yes")
CHANGING = ("mkdir", "rm")
T = TypeVar("T")
Done = subprocess.CompletedProcess[str]


def environment(socket: Path | str) -> dict[str, str]:
    """What programs get to see."""
    return {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "MOUNTD_SOCKET": str(socket), "LC_ALL": "C.UTF-8"}


def run(arguments: Sequence[object], socket: Path | str, **popen: object) -> Done:
    """Run a program to its end, which comes soon."""
    options = {"capture_output": True, "text": True, "timeout": 30, "env": environment(socket)} | popen
    return subprocess.run([str(each) for each in arguments], check=False, **options)  # type: ignore[call-overload, no-any-return]


def as_user(arguments: Sequence[object], socket: Path | str, **popen: object) -> Done:
    """Run a program as an ordinary user of the host."""
    return run(arguments, socket, **({"user": USER, "group": USER, "extra_groups": [], "cwd": "/"} | popen))


def with_mount_helper(installed: Path) -> None:
    """Have the installed mount.mountd where mount(8) looks for it, for this mount namespace only."""
    layers = f"lowerdir={installed}/sbin:/usr/sbin"
    call("mount", b"overlay", b"/usr/sbin", b"overlay", 0, layers.encode())


def helped(
    installed: Path,
    socket: Path | str,
    arguments: Sequence[object],
    *,
    look: Callable[[], object] = lambda: None,
    uids: IdMap = RANGE,
    program: str = "mount",
    **popen: object,
) -> tuple[Done, object]:
    """Call mount(8) as root of a container; return what it did, and what `look` finds there afterwards."""

    def work() -> tuple[Done, object]:
        with_mount_helper(installed)
        done = run([program, *arguments], socket, **popen)
        return done, look()

    return in_container(work, uids=uids)


def in_private(
    installed: Path,
    work: Callable[[], T],
    files: Mapping[str, str] | None = None,
    place: Path | None = None,
) -> T:
    """Run `work` as root in a mount namespace of its own, with the helpers and an empty utab.

    `files` are what /etc has there instead, and are written to `place`.
    """

    def enter() -> T:
        from mountd.kernel import mount_api, namespaces
        from mountd.kernel.flags import Clone, Propagation

        if files is not None and place is not None:
            etc_files(place, files)()
        else:
            namespaces.unshare(Clone.NEWNS)
            mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with_mount_helper(installed)
        os.makedirs("/run/mount", exist_ok=True)
        call("mount", b"none", b"/run/mount", b"tmpfs", 0, b"mode=0755")
        return work()

    return forked(enter)


def findmnt(target: Path, column: str = "SOURCE") -> str:
    """What findmnt(8) says about the topmost mount at `target`, with what utab has; "" if there is none."""
    words = ["findmnt", "--mtab", "--noheadings", "--first-only", "--output", column, "--mountpoint", target]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def mounted(target: Path) -> tuple[str, set[str]] | None:
    """Type and options of the topmost mount at `target` in this mount namespace, None if there is none."""
    found = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if fields[4] == str(target):
            found = after.split()[0], set(fields[5].split(","))
    return found


def check_line(done: Done, pattern: str) -> None:
    """What it printed on standard error is one line that `pattern` is found in."""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(pattern, done.stderr), done.stderr


def build_root(path: Path, *, directories: Sequence[str] = ("proc", "sys", "dev", "tmp")) -> Path:
    """Fill `path` with a root file system: a shell, some commands, and the libraries that they need."""
    (path / "bin").mkdir(parents=True)
    for name in directories:
        (path / name).mkdir()
    for name in (*COMMANDS, *CHANGING):
        program = shutil.which(name)
        assert program, name
        shutil.copy(program, path / "bin" / name)
        for library in libraries(program):
            copy = path / library.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, copy)
    (path / "marker").write_text("in the image\n")
    (path / "owned").write_text("by 1000\n")
    os.chown(path / "owned", 1000, 1000)
    path.chmod(0o755)
    return path


def libraries(program: str) -> list[str]:
    """The libraries that a program of the system needs, with the loader."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return re.findall(r"(/\S+)", listed)


def etc_files(directory: Path, files: Mapping[str, str]) -> Callable[[], None]:
    """Return what makes this process see other files in /etc, in a mount namespace of its own."""
    for name, text in files.items():
        (directory / name).write_text(text)

    def enter() -> None:
        from mountd.kernel import mount_api, namespaces
        from mountd.kernel.flags import Clone, Propagation

        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        for name in files:
            with mount_api.clone_mount(str(directory / name)) as file:
                mount_api.move_mount(file.fileno(), f"/etc/{name}")

    return enter
