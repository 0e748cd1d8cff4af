"""Stacks that can be written to: what stays, whose it is on the disk, and what a hostile top comes to."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.caller.model import FOREIGN
from mountd.client import Client, MountReply, Request
from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from mountd.request import open_directory
from mountd.store.store import Store
from tests.container import RANGE, USER, as_user, in_container
from tests.daemon import Daemon
from tests.e2e.calls import Outcome, errno_of, explain, mount_fds, outcome
from tests.e2e.conftest import trusting
from tests.e2e.test_directories import rule
from tests.e2e.test_stacks import (
    directory,
    names,
    read,
    user,
)
from tests.fuse import Fuse
from tests.images import build_image
from tests.layered import HIDDEN, pulled
from tests.layered import rule as of_registry
from tests.rights import drop_others, in_effect
from tests.rogue import eventually, settled

READER, ONE_TIME = 21_600, 21_601  # the uids of users with rules of their own
INNER_ROOT = RANGE[0][1]  # the root of a container, on the host
BASE = FOREIGN.start
MIB = 1 << 20
IN_MEMORY = {"sizeBytes": MIB}
WRITABLE = ', access = "read-write"'
SETUID = 0o4755
FILE_CAPABILITY = bytes.fromhex("01000002" + "00200000" + "00" * 12)  # cap_net_raw+ep, of version 2

MEMORY_RULE = """
[[rule]]
name = "memory"
image = { kind = "tmpfs" }
caller = { any = true }
grant = { max-size = "4M", idmap = ["none", "namespace", "caller", "ranges"] }
verdict = "allow"
"""


LIMITED = f"""
[[rule]]
name = "no memory"
image = {{ kind = "tmpfs" }}
caller = {{ users = [{READER}] }}
verdict = "deny"
""" + rule("readers", '"caller"').replace("any = true", f"users = [{READER}]")
LIMITED += (
    MEMORY_RULE.replace("any = true", f"users = [{ONE_TIME}]")
    .replace('max-size = "4M"', 'max-size = "4M", max-mounts = 1')
    .replace('"memory"', '"one at a time"')
)


@pytest.fixture(scope="module")
def images(place: Path) -> Iterator[list[Path]]:
    """Two images, the topmost first, where a rule trusts them."""
    trusted = place / "topped"
    trusted.mkdir(mode=0o755)
    work = Path(tempfile.mkdtemp(prefix="tops-", dir=place))
    above = directory(work / "above", {"both": "above", "gone": "above", "dir/a": "above"})
    below = directory(
        work / "below", {"both": "below", "etc/passwd": "below", "dir/b": "below", "suid": "", "of-33": "33"}
    )
    (below / "suid").chmod(SETUID)
    os.setxattr(below / "etc/passwd", "security.capability", FILE_CAPABILITY)
    os.chown(below / "of-33", 33, 33)
    (below / "everybodys").write_text("root's")
    (below / "everybodys").chmod(0o666)
    (below / "all").mkdir()
    (below / "all").chmod(0o777)
    os.mknod(below / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    made = [
        build_image(type, tree, trusted / tree.name) for type, tree in (("erofs", above), ("ext4", below))
    ]
    yield made
    shutil.rmtree(work)
    shutil.rmtree(trusted)


@pytest.fixture(scope="module")
def one_daemon(place: Path, images: list[Path]) -> Iterator[tuple[Daemon, dict[str, object]]]:
    policy = (
        LIMITED
        + trusting(place / "topped")
        + MEMORY_RULE
        + rule("shown", '"root"', image=f', location = "{place}/shown/*"')
        + rule("own", '"caller", "foreign"', WRITABLE)
        + of_registry()
    )
    daemon = Daemon(place / "tops", policy)
    yield daemon, settled(daemon)
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log, daemon.log


@pytest.fixture
def serving(one_daemon: tuple[Daemon, dict[str, object]]) -> Iterator[Daemon]:
    """The daemon; nothing is left of what it made, whatever came of it."""
    daemon, before = one_daemon
    yield daemon
    assert eventually(lambda: daemon.held() == before, 10), (before, daemon.held())


@pytest.fixture
def home(place: Path) -> Iterator[Path]:
    """A directory that belongs to the root of a container, alone to read."""
    path = Path(tempfile.mkdtemp(prefix="top-", dir=place))
    os.chown(path, INNER_ROOT, INNER_ROOT)
    yield path
    shutil.rmtree(path)


def source_of(paths: list[Path], top: Path | int | None) -> tuple[dict[str, object], list[int]]:
    """The source, and the descriptors, which are the caller's; `top` is a directory, or so many bytes."""
    fds = [os.open(path, os.O_RDONLY) for path in paths]
    kinds = ["directoryFileDescriptor" if path.is_dir() else "imageFileDescriptor" for path in paths]
    layers = [{kind: number} for number, kind in enumerate(kinds)]
    source: dict[str, object] = {**layers[0]} if len(layers) == 1 else {"layers": layers}
    if isinstance(top, Path):
        source["top"] = {"directoryFileDescriptor": len(fds)}
        opened = open_directory(str(top))
        fds.append(os.dup(opened.fileno()))
        opened.close()
    elif top is not None:
        source["top"] = {"sizeBytes": top}
    return source, fds


