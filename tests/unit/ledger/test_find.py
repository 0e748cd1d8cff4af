"""Looking for what processes have open."""

from __future__ import annotations

import os
from pathlib import Path

from mountd.fds import OwnedFd
from mountd.kernel.mount_info import mount_id
from mountd.ledger import find


def test_it_is_found_by_the_device_or_by_the_mount(tmp_path: Path) -> None:
    device = os.stat(tmp_path).st_dev
    with OwnedFd(os.open(tmp_path, os.O_PATH)) as fd:
        for devices, ids in (
            ({(os.major(device), os.minor(device))}, set()),
            (set(), {mount_id(fd.fileno())}),
        ):
            found, complete = find.uses(devices, ids)
            assert complete
            assert (os.getpid(), f"fd {fd.fileno()}") in [(use.pid, use.what) for use in found]


def test_whoever_has_too_much_open_does_not_hold_it_up() -> None:
    """Then it says that this may not be all."""
    assert find.uses({(0, 1)}, set(), seconds=0.0) == ([], False)
