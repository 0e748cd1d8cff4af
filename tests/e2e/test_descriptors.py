"""Descriptors of the wrong kind, and more than there is room for: cases 8 to 13 of the threat model.

Case 8 is answered with BadFileDescriptor, and not as a lack of resources: the kernel reports a full table
and a descriptor that a security module kept back in the same way. This kernel has no /proc/kcore (case 10);
other files of /proc stand for it. Of case 13, this is the half in which the daemon does not wait;
test_hangs.py has the other one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.client import attach
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation
from mountd.kernel.libc import call
from tests.container import in_container
from tests.daemon import Daemon
from tests.e2e.conftest import trusting
from tests.fuse import Fuse, Op
from tests.process import in_child
from tests.rogue import ATTACKER, Raw, ask, error, eventually, mount_call, neighbour, opened, settled

IO_URING_SETUP, USERFAULTFD = 425, 323  # x86_64 and, for the first, everywhere
IMAGE = "source.imageFileDescriptor"
FEW_DESCRIPTORS = 64
AT_ONCE = 0.1  # seconds: the bound of cases 10 and 16
TRIES = 5


def lowest_free(pid: int) -> int:
    """The number that the next descriptor of a process gets."""
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in range(len(taken) + 1) if number not in taken)


def test_a08_no_descriptor_left_in_the_worker(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    daemon = start(trusting(images["erofs"].parent))
    image = images["erofs"]
    settled(daemon)
    workers, limits = daemon.workers, {}
    for pid in workers:
        # Room for the connection, and for one of two descriptors.
        limits[pid] = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free(pid) + 2, limits[pid][1]))
    with opened(image, image, image) as fds, Raw(daemon) as raw:
        raw.send(mount_call(), fds)
        reply = raw.reply()
        assert error(reply) == "BadFileDescriptor"
        assert reply is not None
        assert "lost" in reply["parameters"]["reason"]
        assert raw.ended()
    assert eventually(lambda: len(set(daemon.workers) & set(workers)) == 1), "the worker was not replaced"
    for pid in set(daemon.workers) & set(workers):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits[pid])
    with opened(image) as fds:
        assert error(ask(daemon, mount_call(), fds)) == ""


def test_a09_bomb_of_sockets_that_carry_sockets(daemon: Daemon, images: dict[str, Path]) -> None:
    """The kernel stops the sender; the daemon takes at most one message's worth of them."""

    def attack() -> int:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_DESCRIPTORS, FEW_DESCRIPTORS))
        with Raw(daemon) as raw:
            refused = 0
            for _ in range(FEW_DESCRIPTORS):
                one, other = socket.socketpair()
                with one, other:
                    try:
                        # Each end in the queue of the other, and the connection in its own.
                        socket.send_fds(one, [b"x"], [other.fileno(), raw.fileno()])
                        socket.send_fds(other, [b"x"], [one.fileno(), raw.fileno()])
                        socket.send_fds(raw.socket, [b" "], [one.fileno(), other.fileno(), raw.fileno()])
                    except OSError:
                        refused += 1
            return refused

    def as_attacker() -> None:
        os.setgroups([])
        os.setresgid(ATTACKER, ATTACKER, ATTACKER)
        os.setresuid(ATTACKER, ATTACKER, ATTACKER)
        assert attack() > 0

    with neighbour(daemon, images["erofs"]):
        in_child(as_attacker)


