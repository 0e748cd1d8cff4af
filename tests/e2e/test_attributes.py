"""What leaves is locked: attributes that no receiver can lift (THREATS.md, C 43 to 46)."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from mountd.client import MountReply, attach
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, mount_info, namespaces
from mountd.kernel.flags import (
    Clone,
    FsPick,
    MountAttr,
    MoveMount,
    OpenTree,
    Propagation,
    StatmountMask,
)
from mountd.kernel.fs_context import FsContext
from mountd.kernel.libc import call
from tests.container import as_user, drop_capabilities, forked, in_container
from tests.daemon import Daemon
from tests.e2e.calls import errno_of, mount_fds, mounted, outcome, text_of
from tests.e2e.conftest import trusting
from tests.images import build_image

T = TypeVar("T")
NOTHING = MountAttr(0)
USUAL = (MountAttr.RDONLY, MountAttr.NOSUID, MountAttr.NODEV)
CLONE = OpenTree.CLONE | OpenTree.EMPTY_PATH
FULL = ((0, 0, 65536),)  # a container whose root is the host's
REMOUNT = 32 | 4096  # MS_REMOUNT|MS_BIND
NAMESPACE = 2 | 0x1000  # OPEN_TREE_NAMESPACE, which kernels after 6.18 have
CAPABILITIES = struct.pack("<5I", 0x02000001, 1 << 7, 0, 0, 0)  # CAP_SETUID, effective


@pytest.fixture(scope="module")
def target(place: Path) -> Path:
    path = place / "attributes"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture(scope="module")
def hostile(place: Path, images: dict[str, Path]) -> dict[str, Path]:
    """An image whose author wants the host: device nodes for all, programs with root's rights."""
    tree = place / "hostile"
    tree.mkdir(mode=0o755)
    devices = (
        ("block", stat.S_IFBLK, os.stat("/dev/loop0").st_rdev),
        ("char", stat.S_IFCHR, os.makedev(1, 3)),
    )
    for name, kind, device in devices:
        os.mknod(tree / name, 0o666 | kind, device)
        (tree / name).chmod(0o666)
    for name in ("suid", "capable"):
        shutil.copy("/bin/cat", tree / name)
    (tree / "suid").chmod(0o6755)
    os.setxattr(tree / "capable", "security.capability", CAPABILITIES)
    (tree / "hello").write_text("hello\n")
    (tree / "link").symlink_to("hello")
    made = {
        type: build_image(type, tree, images[type].with_name(f"hostile-{type}.raw"))
        for type in ("erofs", "ext4")
    }
    subprocess.run(["sync"], check=True)
    return made


def nested(work: Callable[[], T]) -> T:
    """Run `work` with all capabilities in one more user and mount namespace, without any map."""

    def enter() -> T:
        namespaces.unshare(Clone.NEWUSER | Clone.NEWNS)
        return work()

    return forked(enter)


# Who holds the mount when it tries: root of the container that asked, that one in a namespace below, a host
# user without any namespace, and one who made one after it had the mount.
RECEIVERS: dict[str, Callable[[Callable[[Callable[[Callable[[], object]], object]], object]], object]] = {
    "container": lambda work: in_container(lambda: work(lambda act: act())),
    "nested in the container": lambda work: in_container(lambda: work(nested)),
    "container of the host's root": lambda work: in_container(
        lambda: work(lambda act: act()), uids=FULL, owner=0
    ),
    "host user": lambda work: as_user(lambda: work(lambda act: act())),
    "host user who unshares": lambda work: as_user(lambda: work(nested)),
}


def lifts(mount: MountReply, flags: tuple[MountAttr, ...], set: MountAttr = NOTHING) -> dict[str, str]:
    """Try to clear each flag in every way there is; return the errno of each attempt."""
    fd = mount.mount.fileno()
    found = {}
    for flag in flags:
        found[f"{flag!r} on it"] = errno_of(lambda f=flag: mount_api.mount_setattr(fd, set=set, clear=f))
        found[f"{flag!r} recursively"] = errno_of(
            lambda f=flag: mount_api.mount_setattr(fd, set=set, clear=f, recursive=True)
        )
        found[f"{flag!r} in a copy"] = errno_of(
            lambda f=flag: mount_api.open_tree_attr(fd, "", CLONE, set=set, clear=f)
        )

        def on_copy(f: MountAttr = flag) -> None:
            with mount_api.open_tree(fd, "", CLONE | OpenTree.RECURSIVE) as copy:
                mount_api.mount_setattr(copy.fileno(), set=set, clear=f)

        found[f"{flag!r} on a copy"] = errno_of(on_copy)
    return found


