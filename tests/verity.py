"""Hash data of dm-verity, made by the tool that everybody makes it with."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from mountd.plan.operations import Verity
from mountd.source import verity_superblock


@dataclass(frozen=True, slots=True)
class Verified:
    """An image with its hash data and its root hash."""

    image: Path
    tree: Path
    root_hash: bytes

    def verity(self) -> Verity:
        """What a device over it is told, as its superblock says."""
        data = self.tree.read_bytes()
        superblock = verity_superblock.read(
            lambda offset, length: data[offset : offset + length], len(data), self.image.stat().st_size
        )
        return Verity.of(superblock, self.root_hash)

    def copy(self, place: Path) -> Verified:
        """The same in files of its own, for a test to damage."""
        place.mkdir()
        for path in (self.image, self.tree):
            (place / path.name).write_bytes(path.read_bytes())
        return replace(self, image=place / self.image.name, tree=place / self.tree.name)


def build_verity(image: Path, *options: str) -> Verified:
    """Make the hash data of `image`, beside it."""
    tree = image.with_suffix(".verity")
    done = subprocess.run(
        ["veritysetup", "format", *options, image, tree], capture_output=True, text=True, check=True
    )
    found = re.search(r"^Root hash:\s*([0-9a-f]+)$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return Verified(image, tree, bytes.fromhex(found[1]))


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file in place."""
    fd = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte ^ 0xFF]), offset)
        os.fsync(fd)
    finally:
        os.close(fd)
