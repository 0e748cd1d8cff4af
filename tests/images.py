"""Building file system images with the tools that users have."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

MIB = 1 << 20
NEEDED = {"ext4": 8 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}


def build_tree(path: Path) -> Path:
    """Fill `path`: files of several owners, a directory, a set-uid file and a device node."""
    path.mkdir()
    (path / "hello").write_text("hello from the image\n")
    (path / "bin").mkdir()
    (path / "bin/suid").write_bytes(Path("/bin/true").read_bytes())
    (path / "bin/suid").chmod(0o4755)
    os.mknod(path / "null", stat.S_IFCHR, os.makedev(1, 3))
    (path / "null").chmod(0o666)
    (path / "owned").write_text("by 1000\n")
    os.chown(path / "owned", 1000, 1000)
    path.chmod(0o755)
    return path


def build_image(type: str, tree: Path, image: Path) -> Path:
    """Make `image` from `tree` as a file system of `type`, root-owned and mode 0644."""
    if type in NEEDED:
        with image.open("wb") as file:
            file.truncate(NEEDED[type])
    commands = {
        "erofs": ["mkfs.erofs", str(image), str(tree)],
        "squashfs": ["mksquashfs", str(tree), str(image), "-noappend", "-quiet", "-no-progress"],
        "ext4": ["mkfs.ext4", "-q", "-F", "-d", str(tree), str(image)],
        "xfs": ["mkfs.xfs", "-q", "-f", str(image)],
        "btrfs": ["mkfs.btrfs", "-q", "-f", "--rootdir", str(tree), str(image)],
    }
    subprocess.run(commands[type], check=True, capture_output=True)
    if type == "xfs":
        fill_xfs(tree, image)
    image.chmod(0o644)
    return image


def fill_xfs(tree: Path, image: Path) -> None:
    """Copy `tree` into an xfs, for which mkfs has no option that takes a directory."""
    script = 'mount -o loop "$1" "$3"; cp -a "$2/." "$3"; umount "$3"; rmdir "$3"'
    target = image.with_suffix(".mnt")
    target.mkdir()
    subprocess.run(["bash", "-euc", script, "fill", image, tree, target], check=True)
