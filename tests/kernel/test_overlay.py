"""An overlay of mounts that are attached nowhere, and the capability that it is made with."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.errors import NotSupported, SyscallError
from mountd.execute import overlay
from mountd.execute.naming import Naming
from mountd.execute.run import Inputs, run
from mountd.fds import OwnedFd, close_all
from mountd.kernel import capabilities, libc, mount_api
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from mountd.kernel.mount_info import listmount
from mountd.plan.operations import MakeMount, MakeOverlay, Plan
from mountd.plan.stack import FORCED
from tests.container import forked
from tests.sealing import Unsealed

PLAN = Plan((MakeOverlay(2, FORCED), MakeMount(MountAttr.RDONLY)))


@pytest.fixture
def trees(scratch: Path) -> Iterator[list[Path]]:
    made = [scratch / name for name in ("upper", "lower")]
    for path in made:
        path.mkdir()
        (path / "file").write_text(path.name)
    yield made
    for path in made:
        shutil.rmtree(path)


def made_of(trees: list[Path], naming: Naming | None = None) -> OwnedFd:
    mounts = [mount_api.clone_mount(str(tree)) for tree in trees]
    try:
        inputs = Inputs(
            image_fd=None,
            userns_fd=None,
            seal=Unsealed(),
            naming=naming,
            layers=[mount.fileno() for mount in mounts],
        )
        return run(PLAN, inputs)
    finally:
        close_all(mounts)


def test_the_first_is_the_topmost_and_all_can_be_closed(trees: list[Path]) -> None:
    with made_of(trees) as mount:
        fd = os.open("file", os.O_RDONLY, dir_fd=mount.fileno())
        assert os.read(fd, 9) == b"upper"
        os.close(fd)


def test_every_step_can_fail_and_leaves_nothing(trees: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")
    for name in ("fsopen", "fsconfig", "fsmount", "capget"):
        with monkeypatch.context() as patch:
            patch.setitem(libc.inject, name, 5)
            with pytest.raises(SyscallError):
                made_of(trees)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL])
def test_by_their_paths_where_descriptors_are_not_taken(
    trees: list[Path], scratch: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As before Linux 6.13, and before 6.15."""

    def refuse(self: FsContext, key: str, fd: int) -> None:
        raise SyscallError(number, f"fsconfig({key}, {fd})")

    def work() -> tuple[bytes, bool]:
        with monkeypatch.context() as patch:
            patch.setattr(FsContext, "set_fd", refuse)
            with pytest.raises(NotSupported, match="this kernel"):
                made_of(trees)
            directory = scratch / "own"
            directory.mkdir()
            naming = Naming(str(directory))
            before = len(listmount())
            with made_of(trees, naming) as mount:
                fd = os.open("file", os.O_RDONLY, dir_fd=mount.fileno())
                return os.read(fd, 9), len(listmount()) == before

    try:
        assert forked(work) == (b"upper", True)
    finally:
        shutil.rmtree(scratch / "own")


def test_what_is_wrong_with_a_layer_is_told(trees: list[Path], tmp_path: Path) -> None:
    """And not taken for a fault of the kernel."""
    with OwnedFd(os.open(trees[0] / "file", os.O_PATH)) as file, pytest.raises(SyscallError):
        overlay.create(MakeOverlay(2, FORCED), [file.fileno()] * 2, Naming(str(tmp_path)))


def test_not_as_many_as_planned() -> None:
    with pytest.raises(ValueError, match="as many"):
        overlay.create(MakeOverlay(2, FORCED), [0])


def test_the_capability_is_in_effect_for_a_while() -> None:
    def effective() -> bool:
        status = Path("/proc/self/status").read_text()
        return bool(int(status.partition("CapEff:")[2].split()[0], 16) & capabilities.BIT)

    def work() -> list[bool]:
        found = [effective()]
        with capabilities.reading_everything():
            found.append(effective())
        found.append(effective())
        capabilities.put_aside()
        found.append(effective())
        with capabilities.reading_everything():
            found.append(effective())
        found.append(effective())
        return found

    assert forked(work) == [True, True, True, False, True, False]
