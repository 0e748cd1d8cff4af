"""The rooms that find out facts, each by itself: caller, source and evidence."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mountd.caller.identify import given_namespace, identify, peer_namespace, pin
from mountd.caller.model import Caller
from mountd.errors import BadFileDescriptor, InvalidImage, PeerGone, UnsupportedFileSystem
from mountd.evidence import location
from mountd.fds import OwnedFd
from mountd.kernel import compat, fuse, libc, namespaces, paths
from mountd.kernel.flags import Clone
from mountd.source import confined, descriptor
from mountd.source.descriptor import inspect_descriptor
from mountd.source.model import BackingFile, FileSystem
from tests.container import USER, user_namespace
from tests.process import in_child

WHOLE = ((0, 400000, 65536),)
FIELD = "source.imageFileDescriptor"
FOUND = FileSystem("ext4", 1, 1, None, None, False)


@contextlib.contextmanager
def peer(
    become: Callable[[], object], later: Callable[[], object] = lambda: None
) -> Iterator[tuple[socket.socket, Callable[[], None]]]:
    """Return the accepted connection of a process that has become somebody, and what lets it go on."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                become()
                with socket.socket(socket.AF_UNIX) as mine:
                    mine.connect(listener.getsockname())
                    os.read(reader, 1)
                    later()
                    mine.send(b"x")
                    signal.pause()
            finally:
                os._exit(1)
        os.close(reader)
        connection, _ = listener.accept()

        def go_on() -> None:
            os.write(writer, b"x")
            connection.recv(1)

        try:
            with connection:
                yield connection, go_on
        finally:
            os.close(writer)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def identified(connection: socket.socket, connected_from: tuple[int, int] | None = None) -> Caller:
    with pin(connection) as pidfd:
        return identify(connection, pidfd.fileno(), connected_from)


def become(uid: int, groups: tuple[int, ...] = ()) -> None:
    os.setgroups(groups)
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def enter(*userns: OwnedFd, uid: int = 0) -> None:
    for each in userns:
        namespaces.setns(each.fileno(), Clone.NEWUSER)
    become(uid)


def test_a_user_of_the_host() -> None:
    with peer(lambda: become(USER, (7, 8))) as (connection, _):
        caller = identified(connection)
        assert (caller.uid, caller.gid, caller.groups) == (USER, USER, {7, 8})
        assert caller.on_host
        assert not caller.is_host_root
        assert caller.owner_uid == USER
        assert peer_namespace(connection) == (here(), (USER, 0))


def here() -> tuple[int, int]:
    status = os.stat("/proc/self/ns/user")
    return status.st_dev, status.st_ino


@pytest.mark.parametrize(("inside", "uid", "charged"), [(0, 400000, USER), (5, 400005, USER)])
def test_a_member_of_a_container(inside: int, uid: int, charged: int) -> None:
    with (
        user_namespace(WHOLE, owner=USER) as userns,
        peer(lambda: enter(userns, uid=inside)) as (connection, _),
    ):
        caller = identified(connection, namespaces.identity(userns.fileno()))
        assert (caller.uid, caller.gid, caller.owner_uid) == (uid, uid, charged)
        assert not caller.on_host
        space = caller.user_namespace
        assert (space.dev, space.ino) == namespaces.identity(userns.fileno())
        assert (space.owner_uid, space.host_uid(0), space.host_gid(65535)) == (USER, 400000, 465535)
        assert space.host_uid(65536) is None


def test_the_owner_of_the_outermost_namespace_pays() -> None:
    """And not those who made the ones in it, as whoever has a range can be any of them."""
    with (
        user_namespace(WHOLE, owner=USER) as outer,
        user_namespace(((0, 1000, 9),), owner=7, below=outer.fileno()) as middle,
        user_namespace(((0, 3, 1),), owner=2, below=middle.fileno()) as inner,
        peer(lambda: enter(outer, middle, inner)) as (connection, _),
    ):
        caller = identified(connection)
        assert (caller.uid, caller.owner_uid) == (401003, USER)
        assert peer_namespace(connection) == (namespaces.identity(inner.fileno()), (USER, 0))
        given = given_namespace(inner.fileno(), caller)
        chain = [(*namespaces.identity(each.fileno()), owner) for each, owner in
                 ((inner, 401002), (middle, 400007), (outer, USER))]  # fmt: skip
        assert list(given.chain) == chain
        assert given.namespace == caller.user_namespace
        above = given_namespace(middle.fileno(), caller)
        assert list(above.chain) == chain[1:]
        assert above.namespace.host_uid(8) == 401008


