"""What can be mounted, and how: writing, loop devices, tmpfs, options, and file systems of others."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from mountd.client import MountReply, attach
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, LoopFlags, MountAttr, Propagation
from mountd.kernel.fs_context import FsContext
from tests.container import as_user, forked, in_container
from tests.daemon import Daemon
from tests.e2e.calls import errno_of, explain, mount_fds, mounted, outcome, refused, text_of
from tests.e2e.conftest import TYPES, trusting
from tests.e2e.loops import loops_over, wait_until_dropped
from tests.images import build_image

MIB = 1 << 20
PACKAGES = ("erofs-utils", "squashfs-tools", "bubblewrap")
TMPFS = """
[[rule]]
name = "writable tmpfs"
image = { kind = "tmpfs" }
caller = { any = true }
grant = { max-size = "8M", access = "read-write", idmap = ["none", "namespace", "caller"] }
verdict = "allow"
"""
OPTIONS = '["lazytime", "acl", "compress=zstd", "inode64"]'


@pytest.fixture(scope="module")
def workshop(place: Path, images: dict[str, Path]) -> dict[str, Path]:
    """Images that may be written to."""
    directory = place / "workshop"
    directory.mkdir(mode=0o755)
    made = {type: directory / f"{type}.raw" for type in TYPES}
    for type, image in made.items():
        subprocess.run(["cp", "--sparse=always", images[type], image], check=True)
    return made


@pytest.fixture(scope="module")
def writing(place: Path, workshop: dict[str, Path]) -> Iterator[Daemon]:
    """A daemon that lets write to these; what it holds afterwards is what it held before."""
    policy = trusting(place / "workshop", access='"read-write"', options=OPTIONS) + TMPFS
    daemon = Daemon(place / "writing", policy)
    before = daemon.settled()
    yield daemon
    deadline = time.monotonic() + 5
    while (after := daemon.held()) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert after == before
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


@pytest.fixture(scope="module")
def target(place: Path) -> Path:
    path = place / "sources"
    path.mkdir(mode=0o755)
    return path


def ask(
    daemon: Daemon, image: Path | int, access: int = os.O_RDONLY, *, own: bool = False, **fields: object
) -> MountReply:
    """Ask for a mount of an image, or of what is open as `image`; with `own` for this user namespace."""
    with (
        OwnedFd(os.open(image, access) if isinstance(image, Path) else os.dup(image)) as fd,
        OwnedFd(os.open("/proc/self/ns/user", os.O_RDONLY)) as userns,
    ):
        fds = [fd.fileno(), userns.fileno()] if own else [fd.fileno()]
        if own:
            fields["userNamespaceFileDescriptor"] = 1
        return mount_fds(daemon.socket, {"imageFileDescriptor": 0}, fds, **fields)


@pytest.mark.parametrize("type", ["ext4", "xfs", "btrfs"])
def test_what_a_container_writes_stays(
    writing: Daemon, workshop: dict[str, Path], target: Path, containers: None, type: str
) -> None:
    with OwnedFd(os.open(workshop[type], os.O_RDWR)) as image:

        def work() -> None:
            reply = ask(writing, image.fileno(), own=True, readOnly=False)
            assert reply.mounts[0]["readOnly"] is False
            with reply.mount:
                attach(reply.mount.fileno(), str(target))
                (target / "written").write_text(f"by the container, on {type}")
                os.chown(target / "written", 1000, 1001)
                (target / "hello").unlink()

        in_container(work)
    wait_until_dropped(workshop[type])
    with mounted(writing.socket, workshop[type]) as again:
        assert text_of(again, "written") == f"by the container, on {type}"
        status = os.stat("written", dir_fd=again.mount.fileno())
        assert (status.st_uid, status.st_gid) == (1000, 1001)
        assert errno_of(lambda: text_of(again, "hello")) == "ENOENT"
        with pytest.raises(OSError, match="Read-only"):
            os.unlink("written", dir_fd=again.mount.fileno())
    wait_until_dropped(workshop[type])


READ_WRITE = {"readOnly": False}


@pytest.mark.parametrize(
    ("strict", "type", "access", "fields", "error", "text"),
    [
        (False, "ext4", os.O_RDONLY, READ_WRITE, "BadFileDescriptor", "it is open read-only"),
        (False, "ext4", os.O_RDWR, {}, "NotImmutable", "the caller's descriptor can write to it"),
        (True, "ext4", os.O_RDWR, READ_WRITE, "NotImmutable", "the caller's descriptor can write to it"),
        (True, "ext4", os.O_RDONLY, READ_WRITE, "OptionNotPermitted", "grants read-only access"),
        (False, "erofs", os.O_RDWR, READ_WRITE, "OptionNotPermitted", "erofs cannot be written to"),
        (False, "squashfs", os.O_RDWR, READ_WRITE, "OptionNotPermitted", "squashfs cannot be written to"),
        (False, "ext4", os.O_RDONLY, {"options": ["rw"]}, "OptionNotPermitted", "the request is read-only"),
    ],
)
def test_writing_that_is_refused(
    writing: Daemon,
    daemon: Daemon,
    workshop: dict[str, Path],
    images: dict[str, Path],
    strict: bool,
    type: str,
    access: int,
    fields: dict[str, object],
    error: str,
    text: str,
) -> None:
    daemon, image = (daemon, images[type]) if strict else (writing, workshop[type])
    with OwnedFd(os.open(image, access)) as fd:
        found = as_user(lambda: outcome(lambda: ask(daemon, fd.fileno(), **fields)))
    assert found[0] == error, found
    assert text in found[1]


def test_the_hosts_root_may_hold_a_writable_descriptor(daemon: Daemon, images: dict[str, Path]) -> None:
    with ask(daemon, images["ext4"], os.O_RDWR).mount as mount:
        assert os.fstatvfs(mount.fileno()).f_flag & os.ST_RDONLY


@pytest.mark.parametrize("type", TYPES)
def test_loop_devices_clear_themselves(
    daemon: Daemon, images: dict[str, Path], containers: None, type: str
) -> None:
    """The file on ext4 can be read past the page cache; erofs reads it without a loop device."""
    expected = LoopFlags.AUTOCLEAR | LoopFlags.DIRECT_IO | LoopFlags.READ_ONLY
    # What an earlier test has just closed may still be there.
    wait_until_dropped(images[type])
    with ask(daemon, images[type]).mount, ask(daemon, images[type]).mount:
        assert loops_over(images[type]) == ([] if type == "erofs" else [expected] * 2)
    wait_until_dropped(images[type])


def test_erofs_on_a_tmpfs_falls_back_to_a_loop_device(
    start: Callable[..., Daemon], place: Path, images: dict[str, Path], containers: None
) -> None:
    directory = place / "memory"
    directory.mkdir(mode=0o755)
    with FsContext.open("tmpfs") as context:
        context.set_string("mode", "0755")
        context.create()
        tmpfs = context.mount(MountAttr(0))
    with tmpfs:
        image = os.open("erofs.raw", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=tmpfs.fileno())
        with open(image, "wb") as file:
            file.write(images["erofs"].read_bytes())

        def with_tmpfs() -> None:
            namespaces.unshare(Clone.NEWNS)
            mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
            mount_api.move_mount(tmpfs.fileno(), str(directory))

        daemon = start(trusting(directory), preexec_fn=with_tmpfs)
        with OwnedFd(os.open("erofs.raw", os.O_RDONLY, dir_fd=tmpfs.fileno())) as fd:

            def work() -> tuple[str, list[LoopFlags]]:
                reply = ask(daemon, fd.fileno(), own=True)
                with reply.mount:
                    return text_of(reply), os.fstat(reply.mount.fileno()).st_uid

            assert in_container(work) == ("hello from the image\n", 0)
            wait_until_dropped(fd.fileno())
            with ask(daemon, fd.fileno()).mount:
                (flags,) = loops_over(fd.fileno())
                assert flags & ~LoopFlags.DIRECT_IO == LoopFlags.AUTOCLEAR | LoopFlags.READ_ONLY
            wait_until_dropped(fd.fileno())
        daemon.stop()


def tmpfs(daemon: Daemon, fields: Mapping[str, int], **wishes: object) -> MountReply:
    return mount_fds(daemon.socket, {"tmpfs": fields}, [], readOnly=False, **wishes)


def test_tmpfs_has_the_limits_that_were_asked_for(writing: Daemon, containers: None) -> None:
    def work() -> list[object]:
        with (
            OwnedFd(os.open("/proc/self/ns/user", os.O_RDONLY)) as userns,
            mount_fds(
                writing.socket,
                {"tmpfs": {"size": MIB, "inodes": 8, "mode": 0o1770}},
                [userns.fileno()],
                readOnly=False,
                userNamespaceFileDescriptor=0,
            ).mount as mount,
        ):
            status = os.fstat(mount.fileno())
            found: list[object] = [oct(status.st_mode), status.st_uid]
            with open(os.open("big", os.O_CREAT | os.O_WRONLY, dir_fd=mount.fileno()), "wb", 0) as file:
                found.append(file.write(b"x" * 2 * MIB))
                with pytest.raises(OSError, match="No space left"):
                    file.write(b"x")
            made = [errno_of(lambda n=n: os.mkdir(str(n), dir_fd=mount.fileno())) for n in range(8)]
            return [*found, *made]

    # The root and the file are inodes as well.
    nothing_left = ["", "", "", "", "", "", "ENOSPC", "ENOSPC"]
    assert in_container(work) == [oct(stat.S_IFDIR | 0o1770), 0, MIB, *nothing_left]


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"size": 8 * MIB}, "", ""),
        ({"size": 8 * MIB, "inodes": 2048}, "", ""),
        ({"size": 8 * MIB + 1}, "LimitExceeded", "at most 8388608 bytes in a tmpfs"),
        ({"size": 1 << 62}, "LimitExceeded", "at most 8388608 bytes in a tmpfs"),
        ({"size": MIB, "inodes": 2049}, "LimitExceeded", "at most 2048 inodes in a tmpfs"),
        ({"size": 0}, "InvalidParameter", "source.tmpfs.size"),
        ({"size": -1}, "InvalidParameter", "source.tmpfs.size"),
        ({"size": MIB, "inodes": 0}, "InvalidParameter", "source.tmpfs.inodes"),
        ({"size": MIB, "mode": 0o4755}, "InvalidParameter", "source.tmpfs.mode"),
    ],
)
def test_tmpfs_within_limits(writing: Daemon, fields: dict[str, int], error: str, text: str) -> None:
    found = as_user(lambda: outcome(lambda: tmpfs(writing, fields)))
    assert found[0] == error, found
    assert text in found[1]


def test_tmpfs_is_read_only_where_the_rule_says_so(start: Callable[..., Daemon]) -> None:
    daemon = start(TMPFS.replace("read-write", "read-only"))
    refused(lambda: tmpfs(daemon, {"size": MIB}), "OptionNotPermitted", "grants read-only access")


NEVER = "mountd never passes it"
LIFTS = "only the host's administrator decides that"


@pytest.mark.parametrize(
    ("type", "options", "error", "text"),
    [
        ("ext4", ["lazytime"], "", ""),
        ("erofs", ["acl", "nosuid", "relatime"], "", ""),
        ("btrfs", ["compress=zstd"], "", ""),
        ("xfs", ["inode64", "noatime", "ro"], "", ""),
        ("squashfs", ["defaults", "noexec"], "", ""),
        ("ext4", ["discard"], "OptionNotPermitted", "does not grant it"),
        ("btrfs", ["compress=lzo"], "OptionNotPermitted", "does not grant it"),
        ("btrfs", ["compress"], "OptionNotPermitted", "does not grant it"),
        ("ext4", ["acl=1"], "OptionNotPermitted", "only if its value is left out"),
        ("ext4", ["journal_dev=1793"], "OptionNotPermitted", NEVER),
        ("ext4", ["journal_path=/dev/vda"], "OptionNotPermitted", NEVER),
        ("ext4", ["errors=panic"], "OptionNotPermitted", NEVER),
        ("ext4", ["data=journal"], "OptionNotPermitted", NEVER),
        ("ext4", ["usrquota"], "OptionNotPermitted", NEVER),
        ("ext4", ["context=system_u:object_r:etc_t:s0"], "OptionNotPermitted", NEVER),
        ("ext4", ["rootcontext=x"], "OptionNotPermitted", NEVER),
        ("btrfs", ["device=/dev/vda"], "OptionNotPermitted", NEVER),
        ("xfs", ["logdev=/dev/vda"], "OptionNotPermitted", NEVER),
        ("erofs", ["device=/dev/vda"], "OptionNotPermitted", NEVER),
        ("erofs", ["source=/etc/shadow"], "OptionNotPermitted", NEVER),
        ("squashfs", ["acl"], "OptionNotPermitted", NEVER),
        ("ext4", ["no-such-option"], "OptionNotPermitted", NEVER),
        ("ext4", ["suid"], "OptionNotPermitted", LIFTS),
        ("ext4", ["dev"], "OptionNotPermitted", LIFTS),
        ("ext4", ["exec"], "OptionNotPermitted", LIFTS),
        ("ext4", ["suid,dev"], "OptionNotPermitted", "it contains a comma"),
        ("ext4", ["lazytime,suid"], "OptionNotPermitted", "it contains a comma"),
        ("ext4", [""], "OptionNotPermitted", "it is empty"),
        ("ext4", ["=x"], "OptionNotPermitted", "nothing on one side"),
        ("ext4", ["acl="], "OptionNotPermitted", "nothing on one side"),
        ("ext4", ["acl\0"], "ProtocolError", "a NUL in a string"),
        ("ext4", ["acl\x7f"], "OptionNotPermitted", "a control character or a backslash"),
        ("ext4", ["acl\nsuid"], "OptionNotPermitted", "a control character or a backslash"),
        ("ext4", ["acl\\054suid"], "OptionNotPermitted", "a control character or a backslash"),
        ("ext4", ["acl=" + "x" * 4096], "OptionNotPermitted", "it is longer than 1024 bytes"),
        ("ext4", ["acl", "acl"], "OptionNotPermitted", "it is given more than once"),
        ("ext4", ["noatime", "strictatime"], "OptionNotPermitted", "it contradicts noatime"),
        ("ext4", ["nodev"] * 65, "LimitExceeded", "at most 64 mount options"),
    ],
)
def test_options(
    writing: Daemon, workshop: dict[str, Path], type: str, options: list[str], error: str, text: str
) -> None:
    found = as_user(lambda: outcome(lambda: ask(writing, workshop[type], options=options)))
    assert found[0] == error, found
    assert text in found[1]


@pytest.mark.parametrize(("wished", "error"), [("ext4", ""), ("xfs", "InvalidImage"), ("", "InvalidImage")])
def test_file_system_type(daemon: Daemon, images: dict[str, Path], wished: str, error: str) -> None:
    found = outcome(lambda: ask(daemon, images["ext4"], fileSystemType=wished))
    assert found[0] == error, found
    assert not error or "was asked for, but the image holds ext4" in found[1]


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize(
    ("type", "at", "magic"), [("ext4", 0, b"hsqs"), ("squashfs", 65600, b"_BHRfS_M"), ("erofs", 0, b"XFSB")]
)
def test_two_file_systems_in_one_image(
    writing: Daemon, workshop: dict[str, Path], trusted: bool, type: str, at: int, magic: bytes
) -> None:
    """Read by the worker itself where root vouches for it, and by a confined child where nobody does."""
    image = workshop["ext4"].with_name("two.raw")
    shutil.copy(workshop[type], image)
    with image.open("r+b") as file:
        file.seek(at)
        file.write(magic)
        file.truncate(max(image.stat().st_size, 1 << 17))
    image.chmod(0o644 if trusted else 0o666)
    refused(lambda: ask(writing, image), "InvalidImage", "ambiguous contents: ")
    refused(lambda: explain_image(writing, image), "InvalidImage", "ambiguous contents: ")
    image.unlink()


def explain_image(daemon: Daemon, image: Path) -> object:
    with OwnedFd(os.open(image, os.O_RDONLY)) as fd:
        return explain(daemon.socket, {"imageFileDescriptor": 0}, [fd.fileno()])


def options_of(
    daemon: Daemon, image: Path, target: Path, access: int = os.O_RDONLY, **wishes: object
) -> str:
    """The options that /proc/mounts shows for a mount of an image, for the host's root."""

    def work() -> str:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with ask(daemon, image, access, **wishes).mount as mount:
            attach(mount.fileno(), str(target))
        (line,) = [
            x for x in Path("/proc/self/mounts").read_text().splitlines() if x.split()[1] == str(target)
        ]
        return line.split()[3]

    return forked(work)


