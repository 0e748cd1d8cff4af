"""The units, as this machine's own systemd-analyze(1) judges them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAXIMUM_EXPOSURE = 40  # tenths, as --threshold= has them


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
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_exposure(units: Path) -> None:
    threshold = f"--threshold={MAXIMUM_EXPOSURE}"
    done = analyze("security", "--offline=yes", threshold, units / "mountd.service")
    assert done.returncode == 0, done.stdout[-200:] + done.stderr
