"""The patterns of `attach`: directories at which a mount may be attached for a caller.

As those of `location`, but with ids and the home directory of the caller in them: `$HOME` as the first
component, `$UID` and `$GID` anywhere; and `**` as the last one, for everything below.
"""

from __future__ import annotations

import re

from mountd.trust import location

HOME = "$HOME"
EVERYTHING_BELOW = "/**"


def check_pattern(pattern: str) -> None:
    """Raise ValueError, saying why, if `pattern` can match no directory, or matches every one."""
    rest = pattern.removesuffix(EVERYTHING_BELOW)
    if rest == HOME or rest.startswith(f"{HOME}/"):
        rest = "/home/x" + rest.removeprefix(HOME)
    elif rest in ("", "/"):
        raise ValueError("it is the whole system; name a directory")
    plain = re.sub(r"\$[UG]ID", "1", rest)
    if "$" in plain:
        raise ValueError("it has a “$” that is neither $HOME at its start nor $UID or $GID")
    location.check_pattern(plain)