def assert_locked(found: object, flags: int) -> None:
    """No attempt has worked; of what was made in another namespace there is not even a copy to try it on."""
    assert isinstance(found, dict)
    assert len(found) == 4 * flags
    for what, how in found.items():
        assert how == "EPERM" or (how == "EINVAL" and "copy" in what), found


@pytest.mark.parametrize("type", ["erofs", "ext4"])
@pytest.mark.parametrize("receiver", RECEIVERS)
def test_c43_flags_cannot_be_cleared_on_the_descriptor(
    daemon: Daemon, hostile: dict[str, Path], containers: None, receiver: str, type: str
) -> None:
    def work(within: Callable[[Callable[[], object]], object]) -> object:
        with mounted(daemon.socket, hostile[type]) as reply:
            return within(lambda: lifts(reply, USUAL))

    found = RECEIVERS[receiver](work)
    assert_locked(found, len(USUAL))


def test_c43_flags_cannot_be_cleared_after_attach(
    daemon: Daemon, hostile: dict[str, Path], target: Path, containers: None
) -> None:
    path = str(target)

    def work() -> dict[str, str]:
        with mounted(daemon.socket, hostile["erofs"]) as reply:
            attach(reply.mount.fileno(), path)
            found = lifts(reply, USUAL)
            found |= {f"nested {what}": how for what, how in nested(lambda: lifts_at(path)).items()}
        return found | lifts_at(path)

    def lifts_at(path: str) -> dict[str, str]:
        found = {}
        with OwnedFd(os.open(path, os.O_PATH)) as fd:
            for flag in USUAL:
                found[f"{flag!r} at the path"] = errno_of(
                    lambda f=flag: mount_api.mount_setattr(fd.fileno(), clear=f, recursive=True)
                )
        # mount -o remount,bind with all but one of the flags (MS_RDONLY, MS_NOSUID, MS_NODEV)
        for left_out in (1, 2, 4):
            flags = REMOUNT | 7 & ~left_out
            found[f"remount without {left_out}"] = errno_of(
                lambda flags=flags: call("mount", None, path.encode(), None, flags, None)
            )
        return found

    found = in_container(work)
    assert len(found) == 24
    assert set(found.values()) == {"EPERM"}, found


@pytest.mark.parametrize(
    ("granted", "wished", "flag", "set"),
    [
        ("noexec", (), MountAttr.NOEXEC, NOTHING),
        ("nodiratime", (), MountAttr.NODIRATIME, NOTHING),
        ("noatime", (), MountAttr.ATIME_MASK, NOTHING),
        ("noatime", (), MountAttr.ATIME_MASK, MountAttr.STRICTATIME),
        ("", ("noexec",), MountAttr.NOEXEC, NOTHING),
        ("", ("noatime",), MountAttr.ATIME_MASK, NOTHING),
        ("", ("nodiratime",), MountAttr.NODIRATIME, NOTHING),
        ("", ("strictatime",), MountAttr.ATIME_MASK, NOTHING),
    ],
)
def test_c43_what_a_rule_or_a_wish_adds_is_locked(
    start: Callable[..., Daemon],
    hostile: dict[str, Path],
    containers: None,
    granted: str,
    wished: tuple[str, ...],
    flag: MountAttr,
    set: MountAttr,
) -> None:
    flags = f'["{granted}"]' if granted else "[]"
    daemon = start(trusting(hostile["erofs"].parent, flags=flags))

    def work() -> dict[str, str]:
        with mounted(daemon.socket, hostile["erofs"], options=wished) as reply:
            return lifts(reply, (flag,), set)

    assert_locked(in_container(work), 1)


def test_c43_nosymfollow_holds_until_its_receiver_clears_it(
    daemon: Daemon, hostile: dict[str, Path], containers: None
) -> None:
    """The kernel has no lock for it (MNT_LOCK_*), so that no rule can grant it (test_policy_file)."""

    def work() -> list[object]:
        with mounted(daemon.socket, hostile["erofs"], options=["nosymfollow"]) as reply:
            before = errno_of(lambda: text_of(reply, "link"))
            fd = reply.mount.fileno()
            cleared = errno_of(lambda: mount_api.mount_setattr(fd, clear=MountAttr.NOSYMFOLLOW))
            return [before, cleared, text_of(reply, "link")]

    assert in_container(work) == ["ELOOP", "", "hello\n"]


