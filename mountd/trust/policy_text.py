"""A policy as text again: what `mountctl policy show` prints, which is a policy file itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mountd.trust.policy_file import Loaded, Placed


def entries(loaded: Loaded) -> list[dict[str, object]]:
    """Return the keys and rules of a policy, in order, each with its origin and its table as it was written.

    For programs: `file`, `line` (None if it is not known), and either `key` with its name or `rule` with its
    number in the file.
    """
    keys = [{**origin(placed), "key": name, "table": table(placed)} for name, placed in loaded.keys.items()]
    rules = [
        {**origin(placed), "rule": int(placed.path[1]) + 1, "table": table(placed)}
        for placed in loaded.rules.values()
    ]
    return [*keys, *rules]


def origin(placed: Placed) -> dict[str, object]:
    """Return where a table was written."""
    return {"file": placed.drop_in.file, "line": placed.line}


def table(placed: Placed) -> dict[str, object]:
    """Return a table as it was written, in the words of the file."""
    return placed.table.model_dump(mode="json", by_alias=True, exclude_unset=True)


def as_toml(loaded: Loaded) -> str:
    """Return the whole policy as one TOML file, with comments that say where each part comes from."""
    parts = []
    for entry in entries(loaded):
        line = "" if entry["line"] is None else f":{entry['line']}"
        header = f"[key.{string(str(entry['key']))}]" if "key" in entry else "[[rule]]"
        body = entry["table"] if isinstance(entry["table"], dict) else {}
        assignments = [f"{bare(key)} = {value(each)}" for key, each in body.items()]
        parts.append("\n".join([f"# {entry['file']}{line}", header, *assignments]))
    return "\n\n".join(parts)


def value(each: object) -> str:
    """Return one value in TOML."""
    if isinstance(each, bool | int):
        return json.dumps(each)
    if isinstance(each, list):
        return "[" + ", ".join(map(value, each)) + "]"
    if isinstance(each, dict):
        inner = ", ".join(f"{bare(str(key))} = {value(item)}" for key, item in each.items())
        return "{ " + inner + " }" if inner else "{}"
    return string(str(each))


def bare(key: str) -> str:
    """Return a key, in quotes if it needs them."""
    return key if key.replace("-", "a").replace("_", "a").isalnum() and key.isascii() else string(key)


def string(text: str) -> str:
    """Return a basic string of TOML; what does not print is written as its number."""
    quoted = []
    for character in text:
        if character in '"\\':
            quoted.append("\\" + character)
        elif character.isprintable():
            quoted.append(character)
        else:
            quoted.append(f"\\U{ord(character):08x}")
    return '"' + "".join(quoted) + '"'
