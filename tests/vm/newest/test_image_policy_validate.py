"""What is recorded about which images systemd allows is what the systemd of this machine says."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from tests.disks import MIB, Part, build_disk
from tests.unit.trust.test_image_policy_answers import IMAGES, POLICIES, Told

LUKS = b"LUKS\xba\xbe\0\1" + bytes(MIB)
EVERY = 6  # as the processor of the machine is emulated
ATTRIBUTES = {"read-only": "GUID:60", "growfs": "GUID:59"}
DATA, HASHES = uuid.UUID("1" * 32), uuid.UUID("2" * 32)
SIGNATURE = json.dumps({"rootHash": DATA.hex + HASHES.hex, "signature": "eA=="}).encode()


@pytest.fixture(scope="module")
def contents(scratch: Path) -> dict[str, bytes]:
    """What the partitions hold, by the words of the record; hash data are not looked at."""
    work = scratch / "contents"
    (work / "tree").mkdir(parents=True)
    subprocess.run(["mkfs.erofs", "--quiet", work / "image", work / "tree"], check=True)
    made = {"erofs": (work / "image").read_bytes(), "luks": LUKS, "signature": SIGNATURE, "": b""}
    shutil.rmtree(work)
    return made


def part(told: Told, others: set[str], contents: dict[str, bytes]) -> Part:
    """One partition of the record."""
    name = told["for"]
    protected = any(other.startswith(f"{name}-verity") for other in others)
    made = Part(
        name,
        contents[told.get("contents", "")],
        uuid=str(HASHES if name.endswith("-verity") else DATA) if protected or "verity" in name else None,
        label=told.get("label", ""),
        attributes=ATTRIBUTES.get(told.get("flag", ""), ""),
    )
    if name.endswith("-sig"):
        return replace(made, uuid=None)
    return replace(made, architecture=told["architecture"]) if "architecture" in told else made


@pytest.mark.parametrize("number", range(len(IMAGES)))
def test_the_record_is_true(scratch: Path, contents: dict[str, bytes], number: int) -> None:
    """Of each image it asks some of the policies, another part from one to the next."""
    image, (parts, answers) = scratch / "policies.raw", IMAGES[number]
    others = {told["for"] for told in parts}
    build_disk(image, [part(told, others, contents) for told in parts])
    command = ["systemd-dissect", "--validate", image]
    some = slice(number % EVERY, None, EVERY)
    done = {
        each: subprocess.run([*command, f"--image-policy={each}"], capture_output=True)
        for each in POLICIES[some]
    }
    image.unlink()
    found = {policy: "-" if each.returncode else "+" for policy, each in done.items()}
    assert found == dict(zip(POLICIES[some], answers[some], strict=True))
