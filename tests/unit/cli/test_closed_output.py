"""Help and versions, where nobody reads them or there is no room for them: one line at most."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LINES = (
    ("mountctl", "--help"),
    ("mountctl", "--version"),
    ("mountctl", "list", "--help"),
    ("mountctl", "image", "pull", "--help"),
    ("mountctl", "policy", "--help"),
    ("mountctl", "policy", "check", "--help"),
    ("mount_helper", "--help"),
    ("mount_helper", "--version"),
    ("umount_helper", "--help"),
)


def run(line: tuple[str, ...], output: int) -> subprocess.CompletedProcess[str]:
    text = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from mountd.cli.{line[0]} import main; main()"
    # Isolated, but not from the packages of the tests, which “policy” needs.
    command = [sys.executable, "-I", "-c", text, *line[1:]]
    return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False)


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_who_has_read_enough(line: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(line, writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_a_full_disk(line: tuple[str, ...]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        done = run(line, full)
    finally:
        os.close(full)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_it_is_printed(line: tuple[str, ...], tmp_path: Path) -> None:
    with (tmp_path / "output").open("w") as output:
        done = run(line, output.fileno())
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "output").read_text()
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert ("usage: " in text) == (line[-1] == "--help")
