"""What is changed in a stack that can be written to, and what that looks like on the disk."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from tests.e2e.calls import errno_of

SETUID = 0o4755
FILE_CAPABILITY = bytes.fromhex("01000002" + "00200000" + "00" * 12)  # cap_net_raw+ep, of version 2


def change(top: Path) -> dict[str, object]:
    """Change whatever can be, as root, and tell how that was."""
    with (top / "etc/passwd").open("a") as file:
        file.write(" changed")
    (top / "new").write_text("new")
    (top / "gone").unlink()
    shutil.rmtree(top / "dir")
    (top / "dir").mkdir()
    (top / "dir/mine").write_text("mine")
    return {
        "passwd": (top / "etc/passwd").read_text(),
        "dir": sorted(os.listdir(top / "dir")),
        "mode": stat.S_IMODE((top / "suid").stat().st_mode),
        "renamed": errno_of(lambda: (top / "etc").rename(top / "moved")),
        "device": errno_of(lambda: os.utime(top / "device")),
        "made device": errno_of(lambda: os.mknod(top / "null", stat.S_IFCHR, os.makedev(1, 3))),
        "capability": errno_of(lambda: os.setxattr(top / "new", "security.capability", FILE_CAPABILITY)),
        "trusted": errno_of(lambda: os.setxattr(top / "new", "trusted.overlay.redirect", b"/etc")),
        "both": (top / "both").read_text(),
    }


CHANGED = {
    "passwd": "below changed",
    "dir": ["mine"],
    "mode": SETUID,
    "renamed": "EXDEV",
    "device": "EPERM",
    "made device": "EPERM",
    "capability": "",
    "trusted": "EPERM",
    "both": "above",
}


def on_disk(upper: Path) -> dict[str, tuple[int, int, int]]:
    """Type, uid and gid of all that lies below."""
    found = {}
    for path in sorted(upper.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(upper))] = (
            stat.S_IFMT(status.st_mode),
            status.st_uid,
            status.st_gid,
        )
    return found
