"""What umount(8) knows about a mount beyond what the kernel tells: /run/mount/utab of libmount.

    SRC=/var/lib/machines/base.raw TARGET=/home/me/mnt ROOT=/ OPTS=uhelper=mountd

One line is one mount; libmount takes it for that of mountinfo with the same source, root and target. Names
may have any bytes: as in mountinfo, those that end a field or a line are escaped, and all others are as they
are, which is what libmount reads. So the text of both is that of bytes, with surrogates for what is not
UTF-8.

For a mount with “uhelper=mountd”, umount(8) runs umount.mountd as the user who called it. Changes are made
as libmount makes them: under a lock, to a copy that then takes the place of the file.

Whoever may read the lock can hold it for as long as they like, so nobody waits for it long: a missing line
costs comfort, and nothing else.
"""

import contextlib
import errno
import fcntl
import os
import stat
import time

from mountd.errors import SyscallError
from mountd.fds import OwnedFd
from mountd.kernel.flags import Resolve
from mountd.kernel.paths import openat2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ABOVE, DIRECTORY = "run", "mount"
FILE, LOCK, EVENT = "utab", "utab.lock", "utab.event"
MAXIMUM_BYTES = 4 << 20
PATIENCE_SECONDS = 0.5
TICK_SECONDS = 0.005
OURS = "uhelper=mountd"
ESCAPED = " \t\n\\#"
ENDS = frozenset(" \t\n\0")  # what libmount, or whoever reads the file, takes for the end of a field
NO_LINKS = Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS | Resolve.BENEATH


class Entry:
    """One line. The fields are as in mountinfo, with their escapes: both files have the same."""

    __slots__ = ("root", "source", "target")

    def __init__(self, source: str, root: str, target: str) -> None:
        """Raises ValueError for what could not be one field of a line."""
        for field in (source, root, target):
            if not field or not ENDS.isdisjoint(field):
                raise ValueError("it is no field of mountinfo")
        self.source = source
        self.root = root
        self.target = target

    @classmethod
    def of(cls, mountinfo: str, mount_id: int) -> "Entry | None":
        """Return the entry for the mount with this id of mountinfo, None where it has none."""
        for line in mountinfo.split("\n"):
            mount, _, rest = line.partition(" - ")
            fields = mount.split(" ")
            if fields[0] == str(mount_id):
                try:
                    return cls(rest.split(" ")[1], fields[3], fields[4])
                except (IndexError, ValueError):
                    return None
        return None

    def line(self) -> str:
        """Return it as the file has it."""
        return f"SRC={self.source} TARGET={self.target} ROOT={self.root} OPTS={OURS}\n"


def escape(path: str) -> str:
    """Return a path as mountinfo has it."""
    return "".join(f"\\{ord(c):03o}" if c in ESCAPED else c for c in path)


def all_in(mountinfo: str) -> set[tuple[str, str, str]]:
    """Return source, root and target of every mount in mountinfo."""
    found = set()
    for line in mountinfo.split("\n"):
        mount, _, rest = line.partition(" - ")
        fields, after = mount.split(" "), rest.split(" ")
        if len(fields) > 4 and len(after) > 1:
            found.add((after[1], fields[3], fields[4]))
    return found


def open_directory(root_fd: int, owner: int = 0) -> OwnedFd:
    """Return libmount's directory below the root directory `root_fd`, which is made if it is not there.

    Raises OSError, EPERM for what another user than `owner` could have made or can change.
    """
    with _owned(root_fd, ABOVE, owner) as above:
        with contextlib.suppress(FileExistsError):
            os.mkdir(DIRECTORY, 0o755, dir_fd=above.fileno())
            with _owned(above.fileno(), DIRECTORY, owner) as made:
                os.fchmod(made.fileno(), 0o755)  # whatever the umask
        return _owned(above.fileno(), DIRECTORY, owner)


def _owned(at: int, name: str, owner: int) -> OwnedFd:
    """Open a directory that is `owner`'s alone. Raises SyscallError."""
    found = openat2(at, name, os.O_RDONLY | os.O_DIRECTORY, NO_LINKS)
    status = os.fstat(found.fileno())
    if status.st_uid != owner or status.st_mode & 0o022:
        found.close()
        raise SyscallError(errno.EPERM, f"openat({name})")
    return found


def add(directory_fd: int, entry: Entry) -> None:
    """Add a line for a mount that was just attached. Raises OSError, TimeoutError."""
    change(directory_fd, lambda lines: [*lines, entry.line()])


def tidy(directory_fd: int, mountinfo: str, target: "str | None" = None) -> None:
    """Remove the lines with our helper that are about no mount in `mountinfo`: those at `target`, or all.

    Raises OSError, TimeoutError.
    """
    mounts = all_in(mountinfo)

    def is_stale(line: str) -> bool:
        fields = dict(word.partition("=")[::2] for word in line.split(" "))
        if OURS not in fields.get("OPTS", "").strip().split(","):
            return False
        about = tuple(fields.get(name, "").strip() for name in ("SRC", "ROOT", "TARGET"))
        return about not in mounts and (target is None or about[2] == target)

    change(directory_fd, lambda lines: [line for line in lines if not is_stale(line)])


def change(directory_fd: int, edit: "Callable[[list[str]], list[str]]") -> None:
    """Have `edit` return the lines that the file shall have. Raises OSError, TimeoutError."""
    with locked(directory_fd):
        before = read(directory_fd)
        after = edit(before)
        if after != before:
            write(directory_fd, after)
    with contextlib.suppress(OSError):
        # Who watches the file is told once it is unlocked (util-linux 2.40).
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        os.close(os.open(EVENT, flags, dir_fd=directory_fd))


def read(directory_fd: int) -> list[str]:
    """Return the lines of the file, none if there is no file. Raises OSError."""
    try:
        fd = os.open(FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory_fd)
    except FileNotFoundError:
        return []
    with OwnedFd(fd):
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAXIMUM_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), FILE)
        text = os.read(fd, MAXIMUM_BYTES).decode("utf-8", "surrogateescape")
    # Not splitlines(): names of files may have what Unicode takes for the end of a line.
    return [f"{line}\n" for line in text.split("\n") if line]


def write(directory_fd: int, lines: list[str]) -> None:
    """Put a file with `lines` in the place of the one that is there. Raises OSError."""
    name = f"{FILE}.mountd{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory_fd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with OwnedFd(os.open(name, flags, 0o644, dir_fd=directory_fd)) as file:
            os.fchmod(file.fileno(), 0o644)  # whatever the umask
            data = "".join(lines).encode("utf-8", "surrogateescape")
            while data:
                data = data[os.write(file.fileno(), data) :]
        os.rename(name, FILE, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory_fd)
        raise


@contextlib.contextmanager
def locked(directory_fd: int) -> "Iterator[None]":
    """Hold libmount's lock. Raises TimeoutError if somebody else has it for too long, OSError."""
    flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    with OwnedFd(os.open(LOCK, flags, 0o644, dir_fd=directory_fd)) as lock:
        mode = os.fstat(lock.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a file", LOCK)
        if not mode & 0o004:
            os.fchmod(lock.fileno(), 0o644)  # made now: service managers of users watch it
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "somebody holds the lock", LOCK) from None
                time.sleep(TICK_SECONDS)
        yield
