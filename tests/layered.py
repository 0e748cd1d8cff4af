"""Images of several layers in a store, as a pull leaves them: a file each, and which belong together."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mountd.evidence.model import Provenance
from mountd.source.confined import recognise_image
from mountd.store.layering import PulledImage
from mountd.store.record import Owner
from mountd.store.store import Known, Store
from tests.images import build_image
from tests.oci import digest

REPOSITORY = "registry.example.com/apps/one"
OF_ROOT = Owner(0, 0)
HIDDEN, OPAQUE = "hidden", "opaque"  # contents that stand for what overlayfs makes of whiteouts

POLICY = """
[[rule]]
name = "{name}"
image = {{ registry = "registry.example.com/{pattern}" }}
caller = {{ any = true }}
require = {{ integrity = ["stored"], signature = "containers-policy" }}
grant = {{ file-systems = ["erofs"], idmap = ["none", "namespace", "caller"] }}
verdict = "{verdict}"
"""


@dataclass(frozen=True, slots=True)
class Image:
    """What was put: its name by digest, and the digests of the layers in the store, the lowest first."""

    reference: str
    layers: tuple[str, ...]


def rule(pattern: str = "*", verdict: str = "allow", name: str = "pulled") -> str:
    return POLICY.format(name=name, pattern=pattern, verdict=verdict)


def pulled(
    store: Store,
    layers: Sequence[Mapping[str, str]],
    repository: str = REPOSITORY,
    *,
    requirement: str = "signedBy",
    owner: Owner = OF_ROOT,
    tag: str | None = None,
) -> Image:
    """Put an image of these layers, the lowest first, into the store, as if it had been pulled.

    Each is files by their names with their contents; the content HIDDEN is for what hides this name, and
    OPAQUE for a directory that hides all that is below it in lower layers.
    """
    with tempfile.TemporaryDirectory(prefix="layered-", dir="/var/lib") as home:
        files = [made(Path(home) / str(number), layer) for number, layer in enumerate(layers)]
        in_registry = tuple(digest(file.read_bytes() + b"tar") for file in files)
        manifest = digest("".join(in_registry).encode())
        made_from = Provenance(repository, manifest, in_registry, requirement, "team", 1_700_000_000)
        stored = tuple(put(store, file, made_from, owner) for file in files)
    store.remember(PulledImage(made_from, stored), tag, time.time_ns())
    return Image(f"oci:{repository}@{manifest}", stored)


def made(tree: Path, layer: Mapping[str, str]) -> Path:
    """Return the erofs file of a layer, whose bytes are the same each time."""
    key = frozenset(layer.items())
    if key not in _known:
        _known[key] = build(tree, layer).read_bytes()
    file = tree.with_suffix(".raw")
    file.write_bytes(_known[key])
    return file


_known: dict[frozenset[tuple[str, str]], bytes] = {}


def build(tree: Path, layer: Mapping[str, str]) -> Path:
    """Make the erofs file of one layer."""
    tree.mkdir()
    for name, content in layer.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == HIDDEN:
            os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
        elif content == OPAQUE:
            path.mkdir(exist_ok=True)
            os.setxattr(path, "trusted.overlay.opaque", b"y")
        else:
            path.write_text(content)
    tree.chmod(0o755)
    return build_image("erofs", tree, tree.with_suffix(".raw"))


def put(store: Store, file: Path, made_from: Provenance, owner: Owner) -> str:
    """Put one layer into the store; return its digest there."""
    size = file.stat().st_size

    def judge(fd: int, _: str) -> Known:
        return Known(recognise_image(fd, size, confined=False))

    with file.open("rb") as opened:
        return store.add(opened.fileno(), size, owner, provenance=made_from, judge=judge).digest
