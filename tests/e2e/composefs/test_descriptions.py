"""composefs: images that are made of descriptions, and lines that are hostile."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from mountd.client import Client, Request
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation
from mountd.kernel.libc import call
from mountd.store.record import Owner
from mountd.store.store import Store
from tests.container import USER
from tests.daemon import Daemon
from tests.e2e.calls import mount_fds, outcome
from tests.e2e.composefs.calls import ask, ask_as_user, refusal
from tests.e2e.composefs.trees import BIG, DESCRIPTIONS, HEAD, Trees, described, dump
from tests.e2e.directories import peer

BIND = 4096  # MS_BIND


def test_of_a_description_the_image_is_made_anew(serving: Daemon, trees: Trees, own: Path) -> None:
    with ask_as_user(serving, trees.description, own) as reply:
        assert reply.decision["trustedBy"] == "regenerated"
        assert "nothing checks the contents" in str(reply.decision["reason"])
        locked = os.ST_NOSUID | os.ST_NODEV | os.ST_RDONLY
        assert os.fstatvfs(reply.mount.fileno()).f_flag & locked == locked
        assert Path(f"/proc/self/fd/{reply.mount.fileno()}/big").read_bytes() == BIG
        digest = str(reply.decision["digest"])
    store = Store(serving.directory / "state")
    (record,) = store.part("regenerated").records()
    assert record.digest == digest
    fd, _ = store.part("regenerated").lookup(digest)
    with fd:
        assert os.pread(fd.fileno(), record.size, 0) == trees.image.read_bytes()
    # And not another time; nor is it an image that could be mounted by itself.
    inode = os.stat(serving.directory / f"state/regenerated/images/sha256/{digest[7:]}").st_ino
    with ask_as_user(serving, trees.description, own):
        pass
    assert os.stat(serving.directory / f"state/regenerated/images/sha256/{digest[7:]}").st_ino == inode
    assert not list(store.records())
    source = {"reference": f"stored:{digest}"}
    assert outcome(lambda: mount_fds(serving.socket, source, []))[0] == "NotFound"


def test_explain_makes_nothing(serving: Daemon, trees: Trees, own: Path, place: Path) -> None:
    text = trees.description.read_bytes() + b"/one-more 1 100644 1 0 0 0 0.0 - x -\n"
    path = described(place, text)
    before = made_images(serving)
    with (
        peer(),
        Client(str(serving.socket)) as client,
        Request(f"composefs:{path}", objects=[str(own)]) as request,
    ):
        told = client.explain(request.source, request.fds)
    assert told["decision"]["verdict"] == "allow"  # type: ignore[index]
    assert told["facts"]["contents"] == "not checked"  # type: ignore[index]
    assert told["facts"]["objects 0"].startswith("caller-owned")  # type: ignore[index]
    assert made_images(serving) == before
    path.write_bytes(text + b"nonsense\n")
    with (
        peer(),
        Client(str(serving.socket)) as client,
        Request(f"composefs:{path}", objects=[str(own)]) as request,
    ):
        name, said = outcome(lambda: client.explain(request.source, request.fds))
    assert name == "InvalidImage"
    assert "line 13 of the description" in said
    path.unlink()


def test_many_at_the_same_time(serving: Daemon, own: Path, place: Path) -> None:
    """Those of one owner wait for each other, and all have the one image that is made."""
    lines = (b"/%d 1 100644 1 0 0 0 0.0 - x -\n" % number for number in range(40_000))
    path = described(place, HEAD + b"".join(lines))
    before = made_images(serving)

    def mount(_: int) -> str:
        with ask(serving, path, own) as reply:
            return str(reply.decision["digest"])

    with peer(), ThreadPoolExecutor(5) as pool:
        digests = set(pool.map(mount, range(5)))
    path.unlink()
    assert made_images(serving) - before == {digest.removeprefix("sha256:") for digest in digests}
    assert len(digests) == 1


@pytest.mark.parametrize("verb", ["mount", "explain"])
def test_reading_a_description_takes_a_slot(serving: Daemon, own: Path, place: Path, verb: str) -> None:
    path = described(place, HEAD + b"/%s 1 100644 1 0 0 0 0.0 - x -\n" % verb.encode())
    store = Store(serving.directory / "state").part("regenerated")
    store.prepare()

    def work() -> str:
        with (
            peer(),
            Client(str(serving.socket)) as client,
            Request(f"composefs:{path}", objects=[str(own)]) as request,
        ):
            if verb == "explain":
                client.explain(request.source, request.fds)
            else:
                client.mount(request.source, request.fds, **request.parameters).mount.close()
            return "done"

    with ThreadPoolExecutor(1) as pool:
        with ExitStack() as slots:
            for _ in range(store.limits.owner_transfers):
                slots.enter_context(store.slot(Owner(USER, USER)))
            running = pool.submit(work)
            with pytest.raises(TimeoutError):
                running.result(1)
        assert running.result(20) == "done"
    path.unlink()


def made_images(daemon: Daemon) -> set[str]:
    path = daemon.directory / "state/regenerated/images/sha256"
    return set(os.listdir(path)) if path.exists() else set()


def of_one(place: Path, line: bytes) -> Path:
    return described(place, HEAD + line + b"\n")


def test_what_mkcomposefs_writes_of_a_tree(serving: Daemon, own: Path, place: Path) -> None:
    """One with whiteouts, and with a file from before 1970: the image is the same, byte by byte."""
    tree, image = place / "tree-with-whiteouts", place / "with-whiteouts.cfs"
    (tree / "below").mkdir(parents=True)
    for each in (tree, tree / "below"):
        os.mknod(each / "whiteout", stat.S_IFCHR)
    (tree / "old").write_text("old")
    os.utime(tree / "old", ns=(0, -99_999_500_000_000))
    subprocess.run(["mkcomposefs", "--user-xattrs", tree, image], check=True)
    path = described(place, dump(image))
    shutil.rmtree(tree)
    text = path.read_bytes()
    assert b"trusted.overlay.opaque=x" in text.splitlines()[0]
    assert b" -100000.5" in text
    with ask_as_user(serving, path, own) as reply:
        assert os.stat(f"/proc/self/fd/{reply.mount.fileno()}/old").st_mtime_ns == -99_999_500_000_000
        digest = str(reply.decision["digest"])
    fd, record = Store(serving.directory / "state").part("regenerated").lookup(digest)
    with fd:
        assert os.pread(fd.fileno(), record.size, 0) == image.read_bytes()
    path.unlink()
    image.unlink()


@pytest.mark.parametrize(
    "attributes",
    [
        # As long as they may be, one or many, and as text.
        b" user.a=" + b"1" * 32742,
        b"".join(b" user.%02d=" % number + b"1" * 496 for number in range(64)),
        b" user.a=" + b"\\xff" * 16382,
    ],
)
def test_the_longest_attributes_that_mkcomposefs_takes(
    serving: Daemon, own: Path, place: Path, attributes: bytes
) -> None:
    path = of_one(place, b"/x 1 100644 1 0 0 0 0.0 - x -" + attributes)
    assert refusal(serving, path, own) == ("", "")
    path.unlink()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"/x 5 100644 1 0 0 0 0.0 ../x - -", "plain relative"),
        (b"/x 5 100644 1 0 0 0 0.0 /etc/shadow - -", "plain relative"),
        (b"/x 0 20666 1 0 0 259 0.0 - - -", "character device"),
        (b"/x 0 60666 1 0 0 0 0.0 - - -", "block device"),
        (b"/x 1 100644 1 0 0 0 0.0 - x - trusted.overlay.redirect=/etc/shadow", "user.*"),
        (b"/x 1 100644 1 0 0 0 0.0 - x - security.capability=x", "user.*"),
        (b"/../x 1 100644 1 0 0 0 0.0 - x -", "no directory before it"),
    ],
)
def test_hostile_lines(serving: Daemon, own: Path, place: Path, line: bytes, said: str) -> None:
    path = of_one(place, line)
    name, text = refusal(serving, path, own)
    path.unlink()
    assert name == "InvalidImage"
    assert said in text


def test_a_rule_can_want_contents_to_be_checked(
    start: Callable[..., Daemon], trees: Trees, own: Path
) -> None:
    daemon = start(DESCRIPTIONS.replace('"regenerated"', '"composefs-verity"'))
    name, text = refusal(daemon, trees.description, own)
    assert name == "NotImmutable"
    assert "fs-verity" in text


def test_without_the_program(start: Callable[..., Daemon], trees: Trees, own: Path) -> None:
    program = shutil.which("mkcomposefs")
    assert program

    def hidden() -> None:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        call("mount", b"/dev/null", program.encode(), None, BIND, None)

    daemon = start(DESCRIPTIONS, preexec_fn=hidden)
    name, text = refusal(daemon, trees.description, own)
    assert name == "NotSupported"
    assert "without mkcomposefs" in text
    assert not list((daemon.directory / "state/regenerated/incoming").iterdir())
