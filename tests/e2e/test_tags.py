"""Images by the tag that they were pulled by: what it leads to, for whom, and that nothing else does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mountd.cli import mount_helper
from mountd.client import Client, Request
from mountd.errors import IMAGES_INTERFACE as IMAGES
from mountd.fds import OwnedFd
from mountd.store.record import Owner
from mountd.store.store import Store
from tests.container import as_user
from tests.daemon import ROOT, Daemon
from tests.e2e.attaching import granting, id_at, user_of
from tests.e2e.calls import explain, mount, mount_fds, outcome, text_of
from tests.e2e.schema import problems
from tests.layered import REPOSITORY, Image, pulled, rule
from tests.programs import findmnt, in_private, run
from tests.rogue import eventually, settled

TAGGED = 21_700  # the uid of this module's user
PLACES = 'attach = {places}, idmap = ["none", "namespace", "caller"]'
LATEST = f"oci:{REPOSITORY}:latest"


@pytest.fixture(scope="module")
def scene(place: Path) -> Iterator[tuple[Daemon, Path]]:
    text = rule("apps/*").replace('idmap = ["none", "namespace", "caller"]', PLACES)
    with granting(place, "tagged", lambda places: text.replace("{places}", places)) as made:
        yield made


@pytest.fixture
def daemon(scene: tuple[Daemon, Path]) -> Iterator[Daemon]:
    """The daemon; nothing is left of what it made."""
    before = settled(scene[0])
    yield scene[0]
    assert eventually(lambda: scene[0].held() == before, 10), (before, scene[0].held())


@pytest.fixture
def store(daemon: Daemon) -> Iterator[Store]:
    """The store, with nothing in it before and after."""
    made = Store(daemon.directory / "state")

    def empty() -> bool:
        # What is shared among mounts is in use a moment longer.
        return made.collect_garbage(maximum_age=0).in_use == ()

    yield made
    assert eventually(empty, 20)
    left = [*daemon.directory.glob("state/tags/sha256/*"), *daemon.directory.glob("state/pulled/sha256/*")]
    assert left == []


def shown(daemon: Daemon, reference: str, name: str = "name") -> str:
    """Mount it as a user, and return what is in a file of it."""

    def work() -> str:
        with (reply := mount(daemon.socket, reference)).mount:
            return text_of(reply, name)

    return as_user(work, TAGGED)


def refused(daemon: Daemon, reference: str) -> tuple[str, str]:
    return as_user(lambda: outcome(lambda: mount(daemon.socket, reference)), TAGGED)


def mountctl(daemon: Daemon, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MOUNTD_SOCKET": str(daemon.socket)}
    command = [sys.executable, "-m", "mountd.cli.mountctl", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=check)


def test_a_tag_leads_to_what_was_pulled_last(daemon: Daemon, store: Store) -> None:
    assert refused(daemon, LATEST)[0] == "NotFound"
    old = pulled(store, [{"name": "old"}], tag="latest")
    assert shown(daemon, LATEST) == "old"
    assert shown(daemon, f"oci:{REPOSITORY}") == "old"  # which is short for it
    new = pulled(store, [{"name": "new", "both": "1"}, {"both": "2"}], tag="latest")
    assert (shown(daemon, LATEST), shown(daemon, LATEST, "both")) == ("new", "2")
    # By its digest, what it led to before is still there; and that counts, whatever tag comes with it.
    assert shown(daemon, old.reference) == "old"
    assert shown(daemon, old.reference.replace("@", ":latest@")) == "old"
    assert shown(daemon, old.reference.replace("@", ":never@")) == "old"
    assert shown(daemon, new.reference) == "new"
    # A pull by the digest alone moves no tag.
    assert pulled(store, [{"name": "old"}]).reference == old.reference
    assert shown(daemon, LATEST) == "new"


LOOK_ALIKES = [
    "oci:registry.example.com/apps/one:Latest", "oci:registry.example.com/apps/one:1",
    "oci:registry.example.com/apps/two:latest", "oci:registry.example.com:5000/apps/one:latest",
    "oci:registry.example.com.evil.test/apps/one:latest", "oci:registry.exarnple.com/apps/one:latest",
]  # fmt: skip
NAMES_OF_NOTHING = [
    "oci:Registry.example.com/apps/one:latest", "oci:registry.ex\u0430mple.com/apps/one:latest",
    "oci:registry.example.com/apps/../one:latest", "oci:registry.example.com/apps/one:../../lock",
    "oci:registry.example.com/apps/one:a/b", "oci:registry.example.com/apps/one:",
    "oci:registry.example.com/apps/one:latest@sha256:0a", "oci:one:latest",
]  # fmt: skip


def test_nothing_that_looks_like_it_leads_there(daemon: Daemon, store: Store) -> None:
    pulled(store, [{"name": "it"}], tag="latest")
    for other in LOOK_ALIKES:
        name, text = refused(daemon, other)
        assert (name, other in text) == ("NotFound", True), other
    for other in NAMES_OF_NOTHING:
        # As it is on the wire, as any client may have it.
        asked = {"reference": other}
        name, text = outcome(lambda asked=asked: mount_fds(daemon.socket, asked, []))  # type: ignore[misc]
        assert (name, "source.reference" in text) == ("InvalidParameter", True), other


def test_a_tag_is_judged_by_what_it_leads_to(daemon: Daemon, store: Store) -> None:
    """By where that is from and how it was verified, as if the digest had been given."""
    pulled(store, [{"name": "good"}], tag="1")
    assert shown(daemon, f"oci:{REPOSITORY}:1") == "good"
    unsigned = pulled(store, [{"name": "bad"}], tag="1", requirement="insecureAcceptAnything")
    assert refused(daemon, f"oci:{REPOSITORY}:1")[0] == "DeniedByPolicy"
    assert refused(daemon, f"oci:{REPOSITORY}:1") == refused(daemon, unsigned.reference)
    pulled(store, [{"name": "good"}], "registry.example.com/others", tag="1")
    assert refused(daemon, "oci:registry.example.com/others:1")[0] == "DeniedByPolicy"


def test_what_is_called_like_a_tag_is_none(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    """An image's own name is what whoever imports it says."""
    file = tmp_path / "image"
    file.write_bytes(b"anything")
    mountctl(daemon, "image", "import", "--name", LATEST, str(file))
    assert refused(daemon, LATEST)[0] == "NotFound"


