"""The ids that an administrator has given to a user: /etc/subuid and /etc/subgid (subuid(5), subgid(5))."""

from __future__ import annotations

import contextlib
import os
import pwd
from typing import TYPE_CHECKING

from mountd.caller.model import DelegatedIds

if TYPE_CHECKING:
    from collections.abc import Iterable

MAXIMUM_FILE = 1 << 20
MAXIMUM_ID = (1 << 32) - 2

# Path -> what it looked like when it was read, and its lines.
_read: dict[str, tuple[tuple[int, int, int], list[tuple[str, int, int]]]] = {}


def delegated_ids(uid: int, subuid: str = "/etc/subuid", subgid: str = "/etc/subgid") -> DelegatedIds:
    """Return the ranges that belong to `uid`, none if a file is missing. Raises OSError."""
    uids, gids = _lines(subuid), _lines(subgid)
    if not uids and not gids:
        return DelegatedIds((), ())
    names = {str(uid)}
    with contextlib.suppress(KeyError):  # a user that exists as a number only
        names.add(pwd.getpwuid(uid).pw_name)
    return DelegatedIds(tuple(_ranges(uids, names)), tuple(_ranges(gids, names)))


def _ranges(lines: list[tuple[str, int, int]], names: set[str]) -> Iterable[range]:
    return (range(first, first + count) for name, first, count in lines if name in names)


def _lines(path: str) -> list[tuple[str, int, int]]:
    """Return the lines of a file, read again only when it has changed; broken lines give nothing."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return []
    mark = (status.st_ino, status.st_size, status.st_mtime_ns)
    if path in _read and _read[path][0] == mark:
        return _read[path][1]
    found = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file.read(MAXIMUM_FILE).splitlines():
            name, _, rest = line.strip().partition(":")
            first, _, count = rest.partition(":")
            if name and first.isdecimal() and count.isdecimal() and int(first) + int(count) <= MAXIMUM_ID:
                found.append((name, int(first), int(count)))
    _read[path] = (mark, found)
    return found
