"""Directories: whose can be mounted, for whom, with which ids, and what cannot be got that way."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.caller.model import FOREIGN
from mountd.client import Client, MountReply, Request, attach
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, MountAttr, OpenTree, Propagation
from mountd.kernel.fs_context import FsContext
from mountd.kernel.libc import call
from tests.container import RANGE, USER, in_container, user_namespace
from tests.daemon import Daemon
from tests.e2e.calls import Outcome, errno_of, explain, mount_fds, outcome
from tests.e2e.conftest import trusting
from tests.e2e.directories import BIND, peer, rule

ROOT_OF_CONTAINER = RANGE[0][1]
BASE = FOREIGN.start
READ_WRITE = {"readOnly": False}
SOURCE = {"directoryFileDescriptor": 0}


@pytest.fixture(scope="module")
def serving(place: Path) -> Iterator[Daemon]:
    """A daemon that trusts users' directories to write to, and root's at one place to read."""
    policy = (
        trusting(place / "trusted")
        + rule("trees", '"root"', image=f', location = "{place}/trees/*"')
        + rule("own", '"caller", "foreign"', ', access = "read-write"')
    )
    files = []
    for name in ("subuid", "subgid"):
        files.append(place / f"directories-{name}")
        files[-1].write_text(f"{USER}:{ROOT_OF_CONTAINER}:65536\n")

    def with_files() -> None:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        for file in files:
            call("mount", bytes(file), b"/etc/" + file.name.split("-")[1].encode(), None, BIND, None)

    daemon = Daemon(place / "directories", policy, preexec_fn=with_files)
    yield daemon
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


@pytest.fixture
def home(place: Path) -> Iterator[Path]:
    """A directory of USER's with a file of its own, and one of root's."""
    path = Path(tempfile.mkdtemp(prefix="home-", dir=place))
    (path / "mine").write_text("mine\n")
    (path / "roots").write_text("root's\n")
    (path / "roots").chmod(0o600)
    for each in (path, path / "mine"):
        os.chown(each, USER, USER)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def tree(place: Path) -> Iterator[Path]:
    """A directory of root's where a rule trusts it."""
    path = place / "trees/one"
    path.mkdir(parents=True, mode=0o755)
    (path / "secret").write_text("secret\n")
    (path / "secret").chmod(0o600)
    yield path
    shutil.rmtree(path.parent)


def ask(
    daemon: Daemon, directory: Path | int, *, flags: int = os.O_RDONLY, own: bool = False, **fields: object
) -> MountReply:
    """Ask for a mount of a directory; with `own`, for a user namespace of USER's with a range of ids."""
    with contextlib.ExitStack() as stack:
        opened = (
            os.dup(directory) if isinstance(directory, int) else os.open(directory, flags | os.O_DIRECTORY)
        )
        fds = [stack.enter_context(OwnedFd(opened)).fileno()]
        if own:
            fds.append(stack.enter_context(user_namespace(RANGE, owner=USER)).fileno())
            fields["userNamespaceFileDescriptor"] = 1
        with peer():
            return mount_fds(daemon.socket, SOURCE, fds, **fields)


def refusal(daemon: Daemon, directory: Path | int, **fields: object) -> Outcome:
    return outcome(lambda: ask(daemon, directory, **fields))  # type: ignore[arg-type]


def owner(mount: OwnedFd, name: str) -> tuple[int, int]:
    status = os.stat(name, dir_fd=mount.fileno())
    return status.st_uid, status.st_gid


def test_a_user_has_its_own_directory(serving: Daemon, home: Path) -> None:
    with ask(serving, home) as reply:
        assert reply.mounts[0]["readOnly"] is True
        assert reply.decision["rule"] == "own"
        assert reply.decision["trustedBy"] == "caller-owned"
        assert owner(reply.mount, "mine") == (USER, USER)
        assert owner(reply.mount, "roots") == (0, 0)
        assert errno_of(lambda: os.unlink("mine", dir_fd=reply.mount.fileno())) == "EROFS"


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_PATH])
def test_a_container_writes_as_the_owner_and_as_nobody_else(
    serving: Daemon, home: Path, containers: None, flags: int
) -> None:
    """What it makes belongs to the user on the disk, though it is root; what is root's there stays so."""
    with ask(serving, home, own=True, flags=flags, readOnly=False) as reply:
        fd = reply.mount.fileno()

        def work() -> tuple[list[object], list[str]]:
            seen = [owner(reply.mount, "mine"), owner(reply.mount, "roots")]
            made = os.open("made", os.O_CREAT | os.O_WRONLY, 0o755, dir_fd=fd)
            os.fchmod(made, 0o6755)
            os.close(made)
            device = os.makedev(7, 1)
            return seen, [
                errno_of(lambda: os.close(os.open("roots", os.O_RDONLY, dir_fd=fd))),
                errno_of(lambda: os.chown("made", 1, 1, dir_fd=fd)),
                errno_of(lambda: os.mknod("device", stat.S_IFBLK | 0o666, device, dir_fd=fd)),
            ]

        seen, errors = in_container(work)
        assert reply.mounts[0]["readOnly"] is False
    assert seen == [(0, 0), (65534, 65534)]
    assert errors[0] == "EACCES"
    assert errors[1] in ("EOVERFLOW", "EINVAL")
    assert errors[2] == "EPERM"
    made = (home / "made").stat()
    assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode)) == (USER, USER, 0o6755)


