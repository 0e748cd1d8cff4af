"""Rules that ask: what polkit is asked, what its answers lead to, and what a question must not hold up.

The daemon has a mount namespace of its own, in which pkcheck(1) is a program that answers as the test says;
tests/systemd has the real one.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.client import Client, Request
from mountd.errors import DeniedByPolicy, InUse
from mountd.fds import OwnedFd
from mountd.kernel.flags import Clone
from mountd.kernel.libc import call
from tests.container import USER, as_user
from tests.daemon import Daemon
from tests.e2e.calls import mount, mount_fds, outcome, refused
from tests.e2e.conftest import TMPFS_RULE, trusting
from tests.e2e.trust import Case, Makers, digest_of, key_sections, rule, source, users_file
from tests.process import in_child

SECONDS = 20.0
OTHER = USER + 7
STORED = rule("asks", "any = true", '"stored"', ', signature = "ed25519"')
FAKE = """#!/bin/sh
printf '%s\\n' "$@" END > {0}/asked
read answer < {0}/answer
exit "$answer"
"""


def asking(text: str) -> str:
    return text.replace('verdict = "allow"', 'verdict = "ask"')


class Polkit:
    """What the daemon takes for polkit."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        self.directory = directory
        self._fds = []
        for name in ("asked", "answer"):
            os.mkfifo(directory / name, 0o600)
            # Open at both ends: whoever opens one of them does not wait, and nothing is lost.
            self._fds.append(os.open(directory / name, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        (directory / "pkcheck").write_text(FAKE.format(directory))
        (directory / "pkcheck").chmod(0o755)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)

    def asked(self, seconds: float = SECONDS) -> list[str]:
        """Wait for a question and return its words, [] for none."""
        text, deadline = b"", time.monotonic() + seconds
        while not text.endswith(b"\nEND\n"):
            if not select.select([self._fds[0]], [], [], max(0.0, deadline - time.monotonic()))[0]:
                assert not text
                return []
            text += os.read(self._fds[0], 1)
        return text.decode().splitlines()[:-1]

    def answer(self, status: int) -> None:
        """Answer one question, that is or will be asked, with the exit status of pkcheck(1)."""
        os.write(self._fds[1], b"%d\n" % status)

    def enter(self) -> None:
        """Be where this is polkit."""
        self._namespace()
        call("mount", os.fsencode(self.directory / "pkcheck"), b"/usr/bin/pkcheck", b"", MS_BIND, None)

    def enter_without(self) -> None:
        """Be where there is no polkit."""
        self._namespace(bus=False)

    def _namespace(self, *, bus: bool = True) -> None:
        call("unshare", Clone.NEWNS)
        call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        call("mount", b"tmpfs", b"/run/dbus", b"tmpfs", 0, None)
        if bus:
            socket.socket(socket.AF_UNIX).bind("/run/dbus/system_bus_socket")


MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18


@pytest.fixture
def polkit(place: Path) -> Iterator[Polkit]:
    made = Polkit(place / "polkit")
    yield made
    made.close()
    for each in made.directory.iterdir():
        each.unlink()
    made.directory.rmdir()


@pytest.fixture
def begin(
    start: Callable[..., Daemon], polkit: Polkit, place: Path, images: dict[str, Path]
) -> Callable[..., Daemon]:
    def started(policy: str = "", enter: Callable[[], None] = polkit.enter) -> Daemon:
        os.makedirs("/run/dbus", exist_ok=True)
        text = policy or asking(trusting(place / "trusted", access='"read-write"')) + TMPFS_RULE
        return start(text, preexec_fn=enter)

    return started


class Caller(threading.Thread):
    """A user in a process of its own who asks, and what came of it."""

    def __init__(self, work: Callable[[], object], uid: int = USER) -> None:
        super().__init__()
        self._work, self._uid = work, uid
        self.found: tuple[str, str] | None = None
        self.start()

    def run(self) -> None:
        self.found = as_user(lambda: outcome(self._work), self._uid)

    def result(self) -> tuple[str, str]:
        self.join(SECONDS)
        assert self.found is not None
        return self.found


def details_of(words: list[str]) -> dict[str, str]:
    return {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "--detail"}


def eventually(check: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def questions(daemon: Daemon) -> list[int]:
    """What the workers wait for."""
    return [child for worker in daemon.workers for child in daemon.children(worker)]


def removed(case: Case, digest: str) -> bool:
    """Remove an image from the store, unless a mount is still there for who asks for the same again."""
    try:
        case.store().remove(digest, 0)
    except InUse:
        return False
    return True


class TestAnswers:
    def test_yes(self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]) -> None:
        daemon = begin()
        polkit.answer(0)

        def work() -> tuple[object, int]:
            with mount(daemon.socket, images["ext4"]) as reply:
                return reply.decision["verdict"], os.getpid()

        verdict, pid = as_user(work)
        assert verdict == "allow"
        words = polkit.asked()
        assert words[:2] == ["--action-id", "io.mountd.mount-image"]
        number, started, uid = words[words.index("--process") + 1].split(",")
        assert (int(number), int(uid)) == (pid, USER)
        assert int(started) > 0
        assert "--allow-user-interaction" not in words
        assert details_of(words) == {
            "source": str(images["ext4"]),
            "digest": "unknown",
            "signer": "nobody",
            "rule": "trusted in the test",
        }

    def test_interactive_only_if_the_request_says_so(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]
    ) -> None:
        daemon = begin()
        for interactive in (True, False, None):
            polkit.answer(0)
            assert as_user(
                lambda wish=interactive: outcome(  # type: ignore[misc]
                    lambda: mount(daemon.socket, images["erofs"], interactive=wish)
                )
            ) == ("", "")
            assert ("--allow-user-interaction" in polkit.asked()) is (interactive is True)

    @pytest.mark.parametrize(
        ("status", "name", "text"),
        [
            (1, "DeniedByPolicy", "polkit does not authorize it"),
            (2, "InteractiveAuthenticationRequired", "nobody could be asked"),
            (3, "DeniedByPolicy", "nobody has consented"),
            (127, "DeniedByPolicy", "polkit cannot be asked: status 127"),
            (5, "DeniedByPolicy", "polkit cannot be asked: status 5"),
        ],
    )
    def test_no(
        self,
        begin: Callable[..., Daemon],
        polkit: Polkit,
        images: dict[str, Path],
        status: int,
        name: str,
        text: str,
    ) -> None:
        daemon = begin()
        polkit.answer(status)
        as_user(lambda: refused(lambda: mount(daemon.socket, images["erofs"]), name, text))

    def test_a_program_that_is_killed_is_no_yes(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]
    ) -> None:
        daemon = begin()
        caller = Caller(lambda: mount(daemon.socket, images["erofs"]))
        assert polkit.asked()
        eventually(lambda: questions(daemon))
        for pid in questions(daemon):
            os.kill(pid, signal.SIGKILL)
        assert caller.result()[0] == "DeniedByPolicy"

    def test_actions(self, begin: Callable[..., Daemon], polkit: Polkit, place: Path) -> None:
        daemon = begin(asking(trusting(place / "trusted") + TMPFS_RULE))
        polkit.answer(0)
        assert as_user(lambda: outcome(lambda: mount(daemon.socket, "tmpfs:1M"))) == ("", "")
        words = polkit.asked()
        assert words[1] == "io.mountd.mount-tmpfs"
        assert details_of(words)["source"] == "tmpfs"


