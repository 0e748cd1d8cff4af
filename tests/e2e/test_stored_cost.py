"""What a signature and the store add to a warm mount, as a ratio, which a busy machine leaves as it is."""

from __future__ import annotations

import statistics
from pathlib import Path

from tests.bench.stored import LOCATION, SIGNED, STORED, measure

ROUNDS = 150
# A process that is made for a request, or a file that is hashed anew, costs far more than that.
MOST = {STORED: 1.5, SIGNED: 2.5}


def test_a_warm_mount_of_a_stored_image(place: Path, images: dict[str, Path]) -> None:
    times = measure(place / "stored-cost", images["erofs"], ROUNDS)
    # The lower quarter of each: what others do at the same time hits the upper ones.
    usual = {name: statistics.quantiles(each, n=4)[0] for name, each in times.items()}
    for name, most in MOST.items():
        assert usual[name] <= most * usual[LOCATION], usual
