"""Disk images: one mount for each partition that counts, and a reason for whatever is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.client import attach_reply, open_target
from mountd.evidence.sealed import SEALS
from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from mountd.store.store import Store
from tests.container import USER, in_container
from tests.daemon import Daemon
from tests.disks import MIB, SECONDARY, Part, build_disk
from tests.e2e.calls import errno_of, mount_fds, mounted, outcome, refused
from tests.e2e.calls import mount as ask
from tests.e2e.conftest import trusting
from tests.e2e.loops import loops_over, wait_until_dropped
from tests.e2e.stored import empty
from tests.e2e.trust import memfd, users_file
from tests.images import build_image
from tests.programs import as_user, build_root, run

READ_WRITE = '"read-write"'
FIRMWARE = bytes(range(256)) * 16
LUKS = b"LUKS\xba\xbe\0\x02" + bytes(4096)


def tree(path: Path, name: str, *directories: str) -> Path:
    """A small tree with a file that names it."""
    path.mkdir()
    (path / "name").write_text(name)
    for directory in directories:
        (path / directory).mkdir(parents=True)
    return path


@pytest.fixture(scope="module")
def contents(place: Path, images: dict[str, Path]) -> dict[str, Path]:
    """File systems for partitions, by what they are for."""
    work = place / "partitions"
    work.mkdir()
    directories = ("usr", "home", "srv", "var/tmp", "efi", "boot", "bin")
    made = {"root": build_image("erofs", tree(work / "root", "root", *directories), work / "root.raw")}
    for name, type in (("usr", "squashfs"), ("home", "ext4"), ("srv", "erofs"), ("tmp", "ext4")):
        made[name] = build_image(type, tree(work / name, name), work / f"{name}.raw")
    made["var"] = build_image("ext4", tree(work / "var", "var", "tmp"), work / "var.raw")
    made["other"] = build_image("ext4", tree(work / "other", "other", *directories), work / "other.raw")
    return made


@pytest.fixture(scope="module")
def full(place: Path, contents: dict[str, Path]) -> Path:
    """An image with a partition of each kind, in an order that is not the one of mounting."""
    order = ("tmp", "var", "home", "usr", "root", "srv")
    parts = [Part("esp", FIRMWARE), *(Part(name, contents[name], label=name) for name in order)]
    return build_disk(place / "trusted/full.raw", [*parts, Part("swap")])


def trusted(place: Path, name: str, *parts: Part, sector_size: int = 512) -> Path:
    return build_disk(place / "trusted" / name, list(parts), sector_size=sector_size)


def names(fd: int) -> list[str]:
    with open(os.open("name", os.O_RDONLY, dir_fd=fd), encoding="utf-8") as file:
        return [file.read()]


def test_all_partitions_each_at_its_place(daemon: Daemon, full: Path) -> None:
    with mounted(daemon.socket, full) as reply:
        told = [
            (each["designator"], each.get("mountPoint"), each["fileSystemType"], each["readOnly"])
            for each in reply.mounts
        ]
        assert told == [
            ("root", None, "erofs", True),
            ("usr", "usr", "squashfs", True),
            ("home", "home", "ext4", True),
            ("srv", "srv", "erofs", True),
            ("var", "var", "ext4", True),
            ("tmp", "var/tmp", "ext4", True),
        ]
        assert [each["mountFileDescriptor"] for each in reply.mounts] == list(range(6))
        assert len({each["id"] for each in reply.mounts}) == 6
        assert [names(fd) for fd in reply.fds] == [["root"], ["usr"], ["home"], ["srv"], ["var"], ["tmp"]]
        assert len(loops_over(full)) == 6
        reply.close()
    wait_until_dropped(full)


def test_every_mount_is_sealed(start: Callable[..., Daemon], full: Path, containers: None) -> None:
    """Not even root of a namespace of its own takes the flags off any of them."""
    daemon = start(trusting(full.parent))

    def work() -> list[str]:
        with ask(daemon.socket, full, userns="/proc/self/ns/user") as reply, open_target("/mnt") as target:
            assert attach_reply(reply, target.fileno(), "/mnt") == []
            found = [
                errno_of(lambda fd=fd, flag=flag: mount_api.mount_setattr(fd, clear=flag))  # type: ignore[misc]
                for fd in reply.fds
                for flag in (MountAttr.RDONLY, MountAttr.NOSUID, MountAttr.NODEV)
            ]
            assert [Path(f"/mnt/{place}/name").read_text() for place in ("", "usr", "var", "var/tmp")] == [
                *("root", "usr", "var", "tmp")
            ]
            assert os.stat("/mnt/home/name").st_uid == 0
            return found

    assert in_container(work) == ["EPERM"] * 18
    daemon.stop()
    wait_until_dropped(full)


def test_large_sectors(daemon: Daemon, place: Path, contents: dict[str, Path]) -> None:
    parts = [Part("root", contents["root"]), Part("home", contents["home"])]
    image = trusted(place, "large.raw", *parts, sector_size=4096)
    with ask(daemon.socket, image) as reply:
        assert [each["designator"] for each in reply.mounts] == ["root", "home"]
        assert [names(fd) for fd in reply.fds] == [["root"], ["home"]]


def test_the_newest_of_two(daemon: Daemon, place: Path, contents: dict[str, Path]) -> None:
    parts = [
        Part("root", contents["other"], label="os_1.10"),
        Part("root", contents["root"], label="os_1.9"),
    ]
    with ask(daemon.socket, trusted(place, "two.raw", *parts)) as reply:
        assert [(each["designator"], each["fileSystemType"]) for each in reply.mounts] == [("root", "ext4")]
        assert names(reply.fds[0]) == ["other"]


def test_the_architecture_of_this_machine(daemon: Daemon, place: Path, contents: dict[str, Path]) -> None:
    other, own = Part("root", contents["other"], architecture=SECONDARY[0]), Part("root", contents["root"])
    with ask(daemon.socket, trusted(place, "native.raw", other, own)) as reply:
        assert names(reply.fds[0]) == ["root"]
    with ask(daemon.socket, trusted(place, "secondary.raw", other)) as reply:
        assert names(reply.fds[0]) == ["other"]


def test_what_the_imagepolicy_of_the_request_leaves(daemon: Daemon, full: Path) -> None:
    with ask(daemon.socket, full, image_policy="root=open:usr=unprotected+squashfs") as reply:
        assert [each["designator"] for each in reply.mounts] == ["root", "usr"]
    for policy, text in (
        ("root=open:=absent", "to be unused"),
        ("root=verity:=open", "to be verity"),
        ("root=open:usr=ext4", "allows ext4 for the usr partition"),
        ("root=open+read-only-on", "flag read-only"),
        ("~", "no"),
    ):
        refused(lambda policy=policy: ask(daemon.socket, full, image_policy=policy), "DeniedByPolicy", text)  # type: ignore[misc]


def test_each_way_to_be_refused(daemon: Daemon, place: Path, contents: dict[str, Path], full: Path) -> None:
    root = Part("root", contents["root"])
    data = full.read_bytes()

    def damaged(name: str, offset: int, patch: bytes) -> Path:
        image = place / "trusted" / name
        image.write_bytes(data[:offset] + patch + data[offset + len(patch) :])
        return image

    at_end = len(data) - 512
    cases: list[tuple[Path, str, str]] = [
        (
            trusted(place, "home.raw", Part("home", contents["home"])),
            "UnsupportedFileSystem",
            "neither a root",
        ),
        (trusted(place, "luks.raw", root, Part("home", LUKS)), "UnsupportedFileSystem", "crypto_LUKS ("),
        (trusted(place, "swap.raw", root, Part("srv", FIRMWARE)), "UnsupportedFileSystem", "(srv) holds"),
        (damaged("header.raw", 600, bytes([data[600] ^ 1])), "InvalidImage", "checksum of the header"),
        (damaged("entries.raw", 1100, b"\1"), "InvalidImage", "checksum of the entries"),
        (damaged("copy.raw", at_end, bytes(512)), "InvalidImage", "there is no header"),
        (damaged("both.raw", 0, b"hsqs"), "InvalidImage", "ambiguous contents: squashfs at byte 0 and gpt"),
        (damaged("hybrid.raw", 462, b"\0\1\1\1\x83\1\1\1\1\1\1\1\1\1\1\1"), "InvalidImage", "MBR"),
    ]
    for image, name, text in cases:
        refused(lambda image=image: ask(daemon.socket, image), name, text)  # type: ignore[misc]
        assert not loops_over(image)
    policy = "root=open"
    with ask(
        daemon.socket, trusted(place, "luks.raw", root, Part("home", LUKS)), image_policy=policy
    ) as reply:
        assert len(reply.mounts) == 1


def test_options_and_types(daemon: Daemon, full: Path) -> None:
    with ask(daemon.socket, full, options=["noexec"], file_system_type="erofs") as reply:
        assert all(os.fstatvfs(fd).f_flag & os.ST_NOEXEC for fd in reply.fds)
    refused(lambda: ask(daemon.socket, full, file_system_type="ext4"), "InvalidImage", "holds erofs")
    refused(lambda: ask(daemon.socket, full, options=["acl"]), "OptionNotPermitted", "6 file systems")
    refused(lambda: ask(daemon.socket, full, read_only=False), "OptionNotPermitted", "read-only access")


def test_hash_data_of_its_own_is_refused(daemon: Daemon, full: Path) -> None:
    verity = (str(full), "ab" * 32, None)
    refused(lambda: ask(daemon.socket, full, verity=verity), "InvalidParameter", "the image has partitions")


def test_nothing_is_left_where_a_later_partition_fails(
    start: Callable[..., Daemon], place: Path, contents: dict[str, Path]
) -> None:
    """The superblock of /var looks good, and the kernel does not take it."""
    broken = bytearray(contents["var"].read_bytes())
    broken[2048 : 2048 + 1024] = bytes(1024)  # the group descriptors
    parts = [Part("root", contents["root"]), Part("home", contents["home"]), Part("var", bytes(broken))]
    image = trusted(place, "broken.raw", *parts)
    daemon = start(trusting(image.parent))
    before = daemon.settled()
    for uid in (0, USER):
        os.seteuid(uid)
        try:
            refused(lambda: ask(daemon.socket, image), "MountFailed")
        finally:
            os.seteuid(0)
    daemon.stop()
    wait_until_dropped(image)
    assert before


def test_writing(
    start: Callable[..., Daemon], place: Path, contents: dict[str, Path], containers: None
) -> None:
    """Into what can be written to; a flag of the table keeps a partition as it is."""
    directory = place / "writing-disks"
    directory.mkdir(mode=0o755)
    parts = [
        Part("root", contents["other"]),
        Part("home", contents["home"], attributes="GUID:60"),
        Part("srv", contents["srv"]),
    ]
    image = build_disk(directory / "disk.raw", parts)
    daemon = start(trusting(directory, access=READ_WRITE))
    with ask(daemon.socket, image, read_only=False) as reply:
        assert [each["readOnly"] for each in reply.mounts] == [False, True, True]
        fd = os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=reply.fds[0])
        os.write(fd, b"written")
        os.close(fd)
        with pytest.raises(OSError, match="Read-only"):
            os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=reply.fds[1])
    with ask(daemon.socket, image) as reply:
        assert os.stat("new", dir_fd=reply.fds[0]).st_size == 7
        assert all(each["readOnly"] for each in reply.mounts)
    only = build_disk(directory / "only.raw", [Part("root", contents["root"])])
    refused(lambda: ask(daemon.socket, only, read_only=False), "OptionNotPermitted", "cannot be written to")
    flagged = build_disk(directory / "flagged.raw", [Part("root", contents["other"], attributes="GUID:60")])
    refused(
        lambda: ask(daemon.socket, flagged, read_only=False),
        "OptionNotPermitted",
        "no partition of the image",
    )


def test_growing_is_not_done(daemon: Daemon, place: Path, contents: dict[str, Path]) -> None:
    """A flag that asks for it changes nothing: what is mounted is as large as it was."""
    size = 64 * MIB
    part = Part("root", contents["other"], size=size, attributes="GUID:59")
    with ask(daemon.socket, trusted(place, "grow.raw", part)) as reply:
        found = os.fstatvfs(reply.fds[0])
        assert found.f_blocks * found.f_frsize < contents["other"].stat().st_size < size


def test_an_image_of_a_user(start: Callable[..., Daemon], place: Path, full: Path) -> None:
    """Nothing vouches for it, and it is not mounted; sealed, all of it is; with its digest, a copy is."""
    data = full.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    policy = f"""
