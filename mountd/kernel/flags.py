"""The kernel's flags as `IntFlag` types, named after their uapi constants without the common prefix.

`MountAttr.RDONLY` is MOUNT_ATTR_RDONLY of linux/mount.h, and so on. A number with a bit that is not listed
here is refused with ValueError before it reaches the kernel.
"""

from enum import STRICT, IntEnum, IntFlag


class AtFlags(IntFlag, boundary=STRICT):
    """AT_* of linux/fcntl.h."""

    SYMLINK_NOFOLLOW = 0x100
    NO_AUTOMOUNT = 0x800
    EMPTY_PATH = 0x1000
    STATX_DONT_SYNC = 0x4000
    RECURSIVE = 0x8000


class OpenTree(IntFlag, boundary=STRICT):
    """OPEN_TREE_* of linux/mount.h, and the AT_* flags that open_tree(2) takes."""

    CLONE = 1
    CLOEXEC = 0x80000
    SYMLINK_NOFOLLOW = 0x100
    NO_AUTOMOUNT = 0x800
    EMPTY_PATH = 0x1000
    RECURSIVE = 0x8000


class MoveMount(IntFlag, boundary=STRICT):
    """MOVE_MOUNT_* of linux/mount.h."""

    F_SYMLINKS = 0x1
    F_AUTOMOUNTS = 0x2
    F_EMPTY_PATH = 0x4
    T_SYMLINKS = 0x10
    T_AUTOMOUNTS = 0x20
    T_EMPTY_PATH = 0x40
    SET_GROUP = 0x100
    BENEATH = 0x200


class FsOpen(IntFlag, boundary=STRICT):
    """FSOPEN_*."""

    CLOEXEC = 1


class FsPick(IntFlag, boundary=STRICT):
    """FSPICK_*."""

    CLOEXEC = 1
    SYMLINK_NOFOLLOW = 2
    NO_AUTOMOUNT = 4
    EMPTY_PATH = 8


class FsMount(IntFlag, boundary=STRICT):
    """FSMOUNT_*."""

    CLOEXEC = 1


class FsConfig(IntEnum):
    """Commands of fsconfig(2), enum fsconfig_command."""

    SET_FLAG = 0
    SET_STRING = 1
    SET_BINARY = 2
    SET_PATH = 3
    SET_PATH_EMPTY = 4
    SET_FD = 5
    CMD_CREATE = 6
    CMD_RECONFIGURE = 7
    CMD_CREATE_EXCL = 8


class MountAttr(IntFlag, boundary=STRICT):
    """MOUNT_ATTR_* of linux/mount.h. RELATIME is 0: the absence of the other two."""

    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4
    NOEXEC = 0x8
    NOATIME = 0x10
    STRICTATIME = 0x20
    ATIME_UNUSED = 0x40  # of the mask, which has no values for it yet
    ATIME_MASK = 0x70
    NODIRATIME = 0x80
    IDMAP = 0x100000
    NOSYMFOLLOW = 0x200000


class Propagation(IntEnum):
    """MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE and MS_SHARED, as struct mount_attr takes them."""

    UNBINDABLE = 1 << 17
    PRIVATE = 1 << 18
    SLAVE = 1 << 19
    SHARED = 1 << 20


class Unmount(IntFlag, boundary=STRICT):
    """Flags of umount2(2)."""

    FORCE = 1
    DETACH = 2
    EXPIRE = 4
    NOFOLLOW = 8


class Resolve(IntFlag, boundary=STRICT):
    """RESOLVE_* of linux/openat2.h."""

    NO_XDEV = 0x1
    NO_MAGICLINKS = 0x2
    NO_SYMLINKS = 0x4
    BENEATH = 0x8
    IN_ROOT = 0x10
    CACHED = 0x20


