"""Disk images of several partitions, which are attached as one tree of mounts."""

from __future__ import annotations

from pathlib import Path

from tests.disks import Part, build_disk
from tests.e2e.attaching import id_at
from tests.e2e.test_disk_images import tree
from tests.images import build_image

PLACES = {"root": "", "usr": "usr", "home": "home", "srv": "srv", "var": "var", "tmp": "var/tmp"}
TYPES = {"root": "erofs", "usr": "squashfs", "home": "ext4", "srv": "erofs", "var": "ext4", "tmp": "ext4"}
# In the table of the image, where it has nothing to do with the one of attaching.
ORDER = ("tmp", "var", "home", "usr", "root", "srv")


def build_contents(work: Path) -> dict[str, Path]:
    """File systems for partitions, each with a file that names it."""
    work.mkdir()
    made = {}
    directories = {"root": ("usr", "home", "srv", "var/tmp"), "var": ("tmp",)}
    for name, type in TYPES.items():
        source = tree(work / name, name, *directories.get(name, ()))
        made[name] = build_image(type, source, work / f"{name}.raw")
    return made


def build_tree_disk(image: Path, contents: dict[str, Path], *names: str) -> Path:
    """An image with these partitions, or all."""
    return build_disk(image, [Part(name, contents[name]) for name in names or ORDER])


def seen(target: Path) -> dict[str, str]:
    """What the file at each place says that it is, where there is one."""
    files = {name: target / place / "name" for name, place in PLACES.items()}
    return {name: file.read_text() for name, file in files.items() if file.exists()}


def ids_at(target: Path) -> dict[str, int]:
    """The ids of the mounts of a whole tree."""
    return {name: id_at(target / place) for name, place in PLACES.items()}