def ask(
    daemon: Daemon,
    paths: list[Path],
    top: Path | int | None,
    *,
    own: bool = True,
    method: Callable[..., object] = mount_fds,
    **fields: object,
) -> object:
    """Ask for a stack, for the user namespace that this process is in, if `own`."""
    source, fds = source_of(paths, top)
    if own:
        fields["userNamespaceFileDescriptor"] = len(fds)
        fds.append(os.open("/proc/self/ns/user", os.O_RDONLY))
    try:
        return method(daemon.socket, source, fds, **{"readOnly": False, **fields})
    finally:
        for fd in fds:
            os.close(fd)


def mounted(daemon: Daemon, paths: list[Path], top: Path | int, **fields: object) -> MountReply:
    reply = ask(daemon, paths, top, **fields)  # type: ignore[arg-type]
    assert isinstance(reply, MountReply)
    return reply


def refusal(daemon: Daemon, paths: list[Path], top: Path | int | None, **fields: object) -> Outcome:
    return outcome(lambda: ask(daemon, paths, top, **fields))  # type: ignore[arg-type]


@contextlib.contextmanager
def at_mnt(reply: MountReply) -> Iterator[Path]:
    """Have the mount at /mnt, in a mount namespace of the test's own."""
    mount_api.move_mount(reply.mount.fileno(), "/mnt")
    try:
        yield Path("/mnt")
    finally:
        mount_api.umount("/mnt")
        reply.close()


def change(top: Path) -> dict[str, object]:
    """Change whatever can be, as root, and tell how that was."""
    with (top / "etc/passwd").open("a") as file:
        file.write(" changed")
    (top / "new").write_text("new")
    (top / "gone").unlink()
    shutil.rmtree(top / "dir")
    (top / "dir").mkdir()
    (top / "dir/mine").write_text("mine")
    return {
        "passwd": (top / "etc/passwd").read_text(),
        "dir": sorted(os.listdir(top / "dir")),
        "mode": stat.S_IMODE((top / "suid").stat().st_mode),
        "renamed": errno_of(lambda: (top / "etc").rename(top / "moved")),
        "device": errno_of(lambda: os.utime(top / "device")),
        "made device": errno_of(lambda: os.mknod(top / "null", stat.S_IFCHR, os.makedev(1, 3))),
        "capability": errno_of(lambda: os.setxattr(top / "new", "security.capability", FILE_CAPABILITY)),
        "trusted": errno_of(lambda: os.setxattr(top / "new", "trusted.overlay.redirect", b"/etc")),
        "both": (top / "both").read_text(),
    }


CHANGED = {
    "passwd": "below changed",
    "dir": ["mine"],
    "mode": SETUID,
    "renamed": "EXDEV",
    "device": "EPERM",
    "made device": "EPERM",
    "capability": "",
    "trusted": "EPERM",
    "both": "above",
}


def on_disk(upper: Path) -> dict[str, tuple[int, int, int]]:
    """Type, uid and gid of all that lies below."""
    found = {}
    for path in sorted(upper.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(upper))] = (
            stat.S_IFMT(status.st_mode),
            status.st_uid,
            status.st_gid,
        )
    return found


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


