"""The machine that the newest systemd has booted."""

from __future__ import annotations

import pytest

from tests.vm.inside.conftest import scratch

__all__ = ["scratch"]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """Nothing: systemd mounts and unmounts beside the tests, which look at what mountd leaves themselves."""
