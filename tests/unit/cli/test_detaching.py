"""Root's mountctl umount where mountd does not answer."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

from mountd.cli import attaching


def test_a_silent_daemon_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then root, who may, does it without."""
    monkeypatch.setattr(attaching, "SECONDS_TO_DETACH", 0.1)
    assert attaching.is_host_root(), os.geteuid()
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as silent:
        path = Path(directory) / "socket"
        silent.bind(str(path))
        silent.listen()
        monkeypatch.setenv("MOUNTD_SOCKET", str(path))
        assert not attaching.detached_by_mountd(5, lazy=False)
