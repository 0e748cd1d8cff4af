"""What this kernel can do for mountd, found out by doing it, in a child that is gone afterwards.

The child has a mount namespace of its own, and for whoever is not root a user namespace around it, so that
an ordinary user learns as much as the kernel lets them try. What it does not let them is *unknown*, with the
reason. No version of anything is compared.
"""

import contextlib
import errno
import os

from mountd.errors import NotSupported, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import (
    child,
    device_mapper,
    dm_crypt,
    dm_verity,
    fs_verity,
    mount_api,
    mount_info,
    namespaces,
)
from mountd.kernel.flags import Clone, Ioctl, MountAttr, OpenTree, Propagation
from mountd.kernel.fs_context import FsContext
from mountd.kernel.libc import call
from mountd.kernel.numbers import AT_FDCWD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

YES, NO, UNKNOWN = "yes", "no", "unknown"
NOBODY = 65534
CAP_SYS_ADMIN = 21
SECONDS = 10.0
MAXIMUM_REPLY = 16384  # bytes
SCRATCH = ("/var/lib/mountd", "/var/tmp", "/tmp")  # where a file may be made that has no name
REFUSED = (errno.EPERM, errno.EACCES)


class Feature:
    """One feature: `state` is YES, NO or UNKNOWN, and `detail` says why it is not YES."""

    __slots__ = ("detail", "name", "state")

    def __init__(self, name: str, state: str, detail: str = "") -> None:
        """`name` is one of `NAMES`."""
        self.name = name
        self.state = state
        self.detail = detail

    @property
    def available(self) -> bool:
        """Whether it was done successfully."""
        return self.state == YES


def probe() -> list[Feature]:
    """Try everything, and return what came of it, in the order of `NAMES`. Raises OSError."""
    pid, reader = child.fork(_try_all)
    try:
        with reader:
            told, late = child.read_all(reader.fileno(), MAXIMUM_REPLY, SECONDS)
    finally:
        child.end(pid)
    found = {}
    for line in told.decode("utf-8", "replace").splitlines():
        name, state, detail = line.split("\t", 2)
        found[name] = Feature(name, state, detail)
    why = f"it was not done after {SECONDS:g} seconds" if late else "the one who tried has ended"
    return [found.get(name) or Feature(name, UNKNOWN, why) for name in NAMES]


def _try_all(writer: int) -> int:
    """Be the child: write a line for each feature as soon as it is known."""
    child.end_with_parent()
    with _Bench() as bench:
        for name, check in CHECKS.items():
            state, detail = _outcome(lambda check=check: check(bench), bench)  # type: ignore[misc]
            detail = " ".join("".join(c if c.isprintable() else " " for c in detail).split())
            os.write(writer, f"{name}\t{state}\t{detail}\n".encode()[:1024])
    return 0


def _outcome(check: "Callable[[], None]", bench: "_Bench") -> tuple[str, str]:
    try:
        check()
    except NotSupported as error:
        return NO, error.message
    except OSError as error:
        text = str(error)
        if error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        if error.errno in REFUSED:
            return UNKNOWN, text + bench.without
        return NO, text
    except Unknown as reason:
        return UNKNOWN, str(reason)
    return YES, ""


def _may_mount() -> bool:
    """Tell whether this process is root with CAP_SYS_ADMIN, and not in a user namespace of few ids."""
    whole = [(0, 0, (1 << 32) - 1)]
    pid = os.getpid()
    return bool(
        os.geteuid() == 0
        and namespaces.process_id_maps(pid)[0] == whole
        and namespaces.effective_capabilities(pid) >> CAP_SYS_ADMIN & 1
    )


class Unknown(Exception):
    """It cannot be tried; the text says why."""