def test_who_has_moved_or_ended_is_gone() -> None:
    connected_from = here()
    with peer(lambda: None, lambda: namespaces.unshare(Clone.NEWUSER)) as (connection, go_on):
        identified(connection, connected_from)
        go_on()
        with pytest.raises(PeerGone, match="no longer in the user namespace"):
            identified(connection, connected_from)
    with peer(lambda: None) as (connection, _), pin(connection) as pidfd:
        signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
        deadline = time.monotonic() + 5
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                compat.check_alive(pidfd.fileno())  # a zombie answers; its namespaces are gone
                with contextlib.suppress(PeerGone):
                    identify(connection, pidfd.fileno())
                    continue
                break
        for ask in (lambda: identify(connection, pidfd.fileno()), lambda: peer_namespace(connection)):
            with pytest.raises(PeerGone, match="has ended"):
                ask()


def test_a_given_descriptor_that_is_no_user_namespace() -> None:
    with peer(lambda: None) as (connection, _):
        caller = identified(connection)
        for path in ("/proc/self/ns/mnt", "/dev/null", "/"):
            with (
                OwnedFd(os.open(path, os.O_RDONLY)) as fd,
                pytest.raises(BadFileDescriptor, match="it is not a user namespace"),
            ):
                given_namespace(fd.fileno(), caller)


def opened(path: str, flags: int) -> Callable[[Path], int]:
    return lambda image: os.open(path or image, flags)


def pipe(_: Path) -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (opened("", os.O_PATH), "opened with O_PATH"),
        (opened("", os.O_RDWR | os.O_APPEND), "opened with O_APPEND"),
        (opened("", os.O_RDONLY | os.O_DIRECT), "opened with O_DIRECT"),
        (opened("", os.O_WRONLY), "not open for reading"),
        (opened("/", os.O_RDONLY), "it is a directory"),
        (opened("/dev/null", os.O_RDONLY), "it is a character device"),
        (opened("/dev/loop0", os.O_RDONLY), "it is a block device"),
        (opened("/proc/self/exe", os.O_PATH | os.O_NOFOLLOW), "opened with O_PATH"),
        (pipe, "it is a pipe"),
        (lambda _: socket.socket(socket.AF_UNIX).detach(), "it is a socket"),
        (lambda _: os.eventfd(0), "it is no file"),
        (lambda _: os.pidfd_open(os.getpid()), "not a regular file"),
    ],
)
def test_descriptors_that_are_refused(
    images: dict[str, Path], make: Callable[[Path], int], reason: str
) -> None:
    with (
        OwnedFd(make(images["erofs"])) as fd,
        pytest.raises(BadFileDescriptor, match=reason) as raised,
    ):
        inspect_descriptor(fd.fileno(), FIELD)
    assert raised.value.parameters["parameter"] == FIELD


def test_a_descriptor_on_fuse(
    monkeypatch: pytest.MonkeyPatch, images: dict[str, Path], tmp_path: Path
) -> None:
    """fusectl has a directory for each connection, with the number of its device as the kernel has it."""
    monkeypatch.setattr(fuse, "CONNECTIONS", str(tmp_path))
    # What was found out about the mount is remembered.
    monkeypatch.setattr(descriptor, "mount_is_fuse", descriptor.mount_is_fuse.__wrapped__)
    device = images["erofs"].stat().st_dev
    (tmp_path / str(os.major(device) << 20 | os.minor(device))).mkdir()
    with (
        OwnedFd(os.open(images["erofs"], os.O_RDONLY)) as fd,
        pytest.raises(BadFileDescriptor, match="on a FUSE file system"),
    ):
        inspect_descriptor(fd.fileno(), FIELD)


@pytest.mark.parametrize(("flags", "writable"), [(os.O_RDONLY, False), (os.O_RDWR, True)])
def test_a_good_descriptor(images: dict[str, Path], flags: int, writable: bool) -> None:
    status = images["erofs"].stat()
    with OwnedFd(os.open(images["erofs"], flags | os.O_NONBLOCK)) as fd:
        found = inspect_descriptor(fd.fileno(), FIELD)
    expected = (status.st_size, status.st_dev, status.st_ino, 0, 0, status.st_mode)
    assert found == BackingFile(*expected, writable, str(images["erofs"]), status.st_ctime_ns)


@pytest.fixture
def backing(images: dict[str, Path]) -> BackingFile:
    with OwnedFd(os.open(images["erofs"], os.O_RDONLY)) as fd:
        return inspect_descriptor(fd.fileno(), FIELD)


