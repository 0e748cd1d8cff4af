"""A composefs of mounts that are attached nowhere: what is shown, and what is not read unchecked."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.errors import NotSupported, SyscallError
from mountd.evidence import fs_verity
from mountd.execute import composefs
from mountd.execute.run import Inputs, run
from mountd.fds import OwnedFd, close_all
from mountd.kernel import libc, mount_api
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from mountd.plan.operations import MakeComposefs, MakeMount, Plan
from tests.sealing import Unsealed

CONTENTS = b"contents" * 1000


@pytest.fixture
def tree(scratch: Path) -> Iterator[Path]:
    """A directory with an image, and with objects."""
    path = scratch / "composefs"
    (path / "tree").mkdir(parents=True)
    (path / "tree/file").write_bytes(CONTENTS)
    (path / "tree/small").write_bytes(b"small")
    command = ["mkcomposefs", f"--digest-store={path}/objects", path / "tree", path / "image"]
    subprocess.run(command, check=True)
    yield path
    shutil.rmtree(path)


def made_of(tree: Path, *, verify: bool) -> OwnedFd:
    mounts = []
    try:
        with FsContext.open("erofs") as context:
            context.set_string("source", str(tree / "image"))
            context.create()
            mounts.append(context.mount(MountAttr.RDONLY))
        mounts.append(mount_api.clone_mount(str(tree / "objects")))
        plan = Plan((MakeComposefs(1, verify), MakeMount(MountAttr.RDONLY)))
        layers = [mount.fileno() for mount in mounts]
        return run(plan, Inputs(image_fd=None, userns_fd=None, seal=Unsealed(), layers=layers))
    finally:
        close_all(mounts)


def read(mount: OwnedFd, name: str) -> bytes:
    return Path(f"/proc/self/fd/{mount.fileno()}/{name}").read_bytes()


def test_contents_are_those_of_the_objects(tree: Path) -> None:
    with made_of(tree, verify=False) as mount:
        assert read(mount, "file") == CONTENTS
        assert sorted(os.listdir(f"/proc/self/fd/{mount.fileno()}")) == ["file", "small"]


def test_what_has_to_be_checked_and_is_not_is_not_read(tree: Path) -> None:
    """No object has fs-verity here, whatever its contents are."""
    with made_of(tree, verify=True) as mount:
        assert read(mount, "small") == b"small"
        with pytest.raises(OSError, match="Input/output error"):
            read(mount, "file")


def test_every_step_can_fail_and_leaves_nothing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")
    for name, number in (("fsopen", 5), ("fsconfig", 5), ("fsmount", 5), ("capget", 5)):
        with monkeypatch.context() as patch:
            patch.setitem(libc.inject, name, number)
            with pytest.raises(SyscallError):
                made_of(tree, verify=False)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("call", "number", "said"),
    [
        ("fsopen", errno.ENODEV, "overlay, which"),
        ("fsconfig", errno.EINVAL, "this kernel"),
        ("fsconfig", errno.EBADF, "this kernel"),
    ],
)
def test_a_kernel_that_has_it_not(
    monkeypatch: pytest.MonkeyPatch, call: str, number: int, said: str
) -> None:
    monkeypatch.setitem(libc.inject, call, number)
    with pytest.raises(NotSupported, match=said):
        composefs.create(MakeComposefs(1, False), [0, 0])


def test_not_as_many_as_planned() -> None:
    with pytest.raises(ValueError, match="as many"):
        composefs.create(MakeComposefs(2, False), [0, 0])


def test_what_the_kernel_has_no_fs_verity_for(tree: Path) -> None:
    with OwnedFd(os.open(tree / "objects", os.O_RDONLY)) as fd:
        assert fs_verity.missing_in(fd.fileno()) is not None
