"""A tree as a composefs, and the lines that describe one."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

BIG = bytes(range(256)) * 40
DESCRIPTIONS = """
[[rule]]
name = "descriptions"
image = { kind = "composefs" }
caller = { any = true }
require = { integrity = ["regenerated"] }
grant = { file-systems = ["erofs"], idmap = ["none", "namespace", "caller", "ranges"] }
verdict = "allow"
"""


class Trees:
    """A tree as a composefs: its image and its objects, root's, and what describes it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.objects = place / "objects"
        self.image = place / "tree.cfs"
        tree = place / "tree"
        (tree / "directory/below").mkdir(parents=True)
        (tree / "small").write_text("a few bytes\n")
        (tree / "big").write_bytes(BIG)
        (tree / "a name with = and \\ and \n").write_bytes(BIG[:5000])
        (tree / "private").write_bytes(b"private" * 100)
        (tree / "private").chmod(0o600)
        (tree / "program").write_bytes(b"#!/bin/sh\n" + BIG)
        (tree / "program").chmod(0o4755)
        (tree / "directory/below/of-user").write_bytes(b"of 1000" * 100)
        os.chown(tree / "directory/below/of-user", 1000, 1000)
        (tree / "link").symlink_to("directory/below")
        os.setxattr(tree / "small", "user.note", b"with \0 and =")
        os.mkfifo(tree / "pipe")
        command = ["mkcomposefs", "--user-xattrs", f"--digest-store={self.objects}", "--print-digest"]
        done = subprocess.run([*command, tree, self.image], check=True, capture_output=True, text=True)
        self.digest = done.stdout.strip()
        self.description = place / "tree.dump"
        self.description.write_bytes(dump(self.image))
        self.description.chmod(0o644)


def dump(image: Path) -> bytes:
    return subprocess.run(["composefs-info", "dump", image], check=True, capture_output=True).stdout


def described(place: Path, text: bytes) -> Path:
    fd, name = tempfile.mkstemp(prefix="described-", dir=place)
    os.close(fd)
    path = Path(name)
    path.write_bytes(text)
    path.chmod(0o644)
    return path


HEAD = b"/ 0 40755 2 0 0 0 0.0 - - -\n"
