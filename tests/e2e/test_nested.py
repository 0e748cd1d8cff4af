"""Containers in containers: each finds the socket by itself and gets its mount, for its own ids only."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from mountd.client import attach
from mountd.fds import OwnedFd, close_all
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation
from tests.container import RANGE, USER, forked, in_container, user_namespace
from tests.daemon import Daemon
from tests.e2e.calls import Outcome, mounted, outcome
from tests.e2e.calls import mount as ask

ONE = ((0, USER, 1),)

# What each container does. It has /run/host/mountd and an empty /mnt, and no other hint to the daemon.
WORK = """
set -eu
test -z "${MOUNTD_SOCKET-}"
test ! -e /run/mountd
mkdir /mnt/helper /mnt/ctl
"$BIN/sbin/mount.mountd" "$IMAGE" /mnt/helper
"$BIN/bin/mountctl" mount "$IMAGE" /mnt/ctl > /dev/null
for directory in helper ctl; do
    echo "$(cat /mnt/$directory/hello) for $(stat -c %u:%g /mnt/$directory/hello)"
done
for fd in $OTHERS; do
    if "$BIN/sbin/mount.mountd" -o "mountd.userns=/proc/self/fd/$fd" "$IMAGE" /mnt/ctl 2>&1; then
        echo "taken: $fd"
    fi
done
"""
# Within, the same once more; what it lies in is then one more namespace that is none of its business.
NEST = 'exec 9</proc/self/ns/user; export OTHERS="$OTHERS 9"'

UNSHARE = "unshare --user --map-root-user --mount --pid --fork --mount-proc sh -c"
BY_UNSHARE = f"""
mount -t tmpfs run /run
mkdir -p /run/host/mountd
mount --bind "$SOCKETS" /run/host/mountd
mount -t tmpfs mnt /mnt
{WORK}
{NEST}
{UNSHARE} '
mount --bind /run/host/mountd /run/host/mountd
mount -t tmpfs mnt /mnt
'"$WORK"
"""

BWRAP = """bwrap --unshare-user --unshare-pid --uid 0 --gid 0 --cap-add ALL --ro-bind / / --proc /proc \
    --dev /dev --tmpfs /mnt --tmpfs /run --bind "$SOCKETS" /run/host/mountd"""
BY_BWRAP = f"""
{WORK}
{NEST}
SOCKETS=/run/host/mountd
exec {BWRAP} sh -c "$WORK"
"""


@pytest.mark.parametrize(
    ("command", "script"),
    [(f'exec {UNSHARE} "$SCRIPT"', BY_UNSHARE), (f'exec {BWRAP} sh -c "$SCRIPT"', BY_BWRAP)],
    ids=["unshare", "bwrap"],
)
def test_a_container_and_one_within_it(
    daemon: Daemon, images: dict[str, Path], installed: Path, command: str, script: str
) -> None:
    with (
        OwnedFd(os.open("/proc/self/ns/user", os.O_RDONLY)) as host,
        user_namespace(ONE, owner=USER) as sibling,
    ):
        # Where neither a shell nor subprocess has its own.
        others = [OwnedFd(fcntl.fcntl(each.fileno(), fcntl.F_DUPFD_CLOEXEC, 50)) for each in (host, sibling)]
        numbers = [each.fileno() for each in others]
        done = subprocess.run(
            ["sh", "-c", command],
            env={
                "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
                "BIN": str(installed),
                "IMAGE": str(images["erofs"]),
                "SOCKETS": str(daemon.socket.parent),
                "SCRIPT": script,
                "WORK": WORK,
                "OTHERS": " ".join(map(str, numbers)),
            },
            user=USER,
            group=USER,
            extra_groups=[],
            cwd="/",
            pass_fds=numbers,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        close_all(others)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done
    assert [*lines[:2], *lines[4:6]] == ["hello from the image for 0:0"] * 4, done
    refusals = ["it is the host's", "it is neither the caller's own nor a descendant of it"]
    refusals += [*refusals, refusals[1]]
    for line, refusal in zip(lines[2:4] + lines[6:], refusals, strict=True):
        assert f"user namespace not permitted: {refusal}" in line


def test_ranges_of_ids_within_each_other(
    daemon: Daemon, images: dict[str, Path], place: Path, containers: None
) -> None:
    """The inner container's 0 is the outer one's 1000, which is 401000 here."""
    target = place / "inner"
    target.mkdir()

    def outer() -> dict[str, object]:
        with (
            user_namespace(((0, 1000, 2000),)) as given,
            user_namespace(((0, 1000, 2000),)) as sibling,
            OwnedFd(os.open("/proc/self/ns/user", os.O_RDONLY)) as own,
        ):

            def inner() -> dict[str, object]:
                namespaces.setns(given.fileno(), Clone.NEWUSER)
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
                namespaces.unshare(Clone.NEWNS | Clone.NEWPID)
                mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
                return forked(in_the_inner)

            def in_the_inner() -> dict[str, object]:
                assert os.getpid() == 1
                with mounted(daemon.socket, images["squashfs"]) as reply:
                    attach(reply.mount.fileno(), str(target))
                    owners = [(target / name).stat().st_uid for name in ("hello", "owned")]
                return {"owners": owners, "others": [use(own), use(sibling), wider()]}

            def use(userns: OwnedFd) -> Outcome:
                return outcome(
                    lambda: ask(daemon.socket, images["squashfs"], userns=f"/proc/self/fd/{userns.fileno()}")
                )

            def wider() -> str:
                try:
                    user_namespace(((0, 0, 2001),)).close()
                except PermissionError:
                    return "refused by the kernel"
                return "made"

            found = forked(inner)
            # The outer one may use what it made, and sees its own numbers there.
            with mounted(
                daemon.socket, images["squashfs"], userns=f"/proc/self/fd/{given.fileno()}"
            ) as reply:
                found["outside"] = os.stat("owned", dir_fd=reply.mount.fileno()).st_uid
        return found

    found = in_container(outer, uids=RANGE)
    target.rmdir()
    assert found["owners"] == [0, 1000]
    assert found["outside"] == 2000
    (parents, siblings, wider) = found["others"]  # type: ignore[misc]
    for name, text in (parents, siblings):
        assert name == "UserNamespaceNotPermitted"
        assert "neither the caller's own nor a descendant of it" in text
    assert wider == "refused by the kernel"
