"""dm-crypt: a block device that shows what is encrypted in another one.

The key is told to the kernel once, as a part of the table, when the device is made. It is in no file, no
command line, and no keyring: what a keyring holds can be looked for by others with the right to search it,
while the table's key shows to those only who may ask device-mapper for it, root with CAP_SYS_ADMIN (dmsetup
table --showkeys). The kernel wipes its own copy of the message (DM_SECURE_DATA_FLAG), and this process wipes
the one it has made. The key ends with the device, and that with its last user.

Nothing is checked when blocks are read: a block that somebody has changed decrypts to noise. What vouches
for the image vouches for the ciphertext.
"""

from mountd.kernel import device_mapper
from mountd.kernel.device_mapper import SECTOR, Device

TARGET = "crypt"


def create(
    path: str,
    key: bytearray,
    *,
    cipher: str,
    offset: int,
    size: int,
    iv_offset: int,
    sector_size: int,
    read_only: bool,
) -> Device:
    """Make a device over the block device `path`, which it keeps, of `size` bytes from `offset` on.

    `key` is in hexadecimal and stays the caller's to wipe, `cipher` in the words of dm-crypt, such as
    "aes-xts-plain64"; `iv_offset` is what the sectors of 512 bytes are counted from. Raises NotSupported
    where there is no device-mapper or no dm-crypt, SyscallError (EINVAL for values that do not fit together,
    ENOENT for a cipher that the kernel does not have); nothing is left then. No error has the key.
    """
    before = f"{cipher} ".encode()
    options = f" 1 sector_size:{sector_size}" if sector_size != SECTOR else ""
    after = f" {iv_offset} {path} {offset // SECTOR}{options}".encode()
    # At its full length from the start: what grows is copied, and the copies are not wiped.
    parameters = bytearray(len(before) + len(key) + len(after))
    parameters[: len(before)] = before
    parameters[len(before) : len(before) + len(key)] = key
    parameters[len(before) + len(key) :] = after
    return device_mapper.create(TARGET, size // SECTOR, parameters, read_only=read_only, secret=True)


def check_available() -> None:
    """Raise NotSupported where there is no device-mapper or no dm-crypt, SyscallError, OSError."""
    device_mapper.check_available(TARGET)
