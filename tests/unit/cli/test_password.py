"""The password of an encrypted image: when it is asked for, and how often; and files that are read here."""

from __future__ import annotations

import base64
import fcntl
import getpass
import os
import pty
import termios
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from mountd.cli import agent, image
from mountd.cli.agent import with_consent
from mountd.cli.report import line_about
from mountd.errors import InvalidParameter, KeyRequired, NotFound, WrongKey
from mountd.request import MAXIMUM_KEY, MAXIMUM_SIGNATURE, Request, read_key, read_signature

WRONG = WrongKey("no")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked on the terminal, which answers with “one”, “two”, and so on."""
    answers = ["four", "three", "two", "one"]
    prompts: list[str] = []

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        return answers.pop()

    monkeypatch.setattr(getpass, "getpass", answer)
    monkeypatch.setattr(agent, "on_terminal", lambda: True)
    return prompts


def call(request: Request, right: str | None) -> list[object]:
    """The passwords with which a method is called that takes only the right one, None for none at all."""
    called: list[object] = []

    def method(source: object, fds: object, **parameters: object) -> str:
        called.append(parameters["password"])
        if parameters["password"] is None:
            raise KeyRequired("it is encrypted")
        if parameters["password"] != right:
            raise WRONG
        return "done"

    assert with_consent(method, request) == "done"
    return called


def test_it_is_asked_for_until_it_is_right(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with Request("tmpfs:1M") as request:
        assert call(request, "two") == [None, "one", "two"]
    assert len(asked) == 2
    assert capsys.readouterr().err == "This is not the password.\n"


def test_it_is_not_asked_for_for_ever(asked: list[str]) -> None:
    with Request("tmpfs:1M") as request, pytest.raises(WrongKey):
        call(request, "four")
    assert len(asked) == agent.TRIES


def test_it_is_not_asked_for_where_nobody_wants_that(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Request("tmpfs:1M") as request:
        request.asks = False
        with pytest.raises(KeyRequired):
            call(request, "one")
    key = tmp_path / "key"
    key.write_text("another")
    with Request("tmpfs:1M", key_file=str(key)) as request, pytest.raises(WrongKey):
        call(request, "one")
    monkeypatch.setattr(agent, "on_terminal", lambda: False)
    with Request("tmpfs:1M") as request, pytest.raises(KeyRequired):
        call(request, "one")
    assert asked == []


@pytest.mark.parametrize(
    ("typed", "outcome"),
    [
        (
            b"p\xe4ss\n",
            "InvalidParameter: invalid parameter password: what was typed is no text in UTF-8 False!",
        ),
        (b"\x04", "KeyboardInterrupt:  False!"),
    ],
)
def test_what_is_typed_is_never_shown(typed: bytes, outcome: str) -> None:
    """Neither text in another encoding, nor an end of input, is a bug of mountd's."""
    ours, theirs = pty.openpty()
    child = os.fork()
    if child == 0:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        try:
            agent.asked_for()
        except BaseException as error:  # noqa: BLE001 - each is told
            chained = error.__cause__ or not error.__suppress_context__
            os.write(theirs, f"{type(error).__name__}: {error} {chained}!".encode())
        os._exit(0)
    said = b""
    while not said.endswith(b"image: "):
        said += os.read(ours, 100)
    os.write(ours, typed)
    while not said.endswith(b"!"):
        said += os.read(ours, 1000)
    os.waitpid(child, 0)
    os.close(ours)
    os.close(theirs)
    assert said.decode().splitlines()[-1].removeprefix("Password of the encrypted image: ") == outcome


def test_key_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    for text in ("p", "with a newline\n", "\u00e9" * (MAXIMUM_KEY // 2)):
        key.write_text(text, "utf-8")
        assert read_key(str(key)) == text
    for data in (b"", b"x" * (MAXIMUM_KEY + 1), b"secret \xff"):
        key.write_bytes(data)
        with pytest.raises(InvalidParameter) as caught:
            read_key(str(key))
        assert "secret" not in str(caught.value)
        # Nor in what it was raised from.
        assert caught.value.__cause__ is None
    with pytest.raises(NotFound):
        read_key(str(tmp_path / "nothing"))
    reader, writer = os.pipe()
    os.write(writer, b"in two ")
    os.write(writer, b"pieces")
    os.close(writer)
    monkeypatch.setattr("mountd.request.STANDARD_INPUT", reader)
    assert read_key("-") == "in two pieces"
    os.close(reader)


@pytest.mark.parametrize("read", [read_key, lambda path: base64.b64decode(read_signature(path)).decode()])
def test_what_comes_through_a_pipe_is_waited_for(read: Callable[[str], str]) -> None:
    """As of `<(gpg -d …)`: it comes late, and in pieces."""
    reader, writer = os.pipe()
    answer, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        try:
            os.write(told, read(f"/dev/fd/{reader}").encode())
        finally:
            os._exit(0)
    os.close(told)
    for piece in (b"in two ", b"pieces"):
        deadline = time.monotonic() + 5
        while "pipe" not in Path(f"/proc/{child}/wchan").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.write(writer, piece)
    os.close(writer)
    assert os.read(answer, 100) == b"in two pieces"
    os.waitpid(child, 0)
    os.close(reader)
    os.close(answer)


@pytest.mark.parametrize(
    "ask", [{"key_file": "DIR"}, {"signature": "DIR"}, {"source": "composefs:DIR", "objects": ["/"]}]
)
def test_a_directory_in_place_of_a_file(tmp_path: Path, ask: dict[str, Any]) -> None:
    """The error says which of all that is named on the line."""
    source = tmp_path / "source"
    source.touch()
    named = {key: str(each).replace("DIR", str(tmp_path)) for key, each in ask.items() if each != ["/"]}
    with pytest.raises(IsADirectoryError) as caught:
        Request(**({"source": str(source)} | ask | named))
    assert line_about("p", caught.value) == f"p: {tmp_path}: Is a directory (hint: give a file)"


def test_signatures(tmp_path: Path) -> None:
    """One bound for all that take one."""
    path = tmp_path / "signature"
    path.write_bytes(b"\0\xff")
    assert read_signature(str(path)) == "AP8="
    for length, fits in ((0, False), (MAXIMUM_SIGNATURE, True), (MAXIMUM_SIGNATURE + 1, False)):
        path.write_bytes(bytes(length))
        with (
            nullcontext()
            if fits
            else pytest.raises(InvalidParameter, match=f"1 to {MAXIMUM_SIGNATURE} bytes")
        ):
            assert len(base64.b64decode(read_signature(str(path)))) == length
    assert image.read_signature is read_signature
    with pytest.raises(NotFound):
        read_signature(str(tmp_path / "missing"))