def test_a_removed_image_takes_its_tags_with_it(daemon: Daemon, store: Store) -> None:
    image = pulled(store, [{"name": "1"}, {"name": "2"}], tag="latest")
    pulled(store, [{"name": "2"}, {"kept": ""}], tag="kept")
    mountctl(daemon, "image", "remove", image.layers[0])
    done = mountctl(daemon, "mount", LATEST, "/mnt", check=False)
    assert done.returncode != 0
    assert f"mountctl image pull {LATEST}" in done.stderr
    # By the digest it says so as well; a tag that it had is not worth repeating.
    told = mountctl(daemon, "explain", image.reference.replace("@", ":latest@"), "--json", check=False)
    assert f"mountctl image pull {image.reference}”" in json.dumps(
        json.loads(told.stdout), ensure_ascii=False
    )
    assert len(list((daemon.directory / "state/tags/sha256").iterdir())) == 1
    # By its digest it may come back, and by its tag only if it is pulled by that.
    assert shown(daemon, pulled(store, [{"name": "1"}, {"name": "2"}]).reference) == "2"
    assert refused(daemon, LATEST)[0] == "NotFound"
    assert shown(daemon, f"oci:{REPOSITORY}:kept") == "2"
    # Pulled again, it is there again.
    pulled(store, [{"name": "1"}, {"name": "2"}], tag="latest")
    assert shown(daemon, LATEST) == "2"


def test_explain_and_the_records_name_the_digest(daemon: Daemon, store: Store) -> None:
    image = pulled(store, [{"name": "it"}], tag="1.0")
    by_tag, by_digest = f"oci:{REPOSITORY}:1.0", image.reference.removeprefix("oci:")
    told = explain(daemon.socket, {"reference": by_tag}, [])
    assert told["decision"]["digest"] == image.layers[0]  # type: ignore[index]
    assert told["facts"]["pulled from"] == by_digest  # type: ignore[index]
    assert by_digest in mountctl(daemon, "explain", by_tag).stdout
    manifest = image.reference.partition("@")[2]
    # Who gives a digest cannot have it said that this is what a tag leads to.
    asked = {by_tag: f"{by_tag}@{manifest}", image.reference.replace("@", ":stable@"): image.reference}
    for reference, name in asked.items():
        with mount(daemon.socket, reference).mount:
            (listed,) = json.loads(mountctl(daemon, "list", "--json").stdout)["mounts"]
        assert (listed["source"], listed["digest"]) == (name, image.layers[0])


