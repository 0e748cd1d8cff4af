"""The counters of a running daemon, and mountctl metrics."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mountd.daemon.limits import DEADLINES, MAXIMUM_STUCK_PER_OWNER, MAXIMUM_WORKERS
from mountd.fds import OwnedFd
from mountd.service.phase import Phase
from tests.container import USER
from tests.daemon import Daemon
from tests.e2e import stored
from tests.e2e.admin import ask, counted
from tests.e2e.calls import explain, mount, outcome
from tests.e2e.conftest import trusting
from tests.e2e.test_shared import ask_as
from tests.fuse import Fuse, Op
from tests.programs import Done, check_line, run
from tests.programs import as_user as user_runs
from tests.rogue import Raw, call, error, eventually, mount_call, opened

SAMPLE = re.compile(r"^(?P<name>[a-z_]+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\+Inf|[-0-9.e]+)$")


def test_requests_by_method_and_result(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    image = images["erofs"]
    daemon = start(trusting(image.parent))
    for _ in range(3):
        assert outcome(lambda: mount(daemon.socket, image)) == ("", "")
    with opened(image) as fds:
        explain(daemon.socket, {"imageFileDescriptor": 0}, fds)
    refused = {outcome(lambda: mount(daemon.socket, "/etc/passwd"))[0] for _ in range(2)}.pop()
    assert refused
    assert counted(daemon, "Mount", "allow") == 3
    assert counted(daemon, "Explain", "allow") == 1
    assert counted(daemon, "Mount", refused) == 2
    latencies = {each["method"]: each for each in ask(daemon, "Metrics")["latencies"]}
    assert latencies["io.mountd.Mount.Mount"]["at"][-1] == 5
    assert latencies["io.mountd.Mount.Mount"]["sum"] > 0


def test_what_is_no_request_is_counted_without_a_method(start: Callable[..., Daemon]) -> None:
    daemon = start("")
    for data in (b"nonsense\0", b'{"method":5}\0', call("io.nobody.Knows")):
        with Raw(daemon) as raw:
            raw.send(data)
            assert error(raw.reply())
    requests = [each for each in ask(daemon, "Metrics")["requests"] if each["method"] == ""]
    assert sum(each["count"] for each in requests) >= 3
    assert counted(daemon, "", "InterfaceNotFound") == 1


def test_a_name_from_the_wire_makes_no_new_counter(start: Callable[..., Daemon]) -> None:
    daemon = start("")
    for number in range(50):
        with Raw(daemon) as raw:
            raw.send(call(f"io.mountd.Mount.Nothing{number}"))
            raw.reply()
    requests = ask(daemon, "Metrics")["requests"]
    assert len(requests) < 10
    assert counted(daemon, "", "MethodNotFound") == 50


def test_many_at_once_are_all_counted(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    image = images["erofs"]
    daemon = start(trusting(image.parent))

    def some() -> None:
        for _ in range(25):
            assert outcome(lambda: mount(daemon.socket, image)) == ("", "")

    threads = [threading.Thread(target=some) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counted(daemon, "Mount", "allow") == 200


def test_nothing_is_lost_with_workers_that_are_killed(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    image = images["erofs"]
    daemon = start(trusting(image.parent))
    done = 0
    for _ in range(5):
        for _ in range(4):
            done += outcome(lambda: mount(daemon.socket, image)) == ("", "")
        for pid in daemon.workers:
            os.kill(pid, signal.SIGKILL)
        # Who is assigned to one of them in this moment gets an error.
        assert eventually(lambda: outcome(lambda: ask(daemon, "Metrics")) == ("", ""))
    assert done >= 16
    assert counted(daemon, "Mount", "allow") == done
    assert eventually(lambda: ask(daemon, "Metrics")["pool"]["forks"] >= 2 + 5)
    pool = ask(daemon, "Metrics")["pool"]
    assert pool["forks"] >= 2 + 5
    assert pool["workers"] == pool["idle"] + pool["busy"]


def test_a_worker_that_ends_in_the_middle_is_an_error_of_its_method(start: Callable[..., Daemon]) -> None:
    """It is held up by a reload that the fork server does not come to."""
    daemon = start("")
    eventually(lambda: len(daemon.workers) == 2)
    server, workers = daemon.fork_server, daemon.workers
    os.kill(server, signal.SIGSTOP)
    with Raw(daemon) as raw:
        try:
            raw.send(call("io.mountd.Admin.Reload"))
            time.sleep(0.3)
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
        finally:
            os.kill(server, signal.SIGCONT)
        assert error(raw.reply()) == "MountFailed"
    assert counted(daemon, "io.mountd.Admin.Reload", "MountFailed") == 1


def test_it_answers_while_all_workers_hang(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path
) -> None:
    """As many as may be served at once hang; root, who has nothing that hangs, is answered all the same."""
    daemon = start(trusting(images["erofs"].parent), start_new_session=True)
    owners = range(4720, 4720 + MAXIMUM_WORKERS // 2)
    with Fuse(place / "metrics fuse", b"no image") as fuse, opened(fuse.path) as fds:
        fuse.silence(Op.FLUSH, session=daemon.process.pid)
        with contextlib.ExitStack() as stack:
            raws = [stack.enter_context(Raw(daemon, uid)) for uid in owners for _ in range(2)]
            for raw in raws:
                raw.send(mount_call(), fds)

            def pool() -> dict[str, Any]:
                return ask(daemon, "Metrics")["pool"]  # type: ignore[no-any-return]

            # Each is refused at once and hangs when it lets go; whoever counts is busy, too.
            assert eventually(lambda: pool()["busy"] == MAXIMUM_WORKERS + 1), pool()
            # Past their deadline they are killed; they do not die until FUSE lets go.
            assert eventually(lambda: pool()["stuck"] == MAXIMUM_WORKERS, 3 * DEADLINES[Phase.CLOSE]), pool()
            found = pool()
            assert found["killed"] == MAXIMUM_WORKERS
            assert found["busy"] >= 1
            assert found["workers"] == found["idle"] + found["busy"] + MAXIMUM_WORKERS
            fuse.abort()
        assert eventually(lambda: pool()["stuck"] == 0)
    # What they were refused with was counted before they hung, and once.
    refusals = [each for each in ask(daemon, "Metrics")["requests"] if each["method"].endswith(".Mount")]
    assert sum(each["count"] for each in refusals) == MAXIMUM_WORKERS


def test_who_has_as_many_that_hang_as_may_is_told(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path
) -> None:
    """Also root: what is asked nobody knows before it is read, and reading is what workers are for."""
    daemon = start(trusting(images["erofs"].parent), start_new_session=True)
    with Fuse(place / "metrics fuse of root", b"no image") as fuse, opened(fuse.path) as fds:
        fuse.silence(Op.FLUSH, session=daemon.process.pid)
        with contextlib.ExitStack() as stack:
            for _ in range(MAXIMUM_STUCK_PER_OWNER):
                stack.enter_context(Raw(daemon)).send(mount_call(), fds)
            assert eventually(
                lambda: outcome(lambda: ask(daemon, "Metrics"))[0] == "LimitExceeded",
                3 * DEADLINES[Phase.CLOSE],
            )
            fuse.abort()
        assert eventually(lambda: outcome(lambda: ask(daemon, "Metrics")) == ("", ""))
    assert counted(daemon, "", "LimitExceeded") >= 1
    assert ask(daemon, "Metrics")["pool"]["killed"] == MAXIMUM_STUCK_PER_OWNER


class TestProgram:
    """mountctl metrics, as installed."""

    @staticmethod
    def parsed(text: str) -> dict[str, float]:
        """Read the text format strictly: each sample has its type, which comes before it, once."""
        found: dict[str, float] = {}
        types: dict[str, str] = {}
        assert text.endswith("\n")
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                _, _, name, kind = line.split(" ")
                assert name not in types
                types[name] = kind
            elif not line.startswith("# HELP "):
                match = SAMPLE.match(line)
                assert match, line
                family = re.sub(r"_(bucket|sum|count)$", "", match["name"])
                kind = types.get(match["name"]) or types[family]
                assert kind != "counter" or match["name"].endswith("_total")
                key = line.rpartition(" ")[0]
                assert key not in found
                found[key] = float(match["value"])
        return found

    def test_the_text_is_that_of_prometheus(self, daemon: Daemon, installed: Path) -> None:
        done = run([installed / "bin/mountctl", "metrics"], daemon.socket)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.isascii()
        found = self.parsed(done.stdout)
        assert found["mountd_workers_started_total"] >= 2
        assert found['mountd_workers{state="stuck"}'] == 0
        assert "mountd_store_bytes" in found
        method = "io.mountd.Admin.Metrics"
        run([installed / "bin/mountctl", "metrics"], daemon.socket)
        found = self.parsed(run([installed / "bin/mountctl", "metrics"], daemon.socket).stdout)
        label = f'method="{method}"'
        count = found[f"mountd_request_duration_seconds_count{{{label}}}"]
        buckets = [value for key, value in found.items() if f"_bucket{{{label}," in key]
        assert buckets == sorted(buckets)
        results = [
            value for key, value in found.items() if key.startswith(f"mountd_requests_total{{{label},")
        ]
        assert buckets[-1] == count == sum(results) >= 2

    def test_what_there_is(
        self,
        start: Callable[..., Daemon],
        images: dict[str, Path],
        installed: Path,
        held: list[OwnedFd],
    ) -> None:
        """Live mounts, and what is in the store: as the text and Status say it, too."""
        daemon = start(trusting(images["erofs"].parent))

        def found() -> tuple[object, ...]:
            text = self.parsed(run([installed / "bin/mountctl", "metrics"], daemon.socket).stdout)
            told, status = ask(daemon, "Metrics"), ask(daemon, "Status")
            numbers = [
                (told["liveMounts"], told["storeImages"], told["storeBytes"]),
                (status["liveMounts"], status["store"]["images"], status["store"]["bytes"]),
                tuple(text[f"mountd_{name}"] for name in ("live_mounts", "store_images", "store_bytes")),
            ]
            assert len(set(numbers)) == 1, numbers
            return numbers[0]

        assert found() == (0, 0, 0)
        held += [ask_as(daemon, images["erofs"], uid) for uid in (USER, USER, 0)]
        assert found() == (3, 0, 0)
        digests = [str(stored.import_file(daemon, images[type])["digest"]) for type in ("erofs", "squashfs")]
        sizes = [images[type].stat().st_size for type in ("erofs", "squashfs")]
        assert found() == (3, 2, sum(sizes))
        held.pop().close()
        stored.call(daemon, "Remove", digest=digests[0])
        assert eventually(lambda: found() == (2, 1, sizes[1]))

    def test_a_file_is_replaced_as_a_whole(self, daemon: Daemon, installed: Path, place: Path) -> None:
        directory = place / "collector"
        directory.mkdir()
        target = directory / "mountd.prom"
        for _ in range(2):
            done = run(
                [installed / "bin/mountctl", "metrics", "--output", target], daemon.socket, umask=0o077
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            self.parsed(target.read_text())
            assert target.stat().st_mode & 0o777 == 0o644
        assert os.listdir(directory) == ["mountd.prom"]
        before = target.read_bytes()
        done = run([installed / "bin/mountctl", "metrics", "--output", target], place / "nobody")
        assert done.returncode == 2
        assert target.read_bytes() == before, "no counters, no change"
        done = run(
            [installed / "bin/mountctl", "metrics", "--output", directory / "no/x.prom"], daemon.socket
        )
        check_line(done, "No such file or directory")
        # A link at the place of the file is replaced, not followed.
        target.unlink()
        target.symlink_to(place / "victim")
        run([installed / "bin/mountctl", "metrics", "--output", target], daemon.socket)
        assert not target.is_symlink()
        assert not (place / "victim").exists()

    def test_a_user_gets_one_line(self, daemon: Daemon, installed: Path) -> None:
        for verb in (["metrics"], ["status"], ["policy", "reload"]):
            done = user_runs([installed / "bin/mountctl", *verb], daemon.socket)
            assert (done.returncode, done.stdout) == (1, "")
            check_line(done, "only the host's root administers mountd.*hint: ")

    def test_the_help_says_where_the_collector_looks(self, installed: Path) -> None:
        done = run([installed / "bin/mountctl", "metrics", "--help"], "/nothing")
        assert "--output /var/lib/prometheus/node-exporter/mountd.prom" in done.stdout

    def test_status_for_people(self, daemon: Daemon, installed: Path) -> None:
        done = run([installed / "bin/mountctl", "status"], daemon.socket)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"pid {daemon.process.pid}" in done.stdout
        assert str(daemon.policy_dir / "test.toml") in done.stdout
        assert "\x1b" not in done.stdout

    def test_reload(self, start: Callable[..., Daemon], installed: Path) -> None:
        daemon = start("")
        program = [installed / "bin/mountctl", "policy", "reload"]

        def reload() -> Done:
            return run(program, daemon.socket)

        assert reload().stdout == "0 rules are in force\n"
        daemon.set_policy("x = 1\n")
        done = reload()
        assert done.returncode == 1
        assert done.stdout.splitlines()[-1] == "the policy from before is still in force"
        assert done.stdout.startswith(f"{daemon.policy_dir / 'test.toml'}:1: x: ")