def test_nothing_of_roots_is_copied_to_where_a_user_has_it(
    serving: Daemon, images: list[Path], home: Path
) -> None:
    """On the host, without a mapping: neither a file that anybody may write to, nor by another name."""
    os.chown(home, USER, USER)
    with user():
        reply = mounted(serving, images, home, own=False)
    with reply:
        fd = reply.mount.fileno()

        def work() -> tuple[str, ...]:
            def made() -> None:
                os.close(os.open("all/mine", os.O_CREAT | os.O_WRONLY, dir_fd=fd))

            return (
                errno_of(lambda: os.close(os.open("everybodys", os.O_WRONLY, dir_fd=fd))),
                errno_of(lambda: os.link("suid", "all/suid", src_dir_fd=fd, dst_dir_fd=fd)),
                errno_of(made),
            )

        errors = as_user(work)
        assert errors[0] == "EOVERFLOW"
        assert errors[1] in ("EOVERFLOW", "EPERM")
        # Its directory would have to be copied first.
        assert errors[2] == "EOVERFLOW"
        assert on_disk(home / "upper") == {}
        assert (home / "upper").stat().st_uid == USER
    # In memory it comes to no harm: nobody has that but through the mount.
    with user():
        reply = mounted(serving, images, MIB, own=False)
    with reply:
        assert as_user(lambda: errno_of(lambda: open_to_write("everybodys", reply))) == ""
        assert os.fstatvfs(reply.mount.fileno()).f_flag & os.ST_NOSUID


def open_to_write(name: str, reply: MountReply) -> None:
    os.close(os.open(name, os.O_WRONLY, dir_fd=reply.mount.fileno()))


def test_hostile_attributes_in_the_top_say_nothing(
    serving: Daemon, images: list[Path], home: Path, containers: None
) -> None:
    """What a user can write there hides nothing, and nothing leads anywhere."""
    upper = home / "upper"
    (upper / "dir").mkdir(parents=True)
    (upper / "redirected").mkdir()
    (upper / "copied").write_text("")
    (upper / "link").symlink_to("/etc/passwd")
    (upper / "setuid").write_text("")
    (upper / "roots").write_text("root's")
    for each in (upper, *upper.rglob("*")):
        os.chown(each, INNER_ROOT, INNER_ROOT, follow_symlinks=False)
    (upper / "setuid").chmod(SETUID)
    os.chown(upper / "roots", 0, 0)
    (upper / "roots").chmod(0o600)
    attributes = {"dir": "opaque", "redirected": "redirect", "copied": "metacopy"}
    for name, attribute in attributes.items():
        for prefix in ("user", "trusted"):
            if prefix == "trusted" and attribute == "opaque":
                continue  # which says what it may say
            value = {"opaque": b"y", "redirect": b"/etc", "metacopy": b""}[attribute]
            os.setxattr(upper / name, f"{prefix}.overlay.{attribute}", value)

    def work() -> tuple[object, ...]:
        with at_mnt(mounted(serving, images, home)) as top:
            return (
                set(os.listdir(top / "dir")),
                errno_of(lambda: os.listdir(top / "redirected")),
                errno_of(lambda: (top / "copied").read_bytes()),
                os.readlink(top / "link"),
                bool(os.statvfs(top / "setuid").f_flag & os.ST_NOSUID),
                errno_of(lambda: (top / "roots").read_bytes()),
                errno_of(lambda: (top / "roots").chmod(0o666)) in ("EPERM", "EOVERFLOW"),
                (top / "roots").stat().st_uid,
            )

    found = in_container(work)
    assert found[0] == {"a", "b"}
    assert found[1] in ("EPERM", "EIO")
    assert found[2] in ("EPERM", "EIO")
    assert found[3:] == ("/etc/passwd", True, "EACCES", True, 65534)


def test_what_is_in_the_way_of_its_directories(
    serving: Daemon, images: list[Path], home: Path, place: Path, containers: None
) -> None:
    """Only directories of the owner's that lie in this very one are taken; nothing is made elsewhere."""
    victim = place / "victim"
    victim.mkdir(mode=0o777)
    victim.chmod(0o777)

    def refused(name: str, make: Callable[[Path], None]) -> Outcome:
        make(home / name)
        try:
            return in_container(lambda: refusal(serving, images, home))
        finally:
            assert os.listdir(victim) == []
            for each in ("upper", "work"):
                path = home / each
                assert path.is_symlink() or path.exists() is (each == name), (name, each)
            if (home / name).is_dir() and not (home / name).is_symlink():
                (home / name).rmdir()
            else:
                (home / name).unlink()

    ways: list[Callable[[Path], object]] = [
        lambda path: path.symlink_to(victim),
        lambda path: path.write_text(""),
        lambda path: path.mkdir(),  # root's
        lambda path: os.mkfifo(path),
    ]
    for name in ("upper", "work"):
        for way in ways:
            found = refused(name, lambda path, way=way: way(path) and None)  # type: ignore[misc]
            assert found[0] == "BadFileDescriptor", (name, found)
            assert "source.top.directoryFileDescriptor" in found[1]
    victim.rmdir()