def problem(backing: BackingFile, *, name_paths: bool = True) -> str | None:
    found = location.locate(backing, name_paths=name_paths)
    assert (found.location_problem is None) == (found.root_owned_path is not None)
    return found.location_problem


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (None, "it has no path"),
        ("", "it has no path"),
        ("memfd:image", "it has no path"),
        ("//etc/passwd", "not a plain one"),
        ("/etc/../etc/passwd", "not a plain one"),
        ("/etc/./passwd", "not a plain one"),
        ("/etc/passwd/", "not a plain one"),
        pytest.param("/" + "a/" * 64 + "a", "not a plain one", id="deep"),
        ("/memfd:image (deleted)", "does not exist in the mount namespace"),
        ("/no/such/file", "does not exist in the mount namespace"),
        ("/etc/passwd/file", "does not exist in the mount namespace"),
        ("/etc/passwd", "another file is at its path"),
        ("/etc", "another file is at its path"),
        ("/proc/self/exe", "a symbolic link in it"),
        ("/tmp/file", "/tmp is writable by everybody"),
        pytest.param("/" + "a" * 256, "cannot be checked (ENAMETOOLONG)", id="long"),
    ],
)
def test_paths_that_prove_nothing(backing: BackingFile, hint: str | None, text: str) -> None:
    assert problem(backing) is None
    found = problem(replace(backing, path_hint=hint))
    assert found is not None
    assert text in found


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda place: os.chown(place, USER, 0), "belongs to uid 4000, not to root"),
        (lambda place: place.chmod(0o775), "is writable by its group"),
        (lambda place: place.chmod(0o757), "is writable by everybody"),
        (lambda place: place.chmod(0o1777), "is writable by everybody"),
        (lambda place: place.chmod(0o500), None),
        (lambda place: os.chown(place, 0, USER), None),
    ],
)
@pytest.mark.parametrize("part", ["outer", "outer/inner", "outer/inner/image"])
def test_every_component_has_to_be_roots(
    scratch: Path, change: Callable[[Path], None], text: str | None, part: str
) -> None:
    inner = scratch / "outer/inner"
    inner.mkdir(parents=True)
    (inner / "image").write_bytes(b"x")
    try:
        with OwnedFd(os.open(inner / "image", os.O_RDONLY)) as fd:
            backing = inspect_descriptor(fd.fileno(), FIELD)
        assert problem(backing) is None
        change(scratch / part)
        if text is None:
            assert problem(backing) is None
        else:
            assert problem(backing) == f"{scratch / part} {text}"
            assert problem(backing, name_paths=False) == f"a part of its path {text}"
    finally:
        (inner / "image").unlink()
        inner.rmdir()
        (scratch / "outer").rmdir()


@pytest.mark.parametrize("type", ["fuse.sshfs", "fuse", "fuseblk", "nfs4", "cifs", "9p", "virtiofs", None])
def test_a_server_somewhere_on_the_way(
    monkeypatch: pytest.MonkeyPatch, backing: BackingFile, type: str | None
) -> None:
    class Info:
        fs_type = type

    location.type_of_mount.cache_clear()
    monkeypatch.setattr(location, "statmount", lambda _id: Info)
    assert "whose contents somebody else decides" in str(problem(backing))


@pytest.mark.parametrize("name", ["statx", "statmount"])
@pytest.mark.parametrize(("number", "text"), [(errno.EIO, "(EIO)"), (errno.EACCES, "(EACCES)")])
def test_what_cannot_be_checked_is_no_proof(
    monkeypatch: pytest.MonkeyPatch, backing: BackingFile, name: str, number: int, text: str
) -> None:
    location.type_of_mount.cache_clear()
    monkeypatch.setitem(libc.inject, name, number)
    found = str(problem(backing))
    assert "cannot be checked" in found
    assert text in found


def confine(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object]) -> FileSystem:
    """Recognise an image confined, with `act` instead of the parser; it gets the image's descriptor."""
    with OwnedFd(os.open("/etc/passwd", os.O_RDONLY)) as fd:
        number = fd.fileno()

        def recognise(*_: object) -> FileSystem:
            act(number)
            return FOUND

        monkeypatch.setattr(confined, "recognise", recognise)
        return confined.recognise_image(number, 1, confined=True)