def test_the_list_shows_where_tags_lead(daemon: Daemon, store: Store) -> None:
    old = pulled(store, [{"name": "old"}, {"top": ""}], tag="1")
    new = pulled(store, [{"name": "new"}, {"top": ""}], tag="1")
    assert pulled(store, [{"name": "new"}, {"top": ""}], tag="latest") == new
    reply = json.loads(mountctl(daemon, "image", "list", "--json").stdout)
    assert problems(reply, "image-list") == []
    names = [f"oci:{REPOSITORY}:1", LATEST]
    found = {each["digest"]: each.get("tags") for each in reply["images"]}
    # The upper layer is the same of both.
    assert found == {old.layers[0]: None, new.layers[0]: names, new.layers[1]: names}
    lines = mountctl(daemon, "image", "list").stdout.splitlines()
    said = {line.split()[0]: line.split(maxsplit=4)[4] for line in lines}
    assert said == {
        old.layers[0]: old.reference,
        new.layers[0]: ", ".join(names),
        new.layers[1]: ", ".join(names),
    }
    one = json.loads(mountctl(daemon, "image", "inspect", new.layers[0], "--json").stdout)
    assert problems(one, "image-inspect") == []
    assert one["image"]["tags"] == names


def test_who_has_the_bytes_does_not_learn_of_tags(daemon: Daemon, store: Store) -> None:
    image = pulled(store, [{"name": "it"}], tag="secret")
    with store.lookup(image.layers[0])[0] as fd:
        store.add(fd.fileno(), os.fstat(fd.fileno()).st_size, Owner(TAGGED, TAGGED), name="mine")

    def of(uid: int) -> list[str]:
        def work() -> list[str]:
            with Client(str(daemon.socket)) as client:
                one = client.call(f"{IMAGES}.Inspect", {"digest": image.layers[0]}, [])
                return [json.dumps(each) for each in (one, client.call(f"{IMAGES}.List", {}, []))]

        return as_user(work, uid)

    assert [image.layers[0] in each for each in of(TAGGED)] == [True, True]
    assert [":secret" in each for each in of(TAGGED)] == [False, False]
    assert [":secret" in each for each in of(0)] == [True, True]


def test_a_layer_by_its_tag(daemon: Daemon, store: Store) -> None:
    pulled(store, [{"both": "low", "low": "1"}, {"middle": "1"}], tag="base")
    above: Image = pulled(store, [{"both": "top"}], "registry.example.com/apps/two", tag="tools")
    layers = ["oci:registry.example.com/apps/two:tools", f"oci:{REPOSITORY}:base"]

    def work() -> list[str]:
        source = {"layers": [{"reference": each} for each in layers]}
        with (reply := mount_fds(daemon.socket, source, [])).mount:
            return [text_of(reply, name) for name in ("both", "low", "middle")]

    assert as_user(work, TAGGED) == ["top", "1", "1"]
    facts = explain(daemon.socket, {"layers": [{"reference": each} for each in layers]}, [])["facts"]
    assert isinstance(facts, dict)
    assert facts["layers[0]: pulled from"] == above.reference.removeprefix("oci:")
    # What one of them lacks is said of it.
    gone = {"layers": [{"reference": layers[0]}, {"reference": f"oci:{REPOSITORY}:gone"}]}
    name, text = outcome(lambda: mount_fds(daemon.socket, gone, []))
    assert (name, f"oci:{REPOSITORY}:gone in the store" in text) == ("NotFound", True)
    with tempfile.TemporaryDirectory(prefix="tagged-", dir="/var/lib") as directory:
        mountctl(daemon, "mount", "--layer", layers[0], layers[1], directory)
        try:
            assert (Path(directory) / "both").read_text() == "top"
        finally:
            subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize("layers", [1, 2])
