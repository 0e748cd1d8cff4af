"""Whether what a mount shows is root's alone, as far as the mount and what it lies on have a say in that.

A server decides what is in its file system. An idmapped mount shows other owners than those on the disk. An
overlay shows what is in others, and does not tell in which. And a loop device shows a file: whoever can
write to that one decides what is in the file system on it, and may decide otherwise whenever it likes. That
is what a desktop's user gets who has an image mounted by udisks, below a path that is root's all the way
down; and of a disk that can be plugged in, nobody knows who has written what is on it.
"""

from __future__ import annotations

import os
import re
import stat
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from mountd.errors import SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import lease, loop_device
from mountd.kernel.flags import MountAttr, StatxMask
from mountd.kernel.mount_info import statmount
from mountd.kernel.numbers import AT_FDCWD
from mountd.kernel.paths import statx

if TYPE_CHECKING:
    from mountd.kernel.mount_info import MountInfo

# Whoever runs the server decides what is in the file, and when it answers.
REMOTE = {"fuse", "fuseblk", "nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "afs"}
# What root alone decides about, as far as the kernel has a say in it.
LOCAL = {
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "jfs", "nilfs2", "reiserfs"),
    *("erofs", "squashfs", "cramfs", "romfs", "iso9660", "udf", "vfat", "exfat", "ubifs", "jffs2"),
    *("tmpfs", "ramfs", "rootfs", "devtmpfs", "autofs"),
}
OVERLAY = "overlay"
# What systemd-sysext(8) calls the overlays that it puts over /usr and /etc: of these, and of what root has
# put where it looks.
EXTENSIONS = {"sysext", "confext"}
# Flags that a mount on behalf of a user has: by udisks, and by “user” in fstab(5). A mount of root's own on
# which they are not set runs what is on it as root.
FOR_USERS = MountAttr.NOSUID | MountAttr.NODEV
BUS = re.compile(r"(usb|fw)[0-9]+")  # to which anybody can plug a disk, as a directory in sysfs
WANTED = StatxMask.BASIC_STATS | StatxMask.MNT_ID_UNIQUE
BLOCK_DEVICES = "/sys/dev/block"
BLOCKS = "/sys/block"
BTRFS = "/sys/fs/btrfs"
MOUNTS = "/proc/self/mountinfo"
MAXIMUM_DEVICES = 64
MAXIMUM_DEPTH = 8  # of loop devices over files on loop devices
WRITTEN = "is on a loop device, whose file somebody has open for writing"
UNKNOWN = "is on a device of which cannot be found out what it lies on"
IDMAPPED = "is on an idmapped mount, which shows files of others as root's"
UNKNOWN_LAYERS = "is on an overlay of which cannot be found out what it lies on"
PLUGGED = "is on a disk that can be unplugged, and is mounted as for a user (nosuid, nodev)"


class NotRoots(Exception):
    """The contents of a mount are not root's alone, for this reason."""


def problem_of(id: int, *, is_root: bool = False, depth: int = 0) -> str | None:
    """Return why the contents of the mount `id` are not root's alone, after “it”; None if they are.

    Raises SyscallError.
    """
    try:
        check(id, is_root, depth)
    except NotRoots as problem:
        return str(problem)
    return None


@lru_cache(maxsize=64)
def check(id: int, is_root: bool, depth: int) -> None:
    """Raise NotRoots unless the contents of the mount `id` are root's alone.

    That they are is remembered; what speaks against it may be over in a moment. Raises SyscallError.
    """
    problem = look_for_problem(id, is_root, depth)
    if problem is not None:
        raise NotRoots(problem)


def look_for_problem(id: int, is_root: bool, depth: int) -> str | None:
    """As `problem_of`, without remembering.

    The id is never another's. `is_root` is for the file system that mountd itself runs from: that of a
    container is often idmapped, or lies on an image, and is its root's all the same. `depth` is how many
    loop devices led here. Raises SyscallError.
    """
    info = statmount(id)
    if info.fs_type is None or info.fs_type.split(".")[0] in REMOTE:
        return f"is on a file system of type {info.fs_type}, whose contents somebody else decides"
    if is_root:
        return None
    if info.fs_type == OVERLAY:
        return problem_of_overlay(info)
    if info.fs_type not in LOCAL:
        return f"is on a file system of type {info.fs_type}, whose contents others than root may decide"
    if info.attributes & MountAttr.IDMAP:
        return IDMAPPED
    return problem_below(info, depth)


def problem_of_overlay(info: MountInfo) -> str | None:
    """Return why the contents of an overlay are not root's alone, None if they are.

    What it is made of has names that may lead elsewhere by now, or in another mount namespace. Raises
    SyscallError.
    """
    if info.attributes & MountAttr.IDMAP:
        return IDMAPPED
    root = statx(AT_FDCWD, "/", WANTED, sync=False)
    # Part of the root directory, as a sandbox has it mounted once more.
    if info.sb_dev == (root.stx_dev_major, root.stx_dev_minor):
        return None
    try:
        source = source_of(":".join(map(str, info.sb_dev)))
    except OSError:
        source = None
    return None if source in EXTENSIONS else UNKNOWN_LAYERS