class TestWhoIsAsked:
    def test_root_needs_nobody(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]
    ) -> None:
        daemon = begin()
        assert outcome(lambda: mount(daemon.socket, images["erofs"])) == ("", "")
        assert polkit.asked(0.2) == []

    def test_polkit_knows_nobody_in_a_user_namespace(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path], containers: None
    ) -> None:
        daemon = begin()

        def work() -> None:
            call("unshare", Clone.NEWUSER)
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {USER} 1")
            text = "polkit knows nobody who is in a user namespace"
            refused(lambda: mount(daemon.socket, images["erofs"], userns="none"), "DeniedByPolicy", text)

        as_user(work)
        assert polkit.asked(0.2) == []

    def test_root_without_the_capability_is_no_administrator(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]
    ) -> None:
        daemon = begin()

        def work() -> None:
            import ctypes

            call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
            refused(lambda: mount(daemon.socket, images["erofs"]), "DeniedByPolicy", "root without CAP_SYS")

        in_child(work)
        assert polkit.asked(0.2) == []

    def test_no_polkit(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path], place: Path
    ) -> None:
        daemon = begin(enter=polkit.enter_without)

        def work() -> tuple[str, object, object]:
            try:
                mount(daemon.socket, images["erofs"], interactive=True).close()
            except DeniedByPolicy as error:
                return str(error), error.hint, error.parameters["rule"]
            return "", None, None

        text, hint, decided = as_user(work)
        assert "there is no polkit on this system (/run/dbus/system_bus_socket)" in text
        assert "install polkitd" in str(hint)
        assert decided == "trusted in the test"

    def test_explain_says_what_would_be_asked_and_asks_nobody(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]
    ) -> None:
        daemon = begin()

        def work() -> dict[str, object]:
            with Client(str(daemon.socket)) as client, Request(str(images["erofs"])) as request:
                return client.explain(request.source, request.fds, interactive=True)

        reply = as_user(work)
        decision, facts = reply["decision"], reply["facts"]
        assert isinstance(decision, dict)
        assert isinstance(facts, dict)
        assert decision["verdict"] == "ask"
        assert "an administrator has to consent (polkit)" in decision["reason"]
        assert facts["polkit action"] == "io.mountd.mount-image"
        assert f"source {images['erofs']}" in facts["polkit details"]
        assert polkit.asked(0.2) == []