def test_mount_by_a_line_of_fstab(
    daemon: Daemon, store: Store, installed: Path, place: Path, layers: int
) -> None:
    """The mount table says what was asked for, so that mount(8) knows that it is there."""
    pulled(store, [{"name": str(number)} for number in range(layers)], tag="latest")
    # Longer than what the kernel takes for such a name.
    long = f"oci:registry.example.com/apps/{'l' * 200}:{'t' * 128}"
    pulled(store, [{"name": str(number)} for number in range(layers)], long[4:-129], tag="t" * 128)
    targets = [place / f"fstab-{number}" for number in range(2)]
    for target in targets:
        target.mkdir()
    lines = [
        f"{name} {target} mountd noexec 0 0\n" for name, target in zip((LATEST, long), targets, strict=True)
    ]

    def work() -> list[str]:
        every = [run(["mount", "--all", "--verbose"], daemon.socket) for _ in range(2)]
        assert [each.returncode for each in every] == [0, 0], every
        assert f"{targets[0]}" in every[1].stdout
        assert "already mounted" in every[1].stdout
        assert (targets[0] / "name").read_text() == (targets[1] / "name").read_text() == str(layers - 1)
        return [findmnt(target) for target in targets]

    try:
        named, unnamed = in_private(installed, work, {"fstab": "".join(lines)}, place)
    finally:
        for target in targets:
            target.rmdir()
    assert named == LATEST
    assert unnamed != long


def test_a_user_attaches_it(daemon: Daemon, store: Store, scene: tuple[Daemon, Path]) -> None:
    pulled(store, [{"name": "attached"}], tag="latest")
    user = user_of(*scene, TAGGED)
    target = user.directory("attached")
    with user.attached(LATEST, target):
        assert as_user((target / "name").read_text, TAGGED) == "attached"


def test_a_digest_that_is_asked_for_with_a_tag(
    daemon: Daemon, store: Store, scene: tuple[Daemon, Path]
) -> None:
    """mount.mountd asks before it has something attached, and the tag may be moved in between."""
    pulled(store, [{"name": "other"}])
    wanted = pulled(store, [{"name": "wanted"}], tag="latest").layers[0]
    user = user_of(*scene, TAGGED)
    target = user.directory("digest")
    asked, moved = os.pipe(), os.pipe()

    class Moving(Client):
        def explain(self, *arguments: Any, **fields: Any) -> dict[str, object]:
            told = super().explain(*arguments, **fields)
            os.write(asked[1], b".")
            os.read(moved[0], 1)
            return told

    def attach(of: type[Client]) -> tuple[str, list[str]]:
        wishes = mount_helper.Wishes()
        wishes.read([LATEST, str(target), "-o", f"mountd.digest={wanted}"])

        def work() -> dict[str, object]:
            with (
                Request(LATEST) as request,
                of(str(daemon.socket)) as client,
                OwnedFd(os.open(target, os.O_PATH)) as fd,
            ):
                return dict(mount_helper.have_attached(client, request, fd, wishes))

        name = as_user(lambda: outcome(work), TAGGED)[0]
        return name, [each.read_text() for each in target.iterdir()]

    assert attach(Client) == ("", ["wanted"])
    assert user.detach(id_at(target))[0] == ""
    mover = os.fork()
    if mover == 0:
        try:
            os.read(asked[0], 1)
            pulled(store, [{"name": "other"}], tag="latest")
            os.write(moved[1], b".")
        finally:
            os._exit(0)
    assert attach(Moving) == ("OtherImage", [])
    os.waitpid(mover, 0)
    assert shown(daemon, LATEST) == "other"
    # Before anything is attached, if it is known by then.
    assert attach(Client) == ("OtherImage", [])
    for end in (*asked, *moved):
        os.close(end)


def test_no_registry_is_asked(daemon: Daemon, store: Store) -> None:
    """Neither the one that listens where the tag says, nor through the instance that pulls."""
    with socket.socket() as registry, socket.socket(socket.AF_UNIX) as puller:
        registry.bind(("127.0.0.1", 0))
        registry.listen()
        path = daemon.directory / "run/pull"
        puller.bind(str(path))
        puller.listen()
        try:
            host = f"127.0.0.1:{registry.getsockname()[1]}"
            name, _ = refused(daemon, f"oci:{host}/apps/one:latest")
            assert name == "NotFound"
            pulled(store, [{"name": "it"}], f"{host}/apps/one", tag="latest")
            assert refused(daemon, f"oci:{host}/apps/one:latest")[0] == "DeniedByPolicy"
            for listening in (registry, puller):
                listening.setblocking(False)
                with pytest.raises(BlockingIOError):
                    listening.accept()
        finally:
            path.unlink()
