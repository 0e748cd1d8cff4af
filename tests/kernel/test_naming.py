"""Names of sources: the kernel follows them to what was judged, wherever else they lead."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.execute import naming
from mountd.execute.naming import Naming, is_name
from mountd.execute.run import Inputs, run
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, MountAttr, Propagation
from mountd.plan.operations import Backing, CreateSuperblock, MakeMount, Plan
from tests.container import forked
from tests.images import build_image, build_tree

SLOTS = 2


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("naming")
    tree = build_tree(place / "tree")
    return {type: build_image(type, tree, place / f"{type}.raw") for type in ("erofs", "squashfs", "ext4")}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "names"
    path.mkdir()
    yield path
    assert list(path.iterdir()) == []


def staged(directory: Path) -> None:
    """Leave for a mount namespace with the directories for names."""
    namespaces.unshare(Clone.NEWNS)
    mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
    naming.prepare(str(directory), SLOTS)


def made(image: Path, type: str, name: str | None, names: Naming, target: Path) -> str:
    """Mount an image under a name; return what the mount table calls it."""
    backing = Backing.FILE if type == "erofs" else Backing.LOOP
    create = CreateSuperblock(type, backing, True, (), name=name)
    plan = Plan((create, MakeMount(MountAttr.RDONLY)))
    with OwnedFd(os.open(image, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        inputs = Inputs(image_fd=fd.fileno(), userns_fd=None, seal=None, naming=names)  # type: ignore[arg-type]
        with run(plan, inputs) as mount:
            mount_api.move_mount(mount.fileno(), str(target))
    try:
        assert (target / "hello").exists()
        line = next(
            line for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines())
            if line.split()[4] == str(target)
        )  # fmt: skip
        return line.partition(" - ")[2].split()[1]
    finally:
        mount_api.umount(str(target))


@pytest.mark.parametrize("type", ["erofs", "squashfs", "ext4"])
def test_the_name_is_what_the_mount_table_shows(
    images: dict[str, Path], directory: Path, tmp_path: Path, type: str
) -> None:
    """Also one at which there is another file, or none: the kernel follows it to the image all the same."""
    target = tmp_path / "target"
    target.mkdir()

    def work() -> list[str]:
        staged(directory)
        names = Naming(f"{directory}/0")
        return [
            made(images[type], type, name, names, target)
            for name in ("/etc/passwd", "/no/such/file", "stored:sha256:00", "/etc/passwd/x", "/etc/passwd")
        ]

    assert forked(work) == [
        "/etc/passwd", "/no/such/file", "stored:sha256:00", "/etc/passwd/x", "/etc/passwd",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "", "/", "/a/../b", "/a//b", "/a/", ".", "..", "/a\nb", "/a\x1b[2J", "/a\udcff", "/proc", "/proc/x",
        "proc/x", "/" + 256 * "a", "/" + "/".join(600 * ["ä"]),
    ],
)  # fmt: skip
def test_what_is_no_name(name: str) -> None:
    assert not is_name(name)


def test_without_a_name_it_is_the_descriptor(
    images: dict[str, Path], directory: Path, tmp_path: Path
) -> None:
    def work() -> list[str]:
        staged(directory)
        names = Naming(f"{directory}/0")
        return [
            made(images["erofs"], "erofs", name, names, tmp_path / "t") for name in (None, "/proc/1/exe")
        ]

    (tmp_path / "t").mkdir()
    assert all(name.startswith("/proc/self/fd/") for name in forked(work))


def test_what_a_killed_worker_has_left_is_taken_away(
    images: dict[str, Path], directory: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()

    def work() -> tuple[str, list[str]]:
        staged(directory)
        pid = os.fork()
        if pid == 0:
            Naming(f"{directory}/0").lead("/a/b/c", 7)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        assert (directory / "0/a/b/c").is_symlink()
        # Now a link is where a directory has to be.
        name = made(images["erofs"], "erofs", "/a/b/c/d", Naming(f"{directory}/0"), target)
        return name, sorted(os.listdir(directory / "0"))

    assert forked(work) == ("/a/b/c/d", ["a", "proc"])


def test_whoever_was_inside_is_where_they_were(directory: Path) -> None:
    def work() -> bool:
        staged(directory)
        os.chdir("/")
        before = os.stat("/"), os.stat(".")
        names = Naming(f"{directory}/1")
        fds = os.listdir("/proc/self/fd")
        with names.inside():
            assert sorted(os.listdir("/")) == ["proc"]
        with pytest.raises(ZeroDivisionError), names.inside():
            raise ZeroDivisionError
        after = os.stat("/"), os.stat(".")
        assert len(os.listdir("/proc/self/fd")) == len(fds)
        return [(s.st_dev, s.st_ino) for s in before] == [(s.st_dev, s.st_ino) for s in after]

    assert forked(work)


def test_the_longest_name(images: dict[str, Path], directory: Path, tmp_path: Path) -> None:
    """The kernel takes 255 bytes for the source; a longer path is not cut off, but not shown."""
    target = tmp_path / "target"
    target.mkdir()
    longest = "/a" * 127 + "b"

    def work() -> list[str]:
        staged(directory)
        names = Naming(f"{directory}/0")
        return [made(images["erofs"], "erofs", name, names, target) for name in (longest, longest + "c")]

    shown, too_long = forked(work)
    assert shown == longest
    assert too_long.startswith("/proc/self/fd/")


def test_what_the_directory_cannot_hold_has_no_name(
    images: dict[str, Path], directory: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()

    def work() -> str:
        staged(directory)
        (directory / "file").touch()
        names = Naming(f"{directory}/file")
        assert not names.lead("/etc/passwd", 0)
        return made(images["erofs"], "erofs", "/etc/passwd", names, target)

    assert forked(work).startswith("/proc/self/fd/")


def test_mounts_are_attached_for_a_while(directory: Path, tmp_path: Path) -> None:
    """Also those that a worker has left which was killed are detached by the next."""
    tree = build_tree(tmp_path / "tree")

    def work() -> list[object]:
        staged(directory)
        names = Naming(f"{directory}/0")
        before = len(Path("/proc/self/mountinfo").read_text().splitlines())

        def attached() -> int:
            return len(Path("/proc/self/mountinfo").read_text().splitlines()) - before

        with mount_api.clone_mount(str(tree)) as one, mount_api.clone_mount(str(tree)) as other:
            with names.attached([one.fileno(), other.fileno()]) as paths:
                found = [attached(), [(Path(path) / "hello").exists() for path in paths]]
            found.append(attached())
        with mount_api.clone_mount(str(tree)) as one:
            place = names.attached([one.fileno()])
            place.__enter__()
            found.append(attached())
            naming.detach(f"{directory}/0")
            found.append(attached())
        naming.detach(f"{directory}/1")
        return found

    assert forked(work) == [2, [True, True], 0, 1, 0]


def test_a_name_that_comes_again_leads_to_the_other_file(directory: Path) -> None:
    """And where its link is gone, as in no way that is known of, there is no name for once."""

    def work() -> list[object]:
        staged(directory)
        names = Naming(f"{directory}/0")
        link = directory / "0/srv/image"
        found: list[object] = []
        for fd in (3, 3, 4):
            found += [names.lead("/srv/image", fd), os.readlink(link)]
        link.unlink()
        return [*found, names.lead("/srv/image", 5), names.lead("/srv/image", 5), os.readlink(link)]

    three, four, five = (f"/proc/self/fd/{fd}" for fd in (3, 4, 5))
    assert forked(work) == [True, three, True, three, True, four, False, True, five]