def test_c43_access_times_are_locked_even_where_nothing_is_asked(
    daemon: Daemon, hostile: dict[str, Path], containers: None
) -> None:
    def work() -> dict[str, str]:
        with mounted(daemon.socket, hostile["ext4"]) as reply:
            return lifts(reply, (MountAttr.ATIME_MASK,), MountAttr.NOATIME)

    assert_locked(in_container(work), 1)


@pytest.mark.parametrize(
    ("wishes", "flags"),
    [
        ({}, MountAttr.RDONLY),
        ({"options": ["nosuid", "nodev", "noexec"]}, MountAttr.RDONLY | MountAttr(0xE)),
        ({"options": ["nosymfollow", "noatime"]}, MountAttr.RDONLY | MountAttr(0x200010)),
    ],
)
def test_c43_the_hosts_root_gets_what_it_asks_for_and_no_lock(
    daemon: Daemon, hostile: dict[str, Path], wishes: dict[str, object], flags: MountAttr
) -> None:
    with mounted(daemon.socket, hostile["erofs"], **wishes) as reply:
        assert attributes(reply) == flags
        everything = MountAttr.ATIME_MASK | MountAttr.NOSYMFOLLOW | MountAttr(0xF)
        mount_api.mount_setattr(reply.mount.fileno(), clear=everything)
        assert not attributes(reply) & ~MountAttr.RDONLY  # which the superblock is as well


def test_c43_root_without_the_capability_gets_what_a_user_gets(
    daemon: Daemon, hostile: dict[str, Path]
) -> None:
    """uid 0 in a container without a user namespace, or in a service, is not the host's administrator."""

    def work() -> list[object]:
        drop_capabilities()
        ids = [{"first": 0, "target": 1000, "count": 1}]
        with (
            mounted(daemon.socket, hostile["ext4"]) as reply,
            OwnedFd(os.open(hostile["ext4"], os.O_RDONLY)) as image,
        ):
            source = {"imageFileDescriptor": 0}
            wish = {"kind": "ranges", "uidRanges": ids, "gidRanges": ids}
            others = outcome(lambda: mount_fds(daemon.socket, source, [image.fileno()], idMap=wish))
            return [
                bool(attributes(reply) & MountAttr.NODEV and attributes(reply) & MountAttr.NOSUID),
                errno_of(lambda: OwnedFd(os.open("char", os.O_RDONLY, dir_fd=reply.mount.fileno()))),
                nested(lambda: lifts(reply, USUAL)),
                others[0],
            ]

    locked, opened, lifted, others = forked(work)
    assert (locked, opened, others) == (True, "EACCES", "UserNamespaceNotPermitted")
    assert_locked(lifted, len(USUAL))


def attributes(reply: MountReply) -> int:
    """The attributes of a detached mount, which statmount(2) does not find, from statvfs(3)."""
    flags = os.fstatvfs(reply.mount.fileno()).f_flag
    names = {
        os.ST_RDONLY: MountAttr.RDONLY,
        os.ST_NOSUID: MountAttr.NOSUID,
        os.ST_NODEV: MountAttr.NODEV,
        os.ST_NOEXEC: MountAttr.NOEXEC,
        os.ST_NOATIME: MountAttr.NOATIME,
        os.ST_NODIRATIME: MountAttr.NODIRATIME,
        0x2000: MountAttr.NOSYMFOLLOW,
    }
    return sum(attribute for bit, attribute in names.items() if flags & bit)


@pytest.mark.parametrize("granted", [(), ("noexec",)])
def test_c43_everybody_else_gets_nosuid_and_nodev_and_what_the_rule_adds(
    start: Callable[..., Daemon], hostile: dict[str, Path], granted: tuple[str, ...]
) -> None:
    flags = str(list(granted)).replace("'", '"')
    daemon = start(trusting(hostile["erofs"].parent, flags=flags))

    def work() -> int:
        with mounted(daemon.socket, hostile["erofs"]) as reply:
            return attributes(reply)

    assert as_user(work) == sum(USUAL) + (MountAttr.NOEXEC if granted else 0)


