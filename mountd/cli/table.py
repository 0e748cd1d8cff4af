"""Tables that fit the terminal."""

from __future__ import annotations

import os
import sys

from mountd.cli.report import printable

GAP = "  "
NARROWEST = 6  # columns that a cell is not cut below
BOLD, RED, YELLOW, GREEN, END = "\x1b[1m", "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[0m"


def table(rows: list[list[str]], head: list[str], *, width: int | None, colour: bool) -> str:
    """Return the rows below their head, in columns; no newline at the end.

    `width` is how many columns the terminal has, None for no bound: then nothing is cut. What does not fit
    is cut from the widest columns, and ends in “…”.
    """
    cells = [[printable(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    if width is not None:
        room = max(width - len(GAP) * (len(head) - 1), len(head))
        while sum(widths) > room and max(widths) > NARROWEST:
            widths[widths.index(max(widths))] -= 1
    lines = []
    for number, row in enumerate(cells):
        fitted = [cut(cell, columns).ljust(columns) for cell, columns in zip(row, widths, strict=True)]
        line = GAP.join(fitted).rstrip()
        lines.append(f"{BOLD}{line}{END}" if colour and number == 0 else line)
    return "\n".join(lines)


def cut(text: str, columns: int) -> str:
    """Return as much of a text as fits."""
    return text if len(text) <= columns else text[: max(0, columns - 1)] + "…"


def terminal_width() -> int | None:
    """Return how many columns standard output has, None if it is no terminal."""
    try:
        if sys.stdout is None or not sys.stdout.isatty():
            return None
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):
        return None


def wants_colour() -> bool:
    """Tell whether standard output is a terminal whose user wants colours (no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return False
    return terminal_width() is not None


def coloured(text: str, colour: str, *, wanted: bool) -> str:
    """Return a text in a colour, if that is wanted."""
    return f"{colour}{text}{END}" if wanted else text
