"""The Python packages that mountd cannot do without, as an administrator can install them.

They are looked for, and not imported: most are for the fork server, and the listener keeps little in memory.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

# Modules, and the Debian packages that have them. The second one came with the version that is needed.
NEEDED = {
    "pydantic": "python3-pydantic",
    "pydantic_core": "python3-pydantic of version 2.5 or later (Debian 13 has it, Debian 12 does not)",
    "cryptography": "python3-cryptography",
    "systemd": "python3-systemd",
    "varlink": "python3-varlink",
}
# Without any of these, there is nothing to be told to a service manager, or to be taken from it.
OF_SYSTEMD = ("LISTEN_FDS", "NOTIFY_SOCKET", "JOURNAL_STREAM")


def missing() -> str | None:
    """Return what has to be installed before mountd can start, None for nothing."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    if not any(name in os.environ for name in OF_SYSTEMD) and "systemd" in absent:
        absent.remove("systemd")
    if not absent:
        return None
    if "pydantic_core" in absent and "pydantic" in absent:
        absent.remove("pydantic")  # where it is too old, it takes the same
    modules = ", ".join(name.removesuffix("_core") for name in absent)
    return f"Python lacks {modules}: install {', '.join(NEEDED[name] for name in absent)}"
