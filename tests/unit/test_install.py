"""“make install”: into whatever directory there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mountd.daemon import needed

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


def named(text: str) -> set[str]:
    """The Debian packages in a text."""
    return set(re.findall(r"\b[a-z0-9]+(?:-[a-z0-9]+)*\b", text))


def test_the_readme_installs_what_the_package_needs() -> None:
    control = re.sub(r"\(.*?\)|\$\{.*?\}", "", (ROOT / "units/debian/control").read_text())
    fields = dict(re.findall(r"^(Depends|Recommends):((?:.*\n)(?: .*\n)*)", control, re.MULTILINE))
    line = re.search(r"^    apt install (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert line is not None
    there = {"mount", "python3"}  # on every Debian; make is for the next line alone
    assert named(line[1]) == {"make"} | (named(fields["Depends"]) | named(fields["Recommends"])) - there
    python = {name for name in named(fields["Depends"]) if name.startswith("python3-")}
    assert {package.split()[0] for package in needed.NEEDED.values()} == python


@pytest.mark.parametrize("arguments", [[], ["--only-pull"]])
def test_without_the_packages_the_daemon_says_so_in_one_line(tmp_path: Path, arguments: list[str]) -> None:
    # -S leaves them out.
    text = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from mountd.daemon.main import main; main()"
    command = [sys.executable, "-IS", "-c", text, "--runtime-dir", tmp_path / "run", *arguments]
    environment = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": "/run/systemd/notify"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("mountd: Python lacks pydantic, cryptography, systemd, varlink: install ")
    assert "python3-pydantic of version 2.5 or later" in done.stderr
    assert not (tmp_path / "run").exists()


def test_of_what_is_there_nothing_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert needed.missing() is None
    there = needed.find_spec
    old = ("pydantic_core",)  # Debian 12: the first pydantic
    monkeypatch.setattr(needed, "find_spec", lambda name: None if name in old else there(name))
    assert str(needed.missing()).startswith("Python lacks pydantic: install python3-pydantic of version")
