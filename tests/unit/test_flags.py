"""The kernel's flags work with every Python that mountd supports."""

from __future__ import annotations

from enum import IntFlag

import pytest

from mountd.kernel import flags, moving, paths
from mountd.kernel.flags import AtFlags, MoveMount, StatxMask, Unmount

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


def test_numbers_without_a_name_are_those_with_one() -> None:
    """What mount(8) calls has them as numbers, so as not to load the enumerations."""
    assert moving.ATTACH == MoveMount.F_EMPTY_PATH | MoveMount.T_EMPTY_PATH
    assert (moving.FORCE, moving.DETACH, moving.NOFOLLOW) == (
        Unmount.FORCE,
        Unmount.DETACH,
        Unmount.NOFOLLOW,
    )
    assert moving.ITSELF_AS_KNOWN == AtFlags.EMPTY_PATH | AtFlags.STATX_DONT_SYNC
    assert (moving.BASIC_STATS, moving.MNT_ID_UNIQUE) == (StatxMask.BASIC_STATS, StatxMask.MNT_ID_UNIQUE)
    assert moving.MOUNT_ROOT == paths.STATX_ATTR_MOUNT_ROOT
