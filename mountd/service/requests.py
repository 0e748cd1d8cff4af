"""The calls of io.mountd.Mount as typed requests: every field checked, every descriptor accounted for.

Types were compared with the interface file before (wire/dispatch); here are the rules that it cannot say.
Descriptors stay the message's: a request borrows their numbers.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mountd.errors import InvalidParameter, LimitExceeded, NotSupported
from mountd.plan.idmap import IdMapKind, IdMapWish, IdRange
from mountd.service.descriptors import Descriptors
from mountd.service.layers import TOP, at_layer
from mountd.source.model import SourceKind, Tmpfs
from mountd.store import reference as registry_reference
from mountd.store.record import hex_of
from mountd.trust import image_policy
from mountd.trust.options import is_generic
from mountd.trust.wishes import MountWishes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mountd.fds import OwnedFd
    from mountd.store.layering import StoredLayer
    from mountd.store.reference import Reference

IMAGE_FIELD = "source.imageFileDescriptor"
SIGNATURE_FIELD = "source.signature"
VERITY_FIELD = "source.verity.dataFileDescriptor"
ROOT_HASH = re.compile("[0-9a-f]{64}|[0-9a-f]{128}")
MAXIMUM_SIGNATURE = 350_000  # characters of base64: as many bytes as a signature may have
REFERENCE_FIELD = "source.reference"
STORED_PREFIX = "stored:"
PASSWORD_FIELD = "password"
MAXIMUM_PASSWORD = 4096  # bytes; a pipe takes them at once
NAMESPACE_FIELD = "userNamespaceFileDescriptor"
TARGET_FIELD = "targetFileDescriptor"
PARTITION_OPTIONS = "partitionOptions"
SOURCES = (
    "imageFileDescriptor",
    "directoryFileDescriptor",
    "layers",
    "composefs",
    "reference",
    "tmpfs",
    "network",
    "contextFileDescriptor",
)
DIRECTORY_FIELD = "source.directoryFileDescriptor"
COMPANIONS = ("verity", "signature")  # of imageFileDescriptor
SUPPORTED_SOURCES = (
    "imageFileDescriptor",
    "directoryFileDescriptor",
    "layers",
    "composefs",
    "reference",
    "tmpfs",
)
COMPOSEFS_FIELD = "source.composefs"
DESCRIPTION_FIELD = f"{COMPOSEFS_FIELD}.dumpFileDescriptor"
OBJECTS_FIELD = f"{COMPOSEFS_FIELD}.objectsFileDescriptors"
COMPOSEFS_TYPES = ("composefs", "overlay")
DIGEST = re.compile("[0-9a-f]{64}")
MAXIMUM_OBJECTS = 15  # one descriptor of a message is that of the metadata
LAYERS_FIELD = "source.layers"
# Each is a superblock of its own, and may take a loop device.
MAXIMUM_LAYERS = 32
MINIMUM_LAYERS = 2
OVERLAY = "overlay"
TOP_HINT = "mount it read-only, or with a top (source.top)"
DEFAULT_TMPFS_MODE = 0o755
TMPFS_MODE_BITS = 0o1777


@dataclass(frozen=True, slots=True)
class MountRequest:
    """A call of Mount, Explain or Attach. The descriptors are borrowed from the message.

    Of `image_fd`, `stored` (the digest of an image of the store, a name in a registry with the digest of a
    manifest, or later a layer of what has this name), `tmpfs` and `directory_fd`, one is not None. `verity`
    and the bytes of `signature` may go with `image_fd`. A stack has none of these but `layers`, the topmost
    first, which are requests with the same wishes; what has a `top` to write to is such a stack as well, of
    one layer or more that are to be read only, and the top is a request for a tmpfs or a directory.
    `composefs` goes with the `image_fd` of metadata, or has a description in its stead. `password` opens
    what is encrypted, and is shown nowhere. `target_fd` is for Attach. `interactive` is whether a person may
    be asked.
    """

    kind: SourceKind
    image_fd: int | None
    tmpfs: Tmpfs | None
    stored: str | Reference | StoredLayer | None
    userns_fd: int | None
    idmap: IdMapWish
    wishes: MountWishes
    signature: bytes | None = None
    verity: VerityRequest | None = None
    target_fd: int | None = None
    interactive: bool = False
    directory_fd: int | None = None
    layers: tuple[MountRequest, ...] = ()
    composefs: ComposefsRequest | None = None
    top: MountRequest | None = None
    password: bytearray | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_call(cls, parameters: dict[str, Any], fds: Sequence[OwnedFd]) -> MountRequest:
        """Read the parameters, of which the password is taken out. Raises InvalidParameter, NotSupported."""
        password = read_password(parameters.pop("password", None))
        table = Descriptors(fds)
        what = read_what(parameters["source"], table)
        layers = tuple(what.layers)
        userns_fd = table.optional(parameters.get(NAMESPACE_FIELD), NAMESPACE_FIELD)
        idmap = read_idmap(parameters.get("idMap"), namespace_given=userns_fd is not None)
        target_fd = table.optional(parameters.get(TARGET_FIELD), TARGET_FIELD)
        table.check_all_named()
        demanded = parameters.get("imagePolicy")
        read_only = parameters.get("readOnly")
        wishes = MountWishes(
            read_only=True if read_only is None else read_only,
            file_system_type=parameters.get("fileSystemType"),
            options=tuple(parameters.get("options") or ()),
            idmap_kind=idmap.kind.value,
            namespace_given=userns_fd is not None,
            image_policy=None if demanded is None else image_policy.parse(demanded),
            disk_uids=tuple((each.first, each.count) for each in idmap.uid_ranges),
            disk_gids=tuple((each.first, each.count) for each in idmap.gid_ranges),
            # A field of the other interface only (service.mountfs).
            partition_options=tuple(
                (name, tuple(each)) for name, each in (parameters.get(PARTITION_OPTIONS) or {}).items()
            ),
        )
        made = cls(
            what.kind,
            what.image_fd,
            what.tmpfs,
            what.stored,
            userns_fd,
            idmap,
            wishes,
            what.signature,
            what.verity,
            target_fd,
            parameters.get("interactive") is True,
            what.directory_fd,
            password=password,
        )
        if what.top is not None:
            return made.topped(what, what.top)
        if what.composefs is not None:
            return made.with_objects(what.composefs)
        return made.stacked(layers) if layers else made

    def refuse_password(self) -> None:
        """Raise InvalidParameter if there is a password: nothing is encrypted that could need it.

        Whoever expects an encrypted image does not get one that somebody has put in its place.
        """
        if self.password is not None:
            raise InvalidParameter(PASSWORD_FIELD, "nothing in the image is encrypted")

    def topped(self, what: What, top: What) -> MountRequest:
        """Return this request as one of a stack with this top. Raises InvalidParameter, NotSupported."""
        wishes = self.wishes
        if wishes.read_only or "ro" in wishes.options:
            raise InvalidParameter("readOnly", f"{TOP} is there to be written to, so it has to be false")
        if what.kind is SourceKind.TMPFS:
            raise InvalidParameter(TOP, "a tmpfs can be written to without one")
        if wishes.file_system_type not in (None, OVERLAY):
            raise InvalidParameter("fileSystemType", f"a stack is an {OVERLAY}")
        for_all = tuple(option for option in wishes.options if is_generic(option))
        below = replace(
            self,
            target_fd=None,
            password=None,
            wishes=replace(
                wishes,
                read_only=True,
                file_system_type=None,
                options=tuple(option for option in wishes.options if option != "rw"),
            ),
        )
        if what.layers:
            layers = below.stacked(what.layers).layers
        elif what.composefs is not None:
            layers = (below.with_objects(what.composefs),)
        else:
            layers = (below,)
        made = replace(
            self.of(top),
            target_fd=None,
            password=None,
            # It is no image, and of no type that the caller has a say in.
            wishes=replace(wishes, file_system_type=None, image_policy=None, options=for_all),
        )
        return replace(self, **NOTHING, kind=SourceKind.STACK, layers=layers, top=made)

    def of(self, what: What) -> MountRequest:
        """Return this request as one for another source, which is no stack."""
        return replace(
            self,
            kind=what.kind,
            image_fd=what.image_fd,
            tmpfs=what.tmpfs,
            stored=what.stored,
            signature=what.signature,
            verity=what.verity,
            directory_fd=what.directory_fd,
        )

    def with_objects(self, composefs: ComposefsRequest) -> MountRequest:
        """Return this request as one for a composefs. Raises InvalidParameter, NotSupported."""
        wishes = self.wishes
        if wishes.file_system_type not in (None, *COMPOSEFS_TYPES):
            raise InvalidParameter("fileSystemType", f"a composefs is one of {', '.join(COMPOSEFS_TYPES)}")
        if not wishes.read_only:
            raise NotSupported("a composefs to write to without a top", hint=TOP_HINT)
        return replace(self, composefs=composefs, wishes=replace(wishes, file_system_type=None))

    def stacked(self, layers: tuple[What, ...]) -> MountRequest:
        """Return this request as one of a stack with these layers. Raises InvalidParameter, NotSupported."""
        wishes = self.wishes
        if wishes.file_system_type not in (None, OVERLAY):
            raise InvalidParameter("fileSystemType", f"a stack is an {OVERLAY}")
        if not wishes.read_only:
            raise NotSupported("a stack to write to without a top", hint=TOP_HINT)
        each = replace(self, target_fd=None, password=None, wishes=replace(wishes, file_system_type=None))
        return replace(self, layers=tuple(each.of(layer) for layer in layers))


@dataclass(frozen=True, slots=True)
class What:
    """One source, or the layers of a stack; the fields are those of `MountRequest`."""

    kind: SourceKind
    image_fd: int | None = None
    tmpfs: Tmpfs | None = None
    stored: str | Reference | StoredLayer | None = None
    directory_fd: int | None = None
    signature: bytes | None = None
    verity: VerityRequest | None = None
    layers: tuple[What, ...] = ()
    composefs: ComposefsRequest | None = None
    top: What | None = None


# What a stack has none of: each layer has its own.
NOTHING: dict[str, Any] = dict.fromkeys(
    ("image_fd", "tmpfs", "stored", "signature", "verity", "directory_fd", "composefs")
)


@dataclass(frozen=True, slots=True)
class ComposefsRequest:
    """The directories with the contents of a composefs, and its description if no image came; borrowed.

    `digest` is the one that the image has to have, in hexadecimal, `verity` whether contents are to be
    checked.
    """

    objects_fds: tuple[int, ...]
    description_fd: int | None
    digest: str | None
    verity: bool


@dataclass(frozen=True, slots=True)
class VerityRequest:
    """The hash data of dm-verity, borrowed, and the root hash that the image is to have."""

    hash_fd: int
    root_hash: bytes
    signature: bytes | None


def read_password(text: str | None) -> bytearray | None:
    """Return a password as it goes to whoever needs it. Raises InvalidParameter, which does not have it."""
    if text is None:
        return None
    password = bytearray(text.encode())
    if not 0 < len(password) <= MAXIMUM_PASSWORD:
        raise InvalidParameter(PASSWORD_FIELD, f"it has not 1 to {MAXIMUM_PASSWORD} bytes")
    return password


def read_what(source: Mapping[str, Any], table: Descriptors) -> What:
    """Read a source with all that goes with it, or those of a stack, and with its top."""
    found = read_one(source, table)
    if source.get("top") is None:
        return found
    return replace(found, top=read_top(source["top"], table))


def read_top(top: Mapping[str, Any], table: Descriptors) -> What:
    """Read what takes what is written to a stack. Raises InvalidParameter."""
    size, inodes, directory = (top.get(name) for name in ("sizeBytes", "inodes", "directoryFileDescriptor"))
    if (size is None) is (directory is None):
        raise InvalidParameter(TOP, "one of sizeBytes and directoryFileDescriptor has to be given")
    if directory is not None:
        if inodes is not None:
            raise InvalidParameter(f"{TOP}.inodes", "it goes with sizeBytes only")
        fd = table.take(directory, f"{TOP}.directoryFileDescriptor")
        return What(SourceKind.DIRECTORY, directory_fd=fd)
    if size is None or size < 1:
        raise InvalidParameter(f"{TOP}.sizeBytes", "it has to be at least 1 byte")
    if inodes is not None and inodes < 1:
        raise InvalidParameter(f"{TOP}.inodes", "there has to be at least 1")
    return What(SourceKind.TMPFS, tmpfs=Tmpfs(size, inodes, DEFAULT_TMPFS_MODE))


def read_one(source: Mapping[str, Any], table: Descriptors) -> What:
    """Read a source without its top."""
    image_fd, tmpfs, stored = read_source(source, table)
    if source.get("layers") is not None:
        fewest = MINIMUM_LAYERS if source.get("top") is None else 1
        return What(SourceKind.STACK, layers=read_layers(source["layers"], table, fewest))
    if source.get("composefs") is not None:
        return read_composefs(source["composefs"], source.get("signature"), table)
    directory_fd = table.optional(source.get("directoryFileDescriptor"), DIRECTORY_FIELD)
    verity = read_verity(source.get("verity"), table)
    signature = read_signature(source.get("signature"), SIGNATURE_FIELD)
    if verity is not None and verity.signature is not None:
        if signature is not None:
            raise InvalidParameter(SIGNATURE_FIELD, "the root hash has one already; give one of them")
        signature = verity.signature
    kind = SourceKind.TMPFS if tmpfs is not None else SourceKind.IMAGE
    kind = SourceKind.DIRECTORY if directory_fd is not None else kind
    return What(kind, image_fd, tmpfs, stored, directory_fd, signature, verity)


def read_composefs(composefs: Mapping[str, Any], signature: str | None, table: Descriptors) -> What:
    """Read a composefs. Raises InvalidParameter, LimitExceeded."""
    image_fd = table.optional(composefs.get("imageFileDescriptor"), f"{COMPOSEFS_FIELD}.imageFileDescriptor")
    description_fd = table.optional(composefs.get("dumpFileDescriptor"), DESCRIPTION_FIELD)
    if (image_fd is None) is (description_fd is None):
        raise InvalidParameter(
            COMPOSEFS_FIELD, "one of imageFileDescriptor and dumpFileDescriptor has to be given"
        )
    if signature is not None and image_fd is None:
        raise InvalidParameter(SIGNATURE_FIELD, "nobody can have signed what mountd makes itself")
    numbers = composefs["objectsFileDescriptors"]
    if not numbers:
        raise InvalidParameter(OBJECTS_FIELD, "there has to be one directory at least")
    if len(numbers) > MAXIMUM_OBJECTS:
        raise LimitExceeded("object directories of a composefs", MAXIMUM_OBJECTS)
    digest = composefs.get("digest")
    if digest is not None and DIGEST.fullmatch(digest) is None:
        raise InvalidParameter(f"{COMPOSEFS_FIELD}.digest", "it is not 64 digits of 0-9 and a-f")
    objects = tuple(table.take(each, f"{OBJECTS_FIELD}[{at}]") for at, each in enumerate(numbers))
    return What(
        SourceKind.IMAGE if description_fd is None else SourceKind.COMPOSEFS,
        image_fd,
        signature=read_signature(signature, SIGNATURE_FIELD),
        composefs=ComposefsRequest(objects, description_fd, digest, composefs.get("verity") is True),
    )


def read_layers(
    layers: Sequence[Mapping[str, Any]], table: Descriptors, fewest: int = MINIMUM_LAYERS
) -> tuple[What, ...]:
    """Read the layers of a stack. Raises InvalidParameter, NotSupported, LimitExceeded."""
    if len(layers) > MAXIMUM_LAYERS:
        raise LimitExceeded("layers of a stack", MAXIMUM_LAYERS)
    if len(layers) < fewest:
        raise InvalidParameter(LAYERS_FIELD, f"a stack has {fewest} layers or more")
    found = []
    for number, layer in enumerate(layers):
        with at_layer(number):
            for name in ("layers", "tmpfs", "composefs", "top"):
                if layer.get(name) is not None:
                    reason = "a layer is an image, a directory or a reference"
                    raise InvalidParameter(f"source.{name}", reason)
            found.append(read_what(layer, table))
    return tuple(found)


def read_source(
    source: Mapping[str, Any], table: Descriptors
) -> tuple[int | None, Tmpfs | None, str | Reference | None]:
    """Read the one source that a request has: an image, a tmpfs or what names a stored image.

    A directory is none of these, nor are layers.
    """
    given = [name for name in SOURCES if source.get(name) is not None]
    if len(given) != 1:
        raise InvalidParameter("source", f"exactly one of {', '.join(SOURCES)} has to be given")
    if given[0] not in SUPPORTED_SOURCES:
        raise NotSupported(f"source.{given[0]}", hint="hand over the image itself, as imageFileDescriptor")
    for name in COMPANIONS:
        signed = name == "signature" and given[0] == "composefs"
        if source.get(name) is not None and given[0] != "imageFileDescriptor" and not signed:
            raise InvalidParameter(f"source.{name}", "it goes with imageFileDescriptor only")
    if given[0] == "tmpfs":
        return None, read_tmpfs(source["tmpfs"]), None
    if given[0] in ("directoryFileDescriptor", "layers", "composefs"):
        return None, None, None
    if given[0] == "reference":
        return None, None, read_reference(source["reference"])
    return table.take(source["imageFileDescriptor"], IMAGE_FIELD), None, None


def read_verity(verity: Mapping[str, Any] | None, table: Descriptors) -> VerityRequest | None:
    """Read what belongs to dm-verity. Raises InvalidParameter."""
    if verity is None:
        return None
    hash_fd = table.take(verity["dataFileDescriptor"], VERITY_FIELD)
    text = verity["rootHash"]
    if ROOT_HASH.fullmatch(text) is None:
        raise InvalidParameter("source.verity.rootHash", "it is not 64 or 128 digits of 0-9 and a-f")
    signature = read_signature(verity.get("signature"), "source.verity.signature")
    return VerityRequest(hash_fd, bytes.fromhex(text), signature)


def read_signature(text: str | None, field: str) -> bytes | None:
    """Return the bytes of a signature. Raises InvalidParameter."""
    if text is None:
        return None
    if len(text) > MAXIMUM_SIGNATURE:
        raise InvalidParameter(field, f"longer than {MAXIMUM_SIGNATURE} characters")
    try:
        return base64.b64decode(text.encode(), validate=True)
    except binascii.Error:
        raise InvalidParameter(field, "it is not base64") from None


def read_reference(reference: str) -> str | Reference:
    """Return what names a stored image: its digest, or its name where it was pulled from.

    Raises InvalidParameter, NotSupported for another kind of reference.
    """
    if reference.startswith(registry_reference.SCHEME):
        return read_registry_reference(reference)
    if not reference.startswith(STORED_PREFIX):
        raise NotSupported(
            REFERENCE_FIELD,
            hint="name an image of the store, as “stored:sha256:…” or “oci:HOST/REPOSITORY:TAG”",
        )
    digest = reference.removeprefix(STORED_PREFIX)
    try:
        hex_of(digest)
    except InvalidParameter as error:
        raise InvalidParameter(REFERENCE_FIELD, str(error.parameters["reason"])) from None
    return digest


def read_registry_reference(text: str) -> Reference:
    """Return the name of an image that was pulled. Raises InvalidParameter."""
    try:
        return registry_reference.parse(text)
    except InvalidParameter as error:
        raise InvalidParameter(REFERENCE_FIELD, str(error.parameters["reason"])) from None


def read_tmpfs(tmpfs: Mapping[str, Any]) -> Tmpfs:
    """Read the wishes for a tmpfs; the policy bounds them."""
    size, inodes, mode = tmpfs["size"], tmpfs.get("inodes"), tmpfs.get("mode")
    if size < 1:
        raise InvalidParameter("source.tmpfs.size", "it has to be at least 1 byte")
    if inodes is not None and inodes < 1:
        raise InvalidParameter("source.tmpfs.inodes", "there has to be at least 1")
    mode = DEFAULT_TMPFS_MODE if mode is None else mode
    if mode & ~TMPFS_MODE_BITS:
        raise InvalidParameter("source.tmpfs.mode", f"only the bits {TMPFS_MODE_BITS:o} can be set")
    return Tmpfs(size, inodes, mode)


def read_idmap(idmap: Mapping[str, Any] | None, *, namespace_given: bool) -> IdMapWish:
    """Read how ids are to be mapped."""
    if idmap is None:
        return IdMapWish(IdMapKind.NAMESPACE if namespace_given else IdMapKind.NONE)
    kind = IdMapKind(idmap["kind"])
    ranges = {name: idmap.get(name) for name in ("uidRanges", "gidRanges")}
    if kind is not IdMapKind.RANGES:
        for name, value in ranges.items():
            if value is not None:
                raise InvalidParameter(f"idMap.{name}", "it goes with the kind “ranges” only")
        if kind is IdMapKind.NAMESPACE and not namespace_given:
            raise InvalidParameter(NAMESPACE_FIELD, "the idMap “namespace” needs it")
        return IdMapWish(kind)
    return IdMapWish(kind, read_ranges(ranges["uidRanges"]), read_ranges(ranges["gidRanges"]))


def read_ranges(ranges: Sequence[Mapping[str, int]] | None) -> tuple[IdRange, ...]:
    """Read the ranges of one kind of id; `plan.idmap` judges them."""
    return tuple(IdRange(each["first"], each["target"], each["count"]) for each in ranges or ())
