"""Which partition is the root: what clients are told where it is none, one or several."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from mountd.errors import AmbiguousRoot, InvalidImage
from mountd.source.confined import recognise_source
from mountd.source.partition_types import GENERIC
from tests.daemon import Daemon
from tests.disks import Part, build_disk
from tests.e2e.calls import mount, outcome
from tests.e2e.mountfs.calls import INTERFACE, asked, opened, refusal

SEVERAL = f"{INTERFACE}.MultipleRootPartitionsFound"
NONE = f"{INTERFACE}.RootPartitionNotFound"
HIDDEN = "GUID:63"  # no-auto


def part(images: dict[str, Path], kind: str, **fields: Any) -> Part:
    """A partition, “generic” by its type only."""
    if kind == "generic":
        fields["type"], kind = GENERIC, "home"
    return Part(kind, images["erofs"], **fields)


def built(place: Path, images: dict[str, Path], name: str, *parts: Part) -> Path:
    return build_disk(place / f"trusted/roots-{name}.raw", list(parts))


@pytest.mark.parametrize("more", [[], ["home"], ["generic", "srv"]])
def test_several_could_be(serving: Daemon, place: Path, images: dict[str, Path], more: list[str]) -> None:
    kinds = ["generic", "generic", *more]
    image = built(place, images, "several" + "".join(more), *(part(images, kind) for kind in kinds))
    with contextlib.ExitStack() as stack:
        fd = opened(stack, image)
        for policy in (None, "root=open:home=open"):
            name, said = refusal(serving, "MountImage", [fd], imageFileDescriptor=0, imagePolicy=policy)
            assert (name, "several partitions" in said["reason"]) == (SEVERAL, True)
        # The same from where an image is read that nobody vouches for.
        with pytest.raises(AmbiguousRoot):
            recognise_source(fd, os.fstat(fd).st_size, confined=True)
        with pytest.raises(AmbiguousRoot):
            recognise_source(fd, os.fstat(fd).st_size, confined=False)
    # Clients of mountd's own interface know it as what it is.
    name, text = outcome(lambda: mount(serving.socket, image))
    assert (name, "several partitions" in text) == (InvalidImage.wire_name, True)


@pytest.mark.parametrize(
    ("kinds", "number"),
    [
        (["generic"], 1),
        (["home", "generic"], 2),
        # What has the type for it is the root, and others do not matter.
        (["generic", "generic", "root"], 3),
        (["root", "generic"], 1),
    ],
)
def test_one_is(
    serving: Daemon, place: Path, images: dict[str, Path], kinds: list[str], number: int
) -> None:
    image = built(place, images, "-".join(kinds), *(part(images, kind) for kind in kinds))
    with contextlib.ExitStack() as stack:
        fd = opened(stack, image)
        reply, _ = stack.enter_context(asked(serving, "MountImage", [fd], imageFileDescriptor=0))
        (root,) = (each for each in reply["partitions"] if each["designator"] == "root")
        assert root["partitionNumber"] == number


def test_one_that_is_hidden_does_not_count(serving: Daemon, place: Path, images: dict[str, Path]) -> None:
    parts = [part(images, "generic", attributes=HIDDEN), part(images, "generic")]
    image = built(place, images, "hidden", *parts)
    with contextlib.ExitStack() as stack:
        fd = opened(stack, image)
        reply, _ = stack.enter_context(asked(serving, "MountImage", [fd], imageFileDescriptor=0))
        assert [each["partitionNumber"] for each in reply["partitions"]] == [2]


def test_of_several_with_the_type_it_is_the_newest(
    serving: Daemon, place: Path, images: dict[str, Path]
) -> None:
    parts = [part(images, "root", label=label) for label in ("os_9", "os_10", "os_2")]
    image = built(place, images, "newest", *parts)
    with contextlib.ExitStack() as stack:
        fd = opened(stack, image)
        reply, _ = stack.enter_context(asked(serving, "MountImage", [fd], imageFileDescriptor=0))
        assert [each["partitionLabel"] for each in reply["partitions"]] == ["os_10"]


@pytest.mark.parametrize("kinds", [["home"], ["home", "srv"], ["swap"]])
def test_none_is(serving: Daemon, place: Path, images: dict[str, Path], kinds: list[str]) -> None:
    image = built(place, images, "none-" + "-".join(kinds), *(part(images, kind) for kind in kinds))
    with contextlib.ExitStack() as stack:
        fd = opened(stack, image)
        assert refusal(serving, "MountImage", [fd], imageFileDescriptor=0)[0] == NONE