@contextlib.contextmanager
def several(daemon: Daemon) -> Iterator[dict[str, int]]:
    """One descriptor of every kind that is no image, by name."""
    with contextlib.ExitStack() as stack:

        def file(path: str, flags: int) -> int:
            fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, fd)
            return fd

        def raw_fd(fd: int) -> int:
            assert fd >= 0
            stack.callback(os.close, fd)
            return fd

        directory = daemon.directory
        reader, writer = os.pipe()
        os.write(writer, b"data")
        one, other = socket.socketpair()
        other.send(b"data")
        stack.enter_context(one)
        stack.enter_context(other)
        connection = stack.enter_context(Raw(daemon))
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        pidfd = stack.enter_context(namespaces.pidfd_open(os.getpid()))
        unnamed = file(str(directory), os.O_RDWR | os.O_TMPFILE)
        os.write(unnamed, b"x" * 8192)
        memory = raw_fd(os.memfd_create("image"))
        os.write(memory, b"x" * 8192)
        yield {
            "a pipe": raw_fd(reader),
            "the other end of a pipe": raw_fd(writer),
            "a socket": one.fileno(),
            "a connection to mountd": connection.fileno(),
            "a listening socket": listening.fileno(),
            "an eventfd": raw_fd(os.eventfd(7)),
            "an epoll": stack.enter_context(select.epoll()).fileno(),
            "a pidfd": pidfd.fileno(),
            "a user namespace": file("/proc/self/ns/user", os.O_RDONLY),
            "a directory": file(str(directory), os.O_RDONLY | os.O_DIRECTORY),
            "/dev/zero": file("/dev/zero", os.O_RDONLY),
            "/dev/null": file("/dev/null", os.O_RDWR),
            "a terminal's master": file("/dev/ptmx", os.O_RDWR | os.O_NOCTTY),
            "a block device": file("/dev/loop0", os.O_RDONLY),
            "the kernel's symbols": file("/proc/kallsyms", os.O_RDONLY),
            "a process's memory": file("/proc/self/mem", os.O_RDWR),
            "a file of /proc": file("/proc/self/maps", os.O_RDONLY),
            "a file of /sys": file("/sys/kernel/uevent_seqnum", os.O_RDONLY),
            "write-only": file(str(directory / "log"), os.O_WRONLY),
            "append": file(str(directory / "log"), os.O_RDWR | os.O_APPEND),
            "direct": file(str(directory / "log"), os.O_RDONLY | os.O_DIRECT),
            "a path": file(str(directory / "log"), os.O_PATH),
            "a link": file("/proc/self/exe", os.O_PATH | os.O_NOFOLLOW),
            "a file without a name": unnamed,
            "memory": memory,
            "a userfaultfd": raw_fd(ctypes.CDLL(None).syscall(USERFAULTFD, os.O_CLOEXEC)),
        }


# What the kernel calls a regular file, though no image can be in it; it is empty, or is judged by its bytes.
REGULAR = {
    "a pidfd": ("InvalidImage", "UnsupportedFileSystem", "BadFileDescriptor"),
    "a user namespace": ("InvalidImage", "UnsupportedFileSystem", "BadFileDescriptor"),
    "the kernel's symbols": ("InvalidImage", "UnsupportedFileSystem", "BadFileDescriptor"),
    "a process's memory": ("InvalidImage", "UnsupportedFileSystem", "BadFileDescriptor"),
    "a file of /proc": ("InvalidImage", "UnsupportedFileSystem", "BadFileDescriptor"),
    "a file of /sys": ("InvalidImage", "UnsupportedFileSystem", "BadFileDescriptor"),
    "a file without a name": ("UnsupportedFileSystem",),
    "memory": ("UnsupportedFileSystem",),
}


def quickest(daemon: Daemon, fds: list[int], seconds: float = AT_ONCE) -> tuple[str | None, float]:
    """Ask for a mount until the answer comes within `seconds`, a few times at most.

    Return the answer, always the same, and the shortest time that it took: the machine can only add to what
    a refusal costs, while a wait for somebody is there each time.
    """
    said, times = set(), []
    while not times or (min(times) > seconds and len(times) < TRIES):
        begin = time.monotonic()
        said.add(error(ask(daemon, mount_call(), fds)))
        times.append(time.monotonic() - begin)
    assert len(said) == 1, said
    return said.pop(), min(times)


