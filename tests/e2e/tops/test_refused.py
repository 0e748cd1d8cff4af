"""Stacks that can be written to: which tops are refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from tests.container import USER, as_user, in_container
from tests.daemon import Daemon
from tests.e2e.calls import Outcome
from tests.e2e.tops.calls import INNER_ROOT, MIB, refusal
from tests.e2e.tops.rules import READER
from tests.fuse import Fuse


def test_whose_directories_are_refused(
    serving: Daemon, images: list[Path], home: Path, place: Path, containers: None
) -> None:
    shown = place / "shown/one"
    shown.mkdir(parents=True)

    def refused(path: Path, **fields: object) -> Outcome:
        found = in_container(lambda: refusal(serving, images, path, **fields))
        assert os.listdir(path) == []
        return found

    name, text = refused(shown)
    assert (name, "never writable" in text, "source.top" in text) == ("OptionNotPermitted", True, True)
    os.chown(home, USER + 1, USER + 1)
    name, text = refused(home)
    assert (name, "source.top" in text) == ("DeniedByPolicy", True)
    os.chown(home, INNER_ROOT, INNER_ROOT)
    # A mapping of other ids on disk than the owner's.
    ranges = [{"first": 0, "target": 0, "count": 1}]
    wish = {"kind": "ranges", "uidRanges": ranges, "gidRanges": ranges}
    assert refused(home, idMap=wish)[0] == "DeniedByPolicy"
    shutil.rmtree(shown.parent)


def test_what_the_policy_does_not_grant(serving: Daemon, images: list[Path], home: Path) -> None:
    """The top needs a rule of its own kind, which grants to write; the layers need no more than to read."""
    os.chown(home, READER, READER)
    for top, error in ((MIB, "DeniedByPolicy"), (home, "OptionNotPermitted")):
        name, text = as_user(lambda top=top: refusal(serving, images, top, own=False), READER)  # type: ignore[misc]
        assert (name, "source.top" in text) == (error, True), text
    assert os.listdir(home) == []


def test_sizes_and_what_else_has_no_top(
    serving: Daemon, images: list[Path], place: Path, containers: None
) -> None:
    name, text = in_container(lambda: refusal(serving, images, 5 * MIB))
    assert name == "LimitExceeded", text
    for fields in ({"readOnly": True}, {"fileSystemType": "erofs"}, {"options": ["ro"]}):
        name, _ = in_container(lambda fields=fields: refusal(serving, images, MIB, **fields))  # type: ignore[misc]
        assert name == "InvalidParameter"
    assert in_container(lambda: refusal(serving, images, None))[0] == "NotSupported"
    # One without an id for its owner.
    name, _ = in_container(
        lambda: refusal(serving, images, MIB), uids=((0, INNER_ROOT, 1), (5, INNER_ROOT + 5, 9))
    )
    assert name == ""


def test_where_the_kernel_cannot_write(
    serving: Daemon, images: list[Path], home: Path, place: Path, containers: None
) -> None:
    def on_overlay() -> Outcome:
        with FsContext.open("overlay") as context:
            for name in ("lowerdir", "upperdir", "workdir"):
                (home / name).mkdir()
                context.set_string(name, str(home / name))
            context.create()
            with context.mount(MountAttr(0)) as mount:
                mount_api.move_mount(mount.fileno(), "/mnt")
        return refusal(serving, images, Path("/mnt"), idMap={"kind": "none"})

    def of_a_namespace() -> Outcome:
        with FsContext.open("tmpfs") as context:
            context.create()
            with context.mount(MountAttr(0)) as mount:
                mount_api.move_mount(mount.fileno(), "/mnt")
        found = refusal(serving, images, Path("/mnt"))
        return found if not os.listdir("/mnt") else ("left behind", "")

    name, text = in_container(on_overlay)
    assert (name, "overlay" in text) == ("NotSupported", True), (name, text)
    name, text = in_container(of_a_namespace)
    assert (name, "source.top" in text) == ("NotSupported", True), (name, text)
    with Fuse(place / "fuse-top", b"") as fuse:
        name, text = in_container(lambda: refusal(serving, images, fuse.target))
        assert (name, "FUSE" in text) == ("BadFileDescriptor", True), (name, text)
    (place / "fuse-top").rmdir()
