"""A throw-away child in another mount namespace: what it has, what it is, and what comes of its failures."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.errors import SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import child, visitor
from mountd.kernel.libc import call
from mountd.kernel.visitor import Visitor, visit
from tests.container import forked
from tests.fuse import Fuse, Op

ROOT = (0, 0, ())
IDS = (4000, 4001, (4002, 4003))


@pytest.fixture
def namespace() -> Iterator[int]:
    with OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY)) as fd:
        yield fd.fileno()


def test_what_it_is(namespace: int) -> None:
    """Its own ids stay root's, so that the user can neither trace nor kill it; those for files are not."""

    def work(visitor: Visitor) -> bytes:
        return f"{call('prctl', 3, 0, 0, 0, 0)}\n{Path('/proc/self/status').read_text()}".encode()

    said = visit(namespace, [], IDS, work).decode()
    lines = {line.partition(":")[0]: line.split()[1:] for line in said.splitlines()}
    assert said.startswith("0\n")  # not dumpable
    assert lines["Uid"] == ["0", "0", "0", "4000"]
    assert lines["Gid"] == ["0", "0", "0", "4001"]
    assert lines["Groups"] == ["4002", "4003"]
    capabilities = int(lines["CapEff"][0], 16)
    assert capabilities >> 21 & 1  # to mount
    assert not capabilities & 0b11111  # none to override the rights to files


def test_what_it_has(namespace: int) -> None:
    with OwnedFd(os.open("/etc", os.O_PATH)) as kept, OwnedFd(os.open("/usr", os.O_PATH)) as other:

        def work(visitor: Visitor) -> bytes:
            open_ = [name for name in range(64) if is_open(name)]
            return f"{len(open_)} {visitor.path_of(kept.fileno())} {is_open(other.fileno())}".encode()

        # The namespace, the directory of /proc, the pipe, and what is kept.
        assert visit(namespace, [kept.fileno()], IDS, work) == b"4 /etc False"


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_the_rights_of_the_user(namespace: int, tmp_path: Path) -> None:
    secret = Path("/root")
    assert not secret.stat().st_mode & 0o007, "this test needs a directory of root's alone"

    def work(_: Visitor) -> bytes:
        os.listdir(secret)
        return b""

    with pytest.raises(SyscallError) as caught:
        visit(namespace, [], IDS, work)
    assert caught.value.errno == errno.EACCES
    assert str(secret) not in str(caught.value)  # what it is called may be nobody's business


def test_a_failing_call_is_named(namespace: int) -> None:
    with pytest.raises(SyscallError, match=r"umount2.*EINVAL") as caught:
        visit(namespace, [], IDS, lambda _: bytes(call("umount2", b"/proc/self", 0)))
    assert caught.value.errno == errno.EINVAL


def test_a_child_that_says_nothing(namespace: int) -> None:
    def work(_: Visitor) -> bytes:
        raise RuntimeError

    with pytest.raises(SyscallError) as caught:
        visit(namespace, [], IDS, work)
    assert caught.value.errno == errno.ECHILD


def test_what_is_no_mount_namespace() -> None:
    with (
        OwnedFd(os.open("/proc/self/ns/net", os.O_RDONLY)) as fd,
        pytest.raises(SyscallError, match="setns"),
    ):
        visit(fd.fileno(), [], IDS, lambda _: b"")


def test_one_that_hangs_is_counted_until_it_ends(
    namespace: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reaped then; while there are too many, there are no more."""
    with Fuse(tmp_path / "fuse", b"") as fuse, monkeypatch.context() as patch:
        patch.setattr(visitor, "MAXIMUM_HANGING", 2)
        fuse.silence(Op.STATFS)

        def work(_: Visitor) -> bytes:
            os.statvfs(fuse.path)
            return b""

        for count in (1, 2):
            with pytest.raises(SyscallError, match="ECHILD"):
                visit(namespace, [], ROOT, work, 0.1)
            assert child.hanging() == count
        with pytest.raises(visitor.TooManyHanging, match="EAGAIN"):
            visit(namespace, [], ROOT, lambda _: b"said", 5)
        fuse.abort()
        deadline = time.monotonic() + 10
        while child.hanging() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert visit(namespace, [], ROOT, lambda _: b"said", 5) == b"said"


def test_it_dies_with_its_parent(namespace: int) -> None:
    def parent() -> int:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:

            def work(_: Visitor) -> bytes:
                os.write(writer, str(os.getpid()).encode())
                while True:
                    os.read(held, 1)

            held, _ = os.pipe()
            try:
                visit(namespace, [writer, held], IDS, work)
            finally:
                os._exit(1)
        child = int(os.read(reader, 16))
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        return child

    child = forked(parent)
    status = Path(f"/proc/{child}/stat")
    for _ in range(1000):
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.005)
    pytest.fail("it has outlived its parent")
