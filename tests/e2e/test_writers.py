"""Images that somebody goes on writing to, by every way that there is to write to a file."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import mmap
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.errors import InUse, InvalidImage, NotImmutable
from mountd.fds import OwnedFd
from mountd.store.store import Store
from tests.container import USER, as_user, forked
from tests.daemon import Daemon
from tests.e2e.calls import mount, mount_fds, mounted, outcome, text_of
from tests.e2e.conftest import trusting
from tests.e2e.trust import Case, Makers, digest_of, key_sections, rule, source, users_file
from tests.images import build_image, build_tree
from tests.store import ROOT

HERE = Path(__file__).parent
WAYS = ("write", "mmap", "direct", "splice", "uring")
TEXT = b"hello from the image\n"
ROUNDS = 60
STORED = rule("stored and signed", "any = true", '"stored"', ', signature = "ed25519"')
LARGE = 4 << 20


@pytest.fixture(scope="module")
def writer_program(place: Path) -> Path:
    program = place / "writer"
    subprocess.run(["gcc", "-O1", "-Wall", "-Werror", "-o", program, HERE.parent / "writer.c"], check=True)
    return program


@contextlib.contextmanager
def writing(program: Path, path: Path, position: int, way: str) -> Iterator[None]:
    """Somebody changes the byte at `position` and changes it back, all the time."""
    block = position - position % 4096
    arguments = [str(program), str(path), str(block), str(position - block), way]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, user=USER, group=USER, extra_groups=[]
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield
            assert process.poll() is None, "the writer has ended"
        finally:
            process.kill()


def padded(data: bytes) -> bytes:
    """Whole blocks: what is written with O_DIRECT."""
    return data.ljust(len(data) + -len(data) % 4096, b"\0")


def forget_pages() -> None:
    """Have everything read from the disk again."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@pytest.mark.parametrize("way", WAYS)
def test_a_signed_file_that_is_written_to(
    begin: Callable[[str], Case], makers: Makers, place: Path, writer_program: Path, way: str
) -> None:
    """Whoever verifies sees the one or the other; what is mounted is what was signed, now and later."""
    case = begin(key_sections(makers.keys) + STORED)
    good = padded(case.data)
    signature, position, store = makers.own["ed25519"](good), good.index(TEXT), case.store()
    found = []

    def ask() -> str:
        with OwnedFd(os.open(path, os.O_RDWR)) as fd:
            try:
                reply = mount_fds(case.daemon.socket, source(signature), [fd.fileno()])
            except (NotImmutable, InvalidImage):
                return ""
            with reply:
                before = text_of(reply)
                return before if text_of(reply) == before else "changed while it was mounted"

    with users_file(place, good) as path, writing(writer_program, path, position, way):
        for number in range(ROUNDS):
            found.append(as_user(ask))
            if number % 10 == 9:
                check_stored(store, digest_of(good))
    assert set(found) <= {"", TEXT.decode()}
    with users_file(place, good) as path:
        assert as_user(ask) == TEXT.decode()
    check_stored(store, digest_of(good))


def check_stored(store: Store, digest: str) -> None:
    """What is stored is what its name says, also on the disk; away with it, so that it is stored anew."""
    forget_pages()
    for record in store.records():
        assert record.digest == digest
        store.verify(record.digest, ROOT)
        with contextlib.suppress(InUse):
            store.remove(record.digest, 0)


@pytest.mark.parametrize("way", WAYS)
def test_a_mount_of_what_is_stored_while_the_file_is_written_to(
    begin: Callable[[str], Case], makers: Makers, place: Path, writer_program: Path, way: str
) -> None:
    """Under a live mount, and once what it had read is forgotten, too."""
    case = begin(key_sections(makers.keys) + STORED)
    good = padded(case.data)
    signature = makers.own["ed25519"](good)
    with (
        users_file(place, good) as path,
        OwnedFd(os.open(path, os.O_RDWR)) as fd,
        mount_fds(case.daemon.socket, source(signature), [fd.fileno()]) as reply,
        writing(writer_program, path, good.index(TEXT), way),
    ):
        for _ in range(5):
            forget_pages()
            assert text_of(reply) == TEXT.decode()


