"""Work that must not change the test process itself: namespaces, credentials."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def in_child(work: Callable[[], None]) -> None:
    """Run `work` in a fork and fail with its traceback if it fails."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the parent raises it
            os.write(writer, traceback.format_exc().encode()[-60000:])
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writer)
    text = b""
    while chunk := os.read(reader, 65536):
        text += chunk
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, text.decode()
