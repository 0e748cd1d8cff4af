"""The same again: clones of a mount that is kept, and what is never the same."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mountd.execute.shared import KEPT
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, MountAttr, Propagation
from tests.container import USER, as_user, forked, in_container
from tests.daemon import Daemon
from tests.e2e.calls import errno_of, mount, mounted, text_of
from tests.e2e.conftest import TYPES, trusting
from tests.e2e.loops import loops_over, wait_until_dropped
from tests.images import build_image, build_tree
from tests.rogue import eventually

OTHER = 4001
MANY = KEPT + 40  # images
LONG, SHORT = ("--shared-seconds", "60"), ("--shared-seconds", "0.3")


def superblock(daemon: Daemon, image: Path, uid: int = USER, **wishes: object) -> tuple[int, OwnedFd]:
    """The device number of a mount's superblock as `uid` gets it, and the mount, to keep it alive."""
    reply = ask_as(daemon, image, uid, **wishes)
    return os.fstat(reply.fileno()).st_dev, reply


def names(mount: OwnedFd) -> list[str]:
    """What is in the root directory of a mount that need not be attached."""
    return sorted(os.listdir(f"/proc/self/fd/{mount.fileno()}"))


def ask_as(daemon: Daemon, image: Path, uid: int, **wishes: object) -> OwnedFd:
    os.seteuid(uid)
    try:
        return mount(daemon.socket, image, **wishes).mount
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("type", TYPES)
def test_the_same_again_has_the_superblock_of_the_first(
    start: Callable[..., Daemon], images: dict[str, Path], type: str
) -> None:
    """For one owner, from whatever connection and worker; with one loop device for all."""
    daemon = start(trusting(images[type].parent), *LONG)
    found = [superblock(daemon, images[type]) for _ in range(20)]
    try:
        assert len({dev for dev, _ in found}) == 1
        assert len(loops_over(images[type])) == (0 if type == "erofs" else 1)
        for _, each in found:
            with open(os.open("hello", os.O_RDONLY, dir_fd=each.fileno()), encoding="utf-8") as file:
                assert file.read() == "hello from the image\n"
    finally:
        for _, each in found:
            each.close()
    daemon.stop()
    wait_until_dropped(images[type])


def test_clones_are_locked_and_mapped_each_for_its_caller(
    start: Callable[..., Daemon], images: dict[str, Path], containers: None
) -> None:
    daemon = start(trusting(images["erofs"].parent), *LONG)

    def work() -> tuple[int, str, list[str]]:
        with mounted(daemon.socket, images["erofs"], userns="/proc/self/ns/user") as reply:
            fd = reply.mount.fileno()
            mount_api.move_mount(fd, "/mnt")
            attributes = (MountAttr.NOSUID, MountAttr.NODEV, MountAttr.RDONLY)
            cleared = [errno_of(lambda a=a: mount_api.mount_setattr(fd, clear=a)) for a in attributes]  # type: ignore[misc]
            return os.stat("/mnt/hello").st_uid, text_of(reply), cleared

    for base in (100000, 300000):
        found = in_container(work, uids=((0, base, 65536),))
        assert found == (0, "hello from the image\n", ["EPERM"] * 3)


def test_what_is_not_the_same(start: Callable[..., Daemon], images: dict[str, Path], place: Path) -> None:
    """Other options, another owner, another reason, another state of the image: another superblock."""
    directory = place / "not-the-same"
    directory.mkdir(mode=0o755)
    image = directory / "image.raw"
    image.write_bytes(images["ext4"].read_bytes())
    policy = trusting(directory)
    daemon = start(policy, *LONG)
    held: list[OwnedFd] = []

    def dev(uid: int = USER, **wishes: object) -> int:
        number, mount_fd = superblock(daemon, image, uid, **wishes)
        held.append(mount_fd)
        return number

    try:
        first = dev()
        assert dev() == first
        found = [first, dev(OTHER), dev(options=["noexec"]), dev(0)]
        os.utime(image)
        found.append(dev())
        daemon.set_policy(policy.replace("trusted in the test", "trusted for another reason"))
        daemon.signal(signal.SIGHUP)
        deadline = time.monotonic() + 10
        while (again := dev()) in found and time.monotonic() < deadline:
            time.sleep(0.05)
        found.append(again)
        assert len(set(found)) == len(found), found
        # Root's own is not locked, and nobody else's.
        assert dev(0) not in found
    finally:
        for each in held:
            each.close()
    daemon.stop()
    wait_until_dropped(image)


