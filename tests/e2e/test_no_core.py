"""THREATS 84: a process of mountd that crashes writes its memory, with what callers have sent, nowhere."""

from __future__ import annotations

from pathlib import Path

from tests.daemon import Daemon


def test_no_process_dumps_core(daemon: Daemon) -> None:
    daemon.wait_until_served()
    pids = {daemon.process.pid, daemon.fork_server, *daemon.workers}
    assert len(pids) >= 3
    for pid in pids:
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        (core,) = [line for line in limits if line.startswith("Max core file size")]
        assert core.split()[-3:-1] == ["0", "0"]
