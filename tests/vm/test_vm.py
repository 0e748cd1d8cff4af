"""The tests that need another kernel: they run in a virtual machine, and each shows here by its name.

Which tests there are is what pytest finds on this side; how they went is what the machine tells. The
rooms that touch the kernel are tested there as well: on a second kernel, of another version and
configuration.
"""

from __future__ import annotations

import pytest

from tests.vm.machine import Run, debian_13, found, run

# Of the kernel tests those whose subject is the kernel: the store and the programs are the same everywhere.
ROOMS = ("caller", "child", "confined", "descriptor", "fs_verity", "mark", "mount_api", "namespaces")
SUITES = ("tests/vm/inside", *(f"tests/kernel/test_{room}.py" for room in ROOMS))

# What the machine's kernel (Linux 6.12) does not have: these fail there, and with these words.
LACKING = {
    "tests/kernel/test_mount_api.py::test_open_tree_attr": "the system call open_tree_attr",  # 6.15
    "tests/kernel/test_namespaces.py::test_made_namespace_has_the_maps_and_root_as_owner": (
        "function namespace_id"  # NS_GET_ID: 6.18
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "inner" in metafunc.fixturenames:
        metafunc.parametrize("inner", found(SUITES))


@pytest.fixture(scope="session")
def booted() -> Run:
    """One boot for all of them."""
    return run(debian_13(), SUITES)


def test_the_machine_ran_to_its_end(booted: Run) -> None:
    assert booted.problem is None, f"{booted.problem}; its console ends with\n{booted.console}"
    assert booted.exit == (1 if LACKING else 0), booted.console


def test_in_the_machine(booted: Run, inner: str) -> None:
    outcome = booted.outcomes.get(inner)
    assert outcome is not None, f"it did not run: {booted.problem}\n{booted.console}"
    if inner in LACKING:
        assert outcome.outcome == "failed", "the kernel has it by now: remove it from LACKING"
        assert LACKING[inner] in outcome.text
        return
    assert outcome.outcome == "passed", f"{outcome.outcome}: {outcome.text}\n{booted.problem or ''}"


def test_nothing_ran_there_that_is_not_known_here(booted: Run) -> None:
    assert set(booted.outcomes) <= set(found(SUITES))
