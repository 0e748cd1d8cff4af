"""“make install”: into whatever directory there is."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def installed(destination: Path) -> dict[str, tuple[int, bytes]]:
    """Install there; return what is there then, without the directory's own name."""
    command = ["make", "-s", "--no-print-directory", "install", f"DESTDIR={destination}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    files = (each for each in destination.rglob("*") if each.is_file())
    return {str(each.relative_to(destination)): (each.stat().st_mode, each.read_bytes()) for each in files}


def test_blanks_in_its_name(tmp_path: Path) -> None:
    found = installed(tmp_path / "a  b's")
    assert found == installed(tmp_path / "plain")
    assert {"usr/sbin/mountd", "usr/lib/mountd/python/mountd/cli/mountctl.py"} <= found.keys()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a  b's", "plain"]