def test_a_group_of_the_systems_is_never_mapped(serving: Daemon, home: Path, containers: None) -> None:
    """The directory is the user's, but its group is root's: that is not the user's to give away."""
    os.chown(home, USER, 0)
    for kind in ("namespace", "caller"):
        own = kind == "namespace"
        with ask(serving, home, own=own, idMap={"kind": kind}, readOnly=False) as reply:
            assert os.fstat(reply.mount.fileno()).st_gid == 65534


def test_a_directory_of_the_foreign_range(serving: Daemon, home: Path, containers: None) -> None:
    """It appears as a container's, with all its ids, and what the container makes is foreign on the disk."""
    inner = home / "machine"
    inner.mkdir(mode=0o700)
    os.chown(inner, BASE, BASE)
    with ask(serving, inner, own=True, flags=os.O_PATH, readOnly=False) as reply:
        fd = reply.mount.fileno()

        def work() -> None:
            for uid in (0, 1000, 65535):
                os.mkdir(f"d{uid}", dir_fd=fd)
                os.chown(f"d{uid}", uid, uid, dir_fd=fd)

        in_container(work)
    assert [(inner / f"d{uid}").stat().st_uid - BASE for uid in (0, 1000, 65535)] == [0, 1000, 65535]
    assert reply.decision["trustedBy"] == "foreign-owned"


def test_a_foreign_directory_below_nobody_of_the_callers(serving: Daemon, home: Path, place: Path) -> None:
    """Neither one that somebody else has, nor one behind the root of a mount, is the caller's."""
    inner = home / "machine"
    inner.mkdir()
    os.chown(inner, BASE, BASE)
    os.chown(home, USER + 1, USER + 1)
    name, text = refusal(serving, inner)
    assert name == "DeniedByPolicy"
    assert f"belongs to uid {USER}" in text
    os.chown(home, USER, USER)
    with mount_api.open_tree(-100, str(inner), OpenTree.CLONE) as bind:
        mount_api.move_mount(bind.fileno(), str(inner))
    try:
        assert refusal(serving, inner)[0] == "DeniedByPolicy"
    finally:
        mount_api.umount(str(inner))
    assert refusal(serving, inner) == ("", "")


def test_a_directory_of_roots_is_read_where_a_rule_trusts_it(
    serving: Daemon, tree: Path, containers: None
) -> None:
    with ask(serving, tree, own=True) as reply:
        assert reply.decision["trustedBy"] == "root-owned"
        fd = reply.mount.fileno()

        def work() -> tuple[str, list[str]]:
            with open(os.open("secret", os.O_RDONLY, dir_fd=fd)) as file:
                text = file.read()
            lift = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV
            return text, [
                errno_of(lambda each=each: mount_api.mount_setattr(fd, clear=each))  # type: ignore[misc]
                for each in lift
            ]

        assert in_container(work) == ("secret\n", ["EPERM"] * 3)


REFUSED = [
    ("roots", {"readOnly": False}, "OptionNotPermitted", "a directory of root's is never writable"),
    ("roots", {"readOnly": False, "own": True}, "OptionNotPermitted", "never writable"),
    ("roots", {"flags": os.O_PATH}, "BadFileDescriptor", "O_PATH"),
    ("roots elsewhere", {}, "DeniedByPolicy", "the rule trusts what is caller-owned or foreign-owned"),
    ("roots in tmp", {}, "DeniedByPolicy", "writable by everybody"),
    ("somebody's", {}, "DeniedByPolicy", f"the caller is {USER}"),
    ("own", {"options": ["acl"]}, "OptionNotPermitted", "never passes it to directory"),
    ("own", {"fileSystemType": "erofs"}, "UnsupportedFileSystem", "erofs was asked for"),
    ("own", {"imagePolicy": "root=verity"}, "DeniedByPolicy", "imagePolicy is about images"),
    ("proc", {}, "UnsupportedFileSystem", "directories of this file system"),
    ("a file", {}, "BadFileDescriptor", "a regular file, not a directory"),
]