def test_a_file_that_is_moved_to_where_it_is_trusted(
    start: Callable[[str], Daemon], images: dict[str, Path], place: Path
) -> None:
    """Who has it open for writing still can; a copy is nobody else's."""
    trusted = place / "moved-to"
    trusted.mkdir(mode=0o755)
    daemon = start(trusting(trusted))
    with users_file(place, images["erofs"].read_bytes()) as path, OwnedFd(os.open(path, os.O_RDWR)) as fd:
        moved = path.rename(trusted / "moved.raw")
        os.chown(moved, 0, 0)
        moved.chmod(0o644)
        refused = as_user(lambda: outcome(lambda: mount(daemon.socket, moved)))
        assert refused[0] == "DeniedByPolicy"
        assert "somebody has it open for writing" in refused[1]
        copied = Path(shutil.copy(moved, trusted / "copied.raw"))
        assert as_user(lambda: read(daemon, copied)) == TEXT.decode()
        position = moved.read_bytes().index(TEXT)
        os.pwrite(fd.fileno(), TEXT.upper(), position)
        assert as_user(lambda: read(daemon, copied)) == TEXT.decode()
    assert as_user(lambda: read(daemon, moved)) == TEXT.upper().decode()


def read(daemon: Daemon, path: Path) -> str:
    with mounted(daemon.socket, path) as reply:
        return text_of(reply)


@pytest.fixture(scope="module")
def cut(place: Path) -> dict[str, Path]:
    """Images with a large file, whose end is going to be cut off, in a directory that a rule trusts."""
    tree = build_tree(place / "tree-cut")
    (tree / "large").write_bytes(os.urandom(LARGE))
    directory = place / "cut"
    directory.mkdir(mode=0o755)
    return {
        type: build_image(type, tree, directory / f"{type}.raw") for type in ("erofs", "squashfs", "ext4")
    }


@pytest.mark.parametrize("how", ["truncate", "punch"])
@pytest.mark.parametrize("type", ["erofs", "squashfs", "ext4"])
def test_an_image_that_is_cut_off_below_its_mount(
    start: Callable[[str], Daemon], cut: dict[str, Path], images: dict[str, Path], type: str, how: str
) -> None:
    """Root can do that to a plain image of root's; it is an error for who reads it, and nobody else's."""
    image = cut[type]
    whole = image.read_bytes()
    neighbouring = Path(shutil.copy(images["erofs"], image.with_name("neighbour.raw")))
    daemon = start(trusting(image.parent))
    try:
        with mounted(daemon.socket, image) as reply, mounted(daemon.socket, neighbouring) as neighbour:
            forget_pages()
            with image.open("r+b") as file:
                if how == "truncate":
                    file.truncate(len(whole) // 4)
                else:
                    span = f"--offset={len(whole) // 4} --length={len(whole)}"
                    subprocess.run(["fallocate", "--punch-hole", *span.split(), image], check=True)
            forget_pages()
            content = forked(lambda: read_large(reply.mount.fileno()))
            assert content in ("EIO", "EUCLEAN", "EFSCORRUPTED", "other bytes"), content
            assert how == "punch" or content != "other bytes" or type == "erofs"
            assert forked(lambda: map_large(reply.mount.fileno())) in ("read", "SIGBUS")
            # The neighbour, and whoever comes now, notice nothing.
            assert text_of(neighbour) == TEXT.decode()
            with mounted(daemon.socket, neighbouring) as another:
                assert text_of(another) == TEXT.decode()
    finally:
        image.write_bytes(whole)


def read_large(mount_fd: int) -> str:
    """What reading the large file to its end comes to."""
    try:
        with open(os.open("large", os.O_RDONLY, dir_fd=mount_fd), "rb") as file:
            file.read()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "other bytes"


def map_large(mount_fd: int) -> str:
    """What reading it through a mapping comes to, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            fd = os.open("large", os.O_RDONLY, dir_fd=mount_fd)
            sum(mmap.mmap(fd, 0, prot=mmap.PROT_READ)[::4096])
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return "read" if os.WIFEXITED(status) else signal.Signals(os.WTERMSIG(status)).name