def test_a10_descriptors_of_every_wrong_type(daemon: Daemon, images: dict[str, Path]) -> None:
    with neighbour(daemon, images["erofs"]), several(daemon) as fds:
        found, slow = {}, {}
        for name, fd in fds.items():
            found[name], slow[name] = quickest(daemon, [fd])
        # Nothing was read from them.
        assert os.read(fds["a pipe"], 100) == b"data"
        assert os.read(fds["a socket"], 100) == b"data"
        assert os.eventfd_read(fds["an eventfd"]) == 7
    wrong = {
        name: said for name, said in found.items() if said not in REGULAR.get(name, ("BadFileDescriptor",))
    }
    assert not wrong
    assert max(slow.values()) <= AT_ONCE, slow


def test_a10_the_kernel_does_not_pass_an_io_uring_on(daemon: Daemon) -> None:
    ring = ctypes.CDLL(None).syscall(ctypes.c_long(IO_URING_SETUP), 1, ctypes.create_string_buffer(120))
    assert ring >= 0
    with Raw(daemon) as raw, pytest.raises(OSError, match="Invalid argument"):
        raw.send(mount_call(), [ring])
    os.close(ring)


def test_a10_the_namespace_is_something_else(daemon: Daemon, images: dict[str, Path]) -> None:
    with several(daemon) as fds, opened(images["erofs"], "/proc/self/ns/mnt", "/proc/self/ns/net") as more:
        kinds = fds | {"a mount namespace": more[1], "a network namespace": more[2]}
        del kinds["a user namespace"]
        found = {
            name: error(ask(daemon, mount_call(userNamespaceFileDescriptor=1), [more[0], fd]))
            for name, fd in kinds.items()
        }
    assert set(found.values()) == {"BadFileDescriptor"}, found


def test_a11_path_of_a_file_that_the_caller_cannot_read(
    daemon: Daemon, images: dict[str, Path], place: Path
) -> None:
    secret = place / "trusted/secret.raw"
    secret.write_bytes(images["erofs"].read_bytes())
    secret.chmod(0o600)

    def work() -> None:
        os.setresgid(ATTACKER, ATTACKER, ATTACKER)
        os.setresuid(ATTACKER, ATTACKER, ATTACKER)
        with pytest.raises(PermissionError):
            os.open(secret, os.O_RDONLY)
        with opened(secret, flags=os.O_PATH) as fds:
            reply = ask(daemon, mount_call(), fds)
        assert error(reply) == "BadFileDescriptor"
        assert "O_PATH" in reply["parameters"]["reason"]

    with neighbour(daemon, images["erofs"]):
        in_child(work)
    secret.unlink()


def test_a12_writable_mount_of_a_read_only_descriptor(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path, containers: None
) -> None:
    """Either it is refused, or the mount is read-only; with a writable descriptor the same is granted."""
    directory = place / "writable"
    directory.mkdir(mode=0o755)
    image = directory / "ext4.raw"
    image.write_bytes(images["ext4"].read_bytes())
    daemon = start(trusting(directory, access='"read-write"'))
    target = place / "target-a12"
    target.mkdir()

    def work(flags: int) -> str:
        with opened(image, flags=flags) as fds, Raw(daemon) as raw:
            raw.send(mount_call(readOnly=False), fds)
            reply = raw.reply()
            if error(reply):
                return str(error(reply))
            attach(raw.fds[0].fileno(), str(target))
            try:
                (target / "new").write_text("new")
            except OSError as failure:
                return os.strerror(failure.errno or 0)
            return "written"

    with neighbour(daemon, image):
        refused = in_container(lambda: work(os.O_RDONLY))
    assert refused != "written"
    assert refused in ("BadFileDescriptor", "DeniedByPolicy", "NotImmutable", "Read-only file system")
    assert image.read_bytes() == images["ext4"].read_bytes()


