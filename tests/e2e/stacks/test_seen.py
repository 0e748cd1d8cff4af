"""Stacks: which layer hides what, whose ids they show, and what hostile layers come to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from tests.container import USER, as_user, in_container
from tests.daemon import ROOT, Daemon
from tests.e2e.calls import errno_of
from tests.e2e.conftest import trusting
from tests.e2e.directories import rule
from tests.e2e.stacks.calls import all_layers, directory, mounted, names, read, refusal
from tests.rights import drop_others, in_effect


def test_the_first_layer_is_the_topmost(serving: Daemon, layers: dict[str, Path]) -> None:
    with mounted(serving, all_layers(layers)) as reply:
        (told,) = reply.mounts
        assert (told["fileSystemType"], told["readOnly"]) == ("overlay", True)
        assert reply.decision["rule"] == "trusted in the test"
        assert read(reply.mount, "both") == "top"
        assert names(reply.mount, "merged") == {"top", "middle", "bottom"}
        assert os.fstatvfs(reply.mount.fileno()).f_flag & os.ST_RDONLY
    with mounted(serving, all_layers(layers)[::-1]) as reply:
        assert read(reply.mount, "both") == "bottom"
        assert read(reply.mount, "gone") == "middle"


def test_whiteouts_and_opaque_directories(serving: Daemon, layers: dict[str, Path]) -> None:
    with mounted(serving, all_layers(layers)) as reply:
        assert "gone" not in names(reply.mount)
        assert errno_of(lambda: os.stat("gone", dir_fd=reply.mount.fileno())) == "ENOENT"
        assert names(reply.mount, "opaque") == {"new"}
        # An attribute that any user can set on a file says nothing.
        assert names(reply.mount, "users") == {"file", "low"}


def test_hostile_attributes_lead_nowhere(serving: Daemon, layers: dict[str, Path]) -> None:
    with mounted(serving, all_layers(layers)) as reply:
        fd = reply.mount.fileno()
        for name in ("meta", "also-meta"):
            assert errno_of(lambda n=name: os.close(os.open(n, os.O_RDONLY, dir_fd=fd))) == "EPERM"  # type: ignore[misc]
        assert errno_of(lambda: os.listdir(f"/proc/self/fd/{fd}/redirected")) == "EPERM"
        assert errno_of(lambda: os.stat("redirected/middle", dir_fd=fd)) == "EPERM"


def test_a_container_gets_it_with_its_ids_and_locked(
    serving: Daemon, layers: dict[str, Path], containers: None
) -> None:
    def work() -> tuple[object, ...]:
        with mounted(serving, all_layers(layers), own=True) as reply:
            fd = reply.mount.fileno()
            mount_api.move_mount(fd, "/mnt")
            attributes = (MountAttr.NOSUID, MountAttr.NODEV, MountAttr.RDONLY)
            os.seteuid(1000)
            text = Path("/mnt/private").read_text()
            os.seteuid(0)
            return (
                os.stat("/mnt/both").st_uid,
                os.stat("/mnt/private").st_uid,
                text,
                Path("/mnt/private").read_text(),
                [errno_of(lambda a=a: mount_api.mount_setattr(fd, clear=a)) for a in attributes],  # type: ignore[misc]
                errno_of(lambda: os.close(os.open("/mnt/null", os.O_RDONLY))),
                errno_of(lambda: os.close(os.open("/mnt/new", os.O_CREAT | os.O_WRONLY))),
            )

    found = in_container(work)
    assert found == (0, 1000, "of 1000\n", "of 1000\n", ["EPERM"] * 3, "EACCES", "EROFS")


def test_others_read_no_more_than_modes_let_them(serving: Daemon, layers: dict[str, Path]) -> None:
    """An overlay reads its layers as mountd; who reads the overlay is judged before."""
    with mounted(serving, all_layers(layers)) as reply:
        fd = reply.mount.fileno()

        def opened(uid: int) -> str:
            act = lambda: os.close(os.open("private", os.O_RDONLY, dir_fd=fd))  # noqa: E731
            return as_user(lambda: errno_of(act), uid)

        assert (opened(1000), opened(1001)) == ("", "EACCES")


def test_with_the_capabilities_of_the_unit(
    start: Callable[..., Daemon], layers: dict[str, Path], containers: None
) -> None:
    """Files of others can be read by them; the daemon has the capability for that in effect only then."""
    daemon = start(trusting(layers["erofs"].parent), preexec_fn=drop_others)

    def work() -> str:
        with mounted(daemon, all_layers(layers), own=True) as reply:
            os.seteuid(1000)
            return read(reply.mount, "private")

    assert in_container(work) == "of 1000\n"
    with mounted(daemon, all_layers(layers)):
        for pid in daemon.workers:
            status = Path(f"/proc/{pid}/status").read_text()
            effective = int(status.partition("CapEff:")[2].split()[0], 16)
            assert effective == in_effect()


def test_from_the_command_line(serving: Daemon, layers: dict[str, Path], containers: None) -> None:
    """The topmost layer comes first, the source lies below all."""

    def work() -> tuple[str, str]:
        command = [sys.executable, "-m", "mountd.cli.mountctl", "mount"]
        above = ["--layer", str(layers["erofs"]), "--layer", str(layers["squashfs"])]
        done = subprocess.run(
            [*command, *above, str(layers["ext4"]), "/mnt"],
            cwd=ROOT,
            env={"MOUNTD_SOCKET": str(serving.socket), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stderr, " ".join(sorted(os.listdir("/mnt/merged")))

    assert in_container(work, uids=((0, 0, 65536),), owner=0) == ("", "bottom middle top")


def test_a_directory_of_the_callers_over_an_image(
    start: Callable[..., Daemon], layers: dict[str, Path], place: Path, containers: None
) -> None:
    """Its owner is the root of a container there, as in a mount of its own; nobody else can be seen."""
    daemon = start(trusting(layers["ext4"].parent) + rule("own", '"caller"'))
    home = directory(Path(tempfile.mkdtemp(prefix="layer-", dir=place)), {"both": "home", "roots": "root's"})
    os.chown(home, USER, USER)
    os.chown(home / "both", USER, USER)
    (home / "roots").chmod(0o600)

    with mounted(daemon, [home, layers["ext4"]]) as reply:
        fd = reply.mount.fileno()
        assert reply.decision["trustedBy"] == "caller-owned, root-owned"
        assert names(reply.mount) >= {"both", "roots", "secret"}
        assert read(reply.mount, "both") == "home"
        assert errno_of(lambda: os.unlink("both", dir_fd=fd)) == "EROFS"
        opened = as_user(lambda: errno_of(lambda: os.close(os.open("roots", os.O_RDONLY, dir_fd=fd))))
        assert opened == "EACCES"
    os.chown(home, USER + 1, USER + 1)
    name, text = refusal(daemon, [layers["ext4"], home])
    assert name == "DeniedByPolicy"
    assert "source.layers[1]" in text
    shutil.rmtree(home)
