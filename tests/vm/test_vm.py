"""The tests that need another kernel: they run in a virtual machine, and each shows here by its name.

Which tests there are is what pytest finds on this side; how they went is what the machine tells. The
rooms that touch the kernel are tested there as well: on a second kernel, of another version and
configuration.

A second machine, which runs at the same time, has the newest systemd: clients of io.systemd.MountFileSystem.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.vm.machine import DEBIAN_13, NEWEST, ROOT, Run, booted, build

# Of the kernel tests those whose subject is the kernel: the store and the programs are the same everywhere.
ROOMS = ("caller", "child", "confined", "descriptor", "fs_verity", "mark", "mount_api", "namespaces")
SUITES = ("tests/vm/inside", *(f"tests/kernel/test_{room}.py" for room in ROOMS))
OF_NEWEST = ("tests/vm/newest",)

# What the machine's kernel (Linux 6.12) does not have: these fail there, and with these words.
LACKING = {
    "tests/kernel/test_mount_api.py::test_open_tree_attr": "the system call open_tree_attr",  # 6.15
    "tests/kernel/test_namespaces.py::test_made_namespace_has_the_maps_and_root_as_owner": (
        "function namespace_id"  # NS_GET_ID: 6.18
    ),
}


def found(suites: Sequence[str]) -> list[str]:
    """The ids of the tests, as pytest has them on both sides."""
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", *suites]
    done = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, suites in (("inner", SUITES), ("of_newest", OF_NEWEST)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, found(suites))


@pytest.fixture(scope="session")
def runs() -> Iterator[tuple[Run, Run]]:
    """One boot for all of them, of each machine. The second takes a processor that the first leaves idle."""
    built = build()
    with contextlib.ExitStack() as stack:
        machines = []
        for what, suites in ((DEBIAN_13, SUITES), (NEWEST, OF_NEWEST)):
            place = tempfile.TemporaryDirectory(prefix="mountd-vm-", dir="/var/tmp")
            machines.append(
                stack.enter_context(booted(what, built, suites, Path(stack.enter_context(place))))
            )
        first, second = (told() for told in machines)
        yield first, second


@pytest.fixture(scope="session")
def machine(runs: tuple[Run, Run]) -> Run:
    return runs[0]


@pytest.fixture(scope="session")
def newest(runs: tuple[Run, Run]) -> Run:
    return runs[1]


def test_the_machine_ran_to_its_end(machine: Run) -> None:
    assert machine.problem is None, f"{machine.problem}; its console ends with\n{machine.console}"
    assert machine.exit == (1 if LACKING else 0), machine.console


def test_in_the_machine(machine: Run, inner: str) -> None:
    outcome = machine.outcomes.get(inner)
    assert outcome is not None, f"it did not run: {machine.problem}\n{machine.console}"
    if inner in LACKING:
        assert outcome.outcome == "failed", "the kernel has it by now: remove it from LACKING"
        assert LACKING[inner] in outcome.text
        return
    assert outcome.outcome == "passed", f"{outcome.outcome}: {outcome.text}\n{machine.problem or ''}"


def test_nothing_ran_there_that_is_not_known_here(machine: Run) -> None:
    assert set(machine.outcomes) <= set(found(SUITES))


def test_the_machine_with_the_newest_systemd_ran_to_its_end(newest: Run) -> None:
    assert newest.problem is None, f"{newest.problem}; its console ends with\n{newest.console}"
    assert newest.exit == 0, newest.console
    assert set(newest.outcomes) == set(found(OF_NEWEST))


def test_with_the_newest_systemd(newest: Run, of_newest: str) -> None:
    outcome = newest.outcomes.get(of_newest)
    assert outcome is not None, f"it did not run: {newest.problem}\n{newest.console}"
    assert outcome.outcome == "passed", f"{outcome.outcome}: {outcome.text}\n{newest.problem or ''}"
