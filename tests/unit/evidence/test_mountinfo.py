"""The device that mountinfo names for a file system, where directories have names like its lines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mountd.evidence import mounts

DEVICE = Path("/dev/null")
WANTED = f"30 1 0:45 / /data rw shared:1 - btrfs {DEVICE} rw\n"


def odd(name: str) -> str:
    return f"31 1 0:46 / /home/{name} ro,nosuid - erofs /images/x.raw ro\n"


@pytest.mark.parametrize(
    "name", ["a\u2028", "a\r", "a\x85", "a\x1c1\u20031\u20030:45\u2003", "\udcff\u2029", "a\xa0b"]
)
def test_a_name_is_no_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(os.fsencode(odd(name) + WANTED))
    monkeypatch.setattr(mounts, "MOUNTS", str(path))
    number = DEVICE.stat().st_rdev
    assert mounts.device_of("0:45") == f"{os.major(number)}:{os.minor(number)}"
    assert mounts.source_of("0:45") == str(DEVICE)
    assert mounts.device_of("0:46") is None
    assert mounts.device_of("0:47") is None
