"""A FUSE file system with one file, whose server can be told to stay silent: fuse(4), without a library."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import stat
import struct
import time
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

from mountd.kernel import mount_api, namespaces
from mountd.kernel.child import close_all_but, end_with_parent
from mountd.kernel.flags import Clone, Propagation, Unmount
from mountd.kernel.libc import call
from tests.process import in_child

IN_HEADER = struct.Struct("=IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, …
OUT_HEADER = struct.Struct("=IiQ")  # length, -errno, unique
ATTRIBUTES = struct.Struct("=6Q10I")
INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
READ_IN = struct.Struct("=QQI")
ORDERS = struct.Struct("=Qi4xQ")  # opcodes as bits: to stay silent on, for which session; to fail
ROOT, FILE = 1, 2  # nodes
MAXIMUM_WRITE = 65536
CONNECTIONS = Path("/sys/fs/fuse/connections")


class Op(IntEnum):
    """Opcodes of the protocol."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    IOCTL = 39
    BATCH_FORGET = 42


NEVER_ANSWERED = (Op.FORGET, Op.INTERRUPT, Op.BATCH_FORGET)
EMPTY = (Op.FLUSH, Op.RELEASE, Op.RELEASEDIR, Op.READDIR)


class Fuse:
    """Mounted at `target`, with `content` as the file `path`; usable in a with statement."""

    def __init__(self, target: Path, content: bytes) -> None:
        """Mount it and start the server."""
        self.target = target
        self.path = target / "image"
        target.mkdir(exist_ok=True)
        self._orders = mmap.mmap(-1, ORDERS.size)
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
            call("mount", b"test", os.fsencode(target), b"fuse", 0, options.encode())
            self._server = os.fork()
            if self._server == 0:
                serve(device, self._orders, content)
        finally:
            os.close(device)
        self.connection = os.stat(target).st_dev

    def silence(self, *opcodes: Op, session: int = 0) -> None:
        """Leave these unanswered: to the processes of a session (setsid(2)), to all if it is 0."""
        ORDERS.pack_into(self._orders, 0, bits(opcodes), session, 0)

    def fail(self, *opcodes: Op) -> None:
        """Answer these with EIO."""
        ORDERS.pack_into(self._orders, 0, 0, 0, bits(opcodes))

    def abort(self) -> None:
        """End the connection, so that whoever waits for an answer gets an error."""
        if self._server:
            os.kill(self._server, signal.SIGKILL)
            os.waitpid(self._server, 0)
            self._server = 0
            in_child(self._abort_in_own_namespace)

    def _abort_in_own_namespace(self) -> None:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with contextlib.suppress(OSError):
            call("mount", b"fusectl", os.fsencode(CONNECTIONS), b"fusectl", 0, None)
        with contextlib.suppress(FileNotFoundError):
            (CONNECTIONS / str(self.connection) / "abort").write_text("1")

    def close(self) -> None:
        """Abort and unmount."""
        self.abort()
        mount_api.umount(str(self.target), Unmount.DETACH)
        self._orders.close()

    def __enter__(self) -> Fuse:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def bits(opcodes: Sequence[Op]) -> int:
    return sum(1 << opcode for opcode in opcodes)


def serve(device: int, orders: mmap.mmap, content: bytes) -> NoReturn:
    """Be the server, until the connection ends."""
    try:
        end_with_parent()
        close_all_but({0, 1, 2, device})
        while True:
            try:
                request = os.read(device, MAXIMUM_WRITE + 4096)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue  # the request was taken back
                return
            _, opcode, unique, node, _, _, pid, _, _ = IN_HEADER.unpack_from(request)
            if opcode in NEVER_ANSWERED or told_to_be_silent(orders, opcode, pid):
                continue
            if ORDERS.unpack_from(orders)[2] >> opcode & 1:
                failure, body = errno.EIO, b""
            else:
                failure, body = answer(opcode, node, request[IN_HEADER.size :], content)
            with contextlib.suppress(FileNotFoundError):
                os.write(device, OUT_HEADER.pack(OUT_HEADER.size + len(body), -failure, unique) + body)
    finally:
        os._exit(0)


def told_to_be_silent(orders: mmap.mmap, opcode: int, pid: int) -> bool:
    """Whether this process gets no answer to this opcode."""
    opcodes, session, _ = ORDERS.unpack_from(orders)
    if not opcodes >> opcode & 1:
        return False
    try:
        return session == 0 or os.getsid(pid) == session
    except ProcessLookupError:
        return False


def answer(opcode: int, node: int, body: bytes, content: bytes) -> tuple[int, bytes]:
    """Return the errno and the body of the answer."""
    if opcode == Op.INIT:
        return 0, INIT_OUT.pack(7, 31, 65536, 0, 0, 0, MAXIMUM_WRITE, 1, 0, 0, 0)
    if opcode == Op.LOOKUP:
        if node != ROOT or body != b"image\0":
            return errno.ENOENT, b""
        return 0, struct.pack("=QQQQII", FILE, 0, 3600, 0, 0, 0) + attributes(FILE, len(content))
    if opcode == Op.GETATTR:
        return 0, struct.pack("=QII", 0, 0, 0) + attributes(node, len(content))
    if opcode in (Op.OPEN, Op.OPENDIR):
        return 0, struct.pack("=QII", 1, 0, 0)
    if opcode == Op.READ:
        _, offset, size = READ_IN.unpack_from(body)
        return 0, content[offset : offset + size]
    if opcode == Op.STATFS:
        return 0, struct.pack("=5Q4I24x", 1, 0, 0, 1, 0, 4096, 255, 4096, 0)
    return (0, b"") if opcode in EMPTY else (errno.ENOSYS, b"")


def attributes(node: int, size: int) -> bytes:
    """Return the struct fuse_attr of a node: all belong to root."""
    directory = node == ROOT
    mode = stat.S_IFDIR | 0o755 if directory else stat.S_IFREG | 0o644
    now = int(time.time())
    blocks = -(-size // 512)
    return ATTRIBUTES.pack(
        node, 0 if directory else size, blocks, now, now, now, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0
    )
