"""Images with hash trees, and what else has to be back after each test: the devices of device-mapper."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import build_image, build_tree
from tests.verity import Verified, build_verity

BIG = 1 << 20


def dm_devices() -> set[str]:
    """The names of all devices of device-mapper."""
    names = set()
    for path in Path("/sys/block").glob("dm-*/dm/name"):
        # Between the listing and the reading it may go.
        with contextlib.suppress(OSError):
            names.add(path.read_text().strip())
    return names


@pytest.fixture(autouse=True)
def no_device_left_behind(nothing_left_behind: None) -> Iterator[None]:
    """Deferred removal is done by a worker of the kernel's: it gets two seconds."""
    before = dm_devices()
    yield
    deadline = time.monotonic() + 2
    while dm_devices() != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert dm_devices() == before


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A directory on the machine's disk."""
    path = Path(tempfile.mkdtemp(prefix="mountd-test-", dir="/var/lib"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def tree(scratch: Path) -> Path:
    """A small tree, and a file that no compression makes smaller, which spans several blocks of hashes."""
    path = build_tree(scratch / "tree")
    (path / "big").write_bytes(os.urandom(BIG))
    return path


@pytest.fixture(scope="session")
def verified(scratch: Path, tree: Path) -> dict[str, Verified]:
    """An image of each read-only file system, with its hash data."""
    made = {
        type: build_verity(build_image(type, tree, scratch / f"{type}.img"))
        for type in ("erofs", "squashfs")
    }
    # A small ext4 has small blocks, which a device of larger ones cannot serve.
    image = build_image("ext4", tree, scratch / "ext4.img")
    return {**made, "ext4": build_verity(image, "--data-block-size=1024")}


@pytest.fixture
def broken(verified: dict[str, Verified], tmp_path: Path) -> Verified:
    """An erofs that the test may damage."""
    return verified["erofs"].copy(tmp_path / "copy")