def test_an_ext4_that_wants_to_stop_the_machine(
    writing: Daemon, workshop: dict[str, Path], target: Path
) -> None:
    image = workshop["ext4"].with_name("panic.raw")
    shutil.copy(workshop["ext4"], image)
    subprocess.run(["tune2fs", "-e", "panic", image], check=True, capture_output=True)
    for access, wishes in ((os.O_RDONLY, {}), (os.O_RDWR, READ_WRITE)):
        shown = options_of(writing, image, target, access, **wishes).split(",")
        assert "errors=remount-ro" in shown
        assert "errors=panic" not in shown
        wait_until_dropped(image)


def test_a_journal_is_not_replayed_for_reading(writing: Daemon, workshop: dict[str, Path]) -> None:
    image = workshop["ext4"].with_name("dirty.raw")
    shutil.copy(workshop["ext4"], image)
    debugfs = ["debugfs", "-w", "-R", "feature needs_recovery", image]
    subprocess.run(debugfs, check=True, capture_output=True)
    before = image.read_bytes()
    image.chmod(0o444)
    with mounted(writing.socket, image) as reply:
        assert text_of(reply, "owned") == "by 1000\n"
    wait_until_dropped(image)
    assert image.read_bytes() == before


@pytest.mark.parametrize("type", ["xfs", "btrfs", "ext4"])
def test_copies_with_one_uuid_are_apart(
    writing: Daemon, daemon: Daemon, workshop: dict[str, Path], images: dict[str, Path], type: str
) -> None:
    """Nobody gets to see another's, nor the options that it was mounted with, even of the very same file."""
    with ask(writing, workshop[type], os.O_RDWR, readOnly=False).mount as mount:
        os.mkdir("mine", dir_fd=mount.fileno())
    wait_until_dropped(workshop[type])
    with (
        mounted(daemon.socket, images[type]) as first,
        mounted(daemon.socket, images[type]) as second,
        mounted(writing.socket, workshop[type]) as copy,
    ):
        mounts = [each.mount.fileno() for each in (first, second, copy)]
        assert len({os.fstat(fd).st_dev for fd in mounts}) == 3
        assert [errno_of(lambda f=fd: os.stat("mine", dir_fd=f)) for fd in mounts] == [
            "ENOENT",
            "ENOENT",
            "",
        ]


