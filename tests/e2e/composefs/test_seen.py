"""composefs: what is seen of images and descriptions, and what can be written over them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from mountd.client import Client
from mountd.evidence.fs_verity import digest_of
from mountd.fds import OwnedFd
from tests.container import in_container
from tests.daemon import Daemon
from tests.e2e.composefs.calls import ask, ask_as_user, refusal
from tests.e2e.composefs.listing import Told, by_mount_composefs, in_mount_namespace, listing
from tests.e2e.composefs.trees import BIG, DESCRIPTIONS, Trees
from tests.e2e.conftest import TMPFS_RULE, trusting


def test_root_sees_what_mount_composefs_shows(serving: Daemon, trees: Trees) -> None:
    wanted = by_mount_composefs(trees)
    assert wanted["/big"][5] == BIG
    assert len(wanted) == 11
    for source in (trees.image, trees.description):
        with ask(serving, source, trees.objects, digest=trees.digest) as reply:
            assert listing(reply.mount.fileno()) == wanted
            assert (reply.mounts[0]["fileSystemType"], reply.mounts[0]["readOnly"]) == ("overlay", True)


def test_the_digest_is_that_of_mkcomposefs(serving: Daemon, trees: Trees) -> None:
    with OwnedFd(os.open(trees.image, os.O_RDONLY)) as fd:
        assert digest_of(fd.fileno(), trees.image.stat().st_size) == trees.digest
    wrong = "0" * 64
    for source in (trees.image, trees.description):
        name, text = refusal(serving, source, trees.objects, digest=wrong)
        assert name == "InvalidImage"
        assert trees.digest in text
    assert refusal(serving, trees.image, trees.objects, digest="abc")[0] == "InvalidParameter"


def test_it_is_listed_and_taken_back(serving: Daemon, trees: Trees, own: Path) -> None:
    with ask_as_user(serving, trees.description, own) as reply, Client(str(serving.socket)) as client:
        listed = client.call("List", {"all": True}, [])[0]["mounts"]
        assert isinstance(listed, list)
        (found,) = [each for each in listed if each["id"] == reply.mounts[0]["id"]]
        assert (found["fileSystemType"], found["trustedBy"]) == ("overlay", "regenerated")
        assert (found["rule"], found["digest"]) == ("descriptions", reply.decision["digest"])
        told = client.call("io.mountd.Admin.Revoke", {"digest": found["digest"]}, [])[0]
        assert "held" in told


def test_a_top_takes_what_is_written(start: Callable[..., Daemon], trees: Trees, containers: None) -> None:
    """Over the image and over its description; what is in the objects stays as it is."""
    daemon = start(trusting(trees.place) + DESCRIPTIONS + TMPFS_RULE)
    before = {path: path.stat().st_mtime_ns for path in trees.objects.rglob("*")}

    def work() -> tuple[object, ...]:
        found: list[object] = []
        for source in (trees.image, trees.description):
            with ask(daemon, source, trees.objects, top="tmpfs:1M") as reply:
                top = Path(f"/proc/self/fd/{reply.mount.fileno()}")
                with (top / "big").open("ab") as file:
                    file.write(b"more")
                (top / "small").unlink()
                found.append((reply.mounts[0]["fileSystemType"], reply.mounts[0]["readOnly"]))
                found.append((top / "big").read_bytes() == BIG + b"more")
                found.append("small" in os.listdir(top))
        return tuple(found)

    assert in_container(work) == (("overlay", False), True, False) * 2
    assert {path: path.stat().st_mtime_ns for path in trees.objects.rglob("*")} == before


def test_on_the_command_line(serving: Daemon, trees: Trees, own: Path, installed: Path) -> None:
    def work() -> Told:
        command = [installed / "bin/mountctl", "mount", "--objects", trees.objects, "--digest", trees.digest]
        environment = {"PATH": os.environ["PATH"], "MOUNTD_SOCKET": str(serving.socket)}
        subprocess.run([*command, f"composefs:{trees.description}", "/mnt"], env=environment, check=True)
        return listing("/mnt")

    assert in_mount_namespace(work) == by_mount_composefs(trees)
