"""The lines of /run/mount/utab: what is written, what is removed, and who cannot stop it."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.errors import SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import utab

MOUNTINFO = (
    "21 1 0:20 / /proc rw shared:5 - proc proc rw\n"
    "30 1 7:0 / /home/a\\040b\\134 ro,nosuid master:3 - squashfs /images/a\\040b.raw ro\n"
    "31 1 0:21 / /home/x ro - erofs /images/x.raw ro,acl\n"
    "32 1 0:22 / /home/\x07 ro - erofs /images/x.raw ro\n"
    "33 1 0:23 / /home/\u2028y\r\x85\udcff ro - erofs /images/\udcfe.raw ro\n"
)
FOREIGN = "ID=4 SRC=/dev/sda1 TARGET=/mnt ROOT=/ ATTRS=x-a=b OPTS=uhelper=udisks2\n"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    tmp_path.chmod(0o755)
    with OwnedFd(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        yield fd.fileno()


def entry(mount_id: int) -> utab.Entry:
    found = utab.Entry.of(MOUNTINFO, mount_id)
    assert found is not None
    return found


def test_a_line_is_what_mountinfo_says() -> None:
    assert entry(30).line() == (
        "SRC=/images/a\\040b.raw TARGET=/home/a\\040b\\134 ROOT=/ OPTS=uhelper=mountd\n"
    )
    assert utab.escape("/home/a b\\") == "/home/a\\040b\\134"
    assert utab.escape("/a\t\n#") == "/a\\011\\012\\043"


@pytest.mark.parametrize("mount_id", [3, 34])
def test_what_is_not_there_has_no_entry(mount_id: int) -> None:
    assert utab.Entry.of(MOUNTINFO, mount_id) is None


def test_names_may_have_any_bytes(directory: int, tmp_path: Path) -> None:
    file = tmp_path / "utab"
    utab.add(directory, entry(32))
    utab.add(directory, entry(33))
    assert file.read_bytes() == (
        b"SRC=/images/x.raw TARGET=/home/\x07 ROOT=/ OPTS=uhelper=mountd\n"
        b"SRC=/images/\xfe.raw TARGET=/home/\xe2\x80\xa8y\r\xc2\x85\xff ROOT=/ OPTS=uhelper=mountd\n"
    )
    utab.tidy(directory, MOUNTINFO)
    assert len(file.read_bytes().split(b"\n")) == 3
    utab.tidy(directory, "", utab.escape("/home/\u2028y\r\x85\udcff"))
    assert file.read_text() == entry(32).line()
    utab.tidy(directory, "")
    assert file.read_bytes() == b""


@pytest.mark.parametrize("bad", ["", "a b", "a\nOPTS=x", "a\tb", "a\0"])
@pytest.mark.parametrize("place", range(3))
def test_no_field_can_be_two(bad: str, place: int) -> None:
    fields = ["/a", "/", "/b"]
    fields[place] = bad
    with pytest.raises(ValueError, match="no field"):
        utab.Entry(*fields)


def test_adding_and_tidying_leave_the_lines_of_others(directory: int, tmp_path: Path) -> None:
    file = tmp_path / "utab"
    file.write_text(FOREIGN)
    utab.add(directory, entry(30))
    utab.add(directory, entry(31))
    assert file.read_text() == FOREIGN + entry(30).line() + entry(31).line()
    assert file.stat().st_mode & 0o777 == 0o644
    # What is mounted stays.
    utab.tidy(directory, MOUNTINFO)
    assert file.read_text() == FOREIGN + entry(30).line() + entry(31).line()
    gone = MOUNTINFO.split("\n", 3)[3]
    # Only what was at that place is looked at.
    utab.tidy(directory, gone, utab.escape("/home/x"))
    assert file.read_text() == FOREIGN + entry(30).line()
    utab.tidy(directory, "", None)
    assert file.read_text() == FOREIGN
    assert sorted(os.listdir(tmp_path)) == ["utab", "utab.lock"]


def test_what_libmount_had_is_kept_byte_by_byte(directory: int, tmp_path: Path) -> None:
    odd = b"SRC=/a\xff TARGET=/b\xe2\x80\xa8c ROOT=/ OPTS=user=x\x85y\n"
    (tmp_path / "utab").write_bytes(odd)
    utab.add(directory, entry(31))
    assert (tmp_path / "utab").read_bytes() == odd + entry(31).line().encode()


def test_a_lock_that_somebody_keeps_is_not_waited_for(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utab, "PATIENCE_SECONDS", 0.02)
    (tmp_path / "utab.lock").touch()
    with open(tmp_path / "utab.lock") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError):
            utab.add(directory, entry(31))
    assert not (tmp_path / "utab").exists()
    utab.add(directory, entry(31))


def test_a_lock_that_is_given_up_is_taken(directory: int, tmp_path: Path) -> None:
    (tmp_path / "utab.lock").touch()
    command = ["flock", tmp_path / "utab.lock", "sh", "-c", "echo; exec sleep 0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        utab.add(directory, entry(31))
    assert (tmp_path / "utab").read_text() == entry(31).line()


@pytest.mark.parametrize("name", ["utab", "utab.lock"])
def test_no_link_is_followed(directory: int, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious\n")
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        utab.add(directory, entry(31))
    assert victim.read_text() == "precious\n"


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_a_lock_that_is_no_file_is_not_waited_for(directory: int, tmp_path: Path, kind: str) -> None:
    (os.mkfifo if kind == "fifo" else os.mkdir)(tmp_path / "utab.lock")
    with pytest.raises(OSError, match="not a file|directory"):
        utab.add(directory, entry(31))
    assert not (tmp_path / "utab").exists()


def test_nobody_waits_for_who_watches(directory: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "utab.event")
    utab.add(directory, entry(31))
    assert (tmp_path / "utab").read_text() == entry(31).line()


def test_a_file_that_is_none_is_left_alone(directory: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "utab")
    with pytest.raises(OSError, match="too large"):
        utab.add(directory, entry(31))


@pytest.mark.parametrize(("uid", "mode"), [(0, 0o775), (0, 0o757), (4321, 0o755)])
def test_a_directory_of_somebody_else_is_not_used(tmp_path: Path, uid: int, mode: int) -> None:
    path = tmp_path / "run/mount"
    path.mkdir(parents=True)
    path.parent.chmod(0o755)
    path.chmod(mode)
    os.chown(path, uid, 0)
    with (
        OwnedFd(os.open(tmp_path, os.O_PATH | os.O_CLOEXEC)) as root,
        pytest.raises(SyscallError, match="EPERM"),
    ):
        utab.open_directory(root.fileno())


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_directory_that_is_not_there_is_made(tmp_path: Path, umask: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o755)
    before = os.umask(umask)
    try:
        for _ in range(2):
            with (
                OwnedFd(os.open(tmp_path, os.O_PATH | os.O_CLOEXEC)) as root,
                utab.open_directory(root.fileno()) as directory,
            ):
                utab.add(directory.fileno(), entry(31))
    finally:
        os.umask(before)
    found = tmp_path / "run/mount"
    assert found.stat().st_mode & 0o777 == 0o755
    assert {each.name: each.stat().st_mode & 0o777 for each in found.iterdir()} == {
        "utab": 0o644,
        "utab.lock": 0o644,
    }


def test_nothing_is_made_in_a_directory_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with (
        OwnedFd(os.open(tmp_path, os.O_PATH | os.O_CLOEXEC)) as root,
        pytest.raises(SyscallError, match="EPERM"),
    ):
        utab.open_directory(root.fileno())
    assert list((tmp_path / "run").iterdir()) == []


def test_a_directory_behind_a_link_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "elsewhere/mount").mkdir(parents=True, mode=0o755)
    (tmp_path / "run").symlink_to("elsewhere")
    with (
        OwnedFd(os.open(tmp_path, os.O_PATH | os.O_CLOEXEC)) as root,
        pytest.raises(SyscallError, match="ELOOP"),
    ):
        utab.open_directory(root.fileno())
