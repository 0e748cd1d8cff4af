"""A daemon with rules that ask, and the polkit that it asks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.e2e.conftest import TMPFS_RULE, trusting
from tests.e2e.consent.callers import asking
from tests.e2e.consent.polkit import Polkit


@pytest.fixture
def polkit(place: Path) -> Iterator[Polkit]:
    made = Polkit(place / "polkit")
    yield made
    made.close()
    for each in made.directory.iterdir():
        each.unlink()
    made.directory.rmdir()


@pytest.fixture
def begin(
    start: Callable[..., Daemon], polkit: Polkit, place: Path, images: dict[str, Path]
) -> Callable[..., Daemon]:
    def started(policy: str = "", enter: Callable[[], None] = polkit.enter) -> Daemon:
        os.makedirs("/run/dbus", exist_ok=True)
        text = policy or asking(trusting(place / "trusted", access='"read-write"')) + TMPFS_RULE
        return start(text, preexec_fn=enter)

    return started
