"""The daemon itself: start, reload, end, and the death of each of its processes.

There is no process that seals mounts any more, so that none can be killed: the mount namespace that locks
them is held by the fork server, whose death is a test here.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.daemon import activation, main
from mountd.fds import close_all
from tests.container import forked
from tests.daemon import ROOT, Daemon
from tests.e2e.conftest import trusting
from tests.rogue import (
    ATTACKER,
    GET_INFO,
    Raw,
    ask,
    error,
    eventually,
    mount_call,
    neighbour,
    opened,
    settled,
)

RELOADED = "the policy was reloaded"
ROUNDS = 12
A_FEW = 8  # calls in a second, on the slowest of machines
NOT_RELOADED = "the policy was not reloaded, the old one holds"


def mount(daemon: Daemon, image: Path) -> str | None:
    """Ask for a mount as an ordinary user and return the name of the error."""
    with opened(image) as fds:
        return error(ask(daemon, mount_call(), fds, ATTACKER))


def reload(daemon: Daemon, policy: str, said: str) -> None:
    """Replace the policy and wait until the daemon says what became of it."""
    before = daemon.log.count(said)
    daemon.set_policy(policy)
    daemon.signal(signal.SIGHUP)
    assert eventually(lambda: daemon.log.count(said) > before), daemon.log


def test_reload_holds_for_every_later_request(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    image, trusted = images["erofs"], trusting(images["erofs"].parent)
    daemon = start("")
    for _ in range(5):
        assert mount(daemon, image) == "DeniedByPolicy"
        reload(daemon, trusted, RELOADED)
        assert {mount(daemon, image) for _ in range(4)} == {""}
        reload(daemon, "", RELOADED)
        assert {mount(daemon, image) for _ in range(4)} == {"DeniedByPolicy"}


def test_reload_holds_within_a_row_of_calls(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path
) -> None:
    """A worker stays with a connection whose calls follow each other, but not beyond a new policy.

    What the daemon tells the service manager is the moment from which the new policy holds: no call that is
    sent after that is judged by the old one.
    """
    image, trusted = images["erofs"], trusting(images["erofs"].parent)
    manager = place / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(manager))
        notified.settimeout(20)
        daemon = start(trusted, env={"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(manager)})
        serving(notified)
        for _ in range(ROUNDS):
            daemon.set_policy(trusted)
            daemon.signal(signal.SIGHUP)
            serving(notified)
            with calls_in_a_row(daemon, image) as answers:
                time.sleep(1)
                until = time.monotonic()
                daemon.set_policy("")
                daemon.signal(signal.SIGHUP)
                serving(notified)
                since = time.monotonic()
                time.sleep(1)
            before = [said for sent, said in answers if sent < until]
            after = [said for sent, said in answers if sent > since]
            assert before.count("") > A_FEW
            assert len(after) > A_FEW
            assert set(after) == {"DeniedByPolicy"}
    manager.unlink()


def serving(notified: socket.socket) -> None:
    """Wait for the word that a start or a reload is done."""
    while b"READY=1" not in notified.recv(4096):
        pass


@contextlib.contextmanager
def calls_in_a_row(daemon: Daemon, image: Path) -> Iterator[list[tuple[float, str | None]]]:
    """Call all the while on one connection; the list has when each was sent, and the error, at the end."""
    answers: list[tuple[float, str | None]] = []
    stop, stopper = os.pipe2(os.O_CLOEXEC)
    result, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(stopper)
            with Raw(daemon) as raw, opened(image) as fds:
                while not select.select([stop], [], [], 0)[0]:
                    sent = time.monotonic()
                    raw.send(mount_call(), fds)
                    answers.append((sent, error(raw.reply())))
                    close_all(raw.fds)
                    raw.fds.clear()
            with open(writer, "wb") as file:
                pickle.dump(answers, file)
        finally:
            os._exit(0)
    os.close(stop)
    os.close(writer)
    try:
        yield answers
    finally:
        os.close(stopper)
        with open(result, "rb") as file:
            answers += pickle.load(file)
        os.waitpid(pid, 0)


def test_reload_under_load(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    """No request is lost, and a broken policy changes nothing but the log."""
    image, trusted = images["erofs"], trusting(images["erofs"].parent)
    daemon = start(trusted)
    with neighbour(daemon, image), neighbour(daemon, image, ATTACKER):
        for number in range(5):
            reload(daemon, trusted, RELOADED)
            reload(daemon, f"[[rule]]\nname = {number}", NOT_RELOADED)
        daemon.set_policy(trusted)
        for _ in range(50):
            daemon.signal(signal.SIGHUP)
            time.sleep(0.002)
    assert mount(daemon, image) == ""


def test_a_change_during_a_reload_is_not_lost(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    """The signal that comes while a long policy is read has it read again."""
    image, trusted = images["erofs"], trusting(images["erofs"].parent)
    daemon = start(trusted)
    daemon.set_policy(
        "".join(trusted.replace("trusted in the test", f"rule {number}") for number in range(1500))
    )
    daemon.signal(signal.SIGHUP)
    time.sleep(0.05)
    assert RELOADED not in daemon.log
    daemon.set_policy("")
    daemon.signal(signal.SIGHUP)
    assert eventually(lambda: daemon.log.count(RELOADED) == 2, 20), daemon.log
    assert mount(daemon, image) == "DeniedByPolicy"


def test_sigterm_answers_everybody(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    """What runs is answered, what waits is told ShuttingDown, and the exit status is 0."""
    daemon = start(trusting(images["erofs"].parent))
    settled(daemon)
    workers, fork_server = daemon.workers, daemon.fork_server
    # Nobody else is started while these two are busy.
    for pid in (*workers, fork_server):
        os.kill(pid, signal.SIGSTOP)
    with (
        opened(images["erofs"]) as fds,
        Raw(daemon) as first,
        Raw(daemon) as second,
        Raw(daemon) as queued,
        Raw(daemon) as idle,
    ):
        for raw in (first, second, queued):
            raw.send(mount_call(), fds)
            time.sleep(0.1)
        begin = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert error(queued.reply()) == "ShuttingDown"
        assert idle.ended()
        for pid in (*workers, fork_server):
            os.kill(pid, signal.SIGCONT)
        for raw in (first, second):
            assert error(raw.reply()) == ""
            assert len(raw.fds) == 1
        assert daemon.process.wait(10) == 0
        assert time.monotonic() - begin < 10
    assert not daemon.socket.exists()


def test_sigterm_does_not_wait_for_what_hangs(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    daemon = start("")
    settled(daemon)
    workers = daemon.workers
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    with Raw(daemon) as raw:
        raw.send(GET_INFO)
        time.sleep(0.1)
        begin = time.monotonic()
        daemon.signal(signal.SIGTERM)
        reply = error(raw.reply())
        assert daemon.process.wait(12) == 0
        assert 9 < time.monotonic() - begin < 12
        assert reply in ("TimedOut", None)
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_a_service_manager_that_does_not_listen(start: Callable[..., Daemon]) -> None:
    environment = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": "/nowhere"}
    daemon = start("", env=environment)
    assert error(ask(daemon, GET_INFO)) == ""
    assert "cannot tell the service manager: No such file or directory" in daemon.log


def test_relative_directories(images: dict[str, Path], place: Path) -> None:
    """The policy is found again at a reload, whatever the working directory has become."""
    directory = place / "relative"
    (directory / "rules").mkdir(parents=True)
    (directory / "rules/test.toml").write_text(trusting(images["erofs"].parent))
    command = [sys.executable, "-m", "mountd.daemon.main", "--runtime-dir", "run", "--policy-dir", "rules"]
    command += ["--state-dir", "state"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=log)
    try:
        assert eventually((directory / "run/io.mountd.Mount").exists)
        for count in (1, 2):
            process.send_signal(signal.SIGHUP)
            said = f"{RELOADED}: 1 rules"
            assert eventually(lambda: (directory / "log").read_text().count(said) == count)  # noqa: B023
    finally:
        process.terminate()
        assert process.wait(15) == 0
        shutil.rmtree(directory)


def test_idle_exit(start: Callable[..., Daemon]) -> None:
    daemon = start("", "--idle-exit", "0.5")
    with Raw(daemon):
        time.sleep(1)
        assert daemon.process.poll() is None, "a connection is there"
    assert daemon.process.wait(3) == 0
    assert not daemon.socket.exists()


def test_fork_server_is_killed(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    """Another takes its place, workers and all; connections end."""
    daemon = start(trusting(images["erofs"].parent))
    for _ in range(2):
        fork_server, workers = daemon.fork_server, daemon.workers
        with Raw(daemon) as raw:
            raw.send(GET_INFO)
            assert error(raw.reply()) == ""
            os.kill(fork_server, signal.SIGKILL)
            assert raw.ended()
        assert mount(daemon, images["erofs"]) == ""
        assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))  # noqa: B023
        assert daemon.fork_server != fork_server
    assert daemon.log.count("the fork server has ended; starting another") == 2


def test_fork_server_keeps_being_killed(start: Callable[..., Daemon]) -> None:
    daemon = start("")
    for _ in range(main.MAXIMUM_RESTARTS + 1):
        with contextlib.suppress(IndexError):
            old = daemon.fork_server
            os.kill(old, signal.SIGKILL)
            eventually(lambda: daemon.children() and daemon.fork_server != old)  # noqa: B023
    assert daemon.process.wait(5) == 1
    assert "the fork server keeps ending" in daemon.log


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_worker_is_killed_while_it_serves(
    start: Callable[..., Daemon], images: dict[str, Path], number: int
) -> None:
    daemon = start(trusting(images["erofs"].parent))
    settled(daemon)
    with Raw(daemon, ATTACKER) as raw, opened(images["ext4"]) as fds:
        workers = daemon.workers
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        raw.send(mount_call(), fds)
        time.sleep(0.1)
        for pid in workers:
            os.kill(pid, number)
            # SIGKILL does not wait for it, and the process may be gone by then.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        reply = raw.reply()
        assert error(reply) == "MountFailed"
        assert reply is not None
        assert reply["parameters"]["errnoName"] == "EIO"
    with neighbour(daemon, images["erofs"]):
        assert mount(daemon, images["ext4"]) == ""


def test_start_with_a_broken_policy(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    """Everything is denied, with the reason, until there is a good one."""
    daemon = start("this is no policy")
    with opened(images["erofs"]) as fds:
        reply = ask(daemon, mount_call(), fds)
    assert error(reply) == "DeniedByPolicy"
    assert "policy is broken" in reply["parameters"]["reason"]
    assert "the policy is broken, everything is denied" in daemon.log
    reload(daemon, trusting(images["erofs"].parent), RELOADED)
    assert mount(daemon, images["erofs"]) == ""


def test_start_as_an_ordinary_user(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["mountd", "--runtime-dir", str(place / "nowhere")])

    def work() -> object:
        with pytest.raises(SystemExit) as ended:
            main.main()
        return ended.value.code

    assert forked(work, ATTACKER) == "mountd: it makes mounts for others, and has to be started as root"


def test_stale_socket_is_replaced(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    daemon = start(trusting(images["erofs"].parent))
    fork_server, workers = daemon.fork_server, daemon.workers
    daemon.signal(signal.SIGKILL)
    daemon.process.wait()
    assert daemon.socket.is_socket()
    # The death of the listener is that of all.
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (fork_server, *workers)))
    daemon.launch()
    assert mount(daemon, images["erofs"]) == ""


def run(daemon: Daemon, *prefix: str, **run: object) -> tuple[int, str]:
    """Start another daemon on the socket of `daemon` and return its exit status and its words."""
    command = [*prefix, *map(str, daemon._command)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=20,
        **run,
    )  # type: ignore[call-overload]
    return done.returncode, done.stderr


def test_second_daemon_is_refused(daemon: Daemon, images: dict[str, Path]) -> None:
    status, said = run(daemon)
    assert status == 1
    assert said == f"mountd: cannot listen on {daemon.socket}: another process does\n"
    assert mount(daemon, images["erofs"]) == ""


LISTEN = [
    ("LISTEN_PID=$$ LISTEN_FDS=2", "exactly one socket is needed, 2 came"),
    ("LISTEN_PID=$$ LISTEN_FDS=0", "LISTEN_FDS"),
    ("LISTEN_PID=1 LISTEN_FDS=1", "exactly one socket is needed, 0 came"),
    ("LISTEN_FDS=1", "exactly one socket is needed, 0 came"),
    ("LISTEN_PID=$$ LISTEN_FDS=many", "LISTEN_FDS"),
    ("LISTEN_PID=$$ LISTEN_FDS=1", "no listening AF_UNIX stream socket"),
]


@pytest.mark.parametrize(("environment", "said"), LISTEN)
def test_a88_wrong_sockets_from_the_service_manager(daemon: Daemon, environment: str, said: str) -> None:
    """One clear line, and nothing is bound instead."""
    script = f'{environment} exec "$@" 3</dev/null 4</dev/null'
    status, words = run(daemon, "bash", "-c", script, "bash")
    assert status == 1
    assert words.count("\n") == 1
    assert words.startswith("mountd: ")
    assert said in words
    assert "another process" not in words


def test_sockets_from_the_service_manager_are_told_as_they_are(place: Path) -> None:
    """Wherever that is: of the defaults, which are nobody's then, nothing is said."""
    paths = [str(place / "passed" / name) for name in ("own", "theirs")]
    os.mkdir(place / "passed", 0o755)

    def pass_on() -> None:
        for number, fd in enumerate([os.dup(each.fileno()) for each in sockets], 3):
            os.dup2(fd, number)
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2")
        os.environ.update(LISTEN_FDNAMES="mountd.socket:io.systemd.MountFileSystem")

    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in paths]
        for each, path in zip(sockets, paths, strict=True):
            each.bind(path)
            each.listen()
        command = [sys.executable, "-m", "mountd.daemon.main", "--runtime-dir", place / "passed/run"]
        command += ["--state-dir", place / "passed/state"]
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=pass_on, close_fds=False
        )
        try:
            with Client(paths[0]) as client:
                status, _ = client.call("io.mountd.Admin.Status", {}, [])
        finally:
            process.terminate()
            _, said = process.communicate(timeout=20)
    assert status["sockets"] == paths
    assert f"listens at {', '.join(paths)}\n" in said
    assert process.returncode == 0
    assert not (place / "passed/run/io.mountd.Mount").exists()
    shutil.rmtree(place / "passed")


def test_an_address_that_is_abstract() -> None:
    with socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0mountd-test-{os.getpid()}")
        assert activation.address(abstract) == f"@mountd-test-{os.getpid()}"
