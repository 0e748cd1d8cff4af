"""Rules that ask: what a question must not hold up, and what ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.client import Client, Request
from tests.container import USER, as_user
from tests.daemon import Daemon
from tests.e2e.calls import mount, outcome, refused
from tests.e2e.consent.callers import OTHER, Caller, eventually, questions
from tests.e2e.consent.polkit import SECONDS, Polkit
from tests.process import in_child


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
