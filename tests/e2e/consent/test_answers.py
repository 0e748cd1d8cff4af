"""Rules that ask: what the answers of polkit lead to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.fds import OwnedFd
from tests.container import USER, as_user
from tests.daemon import Daemon
from tests.e2e.calls import mount, mount_fds, outcome, refused
from tests.e2e.conftest import TMPFS_RULE, trusting
from tests.e2e.consent.callers import Caller, asking, eventually, questions
from tests.e2e.consent.polkit import Polkit, details_of


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

    def test_to_write_is_another_action(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]
    ) -> None:
        daemon = begin()
        # Which nobody but root could open so.
        with OwnedFd(os.open(images["ext4"], os.O_RDWR)) as image:

            def work() -> object:
                source = {"imageFileDescriptor": 0}
                return mount_fds(daemon.socket, source, [image.fileno()], readOnly=False)

            polkit.answer(1)
            as_user(lambda: refused(work, "DeniedByPolicy", "polkit does not authorize it"))
            assert polkit.asked()[1] == "io.mountd.mount-image-writable"
            polkit.answer(0)
            assert as_user(lambda: outcome(work)) == ("", "")
        words = polkit.asked()
        assert words[1] == "io.mountd.mount-image-writable"
        assert details_of(words)["source"] == str(images["ext4"])
