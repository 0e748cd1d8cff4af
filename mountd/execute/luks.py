"""Opening a LUKS volume: the key is derived by cryptsetup(8), and the device is made by mountd.

cryptsetup knows every way in which a key may be kept, so it does that, and nothing else. It runs as what
reads an enemy's files does (kernel/program): as a user whom nobody else is, without capabilities, sockets,
keyrings and other processes, within memory and time. It has a copy of the header in a sealed memfd, the very
bytes that were judged, and of the image nothing; the password comes through a pipe; no command line and no
environment has it. What it prints is the key of the volume, in hexadecimal. That it may lie is nothing:
another key decrypts to noise.

It would open the volume itself, too (cryptsetup open). Then a large program would read a stranger's header
as root, with device-mapper, locks and udev at its command, and a device with a name of its choice would stay
if it were killed. As it is, the table of the device is made of what our own parser has found good, by the
same few ioctls as that of dm-verity, and the device ends with its last user (kernel/device_mapper,
kernel/dm_crypt).

Secrets are kept in bytearrays that are overwritten. What Python makes copies of, such as what is read from a
pipe, ends with the process: a worker that has seen a password serves nobody else (daemon/worker).
"""

from __future__ import annotations

import fcntl
import os
import re
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage, LimitExceeded, NotSupported, SyscallError, WrongKey
from mountd.fds import OwnedFd
from mountd.kernel import child, dm_crypt, loop_device, program

if TYPE_CHECKING:
    from collections.abc import Callable

    from mountd.kernel.device_mapper import Device
    from mountd.plan.operations import Encryption

PROGRAMS = ("/usr/sbin/cryptsetup", "/sbin/cryptsetup")
ARGUMENTS = (
    "luksDump",
    "--dump-volume-key",
    "--batch-mode",
    "--disable-locks",
    "--disable-keyring",
    "--disable-external-tokens",
    "--key-file",
    "-",
    "/dev/fd/3",
)
SECONDS = 40.0
DERIVING = "seconds to derive the key of a volume"
MEMORY = 256 << 20  # beside what the key takes
WRONG_KEY, OUT_OF_MEMORY = 2, 3  # exit statuses of cryptsetup(8)
KEY_FOLLOWS = b"MK dump:"  # to the end, in pairs of digits
KEY = re.compile(rb"[0-9a-f]+")
PAGE = 4096
PIECE = 1 << 20
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def check_available() -> None:
    """Raise NotSupported where there is no cryptsetup, device-mapper or dm-crypt. Raises OSError."""
    find_program()
    dm_crypt.check_available()


def find_program() -> str:
    """Return the path of cryptsetup. Raises NotSupported."""
    for path in PROGRAMS:
        if os.access(path, os.X_OK):
            return path
    raise NotSupported("opening encrypted images: cryptsetup is missing", hint="install cryptsetup-bin")


def copy_header(image_fd: int, volume: Encryption, complete: Callable[[bytes], bytes]) -> OwnedFd:
    """Return the header of a volume of the image `image_fd`, which is borrowed, as a sealed memfd.

    It is as long as the volume, and what is not the header are holes. `complete` returns, for the first of
    two headers, the second. Raises InvalidImage, OSError.
    """
    copy = OwnedFd(os.memfd_create("mountd-luks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        done = 0
        while done < volume.header_size:
            piece = os.pread(image_fd, min(PIECE, volume.header_size - done), volume.start + done)
            if not piece:
                raise InvalidImage("LUKS: the volume ends within its header", offset=volume.start + done)
            done += os.pwrite(copy.fileno(), piece, done)
        if volume.metadata_size:
            second = complete(os.pread(copy.fileno(), volume.metadata_size, 0))
            os.pwrite(copy.fileno(), second, volume.metadata_size)
        os.ftruncate(copy.fileno(), volume.offset + volume.size)
        fcntl.fcntl(copy.fileno(), fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        copy.close()
        raise
    return copy


def derive(header_fd: int, password: bytearray, volume: Encryption, seconds: float = SECONDS) -> bytearray:
    """Return the key of the volume in hexadecimal, for the caller to wipe; all but that is borrowed.

    `header_fd` is of `copy_header`, and it may take `seconds`. Raises WrongKey for a password that opens
    nothing, InvalidImage for a header that cryptsetup does not take, LimitExceeded for a key that takes too
    long, NotSupported, OSError.
    """
    reader, writer = child.pipe()
    with reader:
        with writer:
            # Both are bounded: a pipe has room for more.
            os.write(writer.fileno(), password)
        done = program.run(
            find_program(),
            ARGUMENTS,
            [header_fd],
            stdin=reader.fileno(),
            seconds=max(seconds, 0.0),
            memory=MEMORY + volume.memory,
            threads=True,
            secret=True,
        )
    if done.timed_out or done.status < 0:
        raise LimitExceeded(
            DERIVING,
            int(SECONDS),
            hint="have a key that takes less: “cryptsetup luksConvertKey --pbkdf-memory … --iter-time …”",
        )
    if done.status == WRONG_KEY:
        raise WrongKey(
            "it opens none of the key slots", hint="a key file is taken as it is, with its newline"
        )
    if done.status == OUT_OF_MEMORY:
        raise LimitExceeded("bytes of memory to derive the key of a volume", volume.memory)
    key = bytearray().join(done.output.rpartition(KEY_FOLLOWS)[2].split())
    if done.status or len(key) != 2 * volume.key_size or KEY.fullmatch(key) is None:
        wipe(key)
        raise InvalidImage(f"LUKS: cryptsetup cannot read its header (exit status {done.status})")
    return key


def wipe(secret: bytearray) -> None:
    """Overwrite a secret."""
    secret[:] = bytes(len(secret))


def attach(image_fd: int, volume: Encryption, key: bytearray, *, read_only: bool) -> Device:
    """Return a device that shows what is in the volume of `image_fd`; both are borrowed.

    Its `path` is a source for a file system; whoever closes it before that is made loses it, and nothing of
    it is left. Raises NotSupported, SyscallError, and LimitExceeded where no loop device is free.
    """
    # As for dm-verity: with direct I/O, sectors may become larger than those that were encrypted.
    direct = volume.sector_size >= PAGE and not volume.start % PAGE and not volume.offset % PAGE
    loop = loop_device.attach(
        image_fd,
        read_only=read_only,
        direct_io=direct,
        offset=volume.start,
        size_limit=volume.offset + volume.size,
    )
    try:
        return dm_crypt.create(
            loop.path,
            key,
            cipher=volume.cipher,
            offset=volume.offset,
            size=volume.size,
            iv_offset=volume.iv_offset,
            sector_size=volume.sector_size,
            read_only=read_only,
        )
    except SyscallError as error:
        if error.errno_name == "ENOENT":
            raise NotSupported(f"the cipher {volume.cipher}, which this kernel does not have") from None
        raise
    finally:
        loop.close()
