"""composefs for mount(8): `mount -t mountd.composefs`, by hand, by a line of fstab, and for a user."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mountd.evidence.fs_verity import digest_of
from mountd.fds import OwnedFd
from tests.daemon import Daemon
from tests.e2e.attaching import User, granting, user_of
from tests.e2e.conftest import trusting
from tests.programs import Done, as_user, check_line, findmnt, helped, in_private, mounted, run

MAKER = 21_750  # the uid of this module's user
BIG = {"low": b"lower " * 200, "high": b"higher " * 200}
DESCRIPTIONS = """
[[rule]]
name = "descriptions"
image = { kind = "composefs" }
caller = { any = true }
require = { integrity = ["regenerated"] }
grant = { file-systems = ["erofs"], idmap = ["none", "namespace", "caller"], attach = PLACES }
verdict = "allow"
"""


@dataclass(frozen=True, slots=True)
class Scene:
    """A daemon, and a tree as a composefs of root's, whose contents lie in two directories."""

    daemon: Daemon
    grounds: Path
    tree: Path

    @property
    def image(self) -> Path:
        return self.tree / "tree.cfs"

    @property
    def description(self) -> Path:
        return self.tree / "tree.dump"

    @property
    def objects(self) -> str:
        return f"mountd.objects={self.tree / 'one'}:{self.tree / 'two'}"

    @property
    def digest(self) -> str:
        """The fs-verity digest of the image."""
        with OwnedFd(os.open(self.image, os.O_RDONLY)) as fd:
            return digest_of(fd.fileno(), os.fstat(fd.fileno()).st_size)


@pytest.fixture(scope="module")
def scene(place: Path) -> Iterator[Scene]:
    path = place / "composefs-mount"
    (path / "tree").mkdir(parents=True)
    for name, data in BIG.items():
        (path / "tree" / name).write_bytes(data)
    store = f"--digest-store={path / 'one'}"
    subprocess.run(["mkcomposefs", "--user-xattrs", store, path / "tree", path / "tree.cfs"], check=True)
    described = subprocess.run(
        ["composefs-info", "dump", path / "tree.cfs"], check=True, capture_output=True
    )
    (path / "tree.dump").write_bytes(described.stdout)
    (path / "tree.dump").chmod(0o644)
    first, *_ = sorted(each for each in (path / "one").rglob("*") if each.is_file())
    other = path / "two" / first.relative_to(path / "one")
    other.parent.mkdir(parents=True)
    first.rename(other)

    def policy(places: str) -> str:
        return trusting(path, attach=places) + DESCRIPTIONS.replace("PLACES", places)

    with granting(place, "composed", policy) as (daemon, grounds):
        yield Scene(daemon, grounds, path)
    shutil.rmtree(path)


@pytest.fixture
def user(scene: Scene) -> User:
    return user_of(scene.daemon, scene.grounds, MAKER)


@pytest.fixture
def target(scene: Scene) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="target-", dir=scene.tree.parent))
    yield path
    path.rmdir()


