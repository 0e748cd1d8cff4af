"""io.mountd.Admin: who may ask, what is told, and a reload that says what came of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.daemon.limits import MAXIMUM_CONNECTIONS_PER_OWNER
from mountd.errors import MountdError
from mountd.fds import OwnedFd
from mountd.kernel.libc import call
from mountd.version import VERSION
from tests.container import as_user, in_container
from tests.daemon import Daemon
from tests.e2e.admin import ADMIN, ask
from tests.e2e.calls import mount, outcome
from tests.e2e.conftest import trusting
from tests.rogue import eventually

METHODS = ("Status", "Metrics", "GetPolicy", "Reload")
PR_CAPBSET_DROP, CAP_SYS_ADMIN = 24, 21
BROKEN = "x = 1\n"


class TestWhoMayAsk:
    """Nobody but the host's root."""

    @staticmethod
    def refused(daemon: Daemon) -> set[tuple[str, str | None, bool]]:
        """Ask everything; return the errors and whether there was a hint."""
        found = set()
        for method in METHODS:
            try:
                ask(daemon, method)
                found.add((method, None, False))
            except MountdError as error:
                found.add((type(error).__name__, str(error.parameters.get("reason")), bool(error.hint)))
        return found

    DENIED = {("DeniedByPolicy", "only the host's root administers mountd", True)}

    def test_an_ordinary_user(self, daemon: Daemon) -> None:
        assert as_user(lambda: self.refused(daemon), 4710) == self.DENIED

    def test_root_of_a_container(self, daemon: Daemon, containers: None) -> None:
        assert in_container(lambda: self.refused(daemon)) == self.DENIED

    def test_uid_0_of_the_host_in_a_container_of_its_own(self, daemon: Daemon, containers: None) -> None:
        """Its uid is the host's 0, and it has all capabilities, but over its own namespace only."""
        whole = ((0, 0, 1),)
        assert in_container(lambda: self.refused(daemon), uids=whole, owner=0) == self.DENIED

    def test_the_hosts_root_without_the_capability(self, daemon: Daemon) -> None:
        def without() -> set[tuple[str, str | None, bool]]:
            call("prctl", PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0)
            # What is not in the bounding set is lost with the next program, or by dropping it here.
            drop_sys_admin()
            return self.refused(daemon)

        from tests.container import forked

        assert forked(without) == self.DENIED

    def test_root(self, daemon: Daemon) -> None:
        for method in METHODS:
            ask(daemon, method)

    def test_no_line_in_the_journal_for_a_question(self, start: Callable[..., Daemon]) -> None:
        daemon = start("")
        questions = ("Status", "Metrics", "GetPolicy")
        for method in questions:
            ask(daemon, method)
        assert not any(method in daemon.log for method in questions), daemon.log
        ask(daemon, "Reload")
        assert "the policy was reloaded: 0 rules" in daemon.log
        assert eventually(lambda: f"Reload for uid 0 (pid {os.getpid()}): done" in daemon.log)
        as_user(lambda: self.refused(daemon), 4710)
        # The line is written after the answer.
        assert eventually(lambda: daemon.log.count("refused with DeniedByPolicy") == len(METHODS))

    def test_a_descriptor_is_refused(self, daemon: Daemon) -> None:
        def status() -> None:
            with Client(str(daemon.socket)) as client, OwnedFd(os.open("/", os.O_PATH)) as fd:
                client.call(f"{ADMIN}.Status", {}, [fd])

        assert outcome(status)[0] == "InvalidParameter"


def drop_sys_admin() -> None:
    """Take the capability out of the effective set (capset(2))."""
    import ctypes

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    class Data(ctypes.Structure):
        _fields_ = (
            ("effective", ctypes.c_uint32),
            ("permitted", ctypes.c_uint32),
            ("inherit", ctypes.c_uint32),
        )

    libc = ctypes.CDLL(None, use_errno=True)
    header, data = Header(0x20080522, 0), (Data * 2)()
    assert libc.capget(ctypes.byref(header), data) == 0
    data[0].effective &= ~(1 << CAP_SYS_ADMIN)
    assert libc.capset(ctypes.byref(header), data) == 0


