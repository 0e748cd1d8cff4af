"""`make demo`: the main job, from an image to a container that has it mounted, in half a minute."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.container import RANGE, USER, in_container, mapper
from tests.daemon import ROOT, Daemon
from tests.images import build_image, build_tree

POLICY = """
[[rule]]
name = "images of the demo"
image = {{ location = "{}/*" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["erofs"], flags = ["nosuid", "nodev"], idmap = ["namespace"] }}
verdict = "allow"
"""

# What the container runs. $1: the image, $2: an empty directory, $3: a copy of the image that is its own.
IN_CONTAINER = r"""
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
try() { printf '$ %s\n' "$*"; "$@"; }
say "In a container: $(id -u) inside is uid $HOST_UID on the host, without any privilege there."
try mountctl mount "$1" "$2"
try ls -ln "$2"
try grep "$2" /proc/self/mountinfo
say "Its owners are the container's. The flags stay: taking nodev off is refused, a device does not open."
try mount -o remount,bind,ro,dev "$2" && exit 1
try cat "$2/null" && exit 1
say "A copy of the same image that belongs to the container is another matter."
try mountctl explain "$3"
try mountctl mount "$3" "$2" && exit 1
exit 0
"""


def heading(text: str) -> None:
    """Print what comes next."""
    print(f"\n\033[1m{text}\033[0m", flush=True)


def demonstrate(directory: Path) -> int:
    """Show it with all files in `directory`; return the exit status."""
    heading(f"An image in a directory that only root can write to: {directory}/trusted")
    trusted = directory / "trusted"
    trusted.mkdir(mode=0o755)
    image = build_image("erofs", build_tree(directory / "tree"), trusted / "base.raw")
    target = directory / "target"
    target.mkdir()
    copy = directory / "own/base.raw"
    copy.parent.mkdir()
    shutil.copy(image, copy)
    owner = RANGE[0][1]
    for path in (copy, copy.parent):
        os.chown(path, owner, owner)
    print(f"$ ls -ln {image}", flush=True)
    subprocess.run(["ls", "-ln", image], check=True)
    subprocess.run(["make", "-s", "install", f"PREFIX={directory}/usr"], cwd=ROOT, check=True)

    heading("mountd, with a rule that trusts it")
    policy = POLICY.format(trusted)
    print(policy.strip(), flush=True)
    daemon = Daemon(directory / "daemon", policy)
    environment = {
        "PATH": f"{directory}/usr/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "MOUNTD_SOCKET": str(daemon.socket),
        "HOST_UID": str(owner),
    }

    def work() -> int:
        command = ["sh", "-c", IN_CONTAINER, "demo", str(image), str(target), str(copy)]
        return subprocess.run(
            command, env=environment, cwd="/", stderr=subprocess.STDOUT, check=False
        ).returncode

    try:
        with mapper():
            status = in_container(work, owner=USER)
    finally:
        daemon.stop()
    heading("What the daemon wrote:")
    print(daemon.log, end="", flush=True)
    return status


def main() -> int:
    """Run the demo and leave nothing."""
    if os.geteuid() != 0:
        print("demo: mountd and its images are root's; run make demo as root", file=sys.stderr)
        return 1
    directory = Path(tempfile.mkdtemp(prefix="mountd-demo-", dir="/var/lib"))
    directory.chmod(0o755)
    try:
        status = demonstrate(directory)
    finally:
        shutil.rmtree(directory)
    heading("Done." if status == 0 else "Something was not as it should be.")
    return status


if __name__ == "__main__":
    sys.exit(main())
