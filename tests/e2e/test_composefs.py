"""composefs: images and descriptions, what is seen of them, and what cannot be got that way."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.client import Client, MountReply, Request
from mountd.evidence.fs_verity import digest_of
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, MountAttr, Propagation
from mountd.kernel.libc import call
from mountd.store.store import Store
from tests.container import RANGE, USER, as_user, forked, in_container, user_namespace
from tests.daemon import Daemon
from tests.e2e.calls import Outcome, errno_of, explain, mount_fds, outcome
from tests.e2e.conftest import TMPFS_RULE, trusting
from tests.e2e.test_directories import peer
from tests.rights import drop_others
from tests.rogue import eventually, settled

OTHER = USER + 7
BIG = bytes(range(256)) * 40
BIND = 4096  # MS_BIND
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
DESCRIPTIONS = """
[[rule]]
name = "descriptions"
image = { kind = "composefs" }
caller = { any = true }
require = { integrity = ["regenerated"] }
grant = { file-systems = ["erofs"], idmap = ["none", "namespace", "caller", "ranges"] }
verdict = "allow"
"""
Told = dict[str, tuple[object, ...]]


class Trees:
    """A tree as a composefs: its image and its objects, root's, and what describes it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.objects = place / "objects"
        self.image = place / "tree.cfs"
        tree = place / "tree"
        (tree / "directory/below").mkdir(parents=True)
        (tree / "small").write_text("a few bytes\n")
        (tree / "big").write_bytes(BIG)
        (tree / "a name with = and \\ and \n").write_bytes(BIG[:5000])
        (tree / "private").write_bytes(b"private" * 100)
        (tree / "private").chmod(0o600)
        (tree / "program").write_bytes(b"#!/bin/sh\n" + BIG)
        (tree / "program").chmod(0o4755)
        (tree / "directory/below/of-user").write_bytes(b"of 1000" * 100)
        os.chown(tree / "directory/below/of-user", 1000, 1000)
        (tree / "link").symlink_to("directory/below")
        os.setxattr(tree / "small", "user.note", b"with \0 and =")
        os.mkfifo(tree / "pipe")
        command = ["mkcomposefs", "--user-xattrs", f"--digest-store={self.objects}", "--print-digest"]
        done = subprocess.run([*command, tree, self.image], check=True, capture_output=True, text=True)
        self.digest = done.stdout.strip()
        self.description = place / "tree.dump"
        self.description.write_bytes(dump(self.image))
        self.description.chmod(0o644)