class TestStatus:
    """What the daemon says of itself."""

    def test_the_daemon(self, start: Callable[..., Daemon], images: dict[str, Path]) -> None:
        before = int(time.time())
        daemon = start(trusting(images["erofs"].parent))
        status = ask(daemon, "Status")
        assert (status["version"], status["pid"]) == (VERSION, daemon.process.pid)
        assert before <= status["started"] <= time.time()
        assert status["sockets"] == [str(daemon.socket)]
        assert status["store"]["path"] == str(daemon.directory / "state")
        assert (status["store"]["images"], status["store"]["bytes"]) == (0, 0)
        limits = {each["name"]: each["maximum"] for each in status["limits"]}
        assert limits["connections of one owner"] == MAXIMUM_CONNECTIONS_PER_OWNER
        assert len(limits) == len(status["limits"])
        for name, maximum in {
            "mounts of one user at a time": 1024,
            "questions that wait for an answer": 8,
            "questions of one owner that wait for an answer": 2,
            "questions about imports that wait for an answer": 2,
            "questions of one owner about imports that wait for an answer": 1,
            "encrypted images that are opened at once": 2,
            "encrypted images of one owner that are opened at once": 1,
            "layers of a stack": 32,
            "layers of a stack, with those of its images": 160,
            "bytes in the store": 256 << 30,
        }.items():
            assert limits[name] == maximum, name
        assert {each["name"] for each in status["kernel"] if each["available"]} >= {"fsopen", "statmount"}
        for each in status["kernel"]:
            assert each["available"] or each["detail"]

    def test_how_many_mounts_is_what_it_was_told(self, start: Callable[..., Daemon]) -> None:
        daemon = start("", "--max-mounts", "7")
        limits = {each["name"]: each["maximum"] for each in ask(daemon, "Status")["limits"]}
        assert limits["mounts of one user at a time"] == 7

    def test_the_pool(self, daemon: Daemon) -> None:
        def counted() -> bool:
            pool = ask(daemon, "Status")["pool"]
            return bool(
                pool["workers"] == pool["idle"] + pool["busy"] + pool["stuck"] == len(daemon.workers)
            )

        assert eventually(counted)
        pool = ask(daemon, "Status")["pool"]
        assert pool["busy"] >= 1, "whoever answers is busy"
        assert pool["connections"] >= 1
        assert pool["forks"] >= pool["workers"]
        assert (pool["stuck"], pool["restarts"]) == (0, 0)

    def test_files_and_masks(self, start: Callable[..., Daemon], images: dict[str, Path]) -> None:
        daemon = start("")
        second = daemon.directory / "second.d"
        second.mkdir(mode=0o755)
        (second / "test.toml").write_text(BROKEN)
        (second / "own.toml").write_text(trusting(images["erofs"].parent))
        (daemon.policy_dir / "mask.toml").write_text("")
        (second / "mask.toml").write_text(BROKEN)
        daemon.stop()
        daemon._command += ["--policy-dir", second]
        daemon.set_policy("# nothing\n")
        daemon.launch()
        policy = ask(daemon, "Status")["policy"]
        first = daemon.policy_dir
        assert policy["directories"] == [str(first), str(second)]
        assert {each["path"]: (each["mask"], each.get("maskedBy")) for each in policy["files"]} == {
            str(first / "test.toml"): (False, None),
            str(first / "mask.toml"): (True, None),
            str(second / "own.toml"): (False, None),
            str(second / "test.toml"): (False, str(first / "test.toml")),
            str(second / "mask.toml"): (False, str(first / "mask.toml")),
        }
        assert (policy["rules"], policy["broken"], policy["faults"]) == (1, False, [])

    def test_a_policy_that_was_broken_from_the_start(self, start: Callable[..., Daemon]) -> None:
        daemon = start(BROKEN)
        status = ask(daemon, "Status")["policy"]
        assert status["broken"]
        assert [each["key"] for each in status["faults"]] == ["x"]
        assert ask(daemon, "GetPolicy")["text"] == ""
        daemon.set_policy("")
        assert ask(daemon, "Reload")["reloaded"]
        assert not ask(daemon, "Status")["policy"]["broken"]


