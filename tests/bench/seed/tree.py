"""A tree with the shape of a real root file system: a copy of this machine's /usr.

Names, kinds, owners, modes, times, hard links and extended attributes are those of the original. Of the
contents of a file there is only the beginning, as listing a tree does not read them.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONTENTS = 16 << 10  # bytes of each file
KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)


@dataclass(frozen=True, slots=True)
class Copied:
    """How many entries there are in the copy, and how many in the original."""

    entries: int
    original: int


def walk(root: Path, below: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the entries of one file system in order, each directory before what is in it."""
    device = root.stat().st_dev
    with os.scandir(root / below) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        status = entry.stat(follow_symlinks=False)
        if stat.S_IFMT(status.st_mode) not in KINDS or status.st_dev != device:
            continue
        path = os.path.join(below, entry.name)
        yield path, entry
        if entry.is_dir(follow_symlinks=False):
            yield from walk(root, path)


def share_of(paths: list[str], limit: int) -> list[str]:
    """Return at most `limit` of `paths`: of each directory at the top its share, from the beginning."""
    if len(paths) <= limit:
        return paths
    total = Counter(path.split("/", 1)[0] for path in paths)
    taken: Counter[str] = Counter()
    kept = []
    for path in paths:
        top = path.split("/", 1)[0]
        if taken[top] < total[top] * limit // len(paths):
            taken[top] += 1
            kept.append(path)
    return kept


def copy_tree(source: Path, target: Path, limit: int) -> Copied:
    """Copy at most `limit` entries of `source` to the new directory `target`."""
    found = dict(walk(source))
    kept = share_of(list(found), limit)
    target.mkdir(mode=0o755)
    first: dict[int, Path] = {}
    directories = []
    for path in kept:
        entry, copy = found[path], target / path
        status = entry.stat(follow_symlinks=False)
        if entry.is_dir(follow_symlinks=False):
            copy.mkdir()
            directories.append((entry, copy))
            continue
        if status.st_nlink > 1 and status.st_ino in first:
            os.link(first[status.st_ino], copy, follow_symlinks=False)
            continue
        first[status.st_ino] = copy
        if entry.is_symlink():
            copy.symlink_to(os.readlink(entry.path))
        else:
            copy_beginning(entry.path, copy)
        like(entry.path, copy, status)
    # Whatever is made in a directory changes its times.
    for entry, copy in reversed(directories):
        like(entry.path, copy, entry.stat(follow_symlinks=False))
    return Copied(len(kept), len(found))


def copy_beginning(source: str, target: Path) -> None:
    """Copy what there is to be of a file."""
    with open(source, "rb", buffering=0) as original, open(target, "xb", buffering=0) as copy:
        copy.write(original.read(CONTENTS))


def like(source: str, target: Path, status: os.stat_result) -> None:
    """Give `target` the owners, mode, times and attributes of `source`."""
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    shutil.copystat(source, target, follow_symlinks=False)
