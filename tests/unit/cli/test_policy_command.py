"""mountctl becomes the program that checks policies: of the same installation, and of nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mountd.cli.policy import FLAGS, command
from mountd.cli.report import EXIT_USAGE

ROOT = Path(__file__).parents[3]
# As units/program writes it.
MOUNTCTL = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from mountd.cli.mountctl import main; main()"


def mountctl(*arguments: str, **run: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-IS", "-c", MOUNTCTL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **run)  # type: ignore[call-overload,no-any-return]


def test_check_and_its_exit_status(tmp_path: Path) -> None:
    good = mountctl("policy", "check", str(ROOT / "units/policy.d"))
    assert (good.returncode, good.stdout, good.stderr) == (0, "", "")
    (tmp_path / "a.toml").write_text("\nx = 1")
    bad = mountctl("policy", "check", str(tmp_path))
    assert bad.returncode == 1
    assert bad.stdout == f"{tmp_path}/a.toml:2: x: unknown key; remove it or correct it\n"


def test_show_and_schema() -> None:
    shown = mountctl("policy", "show", "--json", str(ROOT / "units/policy.d"))
    assert json.loads(shown.stdout)[0]["table"]["name"] == "system images"
    assert json.loads(mountctl("policy", "schema").stdout)["title"] == "mountd policy file"


def test_help_and_wrong_usage() -> None:
    assert "mountctl policy" in mountctl("policy", "--help").stdout
    assert "policy" in mountctl("--help").stdout
    wrong = mountctl("policy")
    assert wrong.returncode == 1
    assert len(wrong.stderr.splitlines()) == 1


def test_the_current_directory_and_the_environment_have_no_say(tmp_path: Path) -> None:
    for name in ("mountd", "pydantic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit(99)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = mountctl("policy", "check", str(ROOT / "units/policy.d"), cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_python_without_the_packages(words: list[str]) -> None:
    """As the system's own may be: -S leaves them out."""
    whole = command(["check", *words])
    assert whole[1] == FLAGS
    whole[1] = f"{FLAGS}S"
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_USAGE
    (line,) = done.stderr.splitlines()
    assert line.startswith("mountctl policy: ")
    assert "No module named 'pydantic'" in line
    assert "hint: install it" in line
    if words:
        said = json.loads(done.stdout)
        assert said["error"] == "NotSupported"
        assert said["message"] in line
    else:
        assert done.stdout == ""


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_standard_descriptor_is_no_traceback(closed: int) -> None:
    done = mountctl("policy", "check", str(ROOT / "units/policy.d"), preexec_fn=lambda: os.close(closed))
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr


def test_somebody_who_reads_no_further_is_no_error() -> None:
    command = [sys.executable, "-IS", "-c", MOUNTCTL, "policy", "schema"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
