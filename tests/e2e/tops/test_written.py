"""Stacks that can be written to: what stays of what is written, and whose it is on the disk."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

from mountd.caller.model import FOREIGN
from mountd.client import Client, Request
from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from mountd.store.store import Store
from tests.container import USER, in_container
from tests.daemon import Daemon
from tests.e2e.calls import errno_of
from tests.e2e.conftest import trusting
from tests.e2e.stacks.calls import names, read
from tests.e2e.tops.calls import INNER_ROOT, MIB, at_mnt, mounted, refusal
from tests.e2e.tops.changes import CHANGED, SETUID, change, on_disk
from tests.e2e.tops.rules import MEMORY_RULE
from tests.layered import HIDDEN, pulled
from tests.rights import drop_others, in_effect

BASE = FOREIGN.start


def test_what_is_written_into_memory_goes_with_the_mount(
    serving: Daemon, images: list[Path], containers: None
) -> None:
    def work() -> tuple[object, ...]:
        reply = mounted(serving, images, MIB)
        (told,) = reply.mounts
        with at_mnt(reply) as top:
            fd = reply.mount.fileno()
            attributes = (MountAttr.NOSUID, MountAttr.NODEV)
            found = (
                (told["fileSystemType"], told["readOnly"], reply.decision["rule"]),
                [errno_of(lambda a=a: mount_api.mount_setattr(fd, clear=a)) for a in attributes],  # type: ignore[misc]
                change(top),
                errno_of(lambda: os.chown(top / "new", 33, 33)),
                (top / "new").stat().st_uid,
                errno_of(lambda: (top / "large").write_bytes(bytes(2 * MIB))),
            )
            (top / "large").unlink()
            os.seteuid(33)
            (top / "of-33").write_text("33 again")
            os.seteuid(0)
        with mounted(serving, images, MIB) as again:
            return (*found, names(again.mount), read(again.mount, "etc/passwd"))

    found = in_container(work)
    assert found[:2] == (("overlay", False, "trusted in the test, memory"), ["EPERM"] * 2)
    assert found[2:6] == (CHANGED, "", 33, "ENOSPC")
    assert {"gone", "of-33"} < found[6]  # type: ignore[operator]
    assert "new" not in found[6]  # type: ignore[operator]
    assert found[7] == "below"


def test_what_is_written_into_a_directory_stays(
    serving: Daemon, images: list[Path], home: Path, containers: None
) -> None:
    home.chmod(0o700)

    def work() -> tuple[object, ...]:
        reply = mounted(serving, images, home)
        with at_mnt(reply) as top:
            found = change(top)
            others = [errno_of(lambda n=n: os.chown(top / n, 33, 33)) for n in ("new", "suid")]  # type: ignore[misc]
            written = errno_of(lambda: (top / "of-33").write_text("mine"))
            (top / "suid").chmod(SETUID)
            while_used = refusal(serving, images, home)
        # Soon, as whoever has made it may still have it.
        with mounted(serving, images, home) as again:
            left = names(again.mount), names(again.mount, "dir"), read(again.mount, "etc/passwd")
        return reply.decision["trustedBy"], found, others, written, while_used, left

    trusted, found, others, written, while_used, left = in_container(work)
    assert (trusted, found) == ("root-owned, caller-owned", CHANGED)
    # Nobody else can have anything there, neither by being given it nor by being copied there.
    assert others == ["EOVERFLOW"] * 2
    assert written == "EOVERFLOW"
    assert while_used[0] == "InUse", while_used
    assert left == (
        {"both", "etc", "dir", "suid", "of-33", "everybodys", "all", "device", "new", "lost+found"},
        {"mine"},
        "below changed",
    )
    disk = on_disk(home / "upper")
    assert {(uid, gid) for _, uid, gid in disk.values()} == {(INNER_ROOT, INNER_ROOT)}
    assert disk["gone"][0] == stat.S_IFCHR
    assert (home / "upper/gone").stat().st_rdev == 0
    assert "device" not in disk
    assert set(os.listdir(home)) == {"upper", "work"}
    assert stat.S_IMODE((home / "work").stat().st_mode) == 0o700


def test_a_container_of_one_user_writes_as_that_user(
    serving: Daemon, images: list[Path], home: Path, containers: None
) -> None:
    os.chown(home, USER, USER)

    def work() -> tuple[object, int]:
        with at_mnt(mounted(serving, images, home)) as top:
            return change(top), (top / "new").stat().st_uid

    assert in_container(work, uids=((0, USER, 1),)) == (CHANGED, 0)
    assert {(uid, gid) for _, uid, gid in on_disk(home / "upper").values()} == {(USER, USER)}


def test_the_foreign_range_holds_all_ids_of_a_container(
    serving: Daemon, images: list[Path], home: Path, containers: None
) -> None:
    inner = home / "machine"
    inner.mkdir(mode=0o700)
    os.chown(inner, BASE, BASE)

    def work() -> object:
        with at_mnt(mounted(serving, images, inner)) as top:
            os.chown(top / "suid", 1000, 65535)
            os.seteuid(33)
            (top / "of-33").write_text("33 again")
            os.seteuid(0)
        with mounted(serving, images, inner) as reply:
            status = os.stat("suid", dir_fd=reply.mount.fileno())
            return status.st_uid, status.st_gid, read(reply.mount, "of-33")

    assert in_container(work) == (1000, 65535, "33 again")
    disk = on_disk(inner / "upper")
    assert disk["suid"][1:] == (BASE + 1000, BASE + 65535)
    assert disk["of-33"][1:] == (BASE + 33, BASE + 33)


def test_an_image_of_several_layers(serving: Daemon, home: Path, containers: None) -> None:
    """By its name in a registry; and one of a single layer."""
    store = Store(serving.directory / "state")
    several = pulled(store, [{"both": "low", "gone": "low", "kept": "low"}, {"both": "top", "gone": HIDDEN}])
    single = pulled(store, [{"kept": "single"}])

    def work() -> tuple[object, ...]:
        found: list[object] = []
        for image in (several, single):
            with (
                Client(str(serving.socket)) as client,
                Request(image.reference, top=str(home)) as request,
                at_mnt(client.mount(request.source, request.fds, **request.parameters)) as top,
            ):
                found.append((top / "kept").read_text())
                (top / "kept").write_text("written")
                found.append(sorted(os.listdir(top)))
            if image is several:
                shutil.rmtree(home / "upper")
        return tuple(found)

    assert in_container(work) == ("low", ["both", "kept"], "single", ["kept"])


def test_with_the_capabilities_of_the_unit(
    start: Callable[..., Daemon], images: list[Path], containers: None
) -> None:
    """They are enough for all that the root of a container does to its files, and not in effect after."""
    daemon = start(trusting(images[0].parent) + MEMORY_RULE, preexec_fn=drop_others)

    def work() -> tuple[object, ...]:
        with at_mnt(mounted(daemon, images, MIB)) as top:
            found = change(top)
            os.chown(top / "dir", 33, 33)
            os.chmod(top / "of-33", 0o2755)
            os.seteuid(33)
            (top / "dir/of-33").write_text("")
            os.seteuid(0)
            shutil.rmtree(top / "dir")
            return found, stat.S_IMODE((top / "of-33").stat().st_mode), sorted(os.listdir(top / "etc"))

    assert in_container(work) == (CHANGED, 0o2755, ["passwd"])
    for pid in daemon.workers:
        status = Path(f"/proc/{pid}/status").read_text()
        effective = int(status.partition("CapEff:")[2].split()[0], 16)
        assert effective == in_effect()
        assert status.partition("Uid:")[2].split()[:4] == ["0"] * 4


def test_what_is_left_of_work_is_cleared_away(
    serving: Daemon, images: list[Path], home: Path, containers: None
) -> None:
    """As of a machine that lost its power; what is somebody else's there stays, and is not removed."""
    left = home / "work/work/left"
    left.mkdir(parents=True)
    (left / "file").write_text("")
    for path in (home / "work", home / "work/work", left, left / "file"):
        os.chown(path, INNER_ROOT, INNER_ROOT)
    assert in_container(lambda: refusal(serving, images, home)) == ("", "")
    assert os.listdir(home / "work/work") == []
    left.mkdir()
    (left / "roots").write_text("root's")
    assert in_container(lambda: refusal(serving, images, home))[0] in ("", "NotSupported", "MountFailed")
    assert [path.name for path in home.rglob("*") if path.name == "roots"] == ["roots"]


