"""Structures of system calls, as the uapi headers declare them.

Sources: linux/mount.h, linux/openat2.h, linux/stat.h, linux/loop.h, linux/fsverity.h, linux/dm-ioctl.h,
statfs(2).
"""

import ctypes
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64


class Structure(ctypes.Structure):
    """A C structure that error messages show with its fields that are not zero."""

    def __repr__(self) -> str:
        values = ((name, getattr(self, name)) for name, *_ in self._fields_ if not name.startswith("_"))
        return (
            "{"
            + ", ".join(f"{name}={value}" for name, value in values if isinstance(value, int) and value)
            + "}"
        )


class mount_attr(Structure):  # noqa: N801 - the kernel's name
    """struct mount_attr, MOUNT_ATTR_SIZE_VER0."""

    _fields_ = (
        ("attr_set", c_uint64),
        ("attr_clr", c_uint64),
        ("propagation", c_uint64),
        ("userns_fd", c_uint64),
    )


class open_how(Structure):  # noqa: N801
    """struct open_how."""

    _fields_ = (("flags", c_uint64), ("mode", c_uint64), ("resolve", c_uint64))


class mnt_id_req(Structure):  # noqa: N801
    """struct mnt_id_req, MNT_ID_REQ_SIZE_VER1; without its last field it is what Linux 6.8 knows."""

    _fields_ = (
        ("size", c_uint32),
        ("mnt_ns_fd", c_uint32),
        ("mnt_id", c_uint64),
        ("param", c_uint64),
        ("mnt_ns_id", c_uint64),
    )


MNT_ID_REQ_SIZE_VER0 = 24


class mnt_ns_info(Structure):  # noqa: N801
    """struct mnt_ns_info of linux/nsfs.h."""

    _fields_ = (("size", c_uint32), ("nr_mounts", c_uint32), ("mnt_ns_id", c_uint64))


class statmount(Structure):  # noqa: N801
    """struct statmount up to what STATMOUNT_FS_TYPE needs; the strings follow at offset 512."""

    _fields_ = (
        ("size", c_uint32),
        ("mnt_opts", c_uint32),
        ("mask", c_uint64),
        ("sb_dev_major", c_uint32),
        ("sb_dev_minor", c_uint32),
        ("sb_magic", c_uint64),
        ("sb_flags", c_uint32),
        ("fs_type", c_uint32),
        ("mnt_id", c_uint64),
        ("mnt_parent_id", c_uint64),
        ("mnt_id_old", c_uint32),
        ("mnt_parent_id_old", c_uint32),
        ("mnt_attr", c_uint64),
        ("mnt_propagation", c_uint64),
        ("mnt_peer_group", c_uint64),
        ("mnt_master", c_uint64),
        ("propagate_from", c_uint64),
        ("mnt_root", c_uint32),
        ("mnt_point", c_uint32),
        ("mnt_ns_id", c_uint64),
    )


STATMOUNT_STRINGS = 512  # sizeof(struct statmount): the strings' offsets count from here


class statx_timestamp(Structure):  # noqa: N801
    """struct statx_timestamp."""

    _fields_ = (("tv_sec", ctypes.c_int64), ("tv_nsec", c_uint32), ("_reserved", ctypes.c_int32))


class statx(Structure):  # noqa: N801
    """struct statx."""

    _fields_ = (
        ("stx_mask", c_uint32),
        ("stx_blksize", c_uint32),
        ("stx_attributes", c_uint64),
        ("stx_nlink", c_uint32),
        ("stx_uid", c_uint32),
        ("stx_gid", c_uint32),
        ("stx_mode", c_uint16),
        ("_spare0", c_uint16),
        ("stx_ino", c_uint64),
        ("stx_size", c_uint64),
        ("stx_blocks", c_uint64),
        ("stx_attributes_mask", c_uint64),
        ("stx_atime", statx_timestamp),
        ("stx_btime", statx_timestamp),
        ("stx_ctime", statx_timestamp),
        ("stx_mtime", statx_timestamp),
        ("stx_rdev_major", c_uint32),
        ("stx_rdev_minor", c_uint32),
        ("stx_dev_major", c_uint32),
        ("stx_dev_minor", c_uint32),
        ("stx_mnt_id", c_uint64),
        ("_spare", c_uint64 * 13),
    )


class loop_info64(Structure):  # noqa: N801
    """struct loop_info64."""

    _fields_ = (
        ("lo_device", c_uint64),
        ("lo_inode", c_uint64),
        ("lo_rdevice", c_uint64),
        ("lo_offset", c_uint64),
        ("lo_sizelimit", c_uint64),
        ("lo_number", c_uint32),
        ("lo_encrypt_type", c_uint32),
        ("lo_encrypt_key_size", c_uint32),
        ("lo_flags", c_uint32),
        ("_lo_file_name", c_uint8 * 64),
        ("_lo_crypt_name", c_uint8 * 64),
        ("_lo_encrypt_key", c_uint8 * 32),
        ("_lo_init", c_uint64 * 2),
    )


class loop_config(Structure):  # noqa: N801
    """struct loop_config."""

    _fields_ = (
        ("fd", c_uint32),
        ("block_size", c_uint32),
        ("info", loop_info64),
        ("_reserved", c_uint64 * 8),
    )


class fsverity_enable_arg(Structure):  # noqa: N801
    """struct fsverity_enable_arg."""

    _fields_ = (
        ("version", c_uint32),
        ("hash_algorithm", c_uint32),
        ("block_size", c_uint32),
        ("salt_size", c_uint32),
        ("salt_ptr", c_uint64),
        ("sig_size", c_uint32),
        ("_reserved1", c_uint32),
        ("sig_ptr", c_uint64),
        ("_reserved2", c_uint64 * 11),
    )


class fsverity_digest(Structure):  # noqa: N801
    """struct fsverity_digest with room for the longest digest, that of SHA-512."""

    _fields_ = (("digest_algorithm", c_uint16), ("digest_size", c_uint16), ("digest", c_uint8 * 64))


class dm_ioctl(Structure):  # noqa: N801
    """struct dm_ioctl; what an ioctl takes or returns besides it follows at `data_start`."""

    _fields_ = (
        ("version", c_uint32 * 3),
        ("data_size", c_uint32),
        ("data_start", c_uint32),
        ("target_count", c_uint32),
        ("open_count", ctypes.c_int32),
        ("flags", c_uint32),
        ("event_nr", c_uint32),
        ("_padding", c_uint32),
        ("dev", c_uint64),
        ("name", ctypes.c_char * 128),
        ("uuid", ctypes.c_char * 129),
        ("_data", ctypes.c_char * 7),
    )


class dm_target_spec(Structure):  # noqa: N801
    """struct dm_target_spec; the parameters follow as text."""

    _fields_ = (
        ("sector_start", c_uint64),
        ("length", c_uint64),
        ("status", ctypes.c_int32),
        ("next", c_uint32),
        ("target_type", ctypes.c_char * 16),
    )


class statfs(Structure):  # noqa: N801
    """struct statfs of the 64-bit architectures; only the type is looked at."""

    _fields_ = (("f_type", ctypes.c_long), ("_rest", ctypes.c_long * 15))