[[rule]]
name = "by digest"
image = {{ digest = ["sha256:{digest}"] }}
caller = {{ any = true }}
require = {{ integrity = ["sealed", "stored"] }}
grant = {{ file-systems = ["erofs", "squashfs", "ext4"], idmap = ["none", "caller"] }}
verdict = "allow"
"""
    daemon = start(policy)
    with users_file(place, data[:-1] + b"x") as path:
        os.seteuid(USER)
        try:
            refused(lambda: ask(daemon.socket, path), "DeniedByPolicy")
        finally:
            os.seteuid(0)

    def designators(fd: int) -> list[object]:
        with mount_fds(daemon.socket, {"imageFileDescriptor": 0}, [fd]) as reply:
            return [each["designator"] for each in reply.mounts]

    everything = ["root", "usr", "home", "srv", "var", "tmp"]
    os.seteuid(USER)
    try:
        with memfd(data, sum(SEALS)) as fd:
            assert designators(fd) == everything
        with memfd(data[:-1] + b"x", sum(SEALS)) as fd:
            assert outcome(lambda: designators(fd))[0] in ("DeniedByPolicy", "InvalidImage")
    finally:
        os.seteuid(0)
    with users_file(place, data) as path, path.open("rb") as file:
        os.seteuid(USER)
        try:
            assert designators(file.fileno()) == everything
            # From the store, by the name that it has there.
            with ask(daemon.socket, f"stored:sha256:{digest}") as reply:
                assert len(reply.fds) == 6
        finally:
            os.seteuid(0)
    daemon.stop()
    empty(Store(daemon.directory / "state"))


def test_mountctl_attaches_all_of_it(
    daemon: Daemon, installed: Path, full: Path, place: Path, containers: None
) -> None:
    target = place / "disk target"
    target.mkdir()

    def work() -> list[object]:
        done = run([installed / "bin/mountctl", "mount", full, target], daemon.socket)
        found = [
            (target / where / "name").read_text() for where in ("", "usr", "home", "srv", "var", "var/tmp")
        ]
        helper = run([installed / "sbin/mount.mountd", full, target, "-v"], daemon.socket)
        return [
            done.returncode,
            done.stderr,
            found,
            helper.returncode,
            (target / "usr/name").read_text(),
        ]

    assert in_container(work) == [0, "", ["root", "usr", "home", "srv", "var", "tmp"], 0, "usr"]


def test_links_in_the_image_lead_nowhere_else(
    daemon: Daemon, installed: Path, place: Path, contents: dict[str, Path], containers: None
) -> None:
    """A directory that is a link stays within the image; without one, nothing is attached at all."""
    work_tree = tree(place / "links", "links", "real")
    os.symlink("/real", work_tree / "home")
    os.symlink("../../../../../../tmp", work_tree / "srv")
    root = build_image("erofs", work_tree, place / "links.raw")
    good = trusted(place, "links.raw", Part("root", root), Part("home", contents["home"]))
    bad = trusted(place, "bad-links.raw", Part("root", root), Part("srv", contents["srv"]))
    target = place / "links target"
    target.mkdir()

    def work() -> list[object]:
        done = run([installed / "bin/mountctl", "mount", good, target], daemon.socket)
        found = [done.returncode, (target / "real/name").read_text()]
        subprocess.run(["umount", "-R", target], check=True)
        done = run([installed / "bin/mountctl", "mount", bad, target], daemon.socket)
        return [
            *found,
            done.returncode,
            "srv" in done.stderr and "leave the partition out" in done.stderr,
            os.listdir(target),
            Path("/tmp/name").exists(),
        ]

    assert in_container(work) == [0, "home", 1, True, [], False]


def test_run_in_a_disk_image(
    daemon: Daemon, installed: Path, place: Path, contents: dict[str, Path]
) -> None:
    root = build_root(place / "disk-root")
    for name in ("home", "srv"):
        (root / name).mkdir(exist_ok=True)
    made = build_image("erofs", root, place / "disk-root.raw")
    image = trusted(place, "run.raw", Part("root", made), Part("home", contents["home"]))
    done = as_user([installed / "bin/mountctl", "run", image, "--", "/bin/cat", "/home/name"], daemon.socket)
    assert (done.returncode, done.stdout) == (0, "home"), done.stderr
    usr = trusted(place, "usr-only.raw", Part("usr", contents["usr"]))
    done = as_user([installed / "bin/mountctl", "run", usr, "--", "/bin/true"], daemon.socket)
    assert done.returncode == 1
    assert "a root directory in the image" in done.stderr


def test_explain(daemon: Daemon, installed: Path, full: Path) -> None:
    done = as_user([installed / "bin/mountctl", "explain", full], daemon.socket)
    assert done.returncode == 0
    assert "file system: gpt" in done.stdout
    assert "root “root” (erofs), usr “usr” (squashfs), home “home” (ext4)" in done.stdout
    assert "esp (unknown contents)" in done.stdout
    assert "mounted: root, usr, home, srv, var, tmp" in done.stdout
