"""Attach and Detach of disk images with several partitions: a tree of mounts, which is one thing."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.asking import attach_reply
from mountd.client import Client, Request
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, moving, namespaces
from mountd.kernel.flags import Clone, MountAttr, Propagation, Unmount
from mountd.kernel.mount_info import listmount, statmount
from mountd.kernel.numbers import NUMBERS
from tests.container import as_user, forked
from tests.daemon import Daemon
from tests.disks import Part, build_disk
from tests.e2e.attaching import DIRECTORY, User, asked, detached, granting, id_at, records, user_of
from tests.e2e.calls import errno_of, mount
from tests.e2e.conftest import trusting
from tests.e2e.test_sources import loops_over
from tests.e2e.trees import PLACES, TYPES, build_contents, build_tree_disk, ids_at, seen
from tests.images import build_image
from tests.rights import drop_others
from tests.rogue import eventually
from tests.seccomp import lose

TINA, TOBY = 4260, 4261
MOST = 300  # mounts of a namespace: more than are in any that mountd itself has
QUEUED = """
import os, socket, sys
one, other = socket.socketpair()
fd = os.open(sys.argv[1], os.O_RDONLY)
socket.send_fds(one, [b"x"], [fd])
os.close(fd)
print(flush=True)
sys.stdin.read()
"""
Scene = tuple[Daemon, Path]
WHOLE = {name: name for name in PLACES}
WANTED = MountAttr.NOSUID | MountAttr.NODEV | MountAttr.RDONLY


@pytest.fixture(scope="module")
def contents(place: Path, images: dict[str, Path]) -> dict[str, Path]:
    """File systems for partitions, each with a file that names it."""
    return build_contents(place / "parts-of-trees")


@pytest.fixture(scope="module")
def disk(place: Path, contents: dict[str, Path]) -> Path:
    """An image with a partition of each kind, in an order that is not the one of attaching."""
    return build_tree_disk(place / "trusted/tree.raw", contents)


@pytest.fixture(scope="module")
def rooted(place: Path, contents: dict[str, Path]) -> Callable[..., Path]:
    """An image whose root is the directory that the function given fills, with a /home and a /var."""

    def build(name: str, fill: Callable[[Path], object], *more: Part) -> Path:
        work = place / f"rooted-{name}"
        work.mkdir()
        fill(work)
        work.chmod(0o755)
        root = build_image("erofs", work, place / f"rooted-{name}.img")
        parts = [Part("root", root), Part("home", contents["home"]), Part("var", contents["var"]), *more]
        return build_disk(place / f"trusted/rooted-{name}.raw", parts)

    return build


@pytest.fixture(scope="module")
def scene(place: Path, images: dict[str, Path]) -> Iterator[Scene]:
    def policy(grant: str) -> str:
        return trusting(place / "trusted", attach=grant, access='"read-write"', max_mounts="14")

    with granting(place, "trees", policy) as made:
        yield made


@pytest.fixture
def tina(scene: Scene) -> Iterator[User]:
    """A user, of whom nothing is left at the end."""
    before = listmount()
    user = user_of(*scene, TINA)
    yield user
    assert listmount() == before
    assert records(user.daemon) == []


def ask(user: User, image: Path, target: Path, **wishes: object) -> dict[str, object]:
    """The whole reply of Attach."""

    def work() -> dict[str, object]:
        fd = OwnedFd(os.open(target, DIRECTORY))
        with Client(str(user.daemon.socket)) as client, Request(str(image), **wishes) as request:  # type: ignore[arg-type]
            request.add_target(fd)
            return client.attach(request.source, request.fds, **request.parameters)

    return as_user(work, user.uid)


def list_of(user: User) -> dict[int, list[str]]:
    """Where each mount of the user's is attached, by id."""

    def work() -> object:
        with Client(str(user.daemon.socket)) as client:
            return client.call("List", {}, [])[0]["mounts"]

    return {each["id"]: [at["mountPoint"] for at in each["attached"]] for each in as_user(work, user.uid)}  # type: ignore[attr-defined]


