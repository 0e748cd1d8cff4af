"""Where a process stands in the tree of control groups: its systemd unit, slice and container.

Only what lies above the first unit is root's. Below it the tree may be delegated, to a user's service
manager or to a container, and whoever it is delegated to gives the names there. So what a path says is taken
from its beginning: slices, then one unit or one container; the rest is nobody's word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAXIMUM_BYTES = 64 << 10  # of /proc/PID/cgroup: a dozen hierarchies, each with a path of PATH_MAX
MAXIMUM_NAME = 255  # NAME_MAX, and what systemd allows the name of a unit
UNIFIED = b"0::"  # the one hierarchy of cgroup v2 (cgroups(7)); those of v1 may be anybody's
UNIT = re.compile(r"[A-Za-z0-9:_.\\@-]+\.(service|scope)")
SLICE = re.compile(r"([A-Za-z0-9:_.\\@]+(-[A-Za-z0-9:_.\\@]+)*)\.slice")
HEX_ID = r"([0-9a-f]{64})"

# How container managers name the units of their containers, if systemd runs them.
UNITS_OF_CONTAINERS = (
    ("nspawn", re.compile(r"machine-(.+)\.scope")),
    ("nspawn", re.compile(r"systemd-nspawn@(.+)\.service")),
    ("podman", re.compile(rf"libpod-{HEX_ID}\.scope")),
    ("docker", re.compile(rf"docker-{HEX_ID}\.scope")),
    ("containerd", re.compile(rf"cri-containerd-{HEX_ID}\.scope")),
    ("cri-o", re.compile(rf"crio-{HEX_ID}\.scope")),
)
# And how they name the groups that they make themselves, at the top of the tree.
GROUPS_OF_CONTAINERS = (
    ("lxc", re.compile(r"lxc\.payload\.([^/]+)")),
    ("docker", re.compile(rf"docker/{HEX_ID}")),
    ("podman", re.compile(rf"libpod_parent/libpod-{HEX_ID}")),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands. `path` is that of its control group, as text to show.

    `slice` is the innermost slice above its `unit`, `container` is "MANAGER:NAME". Each is None where the
    path does not say it.
    """

    path: str | None = None
    unit: str | None = None
    slice: str | None = None
    container: str | None = None


def parse(contents: bytes) -> Place:
    """Return the place that the `contents` of /proc/PID/cgroup describe. Raises nothing."""
    lines = [line.removeprefix(UNIFIED) for line in contents.split(b"\n") if line.startswith(UNIFIED)]
    if len(lines) != 1 or len(contents) > MAXIMUM_BYTES:
        return Place()
    return parse_path(lines[0].decode(errors="backslashreplace"))


def parse_path(path: str) -> Place:
    """Return the place of a process in the control group `path`, which starts with a slash."""
    names = path.split("/")[1:]
    # Outside of the daemon's own cgroup namespace, paths begin with "..", and name nothing that it knows.
    if not path.startswith("/") or any(name in (".", "..") for name in names):
        return Place(path)
    slice = None
    while names and is_slice_below(names[0], slice):
        slice = names.pop(0)
    if not names or not names[0]:
        return Place(path, slice=slice)
    name = unescape(names[0])
    if len(name) <= MAXIMUM_NAME and UNIT.fullmatch(name):
        return Place(path, name, slice, container_of(name, UNITS_OF_CONTAINERS))
    if slice is None:
        return Place(path, container=container_of("/".join(names[:2]), GROUPS_OF_CONTAINERS))
    return Place(path, slice=slice)


def is_slice_below(name: str, outer: str | None) -> bool:
    """Whether `name` is a slice directly below the slice `outer`, None being the root (systemd.slice(5))."""
    if len(name) > MAXIMUM_NAME or not SLICE.fullmatch(name):
        return False
    parent = name.removesuffix(".slice").rpartition("-")[0]
    return parent == ("" if outer is None else outer.removesuffix(".slice"))


def unescape(name: str) -> str:
    """Return the name of a unit whose control group is called `name`.

    systemd puts a “_” before names that the kernel could take for a file of its own.
    """
    return name[1:] if name.startswith("_") else name


def container_of(name: str, patterns: tuple[tuple[str, re.Pattern[str]], ...]) -> str | None:
    """Return "MANAGER:NAME" for the first pattern that matches `name`, None if none does."""
    for manager, pattern in patterns:
        # A group made by a manager itself may have others below it.
        found = pattern.fullmatch(name) or (
            pattern.fullmatch(name.partition("/")[0]) if "/" in name else None
        )
        if found is not None:
            inner = unescape_unit(found[1])
            return f"{manager}:{inner}" if inner and inner.isprintable() else None
    return None


def unescape_unit(text: str) -> str:
    r"""Undo the escapes of systemd.unit(5), in which \x2d is the character of that number."""
    return re.sub(r"\\x([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), text)