def dump(image: Path) -> bytes:
    return subprocess.run(["composefs-info", "dump", image], check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def trees(place: Path) -> Iterator[Trees]:
    path = place / "composefs"
    path.mkdir(mode=0o755)
    yield Trees(path)
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def one_daemon(place: Path, trees: Trees) -> Iterator[tuple[Daemon, dict[str, object]]]:
    daemon = Daemon(place / "composefs-daemon", trusting(trees.place) + DESCRIPTIONS)
    yield daemon, settled(daemon)
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


@pytest.fixture
def serving(one_daemon: tuple[Daemon, dict[str, object]]) -> Iterator[Daemon]:
    """The daemon; nothing is left of what it made, whatever came of it."""
    daemon, before = one_daemon
    yield daemon
    assert eventually(lambda: daemon.held() == before, 10), (before, daemon.held())


@pytest.fixture
def own(place: Path, trees: Trees) -> Iterator[Path]:
    """A directory of USER's with the objects, which are USER's as well."""
    path = Path(tempfile.mkdtemp(prefix="objects-", dir=place))
    shutil.copytree(trees.objects, path, dirs_exist_ok=True)
    for each in (path, *path.rglob("*")):
        os.chown(each, USER, USER)
        each.chmod(0o700 if each.is_dir() else 0o600)
    yield path
    shutil.rmtree(path)


def ask(daemon: Daemon, source: Path, *objects: Path, **wishes: object) -> MountReply:
    with (
        Client(str(daemon.socket)) as client,
        Request(f"composefs:{source}", objects=[str(each) for each in objects], **wishes) as request,  # type: ignore[arg-type]
    ):
        return client.mount(request.source, request.fds, **request.parameters)


def ask_as_user(daemon: Daemon, source: Path, *objects: Path, **wishes: object) -> MountReply:
    with peer():
        return ask(daemon, source, *objects, **wishes)


def refusal(daemon: Daemon, source: Path, *objects: Path, **wishes: object) -> Outcome:
    return outcome(lambda: ask_as_user(daemon, source, *objects, **wishes))


def listing(root: int | str) -> Told:
    """All that can be seen of a tree, by root."""
    top = root if isinstance(root, str) else f"/proc/self/fd/{root}"
    found: Told = {}
    for directory, directories, files in os.walk(f"{top}/."):
        for name in (".", *directories, *files):
            path = f"{directory}/{name}"
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            contents: object = None
            if kind == stat.S_IFREG:
                contents = Path(path).read_bytes()
            elif kind == stat.S_IFLNK:
                contents = os.readlink(path)
            attributes = [
                (each, os.getxattr(path, each, follow_symlinks=False))
                for each in os.listxattr(path, follow_symlinks=False)
            ]
            found[os.path.normpath(path.removeprefix(top))] = (
                oct(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_size if kind == stat.S_IFREG else None,
                status.st_mtime_ns,
                contents,
                attributes,
            )
    return found


def in_mount_namespace(work: Callable[[], Told]) -> Told:
    """What `work` returns in a mount namespace of its own."""

    def there() -> Told:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        return work()

    return forked(there)


def by_mount_composefs(trees: Trees) -> Told:
    """What root sees that mounts it with the tool of composefs."""

    def work() -> Told:
        # It makes a mount of its own below /tmp, where else it would stay for a while.
        command = ["mount.composefs", "-o", f"basedir={trees.objects}", trees.image, "/mnt"]
        subprocess.run(command, check=True)
        return listing("/mnt")

    return in_mount_namespace(work)


def test_root_sees_what_mount_composefs_shows(serving: Daemon, trees: Trees) -> None:
    wanted = by_mount_composefs(trees)
    assert wanted["/big"][5] == BIG
    assert len(wanted) == 11
    for source in (trees.image, trees.description):
        with ask(serving, source, trees.objects, digest=trees.digest) as reply:
            assert listing(reply.mount.fileno()) == wanted
            assert (reply.mounts[0]["fileSystemType"], reply.mounts[0]["readOnly"]) == ("overlay", True)


def test_the_digest_is_that_of_mkcomposefs(serving: Daemon, trees: Trees) -> None:
    with OwnedFd(os.open(trees.image, os.O_RDONLY)) as fd:
        assert digest_of(fd.fileno(), trees.image.stat().st_size) == trees.digest
    wrong = "0" * 64
    for source in (trees.image, trees.description):
        name, text = refusal(serving, source, trees.objects, digest=wrong)
        assert name == "InvalidImage"
        assert trees.digest in text
    assert refusal(serving, trees.image, trees.objects, digest="abc")[0] == "InvalidParameter"


def test_of_a_description_the_image_is_made_anew(serving: Daemon, trees: Trees, own: Path) -> None:
    with ask_as_user(serving, trees.description, own) as reply:
        assert reply.decision["trustedBy"] == "regenerated"
        assert "nothing checks the contents" in str(reply.decision["reason"])
        assert os.fstatvfs(reply.mount.fileno()).f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_RDONLY)
        assert Path(f"/proc/self/fd/{reply.mount.fileno()}/big").read_bytes() == BIG
        digest = str(reply.decision["digest"])
    store = Store(serving.directory / "state")
    (record,) = store.part("regenerated").records()
    assert record.digest == digest
    fd, _ = store.part("regenerated").lookup(digest)
    with fd:
        assert os.pread(fd.fileno(), record.size, 0) == trees.image.read_bytes()
    # And not another time; nor is it an image that could be mounted by itself.
    inode = os.stat(serving.directory / f"state/regenerated/images/sha256/{digest[7:]}").st_ino
    with ask_as_user(serving, trees.description, own):
        pass
    assert os.stat(serving.directory / f"state/regenerated/images/sha256/{digest[7:]}").st_ino == inode
    assert not list(store.records())
    source = {"reference": f"stored:{digest}"}
    assert outcome(lambda: mount_fds(serving.socket, source, []))[0] == "NotFound"


def test_explain_makes_nothing(serving: Daemon, trees: Trees, own: Path, place: Path) -> None:
    text = trees.description.read_bytes() + b"/one-more 1 100644 1 0 0 0 0.0 - x -\n"
    path = described(place, text)
    before = made_images(serving)
    with (
        peer(),
        Client(str(serving.socket)) as client,
        Request(f"composefs:{path}", objects=[str(own)]) as request,
    ):
        told = client.explain(request.source, request.fds)
    assert told["decision"]["verdict"] == "allow"  # type: ignore[index]
    assert told["facts"]["contents"] == "not checked"  # type: ignore[index]
    assert told["facts"]["objects 0"].startswith("caller-owned")  # type: ignore[index]
    assert made_images(serving) == before
    path.write_bytes(text + b"nonsense\n")
    with (
        peer(),
        Client(str(serving.socket)) as client,
        Request(f"composefs:{path}", objects=[str(own)]) as request,
    ):
        name, said = outcome(lambda: client.explain(request.source, request.fds))
    assert name == "InvalidImage"
    assert "line 13 of the description" in said
    path.unlink()


def made_images(daemon: Daemon) -> set[str]:
    path = daemon.directory / "state/regenerated/images/sha256"
    return set(os.listdir(path)) if path.exists() else set()


def described(place: Path, text: bytes) -> Path:
    fd, name = tempfile.mkstemp(prefix="described-", dir=place)
    os.close(fd)
    path = Path(name)
    path.write_bytes(text)
    path.chmod(0o644)
    return path


HEAD = b"/ 0 40755 2 0 0 0 0.0 - - -\n"


def of_one(place: Path, line: bytes) -> Path:
    return described(place, HEAD + line + b"\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"/x 5 100644 1 0 0 0 0.0 ../x - -", "plain relative"),
        (b"/x 5 100644 1 0 0 0 0.0 /etc/shadow - -", "plain relative"),
        (b"/x 0 20666 1 0 0 259 0.0 - - -", "character device"),
        (b"/x 0 60666 1 0 0 0 0.0 - - -", "block device"),
        (b"/x 1 100644 1 0 0 0 0.0 - x - trusted.overlay.redirect=/etc/shadow", "user.*"),
        (b"/x 1 100644 1 0 0 0 0.0 - x - security.capability=x", "user.*"),
        (b"/../x 1 100644 1 0 0 0 0.0 - x -", "no directory before it"),
    ],
)
def test_hostile_lines(serving: Daemon, own: Path, place: Path, line: bytes, said: str) -> None:
    path = of_one(place, line)
    name, text = refusal(serving, path, own)
    path.unlink()
    assert name == "InvalidImage"
    assert said in text


