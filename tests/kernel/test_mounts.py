"""What a mount lies on: a path is root's alone only if nobody else can change the disk below it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mountd.evidence import mounts
from mountd.evidence.location import Walker, locate
from mountd.fds import OwnedFd
from mountd.kernel import libc, loop_device
from mountd.kernel.flags import MountAttr
from mountd.kernel.loop_device import LoopDevice
from mountd.kernel.mount_info import mount_id
from mountd.source.descriptor import inspect_descriptor
from tests.container import USER, forked

THEIRS = f"is on a loop device, whose file belongs to uid {USER}, not to root"
WRITABLE = "is on a loop device, whose file is writable by others than root"


@pytest.fixture(autouse=True)
def nothing_is_known_of_mounts() -> Iterator[None]:
    mounts.check.cache_clear()
    yield
    mounts.check.cache_clear()


@contextlib.contextmanager
def mounted(device: LoopDevice | str, place: Path) -> Iterator[Path]:
    """A file of root's in the file system of a device."""
    place.mkdir()
    name = device if isinstance(device, str) else device.path
    subprocess.run(["mount", name, place], check=True)
    try:
        file = place / "image.raw"
        file.write_bytes(bytes(4096))
        place.chmod(0o755)
        yield file
    finally:
        subprocess.run(["umount", place], check=True)
        place.rmdir()


@contextlib.contextmanager
def attached(path: Path | str) -> Iterator[LoopDevice]:
    """A loop device over a file; what is mounted on it keeps it, should the test let go of it before."""
    with OwnedFd(os.open(path, os.O_RDWR)) as fd:
        device = loop_device.attach(fd.fileno(), read_only=False, direct_io=False)
    try:
        yield device
    finally:
        device.close()


@pytest.fixture
def disk(scratch: Path) -> Iterator[Path]:
    """The file of root's that a loop device is about to show, with an ext4 in it."""
    path = scratch / "disk.img"
    with path.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", path], check=True)
    yield path
    path.unlink(missing_ok=True)


def problem(file: Path, *, hint: Path | None = None) -> str | None:
    """What is wrong with where a file lies, but for the name of the place."""
    mounts.check.cache_clear()
    with OwnedFd(os.open(file, os.O_RDONLY)) as fd, Walker() as walker:
        backing = inspect_descriptor(fd.fileno(), "image")
        if hint is not None:
            backing = replace(backing, path_hint=str(hint))
        found = locate(fd.fileno(), backing, walker, name_paths=True).location_problem
    return found.removeprefix(f"{file.parent} ") if found is not None else None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda disk: None, None),
        (lambda disk: disk.chmod(0o600), None),
        (lambda disk: os.chown(disk, 0, USER), None),
        (lambda disk: os.chown(disk, USER, 0), THEIRS),
        (lambda disk: disk.chmod(0o664), WRITABLE),
        (lambda disk: disk.chmod(0o646), WRITABLE),
        (lambda disk: disk.unlink(), mounts.UNKNOWN),
        (lambda disk: disk.rename(disk.with_name("other")) and None, None),
    ],
)
def test_the_file_of_a_loop_device(
    scratch: Path, disk: Path, change: Callable[[Path], None], expected: str | None
) -> None:
    with attached(disk) as device, mounted(device, scratch / "media") as file:
        change(disk)
        assert problem(file) == expected
    (scratch / "other").unlink(missing_ok=True)


def test_who_can_still_write_to_the_file_of_a_loop_device(scratch: Path, disk: Path) -> None:
    """Of a device that nobody can write to it is known: that itself has not opened it for that."""
    with attached(disk) as device, mounted(device, scratch / "media"):
        pass
    with OwnedFd(os.open(disk, os.O_RDWR)) as writer:
        with OwnedFd(os.open(disk, os.O_RDONLY)) as fd:
            device = loop_device.attach(fd.fileno(), read_only=True, direct_io=False)
        place = scratch / "media"
        place.mkdir()
        subprocess.run(["mount", "-o", "ro", device.path, place], check=True)
        device.close()
        try:
            assert problem(place / "image.raw") == mounts.WRITTEN
            writer.close()
            assert problem(place / "image.raw") is None
        finally:
            subprocess.run(["umount", place], check=True)
            place.rmdir()