class TestReload:
    """As SIGHUP, with an answer."""

    def test_the_new_policy_holds_with_the_answer(
        self, start: Callable[..., Daemon], images: dict[str, Path]
    ) -> None:
        daemon, image = start(""), images["erofs"]
        for number in range(5):
            daemon.set_policy(trusting(image.parent))
            assert ask(daemon, "Reload") == {"reloaded": True, "rules": 1, "faults": []}
            assert {outcome(lambda: mount(daemon.socket, image))[0] for _ in range(4)} == {""}
            daemon.set_policy("")
            assert ask(daemon, "Reload") == {"reloaded": True, "rules": 0, "faults": []}
            assert outcome(lambda: mount(daemon.socket, image))[0] == "DeniedByPolicy"
            assert ask(daemon, "Status")["policy"]["generation"] == 1 + 2 * (number + 1)

    def test_a_broken_one_leaves_the_old_in_force(
        self, start: Callable[..., Daemon], images: dict[str, Path]
    ) -> None:
        image = images["erofs"]
        daemon = start(trusting(image.parent))
        text = ask(daemon, "GetPolicy")["text"]
        assert "trusted in the test" in text
        (daemon.policy_dir / "a.toml").write_text(BROKEN)
        (daemon.policy_dir / "b.toml").write_text("y = 2\n")
        reply = ask(daemon, "Reload")
        assert not reply["reloaded"]
        assert [each["file"] for each in reply["faults"]] == [
            str(daemon.policy_dir / name) for name in ("a.toml", "b.toml")
        ]
        assert outcome(lambda: mount(daemon.socket, image))[0] == ""
        state = ask(daemon, "Status")["policy"]
        assert (state["faults"], state["generation"]) == (reply["faults"], 1)
        assert ask(daemon, "GetPolicy")["text"] == text
        metrics = ask(daemon, "Metrics")
        assert metrics["lastReloadWorked"] is False
        for name in ("a.toml", "b.toml"):
            (daemon.policy_dir / name).unlink()
        assert ask(daemon, "Reload")["reloaded"]
        assert ask(daemon, "Status")["policy"]["faults"] == []
        assert ask(daemon, "Metrics")["lastReloadWorked"] is True

    def test_many_long_faults_fit_into_the_answer(self, start: Callable[..., Daemon]) -> None:
        daemon = start("")
        lines = [f'"{"ä" * 150}{number}" = {number}' for number in range(200)]
        daemon.set_policy("\n".join(lines))
        faults = ask(daemon, "Reload")["faults"]
        assert 1 < len(faults) < 100
        assert faults[-1]["reason"] == f"and {200 - len(faults) + 1} faults more"
        assert len(ask(daemon, "Status")["policy"]["faults"]) == 64

    def test_get_policy_is_a_policy(self, start: Callable[..., Daemon], images: dict[str, Path]) -> None:
        daemon, image = start(trusting(images["erofs"].parent)), images["erofs"]
        text = ask(daemon, "GetPolicy")["text"]
        assert text.startswith(f"# {daemon.policy_dir / 'test.toml'}:")
        daemon.set_policy(text)
        assert ask(daemon, "Reload")["reloaded"]
        assert outcome(lambda: mount(daemon.socket, image))[0] == ""

    def test_a_storm(self, start: Callable[..., Daemon], images: dict[str, Path]) -> None:
        """Many ask at once, with signals in between, while others mount: all are answered by what holds."""
        image = images["erofs"]
        daemon = start(trusting(image.parent))
        answers: list[object] = []
        mounts: list[str] = []
        going = True

        def reload() -> None:
            for _ in range(10):
                answers.append(ask(daemon, "Reload"))

        def neighbour() -> None:
            while going:
                mounts.append(outcome(lambda: mount(daemon.socket, image))[0])

        threads = [threading.Thread(target=reload) for _ in range(12)]
        mounting = threading.Thread(target=neighbour)
        for thread in (*threads, mounting):
            thread.start()
        for _ in range(20):
            daemon.signal(signal.SIGHUP)
            time.sleep(0.01)
        for thread in threads:
            thread.join(60)
        going = False
        mounting.join(60)
        assert answers == [{"reloaded": True, "rules": 1, "faults": []}] * 120
        assert len(mounts) > 1
        assert set(mounts) == {""}
        assert ask(daemon, "Status")["policy"]["generation"] > 2
        assert daemon.process.poll() is None

    def test_who_asks_and_leaves_holds_nobody_up(self, start: Callable[..., Daemon]) -> None:
        daemon = start("")
        before = daemon.settled()
        for _ in range(50):
            with Client(str(daemon.socket)) as client:
                client._socket.send(b'{"method":"io.mountd.Admin.Reload"}\0')
        assert ask(daemon, "Reload")["reloaded"]
        deadline = time.monotonic() + 10
        while daemon.settled() != before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert daemon.settled() == before

    def test_a_daemon_that_ends_says_so(self, start: Callable[..., Daemon]) -> None:
        """The fork server is held up in the middle; the listener drains, and gives nobody a wrong answer."""
        daemon = start("")
        server = daemon.fork_server
        found: list[str] = []
        os.kill(server, signal.SIGSTOP)
        try:
            asking = [
                threading.Thread(target=lambda: found.append(outcome(lambda: ask(daemon, "Reload"))[0]))
                for _ in range(2)
            ]
            for thread in asking:
                thread.start()
            time.sleep(0.5)
            assert not found
            daemon.signal(signal.SIGTERM)
            time.sleep(0.2)
        finally:
            os.kill(server, signal.SIGCONT)
        for thread in asking:
            thread.join(30)
        assert daemon.process.wait(20) == 0
        assert len(found) == 2
        assert set(found) <= {"", "ShuttingDown", "Unreachable"}

    def test_the_end_of_the_fork_server_while_somebody_waits(self, start: Callable[..., Daemon]) -> None:
        daemon = start("")
        server = daemon.fork_server
        os.kill(server, signal.SIGSTOP)
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(outcome(lambda: ask(daemon, "Reload"))[0]))
        thread.start()
        time.sleep(0.3)
        os.kill(server, signal.SIGKILL)
        thread.join(30)
        assert found, "an answer or the end of the connection"
        assert found[0] != ""
        daemon.wait_until_served()
        pool = ask(daemon, "Status")["pool"]
        assert (pool["restarts"], pool["stuck"]) == (1, 0)
        assert eventually(lambda: ask(daemon, "Status")["pool"]["workers"] == len(daemon.workers))


@pytest.mark.parametrize("method", METHODS)
def test_more_is_not_offered(daemon: Daemon, method: str) -> None:
    def more() -> None:
        with Client(str(daemon.socket)) as client:
            list(client.call_more(f"{ADMIN}.{method}", {}, []))

    assert outcome(more)[0] == "InvalidParameter"
