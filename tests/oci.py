"""OCI images made by hand: archives of layers, and layouts that skopeo can copy from."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIGURATION = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
TIME = 1_700_000_000


@dataclass
class Member:
    """One entry of an archive; with `content` a file, else of the `type`."""

    name: str
    content: bytes | None = None
    type: bytes = tarfile.REGTYPE
    link: str = ""
    mode: int = 0o755
    uid: int = 0
    xattrs: dict[str, str] | None = None
    device: tuple[int, int] = (0, 0)
    mtime: float = TIME


def directory(name: str, **other: object) -> Member:
    return Member(name, type=tarfile.DIRTYPE, **other)  # type: ignore[arg-type]


def archive(*members: Member, format: int = tarfile.PAX_FORMAT) -> bytes:
    """The members as a tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as file:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.linkname, info.mode, info.uid = member.type, member.link, member.mode, member.uid
            info.gid, info.mtime = member.uid, member.mtime
            info.devmajor, info.devminor = member.device
            info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (member.xattrs or {}).items()}
            info.size = len(member.content or b"")
            file.addfile(info, io.BytesIO(member.content or b""))
    return out.getvalue()


def compress(data: bytes, how: str) -> bytes:
    """The data as a layer is stored: `how` is the suffix of its media type."""
    if how == "gzip":
        return gzip.compress(data, mtime=0)
    if how == "zstd":
        return subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True, check=True).stdout
    return data


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def descriptor(media_type: str, data: bytes, **other: object) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data), **other}


class Layout:
    """An OCI layout under construction."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes) -> None:
        (self.path / "blobs/sha256" / digest(data).removeprefix("sha256:")).write_bytes(data)

    def document(self, value: object) -> bytes:
        data = json.dumps(value).encode()
        self.blob(data)
        return data

    def image(
        self, archives: Sequence[bytes], *, compression: str = "gzip", architecture: str = "amd64"
    ) -> bytes:
        """Add an image of the layers and return its manifest."""
        blobs = [compress(each, compression) for each in archives]
        for blob in blobs:
            self.blob(blob)
        configuration = self.document(
            {
                "os": "linux",
                "architecture": architecture,
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": [digest(each) for each in archives]},
                "history": [{"created_by": "a test"} for _ in archives],
            }
        )
        media_type = LAYER if compression == "none" else f"{LAYER}+{compression}"
        return self.document(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": descriptor(CONFIGURATION, configuration),
                "layers": [descriptor(media_type, blob) for blob in blobs],
            }
        )

    def index(self, manifests: dict[str, bytes]) -> bytes:
        """Add an index of manifests by architecture and return it."""
        listed = [
            descriptor(MANIFEST, data, platform={"os": "linux", "architecture": architecture})
            for architecture, data in manifests.items()
        ]
        return self.document({"schemaVersion": 2, "mediaType": INDEX, "manifests": listed})

    def close(self, top: bytes, media_type: str = MANIFEST) -> str:
        """Finish the layout with one image or index in it; return its digest."""
        listed = {"schemaVersion": 2, "manifests": [descriptor(media_type, top)]}
        (self.path / "index.json").write_text(json.dumps(listed))
        return digest(top)
