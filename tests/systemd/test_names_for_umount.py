"""umount(8) of Debian 13, for places whose names are no plain text."""

from __future__ import annotations

import pytest

from tests.systemd.conftest import IMAGES
from tests.systemd.machine import Machine

POLICY = f"""
[[rule]]
name = "odd names"
image = {{ location = "{IMAGES}/*" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["erofs"], idmap = ["none"], attach = ["/srv/odd/$UID/**"] }}
verdict = "allow"
"""
# As printf(1) has them, and umount(8) gets them.
NAMES = {
    "control": r"bell\007 and\033[31m",
    "lines": r"two\nlines\342\200\250and\302\205\r",
    "no UTF-8": r"caf\351 \377",
    "escaped": r"a\\040b \\",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_user_unmounts(machine: Machine, images: dict[str, str], user: str, name: str) -> None:
    (machine.root / "etc/mountd/policy.d/10-names.toml").write_text(POLICY)
    machine.sh(f"install -d -o {user} /srv/odd/$(id -u {user})")
    done = machine.run(
        [
            *("env", "LC_ALL=C.UTF-8", "sh", "-euc"),
            'cd /srv/odd/$(id -u); name=$(printf "$1x"); mkdir "$name"; mount -t mountd "$2" "$name"; '
            'mountpoint -q "$name"; grep -c uhelper=mountd /run/mount/utab; umount "$name"; rmdir "$name"',
            *("sh", name, images["erofs"]),
        ],
        user=user,
    )
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert "uhelper=mountd" not in machine.sh("cat /run/mount/utab")
