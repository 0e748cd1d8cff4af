"""Rules that ask, and Attach: nobody is asked about what would not be attached whatever the answer is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.errors import MountdError
from mountd.fds import OwnedFd
from tests.container import USER, as_user
from tests.daemon import Daemon
from tests.e2e.attaching import DIRECTORY, User, asked, id_at, records, user_of
from tests.e2e.conftest import trusting
from tests.e2e.consent.callers import OTHER, Caller, asking
from tests.e2e.consent.polkit import Polkit
from tests.e2e.trust import Case, Makers, key_sections, rule, source, users_file


@pytest.fixture
def grounds(place: Path) -> Path:
    path = place / "asked-about"
    path.mkdir(mode=0o755, exist_ok=True)
    return path


@pytest.fixture
def user(begin: Callable[..., Daemon], grounds: Path, place: Path, images: dict[str, Path]) -> User:
    daemon = begin(asking(trusting(place / "trusted", attach=f'["{grounds}/$UID/**"]')))
    return user_of(daemon, grounds, USER)


def another_s(user: User) -> Path:
    other = user_of(user.daemon, user.own.parent, OTHER, 0o755)
    return other.own


def sticky(user: User) -> Path:
    return user.directory("sticky", 0o1755)


def not_granted(user: User) -> Path:
    return user.own


@pytest.mark.parametrize("make", [another_s, sticky, not_granted])
def test_nobody_is_asked_about_a_bad_target(
    user: User, polkit: Polkit, images: dict[str, Path], make: Callable[[User], Path]
) -> None:
    target = make(user)
    polkit.answer(0)
    assert user.attach(images["ext4"], target)[0] == "AttachNotPermitted"
    assert polkit.asked(0) == []
    assert records(user.daemon) == []


def test_a_yes(user: User, polkit: Polkit, images: dict[str, Path]) -> None:
    target = user.directory("yes")
    polkit.answer(0)
    with user.attached(images["ext4"], target) as id:
        assert id_at(target) == id
    assert polkit.asked()


def test_a_target_that_has_changed_meanwhile(user: User, polkit: Polkit, images: dict[str, Path]) -> None:
    """It is looked at once more when the answer has come."""
    target = user.directory("changing")

    def work() -> None:
        with OwnedFd(os.open(target, DIRECTORY)) as fd:
            name, text, _ = asked(user.daemon.socket, images["ext4"], fd.fileno())
        raise MountdError(f"{name}: {text}")

    caller = Caller(work)
    assert polkit.asked()
    target.chmod(0o777)
    polkit.answer(0)
    assert "AttachNotPermitted: " in caller.result()[1]
    assert "writable by others" in caller.result()[1]
    assert os.listdir(target) == []


def test_nothing_stays_in_the_store(
    start: Callable[..., Daemon], polkit: Polkit, makers: Makers, place: Path, data: bytes, grounds: Path
) -> None:
    """What was put there to be asked about, and was not."""
    rules = rule("asks", "any = true", '"stored"', ', signature = "ed25519"')
    rules = asking(rules.replace("grant = {", f'grant = {{ attach = ["{grounds}/$UID/**"],'))
    case = Case(start(key_sections(makers.keys) + rules, preexec_fn=polkit.enter), data)
    target = user_of(case.daemon, grounds, USER).directory("stored", 0o1755)
    signature = makers.own["ed25519"](data)
    polkit.answer(0)
    with users_file(place, data) as path:

        def work() -> str:
            fds = [OwnedFd(os.open(path, os.O_RDWR)), OwnedFd(os.open(target, DIRECTORY))]
            parameters = {"source": source(signature), "targetFileDescriptor": 1}
            try:
                with Client(str(case.daemon.socket)) as client:
                    client.call("Attach", parameters, fds)
            except MountdError as error:
                return str(error)
            finally:
                for fd in fds:
                    fd.close()
            return ""

        assert "sticky" in as_user(work)
    assert polkit.asked(0) == []
    assert case.stored() == []
