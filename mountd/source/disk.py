"""What a disk image is made of: which partition is for what, and what is in each.

Which partition counts is decided as the specification of types says (UAPI.2), and as systemd does:

* Flags can take a partition out of the game (no-auto; for the ESP also what firmware has for that), and so
  does the label of one that is kept for the next version (sysupdate.d(5)).
* Of the root partitions, those for this machine's architecture count, or else those for the other one that
  it runs, or else those for any other, if that is one only; so do those of /usr. Of several, the one with
  the newest version in its label counts. Of other kinds, it is the first.
* Hash data and signature belong to what they protect by their type. The root hash is made of the UUIDs of
  the two partitions, or stands beside its signature and fits those UUIDs: its first 128 bits are that of the
  data, its last 128 bits that of the hash data.
* Without a root or /usr partition, a single one of the generic type is the root; several are an error.

What is in a partition is judged as an image of its own would be (`superblock.recognise`), with one
difference: what is not mounted may be there, and is left for the policy to judge. A table within a partition
is not looked at.

This is all pure, and bounded: there are 13 kinds of partitions, and of each at most one is read.
"""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mountd.errors import AmbiguousRoot, InvalidImage, UnsupportedFileSystem
from mountd.source import gpt, luks, verity_superblock, version_order
from mountd.source.model import Disk, FileSystem, Partition, PartitionVerity, VeritySuperblock, Window
from mountd.source.partition_types import GENERIC, MACHINES, MOUNT_POINTS, PROTECTED, TYPES, VERSIONED
from mountd.source.superblock import recognise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mountd.source.gpt import Entry

    Read = Callable[[int, int], bytes]

ORDER = (*MOUNT_POINTS, "swap", *(f"{name}-verity{end}" for name in PROTECTED for end in ("", "-sig")))
MAXIMUM_SIGNATURE = 256 << 10  # bytes of a signature partition that are looked at
ROOT_HASH = re.compile(rb'"rootHash"\s{0,16}:\s{0,16}"([0-9a-fA-F]{64}|[0-9a-fA-F]{128})"')
KEPT_FREE = "_empty"
HALF = 32  # digits of a root hash that are a UUID


def read(read: Read, size: int, machine: str) -> Disk:
    """Return what a disk image of `size` bytes is made of, for a `machine` as uname(2) calls it.

    `read(offset, length)` returns the bytes there, fewer only at the end. Raises InvalidImage, and
    UnsupportedFileSystem for an image without a root or /usr partition.
    """
    table = gpt.read(read, size)
    chosen = choose(table.entries, machine)
    if not any(partition.designator in PROTECTED for partition in chosen):
        raise UnsupportedFileSystem(
            "the disk image has neither a root nor a /usr partition, as their types say",
            file_system_type="gpt",
        )
    by_designator = {partition.designator: partition for partition in chosen}
    found = []
    for partition in chosen:
        if partition.designator in MOUNT_POINTS:
            partition = look_inside(partition, read)
        elif partition.designator == "swap" and is_luks(partition, read):
            partition = replace(partition, contents=luks.TYPE)
        if partition.designator in PROTECTED:
            partition = add_verity(partition, by_designator, read)
        found.append(partition)
    return Disk(table.sector_size, table.uuid, tuple(found))


def choose(entries: Iterable[Entry], machine: str) -> tuple[Partition, ...]:
    """Return the partition of each kind that counts, in the order of ORDER. Raises InvalidImage."""
    known = [partition for entry in entries if (partition := partition_of(entry)) is not None]
    architectures = {name: architecture_of(name, known, machine) for name in PROTECTED}
    chosen: dict[str, Partition] = {}
    for partition in known:
        # Also of what protects them, where that is all there is.
        architecture = architectures.get(partition.designator.partition("-")[0])
        if partition.architecture not in (None, architecture):
            continue
        before = chosen.get(partition.designator)
        if before is not None and not is_newer(partition, before):
            continue
        chosen[partition.designator] = partition
    generic = chosen.pop("", None)
    if generic is not None and not any(name in chosen for name in PROTECTED):
        if sum(partition.designator == "" for partition in known) > 1:
            raise AmbiguousRoot
        chosen["root"] = replace(generic, designator="root")
    return tuple(chosen[name] for name in ORDER if name in chosen)


