"""Places whose names are no plain text, for Attach, List, Detach, mount(8) and umount(8).

Users choose such names, and what tells of mounts is text with one mount a line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container import as_user
from tests.daemon import Daemon
from tests.e2e.attaching import User, id_at, records, user_of
from tests.e2e.conftest import trusting
from tests.e2e.test_list import listed
from tests.programs import Done, in_private, run
from tests.programs import as_user as program_as_user

ALICE, BOB = 4226, 4227
UTAB = Path("/run/mount/utab")
NAMES = {
    "control": b"bell \x07 and \x1b[31mred",
    "line": b"two\nlines\tand a tab",
    "lines of Unicode": "two\u2028lines\x85and\u2029more".encode(),
    "returns": b"back\r\x0b\x0c\x1c\r",
    "no UTF-8": b"caf\xe9 \xff\xfe",
    "escaped": b"a\\040b \\012 \\",
    "hash": b"# a comment",
}


@pytest.fixture(scope="module")
def grounds(place: Path) -> Path:
    path = place / "oddly"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture(scope="module")
def own_daemon(place: Path, images: dict[str, Path], grounds: Path) -> Iterator[Daemon]:
    daemon = Daemon(place / "oddly-daemon", trusting(place / "trusted", attach=f'["{grounds}/$UID/**"]'))
    yield daemon
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log
    assert records(daemon) == []


@pytest.fixture
def alice(own_daemon: Daemon, grounds: Path) -> User:
    return user_of(own_daemon, grounds, ALICE, 0o755)


@pytest.fixture
def bob(own_daemon: Daemon, grounds: Path) -> User:
    return user_of(own_daemon, grounds, BOB, 0o755)


@pytest.fixture(params=NAMES.values(), ids=NAMES)
def target(request: pytest.FixtureRequest, alice: User) -> Iterator[Path]:
    path = alice.directory(os.fsdecode(request.param))
    yield path
    path.rmdir()


def users_known() -> dict[str, str]:
    """Files of /etc, for `in_private`."""
    users = (f"odalice:x:{ALICE}:{ALICE}::/:/bin/sh\n", f"odbob:x:{BOB}:{BOB}::/:/bin/sh\n")
    return {"fstab": "", "passwd": Path("/etc/passwd").read_text() + "".join(users)}


def calls(user: User, *words: object) -> Done:
    ids = {"user": user.uid, "group": user.uid}
    return program_as_user(words, user.daemon.socket, errors="surrogateescape", **ids)


def shown(path: Path) -> str:
    """The name as replies have it."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def test_attach_and_detach(alice: User, target: Path, images: dict[str, Path]) -> None:
    name, text, id = alice.attach(images["erofs"], target)
    assert name == "", text
    assert id_at(target) == id
    (mount,) = as_user(lambda: listed(alice.daemon), ALICE)
    assert [each["mountPoint"] for each in mount["attached"]] == [shown(target)]
    assert alice.detach(id) == ("", "", id)
    assert id_at(target) != id


def test_mount_and_umount(
    alice: User, bob: User, target: Path, images: dict[str, Path], installed: Path, tmp_path: Path
) -> None:
    def work() -> None:
        done = calls(alice, "mount", "-t", "mountd", images["erofs"], target)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert os.path.ismount(target)
        # One mount is one line, with the target as mountinfo has it.
        line, end = UTAB.read_bytes().split(b"\n")
        assert end == b""
        assert line.count(b"TARGET=") == line.count(b"uhelper=") == 1
        assert calls(bob, "umount", target).returncode != 0
        assert os.path.ismount(target)
        done = calls(alice, "umount", target)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not os.path.ismount(target)
        assert UTAB.read_bytes() == b""

    in_private(installed, work, users_known(), tmp_path)


def test_a_name_that_is_the_line_of_another_mount(
    alice: User, bob: User, images: dict[str, Path], installed: Path, tmp_path: Path
) -> None:
    """Who unmounts it unmounts that, and mount(8) learns nothing about the other from it."""
    theirs = bob.directory("plain")
    lines = (
        f"a\nSRC={images['erofs']} TARGET={theirs} ROOT=/ OPTS=uhelper=evil\n",
        f"b\n99 1 0:99 / {theirs} ro - erofs {images['erofs']} ro\n",
    )
    odd = []
    for line in lines:
        path = alice.own / line
        path.mkdir(parents=True)
        for each in (path, *path.parents):
            if each.is_relative_to(alice.own):
                os.chown(each, ALICE, ALICE)
        odd.append(path)

    def work() -> None:
        assert calls(bob, "mount", "-t", "mountd", images["erofs"], theirs).returncode == 0
        before = UTAB.read_text()
        for path in odd:
            done = calls(alice, "mount", "-t", "mountd", images["erofs"], path)
            assert (done.returncode, done.stderr) == (0, "")
        assert UTAB.read_text().startswith(before)
        assert [each.startswith("SRC=") for each in UTAB.read_text().split("\n")] == [True] * 3 + [False]
        assert "evil\n" not in UTAB.read_text()
        assert calls(alice, "umount", theirs).returncode != 0
        for path in odd:
            done = calls(alice, "umount", path)
            assert (done.returncode, done.stderr) == (0, "")
            assert not os.path.ismount(path)
        assert os.path.ismount(theirs)
        assert UTAB.read_text() == before
        assert calls(bob, "umount", theirs).returncode == 0

    in_private(installed, work, users_known(), tmp_path)


def test_mount_of_root(
    alice: User, target: Path, images: dict[str, Path], installed: Path, tmp_path: Path
) -> None:
    """Root's mount(8) and umount(8) there, which have no need of a line."""

    def work() -> None:
        for words in (["mount", "-t", "mountd", images["erofs"], target], ["umount", target]):
            done = run(words, alice.daemon.socket, errors="surrogateescape")
            assert (done.returncode, done.stderr) == (0, "")
        assert not os.path.ismount(target)

    in_private(installed, work, users_known(), tmp_path)
