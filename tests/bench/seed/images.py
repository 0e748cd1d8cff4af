"""The tree as images: erofs, its two layers, and disk images with it in a partition."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.disks import FIRST, Part, build_disk

UPPER = "share/doc"  # what the upper layer of the overlay has, where the tree has it
MKCOMPOSEFS = "mkcomposefs"
MKSQUASHFS = ("-noI", "-noD", "-noF", "-noX", "-no-fragments", "-root-mode", "755", "-quiet", "-no-progress")


@dataclass(frozen=True, slots=True)
class Images:
    """Where they are: `tree` as it is, and made of it the rest.

    `disk` has the same file system as `erofs` in a partition, `size` bytes from byte `offset`. `buffered` is
    the same once more, on a squashfs without compression that is mounted there: a file system that cannot do
    direct I/O, so that no loop device over it does. `layers` are the upper and the lower one. `composefs` is
    the image and `objects` the directory with the contents, if there is a program to make them.
    """

    tree: Path
    erofs: Path
    layers: tuple[Path, Path]
    disk: Path
    buffered: Path
    composefs: Path
    objects: Path
    offset: int
    size: int


def make_erofs(tree: Path, image: Path, *options: str) -> Path:
    """Make `image`, not compressed."""
    subprocess.run(["mkfs.erofs", *options, image, tree], check=True, capture_output=True)
    image.chmod(0o644)
    return image


def make_layers(tree: Path, directory: Path) -> tuple[Path, Path]:
    """Make two images in `directory` that are `tree` when one is laid over the other."""
    part = UPPER if (tree / UPPER).is_dir() else min(each.name for each in tree.iterdir() if each.is_dir())
    upper = directory / "upper"
    (upper / part).parent.mkdir(parents=True)
    try:
        subprocess.run(["cp", "-al", tree / part, upper / part], check=True)
        for each in Path(part).parents:
            shutil.copystat(tree / each, upper / each)
        return (
            make_erofs(upper, directory / "upper.erofs"),
            make_erofs(tree, directory / "lower.erofs", f"--exclude-path={part}"),
        )
    finally:
        shutil.rmtree(upper)


def make_disk(file_system: Path, image: Path) -> Path:
    """Make a disk image with one partition, for the root file system."""
    build_disk(image, [Part("root", size=file_system.stat().st_size)])
    with file_system.open("rb") as source, image.open("r+b") as target:
        target.seek(FIRST)
        shutil.copyfileobj(source, target, 1 << 20)
    return image


def mount_buffered(disk: Path, directory: Path) -> Path:
    """Mount a file system that has `disk` and cannot do direct I/O; return where the disk image is there."""
    image, place = directory / "buffered.squashfs", directory / "buffered"
    subprocess.run(["mksquashfs", disk, image, *MKSQUASHFS], check=True, capture_output=True)
    place.mkdir(mode=0o755)
    # Its own device does, so that nothing is cached that the others have not.
    found = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", "--direct-io=on", image],
        check=True,
        capture_output=True,
        text=True,
    )
    device = found.stdout.strip()
    try:
        subprocess.run(["mount", "-t", "squashfs", "-o", "ro", device, place], check=True)
    finally:
        # It stays for as long as it is mounted.
        subprocess.run(["losetup", "--detach", device], check=True)
    return place / disk.name


def make_images(tree: Path, directory: Path) -> Images:
    """Make them all in `directory`, which a rule trusts; what is mounted is in this mount namespace."""
    erofs = make_erofs(tree, directory / "tree.erofs")
    disk = make_disk(erofs, directory / "tree.disk")
    layers = make_layers(tree, directory)
    buffered = mount_buffered(disk, directory)
    composefs, objects = directory / "tree.composefs", directory / "objects"
    if shutil.which(MKCOMPOSEFS):
        command = [MKCOMPOSEFS, "--user-xattrs", f"--digest-store={objects}", str(tree), str(composefs)]
        subprocess.run(command, check=True, capture_output=True)
        composefs.chmod(0o644)
    os.sync()
    room = Part("root", size=erofs.stat().st_size).room
    return Images(tree, erofs, layers, disk, buffered, composefs, objects, FIRST, room)
