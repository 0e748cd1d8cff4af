"""The key of an encrypted volume: derived by cryptsetup from a copy of the header that was judged."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mountd.errors import InvalidImage, LimitExceeded, MountdError, NotSupported, WrongKey
from mountd.execute import luks
from mountd.fds import OwnedFd
from mountd.kernel import program
from mountd.plan.operations import Encryption
from mountd.service import encrypted
from mountd.source import luks as header
from mountd.source.confined import read_luks
from mountd.source.model import Luks, Window
from tests.luks import ARGON2, KEY, PASSWORD, build_luks, make_header

pytestmark = pytest.mark.kernel
CONTENTS = bytes(range(256)) * 32


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("luks")
    headers = {
        "luks1": make_header(work, 1),
        "luks2": make_header(work),
        "argon2": make_header(work, 2, *ARGON2),
    }
    return {name: build_luks(work / name, each, CONTENTS) for name, each in headers.items()}


def look(path: Path, window: Window | None = None) -> tuple[OwnedFd, Luks, Encryption]:
    fd = OwnedFd(os.open(path, os.O_RDONLY))
    found = read_luks(fd.fileno(), os.fstat(fd.fileno()).st_size)
    return fd, found, Encryption.of(found, window)


def header_of(path: Path) -> Luks:
    fd, found, _ = look(path)
    fd.close()
    return found


def derived(path: Path, password: str = PASSWORD, seconds: float = 30) -> bytes:
    fd, _, volume = look(path)
    with fd, luks.copy_header(fd.fileno(), volume, header.second_of) as copy:
        return bytes(luks.derive(copy.fileno(), bytearray(password.encode()), volume, seconds))


@pytest.mark.parametrize("name", ["luks1", "luks2", "argon2"])
def test_the_key(volumes: dict[str, Path], name: str) -> None:
    assert derived(volumes[name]) == KEY.hex().encode()
    for wrong in (f"{PASSWORD}\n", PASSWORD[:-1], "\u00e9", "-"):
        with pytest.raises(WrongKey) as caught:
            derived(volumes[name], wrong)
        assert PASSWORD[:-1] not in str(caught.value) + str(caught.value.hint)


@pytest.mark.parametrize("name", ["luks1", "luks2"])
def test_the_copy(volumes: dict[str, Path], name: str) -> None:
    """It is the header and nothing else, as long as the volume, and nobody can change it."""
    fd, found, volume = look(volumes[name])
    with fd, luks.copy_header(fd.fileno(), volume, header.second_of) as copy:
        size = os.fstat(copy.fileno()).st_size
        assert size == found.offset + found.size
        data = os.pread(copy.fileno(), size, 0)
        assert data[found.header_size :] == bytes(size - found.header_size)
        assert read_luks(copy.fileno(), size) == found
        for attempt in (lambda: os.pwrite(copy.fileno(), b"x", 0), lambda: os.ftruncate(copy.fileno(), 0)):
            with pytest.raises(PermissionError):
                attempt()


def test_a_second_header_that_says_something_else(volumes: dict[str, Path], tmp_path: Path) -> None:
    """Whoever takes the newer of two headers finds the one that was judged twice."""
    image = tmp_path / "two"
    data = bytearray(volumes["luks2"].read_bytes())
    found = header_of(volumes["luks2"])
    size = found.metadata_size
    second = data[size : 2 * size]
    second[16:24] = (99).to_bytes(8, "big")  # a newer one
    second[4096:] = second[4096:].replace(b'"iterations":1000', b'"iterations":9999')
    second[header.CHECKSUM] = header.checksum(bytes(second))
    data[size : 2 * size] = second
    image.write_bytes(data)
    assert derived(image) == KEY.hex().encode()


def judged(fd: OwnedFd) -> Any:
    return SimpleNamespace(inspected=SimpleNamespace(image_fd=fd.fileno()))


def test_what_is_exchanged_after_it_was_judged(volumes: dict[str, Path], tmp_path: Path) -> None:
    image = tmp_path / "exchanged"
    image.write_bytes(volumes["luks2"].read_bytes())
    password = bytearray(PASSWORD.encode())
    fd, found, _ = look(image)
    with fd:
        assert encrypted.key_to(judged(fd), found, None, password, 30) == KEY.hex().encode()
        for other in ("luks1", "argon2"):
            image.write_bytes(volumes[other].read_bytes())
            with pytest.raises(InvalidImage, match="not the one that was judged|do not lie within"):
                encrypted.key_to(judged(fd), found, None, password, 30)
        image.write_bytes(volumes["luks2"].read_bytes()[:5000])
        with pytest.raises(InvalidImage, match="ends within its header"):
            encrypted.key_to(judged(fd), found, None, password, 30)


def test_a_volume_within_an_image(volumes: dict[str, Path], tmp_path: Path) -> None:
    image = tmp_path / "within"
    data = volumes["luks2"].read_bytes()
    image.write_bytes(bytes(5120) + data)
    found = header_of(volumes["luks2"])
    with OwnedFd(os.open(image, os.O_RDONLY)) as fd:
        window = Window(5120, len(data))
        key = encrypted.key_to(judged(fd), found, window, bytearray(PASSWORD.encode()), 30)
    assert key == KEY.hex().encode()


def test_damage_to_what_no_checksum_covers(volumes: dict[str, Path], tmp_path: Path) -> None:
    image = tmp_path / "damaged"
    data = bytearray(volumes["luks2"].read_bytes())
    data[40000] ^= 1  # of the key, encrypted
    image.write_bytes(data)
    with pytest.raises(WrongKey):
        derived(image)


def finished(status: int, output: bytes = b"", *, timed_out: bool = False) -> program.Finished:
    return program.Finished(status, output, timed_out)


LINES = KEY.hex(" ", 16).replace(" ", "\n\t").encode()


@pytest.mark.parametrize(
    ("done", "error"),
    [
        (finished(0, b"MK dump:\t" + LINES), None),
        (finished(0, b"MK dump:\t" + LINES[:-2]), InvalidImage),
        (finished(0, b"MK dump:\t" + LINES[:-2] + b"zz"), InvalidImage),
        (finished(0, b""), InvalidImage),
        (finished(1, b"MK dump:\t" + LINES), InvalidImage),
        (finished(2), WrongKey),
        (finished(3), LimitExceeded),
        (finished(-9), LimitExceeded),
        (finished(0, b"MK dump:\t" + LINES, timed_out=True), LimitExceeded),
    ],
)
def test_what_cryptsetup_says(
    volumes: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    done: program.Finished,
    error: type[MountdError] | None,
) -> None:
    monkeypatch.setattr(luks.program, "run", lambda *_, **__: done)
    if error is None:
        assert derived(volumes["luks2"]) == KEY.hex().encode()
        return
    with pytest.raises(error) as caught:
        derived(volumes["luks2"])
    assert KEY.hex()[:32] not in str(caught.value)


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_key_that_takes_too_long(volumes: dict[str, Path], seconds: float) -> None:
    with pytest.raises(LimitExceeded, match="seconds to derive"):
        derived(volumes["luks1"], seconds=seconds)


def test_a_key_that_takes_more_memory_than_its_header_says(
    volumes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, _, volume = look(volumes["argon2"])
    monkeypatch.setattr(luks, "MEMORY", 1 << 20)
    with fd, luks.copy_header(fd.fileno(), volume, header.second_of) as copy, pytest.raises(MountdError):
        luks.derive(copy.fileno(), bytearray(PASSWORD.encode()), dataclasses.replace(volume, memory=0))


def test_without_cryptsetup(volumes: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(luks, "PROGRAMS", ("/nowhere/cryptsetup",))
    with pytest.raises(NotSupported) as caught:
        derived(volumes["luks1"])
    assert "cryptsetup-bin" in str(caught.value.hint)
    with pytest.raises(NotSupported):
        luks.check_available()


def test_wiping() -> None:
    secret = bytearray(b"secret")
    luks.wipe(secret)
    assert secret == bytes(6)
