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


def lean_modules() -> list[str]:
    """Everything that a helper called by mount(8) may load."""
    kernel = sorted(path.stem for path in (ROOT / "mountd/kernel").glob("*.py") if path.stem != "__init__")
    return [
        "mountd.fds",
        "mountd.errors",
        "mountd.wire.framing",
        *(f"mountd.kernel.{name}" for name in kernel),
    ]


@pytest.mark.parametrize("module", lean_modules())
def test_lean_module_loads_nothing_heavy(module: str) -> None:
    # -S as well as -I: what site loads for an editable installation is not the module's doing.
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(run.stdout.split())
    assert module in loaded
    assert not loaded & HEAVY
