"""What was done and cannot be told, as standard output is full: it stays done, and is said elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.e2e.conftest import trusting
from tests.e2e.test_list import listed, wait_for
from tests.programs import Done, as_user, check_line

JON = 4580
MOUNTCTL, HELPER, UMOUNT = "bin/mountctl", "sbin/mount.mountd", "sbin/umount.mountd"


@pytest.fixture(scope="module")
def own(place: Path) -> Path:
    path = place / "full-output"
    path.mkdir()
    os.chown(path, JON, JON)
    return path


@pytest.fixture(scope="module")
def serving(place: Path, images: dict[str, Path], own: Path) -> Iterator[Daemon]:
    daemon = Daemon(place / "full-output-daemon", trusting(images["erofs"].parent, attach=f'["{own}/**"]'))
    yield daemon
    assert daemon.stop() == 0, daemon.log


@pytest.mark.parametrize("json_too", [False, True], ids=["for people", "for programs"])
@pytest.mark.parametrize("program", [MOUNTCTL, HELPER])
def test_it_is_mounted_all_the_same(
    serving: Daemon, installed: Path, images: dict[str, Path], own: Path, program: str, json_too: bool
) -> None:
    target = own / f"{Path(program).name}-{json_too}"
    target.mkdir()
    os.chown(target, JON, JON)

    def call(*words: object) -> Done:
        with open("/dev/full", "w") as full:
            command = [installed / str(words[0]), *words[1:]]
            who = {"user": JON, "group": JON, "stderr": -1, "stdout": full, "capture_output": False}
            return as_user(command, serving.socket, **who)

    mount = [program, *(["mount"] if program == MOUNTCTL else []), images["erofs"], target]
    how = ["--json"] if json_too else ["-v"] if program == HELPER else []
    done = call(*mount, *how)
    assert (target / "hello").exists()
    assert done.returncode == (2 if json_too else 0)
    check_line(
        done, f"{target}: it is mounted and stays so, though .*No space left.*hint: “.*umount {target}”"
    )
    unmount = [program, "umount", target, *how] if program == MOUNTCTL else [UMOUNT, target, "-v"]
    done = call(*unmount)
    assert not (target / "hello").exists()
    assert done.returncode == (2 if json_too and program == MOUNTCTL else 0)
    check_line(done, "(detached|unmounted), though .*No space left")
    wait_for(lambda: not listed(serving, everybody=True))
