"""Trust by location: only what is root's all the way up counts, and Explain says what Mount does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mountd.errors import BadFileDescriptor
from mountd.fds import OwnedFd
from mountd.kernel.libc import call
from tests.container import USER, as_user, forked, in_container
from tests.daemon import Daemon
from tests.e2e.calls import Outcome, explain, mount_fds, outcome
from tests.e2e.conftest import trusting
from tests.fuse import Fuse

DENIED = "DeniedByPolicy"
BIND = 4096  # MS_BIND


@pytest.fixture
def trusted(place: Path, images: dict[str, Path]) -> Path:
    return images["erofs"].parent


@pytest.fixture
def elsewhere(place: Path) -> Path:
    """A directory that is root's, and that no rule is about."""
    path = place / "elsewhere"
    path.mkdir(mode=0o755)
    yield path
    shutil.rmtree(path)


def copy(images: Mapping[str, Path], path: Path, *, mode: int = 0o644, uid: int = 0) -> Path:
    shutil.copy(images["erofs"], path)
    os.chown(path, uid, uid)
    path.chmod(mode)
    return path


def ask_and_explain(daemon: Daemon, fd: int, **fields: object) -> tuple[Outcome, Outcome]:
    """What Mount says, and what Explain says to the same, as if it had been Mount."""
    source = {"imageFileDescriptor": 0}

    def explained() -> None:
        reply = explain(daemon.socket, source, [fd], **fields)
        found.append(reply["decision"])

    found: list[object] = []
    asked = outcome(lambda: mount_fds(daemon.socket, source, [fd], **fields))
    raised = outcome(explained)
    if raised[0]:
        return asked, raised
    (decision,) = found
    assert isinstance(decision, dict)
    if decision["verdict"] == "allow":
        return asked, ("", "")
    if decision["verdict"] == "ask":
        # Here nobody can be asked (tests/e2e/consent).
        assert "an administrator has to consent" in asked[1], asked
        return asked, asked
    assert decision["verdict"] == "deny"
    return asked, ("denied", str(decision["reason"]))


def agreed(daemon: Daemon, fd: int, **fields: object) -> Outcome:
    """Ask and explain; return the outcome, on which the two have to agree."""
    asked, explained = ask_and_explain(daemon, fd, **fields)
    if explained[0] != "denied":
        assert asked == explained
    else:
        assert asked[0]
        assert explained[1] in asked[1]
    return asked


Place = Callable[[Path, Path, Mapping[str, Path]], Path]


