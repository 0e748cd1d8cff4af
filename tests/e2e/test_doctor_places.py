"""doctor and status look at what the daemon uses, wherever that is; and revoke at whom it is told."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mountd.cli import doctor_policy, doctor_system
from mountd.cli.checks import FAIL, OK, WARN
from mountd.cli.doctor_system import ACTIONS, PROGRAMS, polkit_findings
from mountd.cli.mountctl import parse
from mountd.cli.report import UsageError
from mountd.kernel import features, libc
from mountd.service import consent
from mountd.store import program
from tests.container import USER
from tests.daemon import Daemon
from tests.e2e.admin import ask
from tests.e2e.conftest import trusting
from tests.e2e.test_doctor import by_root
from tests.programs import check_line, run

Findings = dict[tuple[str, str], dict[str, Any]]


def areas(found: Findings, area: str) -> dict[str, str]:
    return {name: each["state"] for (where, name), each in found.items() if where == area}


def test_the_daemon_s_own_directories(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    daemon = start(trusting(images["erofs"].parent))
    found = by_root(daemon)
    permissions = areas(found, "permissions")
    state = ask(daemon, "Status")["store"]["path"]
    assert set(permissions) == {str(daemon.socket.parent), state, str(daemon.socket)}
    assert set(permissions.values()) == {OK}
    policy = areas(found, "policy")
    assert policy == {str(daemon.policy_dir): OK, "rules": OK}
    os.chmod(state, 0o777)
    os.chown(daemon.policy_dir, USER, USER)
    try:
        found = by_root(daemon)
        assert found["permissions", state]["state"] == FAIL
        assert found["policy", str(daemon.policy_dir)]["state"] == FAIL
    finally:
        os.chmod(state, 0o700)
        os.chown(daemon.policy_dir, 0, 0)


def test_a_directory_that_is_gone(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    daemon = start(trusting(images["erofs"].parent))
    shutil.rmtree(daemon.policy_dir)
    found = by_root(daemon)
    assert found["policy", str(daemon.policy_dir)]["state"] == OK
    assert (found["policy", "rules"]["state"], len(areas(found, "policy"))) == (WARN, 2)
    daemon.policy_dir.mkdir(mode=0o755)


def test_without_an_answer_they_are_the_usual_ones(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("MOUNTD_SOCKET", str(place / "nobody"))
    where = doctor_system.places()
    assert (where.runtime, where.state, where.policy) == (["/run/mountd"], "/var/lib/mountd", ())
    assert where.sockets == [str(place / "nobody")]
    found = {each.name for each in doctor_policy.check_policy(doctor_policy.DIRECTORIES)}
    assert found >= set(doctor_policy.DIRECTORIES)


def test_a_broken_file_does_not_count(start: Callable[..., Daemon], installed: Path) -> None:
    daemon = start(trusting(Path("/nowhere")))
    (daemon.policy_dir / "zzz.toml").write_text("")

    def states() -> dict[str, str]:
        text = run([installed / "bin/mountctl", "status"], daemon.socket).stdout
        table = text.split("POLICY FILE")[1].split("\n\n")[0].splitlines()[1:]
        return {line.split("  ")[0].rpartition("/")[2]: line.split("  ")[-1].strip() for line in table}

    ask(daemon, "Reload")
    assert states() == {"test.toml": "counts", "zzz.toml": "only masks others"}
    daemon.set_policy("x = 1\n")
    ask(daemon, "Reload")
    assert states() == {"test.toml": "broken", "zzz.toml": "only masks others"}


def test_a_user_by_name(start: Callable[..., Daemon], installed: Path) -> None:
    daemon = start(trusting(Path("/nowhere")))
    program = [installed / "bin/mountctl", "revoke"]
    done = run([*program, "--uid", "daemon"], daemon.socket)
    check_line(done, "not found: a live mount with uid 1 ")
    done = run([*program, "--uid", "nobody-of-that-name"], daemon.socket)
    assert done.returncode == 1
    check_line(done, "there is no user “nobody-of-that-name” .hint: “getent passwd” lists them")
    done = run([*program, "1" + 23 * "0"], daemon.socket)
    assert done.returncode == 1
    check_line(done, "is no id of a mount .hint: “mountctl list --all”")


def test_programs_and_the_user_that_pulls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_system, "which", lambda _: None)
    monkeypatch.setattr(doctor_system, "PULLING_USER", "nobody-of-that-name")
    found = {each.name: each for each in doctor_system.check_programs()}
    assert found.keys() == {*PROGRAMS, "nobody-of-that-name"}
    assert {each.state for each in found.values()} == {WARN}
    for name, package in (("zstd", "zstd"), ("newuidmap", "uidmap")):
        assert found[name].fix == f"apt-get install {package}"
    assert found["nobody-of-that-name"].fix == "systemd-sysusers mountd.conf"
    monkeypatch.setattr(doctor_system, "PULLING_USER", "daemon")
    assert doctor_system.pulling_user().state == OK


def test_names_are_those_of_the_daemon() -> None:
    assert doctor_system.PULLING_USER == program.USER
    assert {consent.MOUNT, consent.MOUNT_WRITABLE, consent.MOUNT_TMPFS, consent.IMPORT} == set(ACTIONS)


def test_polkit_has_to_know_the_actions() -> None:
    all = "\n".join(["org.freedesktop.x", *ACTIONS])
    assert [(each.name, each.state) for each in polkit_findings(0, all, "")] == [
        ("polkitd", OK),
        ("actions", OK),
    ]
    _, actions = polkit_findings(0, all.replace("io.mountd.mount-tmpfs\n", ""), "")
    assert actions.state == WARN
    assert actions.text.startswith("polkit does not know io.mountd.mount-tmpfs: ")
    assert [each.state for each in polkit_findings(1, "", "no bus")] == [WARN]


def test_what_is_lost_without_statmount() -> None:
    """As test_old_kernel has it."""
    libc.inject["statmount"] = errno.ENOSYS
    try:
        found = {each.name: each for each in doctor_system.check_kernel()}
    finally:
        libc.inject.clear()
    assert found["statmount"].state == FAIL
    assert found["statmount"].text.startswith("no image can be trusted for where it lies: ")
    for name, (state, _, fix) in doctor_system.MISSING.items():
        assert bool(fix) == (state != OK), name
        assert "6.1 " not in fix


def test_what_mountd_does_without_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = [features.Feature(name, features.NO, "not there") for name in features.NAMES]
    monkeypatch.setattr(features, "probe", lambda: lacking)
    found = {each.name: each for each in doctor_system.check_kernel()}
    assert [name for name, each in found.items() if each.state == OK] == ["fuse"]
    assert not found["fuse"].fix


@pytest.mark.parametrize("text", [str(1 << 63), "1" + 5000 * "0", "-1", "x", "", "٣", "1.5"])
def test_what_is_no_id(text: str) -> None:
    with pytest.raises(UsageError):
        parse(["revoke", "--", text])


@pytest.mark.parametrize("text", [str((1 << 32) - 1), "", "a\nb", "x\0y", "\udcff", "1" + 5000 * "0"])
def test_what_is_no_user(text: str) -> None:
    with pytest.raises(UsageError):
        parse(["revoke", f"--uid={text}"])


def test_numbers_are_numbers() -> None:
    assert parse(["revoke", str((1 << 63) - 1)]).id == (1 << 63) - 1
    assert parse(["revoke", "--uid", "4000"]).uid == 4000
    assert parse(["revoke", "--uid", "root"]).uid == 0