def problem_below(info: MountInfo, depth: int) -> str | None:
    """Return why what the file system of a mount lies on is not root's alone; None if it is, or no disk."""
    try:
        devices = devices_of(info)
    except OSError:
        devices = None
    if devices is None or depth > MAXIMUM_DEPTH:
        return UNKNOWN
    seen: set[str] = set()
    while devices:
        device = devices.pop()
        if device in seen:
            continue
        seen.add(device)
        if len(seen) > MAXIMUM_DEVICES:
            return UNKNOWN
        try:
            at, below = look_at(device)
            devices += below
            backing = contents_of(f"{at}/loop/backing_file")
            plugged = info.attributes & FOR_USERS == FOR_USERS and can_be_unplugged(at)
        except OSError:
            return UNKNOWN
        if plugged:
            return PLUGGED
        problem = problem_of_file(Path(at).resolve().name, backing, devices, depth) if backing else None
        if problem is not None:
            return problem
    return None


def devices_of(info: MountInfo) -> list[str] | None:
    """Return the block devices of a file system as "MAJOR:MINOR", None if they cannot be found out.

    Raises OSError.
    """
    name = ":".join(map(str, info.sb_dev))
    if info.sb_dev[0]:
        return [name]
    if info.fs_type == "erofs":
        return None  # on a file, without a device that would tell which
    if info.fs_type != "btrfs":
        return []
    # Its own number is nobody's device, and it may have several.
    for each in sorted(Path(BTRFS).glob("*-*")):
        devices = [contents_of(f"{device}/dev") for device in (each / "devices").iterdir()]
        if device_of(name) in devices:
            return devices
    return None


def device_of(name: str) -> str | None:
    """Return the device that the mounts of a file system with this number say to be on.

    None if there is none of its name. Raises OSError.
    """
    source = source_of(name)
    if source is None:
        return None
    try:
        number = os.stat(source).st_rdev
    except OSError:
        return None
    return f"{os.major(number)}:{os.minor(number)}"


def source_of(name: str) -> str | None:
    """Return what the first mount of a file system with this number says to be of, None if there is none.

    Raises OSError.
    """
    # Only what the kernel takes for the end of a line or a field: users choose the names of directories.
    for line in text_of(MOUNTS).split("\n"):
        fields, _, source = line.partition(" - ")
        if fields.split(" ")[2:3] == [name]:
            return source.split(" ")[1]
    return None


def look_at(device: str) -> tuple[str, list[str]]:
    """Return the directory of a device in sysfs, and the devices that it consists of. Raises OSError."""
    at = f"{BLOCK_DEVICES}/{device}"
    if os.path.exists(f"{at}/partition"):
        at += "/.."
    return at, [contents_of(f"{at}/slaves/{name}/dev") for name in os.listdir(f"{at}/slaves")]


def can_be_unplugged(at: str) -> bool:
    """Tell whether the disk whose directory in sysfs this is can be taken to another machine and back.

    By its medium, or whole; as udisks tells those that any user may mount. Raises OSError.
    """
    if contents_of(f"{at}/removable") == "1" or contents_of(f"{at}/device/type") == "SD":
        return True
    return any(BUS.fullmatch(part) for part in Path(at).resolve().parts)


def contents_of(path: str) -> str:
    """Return what a file of sysfs says, "" if there is none."""
    try:
        return text_of(path).removesuffix("\n")
    except FileNotFoundError:
        return ""


def text_of(path: str) -> str:
    """Return what is in a file, character by character: names may have any. Raises OSError."""
    return os.fsdecode(Path(path).read_bytes())


def problem_of_file(loop: str, path: str, devices: list[str], depth: int) -> str | None:
    """Return why the file that the device `loop` shows is not root's alone, None if it is.

    `path` only says where to look: the file there has to be the very one. A device in the place of the file
    is added to `devices`, which are looked at next. Raises SyscallError.
    """
    try:
        status = statx(AT_FDCWD, path, WANTED, sync=False)
        found = os.makedev(status.stx_dev_major, status.stx_dev_minor), status.stx_ino
        if found != loop_device.backing_inode(f"/dev/{loop}"):
            return UNKNOWN
    except SyscallError:
        return UNKNOWN
    if stat.S_ISBLK(status.stx_mode):
        devices.append(f"{status.stx_rdev_major}:{status.stx_rdev_minor}")
        return None
    if status.stx_uid != 0:
        return f"is on a loop device, whose file belongs to uid {status.stx_uid}, not to root"
    if status.stx_mode & 0o022:
        return "is on a loop device, whose file is writable by others than root"
    root = statx(AT_FDCWD, "/", WANTED, sync=False)
    at_root = status.stx_mnt_id == root.stx_mnt_id
    problem = problem_of(status.stx_mnt_id, is_root=at_root, depth=depth + 1)
    return problem_of_writers(loop, path, found) if problem is None else problem


def problem_of_writers(loop: str, path: str, inode: tuple[int, int]) -> str | None:
    """Return why others may still write to the file of root's, at `path`, that the device `loop` shows.

    A device that can be written to has the file open for writing itself: of that one, nothing is known. None
    if nobody has.
    """
    try:
        if contents_of(f"{BLOCKS}/{loop}/ro") != "1":
            return None
        with OwnedFd(os.open(path, lease.OPEN_TO_ASK)) as own:
            status = os.fstat(own.fileno())
            written = lease.has_writer(own.fileno())
    except OSError:
        return UNKNOWN
    if (status.st_dev, status.st_ino) != inode:
        return UNKNOWN
    return WRITTEN if written else None
