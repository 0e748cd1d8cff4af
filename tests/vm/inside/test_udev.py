"""A machine with udev: it reads no device of mountd's, and makes no links to what is in it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.verity import Verified
from tests.vm.inside.conftest import dm_devices
from tests.vm.inside.test_dm_verity import mount, read

UDEVD = "/usr/lib/systemd/systemd-udevd"


@pytest.fixture(scope="module")
def udev() -> Iterator[None]:
    """udev with Debian's rules, those of device-mapper among them, as long as it is needed."""
    assert list(Path("/usr/lib/udev/rules.d").glob("*dm*.rules"))
    subprocess.run([UDEVD, "--daemon"], check=True)
    yield
    subprocess.run(["udevadm", "control", "--exit"], check=True)


def properties(name: str) -> dict[str, str]:
    """What udev's database says of a device."""
    subprocess.run(["udevadm", "settle", "--timeout=20"], check=True)
    done = subprocess.run(
        ["udevadm", "info", "--query=property", f"--name={name}"], capture_output=True, text=True, check=True
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def probed(known: dict[str, str]) -> set[str]:
    """What is only known from reading the device."""
    return {name for name in known if name.startswith("ID_FS_")}


def links() -> set[str]:
    """Names by what a device of device-mapper holds, or is."""
    return {str(path) for path in Path("/dev/disk").rglob("*") if "dm-" in str(path.resolve())}


@pytest.mark.usefixtures("udev")
def test_udev_leaves_the_device_alone(verified: dict[str, Verified]) -> None:
    source = verified["ext4"]
    before = set(Path("/dev").glob("dm-*"))
    with mount(source, "ext4") as mounted:
        (node,) = set(Path("/dev").glob("dm-*")) - before
        known = properties(str(node))
        assert not probed(known)
        assert known["DM_UDEV_DISABLE_DISK_RULES_FLAG"] == "1"
        assert [Path(link).parent for link in known["DEVLINKS"].split()] == [Path("/dev/mapper")]
        assert links() == set()
        assert read(mounted, "hello")
    subprocess.run(["udevadm", "settle", "--timeout=20"], check=True)


@pytest.mark.usefixtures("udev")
def test_udev_probes_a_device_of_somebody_else(verified: dict[str, Verified]) -> None:
    """What would be there without the care that is taken: the same image, by the usual tool."""
    source = verified["ext4"]
    opening = ["veritysetup", "open", source.image, "somebody", source.tree, source.root_hash.hex()]
    subprocess.run(opening, check=True)
    try:
        assert probed(properties("/dev/mapper/somebody"))
        assert links()
    finally:
        subprocess.run(["veritysetup", "close", "somebody"], check=True)
    subprocess.run(["udevadm", "settle", "--timeout=20"], check=True)


@pytest.mark.usefixtures("udev")
def test_many_come_and_go(verified: dict[str, Verified]) -> None:
    before = dm_devices()
    for _ in range(5):
        with mount(verified["erofs"]) as one, mount(verified["squashfs"], "squashfs") as other:
            assert len(dm_devices() - before) == 2
            assert read(one, "hello") == read(other, "hello")
    subprocess.run(["udevadm", "settle", "--timeout=20"], check=True)
