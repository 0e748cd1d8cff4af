"""Stacks: what goes with them, whether they are dropped, revoked, or their workers are killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mountd.client import Client
from tests.daemon import Daemon
from tests.e2e.calls import mount_fds
from tests.e2e.conftest import trusting
from tests.e2e.loops import loops_over, wait_until_dropped
from tests.e2e.stacks.calls import all_layers, mounted, refusal, user
from tests.e2e.trust import STORED, Case, Makers, digest_of, key_sections, source, users_file
from tests.rogue import eventually, settled

KILLS = 40


def test_layers_go_with_the_stack(serving: Daemon, layers: dict[str, Path]) -> None:
    reply = mounted(serving, all_layers(layers))
    assert len(loops_over(layers["ext4"])) == 1
    reply.close()
    wait_until_dropped(layers["ext4"])
    wait_until_dropped(layers["squashfs"])


def test_it_is_listed_and_revoked(serving: Daemon, layers: dict[str, Path]) -> None:
    with mounted(serving, all_layers(layers)) as reply:
        id = reply.mounts[0]["id"]
        with Client(str(serving.socket)) as client:
            listed = client.call("List", {"all": True}, [])[0]["mounts"]
            assert isinstance(listed, list)
            (found,) = [each for each in listed if each["id"] == id]
            assert found["fileSystemType"] == "overlay"
            assert all(str(path) in found["source"] for path in layers.values())
            told = client.call("io.mountd.Admin.Revoke", {"id": id}, [])[0]
            assert "held" in told
    with Client(str(serving.socket)) as client:
        left = client.call("List", {"all": True}, [])[0]["mounts"]
        assert isinstance(left, list)
        assert id not in [each["id"] for each in left]


def test_a_stack_is_revoked_by_the_digest_of_any_layer(
    begin: Callable[[str], Case], makers: Makers, place: Path, other: bytes
) -> None:
    case = begin(key_sections(makers.keys) + STORED)
    with users_file(place, case.data) as one, users_file(place, other) as two:
        fds = [os.open(path, os.O_RDONLY) for path in (one, two)]
        signatures = [source(makers.own["ed25519"](each)) for each in (case.data, other)]
        both = {"layers": [{**each, "imageFileDescriptor": n} for n, each in enumerate(signatures)]}
        with user():
            reply = mount_fds(case.daemon.socket, both, fds)
        with reply, Client(str(case.daemon.socket)) as client:
            assert reply.decision["trustedBy"] == "stored"
            for each in (case.data, other):
                told = client.call("io.mountd.Admin.Revoke", {"digest": digest_of(each)}, [])[0]
                assert told["held"]
        for fd in fds:
            os.close(fd)


def test_workers_are_killed_at_any_moment(start: Callable[..., Daemon], layers: dict[str, Path]) -> None:
    """What a worker had made of a stack goes with it."""
    daemon, dice = start(trusting(layers["erofs"].parent)), random.Random(41)
    before = settled(daemon)
    begun = time.perf_counter()
    mounted(daemon, all_layers(layers)).close()
    longest = time.perf_counter() - begun
    ends = {"": 0}
    for _ in range(KILLS):
        assert eventually(lambda: len(daemon.workers) >= 1)
        killer = threading.Timer(dice.uniform(0, longest), kill_workers, (daemon,))
        killer.start()
        try:
            name, _ = refusal(daemon, all_layers(layers))
        finally:
            killer.join()
        ends[name] = ends.get(name, 0) + 1
    assert set(ends) <= {"", "SyscallError", "MountFailed", "Unreachable", "RemoteError"}, ends
    assert sum(ends.values()) > ends[""] > 0, ends
    # The last ones may have been killed at rest, and one be asked before that is noticed.
    settled(daemon)
    assert eventually(lambda: refusal(daemon, all_layers(layers)) == ("", ""))
    assert eventually(lambda: daemon.held() == before, 10), (before, daemon.held())
    for image in layers.values():
        wait_until_dropped(image)


def kill_workers(daemon: Daemon) -> None:
    for pid in daemon.workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
