"""What the README shows works: the demo, and the bench with a few rounds."""

from __future__ import annotations

import subprocess
import sys

from tests.daemon import ROOT


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_demo() -> None:
    shown = run("tests.demo")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for expected in (
        "ro,nosuid,nodev,relatime,idmapped",
        "permission denied",
        "null: Permission denied",
        "deny: no rule applies: it does not lie in a directory that a rule trusts",
        "hint: an administrator can copy it, owned by root, to one of:",
        "allow by rule “images of the demo”",
        "refused with DeniedByPolicy",
        "Done.",
    ):
        assert expected in shown.stdout


def test_bench_measures_everything() -> None:
    # Its exit status says whether the ratio holds, which a few rounds on a busy machine cannot.
    shown = run("tests.bench", "--quick")
    assert shown.stderr == ""
    for expected in ("bare:", "Mount:", "ratio", "1 client", "8 client", "socket activation", "a worker"):
        assert expected in shown.stdout
