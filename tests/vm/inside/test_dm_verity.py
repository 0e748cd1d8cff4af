"""Images through dm-verity: what fits the root hash is read, and what does not is not."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mountd.errors import InvalidImage, NotSupported, SyscallError
from mountd.evidence import dm_verity as evidence
from mountd.evidence.model import Proof
from mountd.execute import verity
from mountd.execute.run import Inputs, run
from mountd.fds import OwnedFd
from mountd.kernel import device_mapper, dm_verity, libc
from mountd.kernel.device_mapper import Device
from mountd.kernel.flags import Ioctl, MountAttr
from mountd.plan.operations import Backing, CreateSuperblock, MakeMount, Plan, Verity
from mountd.source import verity_superblock
from tests.process import in_child
from tests.sealing import Unsealed
from tests.verity import Verified, build_verity, flip
from tests.vm.inside.conftest import BIG, dm_devices

LOCKED = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV
BLOCK = 4096
FORCED: dict[str, tuple[tuple[str, str | None], ...]] = {"ext4": (("noload", None),)}


@contextmanager
def opened(source: Verified, flags: int = os.O_RDONLY) -> Iterator[tuple[int, int]]:
    """Descriptors of the image and of its hash data."""
    with OwnedFd(os.open(source.image, flags)) as data, OwnedFd(os.open(source.tree, flags)) as tree:
        yield data.fileno(), tree.fileno()


def attach(source: Verified, told: Verity | None = None, flags: int = os.O_RDONLY) -> Device:
    with opened(source, flags) as (data, tree):
        return verity.attach(data, tree, told or source.verity())


def mount(source: Verified, type: str = "erofs", told: Verity | None = None) -> OwnedFd:
    """Mount it as a plan says; the descriptors are writable ones, as a caller may keep."""
    superblock = CreateSuperblock(type, Backing.VERITY, True, FORCED.get(type, ()), told or source.verity())
    plan = Plan((superblock, MakeMount(LOCKED)))
    with opened(source, os.O_RDWR) as (data, tree):
        inputs = Inputs(image_fd=data, hash_fd=tree, userns_fd=None, seal=Unsealed())
        return run(plan, inputs)


def read(mount: OwnedFd, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY, dir_fd=mount.fileno())
    with os.fdopen(fd, "rb") as file:
        return file.read()


def read_last(mount: OwnedFd, length: int = 100) -> bytes:
    """The end of the big file, which no mount reads by itself."""
    with OwnedFd(os.open("big", os.O_RDONLY, dir_fd=mount.fileno())) as file:
        return os.pread(file.fileno(), length, BIG - length)


def read_or_errno(mount: OwnedFd) -> bytes | int | None:
    try:
        return read_last(mount)
    except OSError as error:
        return error.errno


def place_of(source: Verified, tree: Path, offset: int) -> int:
    """Where in the image the big file's contents at `offset` are."""
    found = source.image.read_bytes().find((tree / "big").read_bytes()[offset : offset + 64])
    assert found > 0
    return found


@pytest.mark.parametrize("type", ["erofs", "squashfs", "ext4"])
def test_an_image_that_fits(verified: dict[str, Verified], tree: Path, type: str) -> None:
    with mount(verified[type], type) as mounted:
        assert read(mounted, "hello") == b"hello from the image\n"
        assert read(mounted, "big") == (tree / "big").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ("--hash=sha512",),
        ("--salt=-",),
        ("--salt=" + "ab" * 256,),
        ("--data-block-size=1024", "--hash-block-size=512"),
        ("--data-block-size=4096", "--hash-block-size=1024", "--hash=sha512"),
    ],
    ids=" ".join,
)
def test_every_way_to_make_hash_data(
    verified: dict[str, Verified], tmp_path: Path, tree: Path, options: tuple[str, ...]
) -> None:
    image = tmp_path / "image"
    # squashfs is content with blocks of any size.
    image.write_bytes(verified["squashfs"].image.read_bytes())
    with mount(build_verity(image, *options), "squashfs") as mounted:
        assert read(mounted, "big") == (tree / "big").read_bytes()


