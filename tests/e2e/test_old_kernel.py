"""A kernel that lacks something: whoever needs it is told what, and there is never a traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.kernel.numbers import NUMBERS
from tests.container import in_container
from tests.daemon import ROOT, Daemon
from tests.e2e.calls import mount, outcome
from tests.e2e.conftest import TMPFS_RULE, trusting
from tests.rogue import GET_INFO, ask, error
from tests.seccomp import lose


@pytest.mark.parametrize(
    "name", ["fsopen", "fsconfig", "fsmount", "mount_setattr", "move_mount", "open_tree"]
)
def test_a_mount_needs_it(
    start: Callable[..., Daemon], images: dict[str, Path], containers: None, name: str
) -> None:
    daemon = start(trusting(images["erofs"].parent) + TMPFS_RULE, preexec_fn=lambda: lose(NUMBERS[name]))
    for source in (str(images["erofs"]), "tmpfs:4096"):
        refused = in_container(lambda: outcome(lambda: mount(daemon.socket, source)))  # noqa: B023
        assert refused == ("NotSupported", f"not supported here: the system call {name}")
    assert error(ask(daemon, GET_INFO)) == ""


@pytest.mark.parametrize("name", ["statmount"])
def test_trust_in_a_location_needs_it(
    start: Callable[..., Daemon], images: dict[str, Path], containers: None, name: str
) -> None:
    daemon = start(trusting(images["erofs"].parent) + TMPFS_RULE, preexec_fn=lambda: lose(NUMBERS[name]))
    refused = in_container(lambda: outcome(lambda: mount(daemon.socket, images["erofs"])))
    assert refused == ("NotSupported", f"not supported here: the system call {name}")
    assert in_container(lambda: outcome(lambda: mount(daemon.socket, "tmpfs:4096"))) == ("", "")


@pytest.mark.parametrize("name", ["pidfd_open"])
def test_nothing_works_without_it(place: Path, name: str) -> None:
    """Then it does not start, and says in one line why."""
    command = [sys.executable, "-m", "mountd.daemon.main", "--runtime-dir", str(place / "lacking")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, preexec_fn=lambda: lose(NUMBERS[name]), timeout=20
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"mountd: cannot serve: not supported here: the system call {name}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["listmount", "fspick", "open_tree_attr"])
def test_it_is_not_needed(
    start: Callable[..., Daemon], images: dict[str, Path], containers: None, name: str
) -> None:
    daemon = start(trusting(images["erofs"].parent), preexec_fn=lambda: lose(NUMBERS[name]))
    assert in_container(lambda: outcome(lambda: mount(daemon.socket, images["erofs"]))) == ("", "")