@pytest.mark.parametrize("type", ["erofs", "ext4"])
@pytest.mark.parametrize("name", ["block", "char"])
def test_c44_device_nodes_cannot_be_opened(
    daemon: Daemon, hostile: dict[str, Path], target: Path, containers: None, name: str, type: str
) -> None:
    def opened(reply: MountReply) -> list[str]:
        fd = reply.mount.fileno()
        return [
            errno_of(lambda f=flags: OwnedFd(os.open(name, f, dir_fd=fd)))  # type: ignore[misc]
            for flags in (os.O_RDONLY, os.O_RDWR)
        ]

    def in_the_container() -> list[str]:
        with mounted(daemon.socket, hostile[type]) as reply:
            found = opened(reply) + nested(lambda: opened(reply))
            attach(reply.mount.fileno(), str(target))
            found += opened(reply)
            found += [errno_of(lambda: OwnedFd(os.open(target / name, os.O_RDONLY)))]
            owner = os.stat(name, dir_fd=reply.mount.fileno()).st_uid
        return [*found, f"owner {owner}"]

    def as_its_owner() -> list[str]:
        with mounted(daemon.socket, hostile[type], idmap="caller") as reply:
            owner = os.stat(name, dir_fd=reply.mount.fileno()).st_uid
            return [*opened(reply), *nested(lambda: opened(reply)), f"owner {owner}"]

    assert in_container(in_the_container) == ["EACCES"] * 7 + ["owner 0"]
    assert as_user(as_its_owner) == ["EACCES"] * 4 + ["owner 4000"]
    # What an ordinary mount of this image would have done.
    with mounted(daemon.socket, hostile[type]) as reply:
        assert opened(reply) == ["", ""]


def run(path: str, uid: int | None = None) -> dict[str, str]:
    """Run a cat of the image and return what it says about its own rights; it keeps open what it needs."""
    become = {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}
    ran = subprocess.run(  # type: ignore[call-overload]
        [path, "/proc/self/status"], capture_output=True, text=True, check=True, close_fds=False, **become
    )
    lines = (line.split(":\t") for line in ran.stdout.splitlines())
    return {name: value for name, value in lines if name in ("Uid", "CapEff", "CapPrm")}


