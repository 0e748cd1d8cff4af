"""The service comes and goes, is restarted, reloaded, hangs and is stopped; mounts stay."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.systemd.machine import HERE, SERVICE, SOCKET, Machine, eventually, next_line

HOLD = """
unshare -Urm sh -euc '
  mount -t mountd {image} /mnt
  echo mounted
  while read -r _; do
    cat /mnt/hello
  done
'
"""
TMPFS_RULE = """
[[rule]]
name = "small tmpfs"
image = { kind = "tmpfs" }
caller = { any = true }
grant = { max-size = "8M", idmap = ["none", "namespace", "caller"] }
verdict = "allow"
"""
MAXIMUM_STOP = 15.0  # TimeoutStopSec=


@contextlib.contextmanager
def held_mount(machine: Machine, image: str, user: str) -> Iterator[Callable[[], None]]:
    """A container that holds a mount; what is yielded reads from it."""
    # A page that was read before would need no disk any more.
    drop = Path("/proc/sys/vm/drop_caches")
    with machine.start(HOLD.format(image=image), user=user) as process:
        assert process.stdin is not None
        assert next_line(process) == "mounted"

        def read() -> None:
            drop.write_text("3")
            process.stdin.write(b"\n")
            assert next_line(process) == "hello from the image"

        yield read
        process.stdin.close()
        assert process.wait(30) == 0


def seconds_for(work: Callable[[], object]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def test_idle_exit_with_mounts_that_stay(machine: Machine, images: dict[str, str], user: str) -> None:
    machine.configure("ExecStart=\nExecStart=/usr/sbin/mountd --idle-exit 2")
    with (
        held_mount(machine, images["erofs"], user) as read_erofs,
        held_mount(machine, images["xfs"], user) as read_xfs,
    ):
        assert machine.state() == "active"
        eventually(lambda: machine.state() == "inactive", "it did not end when idle", 10)
        assert machine.property("Result") == "success"
        assert machine.state(SOCKET) == "active"
        assert machine.processes() == []
        read_erofs()
        read_xfs()
        assert machine.explain("tmpfs:4096")["verdict"] == "deny"
        assert machine.state() == "active"
        read_xfs()


def test_restart_with_mounts_that_stay(machine: Machine, images: dict[str, str], user: str) -> None:
    with (
        held_mount(machine, images["erofs"], user) as read_erofs,
        held_mount(machine, images["ext4"], user) as read_ext4,
    ):
        before = machine.main_pid()
        machine.run(["systemctl", "restart", SERVICE])
        assert machine.main_pid() not in (0, before)
        read_erofs()
        read_ext4()
        assert machine.run(["mountctl", "run", images["erofs"], "--", "/usr/bin/cat", "/hello"], user=user)


def test_reload_puts_changed_rules_in_force(machine: Machine) -> None:
    assert machine.explain("tmpfs:4096")["verdict"] == "deny"
    main = machine.main_pid()
    rules = machine.root / "etc/mountd/policy.d/40-test.toml"
    for text, verdict in ((TMPFS_RULE, "allow"), ("", "deny"), (TMPFS_RULE, "allow")):
        rules.write_text(text)
        machine.run(["systemctl", "reload", SERVICE])
        assert machine.explain("tmpfs:4096")["verdict"] == verdict
    assert machine.main_pid() == main


def test_reload_of_a_broken_policy_keeps_the_old_one(machine: Machine) -> None:
    rules = machine.root / "etc/mountd/policy.d/40-test.toml"
    rules.write_text(TMPFS_RULE)
    assert machine.explain("tmpfs:4096")["verdict"] == "allow"
    rules.write_text("[[rule]]\nname = 1\n")
    machine.run(["systemctl", "reload", SERVICE])
    assert machine.explain("tmpfs:4096")["verdict"] == "allow"
    assert "failed" in machine.property("StatusText")
    message = machine.journal("--priority=err")[-1]["MESSAGE"]
    assert "40-test.toml" in message
    # One that starts with it denies everything, and says so.
    machine.run(["systemctl", "stop", SERVICE])
    done = machine.run(["mountctl", "explain", "tmpfs:4096"], check=False)
    assert "the system's policy is broken" in done.stderr


def test_the_default_policy_can_be_masked(machine: Machine, images: dict[str, str]) -> None:
    mask = machine.root / "etc/mountd/policy.d/50-default.toml"
    assert machine.explain(images["erofs"])["verdict"] == "allow"
    for make in (lambda: mask.write_text(""), lambda: mask.symlink_to("/dev/null")):
        make()
        machine.run(["systemctl", "reload", SERVICE])
        assert machine.explain(images["erofs"])["verdict"] == "deny"
        mask.unlink()
        machine.run(["systemctl", "reload", SERVICE])
        assert machine.explain(images["erofs"])["verdict"] == "allow"


def test_the_watchdog_ends_a_listener_that_hangs(
    machine: Machine, images: dict[str, str], user: str
) -> None:
    machine.configure("WatchdogSec=3")
    with held_mount(machine, images["squashfs"], user) as read:
        hung = machine.main_pid()
        # More than once as long as it may be silent: it lives.
        time.sleep(4)
        assert machine.main_pid() == hung
        machine.run(["kill", "-STOP", str(hung)])
        eventually(lambda: machine.main_pid() not in (0, hung), "it was not restarted", 10)
        eventually(lambda: machine.state() == "active")
        assert machine.property("NRestarts") == "1"
        read()
        assert machine.explain("tmpfs:4096")["verdict"] == "deny"


def test_stop_leaves_no_process(machine: Machine) -> None:
    machine.explain("tmpfs:4096")
    assert len(machine.processes()) >= 4  # listener, fork server, sealer, workers
    assert seconds_for(lambda: machine.run(["systemctl", "stop", SERVICE, SOCKET])) < MAXIMUM_STOP
    assert machine.processes() == []
    assert machine.property("Result") == "success"
    done = machine.run(["mountctl", "explain", "tmpfs:4096"], check=False)
    assert done.returncode == 2
    assert machine.sh("ls /run/mountd /run/varlink/registry").count("io.mountd.Mount") == 0


def workers(machine: Machine) -> list[int]:
    """The processes of the service whose parent's parent is the listener, without the sealer."""
    parent = {
        pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        for pid in machine.processes()
    }
    namespace = os.readlink(f"/proc/{machine.init}/ns/user")
    return [
        pid
        for pid in parent
        if parent.get(parent[pid]) in parent and os.readlink(f"/proc/{pid}/ns/user") == namespace
    ]


