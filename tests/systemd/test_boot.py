"""The units: they boot, they are what systemd's own tools call good, and they shut the service in."""

from __future__ import annotations

from tests.systemd.machine import SERVICE, SOCKET, Machine

MAXIMUM_EXPOSURE = 40  # tenths, as --threshold= has them
PULL_UNITS = ("mountd-pull.service", "mountd-pull.socket")
MAXIMUM_PULL_EXPOSURE = 50  # it has the network, and runs what has it


def test_boots_without_a_failed_unit(machine: Machine) -> None:
    assert machine.run(["systemctl", "is-system-running"], check=False).stdout.strip() == "running"
    assert machine.sh("systemctl list-units --failed --plain --no-legend") == ""


def test_the_enabled_socket_listens_for_everybody(machine: Machine) -> None:
    assert machine.run(["systemctl", "is-enabled", SOCKET]).stdout.strip() == "enabled"
    assert machine.state(SOCKET) == "active"
    assert machine.sh("stat -c '%F %a %U' /run/mountd/io.mountd.Mount").strip() == "socket 666 root"
    assert machine.sh("readlink -f /run/varlink/registry/io.mountd.Mount").strip() == (
        "/run/mountd/io.mountd.Mount"
    )


def test_directories(machine: Machine) -> None:
    stat = "stat -c '%n %a %U' /run/mountd /var/lib/mountd /etc/mountd/policy.d"
    expected = "/run/mountd 755 root\n/var/lib/mountd 700 root\n/etc/mountd/policy.d 755 root\n"
    assert machine.sh(stat) == expected
    machine.explain("tmpfs:4096")
    assert machine.sh(stat) == expected


def test_systemd_finds_nothing_wrong_with_the_units(machine: Machine) -> None:
    done = machine.run(["systemd-analyze", "verify", SERVICE, SOCKET, *PULL_UNITS])
    assert done.stdout + done.stderr == ""


def test_exposure(machine: Machine) -> None:
    threshold = f"--threshold={MAXIMUM_EXPOSURE}"
    machine.run(["systemd-analyze", "security", "--offline=yes", threshold, SERVICE])
    machine.explain("tmpfs:4096")
    machine.run(["systemd-analyze", "security", threshold, SERVICE])


def test_exposure_of_what_pulls(machine: Machine) -> None:
    threshold = f"--threshold={MAXIMUM_PULL_EXPOSURE}"
    machine.run(["systemd-analyze", "security", "--offline=yes", threshold, PULL_UNITS[0]])


def test_what_pulls_is_for_root_alone(machine: Machine, user: str) -> None:
    assert machine.sh("stat -c '%F %a %U' /run/mountd/pull").strip() == "socket 600 root"
    environment = ["env", "MOUNTD_SOCKET=/run/mountd/pull"]
    ask = [*environment, "mountctl", "image", "pull", "oci:registry.example.com/app:1"]
    assert "ermission denied" in machine.run(ask, user=user, check=False).stderr
    # And it has nothing but pulls, for root as well.
    done = machine.run([*environment, "mountctl", "image", "list"], check=False)
    assert "MethodNotImplemented" in done.stderr or "MethodNotFound" in done.stderr


def test_what_the_service_may_not(machine: Machine) -> None:
    machine.explain("tmpfs:4096")
    status = machine.sh(f"cat /proc/{machine.main_pid()}/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    # KILL, SETGID, SETUID, SYS_CHROOT, SYS_PTRACE, SYS_ADMIN and nothing else, now and for ever.
    wanted = sum(1 << number for number in (5, 6, 7, 18, 19, 21))
    # And DAC_READ_SEARCH, which is put aside until an overlay is made, with what it writes to its top by:
    # CHOWN, DAC_OVERRIDE, FOWNER, FSETID and SETFCAP.
    aside = sum(1 << number for number in (0, 1, 2, 3, 4, 31))
    assert (int(fields["CapEff"], 16), int(fields["CapBnd"], 16)) == (wanted, wanted | aside)
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    inside = ["nsenter", f"--target={machine.main_pid()}", "--mount", "--net", "--"]
    assert machine.run([*inside, "touch", "/etc/x", "/usr/x"], check=False).stderr.count("Read-only") == 2
    assert machine.run([*inside, "ip", "-br", "link"]).stdout.split()[0] == "lo"
