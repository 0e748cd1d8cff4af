"""Files that are trusted once mountd has a copy of its own: what is copied, and what is judged."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mountd.errors import InUse, InvalidImage, NotImmutable
from mountd.fds import OwnedFd
from tests.container import USER, as_user
from tests.daemon import Daemon
from tests.e2e.calls import mount_fds, outcome, text_of
from tests.e2e.trust import (
    NONE,
    STORED,
    Case,
    Makers,
    as_the_user,
    digest_of,
    key_sections,
    signed_by,
    source,
    users_file,
)
from tests.signing import Signatory

ROUNDS = 120


class TestStoredByItself:
    def test_a_signed_file(self, begin: Callable[[str], Case], makers: Makers, place: Path) -> None:
        case = begin(key_sections(makers.keys) + STORED)
        signature = makers.own["ed25519"](case.data)

        def work() -> str:
            with (
                OwnedFd(os.open(path, os.O_RDWR)) as fd,
                mount_fds(case.daemon.socket, source(signature), [fd.fileno()]) as reply,
            ):
                # Nothing of the image has been read through the mount so far.
                os.pwrite(fd.fileno(), bytes(len(case.data)), 0)
                assert reply.decision["trustedBy"] == "stored"
                return text_of(reply)

        with users_file(place, case.data) as path:
            assert as_the_user(case, path, signature) == NONE
            assert case.stored() == [digest_of(case.data)]
            assert case.store().record(digest_of(case.data)).belongs_to(USER)
            assert as_user(work) == "hello from the image\n"
            assert as_the_user_refused(case, path, signature) == "UnsupportedFileSystem"

    def test_what_is_refused_is_never_copied(
        self, begin: Callable[[str], Case], makers: Makers, place: Path, other: bytes
    ) -> None:
        case = begin(key_sections(makers.keys) + STORED)
        with users_file(place, case.data) as path:
            for signature, name in (
                (None, "NotImmutable"),
                (makers.own["ed25519"](other), "NotImmutable"),
                (makers.foreign["ed25519"](case.data), "NotImmutable"),
                (makers.own["gpg"](case.data), "KeyUnknown"),  # holds, but is not the one that counts
            ):
                assert as_the_user(case, path, signature)[0] == name
                assert case.stored() == []
            good = makers.own["ed25519"](case.data)
            refused = as_the_user(case, path, good, imagePolicy="root=signed")
            assert refused[0] == "DeniedByPolicy"
            assert as_the_user(case, path, good, options=["suid"])[0] == "OptionNotPermitted"
            assert as_the_user(case, path, good, readOnly=False)[0] == "OptionNotPermitted"
            assert case.stored() == []
            assert as_the_user(case, path, good) == NONE
        assert case.stored() == [digest_of(case.data)]

    def test_not_where_the_policy_has_no_use_for_a_copy(
        self, begin: Callable[[str], Case], makers: Makers, place: Path
    ) -> None:
        case = begin(key_sections(makers.keys) + signed_by("ed25519", "sealed"))
        with users_file(place, case.data) as path:
            found = as_the_user(case, path, makers.own["ed25519"](case.data))
        assert found[0] == "NotImmutable"
        assert case.stored() == []

    def test_a_file_that_changes_meanwhile(
        self, begin: Callable[[str], Case], makers: Makers, place: Path, other: bytes
    ) -> None:
        """What is mounted is what was signed, or nothing; and the record is about what is stored."""
        case = begin(key_sections(makers.keys) + STORED)
        size = max(len(case.data), len(other))
        good, bad = case.data.ljust(size, b"\0"), other.ljust(size, b"\0")
        signature = makers.own["ed25519"](good)
        store = case.store()

        def ask() -> str:
            with OwnedFd(os.open(path, os.O_RDWR)) as fd:
                try:
                    reply = mount_fds(case.daemon.socket, source(signature), [fd.fileno()])
                except (NotImmutable, InvalidImage):
                    return ""
                with reply:
                    return text_of(reply)

        found = []
        with users_file(place, good) as path, writer(path, good, bad):
            for _ in range(ROUNDS):
                found.append(as_user(ask))
                for record in store.records():
                    assert record.digest == digest_of(good)
                    assert record.file_system is not None
                    with contextlib.suppress(InUse):
                        store.remove(record.digest, 0)  # so that it is stored anew
        assert set(found) == {"", "hello from the image\n"}
        assert set(case.stored()) <= {digest_of(good)}

    def test_a_key_that_is_replaced_after_the_import(
        self, begin: Callable[[str], Case], makers: Makers, place: Path
    ) -> None:
        keys = place / "replaced"
        keys.mkdir(mode=0o755)
        shutil.copy(makers.keys / "ed25519.key", keys / "ed25519.key")
        policy = f'[key.ed25519]\ned25519 = "{keys}/ed25519.key"\n' + STORED
        case = begin(policy)
        stored = {"reference": f"stored:{digest_of(case.data)}"}

        def ask() -> tuple[str, str]:
            return as_user(lambda: outcome(lambda: mount_fds(case.daemon.socket, stored, [])))

        with users_file(place, case.data) as path:
            assert as_the_user(case, path, makers.own["ed25519"](case.data)) == NONE
        assert ask() == NONE
        (keys / "ed25519.key").write_bytes(Signatory(keys, "ed25519 new", "ed25519").public)
        reload(case.daemon)
        name, text = ask()
        assert (name, "no signature came along" in text) == ("DeniedByPolicy", True)
        shutil.copy(makers.keys / "ed25519.key", keys / "ed25519.key")
        reload(case.daemon)
        assert ask() == NONE
        shutil.rmtree(keys)


def reload(daemon: Daemon) -> None:
    """Have it read the policy anew, and wait until no worker has the old one."""
    before = daemon.log.count("policy")
    workers = set(daemon.workers)
    daemon.signal(signal.SIGHUP)
    deadline = time.monotonic() + 10
    while daemon.log.count("policy") == before or workers & set(daemon.workers):
        assert time.monotonic() < deadline, daemon.log
        time.sleep(0.02)


def as_the_user_refused(case: Case, path: Path, signature: bytes) -> str:
    """Ask for a mount, and return the name of the error."""

    def ask() -> str:
        with OwnedFd(os.open(path, os.O_RDWR)) as fd:
            return outcome(lambda: mount_fds(case.daemon.socket, source(signature), [fd.fileno()]))[0]

    return as_user(ask)


@contextlib.contextmanager
def writer(path: Path, good: bytes, bad: bytes) -> Iterator[None]:
    """A process that keeps exchanging the contents of the file in place."""
    pid = os.fork()
    if pid == 0:
        try:
            fd = os.open(path, os.O_RDWR)
            while True:
                for data in (bad, good):
                    os.pwrite(fd, data, 0)
                    time.sleep(random.uniform(0, 0.004))
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
