"""The lean side starts in milliseconds: what it may not import, as a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {
    "argparse", "asyncio", "cryptography", "dataclasses", "inspect", "logging", "multiprocessing",
    "pydantic", "pyroute2", "ssl", "subprocess", "systemd", "tempfile", "threading", "tomllib", "typing",
    "urllib", "varlink",
}  # fmt: skip


# What mount(8) calls, and mountctl, whose command line is read by argparse when there is one to be read.
CLIENTS = [
    "mountd.client",
    "mountd.cli.report",
    "mountd.cli.helper",
    "mountd.cli.mount_helper",
    "mountd.cli.umount_helper",
    "mountd.cli.mountctl",
]
LEAN_ROOMS = ("errors", "fds", "version", "kernel", "wire", "wire.framing", "request", "client", "cli")


def lean_modules() -> list[str]:
    """Everything that a helper called by mount(8) may load."""
    kernel = sorted(path.stem for path in (ROOT / "mountd/kernel").glob("*.py") if path.stem != "__init__")
    return [
        "mountd.fds",
        "mountd.errors",
        "mountd.wire.framing",
        *(f"mountd.kernel.{name}" for name in kernel),
        *CLIENTS,
        "mountd.cli.container",
        "mountd.cli.policy",
        "mountd.cli.image",
        "mountd.cli.admin",
        "mountd.cli.doctor",
    ]


def loaded_by(program: str) -> set[str]:
    """The modules that are loaded after `program`, on top of what an empty one has."""
    # -S as well as -I: what site loads for an editable installation is not the module's doing.
    text = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", text], capture_output=True, text=True, check=True
    )
    return set(run.stdout.splitlines()[-1].split())


def foreign(modules: set[str]) -> set[str]:
    """Those of `modules` that are neither the standard library's nor on the lean side of mountd."""
    lean = {"mountd", *(f"mountd.{room}" for room in LEAN_ROOMS)}
    kernel = ("mountd.kernel.", "mountd.cli.")
    return {
        name
        for name in modules
        if name.split(".")[0] not in {*sys.stdlib_module_names, "__main__"}
        and name not in lean
        and not name.startswith(kernel)
    }


@pytest.mark.parametrize("module", lean_modules())
def test_lean_module_loads_nothing_heavy(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert module in loaded
    assert not loaded & HEAVY
    assert not foreign(loaded)


def test_what_is_used_in_another_namespace_is_loaded_before_it_is_entered() -> None:
    """A module that was looked for there would be whoever's that namespace is."""
    begin = "from mountd.cli import umount_helper, mount_helper; from mountd.kernel import namespaces"
    assert {"mountd.kernel.paths", "mountd.kernel.mount_api"} <= loaded_by(begin)


def test_mountctl_reads_its_command_line_with_argparse_and_nothing_else() -> None:
    program = 'from mountd.cli import mountctl; mountctl.parse(["run", "-o", "noexec", "image", "ls"])'
    loaded = loaded_by(program)
    assert loaded & HEAVY == {"argparse"}
    assert not foreign(loaded)