def test_the_directories_are_swapped_while_it_is_made(
    serving: Daemon, images: list[Path], home: Path, place: Path, containers: None
) -> None:
    """However that ends, nothing is made or changed where a link leads."""
    victim = place / "victim"
    (victim / "work").mkdir(parents=True)
    before = victim.stat().st_mtime_ns
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for name in ("upper", "work"):
                path = home / name
                with contextlib.suppress(OSError):
                    path.rename(home / f"{name}.away")
                with contextlib.suppress(OSError):
                    path.symlink_to(victim)
                with contextlib.suppress(OSError):
                    path.unlink()
                with contextlib.suppress(OSError):
                    (home / f"{name}.away").rename(path)

    def work() -> set[str]:
        thread = threading.Thread(target=swap)
        thread.start()
        try:
            return {refusal(serving, images, home)[0] for _ in range(12)}
        finally:
            stop.set()
            thread.join()

    ends = in_container(work)
    known = {"", "BadFileDescriptor", "NotSupported", "InUse", "MountFailed", "NotFound"}
    assert ends <= known, ends
    assert (victim.stat().st_mtime_ns, os.listdir(victim), os.listdir(victim / "work")) == (
        before,
        ["work"],
        [],
    )
    shutil.rmtree(victim)


def test_whose_directories_are_refused(
    serving: Daemon, images: list[Path], home: Path, place: Path, containers: None
) -> None:
    shown = place / "shown/one"
    shown.mkdir(parents=True)

    def refused(path: Path, **fields: object) -> Outcome:
        found = in_container(lambda: refusal(serving, images, path, **fields))
        assert os.listdir(path) == []
        return found

    name, text = refused(shown)
    assert (name, "never writable" in text, "source.top" in text) == ("OptionNotPermitted", True, True)
    os.chown(home, USER + 1, USER + 1)
    name, text = refused(home)
    assert (name, "source.top" in text) == ("DeniedByPolicy", True)
    os.chown(home, INNER_ROOT, INNER_ROOT)
    # A mapping of other ids on disk than the owner's.
    ranges = [{"first": 0, "target": 0, "count": 1}]
    wish = {"kind": "ranges", "uidRanges": ranges, "gidRanges": ranges}
    assert refused(home, idMap=wish)[0] == "DeniedByPolicy"
    shutil.rmtree(shown.parent)


def test_what_the_policy_does_not_grant(serving: Daemon, images: list[Path], home: Path) -> None:
    """The top needs a rule of its own kind, which grants to write; the layers need no more than to read."""
    os.chown(home, READER, READER)
    for top, error in ((MIB, "DeniedByPolicy"), (home, "OptionNotPermitted")):
        name, text = as_user(lambda top=top: refusal(serving, images, top, own=False), READER)  # type: ignore[misc]
        assert (name, "source.top" in text) == (error, True), text
    assert os.listdir(home) == []


def test_sizes_and_what_else_has_no_top(
    serving: Daemon, images: list[Path], place: Path, containers: None
) -> None:
    name, text = in_container(lambda: refusal(serving, images, 5 * MIB))
    assert name == "LimitExceeded", text
    for fields in ({"readOnly": True}, {"fileSystemType": "erofs"}, {"options": ["ro"]}):
        name, _ = in_container(lambda fields=fields: refusal(serving, images, MIB, **fields))  # type: ignore[misc]
        assert name == "InvalidParameter"
    assert in_container(lambda: refusal(serving, images, None))[0] == "NotSupported"
    # One without an id for its owner.
    name, _ = in_container(
        lambda: refusal(serving, images, MIB), uids=((0, INNER_ROOT, 1), (5, INNER_ROOT + 5, 9))
    )
    assert name == ""


