"""Which of two versions is the newer one (UAPI.10, Version Format Specification)."""

from __future__ import annotations

import re
from functools import cmp_to_key
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SKIPPED = re.compile(r"[^A-Za-z0-9.~^-]*")
DIGITS = re.compile(r"[0-9]*")
LETTERS = re.compile(r"[A-Za-z]*")
# Each of these makes a string the lower one of two where the other does not have it: the tilde before it is
# asked whether one has ended, the rest after that.
BEFORE_END, AFTER_END = "~", "-^."


def compare(first: str, second: str) -> int:
    """Return a number below, at or above 0, as `first` is the older, the same or the newer version."""
    while True:
        first, second = first[_end(SKIPPED, first) :], second[_end(SKIPPED, second) :]
        for mark in BEFORE_END:
            if first.startswith(mark) or second.startswith(mark):
                break
        else:
            if not first or not second:
                return bool(first) - bool(second)
            mark = next((each for each in AFTER_END if each in (first[0], second[0])), "")
        if mark:
            if not (first.startswith(mark) and second.startswith(mark)):
                return -1 if first.startswith(mark) else 1
            first, second = first[1:], second[1:]
            continue
        pattern = DIGITS if first[0].isdigit() or second[0].isdigit() else LETTERS
        one, two = first[: _end(pattern, first)], second[: _end(pattern, second)]
        if pattern is DIGITS:
            key_one, key_two = _number(one), _number(two)
        else:
            key_one, key_two = (0, one), (0, two)
        if key_one != key_two:
            return -1 if key_one < key_two else 1
        first, second = first[len(one) :], second[len(two) :]


key: Callable[[str], object] = cmp_to_key(compare)


def _end(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.match(text)
    return found.end() if found is not None else 0


def _number(digits: str) -> tuple[int, str]:
    """Return what orders a row of digits as its number, however long it is."""
    plain = digits.lstrip("0")
    return len(plain), plain
