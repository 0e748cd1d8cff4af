"""Trees for layers, asking for stacks of them, and what is seen in one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mountd.client import MountReply
from mountd.fds import OwnedFd
from tests.container import USER
from tests.daemon import Daemon
from tests.e2e.calls import Outcome, mount_fds, outcome


def directory(path: Path, files: dict[str, str]) -> Path:
    """A tree of root's with these files."""
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    path.chmod(0o755)
    return path


def stack(paths: list[Path]) -> tuple[dict[str, object], list[int]]:
    """The source and the descriptors, which are the caller's."""
    fds = [os.open(path, os.O_RDONLY) for path in paths]
    kinds = ["directoryFileDescriptor" if path.is_dir() else "imageFileDescriptor" for path in paths]
    return {"layers": [{kind: number} for number, kind in enumerate(kinds)]}, fds


def ask(
    daemon: Daemon,
    paths: list[Path],
    *,
    own: bool = False,
    method: Callable[..., object] = mount_fds,
    **f: object,
) -> object:
    """Ask for a stack, as USER; with `own`, as who runs this, for its own user namespace."""
    source, fds = stack(paths)
    try:
        if own:
            fds.append(os.open("/proc/self/ns/user", os.O_RDONLY))
            return method(daemon.socket, source, fds, userNamespaceFileDescriptor=len(fds) - 1, **f)
        with user():
            return method(daemon.socket, source, fds, **f)
    finally:
        for fd in fds:
            os.close(fd)


@contextlib.contextmanager
def user() -> Iterator[None]:
    os.setegid(USER)
    os.seteuid(USER)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def mounted(daemon: Daemon, paths: list[Path], **fields: object) -> MountReply:
    reply = ask(daemon, paths, **fields)  # type: ignore[arg-type]
    assert isinstance(reply, MountReply)
    return reply


def refusal(daemon: Daemon, paths: list[Path], **fields: object) -> Outcome:
    return outcome(lambda: ask(daemon, paths, **fields))  # type: ignore[arg-type]


def names(mount: OwnedFd, path: str = ".") -> set[str]:
    return set(os.listdir(f"/proc/self/fd/{mount.fileno()}/{path}"))


def read(mount: OwnedFd, path: str) -> str:
    with open(os.open(path, os.O_RDONLY, dir_fd=mount.fileno()), encoding="utf-8") as file:
        return file.read()


def all_layers(layers: dict[str, Path]) -> list[Path]:
    return [layers[type] for type in ("erofs", "squashfs", "ext4")]