def read(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


def test_by_fstab(scene: Scene, installed: Path, target: Path) -> None:
    fstab = f"{scene.image} {target} mountd.composefs ro,noexec,{scene.objects} 0 0\n"

    def work() -> object:
        every = [run(["mount", "--all", "--verbose"], scene.daemon.socket) for _ in range(2)]
        flags, source = mounted(target), findmnt(target)
        found = read(target), [each.returncode for each in every], every[0].stderr
        gone = run(["umount", target], scene.daemon.socket)
        return found, flags, source, every[1].stdout, gone.stderr, os.listdir(target)

    found, flags, source, again, gone, left = in_private(installed, work, {"fstab": fstab}, target.parent)  # type: ignore[misc]
    assert found == (BIG, [0, 0], "")
    assert flags[0] == "overlay"
    assert {"ro", "noexec"} <= flags[1]
    assert source == str(scene.image)
    # So mount(8) knows that it is there.
    assert "already mounted" in again
    assert (gone, left) == ("", [])


def test_a_container_is_not_told_paths_of_the_host(
    scene: Scene, installed: Path, target: Path, containers: None
) -> None:
    words = ["-t", "mountd.composefs", "-o", scene.objects, scene.image, target]
    done, found = helped(installed, scene.daemon.socket, words, look=lambda: (read(target), findmnt(target)))
    assert (done.returncode, done.stderr, found) == (0, "", (BIG, "mountd"))


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("described", [True, False])
def test_by_the_digest_of_its_image(
    scene: Scene, installed: Path, target: Path, right: bool, described: bool
) -> None:
    source = scene.description if described else scene.image
    wanted = scene.digest if right else 64 * "0"
    words = ["-t", "mountd.composefs", "-o", f"{scene.objects},mountd.fsverity={wanted}", source, target]

    def work() -> tuple[Done, dict[str, bytes]]:
        return run(["mount", *words], scene.daemon.socket), read(target)

    done, found = in_private(installed, work)
    assert (done.returncode == 0, found) == (right, BIG if right else {}), done.stderr
    if not right:
        check_line(done, f"has the fs-verity digest {scene.digest}, and {wanted} was asked for")


def test_contents_that_cannot_be_checked(scene: Scene, installed: Path, target: Path) -> None:
    """A file system in memory has no fs-verity."""
    with tempfile.TemporaryDirectory(prefix="composed-", dir="/dev/shm") as memory:
        shutil.copytree(scene.tree / "one", memory, dirs_exist_ok=True)
        shutil.copytree(scene.tree / "two", memory, dirs_exist_ok=True)

        def work() -> list[tuple[Done, dict[str, bytes]]]:
            seen = []
            for options in (
                f"mountd.objects={memory},mountd.verity=yes",
                f"{scene.objects},mountd.verity=no",
            ):
                words = ["mount", "-t", "mountd.composefs", "-o", options, scene.image, target]
                seen.append((run(words, scene.daemon.socket), read(target)))
            return seen

        (refused, nothing), (done, found) = in_private(installed, work)
    assert (refused.returncode != 0, nothing) == (True, {})
    check_line(refused, "checking contents by fs-verity here .* .hint: ask without it")
    assert (done.returncode, done.stderr, found) == (0, "", BIG)


def test_a_user_has_it_attached(scene: Scene, installed: Path, user: User) -> None:
    """What the user has made: mountd makes the image anew, and reads no more than the user may."""
    mine = user.directory("mine")
    shutil.copy(scene.description, mine / "tree.dump")
    for each in ("one", "two"):
        shutil.copytree(scene.tree / each, mine / each)
    for path in mine.rglob("*"):
        os.chown(path, MAKER, MAKER)
    spot = user.directory("spot")
    helper = installed / "sbin/mount.mountd"

    def ask(objects: str) -> Done:
        words = [helper, "tree.dump", spot, "-t", "mountd.composefs", "-o", f"mountd.objects={objects}"]
        return as_user(words, scene.daemon.socket, user=MAKER, group=MAKER, cwd=mine)

    done = ask("one:two")
    assert (done.returncode, done.stderr) == (0, "")
    try:
        assert {each.name for each in spot.iterdir()} == set(BIG)
        shown = as_user(["cat", spot / "low", spot / "high"], scene.daemon.socket, user=MAKER, group=MAKER)
        assert shown.stdout == (BIG["low"] + BIG["high"]).decode()
    finally:
        gone = as_user(
            [installed / "sbin/umount.mountd", spot], scene.daemon.socket, user=MAKER, group=MAKER
        )
        assert (gone.returncode, gone.stderr) == (0, "")
    # Directories of contents that are the user's to name, and not to open.
    secret = scene.tree.parent / "secret-objects"
    shutil.copytree(scene.tree / "one", secret)
    secret.chmod(0o700)
    try:
        refused = ask(f"one:{secret}")
    finally:
        shutil.rmtree(secret)
    assert (refused.returncode != 0, os.listdir(spot)) == (True, [])
    check_line(refused, "^mount.mountd: ")
    missing = ask("one:nowhere")
    assert (missing.returncode != 0, os.listdir(spot)) == (True, [])
    check_line(missing, "nowhere")


def test_what_is_no_composefs(scene: Scene, installed: Path, target: Path) -> None:
    """It is said in one line by what it is refused, and nothing is mounted."""
    (scene.tree / "text").write_text("no composefs\n")
    (scene.tree / "text").chmod(0o644)
    cases = {
        (scene.image, ""): "a composefs needs directories .*mountd.objects=DIR",
        (scene.tree / "text", scene.objects): "unsupported file system|invalid image",
        ("/nowhere.cfs", scene.objects): "not found: /nowhere.cfs",
        (scene.image, "mountd.objects=/etc/passwd"): "/etc/passwd",
        (scene.image, f"{scene.objects},mountd.access=read-write"): "“rw”|read-only",
    }
    for (source, options), said in cases.items():
        words = [installed / "sbin/mount.mountd", source, target, "-t", "mountd.composefs"]
        done = run([*words, "-o", options or "ro"], scene.daemon.socket)
        assert (done.returncode != 0, os.listdir(target)) == (True, []), source
        check_line(done, said)
