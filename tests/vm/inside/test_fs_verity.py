"""fs-verity: what the kernel measures, and that it lets nobody change what it has measured."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.errors import SyscallError
from mountd.evidence.fs_verity import NOT_ENABLED, digest_of, missing_in, prove
from mountd.evidence.model import Proof
from mountd.execute.run import Inputs, run
from mountd.fds import OwnedFd
from mountd.kernel import fs_verity
from mountd.kernel.flags import MountAttr, VerityAlgorithm
from mountd.plan.operations import Backing, CreateSuperblock, MakeMount, Plan
from tests.sealing import Unsealed
from tests.verity import Verified, flip

MIB = 1 << 20
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-b", "4096", "-O", "verity"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "plain ext4": ["mkfs.ext4", "-q", "-b", "4096"],
    "xfs": ["mkfs.xfs", "-q"],
}


def make(kind: str, scratch: Path) -> tuple[Path, Path]:
    """Make and mount a file system; return its disk and where it is mounted."""
    place = Path(tempfile.mkdtemp(dir=scratch))
    disk, target = place / "disk", place / "mounted"
    with disk.open("wb") as file:
        file.truncate((320 if kind == "xfs" else 128) * MIB)
    subprocess.run([*MAKE[kind], disk], check=True, capture_output=True)
    target.mkdir()
    subprocess.run(["mount", "-o", "loop", disk, target], check=True)
    return disk, target


def unmake(disk: Path, target: Path) -> None:
    subprocess.run(["umount", target], check=True)
    shutil.rmtree(disk.parent)


@pytest.fixture(scope="module", params=["ext4", "btrfs"])
def place(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Path]:
    """A directory on a file system that has fs-verity."""
    disk, target = make(request.param, scratch)
    yield target
    unmake(disk, target)


@pytest.fixture(scope="module")
def bare(scratch: Path) -> Iterator[dict[str, Path]]:
    """Directories where there is no fs-verity."""
    made = {kind: make(kind, scratch) for kind in ("plain ext4", "xfs")}
    yield {kind: target for kind, (_, target) in made.items()}
    for disk, target in made.values():
        unmake(disk, target)


def write(path: Path, size: int = 300_000) -> Path:
    path.write_bytes(os.urandom(size))
    return path


def enable(path: Path, **how: object) -> None:
    with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
        fs_verity.enable(fd.fileno(), **how)  # type: ignore[arg-type]


def proof(path: Path) -> Proof | str:
    with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
        return prove(fd.fileno())


def computed(path: Path, *options: str) -> str:
    """What the tool computes from the contents, without asking the kernel."""
    done = subprocess.run(["fsverity", "digest", *options, path], capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 3 * MIB])
def test_the_measured_digest_is_that_of_the_contents(place: Path, size: int) -> None:
    path = write(place / f"file-{size}", size)
    assert proof(path) == NOT_ENABLED
    enable(path)
    assert proof(path) == Proof("fs-verity", computed(path))


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 128 * 4096, 128 * 4096 + 1, 3 * MIB])
def test_the_computed_digest_is_the_measured_one(place: Path, size: int) -> None:
    """As a composefs has it, whose image need not have fs-verity."""
    path = write(place / f"computed-{size}", size)
    with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
        digest = digest_of(fd.fileno(), size)
        with pytest.raises(ValueError, match="shorter"):
            digest_of(fd.fileno(), size + 1)
    enable(path)
    assert proof(path) == Proof("fs-verity", f"sha256:{digest}")


def test_which_directories_can_have_such_files(place: Path, bare: dict[str, Path]) -> None:
    def missing(path: Path) -> str | None:
        with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
            return missing_in(fd.fileno())

    (place / "objects").mkdir()
    assert missing(place / "objects") is None
    assert {kind: missing(path) for kind, path in bare.items()} == {
        "plain ext4": "its file system has no fs-verity, or was made without the feature verity",
        "xfs": "its file system has no fs-verity",
    }


def test_other_algorithm_and_salt(place: Path) -> None:
    path = write(place / "salted")
    enable(path, algorithm=VerityAlgorithm.SHA512, salt=b"salt")
    digest = computed(path, "--hash-alg=sha512", f"--salt={b'salt'.hex()}")
    assert digest.startswith("sha512:")
    assert proof(path) == Proof("fs-verity", digest)


def test_what_the_tool_enables_is_measured_alike(place: Path) -> None:
    path = write(place / "by-tool")
    subprocess.run(["fsverity", "enable", path], check=True)
    assert proof(path) == Proof("fs-verity", computed(path))


def test_nobody_can_write_any_more(place: Path) -> None:
    path = write(place / "frozen")
    enable(path)
    for attempt in (
        lambda: os.open(path, os.O_RDWR),
        lambda: os.open(path, os.O_WRONLY | os.O_APPEND),
        lambda: os.truncate(path, 0),
    ):
        with pytest.raises(OSError, match="Operation not permitted"):
            attempt()
    with OwnedFd(os.open(path, os.O_RDONLY)) as fd, pytest.raises(SyscallError, match="EEXIST"):
        fs_verity.enable(fd.fileno())


def test_not_while_somebody_can_write(place: Path) -> None:
    path = write(place / "busy")
    with OwnedFd(os.open(path, os.O_RDWR)), pytest.raises(SyscallError) as caught:
        enable(path)
    assert caught.value.errno == errno.ETXTBSY
    assert "FS_IOC_ENABLE_VERITY" in caught.value.call
    assert proof(path) == NOT_ENABLED


def test_salt_that_is_too_long(place: Path) -> None:
    with pytest.raises(ValueError, match="33 bytes"):
        enable(write(place / "salt"), salt=bytes(33))


def test_a_name_that_leads_to_another_file(place: Path) -> None:
    """The proof is about the descriptor: what its name leads to by now is nothing to it."""
    good, bad = write(place / "good"), write(place / "bad")
    enable(good)
    with OwnedFd(os.open(good, os.O_RDONLY)) as fd:
        digest = computed(good)
        bad.rename(good)
        assert prove(fd.fileno()) == Proof("fs-verity", digest)
    assert proof(good) == NOT_ENABLED


@pytest.fixture
def ext4(scratch: Path) -> Iterator[tuple[Path, Path]]:
    """A disk with an ext4 that has fs-verity, and where it is mounted."""
    disk, target = make("ext4", scratch)
    yield disk, target
    unmake(disk, target)


@pytest.mark.parametrize(
    ("kind", "reason"), [("plain ext4", "made without the feature verity"), ("xfs", "has no fs-verity")]
)
def test_file_systems_without(bare: dict[str, Path], kind: str, reason: str) -> None:
    path = write(bare[kind] / "file")
    said = proof(path)
    assert isinstance(said, str)
    assert reason in said
    with pytest.raises(SyscallError, match="ENOTSUP|EOPNOTSUPP|ENOTTY"):
        enable(path)


def test_tmpfs_and_proc(tmp_path: Path) -> None:
    for path in (Path("/run/file"), Path("/proc/version")):
        if path.parent == Path("/run"):
            write(path)
        assert proof(path) == "its file system has no fs-verity"
    Path("/run/file").unlink()


def test_overlay_says_nothing_of_what_is_below(place: Path) -> None:
    """Its upper layer can put another file there at any time."""
    lower, upper, work, merged = (place / name for name in ("lower", "upper", "work", "merged"))
    for each in (lower, upper, work, merged):
        each.mkdir()
    enable(write(lower / "file"))
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True)
    try:
        assert proof(merged / "file") == "its file system has no fs-verity"
    finally:
        subprocess.run(["umount", merged], check=True)


def mounted(type: str, image: Path) -> OwnedFd:
    backing = Backing.FILE if type == "erofs" else Backing.LOOP
    attributes = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV
    plan = Plan((CreateSuperblock(type, backing, True, ()), MakeMount(attributes)))
    with OwnedFd(os.open(image, os.O_RDONLY)) as fd:
        return run(plan, Inputs(image_fd=fd.fileno(), userns_fd=None, seal=Unsealed()))


@pytest.mark.parametrize("type", ["erofs", "squashfs"])
def test_an_image_with_fs_verity_is_mounted(
    place: Path, verified: dict[str, Verified], tree: Path, type: str
) -> None:
    image = place / f"{type}.img"
    image.write_bytes(verified[type].image.read_bytes())
    enable(image)
    with mounted(type, image) as mount:
        fd = os.open("big", os.O_RDONLY, dir_fd=mount.fileno())
        with os.fdopen(fd, "rb") as file:
            assert file.read() == (tree / "big").read_bytes()


@pytest.mark.parametrize("type", ["erofs", "squashfs"])
def test_disk_that_is_changed_below(
    ext4: tuple[Path, Path], verified: dict[str, Verified], tree: Path, type: str
) -> None:
    """The digest stays, and what does not fit it cannot be read, through a mount of the image either."""
    disk, target = ext4
    image = target / "image"
    image.write_bytes(verified[type].image.read_bytes())
    enable(image)
    before = proof(image)
    subprocess.run(["umount", target], check=True)
    at = disk.read_bytes().find((tree / "big").read_bytes()[-64:])
    assert at > 0
    flip(disk, at)
    subprocess.run(["mount", "-o", "loop", disk, target], check=True)
    assert proof(image) == before
    with pytest.raises(OSError, match="Input/output error"):
        image.read_bytes()
    with mounted(type, image) as mount:
        fd = os.open("big", os.O_RDONLY, dir_fd=mount.fileno())
        with os.fdopen(fd, "rb", buffering=0) as file:
            assert os.pread(file.fileno(), 100, 0) == (tree / "big").read_bytes()[:100]
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(file.fileno(), 100, len((tree / "big").read_bytes()) - 100)
