"""What a program that works on a stranger's bytes can do: its work, and nothing else."""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.errors import InvalidImage, LimitExceeded, NotSupported, StorageFull, TimedOut
from mountd.fds import OwnedFd
from mountd.kernel.sandbox import NOBODY
from mountd.store import erofs_build, layers, program, quarantine, skopeo
from mountd.store.child import Deadline, finish, fork_python
from mountd.store.manifest import Descriptor
from mountd.store.quarantine import Quarantine
from mountd.store.tar_filter import Summary
from tests import oci
from tests.oci import Member, archive

LIMITS = program.Limits(cpu_seconds=20, memory=4 << 30, file_size=1 << 20)


def quiet() -> None:
    """Nothing to do while waiting."""


@pytest.fixture
def work(tmp_path: Path) -> Iterator[int]:
    """A directory that is root's alone, with nothing in it before and after."""
    tmp_path.chmod(0o700)
    with OwnedFd(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        yield fd.fileno()
        assert os.listdir(fd.fileno()) == []


@pytest.fixture
def place(work: int) -> Iterator[Quarantine]:
    with Quarantine(work, "quarantine") as directory:
        yield directory


def run(
    place: Quarantine, script: str, limits: program.Limits = LIMITS, **options: object
) -> tuple[int, str, str]:
    """Run a shell script as a program; return its exit code and what it wrote."""
    command = ["sh", "-c", script]
    child = program.start(command, limits, directory=place.fileno(), maximum_output=50_000, **options)  # type: ignore[arg-type]
    with child:
        finish([child], Deadline(20), quiet)
        output, errors = (each.kept.decode() for each in child.outputs)
        return child.code, output, errors


def test_it_is_nobody_and_stays_so(place: Quarantine) -> None:
    _, output, _ = run(place, "cat /proc/self/status; id -G")
    uid, gid = program.identity()
    assert f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}\n" in output
    assert f"Gid:\t{gid}\t{gid}\t{gid}\t{gid}\n" in output
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert f"{name}:\t0000000000000000\n" in output
    assert "NoNewPrivs:\t1\n" in output
    assert output.splitlines()[-1] == str(gid)


def test_the_user_for_pulls_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(uid: int, gid: int) -> Callable[[str], pwd.struct_passwd]:
        return lambda name: pwd.struct_passwd((name, "x", uid, gid, "", "/", "/bin/false"))

    monkeypatch.setattr(pwd, "getpwnam", known(777, 778))
    assert program.identity() == (777, 778)
    for uid, gid in ((0, 778), (777, 0)):
        monkeypatch.setattr(pwd, "getpwnam", known(uid, gid))
        assert program.identity() == (NOBODY, NOBODY)


def test_it_writes_to_its_directory_alone(place: Quarantine) -> None:
    script = """
echo there > /tmp/file; cat /var/tmp/file
for path in / /etc /run /var /var/lib /dev/shm /proc /sys /home /root; do
  if touch "$path/mountd-was-here" 2> /dev/null; then echo "wrote to $path"; fi
done
"""
    assert run(place, script)[1] == "there\n"
    status = os.stat("file", dir_fd=place.fileno())
    assert (status.st_uid, status.st_mode & 0o777) == (program.identity()[0], 0o600)


def test_it_cannot_run_or_change_anything_there(place: Quarantine) -> None:
    script = """
cp /bin/true /tmp/true; chmod 755 /tmp/true
/tmp/true 2> /dev/null && echo ran
mount -o remount,rw / 2> /dev/null && echo remounted
mount -o bind,remount,exec /tmp 2> /dev/null && echo remounted
umount /tmp 2> /dev/null && echo unmounted
exit 0
"""
    assert run(place, script)[:2] == (0, "")