@pytest.mark.parametrize(("what", "fields", "error", "text"), REFUSED)
def test_refused(
    serving: Daemon, home: Path, tree: Path, what: str, fields: dict[str, object], error: str, text: str
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        os.chmod(temporary, 0o755)
        theirs = home / "theirs"
        theirs.mkdir()
        os.chown(theirs, USER + 1, USER + 1)
        place: Path | int = {
            "roots": tree,
            "roots elsewhere": tree.parent,
            "roots in tmp": Path(temporary),
            "somebody's": theirs,
            "own": home,
            "proc": Path("/proc"),
            "a file": home,
        }[what]
        with OwnedFd(os.open(home / "mine", os.O_RDONLY)) as file:
            found = refusal(serving, file.fileno() if what == "a file" else place, **fields)
    assert found[0] == error, found
    assert text in found[1]


@pytest.mark.parametrize(
    ("uids", "gids"),
    [((0, 1), (USER, 1)), ((USER, 1), (0, 1)), ((USER, 2), (USER, 1)), ((BASE, 1), (USER, 1))],
)
def test_ids_on_disk_that_are_not_the_owners(
    serving: Daemon, home: Path, uids: tuple[int, int], gids: tuple[int, int]
) -> None:
    """Not even read-only: what root has put into a user's directory stays root's."""
    ranges = [
        [{"first": first, "target": ROOT_OF_CONTAINER, "count": count}] for first, count in (uids, gids)
    ]
    idmap = {"kind": "ranges", "uidRanges": ranges[0], "gidRanges": ranges[1]}
    for read_only in (True, False):
        name, text = refusal(serving, home, idMap=idmap, readOnly=read_only)
        assert name == "DeniedByPolicy"
        assert "which are not the directory's" in text


def test_what_is_mounted_below_stays_out(serving: Daemon, home: Path) -> None:
    (home / "below").mkdir()
    with FsContext.open("tmpfs") as context:
        context.create()
        with context.mount(MountAttr(0)) as mount:
            os.mkdir("covering", dir_fd=mount.fileno())
            mount_api.move_mount(mount.fileno(), str(home / "below"))
    try:
        with ask(serving, home) as reply:
            below = os.open("below", os.O_RDONLY, dir_fd=reply.mount.fileno())
            with OwnedFd(below):
                assert os.listdir(below) == []
    finally:
        mount_api.umount(str(home / "below"))


def test_a_directory_in_the_callers_own_mount_namespace(
    serving: Daemon, home: Path, containers: None
) -> None:
    """A container's own file system is nowhere but there, and its root owns what is on it."""

    def work() -> tuple[str, int, str]:
        with FsContext.open("tmpfs") as context:
            context.create()
            with context.mount(MountAttr(0)) as mount:
                attach(mount.fileno(), str(home))
        for name in ("own", "there"):
            (home / name).mkdir()
        (home / "own/file").write_text("in a container\n")
        with OwnedFd(os.open(home / "own", os.O_RDONLY)) as fd:
            reply = mount_fds(serving.socket, SOURCE, [fd.fileno()], readOnly=False)
        with reply.mount as mount:
            attach(mount.fileno(), str(home / "there"))
            lifted = errno_of(lambda: mount_api.mount_setattr(mount.fileno(), clear=MountAttr.NODEV))
        text = (home / "there/file").read_text()
        (home / "there/more").write_text("")
        return text, (home / "own/more").stat().st_uid, lifted

    assert in_container(work) == ("in a container\n", 0, "EPERM")


def test_from_a_mount_namespace_that_is_not_the_callers(
    serving: Daemon, home: Path, containers: None
) -> None:
    """A container holds a descriptor of the host's: the directory is not where it is, and not its own."""
    os.chown(home, ROOT_OF_CONTAINER, ROOT_OF_CONTAINER)
    with OwnedFd(os.open(home, os.O_RDONLY)) as fd:
        found = in_container(
            lambda: outcome(lambda: mount_fds(serving.socket, SOURCE, [fd.fileno()], readOnly=False))
        )
    assert found[0] == "BadFileDescriptor", found
    assert "a mount namespace that is not the caller's" in found[1]


def test_what_a_mount_hides_from_a_container_stays_hidden(
    serving: Daemon, home: Path, containers: None
) -> None:
    """The kernel has locked what was mounted there before; its own directory would show what is behind."""
    (home / "below").mkdir()
    (home / "below/hidden").write_text("hidden")
    os.chown(home, ROOT_OF_CONTAINER, ROOT_OF_CONTAINER)
    with FsContext.open("tmpfs") as context:
        context.create()
        with context.mount(MountAttr(0)) as mount:
            attach(mount.fileno(), str(home / "below"))

    def work() -> Outcome:
        with OwnedFd(os.open(home, os.O_RDONLY)) as fd:
            return outcome(lambda: mount_fds(serving.socket, SOURCE, [fd.fileno()]))

    try:
        name, text = in_container(work)
    finally:
        mount_api.umount(str(home / "below"))
    assert name == "BadFileDescriptor"
    assert "may not look behind" in text


@pytest.mark.parametrize("flag", [MountAttr.RDONLY, MountAttr.NOEXEC])
def test_what_a_mount_forbids_stays_forbidden(serving: Daemon, home: Path, flag: MountAttr) -> None:
    """Only what the source's mount lets be done: a read-only one is not made writable by cloning it."""
    with mount_api.open_tree(-100, str(home), OpenTree.CLONE) as bind:
        mount_api.mount_setattr(bind.fileno(), set=flag)
        mount_api.move_mount(bind.fileno(), str(home))
    try:
        found = refusal(serving, home, readOnly=False)
        if flag is MountAttr.RDONLY:
            assert found[0] == "OptionNotPermitted"
            assert "read-only mount" in found[1]
        with ask(serving, home) as reply:
            shown = os.fstatvfs(reply.mount.fileno()).f_flag
            assert bool(shown & os.ST_NOEXEC) is (flag is MountAttr.NOEXEC)
            assert (
                shown & (os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV)
                == os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV
            )
    finally:
        mount_api.umount(str(home))


def test_an_idmapped_mount_does_not_make_a_directory_the_callers(serving: Daemon, home: Path) -> None:
    """Root's directory, shown as the user's: what is on the disk counts."""
    os.chown(home, 0, 0)
    with (
        mount_api.open_tree(-100, str(home), OpenTree.CLONE) as bind,
        user_namespace(((0, USER, 1),)) as userns,
    ):
        mount_api.mount_setattr(bind.fileno(), set=MountAttr.IDMAP, userns_fd=userns.fileno())
        mount_api.move_mount(bind.fileno(), str(home))
    try:
        assert home.stat().st_uid == USER
        name, text = refusal(serving, home, readOnly=False)
        assert name == "BadFileDescriptor", text
        assert "belongs to 0:0" in text
    finally:
        mount_api.umount(str(home))


def test_mounts_do_not_propagate_either_way(serving: Daemon, home: Path) -> None:
    """Else whoever has the clone would mount on the host, and the host in the clone."""
    (home / "below").mkdir()
    with mount_api.open_tree(-100, str(home), OpenTree.CLONE) as bind:
        mount_api.mount_setattr(bind.fileno(), propagation=Propagation.SHARED)
        mount_api.move_mount(bind.fileno(), str(home))
    at = home.parent / f"{home.name}-clone"
    at.mkdir()
    try:
        with ask(serving, home, readOnly=False) as reply:
            attach(reply.mount.fileno(), str(at))
        for here, there in ((home, at), (at, home)):
            with FsContext.open("tmpfs") as context:
                context.create()
                with context.mount(MountAttr(0)) as mount:
                    attach(mount.fileno(), str(here / "below"))
            assert not os.path.ismount(there / "below")
            mount_api.umount(str(here / "below"))
    finally:
        mount_api.umount(str(at))
        mount_api.umount(str(home))
        at.rmdir()


def test_explain_says_whose_it_is(serving: Daemon, home: Path) -> None:
    with OwnedFd(os.open(home, os.O_RDONLY)) as fd, peer():
        said = explain(serving.socket, SOURCE, [fd.fileno()])
    assert said["facts"] == said["facts"] | {  # type: ignore[operator]
        "source": "directory",
        "owner": f"uid {USER}, gid {USER}",
        "whose": "caller",
    }


def test_the_command_line_takes_a_directory(serving: Daemon, home: Path) -> None:
    with Request(str(home)) as request, peer(), Client(str(serving.socket)) as client:
        reply = client.mount(request.source, request.fds, **request.parameters)
    with reply.mount as mount:
        assert owner(mount, "mine") == (USER, USER)


def test_without_a_rule_no_directory_is_mounted(daemon: Daemon, home: Path, images: dict[str, Path]) -> None:
    """Not even one where images are trusted."""
    name, text = refusal(daemon, home)
    assert name == "DeniedByPolicy"
    assert "no rule lets this caller mount a directory" in text
    assert refusal(daemon, images["erofs"].parent)[0] == "DeniedByPolicy"
