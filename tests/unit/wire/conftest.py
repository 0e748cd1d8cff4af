"""A dispatcher for each test."""

from __future__ import annotations

import pytest

from tests.unit.wire.bench import Bench


@pytest.fixture
def bench() -> Bench:
    """A dispatcher with two recorders."""
    return Bench()