class TestWhatGoesOn:
    def test_a_silent_polkit_costs_a_worker_and_others_are_served(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]
    ) -> None:
        daemon = begin()
        caller = Caller(lambda: mount(daemon.socket, images["erofs"]))
        assert polkit.asked()
        # The same owner, with what needs nobody's consent, and another.
        for uid in (USER, OTHER):
            assert as_user(lambda: outcome(lambda: mount(daemon.socket, "tmpfs:1M")), uid) == ("", "")
        assert caller.result()[0] == "TimedOut"
        assert questions(daemon) == []

    def test_questions_are_bounded(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]
    ) -> None:
        daemon = begin()

        def work() -> object:
            return mount(daemon.socket, images["erofs"], interactive=True)

        callers = []
        for _ in range(2):
            callers.append(Caller(work))
            assert polkit.asked()
        limit = "at most 2 questions of one owner that wait"
        as_user(lambda: refused(work, "LimitExceeded", limit))
        # Each owner has places of its own, up to those of all; none of them holds up what asks nothing.
        for uid in (OTHER, OTHER, OTHER + 1, OTHER + 1, OTHER + 2, OTHER + 2):
            callers.append(Caller(work, uid))
            assert polkit.asked()
        as_user(lambda: refused(work, "LimitExceeded", "at most 8 questions that wait"), OTHER + 3)
        for uid in (USER, OTHER, OTHER + 3):
            for _ in range(3):
                assert as_user(lambda: outcome(lambda: mount(daemon.socket, "tmpfs:1M")), uid) == ("", "")
        for pid in questions(daemon):
            os.kill(pid, signal.SIGKILL)
        assert {caller.result()[0] for caller in callers} == {"DeniedByPolicy"}
        # All places are free again.
        polkit.answer(0)
        assert as_user(lambda: outcome(work)) == ("", "")

    @pytest.mark.parametrize("how", ["closes", "ends"])
    def test_a_caller_that_goes_takes_its_question_along(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path], how: str
    ) -> None:
        daemon = begin()
        reader, writer = os.pipe()

        def work() -> None:
            with Client(str(daemon.socket)) as client, Request(str(images["erofs"])) as request:
                parameters = {"source": request.source, "interactive": True}
                call = {"method": "io.mountd.Mount.Mount", "parameters": parameters}
                client._send(call, request.fds, time.monotonic() + SECONDS)
                os.read(reader, 1)
                if how == "closes":
                    client.close()
                    os.read(reader, 1)
                    return
                os._exit(0)

        child = threading.Thread(target=as_user, args=(work,))
        if how == "ends":
            child = threading.Thread(target=self._quietly, args=(work,))
        child.start()
        assert polkit.asked()
        assert questions(daemon)
        os.write(writer, b"x")
        eventually(lambda: not questions(daemon))
        os.write(writer, b"x")
        child.join()
        os.close(reader)
        os.close(writer)
        eventually(lambda: "Mount for uid" in daemon.log)
        polkit.answer(0)
        assert as_user(lambda: outcome(lambda: mount(daemon.socket, images["erofs"]))) == ("", "")

    def _quietly(self, work: Callable[[], None]) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                os.setgroups([])
                os.setresgid(USER, USER, USER)
                os.setresuid(USER, USER, USER)
                work()
            finally:
                os._exit(1)
        os.waitpid(pid, 0)

    def test_a_policy_that_is_read_anew_ends_the_question(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]
    ) -> None:
        daemon = begin()
        caller = Caller(lambda: mount(daemon.socket, images["erofs"], interactive=True))
        assert polkit.asked()
        daemon.signal(signal.SIGHUP)
        name, text = caller.result()
        assert name == "DeniedByPolicy"
        assert "the policy was read anew" in text
        assert questions(daemon) == []

    def test_the_daemon_ends_without_waiting_for_people(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]
    ) -> None:
        daemon = begin()
        caller = Caller(lambda: mount(daemon.socket, images["erofs"], interactive=True))
        assert polkit.asked()
        assert daemon.stop() == 0
        name, text = caller.result()
        assert name == "DeniedByPolicy"
        assert "mountd is stopping" in text

    def test_a_caller_that_has_become_somebody_else(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]
    ) -> None:
        daemon = begin()

        def work() -> None:
            os.setresuid(USER, USER, 0)
            with Client(str(daemon.socket)) as client, Request(str(images["erofs"])) as request:
                parameters = {"source": request.source, "interactive": True}
                call = {"method": "io.mountd.Mount.Mount", "parameters": parameters}
                client._send(call, request.fds, time.monotonic() + SECONDS)
                assert polkit.asked()
                os.setresuid(0, 0, 0)
                polkit.answer(0)
                message = client._receive(time.monotonic() + SECONDS)
                with contextlib.closing(message):
                    assert str(message.body["error"]).endswith(".PeerGone"), message.body
                    assert message.fds == []

        in_child(work)


