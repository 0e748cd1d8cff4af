"""What an image in a registry is made of: index -> manifest -> configuration -> layers, by digest.

The documents come from whoever runs the registry. They are read only after their bytes have proven to have
the digest that was asked for, and even then, nothing in them is taken that is not understood: unknown media
types, layers to be fetched from elsewhere, and counts that do not agree are refused. The specification is
the OCI image format (manifest.md, image-index.md, config.md); Docker's version 2, schema 2 is the same under
other media types. Nothing here does I/O.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from mountd.errors import InvalidImage, LimitExceeded, NotFound
from mountd.store import strict_json
from mountd.store.reference import DIGEST

MAXIMUM_MANIFEST = 4 << 20  # what registries accept
MAXIMUM_CONFIGURATION = 4 << 20
MAXIMUM_INSTANCES = 256
MAXIMUM_LAYERS = 127  # overlayfs has room for 500, container runtimes make no more than this
MAXIMUM_SIZE = 1 << 62
INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
CONFIGURATIONS = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
# Media type of a layer -> how it is compressed.
LAYERS = {
    "application/vnd.oci.image.layer.v1.tar": "none",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "none",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
}
# What uname(2) calls a machine -> what images call it.
ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "i686": "386",
    "ppc64le": "ppc64le",
    "riscv64": "riscv64",
    "s390x": "s390x",
    "loongarch64": "loong64",
}
OPERATING_SYSTEM = "linux"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A document or a layer: its digest ("sha256:HEX"), its size in bytes, and what it says it is."""

    media_type: str
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Instance:
    """One image of an index, and what machine it is for."""

    descriptor: Descriptor
    operating_system: str
    architecture: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image: its configuration and its layers, the lowest first."""

    digest: str
    configuration: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """Several images under one name, for machines of several kinds."""

    digest: str
    instances: tuple[Instance, ...]


def digest_of(data: bytes) -> str:
    """Return the digest of a document as registries write it."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def check_digest(what: str, data: bytes, digest: str) -> None:
    """Raise InvalidImage unless `data` has the digest."""
    found = digest_of(data)
    if found != digest:
        raise InvalidImage(f"the digest of {what} is {found}, and {digest} was asked for")


def parse(data: bytes, digest: str) -> Manifest | Index:
    """Return what a manifest or an index says, whose bytes have to have `digest`.

    Raises InvalidImage and LimitExceeded.
    """
    document = _document("the manifest", data, digest, MAXIMUM_MANIFEST)
    if document.get("schemaVersion") != 2 or type(document["schemaVersion"]) is not int:
        raise InvalidImage("the manifest is not of schema version 2; have the image pushed again")
    claimed = document.get("mediaType")
    # The OCI's media type may be left out, so that the contents have to be unambiguous without it.
    is_index, is_manifest = "manifests" in document, "layers" in document or "config" in document
    if is_index == is_manifest:
        raise InvalidImage("the manifest is neither that of one image nor an index, or both at once")
    expected = INDEXES if is_index else MANIFESTS
    if claimed is not None and claimed not in expected:
        raise InvalidImage(f"the manifest says that it is of type {_show(claimed)}")
    return _index(document, digest) if is_index else _manifest(document, digest)


def _manifest(document: dict[str, object], digest: str) -> Manifest:
    configuration = _descriptor("the configuration", document.get("config"))
    if configuration.media_type not in CONFIGURATIONS:
        raise InvalidImage(
            f"its configuration is of type {_show(configuration.media_type)}: this is no image"
        )
    listed = _list("the layers", document.get("layers"))
    if len(listed) > MAXIMUM_LAYERS:
        raise LimitExceeded("layers of an image", MAXIMUM_LAYERS)
    if not listed:
        raise InvalidImage("it has no layers")
    layers = tuple(_descriptor(f"layer {number}", entry) for number, entry in enumerate(listed, 1))
    for number, layer in enumerate(layers, 1):
        if layer.media_type not in LAYERS:
            raise InvalidImage(
                f"layer {number} is of type {_show(layer.media_type)}, which is not supported"
            )
    return Manifest(digest, configuration, layers)