def test_another_file_of_that_name(scratch: Path, disk: Path) -> None:
    """What sysfs says is a name, and who has the file may have put one of root's there."""
    with attached(disk) as device, mounted(device, scratch / "media") as file:
        disk.unlink()
        disk.write_bytes(b"")
        # The kernel says that it was deleted, and that, too, can be a name.
        name = Path(f"/sys/block/{Path(device.path).name}/loop/backing_file").read_text().removesuffix("\n")
        Path(name).write_bytes(b"")
        assert problem(file) == mounts.UNKNOWN
        Path(name).unlink()


def test_a_btrfs(scratch: Path) -> None:
    """Its number is not that of its device."""
    disk = scratch / "disk.img"
    with disk.open("wb") as new:
        new.truncate(128 << 20)
    subprocess.run(["mkfs.btrfs", "-q", disk], check=True)
    with attached(disk) as device, mounted(device, scratch / "media") as file:
        assert problem(file) is None
        os.chown(disk, USER, USER)
        assert problem(file) == THEIRS
    disk.unlink()


def test_a_btrfs_of_two_devices(scratch: Path) -> None:
    """Each of them counts, whichever the mount names."""
    disks = [scratch / "one.img", scratch / "two.img"]
    for disk in disks:
        with disk.open("wb") as new:
            new.truncate(128 << 20)
    with attached(disks[0]) as one, attached(disks[1]) as two:
        subprocess.run(["mkfs.btrfs", "-q", "-d", "raid0", "-m", "raid1", one.path, two.path], check=True)
        subprocess.run(["btrfs", "device", "scan", one.path, two.path], check=True)
        with mounted(one, scratch / "media") as file:
            assert problem(file) is None
            for disk in disks:
                os.chown(disk, USER, USER)
                assert problem(file) == THEIRS
                os.chown(disk, 0, 0)
        subprocess.run(["btrfs", "device", "scan", "-u", one.path], check=True)
    for disk in disks:
        disk.unlink()


def test_a_loop_device_on_another(scratch: Path, disk: Path) -> None:
    with attached(disk) as below, attached(below.path) as device, mounted(device, scratch / "media") as file:
        assert problem(file) is None
        os.chown(disk, USER, USER)
        assert problem(file) == THEIRS


def test_a_file_on_a_loop_device(scratch: Path, disk: Path) -> None:
    """The file is root's, and lies where somebody else can change it."""
    inner = scratch / "inner.img"
    with inner.open("wb") as new:
        new.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", inner], check=True)
    with attached(disk) as outer, mounted(outer, scratch / "outer") as other:
        shutil.copy(inner, other.parent / "inner.img")
        with (
            attached(other.parent / "inner.img") as device,
            mounted(device, scratch / "media") as file,
        ):
            assert problem(file) is None
            os.chown(disk, USER, USER)
            assert problem(file) == THEIRS
    inner.unlink()


@pytest.mark.parametrize("name", ["ioctl LOOP_GET_STATUS64", "statx"])
def test_what_cannot_be_found_out_is_no_proof(
    monkeypatch: pytest.MonkeyPatch, scratch: Path, disk: Path, name: str
) -> None:
    with attached(disk) as device, mounted(device, scratch / "media") as file:
        loop = Path(device.path).name
        with monkeypatch.context() as patch:
            patch.setitem(libc.inject, name, 5)
            assert mounts.problem_of_file(loop, str(disk), [], 0) == mounts.UNKNOWN
        for place in ("BLOCK_DEVICES", "BTRFS"):
            with monkeypatch.context() as patch:
                patch.setattr(mounts, place, str(scratch / "nowhere"))
                assert problem(file) == (mounts.UNKNOWN if place == "BLOCK_DEVICES" else None)
        with monkeypatch.context() as patch:
            patch.setattr(mounts, "MAXIMUM_DEPTH", -1)
            assert problem(file) == mounts.UNKNOWN


@contextlib.contextmanager
def overlay(lower: Path, place: Path, name: str) -> Iterator[Path]:
    """An overlay over a directory of root's with an image in it, whose source is called so."""
    place.mkdir()
    (lower / "image.raw").write_bytes(bytes(4096))
    (lower / "below").mkdir()
    options = f"lowerdir={lower}:{place}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, name, place], check=True)
    try:
        yield place / "image.raw"
    finally:
        subprocess.run(["umount", place], check=True)
        place.rmdir()