class TestDetails:
    NAME = "a\n'\"”<b>$(rule)%s‮&\x1b]0;x\x07" + "ä" * 100 + "; --allow-user-interaction"

    def test_what_is_shown_is_one_line_without_markup(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]
    ) -> None:
        daemon = begin(asking(trusting(images["erofs"].parent / "*")))
        directory = images["erofs"].parent / ("d" * 150)
        directory.mkdir(mode=0o755)
        path = directory / self.NAME
        try:
            path.write_bytes(images["erofs"].read_bytes())
            path.chmod(0o644)
            polkit.answer(0)
            assert as_user(lambda: outcome(lambda: mount(daemon.socket, path))) == ("", "")
        finally:
            path.unlink()
            directory.rmdir()
        words = polkit.asked()
        assert "--allow-user-interaction" not in words
        shown = details_of(words)["source"]
        assert len(shown) <= 201
        assert shown.isprintable()
        assert shown.startswith(str(images["erofs"].parent))
        assert not set(shown) & set('<>&“”"')


class TestStored:
    """What is asked about is in the store before anybody is asked, and out of it again after a no."""

    def test_consent_is_about_the_copy(
        self, start: Callable[..., Daemon], polkit: Polkit, makers: Makers, place: Path, data: bytes
    ) -> None:
        policy = key_sections(makers.keys) + asking(STORED)
        case = Case(start(policy, preexec_fn=polkit.enter), data)
        signature = makers.own["ed25519"](data)
        with users_file(place, data) as path:

            def work() -> object:
                with OwnedFd(os.open(path, os.O_RDWR)) as fd:
                    return mount_fds(case.daemon.socket, source(signature), [fd.fileno()])

            caller = Caller(work)
            words = polkit.asked()
            assert details_of(words)["digest"] == digest_of(data)
            assert details_of(words)["signer"] != "nobody"
            assert case.stored() == [digest_of(data)]
            # Whoever is asked has seen another image: what is mounted is still the one that is named.
            path.write_bytes(bytes(len(data)))
            polkit.answer(0)
            assert caller.result() == ("", "")
            path.write_bytes(data)
            eventually(lambda: removed(case, digest_of(data)))
            polkit.answer(1)
            assert as_user(lambda: outcome(work))[0] == "DeniedByPolicy"
            assert case.stored() == []

    @pytest.mark.parametrize("status", [0, 1, 2])
    def test_an_import_is_asked_about_before_it_is_one(
        self,
        start: Callable[..., Daemon],
        polkit: Polkit,
        makers: Makers,
        place: Path,
        data: bytes,
        status: int,
    ) -> None:
        case = Case(start(key_sections(makers.keys) + asking(STORED), preexec_fn=polkit.enter), data)
        with users_file(place, data) as path:

            def work() -> None:
                with OwnedFd(os.open(path, os.O_RDONLY)) as fd, Client(str(case.daemon.socket)) as client:
                    parameters = {"imageFileDescriptor": 0, "interactive": True}
                    list(client.call_more("io.mountd.Images.Import", parameters, [fd]))

            caller = Caller(work)
            words = polkit.asked()
            assert words[1] == "io.mountd.import-image"
            assert "--allow-user-interaction" in words
            assert details_of(words) == {"source": str(path), "digest": digest_of(data), "signer": "nobody"}
            assert list(case.store().records()) == []
            # The next of the same owner would hold another of the places for transfers.
            as_user(lambda: refused(work, "LimitExceeded", "at most 1 questions of one owner"))
            polkit.answer(status)
            name = {0: "", 1: "DeniedByPolicy", 2: "InteractiveAuthenticationRequired"}[status]
            assert caller.result()[0] == name
            assert case.stored() == ([] if status else [digest_of(data)])