def test_the_confined_child_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from outside, while it waits for the image, which is a pipe here."""
    reader, writer = os.pipe()
    monkeypatch.setattr(confined, "recognise", lambda *_: os.read(reader, 1) and FOUND)
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if confined.recognise_image(reader, 1, confined=True) == FOUND else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + 5
    while True:
        assert time.monotonic() < deadline
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children and "Seccomp:\t2" in Path(f"/proc/{children[0]}/status").read_text():
            break
        time.sleep(0.01)
    lines = Path(f"/proc/{children[0]}/status").read_text().splitlines()
    held = len(os.listdir(f"/proc/{children[0]}/fd"))
    limits = Path(f"/proc/{children[0]}/limits").read_text()
    not_dumpable = os.stat(f"/proc/{children[0]}/environ").st_uid
    os.write(writer, b"x")
    os.close(writer)
    os.close(reader)
    _, code = os.waitpid(pid, 0)
    status = dict(line.split(":\t", 1) for line in lines)
    nothing, nobody = f"{0:016x}", "\t".join(["65534"] * 4)
    assert code == 0
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {nothing}
    assert (status["Uid"], status["Gid"], status["Groups"].strip()) == (nobody, nobody, "")
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert held == 2  # the image, and the way to tell
    assert not_dumpable == 0
    for limit in ("Max open files", "Max file size", "Max core file size"):
        (line,) = [line for line in limits.splitlines() if line.startswith(limit)]
        assert line.split()[-3:-1] == ["0", "0"]


def burn(_: int) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda _: os.getppid(), "within the limits"),
        (lambda _: os.open("/etc/passwd", os.O_RDONLY), "within the limits"),
        (lambda _: socket.socket(socket.AF_UNIX), "within the limits"),
        (lambda _: os.fork(), "within the limits"),
        (lambda _: os.execv("/bin/true", ["true"]), "within the limits"),
        (lambda _: os.kill(1, 0), "within the limits"),
        (lambda _: os.setresuid(0, 0, 0), "within the limits"),
        (lambda _: libc.call("prctl", 22, 0, 0, 0, 0), "within the limits"),
        (lambda _: libc.call("unshare", Clone.NEWUSER), "within the limits"),
        (burn, "within the limits"),
        (lambda _: bytearray(1 << 30), "MemoryError"),
        (lambda _: 1 // 0, "ZeroDivisionError"),
    ],
)
def test_the_confined_child_ends_at_anything_else(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object], text: str
) -> None:
    with pytest.raises(InvalidImage, match=text):
        confine(monkeypatch, act)


def test_what_the_confined_child_says(monkeypatch: pytest.MonkeyPatch, images: dict[str, Path]) -> None:
    assert confine(monkeypatch, lambda fd: os.pread(fd, 10, 0)) == FOUND

    def refuse(error: Exception) -> Callable[[int], None]:
        def act(_: int) -> None:
            raise error

        return act

    for error in (InvalidImage("why", offset=7), UnsupportedFileSystem("why", file_system_type="ntfs")):
        with pytest.raises(type(error), match="why") as raised:
            confine(monkeypatch, refuse(error))
        assert raised.value.parameters == error.parameters
    monkeypatch.setattr(confined, "recognise", lambda *_: replace(FOUND, label="x" * (1 << 20)))
    with pytest.raises(InvalidImage, match="within the limits"):
        confined.recognise_image(0, 1, confined=True)
    monkeypatch.undo()
    for kind, image in images.items():
        with OwnedFd(os.open(image, os.O_RDONLY)) as fd:
            found = [
                confined.recognise_image(fd.fileno(), image.stat().st_size, confined=each)
                for each in (True, False)
            ]
        assert found[0] == found[1]
        assert found[0].type == kind


def test_an_image_that_cannot_be_read() -> None:
    """A file of /proc has a size of 0 and refuses to be read, here through what nothing can read."""

    def work() -> None:
        with OwnedFd(os.open("/proc/self/mem", os.O_RDONLY)) as fd:
            for each in (True, False):
                with pytest.raises(InvalidImage, match="cannot be read|could not be read"):
                    confined.recognise_image(fd.fileno(), 4096, confined=each)

    in_child(work)


def test_flags_of_a_descriptor_are_asked_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, images: dict[str, Path]
) -> None:
    """Of what was opened with O_PATH not even the status is asked, which could go to a FUSE server."""
    monkeypatch.setitem(libc.inject, "statx", errno.EIO)
    with (
        OwnedFd(os.open(images["erofs"], os.O_PATH)) as fd,
        pytest.raises(BadFileDescriptor, match="O_PATH"),
    ):
        inspect_descriptor(fd.fileno(), FIELD)
    assert paths.STATX_FLAGS[False, False] & 0x4000  # AT_STATX_DONT_SYNC


def test_the_control_group_of_a_caller() -> None:
    with peer(lambda: None) as (connection, _):
        caller = identified(connection)
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    (own,) = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    assert caller.cgroup == own


def test_a_unit_is_that_of_the_control_group_which_the_caller_is_in() -> None:
    root = next(
        Path(line.split()[4])
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.partition(" - ")[2].startswith("cgroup2 ")
    )
    service = root / "test.slice/test-mountd.slice/test-mountd.service"
    assert not service.parents[1].exists()
    service.mkdir(parents=True)
    try:

        def move() -> None:
            (service / "cgroup.procs").write_text(str(os.getpid()))

        with peer(move) as (connection, _):
            caller = identified(connection)
        assert (caller.unit, caller.slice) == ("test-mountd.service", "test-mountd.slice")
        assert caller.container is None
    finally:
        for each in (service, *list(service.parents)[:2]):
            remove_group(each)


def remove_group(path: Path) -> None:
    """Remove a control group, once its last process is gone from it."""
    for _ in range(100):
        try:
            path.rmdir()
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            time.sleep(0.02)
    path.rmdir()
