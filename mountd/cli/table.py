"""Tables that fit the terminal."""

from __future__ import annotations

import os
import sys

from mountd.cli.report import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

GAP = "  "
NARROWEST = 10  # columns that a cell is not cut below
COLUMNS = "COLUMNS"
MAXIMUM_DIGITS = 6  # of a number of columns that anybody means
BOLD, RED, YELLOW, GREEN, END = "\x1b[1m", "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[0m"


def table(
    rows: list[list[str]],
    head: list[str],
    *,
    width: int | None,
    colour: bool,
    whole: Collection[str] = (),
    spare: Sequence[str] | None = None,
) -> str:
    """Return the rows below their head, in columns; no newline at the end.

    `width` is how many columns the terminal has, None for no bound: then nothing is cut. What does not fit
    is cut from the widest columns, and ends in “…”; never from those whose heads are in `whole`. Where cut
    columns do not fit either, those in `spare` are left out, in that order; without it the last, one by one.
    What is wider than the terminal then, is so.
    """
    cells = [[printable(cell) for cell in row] for row in [head, *rows]]
    widths = [max(columns_of(row[column]) for row in cells) for column in range(len(head))]
    uncut = [name in whole for name in head]
    shown = list(range(len(head)))
    if width is not None:
        shown = those_with_room(widths, uncut, width, [head.index(name) for name in spare or head[:0:-1]])
        room = width - len(GAP) * (len(shown) - 1)
        while sum(widths[column] for column in shown) > room:
            widest = max(shown, key=lambda column: 0 if uncut[column] else widths[column])
            if uncut[widest] or widths[widest] <= 1:
                break
            widths[widest] -= 1
    lines = []
    for number, row in enumerate(cells):
        fitted = [filled(cut(row[column], widths[column]), widths[column]) for column in shown]
        line = GAP.join(fitted).rstrip()
        lines.append(f"{BOLD}{line}{END}" if colour and number == 0 else line)
    return "\n".join(lines)


def those_with_room(
    widths: Sequence[int], uncut: Sequence[bool], width: int, spare: Sequence[int]
) -> list[int]:
    """Return which columns to show: all that fit, with none of them cut below what is still of use."""
    least = [size if kept else min(size, NARROWEST) for size, kept in zip(widths, uncut, strict=True)]
    shown = list(range(len(widths)))
    for each in spare:
        if sum(least[column] for column in shown) + len(GAP) * (len(shown) - 1) <= width:
            break
        shown.remove(each)
    return shown


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for a wide character, none for an accent."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    return sum(
        0 if category(each) in ("Mn", "Me") else 2 if east_asian_width(each) in ("W", "F") else 1
        for each in text
    )


def filled(text: str, columns: int) -> str:
    """Return a text with as many blanks behind it as there is room for."""
    return text + " " * (columns - columns_of(text))


def cut(text: str, columns: int) -> str:
    """Return as much of a text as fits."""
    if columns_of(text) <= columns:
        return text
    room, kept = max(0, columns - 1), 0
    for each in text:
        room -= columns_of(each)
        if room < 0:
            break
        kept += 1
    return text[:kept] + "…"


def on_terminal() -> bool:
    """Tell whether standard output is a terminal."""
    try:
        return sys.stdout is not None and sys.stdout.isatty()
    except (OSError, ValueError):
        return False


def terminal_width() -> int | None:
    """Return how many columns a table may have, None for any number.

    As the environment has it (COLUMNS), wherever standard output leads; else as the terminal has.
    """
    wanted = os.environ.get(COLUMNS, "")
    if wanted.isascii() and wanted.isdecimal() and len(wanted) <= MAXIMUM_DIGITS and int(wanted):
        return int(wanted)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None if on_terminal() else None
    except (OSError, ValueError):
        return None


def wants_colour() -> bool:
    """Tell whether standard output is a terminal whose user wants colours (no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return False
    return on_terminal()


def coloured(text: str, colour: str, *, wanted: bool) -> str:
    """Return a text in a colour, if that is wanted."""
    return f"{colour}{text}{END}" if wanted else text
