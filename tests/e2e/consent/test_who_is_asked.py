"""Rules that ask: about whom polkit is asked, and where nobody can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mountd.client import Client, Request
from mountd.errors import DeniedByPolicy
from mountd.kernel.flags import Clone
from mountd.kernel.libc import call
from tests.container import USER, as_user
from tests.daemon import Daemon
from tests.e2e.calls import mount, outcome, refused
from tests.e2e.consent.polkit import Polkit
from tests.process import in_child


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