def test_nothing_is_read_that_the_caller_could_not_read(serving: Daemon, own: Path, place: Path) -> None:
    """Modes are what the description says; what an object is, is what the file is."""
    secrets = {"roots": (0, 0o600), "others": (OTHER, 0o640), "mine": (USER, 0o400), "open": (0, 0o644)}
    for name, (uid, mode) in secrets.items():
        (own / name).write_text("secret\n")
        os.chown(own / name, uid, uid)
        (own / name).chmod(mode)
    (own / "link").symlink_to("/etc/hostname")
    (own / "up").symlink_to("..")
    os.mkfifo(own / "pipe")
    lines = [
        b"/%s 7 100644 1 %d %d 0 0.0 %s - -\n" % (name.encode(), USER, USER, name.encode())
        for name in (*secrets, "link", "up/passwd", "pipe")
        if "/" not in name
    ]
    lines.append(b"/up 7 100644 1 0 0 0 0.0 up/mine - -\n")
    path = described(place, HEAD + b"".join(lines))
    with ask_as_user(serving, path, own) as reply:
        fd = reply.mount.fileno()

        def read(name: str) -> str:
            try:
                return Path(f"/proc/self/fd/{fd}/{name}").read_text()
            except OSError as error:
                return os.strerror(error.errno or 0)

        # As root, who could read all of it elsewhere.
        assert {name: read(name) for name in secrets} == {
            "roots": "Permission denied",
            "others": "Permission denied",
            "mine": "secret\n",
            "open": "secret\n",
        }
        assert "secret" not in read("link")
        assert read("up") != "secret\n"
        assert read("pipe") != "secret\n"
    path.unlink()


def test_root_owned_objects_show_what_everybody_may_read(serving: Daemon, place: Path) -> None:
    """A description could name any file of a directory of root's that its caller can open."""
    etc = place / "composefs-etc"
    etc.mkdir(mode=0o755)
    for name, mode in (("shadow", 0o600), ("passwd", 0o644)):
        (etc / name).write_text("of root\n")
        (etc / name).chmod(mode)
    path = described(
        place, HEAD + b"".join(b"/%s 8 100644 1 0 0 0 0.0 %s - -\n" % (n, n) for n in (b"shadow", b"passwd"))
    )
    with ask_as_user(serving, path, etc, idmap="caller") as reply:
        fd = reply.mount.fileno()
        assert Path(f"/proc/self/fd/{fd}/passwd").read_text() == "of root\n"
        assert errno_of(lambda: Path(f"/proc/self/fd/{fd}/shadow").read_text()) == "EACCES"
        assert os.stat("passwd", dir_fd=fd).st_uid == USER
    # Who is root anyway has what it has.
    with ask(serving, path, etc) as reply:
        assert Path(f"/proc/self/fd/{reply.mount.fileno()}/shadow").read_text() == "of root\n"
    path.unlink()
    shutil.rmtree(etc)


