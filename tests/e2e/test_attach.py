"""Attach and Detach for users who may not attach a mount themselves (THREATS.md, C 50 to 53)."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.errors import MountdError
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces, sockets
from mountd.kernel.flags import Clone, MountAttr, Propagation
from mountd.kernel.mount_info import statmount
from mountd.wire.framing import encode
from tests.container import as_user, forked, in_container
from tests.daemon import Daemon
from tests.e2e.attaching import Answer, User, asked, detached, granting, id_at, records, user_of
from tests.e2e.conftest import TMPFS_RULE, trusting
from tests.rogue import eventually

ALICE, BOB, CAROL = 4210, 4211, 4212
TEAM = 4219
BY_ITSELF = ("AttachNotPermitted", "attaching not permitted: the caller can attach a mount by itself")
Scene = tuple[Daemon, Path]


@pytest.fixture(scope="module")
def scene(place: Path, images: dict[str, Path]) -> Iterator[Scene]:
    def policy(grant: str) -> str:
        tmpfs = TMPFS_RULE.replace("max-size", f"attach = {grant}, max-mounts = 2, max-size")
        return trusting(place / "trusted", attach=grant, access='"read-write"') + tmpfs

    with granting(place, "attach", policy) as made:
        yield made


@pytest.fixture
def alice(scene: Scene) -> User:
    return user_of(*scene, ALICE)


@pytest.fixture
def bob(scene: Scene) -> User:
    return user_of(*scene, BOB)


@pytest.mark.parametrize("type", ["erofs", "squashfs", "ext4"])
def test_there_and_back(alice: User, images: dict[str, Path], type: str) -> None:
    target = alice.directory(f"there-{type}")
    name, text, id = alice.attach(images[type], target)
    assert (name, text) == ("", "")
    try:
        assert (target / "hello").read_text() == "hello from the image\n"
        assert id_at(target) == id
        found = statmount(id)
        wanted = MountAttr.NOSUID | MountAttr.NODEV | MountAttr.RDONLY
        assert found.attributes & wanted == wanted
        assert found.propagation == Propagation.PRIVATE
        assert records(alice.daemon) == [str(id)]
    finally:
        assert alice.detach(id) == ("", "", id)
    assert not (target / "hello").exists()
    assert records(alice.daemon) == []
    assert alice.detach(id)[0] == "NotFound"


def test_an_image_with_a_top_to_write_to(alice: User, images: dict[str, Path]) -> None:
    """What is attached is the stack; what the user wrote into it goes with it."""
    target = alice.directory("topped", 0o755)
    with alice.attached(images["erofs"], target, top="tmpfs:1M", idmap="caller") as id:
        assert id_at(target) == id
        as_user(lambda: (target / "hello").write_text("mine"), ALICE)
        assert (target / "hello").read_text() == "mine"
        wanted = MountAttr.NOSUID | MountAttr.NODEV
        assert statmount(id).attributes & (wanted | MountAttr.RDONLY) == wanted
        assert alice.detach(id) == ("", "", id)
    with alice.attached(images["erofs"], target):
        assert (target / "hello").read_text() == "hello from the image\n"
    assert records(alice.daemon) == []


def test_a_tmpfs_that_can_be_written_to(alice: User) -> None:
    target = alice.directory("memory")
    wishes = {"read_only": False, "idmap": "caller"}
    with alice.attached("tmpfs:64K", target, **wishes):
        as_user(lambda: (target / "new").write_text("mine"), ALICE)
        assert (target / "new").stat().st_uid == ALICE
    assert os.listdir(target) == []


def test_only_its_user_detaches(alice: User, bob: User, images: dict[str, Path]) -> None:
    """Not another user, nor a uid 0 without capabilities; the host's root may."""
    with alice.attached(images["erofs"], alice.directory("hers")) as id:
        name, text, _ = bob.detach(id)
        assert (name, str(id) in text) == ("NotFound", True)
        with pytest.raises(MountdError, match="not found"), Client(str(bob.daemon.socket)) as client:
            client.detach(id + 1)
        assert id_at(alice.own / "hers") == id
        assert detached(alice.daemon.socket, id) == ("", "", id)
        assert id_at(alice.own / "hers") != id


def test_root_detaches_where_only_a_group_may_enter(scene: Scene, images: dict[str, Path]) -> None:
    """Which the user is in, and root is not; nor does mountd have its capabilities for files in effect."""
    alice = replace(user_of(*scene, ALICE), groups=(TEAM,))
    above = alice.directory("of-a-team", 0o750)
    target = alice.directory("of-a-team/target")
    os.chown(above, 0, TEAM)
    with alice.attached(images["erofs"], target) as id:
        assert alice.attach(images["erofs"], target)[0] == "AttachNotPermitted"
        assert detached(alice.daemon.socket, id) == ("", "", id)
        assert records(alice.daemon) == []
        assert id_at(target) != id