def test_what_can_be_written_to_is_never_shared(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    daemon = start('[[rule]]\nname = "t"\nimage = { kind = "tmpfs" }\ncaller = { any = true }\n'
                   'grant = { max-size = "1M" }\nverdict = "allow"\n', *LONG)  # fmt: skip

    def work() -> tuple[bool, list[str]]:
        with (
            mounted(daemon.socket, "tmpfs:1M", read_only=False) as one,
            mounted(daemon.socket, "tmpfs:1M", read_only=False) as two,
        ):
            same = os.fstat(one.mount.fileno()).st_dev == os.fstat(two.mount.fileno()).st_dev
            return same, names(two.mount)

    assert as_user(work) == (False, [])


def test_nothing_is_kept_where_none_is_to_be(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    daemon = start(trusting(images["squashfs"].parent), "--shared-seconds", "0")
    mounts = daemon.held()["mounts"]
    with ask_as(daemon, images["squashfs"], USER) as one, ask_as(daemon, images["squashfs"], USER) as two:
        assert os.fstat(one.fileno()).st_dev != os.fstat(two.fileno()).st_dev
        assert len(loops_over(images["squashfs"])) == 2
        assert eventually(lambda: daemon.held()["mounts"] == mounts, 10)
    wait_until_dropped(images["squashfs"])


def test_it_is_kept_for_as_long_as_it_is_used(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    """And no longer, whoever used it first and whoever did last."""
    daemon = start(trusting(images["squashfs"].parent), *SHORT)
    mounts = daemon.held()["mounts"]
    device, first = superblock(daemon, images["squashfs"])
    time.sleep(2)
    again, second = superblock(daemon, images["squashfs"])
    assert again == device
    first.close()
    time.sleep(2)
    with ask_as(daemon, images["squashfs"], USER) as third:
        assert os.fstat(third.fileno()).st_dev == device
        assert names(third) == names(second)
        second.close()
        assert len(loops_over(images["squashfs"])) == 1
    assert eventually(lambda: daemon.held()["mounts"] == mounts, 10)
    wait_until_dropped(images["squashfs"])


def test_layers_are_kept_for_as_long_as_a_stack_uses_them(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    daemon = start(trusting(images["squashfs"].parent), *SHORT)
    mounts = daemon.held()["mounts"]
    both = [images["squashfs"], images["erofs"]]

    def stack() -> OwnedFd:
        return ask_as(daemon, both[0], USER, layers=[str(each) for each in both[1:]])

    with stack() as one:
        time.sleep(2)
        with stack() as two:
            assert names(one) == names(two)
            assert len(loops_over(images["squashfs"])) == 1
    assert eventually(lambda: daemon.held()["mounts"] == mounts, 10)
    wait_until_dropped(images["squashfs"])


def test_who_asks_at_the_same_moment_gets_the_same(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    """However many do, each by a connection of his own."""
    daemon = start(trusting(images["squashfs"].parent), *LONG)
    with ThreadPoolExecutor(20) as pool:
        os.seteuid(USER)
        try:
            replies = list(pool.map(lambda _: mount(daemon.socket, images["squashfs"]), range(20)))
        finally:
            os.seteuid(0)
    try:
        assert len({os.fstat(reply.mount.fileno()).st_dev for reply in replies}) == 1
        assert len(loops_over(images["squashfs"])) == 1
    finally:
        for reply in replies:
            reply.close()
    daemon.stop()
    wait_until_dropped(images["squashfs"])


def test_roots_own_are_gone_with_it_and_those_for_containers_are_shared(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    """A runtime is root and mounts for containers; what an administrator unmounts is free at once."""
    daemon = start(trusting(images["squashfs"].parent), *LONG)
    mounts = daemon.held()["mounts"]
    own = [superblock(daemon, images["squashfs"], 0) for _ in range(2)]
    assert own[0][0] != own[1][0]
    for _, each in own:
        each.close()
    wait_until_dropped(images["squashfs"])
    assert daemon.held()["mounts"] == mounts
    found = []
    for base in (100000, 300000):
        rows = [(0, base, 65536)]
        with namespaces.make_user_namespace(rows, rows) as userns:
            path = f"/proc/self/fd/{userns.fileno()}"
            found.append(superblock(daemon, images["squashfs"], 0, userns=path))
    assert found[0][0] == found[1][0]
    assert [os.fstat(each.fileno()).st_uid for _, each in found] == [100000, 300000]
    assert not seen_in_the_other(found[0][1], found[1][1])
    for _, each in found:
        each.close()
    daemon.stop()
    wait_until_dropped(images["squashfs"])


def seen_in_the_other(one: OwnedFd, other: OwnedFd) -> bool:
    """Whether what is mounted in one mount shows in another one as well."""

    def work() -> bool:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        for mount_fd, place in ((one, "/mnt"), (other, "/media")):
            mount_api.move_mount(mount_fd.fileno(), place)
        subprocess.run(["mount", "-t", "tmpfs", "none", "/mnt/bin"], check=True)
        seen = os.path.ismount("/media/bin")
        subprocess.run(["umount", "/mnt/bin"], check=True)
        for place in ("/mnt", "/media"):
            mount_api.umount(place)
        return seen

    return forked(work)


def replace_workers(daemon: Daemon, how: str) -> None:
    """Have all workers end, and wait until there are others."""
    before = set(daemon.workers)
    if how == "replaced":
        daemon.signal(signal.SIGHUP)
    for pid in before if how == "killed" else ():
        os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: len(daemon.workers) > 1 and not before & set(daemon.workers), 10)


@pytest.mark.parametrize("how", ["killed", "replaced"])
def test_a_worker_that_ends_leaves_what_it_keeps_to_the_others(
    start: Callable[..., Daemon], images: dict[str, Path], how: str
) -> None:
    """They find it, and take it away when it is not used any more."""
    daemon = start(trusting(images["squashfs"].parent), *SHORT)
    mounts = daemon.held()["mounts"]
    with ask_as(daemon, images["squashfs"], USER) as one:
        for _ in range(2):
            replace_workers(daemon, how)
            time.sleep(1)
            with ask_as(daemon, images["squashfs"], USER) as two:
                assert os.fstat(one.fileno()).st_dev == os.fstat(two.fileno()).st_dev
                assert names(one) == names(two)
    assert eventually(lambda: daemon.held()["mounts"] == mounts, 10)
    wait_until_dropped(images["squashfs"])


def test_what_a_killed_worker_kept_is_not_taken_for_what_the_next_one_keeps(
    start: Callable[..., Daemon], place: Path
) -> None:
    """One user gets his own image again, and never that of another, which lies where his was."""
    directory = place / "of-two-users"
    directory.mkdir(mode=0o755)
    images = {}
    for label in ("PUBLIC", "SECRET"):
        tree = build_tree(place / f"tree-{label}")
        (tree / label).touch()
        images[label] = build_image("squashfs", tree, directory / f"{label}.raw")
    daemon = start(trusting(directory), *LONG)
    public, secret = images["PUBLIC"], [images["SECRET"]]
    secret += [Path(shutil.copy(secret[0], directory / f"{number}.raw")) for number in range(8)]
    found = []
    for _ in range(4):
        ask_as(daemon, public, USER).close()
        replace_workers(daemon, "killed")
        # Whichever worker is the next, it keeps one of these as well.
        for image in secret:
            ask_as(daemon, image, OTHER).close()
        with ask_as(daemon, public, USER) as one:
            found.append({"PUBLIC", "SECRET"}.intersection(names(one)))
        replace_workers(daemon, "killed")
    assert found == [{"PUBLIC"}] * len(found)


def test_more_than_there_is_room_for(start: Callable[..., Daemon], place: Path) -> None:
    """Only the latest are kept, and all are mounted all the same."""
    directory = place / "many"
    directory.mkdir(mode=0o755)
    tree = build_tree(place / "tree-many")
    first = build_image("erofs", tree, directory / "0.raw").read_bytes()
    for number in range(1, MANY):
        (directory / f"{number}.raw").write_bytes(first)
    daemon = start(trusting(directory), *LONG)
    before = daemon.held()["mounts"]
    assert isinstance(before, int)
    for _ in range(2):
        for number in range(MANY):
            with ask_as(daemon, directory / f"{number}.raw", USER) as one:
                assert "hello" in names(one)
    kept = daemon.held()["mounts"]
    assert isinstance(kept, int)
    # Some may come while it is looked at the others.
    assert KEPT / 2 < kept - before <= KEPT + 20


def test_a_hundred_containers_have_the_page_cache_once(
    start: Callable[..., Daemon], place: Path, containers: None
) -> None:
    """What one of them has read, the others find in memory."""
    tree = build_tree(place / "tree-large")
    (tree / "large").write_bytes(os.urandom(8 << 20))
    directory = place / "large"
    directory.mkdir(mode=0o755)
    image = build_image("erofs", tree, directory / "large.raw")
    daemon = start(trusting(directory), *LONG)

    def work() -> tuple[int, int]:
        with (
            mounted(daemon.socket, image, userns="/proc/self/ns/user") as reply,
            open(os.open("large", os.O_RDONLY, dir_fd=reply.mount.fileno()), "rb") as file,
        ):
            before = resident(file.fileno())
            file.read()
            return before, resident(file.fileno())

    found = [in_container(work, uids=((0, 100000 + 65536 * each, 65536),)) for each in range(100)]
    pages = (8 << 20) // mmap.PAGESIZE
    assert found[0][0] < pages / 2
    # Some may have been reclaimed meanwhile.
    assert sum(before for before, _ in found[1:]) > 0.9 * pages * 99


def resident(fd: int) -> int:
    """How many pages of a file are in memory (mincore(2))."""
    size = os.fstat(fd).st_size
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        found = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found) == 0
    return sum(each & 1 for each in found)