def test_restart_with_a_worker_that_is_stopped(machine: Machine) -> None:
    """Threat case 15: a request is with a worker that does nothing any more."""
    machine.explain("tmpfs:4096")
    stopped = workers(machine)
    assert len(stopped) >= 2
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    with machine.start("mountctl explain tmpfs:4096") as caller:
        time.sleep(0.3)
        assert seconds_for(lambda: machine.run(["systemctl", "restart", SERVICE])) < MAXIMUM_STOP
        assert caller.wait(30) != 0
    assert machine.property("Result") == "success"
    assert not any(Path(f"/proc/{pid}").exists() for pid in stopped)
    assert machine.explain("tmpfs:4096")["verdict"] == "deny"


SEND_SILENT_FILE = """
import sys, time
sys.path.insert(0, "/usr/lib/mountd/python")
from mountd.client import Client, open_image
while True:
    try:
        fd = open_image("/srv/image")
        break
    except Exception:
        time.sleep(0.05)
with Client() as client:
    client.mount({"imageFileDescriptor": 0}, [fd])
"""


def test_restart_with_a_worker_that_cannot_be_killed(machine: Machine) -> None:
    """Threat case 15: a worker waits within the kernel for a file system that never answers."""
    # What hangs is waited for so long, twice: by the listener, and by systemd after SIGKILL.
    machine.configure("TimeoutStopSec=6")
    machine.explain("tmpfs:4096")
    script = (HERE / "inside/silent_fuse.py").read_text()
    (machine.root / "root/silent_fuse.py").write_text(script)
    (machine.root / "root/send.py").write_text(SEND_SILENT_FILE)
    with (
        machine.start("echo $$; exec python3 -I /root/silent_fuse.py /srv") as server,
        machine.start("exec python3 -I /root/send.py"),
    ):
        server_pid = next_line(server)
        try:
            assert next_line(server) == "serving"
            assert next_line(server) == "asked"
            before = machine.main_pid()
            assert seconds_for(lambda: machine.run(["systemctl", "restart", SERVICE])) < MAXIMUM_STOP
            assert machine.main_pid() not in (0, before)
            assert machine.explain("tmpfs:4096")["verdict"] == "deny"
            assert any(state(pid) == "D" for pid in machine.processes())
        finally:
            machine.run(["kill", "-KILL", server_pid])
    eventually(lambda: all(state(pid) != "D" for pid in machine.processes()), "it is still there")
    machine.run(["umount", "/srv"])


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""