@pytest.fixture(scope="module")
def package(place: Path) -> Path:
    """The files of installed packages, as a tree."""
    tree = place / "package"
    tree.mkdir(mode=0o755)
    listed = subprocess.run(["dpkg", "-L", *PACKAGES], check=True, capture_output=True, text=True).stdout
    # Where /lib is a link to /usr/lib, and for what an administrator has removed.
    names = sorted({str(Path(name)) for name in listed.splitlines() if os.path.lexists(name)} - {"/."})
    files = "\0".join(name.removeprefix("/") for name in names if name != "/")
    pack = ["tar", "-c", "-C", "/", "--no-recursion", "--null", "-T", "-"]
    packed = subprocess.run(pack, input=files.encode(), check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", tree], input=packed, check=True)
    return tree


def contents(root: Path | str) -> dict[str, tuple[object, ...]]:
    """All that a tree has: kinds, modes, owners, times, links, and the digests of files."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            what: str | None = None
            if stat.S_ISLNK(status.st_mode):
                what = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    what = hashlib.sha256(file.read()).hexdigest()
            key = os.path.relpath(path, root)
            if key != "lost+found":
                found[key] = (status.st_mode, status.st_uid, status.st_gid, int(status.st_mtime), what)
    return found


@pytest.mark.parametrize("type", TYPES)
def test_an_installed_package_is_the_same_in_a_container(
    writing: Daemon, workshop: dict[str, Path], package: Path, target: Path, containers: None, type: str
) -> None:
    image = build_image(type, package, workshop[type].with_name(f"package-{type}.raw"))
    os.sync()
    expected = contents(package)
    assert len(expected) > 30
    assert sum(len(what) == 64 for *_, what in expected.values() if isinstance(what, str)) > 20

    def work() -> dict[str, tuple[object, ...]]:
        with mounted(writing.socket, image) as reply:
            attach(reply.mount.fileno(), str(target))
            return contents(target)

    found = in_container(work)
    if type == "erofs":  # which mkfs gives the times of directories that it likes
        found, expected = ({name: (*x[:3], x[4]) for name, x in each.items()} for each in (found, expected))
    assert found == expected
    wait_until_dropped(image)
    image.unlink()
