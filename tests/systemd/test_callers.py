"""Who uses the hardened service: ordinary users, their containers, and root, on every file system."""

from __future__ import annotations

import pytest

from tests.systemd.conftest import IMAGES, TYPES
from tests.systemd.machine import Machine

HELLO = "hello from the image\n"
NOBODY = "65534"

# In a container: with the real mount(8), which starts mount.mountd.
MOUNT_AND_LOOK = """
mkdir -p /tmp/target
mount -t mountd {image} /tmp/target
cat /tmp/target/hello
stat -c %u /tmp/target/hello /tmp/target/owned
grep ' /tmp/target ' /proc/self/mountinfo
for attack in 'cat /tmp/target/null' 'mount -o remount,bind,dev /tmp/target' \\
  'mount -o remount,bind,suid /tmp/target' 'mount -o remount,bind,rw /tmp/target' 'touch /tmp/target/new'; do
  if $attack 2> /dev/null; then
    echo "not prevented: $attack"
  fi
done
umount /tmp/target
"""


def mount_options(line: str) -> set[str]:
    return set(line.split()[5].split(","))


@pytest.mark.parametrize("type", TYPES)
def test_a_container_mounts_with_mount8(
    machine: Machine, images: dict[str, str], user: str, type: str
) -> None:
    script = MOUNT_AND_LOOK.format(image=images[type])
    done = machine.run(["unshare", "-Urm", "sh", "-euc", script], user=user)
    hello, root, owned, line, *not_prevented = done.stdout.splitlines()
    assert not_prevented == []
    # One id is mapped in such a container: root's. Everybody else is nobody.
    assert (hello + "\n", root, owned) == (HELLO, "0", NOBODY)
    assert mount_options(line) >= {"ro", "nosuid", "nodev", "idmapped"}
    assert line.partition(" - ")[2].split()[0] == type


@pytest.mark.parametrize("type", TYPES)
def test_an_ordinary_user_runs_a_command_in_an_image(
    machine: Machine, images: dict[str, str], user: str, type: str
) -> None:
    run = ["mountctl", "run", images[type], "--"]
    assert machine.run([*run, "/usr/bin/cat", "/hello"], user=user).stdout == HELLO
    # Mapped by newuidmap(1): ids above 0 are the user's subordinate ones.
    stat = machine.run([*run, "/usr/bin/stat", "-c", "%u", "/hello", "/owned"], user=user)
    assert stat.stdout.split() == ["0", "1000"]
    mountinfo = machine.run([*run, "/usr/bin/cat", "/proc/self/mountinfo"], user=user).stdout
    root = next(line for line in mountinfo.splitlines() if line.split()[4] == "/")
    assert mount_options(root) >= {"ro", "nosuid", "nodev", "idmapped"}


@pytest.mark.parametrize("type", TYPES)
def test_root_mounts_with_mount8(machine: Machine, images: dict[str, str], type: str) -> None:
    look = f"mount -t mountd {images[type]} /mnt; cat /mnt/hello; stat -c %u /mnt/owned; umount /mnt"
    assert machine.sh(look) == HELLO + "1000\n"


def test_an_ordinary_user_cannot_attach_on_the_host(
    machine: Machine, images: dict[str, str], user: str
) -> None:
    done = machine.run(["mountctl", "mount", images["erofs"], "/mnt"], user=user, check=False)
    assert done.returncode != 0
    assert "use a directory of your own" in done.stderr


@pytest.mark.parametrize("type", TYPES)
def test_the_default_policy_denies_an_image_in_a_home(
    machine: Machine, images: dict[str, str], user: str, type: str
) -> None:
    # The parser runs in a process that nothing is left to: with this Python, under this unit.
    image = f"/home/{user}/{type}.raw"
    machine.run(["install", f"--owner={user}", "--mode=0644", images[type], image])
    done = machine.run(["unshare", "-Urm", "mount", "-t", "mountd", image, "/mnt"], user=user, check=False)
    assert done.returncode == 1
    assert "denied by policy" in done.stderr
    assert f"hint: an administrator can copy it, owned by root, to one of: {IMAGES}" in done.stderr
    decision = machine.explain(image, user=user)
    assert decision["verdict"] == "deny"
    assert f"/home/{user} belongs to uid" in str(decision["reason"])
    done = machine.run(["mountctl", "explain", image], user=user, check=False)
    assert f"file system: {type}\n" in done.stdout