def test_on_the_command_line(
    serving: Daemon, images: list[Path], home: Path, installed: Path, containers: None
) -> None:
    environment = {"MOUNTD_SOCKET": str(serving.socket), "PATH": os.environ["PATH"]}

    def mountctl(*words: str | Path) -> tuple[int, str]:
        done = subprocess.run(
            [installed / "bin/mountctl", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stderr

    def work() -> tuple[object, ...]:
        layers = ["--layer", str(images[0]), str(images[1]), "/mnt"]
        in_memory = mountctl("mount", "--top", "tmpfs:1M", *layers)
        Path("/mnt/etc/passwd").write_text("changed")
        mount_api.umount("/mnt")
        in_home = mountctl("mount", "--top", home, *layers)
        text = Path("/mnt/etc/passwd").read_text()
        Path("/mnt/etc/passwd").write_text("changed")
        mount_api.umount("/mnt")
        return in_memory, in_home, text, mountctl("mount", "--top", "tmpfs:8M", *layers)

    in_memory, in_home, text, large = in_container(work, uids=((0, INNER_ROOT, 65536),))
    assert (in_memory, in_home, text) == ((0, ""), (0, ""), "below")
    assert large[0]
    assert "4194304" in large[1]
    assert (home / "upper/etc/passwd").read_text() == "changed"