def in_tmp(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    elsewhere.chmod(0o1777)
    return copy(images, elsewhere / "erofs.raw")


def of_a_user(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    return copy(images, trusted / "users.raw", uid=USER)


def in_a_users_directory(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    os.chown(elsewhere, USER, USER)
    return copy(images, elsewhere / "erofs.raw")


def writable_by_its_group(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    return copy(images, trusted / "group.raw", mode=0o664)


def writable_by_all(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    return copy(images, trusted / "all.raw", mode=0o646)


def in_a_directory_of_a_group(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    elsewhere.chmod(0o775)
    return copy(images, elsewhere / "erofs.raw")


def below_a_users_directory(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    os.chown(elsewhere, USER, USER)
    (elsewhere / "roots").mkdir(mode=0o755)
    return copy(images, elsewhere / "roots/erofs.raw")


def in_a_subdirectory(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    (trusted / "sub").mkdir(mode=0o755, exist_ok=True)
    return copy(images, trusted / "sub/erofs.raw")


def hidden(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    return copy(images, trusted / ".part.raw")


def linked_to_from_the_trusted(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    (trusted / "link.raw").symlink_to(copy(images, elsewhere / "erofs.raw"))
    return trusted / "link.raw"


def users_file_linked_into_the_trusted(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    os.link(copy(images, elsewhere / "erofs.raw", uid=USER), trusted / "hard.raw")
    return trusted / "hard.raw"


def trusted_file_linked_out(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    os.link(copy(images, trusted / "out.raw"), elsewhere / "erofs.raw")
    return elsewhere / "erofs.raw"


def behind_a_linked_directory(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    """The kernel tells the path without the link, and that one is trusted."""
    (elsewhere / "link").symlink_to(trusted)
    return copy(images, trusted / "good.raw") and elsewhere / "link/good.raw"


def name_with_a_newline(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    return copy(images, trusted / "two\nlines.raw")


def name_that_says_deleted(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    return copy(images, trusted / "there.raw (deleted)")


def read_only_for_root(trusted: Path, elsewhere: Path, images: Mapping[str, Path]) -> Path:
    return copy(images, trusted / "secret.raw", mode=0o400)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (in_tmp, "elsewhere is writable by everybody"),
        (of_a_user, "seems to lie at"),
        (of_a_user, "users.raw belongs to uid 4000, not to root"),
        (in_a_users_directory, "elsewhere belongs to uid 4000, not to root"),
        (writable_by_its_group, "group.raw is writable by its group"),
        (writable_by_all, "all.raw is writable by everybody"),
        (in_a_directory_of_a_group, "elsewhere is writable by its group"),
        (below_a_users_directory, "elsewhere belongs to uid 4000, not to root"),
        (in_a_subdirectory, "the image does not lie at"),
        (hidden, "the image does not lie at"),
        (linked_to_from_the_trusted, "the image does not lie at"),
        (users_file_linked_into_the_trusted, "hard.raw belongs to uid 4000, not to root"),
        (trusted_file_linked_out, "the image does not lie at"),
        (behind_a_linked_directory, None),
        (name_with_a_newline, None),
        (name_that_says_deleted, None),
        (read_only_for_root, None),
    ],
)
def test_c26_where_it_lies(
    daemon: Daemon,
    images: dict[str, Path],
    trusted: Path,
    elsewhere: Path,
    containers: None,
    where: Place,
    reason: str | None,
) -> None:
    before = set(os.listdir(trusted))
    path = where(trusted, elsewhere, images)
    try:
        with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
            askers = [
                as_user(lambda: steps(daemon, fd.fileno())),
                in_container(lambda: steps(daemon, fd.fileno())),
            ]
            asked = [
                as_user(lambda: agreed(daemon, fd.fileno())),
                in_container(lambda: agreed(daemon, fd.fileno())),
            ]
    finally:
        for name in set(os.listdir(trusted)) - before:
            shutil.rmtree(trusted / name) if (trusted / name).is_dir() else (trusted / name).unlink()
    if reason is None:
        assert asked == [("", "")] * 2
        return
    assert [name for name, _ in asked] == [DENIED] * 2
    assert reason in askers[0], askers[0]
    # Whoever is in a container is not told about the host's directories.
    assert str(elsewhere) not in askers[1]


def steps(daemon: Daemon, fd: int) -> str:
    """Why each rule did not apply, as Explain tells it."""
    reply = explain(daemon.socket, {"imageFileDescriptor": 0}, [fd])
    found = reply["steps"]
    assert isinstance(found, list)
    return " ".join(step["reason"] for step in found)


def test_b27_b28_a_containers_own_view_of_the_trusted_directory(
    daemon: Daemon, images: dict[str, Path], trusted: Path, elsewhere: Path, containers: None
) -> None:
    """The path is the trusted one, or says that it was deleted; the file is the container's."""
    names = ("erofs.raw", "absent.raw", "absent.raw (deleted)", "squashfs.raw")
    for name in names:
        copy(images, elsewhere / name)

    def work() -> list[tuple[str, str, str]]:
        call("mount", bytes(elsewhere), bytes(trusted), None, BIND, None)
        found = []
        for name in names:
            with OwnedFd(os.open(trusted / name, os.O_RDONLY)) as fd:
                link = os.readlink(f"/proc/self/fd/{fd.fileno()}")
                found.append((link, *agreed(daemon, fd.fileno())))
        return found

    for name, (link, error, text) in zip(names, in_container(work), strict=True):
        assert link == str(trusted / name)
        assert error == DENIED
        assert "another file is at its path" in text or "does not exist in the mount namespace" in text


def test_b28_deleted_files_have_no_place(
    daemon: Daemon, images: dict[str, Path], trusted: Path, elsewhere: Path
) -> None:
    """Not even where a file has the name that the kernel then shows."""
    gone = copy(images, trusted / "gone.raw")
    decoy = copy(images, trusted / "gone.raw (deleted)")
    with OwnedFd(os.open(gone, os.O_RDONLY)) as fd:
        gone.unlink()
        assert os.readlink(f"/proc/self/fd/{fd.fileno()}") == str(decoy)
        found = as_user(lambda: agreed(daemon, fd.fileno()))
        decoy.unlink()
        again = as_user(lambda: agreed(daemon, fd.fileno()))
    assert found[0] == again[0] == DENIED
    assert "another file is at its path" in found[1]
    assert "its path does not exist" in again[1]


def test_b26_what_has_no_path(daemon: Daemon, images: dict[str, Path], trusted: Path) -> None:
    with OwnedFd(os.memfd_create(f"{trusted}/erofs.raw")) as memory:
        os.write(memory.fileno(), images["erofs"].read_bytes())
        with OwnedFd(os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY)) as fd:
            assert as_user(lambda: agreed(daemon, fd.fileno()))[0] == DENIED
    with OwnedFd(os.open(trusted, os.O_TMPFILE | os.O_RDWR)) as unnamed:
        os.write(unnamed.fileno(), images["erofs"].read_bytes())
        with OwnedFd(os.open(f"/proc/self/fd/{unnamed.fileno()}", os.O_RDONLY)) as fd:
            assert as_user(lambda: agreed(daemon, fd.fileno()))[0] == DENIED


RULES = """
[[rule]]
name = "one is denied"
image = {{ location = "{0}/ext4.raw" }}
caller = {{ any = true }}
verdict = "deny"

[[rule]]
name = "users have squashfs"
image = {{ location = "{0}/squashfs.raw" }}
caller = {{ users = [4000], user-namespace = "none" }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["squashfs"] }}
verdict = "allow"

[[rule]]
name = "not the squashfs"
image = {{ location = "{0}/xfs.raw" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["squashfs"] }}
verdict = "allow"

[[rule]]
name = "ask for btrfs"
image = {{ location = "{0}/btrfs.raw" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["btrfs"] }}
verdict = "ask"
"""

ROOT = {"first": 0, "target": 0, "count": 1}
WISHES: list[dict[str, object]] = [
    {},
    {"readOnly": False},
    {"readOnly": False, "options": ["ro"]},
    {"fileSystemType": "squashfs"},
    {"options": ["noexec", "nosymfollow"]},
    {"options": ["suid"]},
    {"options": ["acl"]},
    {"options": ["a,b"]},
    {"idMap": {"kind": "caller"}},
    {"idMap": {"kind": "namespace"}},
    {"idMap": {"kind": "ranges", "uidRanges": [ROOT], "gidRanges": [ROOT]}},
    {"idMap": {"kind": "ranges", "uidRanges": [ROOT]}},
    {"imagePolicy": "root=verity"},
]


def test_explain_never_disagrees_with_mount(
    start: Callable[..., Daemon], images: dict[str, Path], trusted: Path, elsewhere: Path, containers: None
) -> None:
    daemon = start(RULES.format(trusted) + trusting(trusted))
    copy(images, elsewhere / "untrusted.raw")
    (elsewhere / "empty.raw").touch()
    paths = [*images.values(), *elsewhere.iterdir(), Path("/dev/null"), elsewhere]

    def everything() -> list[Outcome]:
        return [agreed(daemon, fd, **wishes) for fd in fds for wishes in WISHES]

    fds = [os.open(path, os.O_RDONLY) for path in paths] + [os.open(images["xfs"], os.O_RDWR)]
    try:
        found = [
            as_user(everything),
            as_user(everything, USER + 1),
            in_container(everything),
            forked(everything),
        ]
    finally:
        for fd in fds:
            os.close(fd)
    # The table does reach all of them.
    names = {name for outcomes in found for name, _ in outcomes}
    assert names >= {
        "",
        BadFileDescriptor.__name__,
        *("DeniedByPolicy", "InvalidImage", "InvalidParameter", "NotImmutable"),
        *("OptionNotPermitted", "UnsupportedFileSystem", "UserNamespaceNotPermitted"),
    }


def test_a_servers_file_seen_through_an_overlay(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path
) -> None:
    """It looks like root's there, and as if it lay on no server."""
    at, over, empty = place / "served", place / "over", place / "nothing"
    over.mkdir(mode=0o755)
    empty.mkdir()
    with Fuse(at, images["squashfs"].read_bytes()):
        call("mount", b"overlay", os.fsencode(over), b"overlay", 0, os.fsencode(f"lowerdir={at}:{empty}"))
        try:
            daemon = start(trusting(over))
            assert (over / "image").stat().st_uid == 0
            with OwnedFd(os.open(over / "image", os.O_RDONLY)) as fd:
                name, text = agreed(daemon, fd.fileno())
            assert name == DENIED
            assert f"{over} is on an overlay of which cannot be found out what it lies on" in text
            daemon.stop()
        finally:
            call("umount2", os.fsencode(over), 0)
    over.rmdir()
    empty.rmdir()
