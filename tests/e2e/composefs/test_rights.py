"""composefs: who reads what, whose it looks, and what cannot be got that way."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from mountd.client import MountReply, attach
from mountd.fds import OwnedFd
from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from tests.container import RANGE, USER, as_user, in_container, user_namespace
from tests.daemon import Daemon
from tests.e2e.calls import errno_of, explain, mount_fds, outcome
from tests.e2e.composefs.calls import ask, ask_as_user, refusal
from tests.e2e.composefs.trees import BIG, DESCRIPTIONS, HEAD, Trees, described
from tests.e2e.conftest import trusting
from tests.rights import drop_others

OTHER = USER + 7
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def test_nothing_is_read_that_is_not_for_the_caller(serving: Daemon, own: Path, place: Path) -> None:
    """Modes are what the description says; what is read is the caller's, or what everybody may read."""
    files = {
        "roots": (0, 0, 0o600),
        "others": (OTHER, OTHER, 0o640),
        "mine": (USER, USER, 0o400),
        "open": (0, 0, 0o644),
        "for others than mine": (OTHER, USER, 0o604),
    }
    objects = dict(enumerate(files))
    for name, (uid, gid, mode) in files.items():
        (own / name).write_text("secret\n")
        os.chown(own / name, uid, gid)
        (own / name).chmod(mode)
    lines = [
        b"/%d 7 100644 1 %d %d 0 0.0 %s - -\n" % (number, USER, USER, name.replace(" ", "\\x20").encode())
        for number, name in objects.items()
    ]
    path = described(place, HEAD + b"".join(lines))
    with ask_as_user(serving, path, own) as reply:
        # As root, who could read all of it elsewhere.
        assert {name: read(reply, str(number)) for number, name in objects.items()} == {
            "roots": "EACCES",
            "others": "EACCES",
            "mine": "secret\n",
            "open": "secret\n",
            "for others than mine": "secret\n",
        }
    path.unlink()


def test_objects_on_a_file_system_of_a_user_namespaces(
    serving: Daemon, place: Path, containers: None
) -> None:
    """There the kernel takes the caller's id for another's, so that not even its own could be read."""
    path = described(place, HEAD + b"/f 7 100644 1 0 0 0 0.0 o - -\n")
    path.chmod(0o644)
    at = Path(tempfile.mkdtemp(prefix="objects-", dir=place))

    def work() -> tuple[str, str]:
        with FsContext.open("tmpfs") as context:
            context.create()
            with context.mount(MountAttr(0)) as mount:
                attach(mount.fileno(), str(at))
        (at / "o").write_text("object\n")
        return outcome(lambda: ask(serving, path, at))

    name, text = in_container(work)
    at.rmdir()
    path.unlink()
    assert name == "NotSupported"
    assert "mounted in a user namespace" in text


def test_an_object_is_a_file_in_its_directory(serving: Daemon, own: Path, place: Path) -> None:
    """No symbolic link is followed, to it or on the way to it, and nothing but a file is opened."""
    beside = place / "beside the objects"
    beside.write_text("secret\n")
    (own / "file").write_text("secret\n")
    (own / "in").mkdir()
    (own / "in/file").write_text("secret\n")
    (own / "link").symlink_to("file")
    (own / "out").symlink_to(beside)
    (own / "up").symlink_to("..")
    (own / "across").symlink_to("in")
    os.mkfifo(own / "pipe")
    objects = ["file", "in/file", "link", "out", f"up/{own.name}/file", "across/file", "pipe"]
    # Who follows the links comes to a file each time.
    assert all((own / each).read_text() == "secret\n" for each in objects if each != "pipe")
    text = HEAD + b"".join(
        b"/%d 7 100644 1 0 0 0 0.0 %s - -\n" % (number, each.encode()) for number, each in enumerate(objects)
    )
    path = described(place, text)
    with ask_as_user(serving, path, own) as reply:
        found = [read(reply, str(number)) for number in range(len(objects))]
    assert found == ["secret\n", "secret\n", "ENOENT", "ENOENT", "ELOOP", "ELOOP", "ENOENT"]
    path.unlink()
    beside.unlink()


def read(reply: MountReply, name: str) -> str:
    """What is in a file, or the error that reading it comes to."""
    try:
        return Path(f"/proc/self/fd/{reply.mount.fileno()}/{name}").read_text()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


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
    # Root's own, but for a directory in it, or for an object.
    inner = trees.objects / "zz"
    inner.mkdir()
    try:
        os.chown(inner, USER, USER)
        assert refusal(serving, trees.image, trees.objects)[0] == "NotImmutable"
    finally:
        inner.rmdir()
    objects = [each for each in trees.objects.rglob("*") if each.is_file()]
    assert {each.parent.parent for each in objects} == {trees.objects}
    try:
        os.chown(objects[0], USER, USER)
        assert refusal(serving, trees.image, trees.objects)[0] == "NotImmutable"
    finally:
        os.chown(objects[0], 0, 0)


def test_what_is_refused(serving: Daemon, trees: Trees, own: Path, place: Path) -> None:
    others = Path(tempfile.mkdtemp(prefix="others-", dir=place))
    others.chmod(0o755)
    os.chown(others, OTHER, OTHER)
    assert refusal(serving, trees.description, others)[0] == "DeniedByPolicy"
    others.rmdir()
    assert refusal(serving, trees.description, own, read_only=False)[0] == "NotSupported"
    assert refusal(serving, trees.description, own, file_system_type="ext4")[0] == "InvalidParameter"
    assert refusal(serving, trees.description, *[own] * 17)[0] == "LimitExceeded"
    name, text = refusal(serving, trees.description, own, own)
    assert name == "InvalidParameter"
    assert "source.composefs.objectsFileDescriptors: two of the directories are the same" in text
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


def test_ids_of_a_namespace(serving: Daemon, trees: Trees) -> None:
    with user_namespace(RANGE, owner=0) as namespace:
        path = f"/proc/self/fd/{namespace.fileno()}"
        with ask(serving, trees.description, trees.objects, userns=path) as reply:
            assert (
                os.stat("directory/below/of-user", dir_fd=reply.mount.fileno()).st_uid == RANGE[0][1] + 1000
            )


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
