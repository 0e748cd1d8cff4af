"""On which line of a TOML file a key stands: for messages, as far as it can be told from the text.

The parser of the standard library does not say where it found what. This looks for the usual ways of writing
a table, and gives the line of the innermost table that it finds; nothing but messages depends on it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    Path = Sequence[str | int]

OPAQUE = re.compile(
    r'"""(?:\\.|[^\\])*?"""|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL
)
HEADER = re.compile(r"^[ \t]*\[", re.MULTILINE)
SYNTAX_ERROR = re.compile(r"\(at line ([0-9]+), column [0-9]+\)")


def line_of(text: str, path: Path) -> int | None:
    """Return the line, from 1 on, of the key at `path`, or of the innermost part of it that is found.

    A path is that of pydantic: names, and numbers from 0 on for the elements of lists.
    """
    plain = OPAQUE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    start, end, position = 0, len(plain), None
    prefix = ""
    names = list(path)
    while names:
        name = names.pop(0)
        if not isinstance(name, str):
            break
        number = names[0] if names and isinstance(names[0], int) else None
        if number is not None:
            names.pop(0)
        prefix = f"{prefix}.{name}" if prefix else name
        found = table(plain, prefix, number, start, end) or value(plain, name, start, end)
        if found is None:
            # A table such as [key.NAME] needs no header for [key].
            if prefix == name and number is None and names:
                continue
            break
        position, start, end = found
    return None if position is None else plain.count("\n", 0, position) + 1


def table(plain: str, name: str, number: int | None, start: int, end: int) -> tuple[int, int, int] | None:
    """Return where the header of a table stands, and where its contents begin and end."""
    # The contents of the tables of a list go on to the next one, over the tables within.
    brackets = (r"\[", r"\]") if number is None else (r"\[\[", r"\]\]")
    header = re.compile(
        rf"^[ \t]*{brackets[0]}[ \t]*{re.escape(name)}[ \t]*{brackets[1]}[ \t]*$", re.MULTILINE
    )
    found = list(header.finditer(plain, start, end))
    index = number or 0
    if index >= len(found):
        return None
    if number is None:
        after = HEADER.search(plain, found[index].end(), end)
        stop = after.start() if after is not None else end
    else:
        outside = re.compile(rf"^[ \t]*\[(?![ \t]*{re.escape(name)}[ \t]*\.)", re.MULTILINE)
        following = outside.search(plain, found[index].end(), end)
        stop = following.start() if following is not None else end
    return found[index].start(), found[index].end(), stop


def value(plain: str, name: str, start: int, end: int) -> tuple[int, int, int] | None:
    """Return where a key stands, and where its value begins and ends."""
    # After a bracket, it is the name of a table.
    key = rf"(?<![\w.\[-]){re.escape(name)}[ \t]*[=.]"
    found = re.compile(rf"^[ \t]*{key}", re.MULTILINE).search(plain, start, end)
    found = found or re.compile(key).search(plain, start, end)
    if found is None:
        return None
    return found.start(), found.end(), end_of_value(plain, found.end(), end)


def end_of_value(plain: str, start: int, end: int) -> int:
    """Return where the value that begins at `start` ends: with its bracket, or else with its line."""
    depth = 0
    for position in range(start, end):
        character = plain[position]
        if character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
            if depth <= 0:
                return position
        elif character == "\n" and depth == 0:
            return position
    return end


def line_of_syntax_error(message: str) -> int | None:
    """Return the line that a message of tomllib names."""
    found = SYNTAX_ERROR.search(message)
    return int(found[1]) if found is not None else None
