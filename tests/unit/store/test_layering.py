"""Which layers an image has, as it is written down."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mountd.errors import InvalidImage
from mountd.evidence.model import Provenance
from mountd.store import layering
from mountd.store.layering import PulledImage, key_of
from mountd.store.record import MAXIMUM_LAYERS, MAXIMUM_TEXT, NoRecord

ONE, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64
FROM = Provenance("registry.example.com/app", ONE, (ONE, OTHER), "signedBy", "team", 1)
PULLED = PulledImage(FROM, (OTHER, ONE))


def test_it_is_read_as_it_was_written() -> None:
    assert layering.parse(layering.serialise(PULLED)) == PULLED
    most = replace(FROM, layers=(ONE,) * MAXIMUM_LAYERS, requirement="é" * MAXIMUM_TEXT)
    large = PulledImage(most, (OTHER,) * MAXIMUM_LAYERS)
    assert layering.parse(layering.serialise(large)) == large


@pytest.mark.parametrize("stored", [(), (ONE,), (ONE,) * 3, (ONE, "sha256:1"), (ONE, "../" + ONE)])
def test_what_does_not_fit_the_manifest_is_not_written(stored: tuple[str, ...]) -> None:
    with pytest.raises(InvalidImage):
        layering.serialise(PulledImage(FROM, stored))


def test_anything_else_is_none() -> None:
    good = json.loads(layering.serialise(PULLED))
    bad: list[object] = [
        [], {}, {**good, "version": 2}, {**good, "version": True}, {**good, "more": 1},
        {**good, "stored": "x"}, {**good, "stored": [1, 2]}, {**good, "provenance": None},
        {**good, "provenance": {**good["provenance"], "layers": []}},
    ]  # fmt: skip
    for each in bad:
        with pytest.raises(NoRecord):
            layering.parse(json.dumps(each).encode())
    for data in (b"", b"\xff", b"{" * 100_000, b" " * (layering.MAXIMUM + 1)):
        with pytest.raises(NoRecord):
            layering.parse(data)


def test_a_name_has_one_place() -> None:
    assert key_of("a.example/b", ONE) != key_of("a.example/c", ONE)
    assert key_of("a.example/b", ONE) != key_of("a.example/b", OTHER)
    assert len(key_of("a.example/b", ONE)) == 64