def test_the_device_is_read_only_and_has_the_table_that_was_meant(verified: dict[str, Verified]) -> None:
    source = verified["erofs"]
    told = source.verity()
    device = attach(source, flags=os.O_RDWR)
    try:
        with (
            OwnedFd(os.open(device.path, os.O_RDWR)) as fd,
            pytest.raises(OSError, match="Operation not permitted"),
        ):
            os.write(fd.fileno(), bytes(BLOCK))
        words = dm_verity.table(device.name).split()
        # Nothing after the salt: no wish to ignore, to check once only, or to stop the machine.
        assert [words[0], *words[3:]] == [
            *("1", str(BLOCK), str(BLOCK), str(told.data_blocks), "1", "sha256"),
            *(source.root_hash.hex(), told.salt.hex()),
        ]
        assert os.lseek(device.fd.fileno(), 0, os.SEEK_END) == told.data_blocks * BLOCK
        assert not dm_verity.is_corrupt(device.name)
        assert not os.get_inheritable(device.fd.fileno())
    finally:
        device.close()


def test_wrong_root_hash(verified: dict[str, Verified]) -> None:
    source = verified["erofs"]
    for wrong in (bytes(32), source.root_hash[:-1] + bytes([source.root_hash[-1] ^ 1])):
        with pytest.raises(InvalidImage, match="does not fit the verity root hash"):
            mount(source, told=replace(source.verity(), root_hash=wrong))


def test_root_hash_of_another_image(verified: dict[str, Verified]) -> None:
    told = replace(verified["erofs"].verity(), root_hash=verified["squashfs"].root_hash)
    with pytest.raises(InvalidImage, match="does not fit"):
        mount(verified["erofs"], told=told)


def test_another_images_hash_data(verified: dict[str, Verified]) -> None:
    mixed = replace(verified["squashfs"], image=verified["ext4"].image)
    with pytest.raises(InvalidImage, match="does not fit"):
        mount(mixed, "ext4")


def test_corrupt_first_block(broken: Verified) -> None:
    flip(broken.image, 2000)
    with pytest.raises(InvalidImage, match="does not fit"):
        mount(broken)


def test_corrupt_leaf(broken: Verified, tree: Path) -> None:
    """One byte of one block: that block cannot be read, and everything else can."""
    flip(broken.image, place_of(broken, tree, BIG - 64))
    with mount(broken) as mounted:
        assert read(mounted, "hello") == b"hello from the image\n"
        with pytest.raises(OSError, match="Input/output error"):
            read_last(mounted)


def test_image_that_is_changed_below_the_mount(broken: Verified, tree: Path) -> None:
    """Why dm-verity counts though the caller can still write: the mount never shows what was written."""
    place = place_of(broken, tree, BIG - 64)
    with mount(broken) as mounted:
        flip(broken.image, place)
        with pytest.raises(OSError, match="Input/output error"):
            read_last(mounted)
        flip(broken.image, place)
        assert read_last(mounted) == (tree / "big").read_bytes()[-100:]


def test_image_and_hash_data_exchanged_below_the_mount(
    broken: Verified, verified: dict[str, Verified], tree: Path
) -> None:
    """Whoever writes a whole consistent pair has another root hash."""
    with mount(broken) as mounted:
        forged = bytearray(broken.image.read_bytes())
        place = place_of(broken, tree, BIG - 64)
        forged[place : place + 64] = bytes(64)
        other = broken.image.with_suffix(".forged")
        other.write_bytes(forged)
        salt = f"--salt={broken.verity().salt.hex()}"
        hashes = build_verity(other, salt).tree.read_bytes()
        for path, contents in ((broken.image, bytes(forged)), (broken.tree, hashes)):
            with path.open("r+b") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
        with pytest.raises(OSError, match="Input/output error"):
            read_last(mounted)


@pytest.mark.parametrize(("block", "at_once"), [(1, True), (-1, False)])
def test_corrupt_hash_tree(broken: Verified, block: int, at_once: bool) -> None:
    """The first block is the top of the tree, the last is a leaf of it."""
    blocks = broken.tree.stat().st_size // BLOCK
    flip(broken.tree, (block % blocks) * BLOCK + 5)
    if at_once:
        with pytest.raises(InvalidImage, match="does not fit"):
            mount(broken)
        return
    with mount(broken) as mounted:
        assert read(mounted, "hello")
        with pytest.raises(OSError, match="Input/output error"):
            read_last(mounted)