def _index(document: dict[str, object], digest: str) -> Index:
    listed = _list("the index", document["manifests"])
    if len(listed) > MAXIMUM_INSTANCES:
        raise LimitExceeded("images in an index", MAXIMUM_INSTANCES)
    instances = []
    for number, entry in enumerate(listed, 1):
        descriptor = _descriptor(f"image {number} of the index", entry)
        platform = _object(f"the platform of image {number}", entry.get("platform", {}))
        system, architecture = platform.get("os", ""), platform.get("architecture", "")
        if not isinstance(system, str) or not isinstance(architecture, str):
            raise InvalidImage(f"the platform of image {number} of the index is not made of strings")
        # Attestations and the like are listed as well; they are nothing for any machine.
        if descriptor.media_type in MANIFESTS:
            instances.append(Instance(descriptor, system, architecture))
    return Index(digest, tuple(instances))


def for_machine(index: Index, machine: str) -> tuple[Descriptor, ...]:
    """Return the images of an index that are for the kind of machine that uname(2) calls `machine`.

    Raises NotFound if there are none.
    """
    architecture = ARCHITECTURES.get(machine, machine)
    found = tuple(
        instance.descriptor
        for instance in index.instances
        if (instance.operating_system, instance.architecture) == (OPERATING_SYSTEM, architecture)
    )
    if not found:
        there = sorted({f"{each.operating_system}/{each.architecture}" for each in index.instances})
        raise NotFound(
            f"an image for {OPERATING_SYSTEM}/{architecture} under this name",
            hint=f"there are images for {_show(', '.join(there) or 'no machine')}",
        )
    return found


def diff_ids(data: bytes, manifest: Manifest) -> tuple[str, ...]:
    """Return the digests of the uncompressed layers that the configuration names.

    `data` are its bytes, which have to have the digest that the manifest names. Raises InvalidImage.
    """
    document = _document("the configuration", data, manifest.configuration.digest, MAXIMUM_CONFIGURATION)
    if document.get("os") != OPERATING_SYSTEM:
        raise InvalidImage(
            f"its configuration is for {_show(document.get('os'))}, not for {OPERATING_SYSTEM}"
        )
    rootfs = _object("rootfs of the configuration", document.get("rootfs"))
    if rootfs.get("type") != "layers":
        raise InvalidImage(f"its root file system is of type {_show(rootfs.get('type'))}, not “layers”")
    listed = _list("diff_ids of the configuration", rootfs.get("diff_ids"))
    if len(listed) != len(manifest.layers):
        raise InvalidImage(
            f"its configuration has {len(listed)} layers, its manifest {len(manifest.layers)}"
        )
    return tuple(_digest("diff_ids of the configuration", each) for each in listed)


def _document(what: str, data: bytes, digest: str, maximum: int) -> dict[str, object]:
    check_digest(what, data, digest)
    try:
        return _object(what, strict_json.loads(data, maximum))
    except strict_json.JSONError as error:
        raise InvalidImage(f"{what}: {error}") from None


def _descriptor(what: str, value: object) -> Descriptor:
    entry = _object(what, value)
    media_type, size = entry.get("mediaType"), entry.get("size")
    if not isinstance(media_type, str):
        raise InvalidImage(f"{what} has no media type")
    # The exact type: a bool is an int to isinstance.
    if type(size) is not int or not 0 <= size <= MAXIMUM_SIZE:
        raise InvalidImage(f"{what} has no size, or one that nothing has")
    if entry.get("urls"):
        raise InvalidImage(f"{what} is to be fetched from elsewhere, which is not supported")
    return Descriptor(media_type, _digest(what, entry.get("digest")), size)


def _digest(what: str, value: object) -> str:
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise InvalidImage(f"{what}: {_show(value)} is not a full SHA-256 digest")
    return value


def _object(what: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise InvalidImage(f"{what} is not a JSON object")
    return value


def _list(what: str, value: object) -> list[dict[str, object]]:
    if not isinstance(value, list):
        raise InvalidImage(f"{what}: this is not a JSON list")
    return value


def _show(value: object) -> str:
    """What a stranger wrote, for a message: short, and nothing that a terminal would act on."""
    text = value if isinstance(value, str) else type(value).__name__
    return "“" + "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:100]) + "”"
