"""Keys and policies: exchanging a file or a directory of root's does not have the attacker's read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.store.containers_policy import read_key_file, read_system_file
from mountd.trust.policy_file import PolicyError, load
from mountd.trust.root_files import NotUsable, read_keys
from tests.race.swapping import Ground, Seen, loses, never_wins

GOOD, EVIL = b"the good key", b"the evil key"
RULE = """
[[rule]]
name = "{name}"
image = {{ any = true }}
caller = {{ any = true }}
verdict = "deny"
"""
# What is exchanged, and the path that is read.
Scene = tuple[Path, Path, Path]
MakeScene = Callable[[Ground, str, bytes, bytes], Scene]


def a_file(ground: Ground, name: str, good: bytes, evil: bytes) -> Scene:
    one, other = ground.write(f"keys/{name}", good, evil)
    return one, other, one


def a_link(ground: Ground, name: str, good: bytes, evil: bytes) -> Scene:
    """The name of a link is not one of a key or a policy, so that it is read in no other way."""
    one, other = ground.write(f"keys/{name}", good, evil)
    link = ground.trusted / "link"
    link.symlink_to(other)
    return one, link, one


def a_directory(ground: Ground, name: str, good: bytes, evil: bytes) -> Scene:
    """The file in it is root's on both sides."""
    one, other = ground.write(f"keys/{name}", good, evil)
    os.chown(other, 0, 0)
    return one.parent, other.parent, one


def a_link_to_a_directory(ground: Ground, name: str, good: bytes, evil: bytes) -> Scene:
    one, other, path = a_directory(ground, name, good, evil)
    link = ground.trusted / "link"
    link.symlink_to(other)
    return one, link, path


SCENES = [a_file, a_link, a_directory, a_link_to_a_directory]


def told(contents: bytes) -> Seen:
    return {GOOD: Seen.GOOD, EVIL: Seen.WON}[contents]


def naive(path: Path) -> bytes:
    """Contents of what is root's all the way up: looked at one after the other, by name."""
    if any(os.stat(each).st_uid != 0 for each in (path, *path.parents)):
        return b""
    return path.read_bytes()


@pytest.mark.parametrize("whole_directory", [False, True], ids=["by name", "a directory of them"])
@pytest.mark.parametrize("make", SCENES)
def test_keys(ground: Ground, make: MakeScene, whole_directory: bool) -> None:
    one, other, path = make(ground, "team.crt", GOOD, EVIL)
    read = path.parent if whole_directory else path

    def check() -> Seen:
        try:
            (contents,) = read_keys(str(read), directory_too=whole_directory)
        except NotUsable:
            return Seen.REFUSED
        return told(contents)

    never_wins(one, other, check)


@pytest.mark.parametrize("make", SCENES)
def test_naive_reading_of_keys_loses(ground: Ground, make: MakeScene) -> None:
    one, other, path = make(ground, "team.crt", GOOD, EVIL)
    loses(one, other, lambda: Seen.WON if naive(path) == EVIL else Seen.REFUSED)


@pytest.mark.parametrize("make", [a_file, a_link, a_directory])
def test_policy(ground: Ground, make: MakeScene) -> None:
    texts = [RULE.format(name=name).encode() for name in ("good", "evil")]
    one, other, path = make(ground, "image.toml", *texts)

    def check() -> Seen:
        try:
            names = [rule.name for rule in load([path.parent]).rules]
        except PolicyError:
            return Seen.REFUSED
        return {"good": Seen.GOOD, "evil": Seen.WON}[names[0]]

    never_wins(one, other, check)


@pytest.mark.parametrize("read", [lambda path: read_system_file(path, 64), read_key_file], ids=["", "key"])
@pytest.mark.parametrize("make", [a_file, a_link])
def test_policy_about_registries(ground: Ground, make: MakeScene, read: Callable[[str], bytes]) -> None:
    one, other, path = make(ground, "policy.json", GOOD, EVIL)

    def check() -> Seen:
        try:
            return told(read(str(path)))
        except ValueError:
            return Seen.REFUSED

    never_wins(one, other, check)