def test_its_environment_is_the_same_everywhere(place: Quarantine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/evil.so")
    monkeypatch.setenv("HTTPS_PROXY", "http://evil.test")
    lines = set(run(place, "env; pwd")[1].splitlines())
    assert lines == {*(f"{key}={value}" for key, value in program.ENVIRONMENT.items()), "PWD=/tmp", "/tmp"}


def test_it_sees_its_own_processes_and_descriptors_alone(place: Quarantine) -> None:
    with OwnedFd(os.memfd_create("secret", 0)) as leaky:
        os.set_inheritable(leaky.fileno(), True)
        output = run(
            place, "echo $$; ls /proc | grep -c '^[0-9]'; ls /proc/self/fd; readlink /proc/self/fd/0"
        )[1]
    pid, processes, *fds, zero = output.splitlines()
    assert (pid, zero) == ("1", "/dev/null")
    assert int(processes) <= 4
    assert fds == ["0", "1", "2", "3"]  # the last one is the listing's own


def test_network_only_where_it_is_needed(place: Quarantine) -> None:
    script = "readlink /proc/self/ns/net; grep -c : /proc/net/dev"
    alone = run(place, script)[1].split()
    shared = run(place, script, network=True)[1].split()
    own = os.readlink("/proc/self/ns/net")
    assert alone[0] != own
    assert alone[1] == "1"
    assert shared[0] == own


def test_limits(place: Quarantine) -> None:
    output = run(place, "ulimit -t; ulimit -v; ulimit -f; ulimit -n; ulimit -c")[1]
    assert output.split() == ["20", str(4 << 20), str((1 << 20) // 512), "256", "0"]
    assert run(place, "head -c 2000000 /dev/zero > /tmp/large")[0] != 0
    assert os.stat("large", dir_fd=place.fileno()).st_size == 1 << 20


def test_seconds_of_work(place: Quarantine) -> None:
    limits = program.Limits(cpu_seconds=1, memory=4 << 30, file_size=0)
    assert run(place, "while :; do :; done", limits)[0] == -signal.SIGKILL


def alive(marker: str) -> bool:
    listing = subprocess.run(
        ["ps", "axww", "-o", "args="], capture_output=True, text=True, check=True
    ).stdout
    return re.search(rf"^sleep {marker}$", listing, re.M) is not None


def test_a_deadline_ends_all_that_it_started(place: Quarantine) -> None:
    began = time.monotonic()
    script = "setsid sleep 7654321 & sleep 7654321 & trap '' TERM INT HUP; sleep 7654321"
    child = program.start(["sh", "-c", script], LIMITS, directory=place.fileno())
    with pytest.raises(TimedOut, match="1 seconds"), child:
        finish([child], Deadline(1), quiet)
    assert time.monotonic() - began < 5
    assert not alive("7654321")


def test_it_ends_with_the_one_who_waits_for_it(place: Quarantine) -> None:
    def be_killed(answer: int) -> bool:
        program.start(["sleep", "7654322"], LIMITS, directory=place.fileno())
        os.write(answer, b"started")
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    with fork_python("victim", be_killed, 10) as victim:
        finish([victim], Deadline(10), quiet)
        assert victim.outputs[0].kept == b"started"
        assert victim.code == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while alive("7654322"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_it_says_is_bounded(place: Quarantine) -> None:
    script = (
        "head -c 1000000 /dev/zero | tr '\\0' a; head -c 1000000 /dev/zero | tr '\\0' b >&2; echo end >&2"
    )
    _, output, errors = run(place, script)
    assert output == "a" * 50_001
    assert len(errors) == program.MAXIMUM_MESSAGES
    assert errors.endswith("bend\n")


def test_progress_may_end_the_waiting(place: Quarantine) -> None:
    def refuse() -> None:
        raise LimitExceeded("patience", 0)

    child = program.start(["sleep", "7654323"], LIMITS, directory=place.fileno())
    with pytest.raises(LimitExceeded), child:
        finish([child], Deadline(20), refuse)
    assert not alive("7654323")


def test_a_program_that_is_missing(place: Quarantine) -> None:
    with pytest.raises(NotSupported, match="no-such-program") as caught:
        program.start(["no-such-program"], LIMITS, directory=place.fileno())
    assert caught.value.hint


def test_the_namespace_of_the_caller_stays_what_it_was(place: Quarantine) -> None:
    before = {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}
    run(place, "true")
    assert {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")} == before


def test_extra_descriptors(place: Quarantine) -> None:
    with skopeo.sealed(b"policy") as fd:
        assert run(place, "cat /proc/self/fd/3", extra=[fd.fileno()])[1] == "policy"
        assert run(place, "echo x > /proc/self/fd/3", extra=[fd.fileno()])[0] != 0
        with pytest.raises(PermissionError):
            os.pwrite(fd.fileno(), b"x", 0)


# Quarantines


def blob(place: Quarantine, data: bytes, name: str | None = None) -> Descriptor:
    """Put a blob into a quarantine under its digest, or another name."""
    digest = oci.digest(data)
    path = name or digest.removeprefix("sha256:")
    with OwnedFd(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=place.fileno())) as fd:
        os.write(fd.fileno(), data)
    return Descriptor("x", digest, len(data))


def test_a_blob_is_copied_and_counted(work: int, place: Quarantine) -> None:
    counts: list[int] = []
    descriptor = blob(place, b"layer" * 1000)
    with quarantine.receive(place.fileno(), descriptor, "it", work, counts.append) as copy:
        blob(place, b"changed afterwards", descriptor.digest.removeprefix("sha256:"))
        assert os.pread(copy.fileno(), 10_000, 0) == b"layer" * 1000
        assert os.fstat(copy.fileno()).st_nlink == 0
    assert sum(counts) == 5000


def test_blobs_that_are_not_what_they_should_be(work: int, place: Quarantine) -> None:
    hex = hashlib.sha256(b"wanted").hexdigest()
    wanted = Descriptor("x", f"sha256:{hex}", 6)

    def refused(reason: str) -> None:
        with pytest.raises(InvalidImage, match=reason):
            quarantine.receive(place.fileno(), wanted, "it", work, lambda _: None)

    refused("is not there .ENOENT.")
    blob(place, b"chosen", hex)
    refused("the digest of it is")
    blob(place, b"wanted and more", hex)
    refused("does not have the size")
    os.unlink(hex, dir_fd=place.fileno())
    blob(place, b"wanted", "elsewhere")
    os.symlink("elsewhere", hex, dir_fd=place.fileno())
    refused("is not there .ELOOP.")
    os.unlink(hex, dir_fd=place.fileno())
    os.mkfifo(hex, dir_fd=place.fileno())
    refused("is not a file")
    os.unlink(hex, dir_fd=place.fileno())
    os.mkdir(hex, dir_fd=place.fileno())
    refused("is not a file")


def test_a_blob_that_changes_while_it_is_copied(work: int, place: Quarantine) -> None:
    """What was hashed is what was copied, whatever the file becomes meanwhile."""
    descriptor = blob(place, bytes(3 << 20))
    name = descriptor.digest.removeprefix("sha256:")

    def change(_: int) -> None:
        blob(place, b"evil", name)

    try:
        copy = quarantine.receive(place.fileno(), descriptor, "it", work, change)
    except InvalidImage:
        return
    with copy:
        assert hashlib.sha256(os.pread(copy.fileno(), 4 << 20, 0)).hexdigest() == name


def test_documents_are_bounded(place: Quarantine) -> None:
    blob(place, b"x" * 100, "document")
    assert quarantine.read_document(place.fileno(), "document", "it", 100) == b"x" * 100
    with pytest.raises(InvalidImage, match="larger than 99"):
        quarantine.read_document(place.fileno(), "document", "it", 99)
    os.symlink("/etc/passwd", "link", dir_fd=place.fileno())
    for name in ("link", "../../etc/passwd", "/etc/passwd"):
        with pytest.raises(InvalidImage, match="is not there"):
            quarantine.read_document(place.fileno(), name, "it", 1 << 20)
    os.symlink("/etc", "directory", dir_fd=place.fileno())
    with pytest.raises(InvalidImage, match="is not there"):
        quarantine.open_directory(place.fileno(), "directory")


def test_usage(place: Quarantine) -> None:
    before = quarantine.usage(place.fileno())
    blob(place, b"x" * 8192, "file")
    os.mkdir("below", dir_fd=place.fileno())
    blob(place, b"x" * 16384, "below/file")
    os.symlink("/var", "link", dir_fd=place.fileno())
    assert before + 24576 <= quarantine.usage(place.fileno()) < before + 65536
    for number in range(quarantine.MAXIMUM_FILES):
        os.symlink("x", f"below/{number}", dir_fd=place.fileno())
    with pytest.raises(LimitExceeded, match="files"):
        quarantine.usage(place.fileno())


def test_a_file_that_was_made_is_taken_over(work: int, place: Quarantine) -> None:
    run(place, "head -c 1000000 /dev/urandom > /tmp/made; sha256sum /tmp/made")
    fd, size = quarantine.take(place.fileno(), "made", work, "mine")
    with fd:
        assert size == 1_000_000
        status = os.fstat(fd.fileno())
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, 0, 0o400)
        assert status.st_ino != os.stat("made", dir_fd=place.fileno()).st_ino
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd.fileno(), b"x")
    os.unlink("mine", dir_fd=work)
    os.symlink("/etc/passwd", "link", dir_fd=place.fileno())
    with pytest.raises(InvalidImage):
        quarantine.take(place.fileno(), "link", work, "mine")


def test_no_room_for_what_was_made(tmp_path: Path, place: Quarantine) -> None:
    run(place, "head -c 1000000 /dev/urandom > /tmp/made")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", small], check=True)
    try:
        with OwnedFd(os.open(small, os.O_RDONLY | os.O_DIRECTORY)) as into:
            with pytest.raises(StorageFull):
                quarantine.take(place.fileno(), "made", into.fileno(), "mine")
            descriptor = blob(place, os.urandom(1_000_000))
            with pytest.raises(StorageFull):
                quarantine.receive(place.fileno(), descriptor, "it", into.fileno(), lambda _: None)
            assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", small], check=True)
        small.rmdir()


def test_a_quarantine_is_nobodys_business(work: int) -> None:
    with Quarantine(work, "q") as directory:
        status = os.fstat(directory.fileno())
        assert (status.st_uid, status.st_mode & 0o7777) == (program.identity()[0], 0o700)
        run(
            directory,
            "mkdir -p /tmp/a/b/c; ln -s / /tmp/a/root; touch /tmp/a/b/c/d; chmod 0 /tmp/a/b/c /tmp/a",
        )
        with pytest.raises(FileExistsError):
            Quarantine(work, "q")


# The filter, and what stands before and after it


def work_on(data: bytes, compression: str, diff_id: str | None = None) -> tuple[OwnedFd, layers.Work]:
    blob = oci.compress(data, compression)
    fd = OwnedFd(os.memfd_create("blob", os.MFD_CLOEXEC))
    os.write(fd.fileno(), blob)
    os.lseek(fd.fileno(), 0, os.SEEK_SET)
    digest = diff_id or oci.digest(data)
    return fd, layers.Work(fd.fileno(), compression, len(blob), digest, lowest=True, devices=False)


def filtered(
    data: bytes,
    compression: str = "none",
    *,
    diff_id: str | None = None,
    limits: layers.LayerLimits | None = None,
) -> tuple[bytes, Summary]:
    """Have an archive filtered by the confined child; return what it wrote."""
    fd, work = work_on(data, compression, diff_id)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with fd:
        child = layers._start_filter(work, work.fd, writer, limits or layers.LayerLimits())
        os.close(writer)
        with child, open(reader, "rb") as file:
            out = file.read()
            finish([child], Deadline(20), quiet)
            return out, layers._understand(child.outputs[0].kept, work.diff_id)


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_the_filter_in_its_process(compression: str) -> None:
    data = archive(Member("a", os.urandom(3 << 20)), Member("b", b"x"))
    out, summary = filtered(data, compression)
    assert (summary.entries, summary.content) == (3, (3 << 20) + 1)
    assert len(out) > 3 << 20


def test_a_layer_with_another_digest_than_configured() -> None:
    with pytest.raises(InvalidImage, match="as configured"):
        filtered(archive(Member("a", b"x")), diff_id=f"sha256:{'0' * 64}")
    # Where the difference is behind the archive's end, too.
    with pytest.raises(InvalidImage, match="as configured"):
        filtered(archive(Member("a", b"x")) + bytes(512), diff_id=oci.digest(archive(Member("a", b"x"))))


def test_what_the_filter_refuses_is_told() -> None:
    with pytest.raises(InvalidImage, match="absolute") as caught:
        filtered(archive(Member("b", b""), Member("/a", b"")))
    assert caught.value.parameters["offset"] == 512
    with pytest.raises(LimitExceeded, match="uncompressed layer"):
        filtered(archive(Member("a", bytes(100_000))), limits=layers.LayerLimits(uncompressed=50_000))
    with pytest.raises(LimitExceeded, match="may grow"):
        filtered(archive(Member("a", bytes(80 << 20))), "gzip")


# In a process of its own: this one has memory to spare that it has freed.
GREEDY = """
import os
from mountd.store import layers
from tests.kernel.test_programs import filtered
from tests.oci import Member, archive
layers.FILTER_MEMORY = 8 << 20
try:
    filtered(archive(*(Member(f"{number:050}/{number:050}", b"") for number in range(40_000))))
except Exception as error:
    os.write(1, str(error).encode())
"""


def test_memory_of_the_filter_is_bounded() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", GREEDY]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == f"limit exceeded: at most {8 << 20} bytes of memory", done.stderr


def test_building_needs_a_tool_that_is_new_enough(place: Quarantine) -> None:
    said = subprocess.run(["mkfs.erofs", "-V"], capture_output=True, text=True, check=False)
    match = re.search(r"(\d+)\.(\d+)", said.stdout + said.stderr)
    assert match is not None
    installed = int(match[1]), int(match[2])
    if installed >= erofs_build.OLDEST:
        assert erofs_build.version(place.fileno()) == installed
    else:
        with pytest.raises(NotSupported, match=f"{installed[0]}.{installed[1]}") as caught:
            erofs_build.version(place.fileno())
        assert "1.7" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("mkfs.erofs (erofs-utils) 1.8.6", (1, 8)),
        ("mkfs.erofs 1.7", (1, 7)),
        ("mkfs.erofs (erofs-utils) 1.10.1-g0123abc", (1, 10)),
        ("mkfs.erofs 1.6", None),
        ("mkfs.erofs", None),
        ("", None),
    ],
)
def test_versions_of_the_tool(
    place: Quarantine, monkeypatch: pytest.MonkeyPatch, said: str, found: tuple[int, int] | None
) -> None:
    start = program.start
    monkeypatch.setattr(program, "start", lambda command, *a, **k: start(["echo", said], *a, **k))
    if found is not None:
        assert erofs_build.version(place.fileno()) == found
    else:
        with pytest.raises(NotSupported):
            erofs_build.version(place.fileno())


def test_no_tool_at_all(place: Quarantine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erofs_build, "PROGRAM", "no-such-mkfs.erofs")
    with pytest.raises(NotSupported, match="building erofs images without") as caught:
        erofs_build.version(place.fileno())
    assert "erofs-utils" in str(caught.value.hint)


def test_the_command_depends_on_the_version_and_the_layer() -> None:
    digest = "sha256:" + "ff" * 32
    new = erofs_build.command((1, 8), digest, lowest=True)
    assert new[1:] == [
        "--quiet",
        "--tar=f",
        "-T0",
        "-Uffffffff-ffff-8fff-bfff-ffffffffffff",
        "--mkfs-time",
        new[-1],
    ]
    assert "--mkfs-time" not in erofs_build.command((1, 7), digest, lowest=True)
    assert "--aufs" in erofs_build.command((1, 7), digest, lowest=False)
