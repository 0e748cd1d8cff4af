"""Disk images by the mkosi(1) of Debian 13, which are built once for each state of project/."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).parent
SECONDS = "300"  # a fraction of it, with what there is to download
CERTIFICATE = "mkosi.crt"
SIGNER = "CN=mkosi of root"  # as all have it who let mkosi make their key
HELLO, SRV = "hello from mkosi\n", "hello from srv\n"
# What there is of an image in files of its own, one for each partition.
ROOT, HASHES, SIGNATURE = (f"root-x86-64{end}" for end in ("", "-verity", "-verity-sig"))
# What it takes to mount the images that are signed, and one of them by its partitions.
SIGNED = (
    *(CERTIFICATE, "portable.raw", "signed.raw"),
    *(f"portable.{part}.raw" for part in (ROOT, HASHES, SIGNATURE)),
)


def build() -> Path:
    """Return the directory of the images, which is another user's to read only where it is copied to."""
    command = ["timeout", SECONDS, HERE / "build_images"]
    return Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())


def copy(image: Path, directory: Path, owner: int = 0) -> Path:
    """Copy a file of these to where it may be read, without filling its holes."""
    made = directory / image.name
    subprocess.run(["cp", "--sparse=always", image, made], check=True)
    subprocess.run(["chown", f"{owner}:{owner}", made], check=True)
    made.chmod(0o644)
    return made
