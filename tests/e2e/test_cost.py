"""What a call of mount.mountd costs, from the start of the process to its end."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.container import in_container
from tests.daemon import Daemon
from tests.programs import environment
from tests.unit.test_import_budget import CALLS, LEANEST, foreign

MAXIMUM_CPU_SECONDS = 0.045
RUNS = 12


def in_place(daemon: Daemon, place: Path, work: Callable[[Path], object]) -> object:
    """Run `work` in a container, with a directory to mount at."""
    target = place / "cost"
    target.mkdir(exist_ok=True)
    return in_container(lambda: work(target))


def started() -> set[str]:
    """What the system's Python has loaded before it does anything."""
    command = ["/usr/bin/python3", "-IS", "-c", "import sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_cpu_time_of_a_mount(
    daemon: Daemon, installed: Path, images: dict[str, Path], place: Path, containers: None
) -> None:
    """The least of several runs is what it costs.

    A run does the same work each time, and CPU time is only what the kernel charged to it: another process,
    a cold cache or a slower clock of the processor adds to that and never takes anything away. So the
    least is the nearest to the cost itself, and a median would say how busy the machine was. That it is
    no accident of one run is what the wider bound on the median is for.
    """
    helper = str(installed / "sbin/mount.mountd")

    def used() -> float:
        total = resource.getrusage(resource.RUSAGE_CHILDREN)
        return total.ru_utime + total.ru_stime

    def work(target: Path) -> list[float]:
        seconds = []
        for _ in range(RUNS):
            before = used()
            arguments = [helper, str(images["erofs"]), str(target), "-o", "rw"]
            assert os.waitpid(os.posix_spawn(helper, arguments, environment(daemon.socket)), 0)[1] == 0
            seconds.append(used() - before)
            assert (target / "hello").exists()
        return sorted(seconds)

    seconds = in_place(daemon, place, work)
    assert isinstance(seconds, list)
    assert 0 < seconds[0] <= MAXIMUM_CPU_SECONDS
    assert seconds[RUNS // 2] <= 2 * MAXIMUM_CPU_SECONDS


def test_modules_of_a_mount(
    daemon: Daemon, installed: Path, images: dict[str, Path], place: Path, containers: None
) -> None:
    """A whole mount by the system's Python loads nothing heavy, and nothing from elsewhere."""

    def work(target: Path) -> str:
        script = str(installed / "sbin/mount.mountd")
        command = ["/usr/bin/python3", "-IS", "-X", "importtime", script, str(images["erofs"]), str(target)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment(daemon.socket)
        )
        assert (target / "hello").exists()
        return done.stderr

    said = in_place(daemon, place, work)
    assert isinstance(said, str)
    loaded = {
        line.rpartition("|")[2].strip() for line in said.splitlines() if line.startswith("import time:")
    }
    assert {"mountd.cli.mount_helper", "mountd.asking", "_socket"} <= loaded
    loaded -= {"imported package"}
    assert not foreign(loaded)
    # Besides, there is what the interpreter itself has loaded by then.
    own = {name for name in loaded if name.split(".")[0] == "mountd"}
    assert not loaded - own - LEANEST - CALLS - {"gc", *started()}