def test_where_the_kernel_cannot_write(
    serving: Daemon, images: list[Path], home: Path, place: Path, containers: None
) -> None:
    def on_overlay() -> Outcome:
        with FsContext.open("overlay") as context:
            for name in ("lowerdir", "upperdir", "workdir"):
                (home / name).mkdir()
                context.set_string(name, str(home / name))
            context.create()
            with context.mount(MountAttr(0)) as mount:
                mount_api.move_mount(mount.fileno(), "/mnt")
        return refusal(serving, images, Path("/mnt"), idMap={"kind": "none"})

    def of_a_namespace() -> Outcome:
        with FsContext.open("tmpfs") as context:
            context.create()
            with context.mount(MountAttr(0)) as mount:
                mount_api.move_mount(mount.fileno(), "/mnt")
        found = refusal(serving, images, Path("/mnt"))
        return found if not os.listdir("/mnt") else ("left behind", "")

    name, text = in_container(on_overlay)
    assert (name, "overlay" in text) == ("NotSupported", True), (name, text)
    name, text = in_container(of_a_namespace)
    assert (name, "source.top" in text) == ("NotSupported", True), (name, text)
    with Fuse(place / "fuse-top", b"") as fuse:
        name, text = in_container(lambda: refusal(serving, images, fuse.target))
        assert (name, "FUSE" in text) == ("BadFileDescriptor", True), (name, text)
    (place / "fuse-top").rmdir()


def test_a_top_within_a_layer_and_a_layer_within_it(
    serving: Daemon, images: list[Path], home: Path, containers: None
) -> None:
    (home / "upper").mkdir()
    for path in (home / "upper", home / "upper/inner"):
        path.mkdir(exist_ok=True)
        os.chown(path, INNER_ROOT, INNER_ROOT)
    for layer in (home / "upper", home / "upper/inner"):
        name, text = in_container(lambda layer=layer: refusal(serving, [layer, *images], home))  # type: ignore[misc]
        assert (name, "within" in text) == ("InvalidParameter", True), text
    assert set(os.listdir(home)) == {"upper"}

    def work() -> tuple[str, set[str]]:
        with mounted(serving, [home, *images], home) as reply:
            fd = reply.mount.fileno()
            return errno_of(lambda: os.listdir(f"/proc/self/fd/{fd}/upper")), names(reply.mount)

    # The kernel shows no layer in itself.
    found = in_container(work)
    assert found[0] == "ELOOP"
    assert "both" in found[1]


def test_it_is_listed_explained_and_counted(serving: Daemon, images: list[Path]) -> None:
    def work() -> tuple[object, ...]:
        told = ask(serving, images[:1], MIB, own=False, method=explain)
        with mounted(serving, images[:1], MIB, own=False) as reply:
            with Client(str(serving.socket)) as client:
                listed = client.call("List", {}, [])[0]["mounts"]
            another = refusal(serving, images[:1], MIB, own=False)
        # Its place is free again.
        return told, listed, reply.mounts[0]["id"], another, refusal(serving, images[:1], MIB, own=False)

    told, listed, id, another, again = as_user(work, ONE_TIME)
    facts, steps = told["facts"], told["steps"]  # type: ignore[index]
    assert told["decision"]["verdict"] == "allow"  # type: ignore[index]
    assert (facts["layers"], facts["top: source"]) == ("1", "tmpfs")
    assert any(step["reason"].startswith("source.top: ") for step in steps)
    (found,) = listed  # type: ignore[misc]
    assert (found["id"], found["readOnly"], found["fileSystemType"]) == (id, False, "overlay")
    assert found["rule"] == "trusted in the test, one at a time"
    assert found["source"].endswith(", tmpfs")
    assert (another[0], again) == ("LimitExceeded", ("", ""))


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


def test_another_daemon_knows_what_is_used(
    start: Callable[..., Daemon], images: list[Path], home: Path
) -> None:
    """The one that has made the mount was killed; the mount is still written to."""
    daemon = start(trusting(images[0].parent) + rule("own", '"caller"', WRITABLE))
    for path in (home, home / "upper", home / "upper/mine"):
        path.mkdir(exist_ok=True)
        os.chown(path, USER, USER)

    def work() -> None:
        fd = os.open("mine/later", os.O_CREAT | os.O_WRONLY, dir_fd=reply.mount.fileno())
        os.close(fd)

    with user():
        reply = mounted(daemon, images, home, own=False)
    with reply:
        daemon.process.kill()
        daemon.process.wait()
        daemon.launch()
        as_user(work)
        with user():
            assert refusal(daemon, images, home, own=False)[0] == "InUse"
        # By another name, it is the same.
        other = home / "other"
        other.mkdir()
        os.chown(other, USER, USER)
        (home / "upper").rename(other / "upper")
        with user():
            assert refusal(daemon, images, other, own=False)[0] == "InUse"
        assert os.listdir(other) == ["upper"]
    assert os.listdir(other / "upper/mine") == ["later"]


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
