"""Pulling an image from a registry: from its name to erofs files and a record of where they are from.

    name -> digest of the manifest                    skopeo inspect, and mountd computes the digest
         -> is there a requirement that proves it?    the system's policy
         -> manifest, configuration, layers           skopeo copy, under that policy, into a quarantine
         -> manifest has the digest resolved before;  mountd, while copying into root's hands
            configuration and layers have theirs
         -> erofs                                     filter and mkfs.erofs, confined

The digest is resolved first, and what is fetched then has to have it, so that a tag that moves in between is
refused. Fetched is by the tag nevertheless: the system's policy may require different things of different
tags, and a signature may be good for one tag only. By the digest, the registry could pass an old image off
as the new one, as long as both were signed.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mountd.errors import LimitExceeded, RegistryFailed
from mountd.evidence.model import Provenance
from mountd.store import containers_policy, erofs_build, layers, manifest, quarantine, skopeo
from mountd.store.layers import LayerLimits
from mountd.store.manifest import Index, Manifest
from mountd.store.quarantine import Quarantine
from mountd.store.tar_filter import NOTHING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mountd.fds import OwnedFd
    from mountd.store.containers_policy import ContainersPolicy, Requirement
    from mountd.store.manifest import Descriptor
    from mountd.store.reference import Reference
    from mountd.store.tar_filter import Summary

    # Called about ten times a second with the phase, how much of it is done and of how much: bytes, 0 if
    # unknown. What it raises ends the pull.
    Progress = Callable[[str, int, int], None]

RESOLVE, FETCH, VERIFY, BUILD = "resolve", "fetch", "verify", "build"
MANIFEST_FILE = "manifest.json"
ROOM_HINT = "“mountctl image remove” makes room in the store"
MOVED_HINT = "pull again; give the digest alone for a certain image"


@dataclass(frozen=True, slots=True)
class PullLimits:
    """What a pull may take: bytes to fetch (`compressed`) and to keep (`stored`), and seconds for each."""

    compressed: int = 16 << 30
    stored: int = 64 << 30
    resolve_seconds: int = 60
    fetch_seconds: int = 3600
    layer: LayerLimits = field(default_factory=LayerLimits)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer as an erofs file, `name` in the work directory, mode 0400, and `erofs_fd` to read from it.

    `digest` is the layer's in the registry, `diff_id` that of its uncompressed archive.
    """

    erofs_fd: OwnedFd
    name: str
    size: int
    digest: str
    diff_id: str
    summary: Summary


@dataclass(frozen=True, slots=True)
class Pulled:
    """An image that was pulled: where it is from, and its layers, the lowest first.

    `resolved` is when the registry was asked what the name leads to, in nanoseconds since the epoch. The one
    who gets it owns the descriptors of the layers; `close` closes them.
    """

    provenance: Provenance
    layers: tuple[Layer, ...]
    resolved: int

    def close(self) -> None:
        """Close the descriptors; the files stay in the work directory."""
        for layer in self.layers:
            layer.erofs_fd.close()


def pull(
    reference: Reference,
    work_directory: int,
    *,
    progress: Progress,
    limits: PullLimits | None = None,
    accept_anything: bool = False,
    devices: bool = False,
    policy: ContainersPolicy | None = None,
) -> Pulled:
    """Pull an image and return it as erofs files in `work_directory`, which is root's alone and empty.

    The directory is borrowed; nothing is left in it if this fails, and the layers' files only if not.
    `accept_anything` is whether an image may come from where the system's policy accepts anything, which is
    then all that the record says; `devices` is whether device nodes are kept. `policy` is the system's
    unless given. Raises DeniedByPolicy, SignatureInvalid, KeyUnknown, RegistryFailed, NotFound,
    InvalidImage, LimitExceeded, NotSupported, StorageFull, TimedOut, SyscallError, OSError, and what
    `progress` raises.
    """
    limits = limits or PullLimits()
    policy = policy or containers_policy.load()
    requirement = containers_policy.require(policy, reference, accept_anything=accept_anything)
    with Quarantine(work_directory, RESOLVE) as directory:
        # Before much is fetched that nothing can be made of.
        version = erofs_build.version(directory.fileno())
        resolved = time.time_ns()
        wanted = resolve(reference, directory.fileno(), limits, progress)
    with Quarantine(work_directory, FETCH) as directory:
        found = fetch(reference, wanted, policy, directory.fileno(), limits, progress)
        image = quarantine.open_directory(directory.fileno(), skopeo.IMAGE)
        with image:
            diff_ids = read_configuration(image.fileno(), found)
            blobs = receive(image.fileno(), found, work_directory, progress)
    try:
        made = build(found, diff_ids, blobs, work_directory, version, limits, devices, progress)
    finally:
        for blob in blobs:
            blob.close()
    return Pulled(record(reference, found, requirement), made, resolved)


def resolve(
    reference: Reference, directory: int, limits: PullLimits, progress: Progress
) -> Manifest | Index:
    """Return what a name leads to now; its digest is the reference's, where that has one."""
    progress(RESOLVE, 0, 0)
    contents = skopeo.inspect(reference, directory, limits.resolve_seconds, lambda: progress(RESOLVE, 0, 0))
    digest = manifest.digest_of(contents)
    if reference.digest not in (None, digest):
        raise RegistryFailed(
            reference.host, f"{reference.identity} is {digest}, not {reference.digest}", hint=MOVED_HINT
        )
    wanted = manifest.parse(contents, digest)
    if isinstance(wanted, Index):
        manifest.for_machine(wanted, os.uname().machine)
    else:
        check_size(wanted, limits)
    return wanted


