"""Callers, sources, evidence and rules, as small as they can be, for tests of the verdict."""

from __future__ import annotations

from dataclasses import replace

from mountd.caller.model import Caller, UserNamespace
from mountd.evidence.model import Evidence, Key, Proof, Provenance, Signer
from mountd.source.model import (
    BackingFile,
    Disk,
    FileSystem,
    Partition,
    PartitionVerity,
    Source,
    SourceKind,
    Tmpfs,
    VeritySuperblock,
    Window,
)
from mountd.trust.policy import (
    Access,
    CallerMatch,
    Grant,
    ImageMatch,
    Policy,
    Require,
    Rule,
    Verdict,
)
from mountd.trust.wishes import MountWishes

HOST = UserNamespace(4, 1, (), (), 0, True)
CONTAINER = UserNamespace(4, 2, (), (), 1000, False)
USER = Caller(1000, 1000, frozenset({500}), 7, HOST, 1000)
ROOT = replace(USER, uid=0, gid=0, groups=frozenset(), sys_admin=True)
NESTED = replace(USER, uid=100000, gid=100000, user_namespace=CONTAINER)

PATH = "/srv/images/a.raw"
NOWHERE = Evidence(None, "/home/u belongs to uid 1000", False)
LOCATED = Evidence(PATH, None, False)
WISHES = MountWishes(True, None, (), "none", False)

BYTES = "sha256:" + "1" * 64
OTHER_BYTES = "sha256:" + "2" * 64
TREE = "sha256:" + "3" * 64
KEYS = {name: Key(name, "x509", (b"key",), f"/etc/{name}") for name in ("team", "other")}
PULLED = Provenance("registry.example.com/team/app", "sha256:0", (), "sigstoreSigned", "CN=registry", 1)

ANYBODY = CallerMatch(any=True)
GRANT = Grant(("erofs", "ext4"))
GRANT_WRITE = replace(GRANT, access=Access.READ_WRITE)
EVERY_KIND = ("sealed", "dm-verity", "fs-verity", "stored", "root-owned")


def image(type: str = "ext4", hint: str | None = None) -> Source:
    """Return an image that holds a file system of this type."""
    backing = BackingFile(4096, 1, 2, 0, 0, 0o100644, False, hint)
    return Source(SourceKind.IMAGE, backing, FileSystem(type, 4096, 4096, None, None, False), None)


def disk_image(designators: tuple[str, ...], type: str, only_verity: bool = False) -> Source:
    """Return an image with these partitions, of which root has hash data."""
    window = Window(1 << 20, 1 << 20)
    hashes = VeritySuperblock(4096, 4096, 1, 1, "sha256", b"", None)
    verity = PartitionVerity(hashes, bytes(32), window, None)
    found = tuple(
        Partition(
            *(name, number, "", "", None, window, False, False),
            file_system=FileSystem(type, 4096, 4096, None, None, False),
            verity=verity if name == "root" else None,
        )
        for number, name in enumerate(designators, 1)
    )
    return replace(image(), file_system=None, disk=Disk(512, "", found, only_verity))


def tmpfs(size: int = 1000, inodes: int | None = None) -> Source:
    """Return a tmpfs to be made."""
    return Source(SourceKind.TMPFS, None, None, Tmpfs(size, inodes, 0o755))


def rule(
    name: str = "images",
    *,
    image: ImageMatch | None = None,
    caller: CallerMatch = ANYBODY,
    require: Require | None = None,
    grant: Grant = GRANT,
    verdict: Verdict = Verdict.ALLOW,
) -> Rule:
    """Return a rule about any image that nobody can change."""
    return Rule(
        name,
        f"a.toml: {name}",
        image or ImageMatch(any=True),
        caller,
        require or Require(EVERY_KIND),
        grant,
        verdict,
    )


def deny(name: str = "no", **parts: object) -> Rule:
    """Return a rule that denies."""
    return replace(
        rule(name, **parts),  # type: ignore[arg-type]
        require=None,
        grant=None,
        verdict=Verdict.DENY,
    )


def memory(name: str = "memory") -> Rule:
    """Return a rule that allows a tmpfs of up to 1 MiB."""
    grant = Grant(access=Access.READ_WRITE, max_size=1 << 20)
    return Rule(name, f"a.toml: {name}", ImageMatch(kind="tmpfs"), ANYBODY, None, grant, Verdict.ALLOW)


def policy(*rules: Rule) -> Policy:
    """Return a policy with the keys “team” and “other”."""
    return Policy(rules, KEYS)


def proven(kind: str, digest: str | None = None, **more: object) -> Evidence:
    """Return the evidence for an image of the caller's that is immutable in one way."""
    return replace(NOWHERE, proofs=(Proof(kind, digest),), **more)  # type: ignore[arg-type]


def signed(key: str = "team", covers: str = "image", digest: str = BYTES) -> Signer:
    """Return a signature that holds."""
    return Signer(key, f"CN={key}", covers, digest)