def test_truncated_hash_data(broken: Verified) -> None:
    told = broken.verity()
    os.truncate(broken.tree, broken.tree.stat().st_size - BLOCK)
    with pytest.raises(InvalidImage, match="the hash tree takes"):
        broken.verity()
    with pytest.raises(SyscallError, match="DM_TABLE_LOAD.*E2BIG"):
        mount(broken, told=told)


def test_hash_data_truncated_below_the_mount(broken: Verified, tree: Path) -> None:
    """What the kernel has read of the tree it may still know; it never takes data for good without."""
    with mount(broken) as mounted:
        os.truncate(broken.tree, 2 * BLOCK)
        assert read_or_errno(mounted) in ((tree / "big").read_bytes()[-100:], errno.EIO)


def test_truncated_image(broken: Verified) -> None:
    told = broken.verity()
    os.truncate(broken.image, broken.image.stat().st_size - BLOCK)
    with pytest.raises(InvalidImage, match="the image only has"):
        broken.verity()
    with pytest.raises((SyscallError, InvalidImage)):
        mount(broken, told=told).close()


@pytest.mark.parametrize(
    "lie",
    [
        {"salt": b"\1" * 32},
        {"hash_start_block": 2},
        {"hash_block_size": 1024},
        {"data_block_size": 1024},
        {"algorithm": "sha512"},
        {"algorithm": "no-such-algorithm"},
        {"data_blocks": 1},
    ],
    ids=lambda lie: next(iter(lie)),
)
def test_lies_of_the_superblock(verified: dict[str, Verified], lie: dict[str, object]) -> None:
    """Nothing vouches for it, and nothing is read by it that the root hash does not cover."""
    told = replace(verified["erofs"].verity(), **lie)  # type: ignore[arg-type]
    with pytest.raises((InvalidImage, SyscallError)):
        mount(verified["erofs"], told=told)


def test_fewer_blocks_only_cut_the_image_off(verified: dict[str, Verified]) -> None:
    told = verified["erofs"].verity()
    device = attach(verified["erofs"], replace(told, data_blocks=told.data_blocks - 1))
    assert os.lseek(device.fd.fileno(), 0, os.SEEK_END) == (told.data_blocks - 1) * BLOCK
    device.close()


def test_mount_keeps_the_device_and_the_last_user_takes_it(verified: dict[str, Verified]) -> None:
    before = dm_devices()
    with mount(verified["erofs"]) as mounted:
        (name,) = dm_devices() - before
        assert name.startswith(device_mapper.PREFIX)
        assert device_mapper.remove_unused() == 1  # says how many there are; this one has a user
        assert read(mounted, "hello")
        assert name in dm_devices()
    # That it is gone is what the fixture checks.


def test_two_at_once(verified: dict[str, Verified], broken: Verified) -> None:
    """Of one image: devices of their own, so that what one sees is nothing to the other."""
    first = attach(broken)
    second = attach(broken)
    try:
        assert first.path != second.path
        assert first.name != second.name
        first.close()
        assert os.pread(second.fd.fileno(), 1024, 1024) == broken.image.read_bytes()[1024:2048]
    finally:
        first.close()
        second.close()
    with mount(verified["erofs"]) as one, mount(verified["squashfs"], "squashfs") as other:
        assert read(one, "big") == read(other, "big")


def test_name_that_is_taken(verified: dict[str, Verified], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody guesses a name; if one is there all the same, it is neither used nor removed."""
    monkeypatch.setattr(device_mapper.os, "urandom", lambda length: bytes(length))
    device = attach(verified["erofs"])
    try:
        with pytest.raises(SyscallError, match="DM_DEV_CREATE.*EBUSY"):
            attach(verified["squashfs"])
        assert dm_verity.table(device.name).split()[8] == verified["erofs"].root_hash.hex()
        assert os.pread(device.fd.fileno(), BLOCK, 0)
    finally:
        device.close()


def test_image_and_hash_data_in_memory(verified: dict[str, Verified]) -> None:
    """What a client makes on the fly."""
    source = verified["erofs"]
    fds = []
    for path in (source.image, source.tree):
        fds.append(OwnedFd(os.memfd_create(path.name)))
        os.write(fds[-1].fileno(), path.read_bytes())
    with fds[0] as data, fds[1] as tree:
        device = verity.attach(data.fileno(), tree.fileno(), source.verity())
    assert os.pread(device.fd.fileno(), BLOCK, 0) == source.image.read_bytes()[:BLOCK]
    device.close()


def test_whoever_is_killed_leaves_nothing(verified: dict[str, Verified]) -> None:
    """With the device open and with a mount of it: both are the kernel's to clean up."""

    def work() -> None:
        attach(verified["erofs"]).fd.take()
        mount(verified["squashfs"], "squashfs").take()
        assert len(dm_devices()) == 2
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AssertionError):
        in_child(work)


