"""What a request wants mounted, as plain facts.

Everything here was measured on the descriptor itself; nothing is what the caller says about it, except the
`Tmpfs` that it asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

LUKS_TYPE = "crypto_LUKS"  # what is encrypted, by the name that blkid(8) has for it


class SourceKind(StrEnum):
    """Where the superblock comes from."""

    IMAGE = "image"
    TMPFS = "tmpfs"
    DIRECTORY = "directory"
    STACK = "stack"
    COMPOSEFS = "composefs"


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A file system that was recognised in an image (`superblock.recognise`).

    `size` is what the superblock claims, in bytes, and is never larger than the image. `uuid` and `label`
    are text from the image: names to show, not proof of anything. `needs_recovery` means that, as the
    superblock says, a journal or log has to be replayed before the contents are whole.
    """

    type: str
    size: int
    block_size: int
    uuid: str | None
    label: str | None
    needs_recovery: bool


@dataclass(frozen=True, slots=True)
class BackingFile:
    """The regular file behind an image, as fstat(2) and F_GETFL describe its descriptor.

    `writable` is about the descriptor, not about `mode`. `path_hint` is for messages only: the path may name
    another file by now. `changed` is when contents or status changed last (st_ctime), in nanoseconds since
    the epoch, 0 where nobody asked.
    """

    size: int
    dev: int
    ino: int
    uid: int
    gid: int
    mode: int
    writable: bool
    path_hint: str | None
    changed: int = 0

    @property
    def state(self) -> tuple[int, ...]:
        """What tells the file, and the state that it is in, from all others while it is there."""
        return self.dev, self.ino, self.changed, self.size

    def __hash__(self) -> int:
        """Of what tells one from another: what was decided about it is looked up for each request."""
        return hash((self.dev, self.ino, self.changed))


@dataclass(frozen=True, slots=True)
class VeritySuperblock:
    """How the hash tree of dm-verity was made, as its superblock says (`verity_superblock.read`).

    Sizes are in bytes; `hash_start_block` is the hash block at which the tree begins. `algorithm` is
    "sha256" or "sha512". Nothing vouches for any of it, and `verity_superblock` says what a lie comes to.
    """

    data_block_size: int
    hash_block_size: int
    data_blocks: int
    hash_start_block: int
    algorithm: str
    salt: bytes
    uuid: str | None


@dataclass(frozen=True, slots=True)
class Luks:
    """How a volume of LUKS is encrypted, as its header says (`source.luks`); what is in it is not known.

    Sizes and offsets are in bytes, within the volume: data are `size` from `offset` on, in sectors of
    `sector_size`, which `cipher`, in the words of dm-crypt, counts from `iv_offset` sectors of 512 on;
    `header_size` is where the last key ends, `metadata_size` how long each of the two headers of version 2
    is, 0 for version 1. `key_size` is the length of the key, `memory` what deriving it takes. `uuid` and
    `label` are text from the image.
    """

    version: int
    uuid: str | None
    label: str | None
    cipher: str
    key_size: int
    sector_size: int
    offset: int
    size: int
    iv_offset: int
    header_size: int
    metadata_size: int
    memory: int


@dataclass(frozen=True, slots=True)
class Window:
    """A part of an image, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class PartitionVerity:
    """How dm-verity would protect a partition: hash data in `window`, and the root hash.

    The root hash is what the image itself names, by the UUIDs of its partitions or beside its signature.
    `signature` is where that lies, None for nowhere.
    """

    superblock: VeritySuperblock
    root_hash: bytes
    window: Window
    signature: Window | None


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition of a disk image whose type says what it is for.

    `designator` is that, as systemd.image-policy(7) calls it, and `architecture` for which one, None for
    any. `read_only` and `grow` are flags of the table. `file_system` is None where there is none that is
    mounted; `contents` then says what there is instead, by the name of `source.signatures`, None for nothing
    known. An encrypted one has `luks`; its `file_system` is known once it was opened. `problem` is why
    one cannot be opened. `uuid` and `label` are text from the image.
    """

    designator: str
    number: int
    uuid: str
    label: str
    architecture: str | None
    window: Window
    read_only: bool
    grow: bool
    file_system: FileSystem | None = None
    contents: str | None = None
    verity: PartitionVerity | None = None
    luks: Luks | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Disk:
    """The partitions of a disk image, one for each designator, in the order in which they are mounted.

    `only_verity` is whether nothing vouches for what dm-verity does not protect, so that it is not used.
    """

    sector_size: int
    uuid: str
    partitions: tuple[Partition, ...]
    only_verity: bool = False

    def partition(self, designator: str) -> Partition | None:
        """Return the partition with that use, None for none."""
        return next((each for each in self.partitions if each.designator == designator), None)


@dataclass(frozen=True, slots=True)
class Tmpfs:
    """A tmpfs to be made: `size` in bytes, `inodes` None for the kernel's default, `mode` of its root."""

    size: int
    inodes: int | None
    mode: int


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory, as statx(2) describes its descriptor; `mount` is the id of the mount that it lies in.

    `uid` and `gid` are as that mount shows them. `opened` is false for a descriptor that proves no access
    (O_PATH), `read_only` is whether the mount or its file system is. `path_hint` is for messages and for a
    search: the path may name another directory by now.
    """

    dev: int
    ino: int
    mount: int
    uid: int
    gid: int
    opened: bool
    read_only: bool
    file_system: str
    path_hint: str | None

    def __hash__(self) -> int:
        """Of what tells one from another, as that of an image."""
        return hash((self.dev, self.ino, self.mount))


@dataclass(frozen=True, slots=True)
class Composefs:
    """What belongs to an image of a composefs: the directories in which the contents of its files lie.

    `verity` is whether it was asked for that fs-verity checks these. `digest` is the one that the image has
    to have (`evidence.fs_verity.digest_of`); with one, they are checked where that is possible.
    """

    objects: tuple[Directory, ...]
    verity: bool
    digest: str | None


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be mounted: `backing` is there for an image, with `file_system`, or where the image has
    partitions, `disk`; an encrypted one has `luks`, and `file_system` once it was opened. `tmpfs` is there
    for a tmpfs, `directory` for a directory. A stack has none of these, but layers, which are sources of
    their own. An image with `composefs` is one of metadata only; of the kind COMPOSEFS is one that mountd
    makes of a description, and has no `backing` before.
    """

    kind: SourceKind
    backing: BackingFile | None
    file_system: FileSystem | None
    tmpfs: Tmpfs | None
    disk: Disk | None = None
    directory: Directory | None = None
    composefs: Composefs | None = None
    luks: Luks | None = None
