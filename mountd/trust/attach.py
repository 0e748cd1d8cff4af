"""The patterns of `attach`: directories at which a mount may be attached for a caller.

As those of `location`, but with ids and the home directory of the caller in them: `$HOME` as the first
component, `$UID` and `$GID` anywhere; and `**` as the last one, for everything below.
"""

from __future__ import annotations

import re

from mountd.errors import AttachNotPermitted
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


def permits(pattern: str, path: str, *, home: str | None, uid: int, gid: int) -> bool:
    """Tell whether `pattern`, which `check_pattern` has accepted, stands for the directory `path`.

    `home` is the caller's home directory, None if `path` does not lead through it; then nothing with `$HOME`
    matches. `uid` and `gid` are what `$UID` and `$GID` are.
    """
    wanted = pattern.replace("$UID", str(uid)).replace("$GID", str(gid))
    if wanted == HOME or wanted.startswith(f"{HOME}/"):
        if home is None:
            return False
        wanted = literal(home) + wanted.removeprefix(HOME)
    if not wanted.endswith(EVERYTHING_BELOW):
        return location.matches(wanted, path)
    wanted = wanted.removesuffix(EVERYTHING_BELOW)
    names, depth = path.split("/"), len(wanted.split("/"))
    return len(names) > depth and all(names[1:]) and location.matches(wanted, "/".join(names[:depth]))


def literal(path: str) -> str:
    """Return the pattern that stands for `path` alone."""
    return re.sub(r"([*?[])", r"[\1]", path)


def judge(
    rule: str | None, patterns: tuple[str, ...], path: str, *, home: str | None, uid: int, gid: int
) -> None:
    """Refuse a directory at which the rule that allows the mount grants no attaching but at `patterns`.

    Raises AttachNotPermitted.
    """
    if any(permits(each, path, home=home, uid=uid, gid=gid) for each in patterns):
        return
    if not patterns:
        raise AttachNotPermitted(
            f"rule “{rule}” grants no place for it",
            hint='“mountctl run” needs none; an administrator can grant some, as attach = ["$HOME/**"]',
        )
    places = ", ".join(patterns)
    raise AttachNotPermitted(
        f"rule “{rule}” grants {places}, and {path} is none of these",
        hint=f"use a directory of {places}",
    )