def test_whoever_is_killed_at_once_leaves_a_device_that_is_found(verified: dict[str, Verified]) -> None:
    name = f"{device_mapper.PREFIX}verity-left"
    with device_mapper.open_control() as control:
        device_mapper._ask(control, Ioctl.DM_DEV_CREATE, name)
        device_mapper._ask(control, Ioctl.DM_DEV_CREATE, "somebody-elses")
        try:
            assert device_mapper.remove_unused() == 1
            assert device_mapper._list(control) == ["somebody-elses"]
            assert device_mapper.remove_unused() == 0
        finally:
            device_mapper._ask(control, Ioctl.DM_DEV_REMOVE, "somebody-elses")
        assert device_mapper._list(control) == []


@pytest.mark.parametrize(
    "step", ["LOOP_CONFIGURE", "DM_DEV_CREATE", "DM_TABLE_LOAD", "DM_DEV_SUSPEND", "DM_TABLE_STATUS"]
)
def test_failure_at_any_step_leaves_nothing(
    verified: dict[str, Verified], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    told = verified["erofs"].verity()
    if step == "DM_TABLE_STATUS":  # asked only if something does not fit
        told = replace(told, root_hash=bytes(32))
    monkeypatch.setitem(libc.inject, f"ioctl {step}", errno.ENOMEM)
    with pytest.raises(SyscallError, match=f"{step}.*ENOMEM|ENOMEM.*{step}"):
        mount(verified["erofs"], told=told)


def test_failure_of_the_file_system_leaves_nothing(verified: dict[str, Verified]) -> None:
    with pytest.raises(SyscallError, match="CMD_CREATE"):
        mount(verified["erofs"], "squashfs")


def test_kernel_without_dm_verity(verified: dict[str, Verified], monkeypatch: pytest.MonkeyPatch) -> None:
    for request in ("DM_TABLE_LOAD", "DM_GET_TARGET_VERSION"):
        monkeypatch.setitem(libc.inject, f"ioctl {request}", errno.EINVAL)
    with pytest.raises(NotSupported, match="dm-verity"):
        mount(verified["erofs"])


def test_kernel_without_device_mapper(
    verified: dict[str, Verified], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_mapper, "CONTROL", "/dev/mapper/nothing")
    with pytest.raises(NotSupported, match="device-mapper"):
        mount(verified["erofs"])
    assert device_mapper.remove_unused() == 0


def test_lease_on_the_hash_data_is_refused_at_once(broken: Verified) -> None:
    """The kernel would wait for whoever has the lease, who is the caller."""
    superblock = CreateSuperblock("erofs", Backing.VERITY, True, (), broken.verity())
    plan = Plan((superblock, MakeMount(LOCKED)))
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with opened(broken, os.O_RDWR) as (data, tree):
            fcntl.fcntl(tree, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            inputs = Inputs(image_fd=data, hash_fd=tree, userns_fd=None, seal=Unsealed())
            with pytest.raises(SyscallError, match="somebody has a lease"):
                run(plan, inputs)
    finally:
        signal.signal(signal.SIGIO, before)


def test_the_proof_is_the_root_hash(verified: dict[str, Verified]) -> None:
    source = verified["erofs"]
    data = source.tree.read_bytes()
    superblock = verity_superblock.read(
        lambda offset, length: data[offset : offset + length], len(data), source.image.stat().st_size
    )
    assert evidence.prove(superblock, source.root_hash) == Proof(
        "dm-verity", f"sha256:{source.root_hash.hex()}"
    )
