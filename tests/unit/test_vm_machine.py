"""The VM tier's own machinery: no way for the machine to end makes a test pass that did not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vm import machine
from tests.vm.machine import understand, watch


def lines(*told: dict[str, object]) -> str:
    return "".join(json.dumps(each) + "\n" for each in told)


RUNNING = {"test": "a::b", "outcome": "running"}
PASSED = {"test": "a::b", "outcome": "passed", "when": "call", "text": ""}
EXIT = {"exit": 0}


@pytest.mark.parametrize(
    ("results", "outcome", "problem"),
    [
        (lines(RUNNING, PASSED, EXIT), "passed", None),
        (lines(RUNNING, {**PASSED, "outcome": "failed", "when": "setup"}, EXIT), "failed", None),
        (lines(RUNNING, PASSED, {**PASSED, "outcome": "failed", "when": "teardown"}, EXIT), "failed", None),
        (lines(RUNNING, {**PASSED, "outcome": "failed"}, PASSED, EXIT), "failed", None),
        (lines(RUNNING, {**PASSED, "outcome": "skipped"}, EXIT), "skipped", None),
        (lines(RUNNING), "running", "turned itself off before"),
        (lines(RUNNING, PASSED), "passed", "turned itself off before"),
        (lines(RUNNING) + '{"test": "a::b", "outc', "running", "told what is no report"),
        (lines(RUNNING) + "[]\n" + lines(PASSED, EXIT), "passed", "told what is no report"),
    ],
)
def test_what_came_over_the_line(results: str, outcome: str, problem: str | None) -> None:
    run = understand(results, None, "the console")
    assert run.outcomes["a::b"].outcome == outcome
    assert (run.problem is None) if problem is None else (problem in str(run.problem))
    assert understand(results, "qemu died", "").problem == "qemu died"


def test_nothing_came() -> None:
    run = understand("", None, "x" * 100_000 + "Kernel panic")
    assert (run.outcomes, run.exit) == ({}, None)
    assert run.problem is not None
    assert run.console.endswith("Kernel panic")
    assert len(run.console) <= machine.TAIL


PROGRAMS = {
    "ends": ("pass", None),
    "dies": ("raise SystemExit(3)", "qemu ended with status 3"),
    "hangs": ("import time; time.sleep(60)", "said nothing for"),
    "goes on and on": (
        "import sys, time\nwhile True: open(sys.argv[1], 'a').write('x'); time.sleep(0.02)",
        "still at work after",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_how_the_machine_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    program, problem = PROGRAMS[name]
    limit = 1.5 if problem and "still" in problem else 30.0
    monkeypatch.setattr(machine, "SILENT_SECONDS", 1.0 if problem and "nothing" in problem else 30.0)
    file = tmp_path / "console"
    with subprocess.Popen([sys.executable, "-c", program, file]) as process:
        try:
            said = watch(process, (file,), limit)
        finally:
            process.kill()
    assert (said is None) if problem is None else (problem in str(said))
