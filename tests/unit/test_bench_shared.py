"""What the measurement of a second mount says about itself: a bound only where it is held to one."""

from __future__ import annotations

import pytest

from tests.bench.shared import ALONE, ASKED, HELD, RATIOS, judged


@pytest.mark.parametrize(
    ("type", "asked", "alone", "good"),
    [
        ("erofs", 0.5, 0.5, True),
        ("erofs", 0.51, 0.1, False),
        ("erofs", 0.1, 0.51, False),
        ("erofs", 0.6, 0.6, False),
        ("xfs", 0.3, 0.02, True),
        ("xfs", 0.01, 0.03, False),
    ],
)
def test_each_that_is_held_counts(type: str, asked: float, alone: float, good: bool) -> None:
    for ratios in ({ASKED: asked, ALONE: alone}, {ALONE: alone, ASKED: asked}):
        lines, held = judged(type, ratios)
        assert held is good
        assert any("FAILED" in line for line in lines) is not good


def test_what_is_said() -> None:
    (asked, alone), _ = judged("xfs", {ASKED: 0.3, ALONE: 0.0111})
    assert asked.endswith("0.300; misses 0.02, and is not held to it; the mount alone: 0.011")
    assert alone.endswith("0.011; held to at most 0.02: good")
    (asked, _), _ = judged("xfs", {ASKED: 0.01, ALONE: 0.01})
    assert asked.endswith("medians: 0.010")


def test_only_the_asking_for_an_xfs_is_not_held() -> None:
    every = {(type, name) for type in RATIOS for name in (ASKED, ALONE)}
    assert every - HELD == {("xfs", ASKED)}
