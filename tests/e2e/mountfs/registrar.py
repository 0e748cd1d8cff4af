"""What is in the place of systemd-nsresourced."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any

from mountd.fds import close_all
from mountd.kernel import namespaces, sockets

NSRESOURCED = "io.systemd.NamespaceResource"
CONTAINER = ((0, 0x00080000, 65536),)  # as nsresourced gives it


class Registrar:
    """In place of systemd-nsresourced: takes mounts, and answers what it is told to."""

    def __init__(self, path: Path) -> None:
        self.answers: dict[str, Any] | None = {"parameters": {}}
        self.told: list[tuple[int, tuple[int, int], bool]] = []
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(path))
        path.chmod(0o666)
        self._listening.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                while True:
                    data, fds, _ = sockets.receive(connection, 65536, 4)
                    if not data:
                        break
                    asked = json.loads(data.rstrip(b"\0"))
                    assert asked["method"] == f"{NSRESOURCED}.AddMountToUserNamespace"
                    userns = fds[asked["parameters"]["userNamespaceFileDescriptor"]].fileno()
                    mount = fds[asked["parameters"]["mountFileDescriptor"]].fileno()
                    directory = stat.S_ISDIR(os.fstat(mount).st_mode)
                    self.told.append((len(fds), namespaces.identity(userns), directory))
                    close_all(fds)
                    if self.answers is None:
                        break
                    connection.sendall(json.dumps(self.answers).encode() + b"\0")

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(5)