class _Bench:
    """What the checks share: namespaces, a file without a name, and a tmpfs. Lives in the child only."""

    def __init__(self) -> None:
        """Make what can be made; what cannot is missed by the checks that want it."""
        self.is_root = _may_mount()
        self.without = "" if self.is_root else "; root can try"
        self._mount: OwnedFd | None = None
        self.namespace_error: OSError | None = None
        self._scratch: OwnedFd | None = None
        self.user_error = _user_namespace_for_a_user() if self.is_root else None
        self._scratch = self._make_scratch()
        try:
            self._enter()
        except OSError as error:
            self.namespace_error = error
            if not self.is_root:
                self.user_error = error

    def _enter(self) -> None:
        """Leave for namespaces in which mounts may be made."""
        uid, gid = os.geteuid(), os.getegid()
        namespaces.unshare(Clone.NEWNS if self.is_root else Clone.NEWUSER | Clone.NEWNS)
        if not self.is_root:
            child.end_with_parent()  # other capabilities have reset it
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                    file.write(text)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)

    def _make_scratch(self) -> "OwnedFd | None":
        for directory in SCRATCH:
            with contextlib.suppress(OSError):
                fd = OwnedFd(os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
                os.pwrite(fd.fileno(), smallest_erofs(), 0)
                return fd
        return None

    @property
    def scratch(self) -> int:
        """A file without a name that holds an erofs. Raises Unknown."""
        if self._scratch is None:
            raise Unknown(f"none of {', '.join(SCRATCH)} takes a file without a name")
        return self._scratch.fileno()

    @property
    def mount(self) -> int:
        """A detached tmpfs. Raises as making one does."""
        if self._mount is None:
            if self.namespace_error is not None:
                raise self.namespace_error
            with FsContext.open("tmpfs") as context:
                context.set_string("size", "64K")
                context.create()
                self._mount = context.mount(MountAttr.NOSUID | MountAttr.NODEV)
        return self._mount.fileno()

    def __enter__(self) -> "_Bench":
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (self._mount, self._scratch):
            if fd is not None:
                fd.close()


def _user_namespace_for_a_user() -> "OSError | None":
    """Return what keeps a user who is nobody from having a user namespace, None if nothing does."""

    def work(writer: int) -> int:
        child.end_with_parent()
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        try:
            namespaces.unshare(Clone.NEWUSER)
        except SyscallError as error:
            os.write(writer, bytes([error.errno or errno.EIO]))
            return 1
        os.write(writer, b"\0")
        return 0

    pid, reader = child.fork(work)
    try:
        with reader:
            told, _ = child.read_all(reader.fileno(), 1, SECONDS)
    finally:
        child.end(pid)
    if told == b"\0":
        return None
    number = told[0] if told else errno.EIO
    return OSError(number, os.strerror(number))


def _fsopen(bench: _Bench) -> None:
    _ = bench.mount


def _mount_setattr(bench: _Bench) -> None:
    with _copy(bench) as copy:
        mount_api.mount_setattr(copy.fileno(), set=MountAttr.RDONLY)
        try:
            os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=copy.fileno()))
        except OSError as error:
            if error.errno == errno.EROFS:
                return
            raise
        raise NotSupported("mount_setattr: a file was made in a mount that is read-only")


def _copy(bench: _Bench) -> OwnedFd:
    """Return a detached copy of the tmpfs, by way of a place where it is attached for a moment."""
    _attached(bench)
    return mount_api.open_tree(AT_FDCWD, PLACE, OpenTree.CLONE)


def _attached(bench: _Bench) -> None:
    if not os.path.samestat(os.stat(PLACE), os.fstat(bench.mount)):
        mount_api.move_mount(bench.mount, PLACE)


def _idmap(bench: _Bench) -> None:
    rows = [(0, NOBODY - 1, 1)] if bench.is_root else [(0, 0, 1)]
    with _copy(bench) as copy, namespaces.make_user_namespace(rows, rows) as userns:
        mount_api.mount_setattr(copy.fileno(), set=MountAttr.IDMAP, userns_fd=userns.fileno())
        if bench.is_root and os.fstat(copy.fileno()).st_uid != NOBODY - 1:
            raise NotSupported("id-mapped mounts: the owner is the same as without")


