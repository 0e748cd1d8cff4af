"""Where the partitions of an attached disk image go, and which are left out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.asking import attach_reply
from mountd.client import Client
from mountd.fds import OwnedFd
from mountd.kernel import mount_api
from mountd.kernel.flags import Unmount
from tests.container import as_user
from tests.daemon import Daemon
from tests.disks import Part, build_disk
from tests.e2e.attach_trees.asking import TINA, ask, list_of
from tests.e2e.attaching import DIRECTORY, User, id_at, records, user_of
from tests.e2e.calls import errno_of, mount
from tests.e2e.conftest import trusting
from tests.e2e.test_sources import loops_over
from tests.rights import drop_others
from tests.rogue import eventually


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
