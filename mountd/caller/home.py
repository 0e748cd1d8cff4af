"""Where the home directory of a user of the host is, as the user database has it."""

from __future__ import annotations

import pwd
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mountd.caller.model import Caller


def home_of(caller: Caller) -> str | None:
    """Return the home directory of the caller, None for who has none here.

    That of a user inside a container is known there only. What a service has, such as “/”, is no home.
    """
    if not caller.on_host:
        return None
    try:
        home = pwd.getpwuid(caller.uid).pw_dir
    except KeyError:
        return None
    plain = home.rstrip("/")
    return plain if plain.startswith("/") else None
