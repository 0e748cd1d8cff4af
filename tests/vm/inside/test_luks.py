"""Encrypted images: opened with their password where the policy grants that, and gone with the last user."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mountd.client import Client, MountReply
from mountd.errors import MountdError, SyscallError
from mountd.execute import luks
from mountd.fds import OwnedFd
from mountd.kernel import device_mapper, libc
from mountd.kernel.flags import Ioctl
from mountd.plan.operations import Encryption
from mountd.source.confined import recognise_source
from mountd.source.model import Luks
from tests.container import as_user
from tests.daemon import Daemon
from tests.disks import MIB, Part, build_disk
from tests.e2e.calls import mount_fds, outcome
from tests.images import build_image, build_tree
from tests.luks import ARGON2, KEY, PASSWORD, Header, build_luks, make_header
from tests.process import in_child
from tests.vm.inside.conftest import dm_devices

POLICY = """
[[rule]]
name = "opened"
image = {{ location = "{place}/*.raw" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
verdict = "allow"

[rule.grant]
file-systems = ["erofs", "ext4"]
access = "read-write"
options = ["lazytime"]
encrypted = true
"""
SOURCE: dict[str, object] = {"imageFileDescriptor": 0}
CRYPTSETUP = "/usr/sbin/cryptsetup"
HELLO = "hello from the image\n"


@dataclass(frozen=True, slots=True)
class Scene:
    """A daemon, headers of volumes, and what can be in them; `place` is where images are trusted."""

    daemon: Daemon
    headers: dict[str, Header]
    contents: dict[str, Path]
    place: Path

    def volume(self, name: str, header: str, contents: str) -> Path:
        return build_luks(self.place / name, self.headers[header], self.contents[contents])


@pytest.fixture(scope="module")
def scene(scratch: Path) -> Iterator[Scene]:
    work, place = scratch / "luks", scratch / "luks-place"
    work.mkdir()
    place.mkdir(mode=0o755)
    tree = build_tree(work / "tree")
    contents = {type: build_image(type, tree, work / f"{type}.img") for type in ("erofs", "squashfs")}
    contents["ext4"] = work / "ext4.img"
    with contents["ext4"].open("wb") as file:
        file.truncate(2 * MIB)
    # Not smaller than the sectors of the volume.
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-d", tree, contents["ext4"]], check=True)
    headers = {
        "luks1": make_header(work, 1),
        "luks2": make_header(work),
        "argon2": make_header(work, 2, *ARGON2),
    }
    mountfs = scratch / "luks-mountfs"
    daemon = Daemon(scratch / "luks-daemon", POLICY.format(place=place), ["--mountfs-socket", str(mountfs)])
    yield Scene(daemon, headers, contents, place)
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log, daemon.log
    assert PASSWORD not in daemon.log
    assert KEY.hex()[:32] not in daemon.log


@pytest.fixture(scope="module")
def volumes(scene: Scene) -> dict[str, Path]:
    return {
        "luks1": scene.volume("luks1.raw", "luks1", "erofs"),
        "luks2": scene.volume("luks2.raw", "luks2", "ext4"),
        "argon2": scene.volume("argon2.raw", "argon2", "erofs"),
    }


@contextlib.contextmanager
def opened(scene: Scene, image: Path, *, writable: bool = False, **fields: object) -> Iterator[MountReply]:
    fields = {"password": PASSWORD, "readOnly": not writable, **fields}
    with OwnedFd(os.open(image, os.O_RDWR if writable else os.O_RDONLY)) as fd:
        reply = mount_fds(scene.daemon.socket, SOURCE, [fd.fileno()], **fields)
    with reply:
        yield reply


def refusal(scene: Scene, image: Path, **fields: object) -> tuple[str, str]:
    def attempt() -> None:
        with opened(scene, image, **fields):
            pass

    return outcome(attempt)


def read(mount_fd: int, name: str = "hello") -> str:
    with OwnedFd(os.open(name, os.O_RDONLY, dir_fd=mount_fd)) as fd:
        return os.pread(fd.fileno(), 4096, 0).decode()


def is_read_only(mount_fd: int) -> bool:
    """Whether the device below a mount is one of dm-crypt, and read-only."""
    device = os.fstat(mount_fd).st_dev
    found = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    assert (found / "dm/name").read_text().startswith("mountd-crypt-")
    return (found / "ro").read_text() == "1\n"


@pytest.mark.parametrize("name", ["luks1", "luks2"])
def test_a_user_reads_what_is_in_it(scene: Scene, volumes: dict[str, Path], name: str) -> None:
    def work() -> tuple[str, bool, object, object]:
        with opened(scene, volumes[name]) as reply:
            fd = reply.mount.fileno()
            return read(fd), is_read_only(fd), reply.mounts[0]["fileSystemType"], reply.decision["trustedBy"]

    assert as_user(work) == (HELLO, True, "ext4" if name == "luks2" else "erofs", "root-owned")


def test_what_is_written_is_there_the_next_time(scene: Scene, volumes: dict[str, Path]) -> None:
    before = volumes["luks2"].read_bytes()
    with opened(scene, volumes["luks2"], writable=True, options=["lazytime"]) as reply:
        mount_fd = reply.mount.fileno()
        assert not is_read_only(mount_fd)
        with OwnedFd(os.open("new", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=mount_fd)) as fd:
            os.write(fd.fileno(), b"written in the clear\n")
    wait_until_gone()
    after = volumes["luks2"].read_bytes()
    assert after != before
    assert b"written in the clear" not in after
    with opened(scene, volumes["luks2"]) as reply:
        assert read(reply.mount.fileno(), "new") == "written in the clear\n"


def wait_until_gone() -> None:
    deadline = time.monotonic() + 5
    while (
        any(name.startswith(device_mapper.PREFIX) for name in dm_devices()) and time.monotonic() < deadline
    ):
        time.sleep(0.05)


def test_refusals_that_leave_nothing(scene: Scene, volumes: dict[str, Path]) -> None:
    """What is left is looked at after each test."""
    image = volumes["argon2"]
    assert refusal(scene, image, password="another")[0] == "WrongKey"
    cases = [
        ("foreign.raw", "squashfs", "DeniedByPolicy", "the image is squashfs"),
        ("noise.raw", b"\xa5" * MIB, "UnsupportedFileSystem", "no signature"),
    ]
    for name, contents, error, text in cases:
        inside = contents if isinstance(contents, bytes) else scene.contents[contents]
        found = refusal(scene, build_luks(scene.place / name, scene.headers["luks2"], inside))
        assert (found[0], text in found[1]) == (error, True), found


def test_a_disk_image_with_an_encrypted_root(scene: Scene, volumes: dict[str, Path]) -> None:
    """Home is not encrypted, and mounted as it is; all that is encrypted has one password."""
    home, var = Part("home", scene.contents["erofs"]), Part("var", volumes["luks1"])
    image = build_disk(scene.place / "disk.raw", [Part("root", volumes["luks2"]), home, var])
    with opened(scene, image) as reply:
        types = [(each["designator"], each["fileSystemType"]) for each in reply.mounts]
        assert types == [("root", "ext4"), ("home", "erofs"), ("var", "erofs")]
        assert [read(fd) for fd in reply.fds] == [HELLO] * 3
        assert is_read_only(reply.fds[0])
        assert len([name for name in dm_devices() if name.startswith("mountd-crypt-")]) == 2
    only = "root=encrypted+ext4:home=unused:var=unused"
    with opened(scene, image, imagePolicy=only) as reply:
        assert [each["designator"] for each in reply.mounts] == ["root"]


def test_in_the_words_of_mountfsd(scene: Scene, volumes: dict[str, Path], scratch: Path) -> None:
    def call(**fields: object) -> tuple[object, str]:
        method = "io.systemd.MountFileSystem.MountImage"
        with (
            Client(str(scratch / "luks-mountfs")) as client,
            OwnedFd(os.open(volumes["luks1"], os.O_RDONLY)) as fd,
        ):
            try:
                reply, fds = client.call(method, {"imageFileDescriptor": 0, **fields}, [fd])
            except MountdError as error:
                return getattr(error, "name", ""), str(error.parameters.get("errno", ""))
        with fds[0]:
            partitions = reply["partitions"]
            assert isinstance(partitions, list)
            return partitions[0]["fileSystemType"], read(fds[0].fileno())

    assert call(password=PASSWORD) == ("erofs", HELLO)
    assert call(password="another") == ("io.systemd.System", "129")  # EKEYREJECTED


def test_nobody_sees_the_password(scene: Scene, volumes: dict[str, Path]) -> None:
    """Neither in a command line nor in an environment, of any process, for as long as it takes."""
    seen: set[str] = set()
    programs: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for path in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    line = (path / "cmdline").read_bytes()
                    programs.add(line.partition(b"\0")[0].decode())
                    if PASSWORD.encode() in line + (path / "environ").read_bytes():
                        seen.add(line.decode("utf-8", "replace"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        deadline = time.monotonic() + 60
        # It is there for moments only.
        while CRYPTSETUP not in programs and time.monotonic() < deadline:
            with opened(scene, volumes["argon2"]) as reply:
                assert read(reply.mount.fileno()) == HELLO
    finally:
        done.set()
        watcher.join()
    assert CRYPTSETUP in programs
    assert seen == set()


@contextlib.contextmanager
def device(volume: Path, *, key: bytes = KEY) -> Iterator[device_mapper.Device]:
    with OwnedFd(os.open(volume, os.O_RDONLY)) as fd:
        found = recognise_source(fd.fileno(), volume.stat().st_size, confined=False)
        assert isinstance(found, Luks)
        made = luks.attach(
            fd.fileno(), Encryption.of(found, None), bytearray(key.hex(), "ascii"), read_only=True
        )
    with made:
        yield made


def test_another_key_makes_noise(scene: Scene, volumes: dict[str, Path]) -> None:
    with device(volumes["luks1"]) as right, device(volumes["luks1"], key=bytes(64)[:-1] + b"\1") as wrong:
        contents = scene.contents["erofs"].read_bytes()[:4096]
        assert os.pread(right.fd.fileno(), 4096, 0) == contents
        assert os.pread(wrong.fd.fileno(), 4096, 0) != contents


def test_whoever_is_killed_leaves_nothing(volumes: dict[str, Path]) -> None:
    """Between the device and the mount; and what was made and not opened is found by the next daemon."""

    def work() -> None:
        with device(volumes["luks1"]) as made:
            assert made.name in dm_devices()
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AssertionError):
        in_child(work)
    wait_until_gone()
    names = [f"{device_mapper.PREFIX}crypt-{maker}-left" for maker in (1, 2)]
    with device_mapper.open_control() as control:
        for name in names:
            device_mapper._ask(control, Ioctl.DM_DEV_CREATE, name)
        # Of a worker that was killed, and of a whole daemon.
        assert device_mapper.remove_unused(1) == 1
        assert device_mapper._list(control) == names[1:]
        assert device_mapper.remove_unused() == 1
        assert device_mapper._list(control) == []


@pytest.mark.parametrize("step", ["DM_DEV_CREATE", "DM_TABLE_LOAD", "DM_DEV_SUSPEND"])
def test_no_error_has_the_key(volumes: dict[str, Path], step: str) -> None:
    libc.inject[f"ioctl {step}"] = 5
    try:
        with pytest.raises(SyscallError) as raised, device(volumes["luks1"]):
            pass
    finally:
        libc.inject.clear()
    assert KEY.hex() not in str(raised.value) + repr(raised.value)
