"""The clients of the newest systemd, tried in a virtual machine that it has booted.

Not a part of test_vm.py for the time it takes: nsresourced has the kernel verify its security module for
each of its workers, half a minute where the processor is emulated.
"""

from __future__ import annotations

import pytest

from tests.vm.machine import Run, found, newest, run

SUITES = ("tests/vm/newest",)
SECONDS = 3600.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "inner" in metafunc.fixturenames:
        metafunc.parametrize("inner", found(SUITES))


@pytest.fixture(scope="session")
def booted() -> Run:
    """One boot for all of them."""
    return run(newest(), SUITES, SECONDS)


def test_the_machine_ran_to_its_end(booted: Run) -> None:
    assert booted.problem is None, f"{booted.problem}; its console ends with\n{booted.console}"
    assert booted.exit == 0, booted.console
    assert set(booted.outcomes) == set(found(SUITES))


def test_in_the_machine(booted: Run, inner: str) -> None:
    outcome = booted.outcomes.get(inner)
    assert outcome is not None, f"it did not run: {booted.problem}\n{booted.console}"
    assert outcome.outcome == "passed", f"{outcome.outcome}: {outcome.text}\n{booted.problem or ''}"