def test_all_of_it_there_and_back(tina: User, disk: Path) -> None:
    target = tina.directory("all")
    reply = ask(tina, disk, target)
    assert seen(target) == WHOLE
    ids = ids_at(target)
    assert len(set(ids.values())) == len(PLACES)
    assert reply["id"] == ids["root"]
    assert reply["mounts"] == [
        {
            "designator": name,
            **({"mountPoint": place} if place else {}),
            "fileSystemType": TYPES[name],
            "readOnly": True,
            "id": ids[name],
        }
        for name, place in PLACES.items()
    ]
    assert "leftOut" not in reply
    around = statmount(id_at(tina.own)).propagation & Propagation.SHARED
    for name, id in ids.items():
        found = statmount(id)
        assert found.attributes & WANTED == WANTED
        assert found.propagation == (name in ("root", "var") and around or Propagation.PRIVATE)
    assert records(tina.daemon) == sorted(map(str, ids.values()))
    assert list_of(tina) == {ids[name]: [str(target / place)] for name, place in PLACES.items()}
    assert tina.detach(ids["root"]) == ("", "", ids["root"])
    assert os.listdir(target) == []
    assert list_of(tina) == {}
    assert eventually(lambda: not loops_over(disk), 5)


def test_every_flag_is_locked(tina: User, disk: Path) -> None:
    """Who copies the mount namespace into one of its own takes none off, and uncovers nothing."""
    target = tina.directory("locked")

    def work() -> list[str]:
        namespaces.unshare(Clone.NEWUSER | Clone.NEWNS)
        found = []
        for place in PLACES.values():
            with OwnedFd(os.open(target / place, os.O_PATH)) as fd:
                for flag in (MountAttr.RDONLY, MountAttr.NOSUID, MountAttr.NODEV):
                    found.append(errno_of(lambda: mount_api.mount_setattr(fd.fileno(), clear=flag)))  # noqa: B023
        return [*found, errno_of(lambda: mount_api.umount(str(target / "usr")))]

    with tina.attached(disk, target):
        assert as_user(work, TINA) == [*["EPERM"] * 18, "EINVAL"]


def test_by_its_directory_lazily_and_by_root(tina: User, disk: Path) -> None:
    target = tina.directory("ways")

    def by_target() -> object:
        with Client(str(tina.daemon.socket)) as client, OwnedFd(os.open(target, os.O_PATH)) as fd:
            parameters = {"targetFileDescriptor": 0, "lazy": True}
            return client.call("Detach", parameters, [fd])[0]

    with tina.attached(disk, target):
        # It keeps the mount busy itself, so that it has to be lazy.
        assert as_user(by_target, TINA) == {}
        assert records(tina.daemon) == []
    with tina.attached(disk, target) as id:
        assert detached(tina.daemon.socket, id) == ("", "", id)
        assert os.listdir(target) == []


def test_what_is_in_use_stays_wholly(tina: User, disk: Path) -> None:
    """Wherever it is used, and however often it is tried: the marks of one time mean nothing the next."""
    target = tina.directory("busy")
    with tina.attached(disk, target) as id:
        for place in PLACES.values():
            with OwnedFd(os.open(target / place / "name", os.O_RDONLY)):
                for _ in range(3):
                    name, text, _ = tina.detach(id)
                    assert (name, text) == ("InUse", "the mount is in use"), place
                    assert seen(target) == WHOLE
        # The working directory of somebody, and a mount of somebody else's.
        with subprocess.Popen(["sleep", "60"], cwd=target / "var") as sleeping:
            assert tina.detach(id)[0] == "InUse"
            sleeping.kill()
        with mount_api.clone_mount("/proc") as other:
            mount_api.move_mount(other.fileno(), str(target / "var/tmp"))
        try:
            assert tina.detach(id)[0] == "InUse"
        finally:
            mount_api.umount(str(target / "var/tmp"))
        assert seen(target) == WHOLE
        with OwnedFd(os.open(target / "var/name", os.O_RDONLY)) as held:
            assert tina.detach(id, lazy=True) == ("", "", id)
            assert os.listdir(target) == []
            assert os.read(held.fileno(), 3) == b"var"
    assert eventually(lambda: not loops_over(disk), 5)


