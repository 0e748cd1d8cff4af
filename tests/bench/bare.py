"""The bare system calls of one mount, from Python with nothing around them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)
FSOPEN, FSCONFIG, FSMOUNT, MOUNT_SETATTR = 430, 431, 432, 442
RDONLY_NOSUID_NODEV, IDMAP, EMPTY_PATH = 7, 0x100000, 0x1000


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns_fd")]


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def mount_and_map(image: bytes, userns_fd: int) -> int:
    """fsopen, two times fsconfig, create, fsmount, mount_setattr: return the mount."""
    call = _libc.syscall
    context = _check(call(FSOPEN, b"erofs", 1))
    _check(call(FSCONFIG, context, 1, b"source", image, 0))
    _check(call(FSCONFIG, context, 0, b"ro", None, 0))
    _check(call(FSCONFIG, context, 6, None, None, 0))
    mount = _check(call(FSMOUNT, context, 1, RDONLY_NOSUID_NODEV))
    os.close(context)
    attr = _MountAttr(IDMAP, 0, 0, userns_fd)
    _check(call(MOUNT_SETATTR, mount, b"", EMPTY_PATH, ctypes.byref(attr), 32))
    return mount


def overlay(layers: Sequence[int]) -> int:
    """Return an overlay of mounts, the topmost first: fsopen, an fsconfig for each, create, fsmount."""
    call = _libc.syscall
    context = _check(call(FSOPEN, b"overlay", 1))
    for layer in layers:
        _check(call(FSCONFIG, context, 5, b"lowerdir+", None, layer))
    _check(call(FSCONFIG, context, 6, None, None, 0))
    mount = _check(call(FSMOUNT, context, 1, RDONLY_NOSUID_NODEV))
    os.close(context)
    return mount
