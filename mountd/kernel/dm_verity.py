"""dm-verity: a block device whose every block is checked when it is read.

The data, the hash tree and the root hash are told to the kernel once, when the device is made; a block that
does not fit cannot be read (EIO). What is below may change at any time: what is read from the device is what
the root hash was made from, or nothing.
"""

from mountd.kernel import device_mapper
from mountd.kernel.device_mapper import SECTOR, Device
from mountd.kernel.flags import DeviceMapper

TARGET = "verity"


def create(
    data_path: str,
    hash_path: str,
    *,
    data_block_size: int,
    hash_block_size: int,
    data_blocks: int,
    hash_start_block: int,
    algorithm: str,
    root_hash: bytes,
    salt: bytes,
) -> Device:
    """Make a read-only device over the block devices `data_path` and `hash_path`, which it keeps.

    The sizes are in bytes, `data_blocks` counts data blocks, `hash_start_block` is the hash block at which
    the tree begins. Nothing is verified yet: that happens with each read. Raises NotSupported where there is
    no device-mapper or no dm-verity, SyscallError (EINVAL for values that do not fit together, with the
    reason in the kernel's log only); nothing is left then.
    """
    parameters = (
        f"1 {data_path} {hash_path} {data_block_size} {hash_block_size} {data_blocks} {hash_start_block} "
        f"{algorithm} {root_hash.hex()} {salt.hex() or '-'}"
    )
    sectors = data_blocks * data_block_size // SECTOR
    return device_mapper.create(TARGET, sectors, parameters.encode())


def is_corrupt(name: str) -> bool:
    """Tell whether the device of that name has seen a block that does not fit its root hash.

    Raises SyscallError, ENXIO if there is no such device.
    """
    return device_mapper.status(name).startswith("C")


def table(name: str) -> str:
    """Return the parameters that the device of that name was made with, as the kernel has them."""
    return device_mapper.status(name, DeviceMapper.STATUS_TABLE)


def check_available() -> None:
    """Raise NotSupported where there is no device-mapper or no dm-verity, SyscallError, OSError."""
    device_mapper.check_available(TARGET)
