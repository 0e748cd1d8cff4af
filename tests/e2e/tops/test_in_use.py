"""Stacks that can be written to: what is known of those that are in use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mountd.client import Client
from tests.container import USER, as_user
from tests.daemon import Daemon
from tests.e2e.calls import explain
from tests.e2e.conftest import trusting
from tests.e2e.directories import rule
from tests.e2e.stacks.calls import user
from tests.e2e.tops.calls import MIB, ask, mounted, refusal
from tests.e2e.tops.rules import ONE_TIME, WRITABLE


def test_it_is_listed_explained_and_counted(serving: Daemon, images: list[Path]) -> None:
    def work() -> tuple[object, ...]:
        told = ask(serving, images[:1], MIB, own=False, method=explain)
        with mounted(serving, images[:1], MIB, own=False) as reply:
            with Client(str(serving.socket)) as client:
                listed = client.call("List", {}, [])[0]["mounts"]
            another = refusal(serving, images[:1], MIB, own=False)
        # Its place is free again.
        return told, listed, reply.mounts[0]["id"], another, refusal(serving, images[:1], MIB, own=False)

    told, listed, id, another, again = as_user(work, ONE_TIME)
    facts, steps = told["facts"], told["steps"]  # type: ignore[index]
    assert told["decision"]["verdict"] == "allow"  # type: ignore[index]
    assert (facts["layers"], facts["top: source"]) == ("1", "tmpfs")
    assert any(step["reason"].startswith("source.top: ") for step in steps)
    (found,) = listed  # type: ignore[misc]
    assert (found["id"], found["readOnly"], found["fileSystemType"]) == (id, False, "overlay")
    assert found["rule"] == "trusted in the test, one at a time"
    assert found["source"].endswith(", tmpfs")
    assert (another[0], again) == ("LimitExceeded", ("", ""))


def test_another_daemon_knows_what_is_used(
    start: Callable[..., Daemon], images: list[Path], home: Path
) -> None:
    """The one that has made the mount was killed; the mount is still written to."""
    daemon = start(trusting(images[0].parent) + rule("own", '"caller"', WRITABLE))
    for path in (home, home / "upper", home / "upper/mine"):
        path.mkdir(exist_ok=True)
        os.chown(path, USER, USER)

    def work() -> None:
        fd = os.open("mine/later", os.O_CREAT | os.O_WRONLY, dir_fd=reply.mount.fileno())
        os.close(fd)

    with user():
        reply = mounted(daemon, images, home, own=False)
    with reply:
        daemon.process.kill()
        daemon.process.wait()
        daemon.launch()
        as_user(work)
        with user():
            assert refusal(daemon, images, home, own=False)[0] == "InUse"
        # By another name, it is the same.
        other = home / "other"
        other.mkdir()
        os.chown(other, USER, USER)
        (home / "upper").rename(other / "upper")
        with user():
            assert refusal(daemon, images, other, own=False)[0] == "InUse"
        assert os.listdir(other) == ["upper"]
    assert os.listdir(other / "upper/mine") == ["later"]
