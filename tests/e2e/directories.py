"""The rules for directories, and asking for one as the user whose it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from tests.container import USER

EVERY_MAP = '["none", "namespace", "caller", "ranges"]'
BIND = 4096  # MS_BIND


def rule(name: str, ownership: str, grant: str = "", image: str = "") -> str:
    return f"""
[[rule]]
name = "{name}"
image = {{ kind = "directory"{image} }}
caller = {{ any = true }}
require = {{ ownership = [{ownership}] }}
grant = {{ idmap = {EVERY_MAP}{grant} }}
verdict = "allow"
"""


@contextlib.contextmanager
def peer(uid: int = USER) -> Iterator[None]:
    """Be this user to whoever is connected to meanwhile."""
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
