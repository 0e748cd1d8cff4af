"""The steps of a mount, as plain data that can be printed before anything happens.

`execute.run` carries them out in order; a step only ever makes something that is not yet visible to anybody,
so that dropping the descriptors made so far undoes them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mountd.caller.model import IdExtent
    from mountd.kernel.flags import MountAttr
    from mountd.source.model import Luks, VeritySuperblock
    from mountd.source.model import Window as Window  # for who carries the operations out


class Backing(StrEnum):
    """What the file system is told its source is."""

    NOTHING = "nothing"  # it has none
    FILE = "file"  # the image itself; where its file system cannot serve reads that way, a loop device
    LOOP = "loop"  # a loop device over the image
    VERITY = "dm-verity"  # a dm-verity device over the image and its hash data, always read-only
    CRYPT = "dm-crypt"  # what was opened of the image before


@dataclass(frozen=True, slots=True)
class Verity:
    """What a dm-verity device is told: the root hash, and how the tree below it was made.

    The fields are those of `source.model.VeritySuperblock`. `hash_window` is where in the image the hash
    data is, None for a file of its own, and `hash_file` what tells that and its state from all others then
    (`BackingFile.state`).
    """

    root_hash: bytes
    algorithm: str
    salt: bytes
    data_block_size: int
    hash_block_size: int
    data_blocks: int
    hash_start_block: int
    hash_window: Window | None = None
    hash_file: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        superblock: VeritySuperblock,
        root_hash: bytes,
        hash_window: Window | None = None,
        hash_file: tuple[int, ...] | None = None,
    ) -> Verity:
        """Put together what the superblock says and the root hash that the verdict is about."""
        return cls(
            root_hash,
            superblock.algorithm,
            superblock.salt,
            superblock.data_block_size,
            superblock.hash_block_size,
            superblock.data_blocks,
            superblock.hash_start_block,
            hash_window,
            hash_file,
        )

    def describe(self) -> str:
        """Return it in a few words."""
        return f"root hash {self.algorithm}:{self.root_hash.hex()}"


@dataclass(frozen=True, slots=True)
class Encryption:
    """A volume to be opened: the fields are those of `source.model.Luks`, from `start` on in its image."""

    start: int
    offset: int
    size: int
    header_size: int
    metadata_size: int
    cipher: str
    key_size: int
    sector_size: int
    iv_offset: int
    memory: int

    @classmethod
    def of(cls, luks: Luks, window: Window | None) -> Encryption:
        """Put together what the header says and the part of the image that the volume is, None for all."""
        return cls(
            0 if window is None else window.offset,
            luks.offset,
            luks.size,
            luks.header_size,
            luks.metadata_size,
            luks.cipher,
            luks.key_size,
            luks.sector_size,
            luks.iv_offset,
            luks.memory,
        )


@dataclass(frozen=True, slots=True)
class CreateSuperblock:
    """Make the file system instance. `options` are names with their value, None for a flag.

    `name` is what the mount table is to call the source, where that is possible. `verity` is there for
    Backing.VERITY and for nothing else. `window` is the part of the image that it is in, None for all of it,
    which takes a block device. Raises ValueError if it is not so, or if dm-verity is to be writable.
    """

    type: str
    backing: Backing
    read_only: bool
    options: tuple[tuple[str, str | None], ...]
    verity: Verity | None = None
    name: str | None = None
    window: Window | None = None

    def __post_init__(self) -> None:
        if (self.verity is None) is (self.backing is Backing.VERITY):
            raise ValueError("a root hash belongs to dm-verity, and dm-verity needs one")
        if self.verity is not None and not self.read_only:
            raise ValueError("dm-verity is read-only")
        if self.window is not None and self.backing not in (Backing.LOOP, Backing.VERITY, Backing.CRYPT):
            raise ValueError("a part of an image takes a block device")

    def describe(self) -> str:
        """Return the step in one line."""
        words = [name if value is None else f"{name}={value}" for name, value in self.options]
        mode = "read-only" if self.read_only else "writable"
        options = ",".join(words) or "no options"
        verified = "" if self.verity is None else f", {self.verity.describe()},"
        part = ""
        if self.window is not None:
            part = f" over {self.window.size} bytes from {self.window.offset} on"
        return f"make a {mode} superblock of {self.type} from {self.backing}{part}{verified} ({options})"


@dataclass(frozen=True, slots=True)
class MakeMount:
    """Make a detached mount of the superblock; the attributes hold from its first moment on."""

    attributes: MountAttr

    def describe(self) -> str:
        """Return the step in one line."""
        return f"make a detached mount with attributes {self.attributes!r}"


@dataclass(frozen=True, slots=True)
class MakeOverlay:
    """Make an overlay of mounts, the topmost first. Without a top it is read-only.

    `options` are names with their value. `owner` is there if there is a top: the host's uid and gid by which
    the kernel makes what it needs in it. `name` is what the mount table is to call the source. Raises
    ValueError for fewer than two layers, or than one with a top.
    """

    layers: int
    options: tuple[tuple[str, str], ...]
    owner: tuple[int, int] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.layers < (2 if self.owner is None else 1):
            raise ValueError("an overlay has two layers or more, or one and an upper directory")

    def describe(self) -> str:
        """Return the step in one line."""
        options = ",".join(f"{name}={value}" for name, value in self.options)
        if self.owner is None:
            return f"make a read-only overlay of {self.layers} layers ({options})"
        uid, gid = self.owner
        return f"make a writable overlay of {self.layers} layers as {uid}:{gid} ({options})"


@dataclass(frozen=True, slots=True)
class MakeComposefs:
    """Make a composefs: an overlay of one mount of metadata over the mounts of object directories.

    The contents of files are looked up in these, and nothing else in them is shown. With `verify`, each is
    read only if fs-verity has for it the digest that the metadata names. `name` is what the mount table is
    to call the source. Raises ValueError without objects.
    """

    objects: int
    verify: bool
    name: str | None = None

    def __post_init__(self) -> None:
        if self.objects < 1:
            raise ValueError("a composefs has an object directory")

    def describe(self) -> str:
        """Return the step in one line."""
        checked = "has to have" if self.verify else "need not have"
        return (
            f"make a read-only composefs over {self.objects} object directories, "
            f"whose files {checked} the digests that the metadata names"
        )


@dataclass(frozen=True, slots=True)
class CloneTree:
    """Make a detached mount of a directory, without what is mounted below it.

    It has the attributes from its first moment on. `dev`, `ino`, `uid` and `gid` are what was judged, and
    what the clone has to have.
    """

    attributes: MountAttr
    dev: int
    ino: int
    uid: int
    gid: int

    def describe(self) -> str:
        """Return the step in one line."""
        return f"clone the directory of {self.uid}:{self.gid} with attributes {self.attributes!r}"


@dataclass(frozen=True, slots=True)
class MapToNamespace:
    """Map ids as the user namespace that the caller gave does."""

    def describe(self) -> str:
        """Return the step in one line."""
        return "map ids as the given user namespace does"


@dataclass(frozen=True, slots=True)
class MapRanges:
    """Map ids by extents: `inner` is the id on disk, `outer` the id on the host."""

    uids: tuple[IdExtent, ...]
    gids: tuple[IdExtent, ...]

    def describe(self) -> str:
        """Return the step in one line."""
        return f"map uids {_ranges(self.uids)} and gids {_ranges(self.gids)}"


@dataclass(frozen=True, slots=True)
class MapRootOwner:
    """Map whoever owns the root directory of the mount to one host uid and gid."""

    uid: int
    gid: int

    def describe(self) -> str:
        """Return the step in one line."""
        return f"map the owner of the root directory to {self.uid}:{self.gid}"


@dataclass(frozen=True, slots=True)
class Seal:
    """Lock the attributes: whoever receives the mount cannot clear them."""

    def describe(self) -> str:
        """Return the step in one line."""
        return "lock the attributes"


Operation = (
    CreateSuperblock
    | MakeOverlay
    | MakeComposefs
    | MakeMount
    | CloneTree
    | MapToNamespace
    | MapRanges
    | MapRootOwner
    | Seal
)


@dataclass(frozen=True, slots=True)
class Plan:
    """The operations for one mount, in the order in which they are carried out.

    `shared` names what is the same for other requests once it is sealed; None for what is for nobody else.
    """

    operations: tuple[Operation, ...]
    shared: str | None = None

    def describe(self) -> tuple[str, ...]:
        """Return one line for each step."""
        return tuple(operation.describe() for operation in self.operations)


def _ranges(extents: tuple[IdExtent, ...]) -> str:
    return ", ".join(f"{e.inner}→{e.outer} ({e.count})" for e in extents) or "none"
