"""What the administrator finds in the journal about each request."""

from __future__ import annotations

from tests.systemd.machine import Machine

# mountd/daemon/journal.py
REQUEST_ID = "6f0d0a4e5b1c4a7f8f3a51d7c9b2e640"
POLICY_ID = "0e1b7d5d86a44f0cb7d10f3b52c1a9d3"


def test_a_mount_and_a_refusal(machine: Machine, images: dict[str, str], user: str) -> None:
    uid = machine.sh(f"id -u {user}").strip()
    mount = ["unshare", "-Urm", "mount", "-t", "mountd"]
    machine.run([*mount, images["squashfs"], "/mnt"], user=user)
    machine.run([*mount, "tmpfs:4096", "/mnt"], user=user, check=False)
    allowed, refused = machine.journal(f"MESSAGE_ID={REQUEST_ID}")[-2:]
    expected = {
        "MESSAGE_ID": REQUEST_ID,
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "mountd",
        "_SYSTEMD_UNIT": "mountd.service",
        "MOUNTD_CALLER_UID": uid,
        "MOUNTD_CALLER_GID": machine.sh(f"id -g {user}").strip(),
        "MOUNTD_OWNER_UID": uid,
        "MOUNTD_METHOD": "Mount",
        "MOUNTD_VERDICT": "allow",
        "MOUNTD_RULE": "system images",
        "MOUNTD_FILE_SYSTEM": "squashfs",
        "MOUNTD_SOURCE": images["squashfs"],
    }
    assert {name: allowed.get(name) for name in expected} == expected
    assert 0 < int(allowed["MOUNTD_DURATION_USEC"]) < 30_000_000
    assert int(allowed["MOUNTD_CALLER_PID"]) > 0
    assert f"Mount for uid {uid} (pid {allowed['MOUNTD_CALLER_PID']}): allow" in allowed["MESSAGE"]
    expected = {
        "PRIORITY": "5",
        "MOUNTD_CALLER_UID": uid,
        "MOUNTD_VERDICT": "deny",
        "MOUNTD_ERROR": "DeniedByPolicy",
        "MOUNTD_FILE_SYSTEM": "tmpfs",
        "MOUNTD_SOURCE": "tmpfs",
    }
    assert {name: refused.get(name) for name in expected} == expected
    assert "MOUNTD_RULE" not in refused
    assert refused["MOUNTD_ERROR_TEXT"] == f"denied by policy: {refused['MOUNTD_REASON']}"
    assert refused["MESSAGE"].endswith(f": refused with DeniedByPolicy: {refused['MOUNTD_ERROR_TEXT']}")
    assert "MOUNTD_ERROR_TEXT" not in allowed


def test_the_source_of_a_request(machine: Machine, images: dict[str, str]) -> None:
    """It is where the caller says: whatever the name is, it is one field, and one line of text."""
    names = [b"two\nMOUNTD_RULE=mine", b"\xff\x1b[31m", "“quoted”".encode(), b"n" * 200 + b"/long" * 300]
    home = machine.sh("mktemp -d").strip()
    script = f"""
import os, subprocess
for name in {names!r}:
    path = os.path.join({home.encode()!r}, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open({images["erofs"]!r}, "rb") as image, open(path, "wb") as copy:
        copy.write(image.read())
    subprocess.run([b"mountctl", b"explain", path], stdout=subprocess.DEVNULL)
"""
    try:
        machine.run(["python3", "-I", "-"], input=script)
    finally:
        machine.sh(f"rm -r {home}")
    digest = "sha256:" + "0" * 64
    machine.run(["mountctl", "explain", f"stored:{digest}"], check=False)
    *entries, stored = machine.journal(f"MESSAGE_ID={REQUEST_ID}")[-len(names) - 1 :]
    assert stored["MOUNTD_SOURCE"] == f"stored:{digest}"
    sources = [entry["MOUNTD_SOURCE"].removeprefix(f"{home}/") for entry in entries]
    assert sources[:3] == ["two\\nMOUNTD_RULE=mine", "\\udcff\\x1b[31m", "“quoted”"]
    assert len(entries[3]["MOUNTD_SOURCE"]) == 1025
    assert sources[3].endswith("…")
    assert not any(entry.get("MOUNTD_RULE") == "mine" for entry in entries)


def test_a_reload(machine: Machine) -> None:
    machine.explain("tmpfs:4096")
    machine.run(["systemctl", "reload", "mountd"])
    # systemd's word that it was reloaded is the daemon's READY=1, which comes after this.
    assert "1 rules" in machine.journal(f"MESSAGE_ID={POLICY_ID}")[-1]["MESSAGE"]


def test_requests_are_told_after_a_start_with_a_broken_policy(machine: Machine) -> None:
    """What was written before processes were made must not keep them from writing."""
    rules = machine.root / "etc/mountd/policy.d/40-test.toml"
    rules.write_text("[[rule]]\nname = 1\n")
    machine.run(["mountctl", "explain", "tmpfs:4096"], check=False)
    assert machine.journal(f"MESSAGE_ID={REQUEST_ID}")[-1]["MOUNTD_ERROR"] == "DeniedByPolicy"
    rules.unlink()
    machine.run(["systemctl", "reload", "mountd"])
    machine.explain("tmpfs:4096")
    last = machine.journal(f"MESSAGE_ID={REQUEST_ID}")[-1]
    assert (last.get("MOUNTD_ERROR"), last["MOUNTD_VERDICT"]) == ("", "deny")


def test_requests_are_told_after_the_fork_server_was_replaced(machine: Machine) -> None:
    machine.explain("tmpfs:4096")
    children = machine.sh(f"cat /proc/{machine.main_pid()}/task/{machine.main_pid()}/children").split()
    machine.run(["kill", "-KILL", *children])
    before = len(machine.journal(f"MESSAGE_ID={REQUEST_ID}"))
    machine.explain("tmpfs:4096")
    assert len(machine.journal(f"MESSAGE_ID={REQUEST_ID}")) == before + 1


def test_a_request_that_is_none_is_told_with_who_sent_it(machine: Machine, user: str) -> None:
    call = ["varlinkctl", "call", "/run/mountd/io.mountd.Mount", "io.mountd.Mount.Mount", '{"source":{}}']
    machine.run(call, user=user, check=False)
    told = machine.journal(f"MESSAGE_ID={REQUEST_ID}")[-1]
    assert told["MOUNTD_ERROR"] == "InvalidParameter"
    assert told["MOUNTD_ERROR_TEXT"].startswith("invalid parameter source: ")
    assert told["MOUNTD_CALLER_UID"] == machine.sh(f"id -u {user}").strip()
    assert int(told["MOUNTD_CALLER_PID"]) > 0