def test_the_same_user_in_a_container_is_in_another_mount_namespace(
    alice: User, images: dict[str, Path]
) -> None:
    """The mount is there as well, as a locked copy: with another id, which nobody has attached."""
    target = alice.directory("copied")

    def work() -> tuple[Answer, Answer]:
        namespaces.unshare(Clone.NEWUSER | Clone.NEWNS)
        return detached(socket, id), detached(socket, id_at(target))

    socket = alice.daemon.socket
    with alice.attached(images["erofs"], target) as id:
        by_id, by_copy = as_user(work, ALICE)
        assert (by_id[0], "in your mount namespace" in by_id[1]) == ("NotFound", True)
        assert by_copy[0] == "NotFound"
        assert id_at(target) == id


def test_what_is_in_use_stays_until_it_is_not(alice: User, images: dict[str, Path]) -> None:
    target = alice.directory("busy")
    with alice.attached(images["squashfs"], target) as id:
        with OwnedFd(os.open(target / "hello", os.O_RDONLY)) as held:
            name, text, _ = alice.detach(id)
            assert (name, text) == ("InUse", "the mount is in use")
            assert id_at(target) == id
            assert alice.detach(id, lazy=True) == ("", "", id)
            assert id_at(target) != id
            assert os.read(held.fileno(), 5) == b"hello"
        assert records(alice.daemon) == []


def test_detach_by_a_descriptor(alice: User, images: dict[str, Path]) -> None:
    """It counts as a use only for as long as its sender has it, too."""
    target = alice.directory("by-descriptor")

    def ask(path: Path, close: bool) -> str:
        fd = OwnedFd(os.open(path, os.O_PATH))
        with fd, Client(str(alice.daemon.socket)) as client:
            message = {"method": "io.mountd.Mount.Detach", "parameters": {"targetFileDescriptor": 0}}
            sockets.send(client._socket, encode(message), [fd], time.monotonic() + 5)
            if close:
                fd.close()
            return str(client._receive(time.monotonic() + 5).body.get("error", ""))

    with alice.attached(images["erofs"], target):
        assert as_user(lambda: ask(target / "bin", True), ALICE).endswith("BadFileDescriptor")
        assert as_user(lambda: ask(target, False), ALICE).endswith("InUse")
        # What was refused is closed after its reply.
        assert eventually(lambda: as_user(lambda: ask(target, True), ALICE) == "", 5)
        assert as_user(lambda: ask(alice.own, True), ALICE).endswith("BadFileDescriptor")
        assert records(alice.daemon) == []


def test_what_moves_is_found_by_its_id(alice: User, bob: User, images: dict[str, Path]) -> None:
    """A directory above it has another name, and the old one leads to what is not to be detached."""
    above = alice.directory("before")
    target = alice.directory("before/target")
    id = alice.attach(images["erofs"], target)[2]
    os.rename(above, alice.own / "after")
    alice.directory("before")
    other = alice.directory("before/target")
    with alice.attached(images["squashfs"], other) as second:
        assert alice.detach(id) == ("", "", id)
        assert id_at(other) == second
    assert os.listdir(alice.own / "after/target") == []


def test_what_is_covered_is_not_detached(alice: User, images: dict[str, Path]) -> None:
    target = alice.directory("covered")
    with alice.attached(images["erofs"], target) as id:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", target], check=True)
        try:
            name, text, _ = alice.detach(id)
            assert (name, text) == ("InUse", "something else is mounted over the mount")
        finally:
            subprocess.run(["umount", target], check=True)


def test_records_never_lie(alice: User, images: dict[str, Path]) -> None:
    """What somebody else has detached is forgotten by whoever comes across it."""
    target = alice.directory("stale")
    id = alice.attach(images["erofs"], target)[2]
    subprocess.run(["umount", target], check=True)
    assert records(alice.daemon) == [str(id)]
    assert alice.detach(id)[0] == "NotFound"
    assert records(alice.daemon) == []


@pytest.mark.parametrize("source", ["erofs", "tmpfs:64K"])
def test_what_is_written_down_is_lost(alice: User, bob: User, images: dict[str, Path], source: str) -> None:
    """The ledger knows as well for whom mountd has attached what."""
    target = alice.directory(f"lost-{source[:5]}")
    image = images.get(source, source)
    for by_root in (False, True):
        id = alice.attach(image, target)[2]
        shutil.rmtree(alice.daemon.directory / "run/attached")
        assert bob.detach(id)[0] == "NotFound"
        assert bob.detach(id_at(Path("/")))[0] == "NotFound"
        assert detached(alice.daemon.socket, id_at(Path("/")))[0] == "NotFound"
        with OwnedFd(os.open(target, os.O_RDONLY)):
            assert alice.detach(id)[0] == "InUse"
        answer = detached(alice.daemon.socket, id) if by_root else alice.detach(id)
        assert answer == ("", "", id)
        assert id_at(target) != id
        assert alice.detach(id)[0] == "NotFound"


