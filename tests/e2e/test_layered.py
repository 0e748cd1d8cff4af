"""Images of several layers by their name in a registry: what they show, for whom, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.client import MountReply
from mountd.errors import InUse
from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from mountd.store.record import Owner
from mountd.store.store import Store
from tests.container import as_user, in_container
from tests.daemon import ROOT, Daemon
from tests.e2e.calls import errno_of, explain, mount, mount_fds, outcome, refused, text_of
from tests.layered import HIDDEN, OPAQUE, REPOSITORY, Image, pulled, rule
from tests.rogue import eventually, settled

LAYERED = 21_400  # the uid of this module's user
OTHERS = "registry.example.com/others"

LOWEST = {"both": "low", "gone": "low", "opaque/old": "low", "merged/low": "low", "kept": "low"}
MIDDLE = {"both": "middle", "gone": HIDDEN, "merged/middle": "middle", "again": "middle"}
TOP = {"both": "top", "opaque": OPAQUE, "opaque/new": "top", "merged/top": "top"}


@pytest.fixture(scope="module")
def one_daemon(place: Path) -> Iterator[tuple[Daemon, Store]]:
    daemon = Daemon(place / "layered", rule("apps/*"))
    yield daemon, Store(daemon.directory / "state")
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


@pytest.fixture
def daemon(one_daemon: tuple[Daemon, Store]) -> Iterator[Daemon]:
    """The daemon; nothing is left of what it made."""
    daemon, _ = one_daemon
    before = settled(daemon)
    yield daemon
    assert eventually(lambda: daemon.held() == before, 10), (before, daemon.held())


@pytest.fixture(scope="module")
def store(one_daemon: tuple[Daemon, Store]) -> Store:
    return one_daemon[1]


@pytest.fixture(scope="module")
def image(store: Store) -> Image:
    return pulled(store, [LOWEST, MIDDLE, TOP])


def names(reply: MountReply, path: str = ".") -> set[str]:
    return set(os.listdir(f"/proc/self/fd/{reply.mount.fileno()}/{path}"))


def asked(daemon: Daemon, image: Image | str, uid: int = LAYERED) -> tuple[str, str]:
    reference = image if isinstance(image, str) else image.reference
    return as_user(lambda: outcome(lambda: mount(daemon.socket, reference)), uid)


def test_layers_come_in_the_order_of_the_manifest(daemon: Daemon, image: Image) -> None:
    def work() -> tuple[object, ...]:
        with (reply := mount(daemon.socket, image.reference)).mount:
            return (
                reply.mounts[0]["fileSystemType"],
                reply.mounts[0]["readOnly"],
                reply.decision["rule"],
                str(reply.decision["digest"]).split(", "),
                [text_of(reply, name) for name in ("both", "kept", "again")],
                "gone" in names(reply),
                names(reply, "opaque"),
                names(reply, "merged"),
            )

    found = as_user(work, LAYERED)
    digests = list(reversed(image.layers))
    files = ["top", "low", "middle"]
    assert found[:7] == ("overlay", True, "pulled", digests, files, False, {"new"})
    assert found[7] == {"low", "middle", "top"}


def test_a_container_gets_its_ids_and_cannot_unlock_it(
    daemon: Daemon, image: Image, containers: None
) -> None:
    def work() -> tuple[object, ...]:
        with (reply := mount(daemon.socket, image.reference)).mount:
            fd = reply.mount.fileno()
            attributes = (MountAttr.NOSUID, MountAttr.NODEV, MountAttr.RDONLY)
            return (
                os.stat("both", dir_fd=fd).st_uid,
                [errno_of(lambda a=a: mount_api.mount_setattr(fd, clear=a)) for a in attributes],  # type: ignore[misc]
                errno_of(lambda: os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd))),
            )

    assert in_container(work) == (0, ["EPERM"] * 3, "EROFS")


def test_one_layer_is_no_stack(daemon: Daemon, store: Store) -> None:
    single = pulled(store, [{"only": "one"}])
    with (reply := mount(daemon.socket, single.reference)).mount:
        assert reply.mounts[0]["fileSystemType"] == "erofs"
        assert text_of(reply, "only") == "one"


def test_a_layer_in_two_images_and_twice_in_one(daemon: Daemon, store: Store, image: Image) -> None:
    """The record of a layer knows one image only; and an overlay has no directory twice."""
    twice = pulled(store, [LOWEST, MIDDLE, LOWEST], "registry.example.com/apps/two")
    assert twice.layers == (image.layers[0], image.layers[1], image.layers[0])
    with (reply := mount(daemon.socket, twice.reference)).mount:
        assert text_of(reply, "both") == "low"
        assert text_of(reply, "again") == "middle"
        assert "gone" in names(reply)
    with (reply := mount(daemon.socket, image.reference)).mount:
        assert text_of(reply, "both") == "top"
    # The same layers all the way down come to one.
    same = pulled(store, [TOP, TOP], "registry.example.com/apps/two")
    with (reply := mount(daemon.socket, same.reference)).mount:
        assert reply.mounts[0]["fileSystemType"] == "erofs"


def test_more_layers_than_a_stack_may_name(daemon: Daemon, store: Store) -> None:
    large = pulled(store, [{"number": str(n), f"file-{n}": ""} for n in range(40)])
    with (reply := mount(daemon.socket, large.reference)).mount:
        assert text_of(reply, "number") == "39"
        assert len(names(reply)) == 41
    # As layers of a stack they count as many as they are.
    many = {"layers": [{"reference": large.reference}] * 5}
    refused(lambda: mount_fds(daemon.socket, many, []), "LimitExceeded", "160")


def test_an_image_as_a_layer_of_a_stack(daemon: Daemon, store: Store, image: Image) -> None:
    above = pulled(store, [{"both": "above"}])
    source = {"layers": [{"reference": above.reference}, {"reference": image.reference}]}
    with (reply := mount_fds(daemon.socket, source, [])).mount:
        assert text_of(reply, "both") == "above"
        assert text_of(reply, "again") == "middle"


def test_images_with_a_common_base(daemon: Daemon, store: Store) -> None:
    """Also to who has the layers shared: an overlay has no directory twice."""
    one = pulled(store, [LOWEST, {"one": "1", "both": "one"}])
    two = pulled(store, [LOWEST, {"two": "2", "both": "two"}], "registry.example.com/apps/two")
    assert one.layers[0] == two.layers[0]
    source = {"layers": [{"reference": one.reference}, {"reference": two.reference}]}

    def work() -> list[str]:
        with (reply := mount_fds(daemon.socket, source, [])).mount:
            return [text_of(reply, name) for name in ("one", "two", "both")]

    for ask in (work, lambda: as_user(work, LAYERED)):
        assert ask() == ["1", "2", "one"]
    same = {"layers": [{"reference": one.reference}] * 2}
    with (reply := mount_fds(daemon.socket, same, [])).mount:
        assert text_of(reply, "both") == "one"


def test_each_layer_is_judged_as_of_this_image(daemon: Daemon, store: Store, image: Image) -> None:
    """The same bytes are trusted under the name that a rule has, and under no other."""
    same = pulled(store, [LOWEST, MIDDLE, TOP], OTHERS)
    assert same.layers == image.layers
    name, text = asked(daemon, same)
    assert name == "DeniedByPolicy"
    assert "source.layers[0]" in text
    assert asked(daemon, image) == ("", "")
    unsigned = pulled(store, [LOWEST, {"unsigned": ""}], requirement="insecureAcceptAnything")
    assert asked(daemon, unsigned)[0] == "DeniedByPolicy"


def test_a_layer_alone_is_nobodys(daemon: Daemon, image: Image) -> None:
    for each in image.layers:
        name, text = asked(daemon, f"stored:{each}")
        assert name == "NotSupported", text
        assert "layers of an image" in text


def test_what_was_not_pulled_or_is_not_whole(daemon: Daemon, store: Store) -> None:
    absent = f"oci:{REPOSITORY}@sha256:{'0' * 64}"
    assert asked(daemon, absent)[0] == "NotFound"
    broken = pulled(store, [{"broken": "1"}, {"broken": "2"}])
    # Not the same manifest elsewhere.
    assert asked(daemon, broken.reference.replace("/one@", "/three@"))[0] == "NotFound"
    files = lambda: len(list((daemon.directory / "state/pulled/sha256").iterdir()))  # noqa: E731
    before = files()
    store.remove(broken.layers[0], 0)
    assert files() == before - 1
    name, text = asked(daemon, broken)
    assert name == "NotFound"
    assert broken.reference in text
    # Bytes that a user has brought do not stand in for those that were pulled.
    of_user = pulled(store, [{"theirs": "1"}, {"theirs": "2"}], owner=Owner(LAYERED, LAYERED))
    assert asked(daemon, of_user)[0] == "NotFound"


def test_a_mounted_layer_is_not_removed(daemon: Daemon, store: Store) -> None:
    used = pulled(store, [{"used": "1"}, {"used": "2"}])
    with mount(daemon.socket, used.reference).mount:
        for each in used.layers:
            with pytest.raises(InUse):
                store.remove(each, 0)


def test_wishes_are_those_of_a_stack(daemon: Daemon, image: Image) -> None:
    source = {"reference": image.reference}
    refused(lambda: mount_fds(daemon.socket, source, [], readOnly=False), "NotSupported", "to write to")
    refused(lambda: mount_fds(daemon.socket, source, [], fileSystemType="erofs"), "InvalidParameter")
    with mount_fds(daemon.socket, source, [], fileSystemType="overlay").mount:
        pass


def test_explain_says_it_of_each_layer(daemon: Daemon, image: Image) -> None:
    told = explain(daemon.socket, {"reference": image.reference}, [])
    assert told["decision"]["verdict"] == "allow"  # type: ignore[index]
    facts = told["facts"]
    assert isinstance(facts, dict)
    assert facts["layers"] == "3"
    assert facts["layers[2]: pulled from"] == image.reference.removeprefix("oci:")


def test_from_the_command_line_and_in_the_list(daemon: Daemon, image: Image) -> None:
    directory = Path(tempfile.mkdtemp(prefix="layered-", dir="/var/lib"))
    environment = {**os.environ, "MOUNTD_SOCKET": str(daemon.socket)}
    command = [sys.executable, "-m", "mountd.cli.mountctl"]

    def mountctl(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        mountctl("mount", image.reference, str(directory))
        try:
            assert (directory / "both").read_text() == "top"
            (listed,) = json.loads(mountctl("list", "--json"))["mounts"]
            assert listed["source"] == image.reference
        finally:
            subprocess.run(["umount", directory], check=True)
    finally:
        directory.rmdir()


@pytest.mark.parametrize("damage", [b"{}", b"", b'{"version": 1}'])
def test_a_damaged_list_is_none(start: Callable[..., Daemon], damage: bytes) -> None:
    daemon = start(rule())
    store = Store(daemon.directory / "state")
    image = pulled(store, [{"a": "1"}, {"a": "2"}])
    (path,) = (daemon.directory / "state/pulled/sha256").iterdir()
    path.chmod(0o600)
    path.write_bytes(damage)
    path.chmod(0o400)
    assert asked(daemon, image)[0] == "NotFound"
    shutil.copy(path, path.with_name("0" * 64 + ".json"))
    store.collect_garbage()
    assert list(path.parent.iterdir()) == []