def partition_of(entry: Entry) -> Partition | None:
    """Return an entry of the table as what its type says, None for one that does not count."""
    if entry.type == GENERIC:
        designator, architecture = "", None
    elif entry.type in TYPES:
        designator, architecture = TYPES[entry.type].designator, TYPES[entry.type].architecture
    else:
        return None
    hidden = gpt.NO_BLOCK_IO if designator == "esp" else gpt.NO_AUTO
    if entry.attributes & hidden or entry.label == KEPT_FREE:
        return None
    return Partition(
        designator=designator,
        number=entry.number,
        uuid=entry.uuid,
        label=entry.label,
        architecture=architecture,
        window=Window(entry.start, entry.size),
        # The ESP has no such flags: its bits belong to the firmware.
        read_only=bool(entry.attributes & gpt.READ_ONLY) and designator != "esp",
        grow=bool(entry.attributes & gpt.GROW) and designator != "esp",
    )


def architecture_of(name: str, partitions: Iterable[Partition], machine: str) -> str | None:
    """Return the architecture that counts of root or /usr, None for none. Raises InvalidImage."""
    found = [each for each in partitions if each.designator.partition("-")[0] == name]
    there = {
        each.architecture for each in found if each.designator == name and each.architecture is not None
    }
    there = there or {each.architecture for each in found if each.architecture is not None}
    for architecture in MACHINES.get(machine, ()):
        if architecture in there:
            return architecture
    if len(there) > 1:
        raise InvalidImage(f"GPT: {name} is there for {', '.join(sorted(there))}, and not for this machine")
    return next(iter(there), None)


def is_newer(partition: Partition, before: Partition) -> bool:
    """Tell whether a partition takes the place of one of the same kind that comes before it."""
    if partition.designator not in VERSIONED:
        return False
    return version_order.compare(partition.label, before.label) > 0


def window_of(read: Read, window: Window) -> Read:
    """Return a way to read what is in the window, by offsets within it."""
    return lambda offset, length: read(window.offset + offset, min(length, window.size - offset))


def look_inside(partition: Partition, read: Read) -> Partition:
    """Add which file system is in a partition, or what else. Raises InvalidImage."""
    try:
        found = recognise(window_of(read, partition.window), partition.window.size)
    except UnsupportedFileSystem as error:
        type = error.parameters.get("fileSystemType")
        if type == luks.TYPE:
            return look_at_luks(partition, read)
        return replace(partition, contents=type if isinstance(type, str) else None)
    except InvalidImage as error:
        raise within(partition, error) from None
    return replace(partition, file_system=found)


def is_luks(partition: Partition, read: Read) -> bool:
    """Tell whether a partition, in which nothing else is looked for, is encrypted."""
    return window_of(read, partition.window)(0, len(luks.MAGIC)) == luks.MAGIC


def look_at_luks(partition: Partition, read: Read) -> Partition:
    """Add how a partition is encrypted, or why it cannot be opened: it may be one that is not used."""
    partition = replace(partition, contents=luks.TYPE)
    try:
        found = luks.read(window_of(read, partition.window), partition.window.size)
    except (InvalidImage, UnsupportedFileSystem) as error:
        return replace(partition, problem=str(error.parameters["reason"]))
    return replace(partition, luks=found)


