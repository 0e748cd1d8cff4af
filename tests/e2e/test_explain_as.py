"""“mountctl explain --as USER”: what mountd would say to somebody else."""

from __future__ import annotations

import json
import pwd
from collections.abc import Callable
from pathlib import Path

from tests import programs
from tests.daemon import Daemon
from tests.e2e.conftest import trusting

SOMEBODY = "daemon"
EVERYBODY = "caller = { any = true }"


def test_it_is_judged_as_that_user(
    start: Callable[..., Daemon], images: dict[str, Path], installed: Path
) -> None:
    uid = pwd.getpwnam(SOMEBODY).pw_uid
    policy = trusting(images["erofs"].parent)
    assert EVERYBODY in policy
    daemon = start(policy.replace(EVERYBODY, f'caller = {{ users = ["{SOMEBODY}"] }}'))
    command = [installed / "bin/mountctl", "explain", "--json"]
    mine = programs.run([*command, images["erofs"]], daemon.socket)
    assert json.loads(mine.stdout)["decision"]["verdict"] == "deny", mine
    theirs = programs.run([*command, "--as", SOMEBODY, images["erofs"]], daemon.socket)
    assert json.loads(theirs.stdout)["decision"]["verdict"] == "allow", theirs
    assert theirs.returncode == 0
    assert f"uid {uid}" in json.loads(theirs.stdout)["facts"]["caller"]


def test_who_there_is_not_and_who_may_not(
    start: Callable[..., Daemon], images: dict[str, Path], installed: Path
) -> None:
    daemon = start(trusting(images["erofs"].parent))
    command = [installed / "bin/mountctl", "explain", "--as"]
    done = programs.run([*command, "no-such-user", images["erofs"]], daemon.socket)
    assert done.returncode == 1
    assert "a user “no-such-user”" in done.stderr
    done = programs.as_user([*command, SOMEBODY, images["erofs"]], daemon.socket)
    assert done.returncode == 1
    programs.check_line(done, f"^mountctl: --as {SOMEBODY} is for root.* .hint: run it as root, or without")
