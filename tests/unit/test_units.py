"""The units, as this machine's own systemd-analyze(1) judges them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAXIMUM_EXPOSURE = 40  # tenths, as --threshold= has them
UNKNOWN = re.compile(r"mountd\.service:\d+: Unknown key (name )?'FileDescriptorStorePreserve' .*ignoring")


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The installed units, which name programs that are there."""
    subprocess.run(["make", "-s", "install", f"PREFIX={tmp_path}"], cwd=ROOT, check=True)
    return tmp_path / "lib/systemd/system"


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


def test_verify(units: Path) -> None:
    names = (
        "mountd.service",
        "mountd.socket",
        "mountd-pull.service",
        "mountd-pull.socket",
        "mountd-mountfsd.socket",
    )
    done = analyze("verify", *(units / name for name in names))
    # systemd before 254 says of what it does not know that it ignores it.
    left = [line for line in (done.stdout + done.stderr).splitlines() if not UNKNOWN.search(line)]
    assert (done.returncode, left) == (0, [])


def test_exposure(units: Path) -> None:
    threshold = f"--threshold={MAXIMUM_EXPOSURE}"
    done = analyze("security", "--offline=yes", threshold, units / "mountd.service")
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def test_the_socket_of_systemd_is_stopped_first(units: Path) -> None:
    """Without an order, the one that goes could take the socket of the one that comes with it."""
    lines = (units / "mountd-mountfsd.socket").read_text().splitlines()
    assert {"Conflicts=systemd-mountfsd.socket", "After=systemd-mountfsd.socket"} <= set(lines)
    assert "ConditionPathExists=!/run/host/io.systemd.MountFileSystem" in lines
