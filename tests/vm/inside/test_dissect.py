"""The same images and policies, judged by systemd-dissect(1) and by us."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from mountd.errors import MountdError
from mountd.fds import OwnedFd
from mountd.source.confined import recognise_source
from mountd.source.model import Disk
from mountd.trust import image_policy
from mountd.trust.partitions import uses
from tests.disks import Part, build_disk, protected
from tests.images import build_image, build_tree
from tests.verity import Verified
from tests.vm.inside.test_udev import udev

__all__ = ["udev"]

POLICIES = (
    "*",
    "-",
    "~",
    "root=unprotected",
    "root=open:=absent",
    "root=open:=unused+absent",
    "root=verity",
    "root=signed",
    "root=verity+signed:home=open",
    "root=signed+unprotected",
    "root=encrypted",
    "root=unprotected:home=unprotected",
    "root=unprotected:home=unused",
    "root=unprotected:home=absent",
    "root=unprotected:usr=unprotected",
    "root=unprotected+read-only-on",
    "root=unprotected+read-only-off",
    "root=unprotected+growfs-on:=open",
    "root=unprotected:root-verity=absent",
    "root=unprotected:root-verity=unused",
    "root=absent:home=open",
    "=open",
    "root=-:home=ignore",
    " root = unprotected + verity := ignore ",
    "root=open:home=verity",
    "root=signed:root-verity=verity",
)


@pytest.fixture(scope="module")
def disks(scratch: Path, verified: dict[str, Verified]) -> dict[str, Path]:
    work = scratch / "dissect"
    work.mkdir()
    ext4 = build_image("ext4", build_tree(work / "tree"), work / "ext4.img")
    source = verified["erofs"]
    home = Part("home", ext4)
    two = [Part("root", ext4, label="os_1.9"), Part("root", ext4, label="os_1.10")]
    parts = {
        "plain": [Part("root", ext4)],
        "home": [Part("root", ext4), home, Part("swap")],
        "flags": [Part("root", ext4, attributes="GUID:60"), Part("home", ext4, attributes="GUID:59")],
        "hidden": [Part("root", ext4), Part("home", ext4, attributes="GUID:63")],
        "versions": [*two, Part("root", ext4, label="os_1.2"), home, home],
        "other architecture": [Part("root", ext4, architecture="x86"), Part("root", ext4)],
        "signed": [*protected(source, b"signature"), home],
        "verity": protected(source),
    }
    return {name: build_disk(work / f"{name}.raw", each) for name, each in parts.items()}


def ours(image: Path) -> Disk:
    with OwnedFd(os.open(image, os.O_RDONLY)) as fd:
        found = recognise_source(fd.fileno(), image.stat().st_size, confined=False)
    assert isinstance(found, Disk)
    return found


def is_allowed(disk: Disk, policy: str) -> bool:
    signed = frozenset(
        each.designator for each in disk.partitions if each.verity is not None and each.verity.signature
    )
    try:
        return bool(uses(disk, image_policy.parse(policy), signed, read_only=True))
    except MountdError:
        return False


def dissect(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-dissect", "--no-pager", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.usefixtures("udev")
def test_the_same_partitions(disks: dict[str, Path]) -> None:
    for name, image in disks.items():
        done = dissect("--json=short", image)
        assert done.returncode == 0, (name, done.stderr)
        told = json.loads(done.stdout)["mounts"]
        theirs = {(each["designator"], each["partition_uuid"]) for each in told}
        assert {(each.designator, each.uuid) for each in ours(image).partitions} == theirs, name


@pytest.mark.usefixtures("udev")
def test_the_same_policies(disks: dict[str, Path]) -> None:
    different = {}
    for name, image in disks.items():
        disk = ours(image)
        for policy in POLICIES:
            done = dissect("--validate", f"--image-policy={policy}", image)
            if (done.returncode == 0) is not is_allowed(disk, policy):
                different[name, policy] = done.stderr.strip()[-200:] or "allowed"
    assert different == {}, "\n".join(f"{key}: {value}" for key, value in different.items())