def test_no_more_than_the_rule_grants(alice: User, bob: User) -> None:
    """What is there no more does not count, nor what others have."""
    paths = [alice.directory(f"limit-{number}") for number in range(3)]
    with alice.attached("tmpfs:64K", paths[0]), alice.attached("tmpfs:64K", paths[1]):
        name, text, _ = alice.attach("tmpfs:64K", paths[2])
        assert (name, "limit exceeded: at most 2 " in text) == ("LimitExceeded", True)
        with bob.attached("tmpfs:64K", bob.directory("limit")):
            pass
        subprocess.run(["umount", paths[0]], check=True)
        # Once the last that mountd had of it is gone, too.
        assert eventually(lambda: alice.attach("tmpfs:64K", paths[0])[0] == "")
        assert alice.detach(id_at(paths[0]))[0] == ""


def test_a_shared_parent(place: Path, scene: Scene, images: dict[str, Path]) -> None:
    """What is attached in one place shows up in its peers, and goes from there as well."""
    carol = user_of(*scene, CAROL)

    def work() -> tuple[object, ...]:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with mount_api.clone_mount(str(carol.own)) as again:
            mount_api.move_mount(again.fileno(), str(carol.own))
        mount_api.set_propagation(str(carol.own), Propagation.SHARED)
        peer = place / "peer"
        peer.mkdir()
        with mount_api.clone_mount(str(carol.own)) as again:
            mount_api.move_mount(again.fileno(), str(peer))
        target = carol.directory("shared")
        error, text, id = carol.attach(images["erofs"], target)
        seen = (peer / "shared/hello").exists()
        copy = statmount(id_at(peer / "shared"))
        own = statmount(id).propagation
        end = carol.detach(id)
        locked = copy.attributes & wanted == wanted
        return error, text, seen, locked, own, end[0], os.listdir(peer / "shared")

    wanted = MountAttr.NOSUID | MountAttr.NODEV
    assert forked(work) == ("", "", True, True, Propagation.PRIVATE, "", [])


def test_in_the_mount_namespace_of_the_caller(scene: Scene, images: dict[str, Path]) -> None:
    """That of a session, say: nothing shows up on the host."""
    carol = user_of(*scene, CAROL)
    target = carol.directory("session")

    def work() -> tuple[Answer, bool, Answer]:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        answer = carol.attach(images["erofs"], target)
        return answer, (target / "hello").exists(), carol.detach(answer[2])

    answer, seen, end = forked(work)
    assert (answer[:2], seen, end[0]) == (("", ""), True, "")
    assert os.listdir(target) == []


def test_a_user_of_a_container(place: Path, scene: Scene, images: dict[str, Path], containers: None) -> None:
    """One that is not its root: the container's root owns what is above, and `$UID` is its own number."""
    daemon, grounds = scene
    inner, outer = 1000, 401000
    own = grounds / str(inner)
    own.mkdir()
    os.chown(own, 400000, 400000)
    target = own / "target"
    target.mkdir()
    os.chown(target, outer, outer)

    def work() -> tuple[Answer, Answer, bool, Answer]:
        with OwnedFd(os.open(target, os.O_PATH)) as fd:
            by_root = asked(daemon.socket, images["erofs"], fd.fileno(), userns="none")

            def ask() -> Answer:
                return asked(daemon.socket, images["erofs"], fd.fileno(), userns="none")

            answer = as_user(ask, inner)
        seen = (target / "hello").exists()
        return by_root, answer, seen, as_user(lambda: detached(daemon.socket, answer[2]), inner)

    by_root, answer, seen, end = in_container(work)
    assert by_root[:2] == BY_ITSELF
    assert (answer[:2], seen, end[0]) == (("", ""), True, "")


def test_root_does_it_itself(alice: User, images: dict[str, Path]) -> None:
    with OwnedFd(os.open(alice.directory("root"), os.O_PATH)) as fd:
        name, text, _ = asked(alice.daemon.socket, images["erofs"], fd.fileno())
    assert (name, text) == BY_ITSELF


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("Attach", {"targetFileDescriptor": 0}, "InvalidParameter"),
        ("Attach", {"source": {"tmpfs": {"size": 4096}}}, "InvalidParameter"),
        ("Attach", {"source": {"tmpfs": {"size": 4096}}, "targetFileDescriptor": 7}, "InvalidParameter"),
        ("Attach", {"mountFileDescriptor": 0, "targetFileDescriptor": 0}, "InvalidParameter"),
        ("Detach", {}, "InvalidParameter"),
        ("Detach", {"id": 0}, "InvalidParameter"),
        ("Detach", {"id": 1, "targetFileDescriptor": 0}, "InvalidParameter"),
        ("Detach", {"id": -(1 << 63)}, "InvalidParameter"),
        ("Detach", {"id": 1}, "NotFound"),
    ],
)
def test_what_is_no_request(alice: User, method: str, parameters: dict[str, object], error: str) -> None:
    def work() -> str:
        with Client(str(alice.daemon.socket)) as client:
            try:
                client.call(method, parameters, [])
            except MountdError as found:
                return type(found).__name__
            return ""

    assert as_user(work, ALICE) == error