def test_nothing_belongs_to_others_without_an_idmap(serving: Daemon, own: Path, place: Path) -> None:
    lines = b"/root 1 104755 1 0 0 0 0.0 - x -\n/mine 1 100600 1 %d %d 0 0.0 - x -\n" % (USER, USER)
    path = described(place, HEAD + lines)
    with ask_as_user(serving, path, own) as reply:
        fd = reply.mount.fileno()
        assert os.stat("root", dir_fd=fd).st_uid == 65534
        assert os.stat("mine", dir_fd=fd).st_uid == USER
        assert as_user(lambda: Path(f"/proc/self/fd/{fd}/mine").read_text()) == "x"
    path.unlink()


def test_a_container_gets_it_with_its_ids_and_locked(
    serving: Daemon, trees: Trees, own: Path, containers: None
) -> None:
    os.chown(own, RANGE[0][1], RANGE[0][1])
    for each in own.rglob("*"):
        os.chown(each, RANGE[0][1], RANGE[0][1])

    def work() -> tuple[object, ...]:
        with ask(serving, trees.description, own) as reply:
            fd = reply.mount.fileno()
            mount_api.move_mount(fd, "/mnt")
            attributes = (MountAttr.NOSUID, MountAttr.NODEV, MountAttr.RDONLY)
            return (
                Path("/mnt/big").read_bytes() == BIG,
                Path("/mnt/private").read_bytes() == b"private" * 100,
                os.stat("/mnt/directory/below/of-user").st_uid,
                [errno_of(lambda a=a: mount_api.mount_setattr(fd, clear=a)) for a in attributes],  # type: ignore[misc]
            )

    assert in_container(work) == (True, True, 1000, ["EPERM"] * 3)


def test_an_image_needs_contents_that_cannot_change(serving: Daemon, trees: Trees, own: Path) -> None:
    with ask_as_user(serving, trees.image, trees.objects) as reply:
        assert reply.decision["trustedBy"] == "root-owned"
        assert "only root can change the contents" in str(reply.decision["reason"])
        assert Path(f"/proc/self/fd/{reply.mount.fileno()}/big").read_bytes() == BIG
    name, text = refusal(serving, trees.image, own)
    assert name == "NotImmutable"
    assert "caller-owned" in text
    # Root's own, but for a directory in it.
    inner = trees.objects / "zz"
    inner.mkdir()
    os.chown(inner, USER, USER)
    try:
        assert refusal(serving, trees.image, trees.objects)[0] == "NotImmutable"
    finally:
        inner.rmdir()


def test_what_is_refused(serving: Daemon, trees: Trees, own: Path, place: Path) -> None:
    others = Path(tempfile.mkdtemp(prefix="others-", dir=place))
    others.chmod(0o755)
    os.chown(others, OTHER, OTHER)
    assert refusal(serving, trees.description, others)[0] == "DeniedByPolicy"
    others.rmdir()
    assert refusal(serving, trees.description, own, read_only=False)[0] == "NotSupported"
    assert refusal(serving, trees.description, own, file_system_type="ext4")[0] == "InvalidParameter"
    assert refusal(serving, trees.description, *[own] * 17)[0] == "LimitExceeded"
    with OwnedFd(os.open(own, os.O_PATH)) as objects, OwnedFd(memfd(HEAD)) as text:
        source: dict[str, object] = {"composefs": {"dumpFileDescriptor": 0, "objectsFileDescriptors": [1]}}
        fds = [text.fileno(), objects.fileno()]
        assert outcome(lambda: mount_fds(serving.socket, source, fds))[0] == "BadFileDescriptor"
    with OwnedFd(os.open(own, os.O_RDONLY)) as objects, OwnedFd(memfd(HEAD, 0)) as text:
        fds = [text.fileno(), objects.fileno()]
        name, said = outcome(lambda: mount_fds(serving.socket, source, fds))
        assert name == "NotImmutable"
        assert "F_SEAL_WRITE" in said
        source = {"layers": [source, source]}
        assert outcome(lambda: explain(serving.socket, source, fds))[0] == "InvalidParameter"