class Clone(IntFlag, boundary=STRICT):
    """CLONE_NEW* of linux/sched.h, for unshare(2) and setns(2)."""

    NEWNS = 0x20000
    NEWCGROUP = 0x2000000
    NEWUTS = 0x4000000
    NEWIPC = 0x8000000
    NEWUSER = 0x10000000
    NEWPID = 0x20000000
    NEWNET = 0x40000000


class StatxMask(IntFlag, boundary=STRICT):
    """STATX_* of linux/stat.h, as far as it is used.

    With every bit of BASIC_STATS: Python 3.11.2 refuses a flag made of others that have no names.
    """

    TYPE = 0x1
    MODE = 0x2
    NLINK = 0x4
    UID = 0x8
    GID = 0x10
    ATIME = 0x20
    MTIME = 0x40
    CTIME = 0x80
    INO = 0x100
    SIZE = 0x200
    BLOCKS = 0x400
    BASIC_STATS = 0x7FF
    MNT_ID = 0x1000
    MNT_ID_UNIQUE = 0x4000


class StatmountMask(IntFlag, boundary=STRICT):
    """STATMOUNT_* of linux/mount.h."""

    SB_BASIC = 0x1
    MNT_BASIC = 0x2
    PROPAGATE_FROM = 0x4
    MNT_ROOT = 0x8
    MNT_POINT = 0x10
    FS_TYPE = 0x20


class LoopFlags(IntFlag, boundary=STRICT):
    """LO_FLAGS_* of linux/loop.h."""

    READ_ONLY = 1
    AUTOCLEAR = 4
    PARTSCAN = 8
    DIRECT_IO = 16


class DeviceMapper(IntFlag, boundary=STRICT):
    """DM_*_FLAG of linux/dm-ioctl.h, as far as they are used."""

    READONLY = 1 << 0
    SUSPEND = 1 << 1
    STATUS_TABLE = 1 << 4
    ACTIVE_PRESENT = 1 << 5
    INACTIVE_PRESENT = 1 << 6
    BUFFER_FULL = 1 << 8
    SECURE_DATA = 1 << 15
    DEFERRED_REMOVE = 1 << 17


class VerityAlgorithm(IntEnum):
    """FS_VERITY_HASH_ALG_* of linux/fsverity.h."""

    SHA256 = 1
    SHA512 = 2


class Ioctl(IntEnum):
    """Requests of ioctl(2): linux/{nsfs,pidfd,loop,fs,fsverity,dm-ioctl}.h."""

    NS_GET_USERNS = 0xB701
    NS_GET_PARENT = 0xB702
    NS_GET_NSTYPE = 0xB703
    NS_GET_OWNER_UID = 0xB704
    NS_MNT_GET_INFO = 0x8010B70A
    NS_MNT_GET_NEXT = 0x8010B70B
    NS_MNT_GET_PREV = 0x8010B70C
    NS_GET_ID = 0x8008B70D
    PIDFD_GET_MNT_NAMESPACE = 0xFF03
    PIDFD_GET_NET_NAMESPACE = 0xFF04
    PIDFD_GET_PID_NAMESPACE = 0xFF05
    PIDFD_GET_USER_NAMESPACE = 0xFF09
    LOOP_CLR_FD = 0x4C01
    LOOP_GET_STATUS64 = 0x4C05
    LOOP_CONFIGURE = 0x4C0A
    LOOP_CTL_GET_FREE = 0x4C82
    BLKSSZGET = 0x1268
    BLKGETSIZE64 = 0x80081272
    FS_IOC_ENABLE_VERITY = 0x40806685
    FS_IOC_MEASURE_VERITY = 0xC0046686
    DM_VERSION = 0xC138FD00
    DM_LIST_DEVICES = 0xC138FD02
    DM_DEV_CREATE = 0xC138FD03
    DM_DEV_REMOVE = 0xC138FD04
    DM_DEV_SUSPEND = 0xC138FD06
    DM_TABLE_LOAD = 0xC138FD09
    DM_TABLE_STATUS = 0xC138FD0C
    DM_GET_TARGET_VERSION = 0xC138FD11
    FICLONE = 0x40049409
