"""Stacks: what is refused, and that nothing is left of what was made by then."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mountd.fds import OwnedFd
from mountd.service.requests import MAXIMUM_LAYERS
from tests.container import as_user
from tests.daemon import Daemon
from tests.e2e.calls import Outcome, explain, mount_fds, outcome
from tests.e2e.loops import wait_until_dropped
from tests.e2e.stacks.calls import ask, refusal
from tests.e2e.trust import STORED, Case, Makers, digest_of, key_sections, source, users_file


def test_one_refused_layer_refuses_the_stack(serving: Daemon, layers: dict[str, Path], place: Path) -> None:
    stray = place / "stray-layer.raw"
    shutil.copy(layers["erofs"], stray)
    paths = [layers["ext4"], stray, layers["squashfs"]]
    name, text = refusal(serving, paths)
    assert name == "DeniedByPolicy"
    assert "source.layers[1]: " in text
    told = ask(serving, paths, method=explain)
    assert isinstance(told, dict)
    assert told["decision"]["verdict"] == "deny"
    assert told["decision"]["reason"].startswith("source.layers[1]: ")
    assert {step["reason"].split(":")[0] for step in told["steps"]} == {
        f"source.layers[{number}]" for number in range(3)
    }
    assert told["facts"]["layers"] == "3"
    assert told["facts"]["layers[2]: file system"] == "squashfs"
    wait_until_dropped(layers["ext4"])
    stray.unlink()


def test_numbers_and_kinds_of_layers(serving: Daemon, layers: dict[str, Path]) -> None:
    image = layers["erofs"]
    assert refusal(serving, [image])[0] == "InvalidParameter"
    reference = {"reference": "stored:sha256:" + "0" * 64}

    def refused(source: list[dict[str, object]]) -> Outcome:
        return outcome(lambda: mount_fds(serving.socket, {"layers": source}, []))

    assert refused([reference] * (MAXIMUM_LAYERS + 1))[0] == "LimitExceeded"
    for inner in ({"layers": [reference] * 2}, {"tmpfs": {"size": 4096}}, {}):
        name, text = refused([reference, inner])
        assert name == "InvalidParameter"
        assert "source.layers[1]" in text or not inner
    name, text = refused([reference] * 2)
    assert (name, "source.layers[0]" in text) == ("NotFound", True)
    assert refusal(serving, [image] * 2, readOnly=False)[0] == "NotSupported"
    assert refusal(serving, [image] * 2, fileSystemType="erofs")[0] == "InvalidParameter"


def test_an_image_twice_is_no_stack(serving: Daemon, layers: dict[str, Path]) -> None:
    """The kernel refuses an overlay of a directory on itself; nothing is left of what was made."""
    name, text = refusal(serving, [layers["ext4"]] * 2)
    assert name == "InvalidParameter"
    assert "source.layers: two of the layers are the same directory" in text
    wait_until_dropped(layers["ext4"])


def test_a_layer_that_cannot_be_mounted_leaves_nothing(
    serving: Daemon, layers: dict[str, Path], place: Path
) -> None:
    """The layers below it were made by then, or not begun."""
    broken = layers["erofs"].parent / "broken.raw"
    data = bytearray(layers["squashfs"].read_bytes())
    data[96:] = bytes(len(data) - 96)
    broken.write_bytes(data)
    name, text = refusal(serving, [layers["ext4"], broken])
    assert name in ("MountFailed", "InvalidImage"), text
    assert "source.layers[1]" in text
    wait_until_dropped(layers["ext4"])
    wait_until_dropped(broken)
    broken.unlink()


def test_a_refused_stack_leaves_no_copy_of_a_layer(
    begin: Callable[[str], Case], makers: Makers, place: Path, other: bytes
) -> None:
    """The first layer can be had by a copy in the store, the second one not at all."""
    case = begin(key_sections(makers.keys) + STORED)
    signature, of_other = (source(makers.own["ed25519"](each)) for each in (case.data, other))

    def work(second: dict[str, object]) -> Outcome:
        with (
            OwnedFd(os.open(path, os.O_RDONLY)) as fd,
            OwnedFd(os.open(stray, os.O_RDONLY)) as another,
        ):
            fds = [fd.fileno(), another.fileno()]
            above = {"layers": [signature, {**second, "imageFileDescriptor": 1}]}
            return outcome(lambda: mount_fds(case.daemon.socket, above, fds))

    with users_file(place, case.data) as path, users_file(place, other) as stray:
        name, text = as_user(lambda: work({}))
        assert name, text
        assert "source.layers[1]" in text
        assert case.stored() == []
        assert as_user(lambda: work(of_other)) == ("", "")
        assert case.stored() == sorted(digest_of(each) for each in (case.data, other))
