"""The patterns of `location`: globs over absolute paths, component by component.

`*`, `?` and `[…]` stay within one component and, as in glob(7), do not stand for a dot at its start: what
other programs write to a hidden name until it is complete is not trusted by accident. There is no `**`, as a
rule that trusts a whole tree trusts what nobody thought of.
"""

from __future__ import annotations

from fnmatch import fnmatchcase


def check_pattern(pattern: str) -> None:
    """Raise ValueError, saying why, if `pattern` is not a pattern that can match a path."""
    if not pattern.isprintable() or "\\" in pattern:
        raise ValueError("it contains a control character or a backslash; quote with […] instead")
    if not pattern.startswith("/"):
        raise ValueError("it is not absolute; start it with /")
    for component in pattern[1:].split("/"):
        if component in ("", ".", ".."):
            raise ValueError("it has an empty, “.” or “..” component; write the path without them")
        if "**" in component:
            raise ValueError("“**” is not supported; write one pattern for each depth")
        if unclosed_bracket(component):
            raise ValueError("it has a “[” without its “]” in the same component; write [[] for the letter")


def unclosed_bracket(component: str) -> bool:
    """Whether a bracket expression of `component` has no end, which fnmatch(3) would take literally."""
    position = component.find("[")
    while position != -1:
        # A "]" that comes first, or first after the "!", is a member and not the end.
        first = position + 2 if component[position + 1 : position + 2] == "!" else position + 1
        end = component.find("]", first + 1)
        if end == -1:
            return True
        position = component.find("[", end + 1)
    return False


def matches(pattern: str, path: str) -> bool:
    """Whether the absolute `path` matches `pattern`, which `check_pattern` has accepted."""
    wanted, names = pattern.split("/"), path.split("/")
    # Before the first slash there is nothing, and nothing else may be empty.
    return len(wanted) == len(names) and not names[0] and all(map(component_matches, wanted[1:], names[1:]))


def component_matches(wanted: str, name: str) -> bool:
    """Whether the name of one component matches."""
    if not name or (name.startswith(".") and not wanted.startswith(".")):
        return False
    return fnmatchcase(name, wanted)


def directory(pattern: str) -> str:
    """Return the directory that a file has to lie in to match `pattern`."""
    return pattern.rpartition("/")[0] or "/"
