"""The virtual machine is what the tier needs: a kernel with device-mapper and fs-verity."""

from __future__ import annotations

from pathlib import Path


def test_kernel_has_dm_verity() -> None:
    assert Path("/dev/mapper/control").exists()
    assert Path("/sys/module/dm_verity").exists()