def test_a16_lease_on_the_image(daemon: Daemon, images: dict[str, Path], place: Path) -> None:
    """The holder has 45 seconds to give it up (/proc/sys/fs/lease-break-time), and nobody waits for that."""
    leased = place / "trusted/leased at once.raw"
    leased.write_bytes(images["erofs"].read_bytes())
    # The kernel says so by this signal when somebody waits for the lease.
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with opened(leased) as fds, neighbour(daemon, images["erofs"]):
            fcntl.fcntl(fds[0], fcntl.F_SETLEASE, fcntl.F_WRLCK)
            name, seconds = quickest(daemon, fds)
            fcntl.fcntl(fds[0], fcntl.F_SETLEASE, fcntl.F_UNLCK)
            assert name == "MountFailed"
            assert seconds <= AT_ONCE
            assert quickest(daemon, fds)[0] == ""
    finally:
        signal.signal(signal.SIGIO, before)
        leased.unlink()


SILENT = [(), (Op.GETATTR,), (Op.STATFS,), (Op.OPEN,), (Op.READ,), (Op.GETATTR, Op.OPEN, Op.READ, Op.STATFS)]


@pytest.mark.parametrize("silent", SILENT)
def test_a13_file_of_a_fuse_server(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path, silent: tuple[Op, ...]
) -> None:
    """It is recognised without a question to its server, and answered at once."""
    daemon = start(trusting(images["erofs"].parent), start_new_session=True)
    with Fuse(place / "fuse", images["erofs"].read_bytes()) as fuse, opened(fuse.path) as fds:
        fuse.silence(*silent, session=daemon.process.pid)
        before = settled(daemon)
        with neighbour(daemon, images["erofs"]):
            assert quickest(daemon, fds)[1] <= AT_ONCE
            reply = ask(daemon, mount_call(), fds)
        assert error(reply) == "BadFileDescriptor"
        assert "FUSE" in reply["parameters"]["reason"]
        assert eventually(lambda: daemon.held() == before)
        fuse.silence()


def test_a13_fuse_is_there_only_after_the_daemon(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path
) -> None:
    """The module may be loaded by the first FUSE mount; what is looked for then is not remembered as absent.

    The daemon starts where the kernel seems to have no FUSE, with an empty directory over that of fusectl,
    and its workers are asked once before it is taken away.
    """

    def hide() -> None:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        call("mount", b"none", b"/sys/fs/fuse", b"tmpfs", 0, None)

    def show() -> None:
        with OwnedFd(os.open(f"/proc/{daemon.fork_server}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)) as inside:
            namespaces.setns(inside.fileno(), Clone.NEWNS)
        mount_api.umount("/sys/fs/fuse")

    daemon = start(trusting(images["erofs"].parent), start_new_session=True, preexec_fn=hide)
    settled(daemon)
    with (
        Fuse(place / "fuse", images["erofs"].read_bytes()) as fuse,
        opened(images["erofs"], fuse.path) as fds,
    ):
        workers = daemon.workers
        for _ in workers:
            assert error(ask(daemon, mount_call(), fds[:1])) == ""
        in_child(show)
        fuse.silence(Op.GETATTR, Op.OPEN, Op.READ, Op.STATFS, session=daemon.process.pid)
        with neighbour(daemon, images["erofs"]):
            for _ in range(2 * len(workers)):
                name, seconds = quickest(daemon, fds[1:])
                assert (name, seconds <= AT_ONCE) == ("BadFileDescriptor", True), seconds
        assert set(workers) & set(daemon.workers)
        fuse.silence()


def test_a13_close_of_a_fuse_file_fails(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path
) -> None:
    """What the server answers to the close is nobody's business: the worker goes on."""
    daemon = start(trusting(images["erofs"].parent))
    with Fuse(place / "fuse", images["erofs"].read_bytes()) as fuse:
        fuse.fail(Op.FLUSH)
        workers = daemon.workers
        fds = [os.open(fuse.path, os.O_RDONLY | os.O_CLOEXEC) for _ in range(3)]
        reply = ask(daemon, mount_call(), fds)
        for fd in fds:
            with pytest.raises(OSError, match="Input/output error"):
                os.close(fd)
        assert error(reply) == "InvalidParameter"
        assert daemon.workers == workers