@pytest.fixture
def lower(scratch: Path) -> Iterator[Path]:
    path = scratch / "lower"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("overlay", mounts.UNKNOWN_LAYERS), ("sysext", None), ("confext", None)],
)
def test_an_overlay(scratch: Path, lower: Path, name: str, expected: str | None) -> None:
    """A server's file system below it would make its files root's; systemd-sysext takes what is root's."""
    with overlay(lower, scratch / "over", name) as file:
        assert problem(file) == expected


def test_an_overlay_that_is_the_root_directory(scratch: Path, lower: Path) -> None:
    """As in most containers, and in live systems; sandboxes mount parts of it once more."""
    with overlay(lower, scratch / "over", "overlay") as file:
        over = file.parent

        def found() -> list[str | None]:
            os.chroot(over)
            mount_of = [mount_id_of("/"), mount_id_of("/below")]
            return [mounts.problem_of(mount_of[0], is_root=True), mounts.problem_of(mount_of[1])]

        subprocess.run(["mount", "--bind", over, over / "below"], check=True)
        try:
            assert forked(found) == [None, None]
        finally:
            subprocess.run(["umount", over / "below"], check=True)


def mount_id_of(path: str) -> int:
    with OwnedFd(os.open(path, os.O_PATH)) as fd:
        return mount_id(fd.fileno())


@pytest.mark.parametrize("type", ["vboxsf", "lustre", "ocfs2", "ecryptfs", "sysfs", "what is to come"])
def test_a_file_system_of_which_nothing_is_known(monkeypatch: pytest.MonkeyPatch, type: str) -> None:
    class Info:
        fs_type = type

    monkeypatch.setattr(mounts, "statmount", lambda _id: Info)
    assert "whose contents others than root may decide" in str(mounts.problem_of(1))


PCI = "devices/pci0000:00/0000:00:14.0"
AS_OF_UDISKS = MountAttr.NOSUID | MountAttr.NODEV


@pytest.mark.parametrize("attributes", [AS_OF_UDISKS, AS_OF_UDISKS | MountAttr.NOEXEC, MountAttr.NOSUID, 0])
@pytest.mark.parametrize(
    ("disk", "about", "unplugged"),
    [
        (f"{PCI}/usb1/1-2/1-2:1.0/host0/block/sda", {}, True),
        (f"{PCI}/fw0/fw1/fw1.0/host3/block/sda", {}, True),
        (f"{PCI}/ata3/host2/block/sr0", {"removable": "1"}, True),
        (f"{PCI}/mmc_host/mmc0/mmc0:aaaa/block/mmcblk0", {"device/type": "SD"}, True),
        (f"{PCI}/mmc_host/mmc0/mmc0:aaaa/block/mmcblk0", {"device/type": "MMC"}, False),
        (f"{PCI}/ata1/host0/block/sda", {"removable": "0", "device/type": "0"}, False),
        ("devices/virtual/block/usb", {"removable": "0"}, False),
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_disk_that_can_be_unplugged(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    attributes: int,
    disk: str,
    about: dict[str, str],
    unplugged: bool,
    stacked: bool,
) -> None:
    """What users have mounted of it is nobody's in particular; what root has mounted for all is root's.

    It does not matter whether what is mounted is a partition, or something that lies on one (dm-crypt).
    """
    whole = tmp_path / disk
    numbers = tmp_path / "dev/block"
    numbers.mkdir(parents=True)
    for path in (whole, whole / "part", tmp_path / "devices/virtual/block/dm-0"):
        (path / "slaves").mkdir(parents=True)
    (whole / "part/partition").write_text("1\n")
    for name, value in about.items():
        (whole / name).parent.mkdir(exist_ok=True)
        (whole / name).write_text(f"{value}\n")
    crypt = tmp_path / "devices/virtual/block/dm-0"
    (crypt / "slaves/part").mkdir()
    (crypt / "slaves/part/dev").write_text("8:1\n")
    (numbers / "8:1").symlink_to(whole / "part")
    (numbers / "253:0").symlink_to(crypt)

    class Info:
        fs_type = "ext4"
        sb_dev = (253, 0) if stacked else (8, 1)

    Info.attributes = attributes  # type: ignore[attr-defined]
    monkeypatch.setattr(mounts, "statmount", lambda _id: Info)
    monkeypatch.setattr(mounts, "BLOCK_DEVICES", str(numbers))
    refused = unplugged and attributes & AS_OF_UDISKS == AS_OF_UDISKS
    assert mounts.problem_of(1) == (mounts.PLUGGED if refused else None)
