"""Images on a disk with sectors of 4096 bytes, which a loop device with direct I/O takes over."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.fds import OwnedFd
from mountd.kernel import loop_device
from mountd.kernel.flags import LoopFlags
from tests.daemon import Daemon
from tests.disks import MIB, Part, build_disk
from tests.e2e.calls import mount as ask
from tests.e2e.calls import refused
from tests.e2e.conftest import trusting
from tests.e2e.loops import loops_over, wait_until_dropped

MAKE = {
    "small.ext4": ["mkfs.ext4", "-q", "-F", "-b", "1024"],
    "usual.ext4": ["mkfs.ext4", "-q", "-F", "-b", "4096"],
    "small.xfs": ["mkfs.xfs", "-q", "-s", "size=512", "-b", "size=1024"],
    "usual.xfs": ["mkfs.xfs", "-q", "-s", "size=4096"],
}
SIZES = {"ext4": 8 * MIB, "xfs": 320 * MIB}


@pytest.fixture(scope="module")
def disk(place: Path) -> Iterator[Path]:
    """The directory of such a disk, with its images."""
    file, directory = place / "sectors.raw", place / "sectors"
    directory.mkdir()
    with file.open("wb") as made:
        made.truncate(1024 * MIB)
    with OwnedFd(os.open(file, os.O_RDWR)) as fd:
        device = loop_device.attach(fd.fileno(), read_only=False, direct_io=False, block_size=4096)
    assert device.sector_size() == 4096
    try:
        subprocess.run(["mkfs.ext4", "-q", device.path], check=True)
        subprocess.run(["mount", device.path, directory], check=True)
    finally:
        device.close()
    try:
        for name, command in MAKE.items():
            with (directory / name).open("wb") as image:
                image.truncate(SIZES[name.partition(".")[2]])
            subprocess.run([*command, directory / name], check=True)
            (directory / name).chmod(0o644)
        directory.chmod(0o755)
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)
        file.unlink()


@pytest.mark.parametrize("access", ['"read-only"', '"read-write"'])
@pytest.mark.parametrize("name", MAKE)
def test_what_was_made_for_small_sectors(
    start: Callable[..., Daemon], disk: Path, name: str, access: str
) -> None:
    """Direct I/O is given up where the file system cannot be had with it, and only there."""
    daemon = start(trusting(disk, access=access))
    with ask(daemon.socket, disk / name, read_only="only" in access) as reply:
        assert reply.mounts[0]["fileSystemType"] == name.partition(".")[2]
        (flags,) = loops_over(disk / name)
        assert bool(flags & LoopFlags.DIRECT_IO) is name.startswith("usual")
        reply.close()
    daemon.stop()
    wait_until_dropped(disk / name)


def test_partitions_that_do_not_begin_with_a_sector(start: Callable[..., Daemon], disk: Path) -> None:
    image = build_disk(
        disk / "disk.raw", [Part("root", disk / "small.ext4"), Part("srv", disk / "usual.ext4")]
    )
    daemon = start(trusting(disk))
    with ask(daemon.socket, image) as reply:
        assert [each["designator"] for each in reply.mounts] == ["root", "srv"]
    image.unlink()


def test_what_the_driver_refuses_anyway(start: Callable[..., Daemon], disk: Path) -> None:
    """It is told as it is without direct I/O, and no device is left."""
    daemon = start(trusting(disk))
    broken = disk / "broken.ext4"
    data = bytearray((disk / "small.ext4").read_bytes())
    # The first group's block bitmap lies beyond the end.
    data[2048:2052] = b"\xff\xff\xff\x7f"
    broken.write_bytes(data)
    broken.chmod(0o644)
    refused(lambda: ask(daemon.socket, broken), "MountFailed", "EUCLEAN")
    assert loops_over(broken) == []
    broken.unlink()