@pytest.mark.parametrize("type", ["erofs", "ext4"])
@pytest.mark.parametrize("name", ["suid", "capable"])
def test_c45_programs_with_rights_have_none(
    daemon: Daemon, hostile: dict[str, Path], target: Path, containers: None, name: str, type: str
) -> None:
    powerless = {"CapPrm": f"{0:016x}", "CapEff": f"{0:016x}"}

    def on_the_host() -> dict[str, str]:
        with (
            mounted(daemon.socket, hostile[type]) as reply,
            OwnedFd(os.open(name, os.O_PATH, dir_fd=reply.mount.fileno())) as program,
        ):
            os.set_inheritable(program.fileno(), True)
            return run(f"/proc/self/fd/{program.fileno()}")

    def in_the_container() -> dict[str, str]:
        with mounted(daemon.socket, hostile[type]) as reply:
            attach(reply.mount.fileno(), str(target))
            return run(str(target / name), uid=1000)

    def attached_on_the_host() -> dict[str, str]:
        """By root, who was handed what a user had asked for."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            as_user(lambda: hand_over(theirs))
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        attach(fds[0], str(target))
        return run(str(target / name), uid=1000)

    def hand_over(to: socket.socket) -> None:
        with mounted(daemon.socket, hostile[type]) as reply:
            socket.send_fds(to, [b"m"], [reply.mount.fileno()])

    assert as_user(on_the_host) == {"Uid": "4000\t4000\t4000\t4000"} | powerless
    mapped = {"Uid": "1000\t1000\t1000\t1000"} | powerless
    assert in_container(in_the_container) == mapped
    assert in_container(in_the_container, uids=FULL, owner=0) == mapped
    assert forked(attached_on_the_host) == mapped

    def control() -> dict[str, str]:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with mounted(daemon.socket, hostile[type]) as reply:
            attach(reply.mount.fileno(), str(target))
            return run(str(target / name), uid=1000)

    # The programs do have these rights where nothing is locked: the image is as hostile as it should be.
    assert forked(control)["CapEff" if name == "capable" else "Uid"] not in mapped.values()


def test_c46_nothing_else_can_be_changed_either(
    daemon: Daemon, hostile: dict[str, Path], target: Path, containers: None
) -> None:
    def work() -> dict[str, str]:
        with (
            mounted(daemon.socket, hostile["ext4"]) as reply,
            OwnedFd(os.open("/proc/self/ns/user", os.O_RDONLY)) as own,
        ):
            fd = reply.mount.fileno()
            idmap = MountAttr.IDMAP
            found = attempts(fd, own.fileno())
            with mounted(daemon.socket, hostile["ext4"], userns="none") as plain:
                found["idmap a plain one"] = errno_of(
                    lambda: mount_api.mount_setattr(plain.mount.fileno(), set=idmap, userns_fd=own.fileno())
                )
            attach(fd, str(target))
            return found | {f"attached: {what}": how for what, how in attempts(fd, own.fileno()).items()}

    def attempts(fd: int, userns: int) -> dict[str, str]:
        idmap = MountAttr.IDMAP

        def reconfigure() -> None:
            with FsContext.pick("", dir_fd=fd, flags=FsPick.EMPTY_PATH) as context:
                context.set_flag("rw")
                context.reconfigure()

        def beneath() -> None:
            with mount_api.open_tree(fd, "", CLONE) as copy:
                flags = MoveMount.F_EMPTY_PATH | MoveMount.BENEATH
                mount_api.move_mount(copy.fileno(), "/proc", flags=flags)

        def umount_beneath() -> None:
            mount_api.umount("/proc")

        return {
            "change idmap": errno_of(lambda: mount_api.mount_setattr(fd, set=idmap, userns_fd=userns)),
            "clear idmap": errno_of(lambda: mount_api.mount_setattr(fd, clear=idmap)),
            "copy with another idmap": errno_of(
                lambda: mount_api.open_tree_attr(fd, "", CLONE, set=idmap, userns_fd=userns)
            ),
            "copy with another idmap for its own": errno_of(
                lambda: mount_api.open_tree_attr(fd, "", CLONE, set=idmap, clear=idmap, userns_fd=userns)
            ),
            "copy without idmap": errno_of(lambda: mount_api.open_tree_attr(fd, "", CLONE, clear=idmap)),
            "copy into a new mount namespace": errno_of(
                lambda: OwnedFd(call("open_tree", fd, b"", NAMESPACE))
            ),
            "reconfigure": errno_of(reconfigure),
            "beneath a mount of the host": errno_of(beneath),
            "uncover a mount of the host": errno_of(umount_beneath),
            "remount the superblock": errno_of(
                lambda: call("mount", None, f"/proc/self/fd/{fd}".encode(), None, 32, None)
            ),
        }

    found = in_container(work)
    assert len(found) == 21
    assert {*found.values()} <= {"EPERM", "EINVAL"}, found


@pytest.mark.parametrize("image", ["erofs", "ext4", "tmpfs:1M"])
def test_c46_the_mount_is_private(
    daemon: Daemon, hostile: dict[str, Path], target: Path, containers: None, image: str
) -> None:
    """It is a copy of one in the staging directory, which is shared; it must not stay tied to it."""

    def daemon_mounts() -> set[str]:
        return set(Path(f"/proc/{daemon.fork_server}/mountinfo").read_text().splitlines())

    def work() -> list[str]:
        with mounted(daemon.socket, hostile.get(image, image)) as reply:
            fd = reply.mount.fileno()
            attach(fd, str(target))
            wanted = StatmountMask.MNT_BASIC | StatmountMask.PROPAGATE_FROM
            first = mount_info.statmount(mount_info.mount_id(fd), wanted).propagation
            before = daemon_mounts()
            # Whoever makes it shared shares with itself.
            mount_api.mount_setattr(fd, propagation=Propagation.SHARED)
            with mount_api.open_tree(fd, "", CLONE) as copy:
                attach(copy.fileno(), str(target))
            # Those that are kept for others may go meanwhile.
            return [str(first), str(daemon_mounts() <= before)]

    assert in_container(work) == [str(int(Propagation.PRIVATE)), "True"]


def test_c46_a_host_user_cannot_attach(daemon: Daemon, hostile: dict[str, Path], target: Path) -> None:
    def work() -> list[str]:
        with mounted(daemon.socket, hostile["erofs"]) as reply:
            fd = reply.mount.fileno()
            return [
                errno_of(lambda: attach(fd, str(target))),
                errno_of(lambda: mount_api.mount_setattr(fd, propagation=Propagation.SHARED)),
                errno_of(lambda: mount_api.open_tree(fd, "", CLONE)),
                errno_of(lambda: FsContext.pick("", dir_fd=fd, flags=FsPick.EMPTY_PATH)),
            ]

    assert as_user(work) == ["EPERM"] * 4
