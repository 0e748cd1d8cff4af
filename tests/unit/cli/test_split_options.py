"""How -o is taken apart: as libmount does it, which has read it before."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mountd.cli.mount_helper import Wishes
from mountd.cli.mountctl import parse, request_of
from mountd.errors import OptionNotPermitted
from mountd.request import split_options


def by_libmount(text: str) -> list[str]:
    """What the library finds in options, without the quotes."""
    next_option = ctypes.CDLL("libmount.so.1").mnt_optstr_next_option
    buffer = ctypes.create_string_buffer(text.encode())
    at = ctypes.c_void_p(ctypes.addressof(buffer))
    name, value = ctypes.c_void_p(), ctypes.c_void_p()
    name_size, value_size = ctypes.c_size_t(), ctypes.c_size_t()
    found = []
    while not next_option(
        *(ctypes.byref(each) for each in (at, name, name_size, value, value_size)),
    ):
        entry = ctypes.string_at(name, name_size.value).decode()  # type: ignore[arg-type]
        if value.value:
            entry += "=" + ctypes.string_at(value, value_size.value).decode()  # type: ignore[arg-type]
        found.append(entry.replace('"', ""))
    return found


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("", []),
        (",,a,,b,", ["a", "b"]),
        ('a="b,c",d', ["a=b,c", "d"]),
        ('a=b"c,d"e,f', ["a=bc,de", "f"]),
        ('"a,b"=c', ["a,b=c"]),
        ('a="b""c,",d=""', ["a=bc,", "d="]),
        ('mountd.signature="/a,b.sig",ro', ["mountd.signature=/a,b.sig", "ro"]),
    ],
)
def test_entries(text: str, entries: list[str]) -> None:
    assert split_options(text) == entries == by_libmount(text)


@settings(deadline=None)
@given(st.text(alphabet='ab=",', max_size=12))
def test_as_libmount_does(text: str) -> None:
    if text.count('"') % 2:
        with pytest.raises(OptionNotPermitted, match="a quote in it is not closed"):
            split_options(text)
    elif '""' not in text and "=," not in text and not text.startswith("=") and ",=" not in text:
        # Names that are empty are no options to anybody, and are told by neither.
        assert split_options(text) == [each for each in by_libmount(text) if each]


def test_where_it_is_read(tmp_path: Path) -> None:
    wishes = Wishes()
    wishes.read(["img", "dir", "-o", 'noexec,mountd.signature="/a,b.sig",context="x:c1,c2"', "-o", "nodev"])
    assert wishes.signature == "/a,b.sig"
    assert wishes.options == ["noexec", "context=x:c1,c2", "nodev"]
    image = tmp_path / "image"
    image.touch()
    with request_of(parse(["mount", "-o", 'context="x:c1,c2",nodev', str(image), "dir"])) as request:
        assert request.parameters["options"] == ["context=x:c1,c2", "nodev"]


@pytest.mark.parametrize(
    "read",
    [
        lambda options: request_of(parse(["mount", "-o", options, "/dev/null", "dir"])),
        lambda options: Wishes().read(["img", "dir", "-o", options]),
    ],
    ids=["mountctl", "mount.mountd"],
)
def test_a_quote_that_is_not_closed(read: Callable[[str], object]) -> None:
    with pytest.raises(OptionNotPermitted) as caught:
        read('ro,a="b,c')
    assert caught.value.message == "mount option “a=b,c” not permitted: a quote in it is not closed"
    assert caught.value.hint