def add_verity(partition: Partition, others: dict[str, Partition], read: Read) -> Partition:
    """Add how dm-verity protects a partition, if the image has what that takes. Raises InvalidImage."""
    hashes = others.get(f"{partition.designator}-verity")
    signature = others.get(f"{partition.designator}-verity-sig")
    if hashes is None:
        return partition
    try:
        superblock = verity_superblock.read(
            window_of(read, hashes.window), hashes.window.size, partition.window.size
        )
    except InvalidImage as error:
        raise within(hashes, error) from None
    named = None if signature is None else named_root_hash(signature.window, read)
    paired = plain(partition.uuid), plain(hashes.uuid)
    if named is None:
        # Without a signature, it is as long as the two together, whatever the algorithm.
        root_hash = bytes.fromhex("".join(paired))
    elif (named[:HALF], named[-HALF:]) == paired:
        root_hash = bytes.fromhex(named)
    else:
        raise InvalidImage(
            f"the root hash in partition {signature.number if signature else 0} is not what the UUIDs of "
            f"partitions {partition.number} and {hashes.number} are made from"
        )
    if len(root_hash) != verity_superblock.DIGESTS[superblock.algorithm]:
        return partition
    window = None if signature is None else signature.window
    return replace(partition, verity=PartitionVerity(superblock, root_hash, hashes.window, window))


def named_root_hash(window: Window, read: Read) -> str | None:
    """Return the root hash that a signature partition names, as digits, None for none.

    Its JSON is read by whoever verifies it; here a wrong answer is one that does not fit.
    """
    found = ROOT_HASH.search(read(window.offset, min(window.size, MAXIMUM_SIGNATURE)))
    return None if found is None else found[1].decode("ascii").lower()


def plain(uuid: str) -> str:
    """Return the digits of a UUID, in the order in which a root hash has them."""
    return uuid.replace("-", "")


def within(partition: Partition, error: InvalidImage) -> InvalidImage:
    """Return an error about a partition as one about the image."""
    offset = error.parameters.get("offset")
    return InvalidImage(
        f"partition {partition.number} ({partition.designator}): {error.parameters['reason']}",
        offset=partition.window.offset + offset if isinstance(offset, int) else None,
    )


def to_plain(disk: Disk) -> dict[str, Any]:
    """Return a disk as what JSON can say."""
    told = asdict(disk)
    for partition in told["partitions"]:
        if partition["verity"] is not None:
            partition["verity"]["root_hash"] = partition["verity"]["root_hash"].hex()
            superblock = partition["verity"]["superblock"]
            superblock["salt"] = superblock["salt"].hex()
    return told


def from_plain(told: dict[str, Any], size: int) -> Disk:
    """Return what `to_plain` was given, for an image of `size` bytes.

    Raises InvalidImage for anything else: it may be from somebody who has taken over what reads images.
    """
    try:
        disk = Disk(**{**told, "partitions": tuple(_partition(each) for each in told["partitions"])})
        for partition in disk.partitions:
            _check_windows(partition, size)
    except (TypeError, ValueError, KeyError):
        raise InvalidImage("its partition table could not be read: the answer makes no sense") from None
    return disk


def _check_windows(partition: Partition, size: int) -> None:
    windows = [partition.window]
    if partition.verity is not None:
        windows += [each for each in (partition.verity.window, partition.verity.signature) if each]
    for window in windows:
        if window.offset < 1 or window.size < 1 or window.offset + window.size > size:
            raise InvalidImage("a partition lies outside of the image", offset=window.offset)


def _partition(told: dict[str, Any]) -> Partition:
    verity = told["verity"]
    if verity is not None:
        superblock = dict(verity["superblock"], salt=bytes.fromhex(verity["superblock"]["salt"]))
        signature = verity["signature"]
        verity = PartitionVerity(
            VeritySuperblock(**superblock),
            bytes.fromhex(verity["root_hash"]),
            Window(**verity["window"]),
            None if signature is None else Window(**signature),
        )
    file_system = told["file_system"]
    return Partition(
        **{
            **told,
            "window": Window(**told["window"]),
            "file_system": None if file_system is None else FileSystem(**file_system),
            "luks": None if told["luks"] is None else luks.from_plain(told["luks"], told["window"]["size"]),
            "verity": verity,
        }
    )
