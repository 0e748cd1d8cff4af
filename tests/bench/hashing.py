"""How fast an image is hashed, next to sha256sum(1) on the same file in the same run."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mountd.evidence.digest import sha256_of
from mountd.fds import OwnedFd

SIZE = (64 if "--quick" in sys.argv else 512) << 20
ROUNDS = 5
RATIO = 0.7  # of sha256sum's speed


def ratio(path: Path, size: int, rounds: int) -> tuple[float, float, float]:
    """Return how fast mountd is relative to sha256sum, and the seconds of both, as medians of `rounds`.

    They take turns, so that what else the machine does hits both. Raises AssertionError for another digest.
    """
    own: list[float] = []
    others: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        with OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
            digest = sha256_of(fd.fileno(), size, lambda done: None)
        own.append(time.perf_counter() - start)
        start = time.perf_counter()
        done = subprocess.run(["sha256sum", path], check=True, capture_output=True, text=True)
        others.append(time.perf_counter() - start)
        assert digest == f"sha256:{done.stdout.split()[0]}"
    mine, theirs = statistics.median(own), statistics.median(others)
    return theirs / mine, mine, theirs


def build(path: Path, size: int) -> None:
    """Write a file of random bytes, so that it is in the page cache."""
    with path.open("wb") as file:
        for _ in range(0, size, 1 << 20):
            file.write(os.urandom(1 << 20))


def main() -> int:
    """Print both speeds and their ratio; fail below RATIO."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "image"
        build(path, SIZE)
        found, mine, theirs = ratio(path, SIZE, ROUNDS)
    for name, seconds in (("mountd", mine), ("sha256sum", theirs)):
        print(f"{name:<12}{SIZE / seconds / (1 << 20):>8.0f} MiB/s")
    print(f"{'ratio':<12}{found:>8.2f}  (at least {RATIO})")
    return 0 if found >= RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