@contextlib.contextmanager
def on_its_way(path: Path) -> Iterator[None]:
    """Somebody has `path` open where no process shows it: in the queue of a socket."""
    with subprocess.Popen(
        [sys.executable, "-c", QUEUED, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield
        process.kill()


def test_what_no_process_shows_keeps_the_mount_that_has_it(tina: User, disk: Path) -> None:
    """The kernel has the last word: before anything is done about a mount with none below it, else then."""
    target = tina.directory("unseen")
    with tina.attached(disk, target) as id:
        for place in ("usr", "var/tmp"):
            with on_its_way(target / place / "name"):
                for _ in range(2):
                    assert tina.detach(id)[:2] == ("InUse", "the mount is in use")
                    assert seen(target) == WHOLE
        with on_its_way(target / "name"):
            name, text, _ = tina.detach(id)
            assert (name, "what was mounted below it is detached" in text) == ("InUse", True)
            assert id_at(target) == id
            assert seen(target) == {"root": "root"}
            assert records(tina.daemon) == [str(id)]
            assert list(list_of(tina)) == [id]
        assert eventually(lambda: tina.detach(id) == ("", "", id), 5)


def test_one_that_is_not_the_first(tina: User, scene: Scene, disk: Path) -> None:
    """It is the user's to detach, with what is below it; nobody else's."""
    target = tina.directory("one")
    toby = user_of(*scene, TOBY)
    with tina.attached(disk, target) as id:
        ids = ids_at(target)
        for each in ids.values():
            assert toby.detach(each)[0] == "NotFound"
        assert tina.detach(ids["var"]) == ("", "", ids["var"])
        assert tina.detach(ids["tmp"])[0] == "NotFound"
        assert tina.detach(ids["home"]) == ("", "", ids["home"])
        assert records(tina.daemon) == sorted(str(ids[each]) for each in ("root", "usr", "srv"))
        assert id_at(target / "var") == id
        assert tina.detach(id) == ("", "", id)


def test_each_counts(tina: User, disk: Path) -> None:
    """A rule grants 14 mounts: two images of six are attached, and no third."""
    targets = [tina.directory(f"count-{number}") for number in range(3)]
    with tina.attached(disk, targets[0]), tina.attached(disk, targets[1]):
        name, text, _ = tina.attach(disk, targets[2])
        assert (name, "at most 14" in text) == ("LimitExceeded", True)
        assert os.listdir(targets[2]) == []
        assert len(records(tina.daemon)) == 12
    with tina.attached(disk, targets[2]):
        assert seen(targets[2])["tmp"] == "tmp"


def links(**to: str) -> Callable[[Path], object]:
    """Make /home and /var, each either a directory ("") or a link."""

    def fill(root: Path) -> None:
        (root / "name").write_text("root")
        for name in ("real", "etc"):
            (root / name).mkdir()
        for name, target in ({"home": "", "var": ""} | to).items():
            if target == "-":
                continue
            (root / name).symlink_to(target) if target else (root / name).mkdir()

    return fill


@pytest.mark.parametrize(
    ("home", "error", "text"),
    [
        ("-", "NotFound", "the directory home of the image"),
        ("nowhere", "NotFound", "the directory home of the image"),
        ("name", "NotFound", "the directory home of the image"),
        ("home", "NotFound", "the directory home of the image"),
        ("/", "InvalidImage", "leads to where another one is"),
        ("../../../..", "InvalidImage", "leads to where another one is"),
        ("{place}", "NotFound", "the directory home of the image"),
        ("../../{place}", "NotFound", "the directory home of the image"),
        ("/proc/self/root", "NotFound", "the directory home of the image"),
    ],
    ids=["missing", "dangling", "file", "loop", "root", "up", "absolute", "relative", "magic"],
)
def test_hostile_links(
    tina: User,
    place: Path,
    rooted: Callable[..., Path],
    request: pytest.FixtureRequest,
    home: str,
    error: str,
    text: str,
) -> None:
    name = request.node.callspec.id
    outside = tina.directory(f"outside-{name}")
    image = rooted(name, links(home=home.format(place=outside)))
    target = tina.directory(f"link-{name}")
    found = tina.attach(image, target)
    assert (found[0], text in found[1]) == (error, True), found
    assert os.listdir(target) == os.listdir(outside) == []
    assert eventually(lambda: not loops_over(image), 5)


def test_links_stay_in_the_image(tina: User, rooted: Callable[..., Path]) -> None:
    """/home leads to /etc, and /var to /../real: both are the image's own."""
    image = rooted("inside", links(home="/etc", var="../../real"))
    target = tina.directory("inside")
    with tina.attached(image, target) as id:
        assert (target / "etc/name").read_text() == "home"
        assert (target / "real/name").read_text() == "var"
        assert not Path("/etc/name").exists()
        assert tina.detach(id) == ("", "", id)


def test_two_of_them_in_one_place_are_refused(tina: User, rooted: Callable[..., Path]) -> None:
    image = rooted("same", links(home="real", var="real"))
    target = tina.directory("same")
    assert tina.attach(image, target)[0] == "InvalidImage"
    assert os.listdir(target) == []


def test_directories_that_nobody_may_enter(
    place: Path, rooted: Callable[..., Path], start: Callable[..., Daemon]
) -> None:
    """Modes of an image keep what is mounted in it neither from being attached nor from going.

    Also where the daemon has no more capabilities than by its unit.
    """

    def fill(root: Path) -> None:
        links(home="deep/home")(root)
        (root / "deep/home").mkdir(parents=True)
        (root / "deep").chmod(0)
        os.chown(root / "deep", 1, 1)

    image = rooted("closed", fill)
    grounds = place / "trees-bounded"
    grounds.mkdir(mode=0o755)
    policy = trusting(place / "trusted", attach=f'["{grounds}/$UID/**"]')
    user = user_of(start(policy, preexec_fn=drop_others), grounds, TINA)
    target = user.directory("closed")
    with user.attached(image, target) as id:
        assert (target / "home/name").read_text() == "home"  # root may
        assert as_user(lambda: errno_of(lambda: os.stat(target / "home/name")), TINA) == "EACCES"
        home = id_at(target / "home")
        with Client(str(user.daemon.socket)) as client:
            said = client.call("io.mountd.Admin.Revoke", {"id": home}, [])[0]
        assert [each["id"] for each in said["detached"]] == [home]  # type: ignore[attr-defined]
        assert id_at(target / "home") == id
    with user.attached(image, target) as id:
        assert user.detach(id) == ("", "", id)
    assert records(user.daemon) == []


def test_what_is_for_firmware_may_be_left_out(tina: User, contents: dict[str, Path], place: Path) -> None:
    parts = [
        Part("root", contents["root"]),
        Part("xbootldr", contents["srv"]),
        Part("home", contents["home"]),
    ]
    image = build_disk(place / "trusted/firmware.raw", parts)
    target = tina.directory("firmware")
    reply = ask(tina, image, target)
    try:
        assert reply["leftOut"] == ["boot"]
        assert [each["designator"] for each in reply["mounts"]] == ["root", "home"]  # type: ignore[attr-defined]
        assert sorted(records(tina.daemon)) == sorted(str(each["id"]) for each in reply["mounts"])  # type: ignore[attr-defined]
        assert eventually(lambda: len(list_of(tina)) == 2, 10)
    finally:
        assert tina.detach(int(str(reply["id"])))[0] == ""


def test_two_for_firmware_and_one_directory(
    tina: User, contents: dict[str, Path], rooted: Callable[..., Path]
) -> None:
    """The ESP makes do with /boot, but not where a partition is for that: by mountd, and by root itself."""

    def fill(root: Path) -> None:
        links()(root)
        (root / "boot").mkdir()

    both = [Part("esp", contents["srv"]), Part("xbootldr", contents["usr"])]
    for name, parts, left_out, boot in (("both", both, ["efi"], "usr"), ("esp", both[:1], [], "srv")):
        image = rooted(f"boot-{name}", fill, *parts)
        target = tina.directory(f"boot-{name}")
        reply = ask(tina, image, target)
        try:
            assert (reply.get("leftOut", []), (target / "boot/name").read_text()) == (left_out, boot)
        finally:
            assert tina.detach(int(str(reply["id"])))[0] == ""
        with mount(tina.daemon.socket, image) as made, OwnedFd(os.open(target, DIRECTORY)) as fd:
            try:
                assert attach_reply(made, fd.fileno(), str(target)) == left_out
                assert (target / "boot/name").read_text() == boot
            finally:
                mount_api.umount(str(target), Unmount.DETACH)


def test_without_a_root(tina: User, contents: dict[str, Path], place: Path) -> None:
    image = build_disk(
        place / "trusted/usr.raw", [Part("usr", contents["usr"]), Part("home", contents["home"])]
    )
    target = tina.directory("rootless")
    name, text, _ = tina.attach(image, target)
    assert (name, "none of which is the root" in text) == ("NotSupported", True)
    with tina.attached(image, target, image_policy="usr=open:home=unused"):
        assert (target / "name").read_text() == "usr"


def test_one_of_them_made_before(tina: User, disk: Path) -> None:
    """With mountFileDescriptor it is that one mount, and no tree."""
    target = tina.directory("before")

    def work() -> object:
        with mount(tina.daemon.socket, disk) as made, Client(str(tina.daemon.socket)) as client:
            fds = [OwnedFd(os.dup(made.fds[1])), OwnedFd(os.open(target, DIRECTORY))]
            parameters = {"mountFileDescriptor": 0, "targetFileDescriptor": 1}
            reply = client.call("Attach", parameters, fds)[0]
            for fd in fds:
                fd.close()
            return reply["id"], made.mounts[1]["id"], sorted(reply)

    id, made, fields = as_user(work, TINA)  # type: ignore[misc]
    try:
        assert (id, fields) == (made, ["decision", "id"])
        assert (target / "name").read_text() == "usr"
        assert records(tina.daemon) == [str(id)]
    finally:
        assert eventually(lambda: tina.detach(id)[0] == "", 5)


def in_a_place_of_its_own(work: Callable[[], object]) -> object:
    """Do `work` where everything that is mounted is shared, and with nobody else."""

    def enter() -> object:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        mount_api.set_propagation("/", Propagation.SHARED, recursive=True)
        return work()

    return forked(enter)


@contextlib.contextmanager
def follower(*options: str) -> Iterator[Callable[[Path], list[str]]]:
    """Another mount namespace that gets what is mounted here; yields what is seen there below a path."""
    command = ["unshare", "--mount", "--propagation", "slave", *options, "sh", "-c", "echo; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()

        def below(path: Path) -> list[str]:
            lines = Path(f"/proc/{process.pid}/mountinfo").read_text().splitlines()
            return sorted(line.split()[4] for line in lines if line.split()[4].startswith(str(path)))

        yield below
        process.kill()


def test_copies_elsewhere_go_with_it(tina: User, disk: Path) -> None:
    """Other mount namespaces, of root and of others, get a copy of it and keep none."""
    target = tina.directory("elsewhere")
    places = sorted(str(target / place) for place in PLACES.values())

    def work() -> list[object]:
        said: list[object] = []
        with follower() as ours, follower("--map-root-user") as theirs:
            for lazy in (False, True):
                name, _, id = as_user(lambda: attach(tina, disk, target), TINA)
                said += [name, ours(target) == places, theirs(target) == places]
                ids = ids_at(target)
                said.append(
                    [name for name, id in ids.items() if statmount(id).propagation != Propagation.PRIVATE]
                )
                said.append(as_user(lambda: detached(tina.daemon.socket, id, lazy=lazy), TINA)[0])  # noqa: B023
                said += [ours(target), theirs(target)]
        return said

    once = ["", True, True, ["root", "var"], "", [], []]
    assert in_a_place_of_its_own(work) == [*once, *once]


def attach(user: User, image: Path, target: Path) -> tuple[str, str, int]:
    """Attach, by whoever this is."""
    with OwnedFd(os.open(target, DIRECTORY)) as fd:
        return asked(user.daemon.socket, image, fd.fileno())


def test_as_many_as_the_kernel_lets_a_namespace_have(tina: User, disk: Path) -> None:
    """Where there is room for some of it, none of it is attached."""
    target = tina.directory("full")
    maximum = Path("/proc/sys/fs/mount-max")
    before = maximum.read_text()

    def work() -> list[object]:
        while len(listmount()) < MOST:
            with mount_api.clone_mount("/tmp") as one:
                mount_api.move_mount(one.fileno(), "/tmp")
        said: list[object] = []
        for room in (len(PLACES) - 1, len(PLACES)):
            maximum.write_text(str(len(listmount()) + 1 + room))  # the first one of all is not listed
            name, text, id = as_user(lambda: attach(tina, disk, target), TINA)
            said += [name, "ENOSPC" in text, len(seen(target)), len(records(tina.daemon))]
        return [*said, as_user(lambda: detached(tina.daemon.socket, id), TINA)[0]]

    try:
        found = in_a_place_of_its_own(work)
    finally:
        maximum.write_text(before)
    assert found == ["MountFailed", True, 0, 0, "", False, len(PLACES), len(PLACES), ""]


def test_it_is_revoked_as_a_whole(tina: User, disk: Path) -> None:
    """By its user all of it is, and each mount is told of; by the id of the first, nothing stays either."""
    target = tina.directory("revoked")
    for by in ("uid", "id"):
        with tina.attached(disk, target) as id, Client(str(tina.daemon.socket)) as client:
            ids = set(ids_at(target).values())
            said = client.call("io.mountd.Admin.Revoke", {by: TINA if by == "uid" else id}, [])[0]
            assert said["held"] == []
            found = {each["id"] for each in said["detached"]}  # type: ignore[attr-defined]
            assert found == (ids if by == "uid" else {id})
            assert os.listdir(target) == []
            assert list_of(tina) == {}
            tina.detach(id)
            for name in records(tina.daemon):
                assert tina.detach(int(name))[0] == "NotFound"


def test_a_kernel_that_puts_no_trees_together(place: Path, disk: Path, start: Callable[..., Daemon]) -> None:
    """Before Linux 6.15, nothing is attached to what is attached nowhere; the error says what to do."""
    grounds = place / "trees-old"
    grounds.mkdir(mode=0o755)

    def refuse() -> None:
        lose(NUMBERS["move_mount"], errno.EINVAL, (4, moving.ATTACH))

    daemon = start(trusting(place / "trusted", attach=f'["{grounds}/$UID/**"]'), preexec_fn=refuse)
    user = user_of(daemon, grounds, TINA)
    target = user.directory("old")
    name, text, _ = user.attach(disk, target)
    assert (name, "several partitions for a caller (Linux 6.15)" in text) == ("NotSupported", True)
    assert os.listdir(target) == records(daemon) == []
    assert list_of(user) == {}
    assert eventually(lambda: not loops_over(disk), 5)