def check_size(image: Manifest, limits: PullLimits) -> None:
    """Raise LimitExceeded for an image that says that it is too large."""
    if sum(layer.size for layer in image.layers) > limits.compressed:
        raise LimitExceeded("bytes of an image to be fetched", limits.compressed)


def fetch(
    reference: Reference,
    wanted: Manifest | Index,
    policy: ContainersPolicy,
    directory: int,
    limits: PullLimits,
    progress: Progress,
) -> Manifest:
    """Have an image fetched into a quarantine, and return its manifest, which is the one that was wanted.

    Of an index, it is one of those for this machine.
    """
    machine = os.uname().machine
    total = 0 if isinstance(wanted, Index) else sum(layer.size for layer in wanted.layers)

    def tick() -> None:
        done = quarantine.usage(directory)
        # In its own place and, while it arrives, in another.
        if done > 2 * limits.compressed:
            raise LimitExceeded("bytes of an image to be fetched", limits.compressed)
        progress(FETCH, min(done, total) if total else done, total)

    skopeo.copy(
        reference,
        policy.contents,
        directory,
        machine=machine,
        maximum=limits.compressed,
        seconds=limits.fetch_seconds,
        tick=tick,
    )
    with quarantine.open_directory(directory, skopeo.IMAGE) as image:
        contents = quarantine.read_document(
            image.fileno(), MANIFEST_FILE, "the manifest", manifest.MAXIMUM_MANIFEST
        )
    digest = manifest.digest_of(contents)
    accepted = (
        {each.digest for each in manifest.for_machine(wanted, machine)}
        if isinstance(wanted, Index)
        else {wanted.digest}
    )
    if digest not in accepted:
        raise RegistryFailed(
            reference.host, f"{reference.identity} moved while it was pulled", hint=MOVED_HINT
        )
    found = manifest.parse(contents, digest)
    if isinstance(found, Index):
        raise RegistryFailed(reference.host, "there is an index where an image should be")
    check_size(found, limits)
    return found


def read_configuration(image: int, found: Manifest) -> tuple[str, ...]:
    """Return the digests of the uncompressed layers, from a configuration that is the manifest's."""
    name = found.configuration.digest.removeprefix("sha256:")
    contents = quarantine.read_document(image, name, "the configuration", manifest.MAXIMUM_CONFIGURATION)
    return manifest.diff_ids(contents, found)


def receive(image: int, found: Manifest, into: int, progress: Progress) -> list[OwnedFd]:
    """Return the layers in root's hands, each proven to have its digest; the caller owns them."""
    total = sum(layer.size for layer in found.layers)
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(VERIFY, min(done, total), total)

    blobs: list[OwnedFd] = []
    try:
        for number, layer in enumerate(found.layers, 1):
            blobs.append(quarantine.receive(image, layer, f"layer {number}", into, tick))
    except BaseException:
        for blob in blobs:
            blob.close()
        raise
    return blobs


def build(
    found: Manifest,
    diff_ids: Sequence[str],
    blobs: Sequence[OwnedFd],
    work_directory: int,
    version: tuple[int, int],
    limits: PullLimits,
    devices: bool,
    progress: Progress,
) -> tuple[Layer, ...]:
    """Make an erofs file of each layer. What was made is removed again if one of them cannot be."""
    total = sum(layer.size for layer in found.layers)
    before = 0
    left = limits.stored
    made: list[Layer] = []
    try:
        for number, (blob, layer, diff_id) in enumerate(zip(blobs, found.layers, diff_ids, strict=True)):
            work = layers.Work(
                fd=blob.fileno(),
                compression=manifest.LAYERS[layer.media_type],
                size=layer.size,
                diff_id=diff_id,
                lowest=number == 0,
                devices=devices,
                below=made[-1].summary.directories if made else NOTHING,
            )
            bounded = replace(limits.layer, image=min(limits.layer.image, left))
            made.append(
                build_layer(work, layer, number, work_directory, version, bounded, progress, before, total)
            )
            before += layer.size
            left -= made[-1].size
    except BaseException as error:
        for each in made:
            each.erofs_fd.close()
            os.unlink(each.name, dir_fd=work_directory)
        if isinstance(error, LimitExceeded) and left < limits.layer.image and is_too_large(error):
            raise LimitExceeded("bytes in the layers of an image", limits.stored, hint=ROOM_HINT) from None
        raise
    return tuple(made)


def is_too_large(error: LimitExceeded) -> bool:
    """Tell whether the file system of a layer would have been larger than it may be."""
    return error.parameters["limit"] == erofs_build.LIMIT


def build_layer(
    work: layers.Work,
    layer: Descriptor,
    number: int,
    work_directory: int,
    version: tuple[int, int],
    limits: LayerLimits,
    progress: Progress,
    before: int,
    total: int,
) -> Layer:
    """Make the erofs file of one layer; `before` of `total` bytes were done before it."""

    def tick() -> None:
        # The children read through the same open file.
        progress(BUILD, before + os.lseek(work.fd, 0, os.SEEK_CUR), total)

    with Quarantine(work_directory, BUILD) as directory:
        summary = layers.build(work, directory.fileno(), limits, version, tick)
        name = f"layer-{number}.erofs"
        fd, size = quarantine.take(directory.fileno(), erofs_build.NAME, work_directory, name)
    return Layer(fd, name, size, layer.digest, work.diff_id, summary)


def record(reference: Reference, found: Manifest, requirement: Requirement) -> Provenance:
    """Return what is to be remembered of where an image is from."""
    return Provenance(
        repository=reference.repository,
        manifest=found.digest,
        layers=tuple(layer.digest for layer in found.layers),
        requirement=requirement.name,
        signer=requirement.signer,
        time=int(time.time()),
    )