def memfd(data: bytes, seals: int = SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def test_a_rule_can_want_contents_to_be_checked(
    start: Callable[..., Daemon], trees: Trees, own: Path
) -> None:
    daemon = start(DESCRIPTIONS.replace('"regenerated"', '"composefs-verity"'))
    name, text = refusal(daemon, trees.description, own)
    assert name == "NotImmutable"
    assert "fs-verity" in text


def test_without_the_program(start: Callable[..., Daemon], trees: Trees, own: Path) -> None:
    program = shutil.which("mkcomposefs")
    assert program

    def hidden() -> None:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        call("mount", b"/dev/null", program.encode(), None, BIND, None)

    daemon = start(DESCRIPTIONS, preexec_fn=hidden)
    name, text = refusal(daemon, trees.description, own)
    assert name == "NotSupported"
    assert "without mkcomposefs" in text
    assert not list((daemon.directory / "state/regenerated/incoming").iterdir())


def test_it_is_listed_and_taken_back(serving: Daemon, trees: Trees, own: Path) -> None:
    with ask_as_user(serving, trees.description, own) as reply, Client(str(serving.socket)) as client:
        listed = client.call("List", {"all": True}, [])[0]["mounts"]
        assert isinstance(listed, list)
        (found,) = [each for each in listed if each["id"] == reply.mounts[0]["id"]]
        assert (found["fileSystemType"], found["trustedBy"]) == ("overlay", "regenerated")
        assert (found["rule"], found["digest"]) == ("descriptions", reply.decision["digest"])
        told = client.call("io.mountd.Admin.Revoke", {"digest": found["digest"]}, [])[0]
        assert "held" in told


def test_ids_of_a_namespace(serving: Daemon, trees: Trees) -> None:
    with user_namespace(RANGE, owner=0) as namespace:
        path = f"/proc/self/fd/{namespace.fileno()}"
        with ask(serving, trees.description, trees.objects, userns=path) as reply:
            assert (
                os.stat("directory/below/of-user", dir_fd=reply.mount.fileno()).st_uid == RANGE[0][1] + 1000
            )


def test_a_top_takes_what_is_written(start: Callable[..., Daemon], trees: Trees, containers: None) -> None:
    """Over the image and over its description; what is in the objects stays as it is."""
    daemon = start(trusting(trees.place) + DESCRIPTIONS + TMPFS_RULE)
    before = {path: path.stat().st_mtime_ns for path in trees.objects.rglob("*")}

    def work() -> tuple[object, ...]:
        found: list[object] = []
        for source in (trees.image, trees.description):
            with ask(daemon, source, trees.objects, top="tmpfs:1M") as reply:
                top = Path(f"/proc/self/fd/{reply.mount.fileno()}")
                with (top / "big").open("ab") as file:
                    file.write(b"more")
                (top / "small").unlink()
                found.append((reply.mounts[0]["fileSystemType"], reply.mounts[0]["readOnly"]))
                found.append((top / "big").read_bytes() == BIG + b"more")
                found.append("small" in os.listdir(top))
        return tuple(found)

    assert in_container(work) == (("overlay", False), True, False) * 2
    assert {path: path.stat().st_mtime_ns for path in trees.objects.rglob("*")} == before


def test_with_the_capabilities_of_the_unit(
    start: Callable[..., Daemon], trees: Trees, own: Path, containers: None
) -> None:
    daemon = start(trusting(trees.place) + DESCRIPTIONS, preexec_fn=drop_others)
    with ask_as_user(daemon, trees.description, own) as reply:
        assert Path(f"/proc/self/fd/{reply.mount.fileno()}/big").read_bytes() == BIG

    def work() -> tuple[bytes, bytes]:
        with ask(daemon, trees.image, trees.objects) as reply:
            top = f"/proc/self/fd/{reply.mount.fileno()}"
            return Path(f"{top}/private").read_bytes()[:7], Path(
                f"{top}/directory/below/of-user"
            ).read_bytes()[:7]

    assert in_container(work) == (b"private", b"of 1000")


def test_on_the_command_line(serving: Daemon, trees: Trees, own: Path, installed: Path) -> None:
    def work() -> Told:
        command = [installed / "bin/mountctl", "mount", "--objects", trees.objects, "--digest", trees.digest]
        environment = {"PATH": os.environ["PATH"], "MOUNTD_SOCKET": str(serving.socket)}
        subprocess.run([*command, f"composefs:{trees.description}", "/mnt"], env=environment, check=True)
        return listing("/mnt")

    assert in_mount_namespace(work) == by_mount_composefs(trees)