def _open_tree_attr(bench: _Bench) -> None:
    _attached(bench)
    mount_api.open_tree_attr(AT_FDCWD, PLACE, OpenTree.CLONE, set=MountAttr.NODEV).close()


def _statmount(bench: _Bench) -> None:
    with OwnedFd(os.open("/", os.O_PATH | os.O_CLOEXEC)) as root:
        id = mount_info.mount_id(root.fileno())
    if mount_info.statmount(id).id != id:
        raise NotSupported("statmount: it told of another mount")


def _listmount(bench: _Bench) -> None:
    mount_info.listmount()


def _erofs(bench: _Bench) -> None:
    """Mount a file without a loop device (Linux 6.12)."""
    with FsContext.open("erofs") as context:
        context.set_string("source", f"/proc/self/fd/{bench.scratch}")
        context.create()
        context.mount(MountAttr.NOSUID | MountAttr.NODEV | MountAttr.RDONLY).close()


def _user_namespaces(bench: _Bench) -> None:
    if bench.user_error is not None:
        reason = "an ordinary user may not have one: see user.max_user_namespaces and the security modules"
        raise NotSupported(f"user namespaces: {bench.user_error.strerror}: {reason}")


def _loop(bench: _Bench) -> None:
    with OwnedFd(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)) as control:
        call("ioctl", control.fileno(), Ioctl.LOOP_CTL_GET_FREE, None)


def _fuse(bench: _Bench) -> None:
    os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))


def _dm_verity(bench: _Bench) -> None:
    _device_mapper()
    dm_verity.check_available()


def _dm_crypt(bench: _Bench) -> None:
    _device_mapper()
    dm_crypt.check_available()


def _device_mapper() -> None:
    """Raise OSError that says whether it is not there, or only not for us."""
    os.close(os.open(device_mapper.CONTROL, os.O_RDWR | os.O_CLOEXEC))


def _fs_verity(bench: _Bench) -> None:
    try:
        fs_verity.measure(bench.scratch)
    except SyscallError as error:
        if error.errno != errno.ENODATA:  # it could be, and is not enabled for this file
            raise


def smallest_erofs() -> bytes:
    """Return an erofs of one block, whose root directory is empty."""
    block = bytearray(4096)
    superblock = memoryview(block)[1024:]
    superblock[:4] = (0xE0F5E1E2).to_bytes(4, "little")
    superblock[12] = 12  # the block size, as a power of 2
    root = 64  # of 32 bytes each, from the start of the block: behind the superblock
    superblock[14:16] = root.to_bytes(2, "little")
    superblock[16:24] = (1).to_bytes(8, "little")  # inodes
    superblock[36:40] = (1).to_bytes(4, "little")  # blocks
    inode = memoryview(block)[root * 32 :]
    inode[0:2] = (2 << 1).to_bytes(2, "little")  # compact, with its data behind it
    inode[4:6] = (0o40555).to_bytes(2, "little")
    inode[6:8] = (2).to_bytes(2, "little")  # links
    entries = b"".join(_entry(root, 24 + index) for index in range(2)) + b"..."
    inode[8:12] = len(entries).to_bytes(4, "little")
    inode[32 : 32 + len(entries)] = entries
    return bytes(block)


def _entry(inode: int, name_offset: int) -> bytes:
    """Return an entry of a directory, whose name is “.” or “..”, at `name_offset`."""
    return inode.to_bytes(8, "little") + name_offset.to_bytes(2, "little") + b"\x02\0"


PLACE = "/tmp"
CHECKS: "dict[str, Callable[[_Bench], None]]" = {
    "fsopen": _fsopen,
    "mount_setattr": _mount_setattr,
    "idmapped-mounts": _idmap,
    "statmount": _statmount,
    "listmount": _listmount,
    "open_tree_attr": _open_tree_attr,
    "erofs-on-files": _erofs,
    "user-namespaces": _user_namespaces,
    "loop": _loop,
    "fuse": _fuse,
    "dm-verity": _dm_verity,
    "dm-crypt": _dm_crypt,
    "fs-verity": _fs_verity,
}
NAMES = tuple(CHECKS)
