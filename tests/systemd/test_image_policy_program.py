"""What is recorded about systemd's reading of image policies is what the systemd of this root says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.systemd.machine import HERE
from tests.unit.trust.test_image_policy_texts import TEXTS, Told

IGNORED = ["ignore", "-", "-"]


@pytest.fixture(scope="module")
def root() -> Path:
    """The Debian root, which is only read."""
    built = subprocess.run([HERE / "build_root"], stdout=subprocess.PIPE, text=True, check=True)
    return Path(built.stdout.strip())


def ask(root: Path, text: str) -> Told | None:
    """What systemd-analyze prints about a policy, None if it refuses it."""
    command = ["chroot", root, "systemd-analyze", "image-policy", "--", text]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        assert "image policy" in done.stderr, done.stderr
        return None
    rows = [line.split() for line in done.stdout.partition("PARTITION")[2].splitlines()[1:]]
    return {name: " ".join(rest) for name, *rest in rows if rest != IGNORED and name != "default"}


def test_the_record_is_true(root: Path) -> None:
    assert {text: ask(root, text) for text, _ in TEXTS} == dict(TEXTS)
