"""Disk images: partition tables by sfdisk(8), and file systems put into the partitions."""

from __future__ import annotations

import base64
import json
import os
import platform
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

from mountd.fds import OwnedFd
from mountd.kernel import loop_device
from mountd.source.partition_types import MACHINES, PER_ARCHITECTURE, TYPES, PartitionType
from tests.verity import Verified

MIB = 1 << 20
NATIVE, *SECONDARY = MACHINES[platform.machine()]
FIRST = MIB  # where the first partition begins


def type_uuid(designator: str, architecture: str | None = None) -> str:
    """The type of a partition, as text; KeyError for what there is not."""
    types = {found: type for type, found in TYPES.items()}
    return types[PartitionType(designator, architecture)]


@dataclass(frozen=True, slots=True)
class Part:
    """A partition to be made: what it is for, what is in it, and how the table describes it."""

    designator: str
    data: bytes | Path = b""
    size: int = 0  # bytes; as much as the data takes, if it is more
    uuid: str | None = None
    label: str = ""
    attributes: str = ""
    architecture: str = NATIVE
    type: str | None = None

    @property
    def contents(self) -> bytes:
        """What is in it."""
        return self.data.read_bytes() if isinstance(self.data, Path) else self.data

    @property
    def room(self) -> int:
        """Its size: a multiple of a megabyte."""
        return max(1, -(-max(self.size, len(self.contents)) // MIB)) * MIB

    @property
    def line(self) -> str:
        """What sfdisk reads about it, but for where it begins."""
        architecture = self.architecture if self.designator in PER_ARCHITECTURE else None
        fields = [f"type={self.type or type_uuid(self.designator, architecture)}"]
        fields += [f"uuid={self.uuid or uuid.uuid4()}"]
        fields += [f'name="{self.label}"'] if self.label else []
        fields += [f'attrs="{self.attributes}"'] if self.attributes else []
        return ", ".join(fields)


def protected(source: Verified, signature: bytes | None = None, designator: str = "root") -> list[Part]:
    """The partitions of an image with hash data, and of the PKCS#7 over its root hash."""
    digits = source.root_hash.hex()
    parts = [
        Part(designator, source.image, uuid=str(uuid.UUID(digits[:32]))),
        Part(f"{designator}-verity", source.tree, uuid=str(uuid.UUID(digits[-32:]))),
    ]
    if signature is not None:
        told = {"rootHash": digits, "signature": base64.b64encode(signature).decode()}
        parts.append(Part(f"{designator}-verity-sig", json.dumps(told).encode()))
    return parts


def partition(image: Path, script: str, sector_size: int) -> None:
    """Have sfdisk write a table; of a file, it takes the sectors to be small."""
    command = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel"]
    if sector_size == 512:
        subprocess.run([*command, image], input=script, text=True, check=True)
        return
    with OwnedFd(os.open(image, os.O_RDWR)) as fd:
        loop = loop_device.attach(fd.fileno(), read_only=False, direct_io=False, block_size=sector_size)
        try:
            subprocess.run([*command, loop.path], input=script, text=True, check=True)
        finally:
            loop.close()


def build_disk(image: Path, parts: list[Part], *, sector_size: int = 512) -> Path:
    """Make a disk image of `parts`, one after the other, root-owned and mode 0644."""
    lines, places, at = ["label: gpt"], [], FIRST
    for part in parts:
        lines.append(f"start={at // sector_size}, size={part.room // sector_size}, {part.line}")
        places.append(at)
        at += part.room
    with image.open("wb") as file:
        file.truncate(at + MIB)
    partition(image, "\n".join(lines), sector_size)
    with image.open("r+b") as file:
        for part, place in zip(parts, places, strict=True):
            file.seek(place)
            file.write(part.contents)
    image.chmod(0o644)
    return image
