"""Where the client looks for the daemon, and sizes in words."""

from __future__ import annotations

import os

import pytest

from mountd.client import ENVIRONMENT, SOCKETS, Client, Request, socket_paths
from mountd.errors import InvalidParameter, NotFound, Unreachable
from mountd.request import parse_size


@pytest.mark.parametrize(
    ("named", "changed", "paths"),
    [
        (None, {}, SOCKETS),
        ("", {}, SOCKETS),
        ("/a", {}, ("/a",)),
        ("/a", {"getuid": 4000}, SOCKETS),  # as in a set-uid program
        ("/a", {"getgid": 4000}, SOCKETS),
    ],
)
def test_socket_paths(
    monkeypatch: pytest.MonkeyPatch, named: str | None, changed: dict[str, int], paths: tuple[str, ...]
) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    if named is not None:
        monkeypatch.setenv(ENVIRONMENT, named)
    for name, value in changed.items():
        monkeypatch.setattr(os, name, lambda value=value: value)
    assert socket_paths() == paths
    assert SOCKETS == ("/run/mountd/io.mountd.Mount", "/run/host/mountd/io.mountd.Mount")


def test_unreachable_names_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mountd.asking.SOCKETS", ("/nowhere/1", "/nowhere/2"))
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(
        Unreachable, match="/nowhere/1: No such file or directory; /nowhere/2: No such"
    ) as caught:
        Client()
    assert "mountd.socket" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("4096", 4096), ("1k", 1024), ("64M", 64 << 20), ("2G", 2 << 30), ("1T", 1 << 40)],
)
def test_size(text: str, size: int) -> None:
    assert parse_size(text) == size
    with Request(f"tmpfs:{text}", userns="none") as request:
        assert request.source == {"tmpfs": {"size": size}}
        assert request.parameters["readOnly"] is False


@pytest.mark.parametrize(
    "text", ["", "0", "M", "-1", "1.5G", "1MiB", "64 M", "0x10", "1e3", "9" * 19, "99999999T", "x"]
)
def test_no_size(text: str) -> None:
    with pytest.raises(InvalidParameter, match="has no size such as 64M"):
        parse_size(text)


def test_whose_size_it_is() -> None:
    with pytest.raises(InvalidParameter, match="invalid parameter top: “tmpfs:x” has no size"):
        Request("/dev/null", top="tmpfs:x")


@pytest.mark.parametrize("wishes", [{"userns": "/nowhere"}, {"file_system_type": "\udcff"}])
def test_request_that_cannot_be_made_leaves_nothing_open(wishes: dict[str, str]) -> None:
    with pytest.raises((NotFound, InvalidParameter)):
        Request("/dev/null", **wishes)  # type: ignore[arg-type]
