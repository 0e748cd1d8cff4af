"""The keys of a stack with several encrypted layers: one place, one time for all, and no trace of them."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mountd.asking import TIMEOUT
from mountd.errors import KeyRequired, LimitExceeded, WrongKey
from mountd.execute import luks
from mountd.fds import OwnedFd
from mountd.service import encrypted, stacks
from mountd.service.consent import lock
from mountd.source.confined import read_luks
from tests.luks import KEY, PASSWORD, build_luks, make_header
from tests.process import in_child

pytestmark = pytest.mark.kernel
OWNER = 4711


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("layer-keys")
    return build_luks(work / "volume", make_header(work), bytes(8192))


class Keys:
    """A stack of layers that have this volume, but for those that are plain, and what comes of its keys."""

    def __init__(self, volume: OwnedFd, runtime: Path) -> None:
        found = read_luks(volume.fileno(), os.fstat(volume.fileno()).st_size)
        self.context: Any = SimpleNamespace(questions=runtime / "questions")
        self.places = runtime / encrypted.PLACES_FILE
        self.password = bytearray(PASSWORD.encode())
        self.secrets: list[bytearray] = []
        self._of_volume = SimpleNamespace(image_fd=volume.fileno(), source=SimpleNamespace(luks=found))
        self._plain = SimpleNamespace(image_fd=volume.fileno(), source=SimpleNamespace(luks=None))

    def layer(self, *, plain: bool = False) -> Any:
        return SimpleNamespace(
            inspected=self._plain if plain else self._of_volume,
            decision=SimpleNamespace(uses=()),
            caller=SimpleNamespace(owner_uid=OWNER),
            layers=(),
        )

    def stack(self, *layers: Any, password: bytearray | None = None) -> Any:
        return SimpleNamespace(layers=layers, request=SimpleNamespace(password=password))

    def derived(self, *layers: Any) -> list[list[bytes]]:
        """Derive the keys, and wipe them."""
        with ExitStack() as stack:
            parts = stacks.parts_of(layers, None)
            found = encrypted.keys_to(parts, self.password, self.context, stack)
            return [[bytes(key) for key in keys] for keys in found]

    def is_taken(self) -> bool:
        """Whether another process of the same owner would have to wait."""

        def work() -> None:
            with self.places.open("rb+") as file:
                assert not lock(file.fileno(), encrypted.OWNER_PLACES + OWNER)

        try:
            in_child(work)
        except AssertionError:
            return False
        return True


@pytest.fixture
def keys(volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keys]:
    with OwnedFd(os.open(volume, os.O_RDONLY)) as fd:
        made = Keys(fd, tmp_path)
        derive = luks.derive

        def noted(*arguments: Any) -> bytearray:
            made.secrets.append(derive(*arguments))
            return made.secrets[-1]

        monkeypatch.setattr(luks, "derive", noted)
        yield made


def test_each_layer_gets_its_keys(keys: Keys) -> None:
    key = [KEY.hex().encode()]
    assert keys.derived(keys.layer(), keys.layer(plain=True), keys.layer()) == [key, [], key]
    assert keys.secrets == [bytearray(128)] * 2, "they were wiped"


def test_a_wrong_password_names_the_layer(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's is right: its key is wiped, and the place is free."""
    noted = luks.derive

    def other(*arguments: Any) -> bytearray:
        if keys.secrets:
            arguments = (arguments[0], bytearray(b"another"), *arguments[2:])
        return noted(*arguments)

    monkeypatch.setattr(luks, "derive", other)
    with pytest.raises(WrongKey, match=r"source\.layers\[1\]: "):
        keys.derived(keys.layer(), keys.layer())
    assert keys.secrets == [bytearray(128)]
    assert not keys.is_taken()


def test_all_keys_have_the_time_of_one(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    noted, late, told = luks.derive, [0.0], []

    def slow(*arguments: Any) -> bytearray:
        told.append(arguments[-1])
        key = noted(*arguments)
        late[0] += luks.SECONDS / 2
        return key

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0], sleep=time.sleep)
    monkeypatch.setattr(luks, "derive", slow)
    monkeypatch.setattr(encrypted, "time", clock)
    with pytest.raises(LimitExceeded, match=r"source\.layers\[2\]: .*seconds to derive"):
        keys.derived(*(keys.layer() for _ in range(4)))
    assert luks.SECONDS > told[0] > luks.SECONDS / 2 > told[1] > 0 > told[2]
    assert len(told) == 3
    assert keys.secrets == [bytearray(128)] * 2


def test_the_phase_is_long_enough_and_ends_before_clients_give_up() -> None:
    assert encrypted.SECONDS_TO_WAIT + luks.SECONDS + encrypted.SECONDS_TO_ATTACH < TIMEOUT


def test_one_place_of_the_owner_for_all(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    noted, taken = luks.derive, []

    def watched(*arguments: Any) -> bytearray:
        taken.append(keys.is_taken())
        return noted(*arguments)

    monkeypatch.setattr(luks, "derive", watched)
    keys.derived(keys.layer(), keys.layer())
    assert (taken, keys.is_taken()) == ([True, True], False)


def test_an_owner_without_a_place(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encrypted, "SECONDS_TO_WAIT", 0.1)
    keys.places.touch()
    holder, ready = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        with keys.places.open("rb+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, encrypted.OWNER_PLACES + OWNER)
            os.write(ready, b"x")
            while True:
                time.sleep(1)
    try:
        os.read(holder, 1)
        with pytest.raises(LimitExceeded, match="opened at once"):
            keys.derived(keys.layer(), keys.layer())
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(holder)
        os.close(ready)
    assert keys.secrets == []


def test_the_first_layer_that_needs_a_password_is_named(keys: Keys) -> None:
    layers = (keys.layer(plain=True), keys.layer(), keys.layer())
    assert encrypted.is_encrypted(keys.stack(*layers))
    assert not encrypted.is_encrypted(keys.stack(keys.layer(plain=True)))
    with pytest.raises(KeyRequired, match=r"source\.layers\[1\]: .*the image is encrypted"):
        encrypted.needed_password(keys.stack(*layers))
    assert encrypted.needed_password(keys.stack(*layers, password=keys.password)) is keys.password
