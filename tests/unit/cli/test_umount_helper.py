"""The command line of umount.mountd."""

from __future__ import annotations

import pytest

from mountd.cli.report import UsageError
from mountd.cli.umount_helper import Wishes

USUAL = {
    "directory": "dir", "lazy": False, "force": False, "verbose": False, "json": False, "namespace": None,
}  # fmt: skip


def parse(argv: list[str]) -> Wishes:
    wishes = Wishes()
    wishes.read(argv)
    return wishes


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("dir", {}),
        ("dir -n -l -f -v -r -t mountd.erofs -N /proc/7/fd/3", {
            "lazy": True, "force": True, "verbose": True, "namespace": "/proc/7/fd/3",
        }),
        ("-lv dir", {"lazy": True, "verbose": True}),
        ("dir -r -n -t erofs", {}),
    ],
)  # fmt: skip
def test_parse(line: str, changed: dict[str, object]) -> None:
    assert vars(parse(line.split())) == USUAL | changed


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "DIR is needed"),
        ("dir more", "nothing else"),
        ("dir -x", "option -x not recognized"),
        ("dir -N", "option -N requires argument"),
    ],
)
def test_wrong_usage(line: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        parse(line.split())
