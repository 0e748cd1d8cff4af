"""The Debian package: what it installs, what is running then, how it is upgraded, and that it goes away."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.systemd.machine import HERE, Machine, next_line

ROOT = HERE.parents[1]
USER = "paula"
SOCKETS = ("mountd.socket", "mountd-pull.socket")
OFF = "mountd-mountfsd.socket"  # unless an administrator wants it
OFF_PATH = "/run/systemd/io.systemd.MountFileSystem"
IMAGE = "/var/lib/machines/packaged.raw"
HOLD = """
unshare -Urm sh -euc '
  mount -t mountd {image} /mnt
  echo mounted
  read -r _
  cat /mnt/hello
'
"""
LEFT = """
find /etc /usr /var/lib /var/cache /run -xdev '(' -name '*mountd*' -o -path '*/mountd/*' ')' \
  ! -path '/var/lib/dpkg/*' ! -path '/run/systemd/propagate*' ! -path '/run/log/*'
"""


@pytest.fixture(scope="module")
def someone(packaged: Machine) -> str:
    """An ordinary user of the machine."""
    packaged.sh(f"useradd --create-home --uid 1100 --shell /bin/sh {USER}")
    return USER


@pytest.fixture(scope="module")
def image(packaged: Machine) -> str:
    """An image where the default policy trusts it."""
    packaged.sh(
        "mkdir -p /root/tree && echo 'hello from the image' > /root/tree/hello && chmod 755 /root/tree && "
        f"mkdir -p /var/lib/machines && mkfs.erofs --quiet {IMAGE} /root/tree && chmod 644 {IMAGE}"
    )
    return IMAGE


def test_lintian_finds_no_error(package: Path) -> None:
    command = ["lintian", "--allow-root", "--fail-on", "error", "--info", package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Warnings are looked at one by one, and given their reasons in an override.
    assert [line for line in done.stdout.splitlines() if line[:2] in ("E:", "W:")] == []


def test_the_same_sources_make_the_same_package(package: Path, tmp_path: Path) -> None:
    built = subprocess.run(
        [ROOT / "units/build_deb", tmp_path], stdout=subprocess.PIPE, check=True, text=True
    )
    assert Path(built.stdout.strip()).read_bytes() == package.read_bytes()


def test_what_is_enabled_and_running(packaged: Machine) -> None:
    assert packaged.sh("systemctl list-units --failed --plain --no-legend") == ""
    assert packaged.run(["systemctl", "is-system-running"], check=False).stdout.strip() == "running"
    for socket in SOCKETS:
        assert packaged.run(["systemctl", "is-enabled", socket]).stdout.strip() == "enabled"
        assert packaged.state(socket) == "active"
    assert packaged.run(["systemctl", "is-enabled", OFF], check=False).stdout.strip() == "disabled"
    assert packaged.state(OFF) == "inactive"


def want_the_socket_that_is_off(machine: Machine) -> None:
    """As mountd(8) says it."""
    machine.run(["systemctl", "stop", "mountd.service"])
    machine.run(["systemctl", "enable", "--now", OFF])
    assert machine.state(OFF) == "active"


def test_directories_user_and_documents(packaged: Machine) -> None:
    stat = "stat -c '%n %a %U' /etc/mountd/policy.d /etc/mountd/keys /var/lib/mountd /run/mountd"
    assert packaged.sh(stat).splitlines() == [
        "/etc/mountd/policy.d 755 root",
        "/etc/mountd/keys 755 root",
        "/var/lib/mountd 700 root",
        "/run/mountd 755 root",
    ]
    assert packaged.sh("getent passwd mountd-pull").startswith("mountd-pull:")
    pages = packaged.sh(
        "cd /usr/share/man && ls man1/*mount* man5/mountd* man7/mountd* man8/*mountd*"
    ).split()
    assert all(page.endswith(".gz") for page in pages)
    assert len(pages) >= 6
    # Who runs the programs cannot write what Python would like to keep.
    assert packaged.sh("ls /usr/lib/mountd/python/mountd/cli/__pycache__")


def test_the_default_policy_allows_what_root_has_put_there(
    packaged: Machine, image: str, someone: str
) -> None:
    assert packaged.run(["mountctl", "policy", "check"]).stdout == ""
    decision = packaged.explain(image, user=someone)
    assert (decision["verdict"], decision["rule"]) == ("allow", "system images")
    packaged.sh(f"cp {image} /home/{someone}/own.raw && chown {someone}: /home/{someone}/own.raw")
    assert packaged.explain(f"/home/{someone}/own.raw", user=someone)["verdict"] == "deny"


def test_an_ordinary_user_mounts(packaged: Machine, image: str, someone: str) -> None:
    command = ["unshare", "-Urm", "sh", "-euc", f"mount -t mountd {image} /mnt; cat /mnt/hello"]
    assert packaged.run(command, user=someone).stdout == "hello from the image\n"


def test_an_upgrade_keeps_mounts_and_policy(packaged: Machine, image: str, someone: str) -> None:
    rules = packaged.root / "etc/mountd/policy.d/60-local.toml"
    rules.write_text("# nothing yet\n")
    with packaged.start(HOLD.format(image=image), user=someone) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert next_line(process) == "mounted"
        packaged.run(["dpkg", "--install", "/root/mountd.deb"])
        for socket in SOCKETS:
            assert packaged.state(socket) == "active"
        assert packaged.explain(image, user=someone)["verdict"] == "allow"
        process.stdin.write(b"\n")
        assert next_line(process) == "hello from the image"
        process.stdin.close()
        assert process.wait(30) == 0
    assert rules.read_text() == "# nothing yet\n"
    assert packaged.sh("systemctl list-units --failed --plain --no-legend") == ""


def test_removed_and_installed_again(packaged: Machine, image: str, someone: str) -> None:
    """Removed, it keeps what the administrator has written; installed again, it is as before."""
    rules = packaged.root / "etc/mountd/policy.d/60-local.toml"
    rules.write_text("# kept\n")
    want_the_socket_that_is_off(packaged)
    packaged.run(["dpkg", "--remove", "mountd"])
    for unit in (*SOCKETS, OFF, "mountd.service", "mountd-pull.service"):
        assert packaged.state(unit) == "inactive"
    assert packaged.run(["test", "-e", OFF_PATH], check=False).returncode == 1
    assert rules.read_text() == "# kept\n"
    packaged.run(["dpkg", "--install", "/root/mountd.deb"])
    assert packaged.state("mountd.socket") == "active"
    assert packaged.explain(image, user=someone)["verdict"] == "allow"


def test_purged_it_leaves_nothing_but_mounts(packaged: Machine, image: str, someone: str) -> None:
    stored = json.loads(packaged.run(["mountctl", "image", "import", "--json", image]).stdout)["image"]
    (packaged.root / "etc/mountd/policy.d/60-local.toml").write_text("# goes\n")
    assert packaged.sh("ls /var/lib/mountd")
    want_the_socket_that_is_off(packaged)
    with packaged.start(HOLD.format(image=image), user=someone) as process:
        assert process.stdin is not None
        assert next_line(process) == "mounted"
        packaged.run(["dpkg", "--purge", "mountd"])
        process.stdin.write(b"\n")
        assert next_line(process) == "hello from the image"
        process.stdin.close()
        assert process.wait(30) == 0
    try:
        assert stored["digest"].startswith("sha256:")
        assert packaged.sh(LEFT) == ""
        assert packaged.run(["test", "-e", OFF_PATH], check=False).returncode == 1
        assert packaged.run(["dpkg-query", "--show", "mountd"], check=False).returncode != 0
        assert packaged.sh("systemctl list-units --failed --plain --no-legend") == ""
    finally:
        packaged.run(["dpkg", "--install", "/root/mountd.deb"])
    assert packaged.state("mountd.socket") == "active"
