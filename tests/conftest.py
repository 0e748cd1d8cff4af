"""What holds after every test: descriptors, children, loop devices and mounts are back where they were."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.kernel import fuse, mount_api


def descriptors() -> dict[str, str]:
    """The open descriptors of this process and what they refer to, without the one used for listing."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return found


def children() -> set[str]:
    """The pids of the living children of this process, zombies included."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def loop_devices() -> set[str]:
    """The loop devices in use, with their backing files."""
    found = set()
    for device in Path("/sys/block").glob("loop*"):
        # It may be freed at any moment.
        with contextlib.suppress(OSError):
            found.add(f"{device.name} {(device / 'loop/backing_file').read_text().strip()}")
    return found


def mounts() -> list[str]:
    """The mounts of this process's mount namespace."""
    return [
        line.split(" ", 1)[1]
        for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    ]


def state() -> dict[str, object]:
    """All that a test may not leave changed."""
    return {
        "descriptors": descriptors(),
        "children": children(),
        "loop devices": loop_devices(),
        "mounts": mounts(),
    }


@pytest.fixture(autouse=True, scope="session")
def fusectl() -> Iterator[None]:
    """Mounted, as on every started system, so that no test is the one that mounts it."""
    there = os.path.ismount(fuse.CONNECTIONS)
    fuse.mount_fusectl()
    yield
    if not there and os.path.ismount(fuse.CONNECTIONS):
        mount_api.umount(fuse.CONNECTIONS)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Compare the counts before and after each test; what the kernel frees late gets two seconds.

    The collector looks at what the test itself has made: at all that is kept of those before, such as their
    reports, it would look for longer with each of them, and in the end for most of the time.
    """
    gc.collect()
    gc.freeze()
    before = state()
    yield
    gc.collect()
    deadline = time.monotonic() + 2
    after = state()
    while after != before and time.monotonic() < deadline:
        time.sleep(0.02)
        after = state()
    for what, was in before.items():
        assert after[what] == was, f"{what} left behind or lost by the test"
