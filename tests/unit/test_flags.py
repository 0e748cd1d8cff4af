"""The kernel's flags work with every Python that mountd supports."""

from __future__ import annotations

from enum import IntFlag

import pytest

from mountd.kernel import flags

FLAGS = [each for each in vars(flags).values() if isinstance(each, type) and issubclass(each, IntFlag)]


@pytest.mark.parametrize(
    "flag", [each for each in FLAGS if each is not IntFlag], ids=lambda each: each.__name__
)
def test_every_bit_has_a_name(flag: type[IntFlag]) -> None:
    """Debian 12's Python 3.11.2 refuses to combine a member that has a bit without one."""
    members = flag.__members__.values()
    named = {int(each) for each in members if int(each).bit_count() == 1}
    for member in members:
        assert {1 << bit for bit in range(64) if member >> bit & 1} <= named, member
