"""The layers of a pull one after the other: directories that one leaves out, and how large all may be."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mountd.errors import InvalidImage, LimitExceeded
from mountd.fds import OwnedFd, close_all
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from mountd.store import erofs_build, layers, program, pull
from mountd.store.child import Child
from mountd.store.manifest import Descriptor, Manifest
from tests import oci
from tests.oci import Member, archive, directory

BASE = archive(
    directory("./"),
    directory("root/", mode=0o700),
    Member("root/gone", b""),
    directory("tmp/", mode=0o1777),
    directory("home/"),
    directory("home/app/", mode=0o750, uid=1000),
)
MIDDLE = archive(Member("home/app/new", b"", uid=1000))
TOPMOST = archive(
    Member("root/.wh.gone", b""), Member("tmp/t", b""), Member("home/app/newer", b"", uid=1000)
)


@pytest.fixture
def kept_as_archives(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of mkfs.erofs, which may be too old for archives here: what it would be given."""

    def start(*_: object, stdin: int, directory: int, maximum: int, **__: object) -> Child:
        command = ["sh", "-c", f"cat > {program.HOME}/{erofs_build.NAME}"]
        limits = program.Limits(20, 4 << 30, maximum)
        return program.start(
            command, limits, directory=directory, stdin=stdin, maximum_output=program.MAXIMUM_MESSAGES
        )

    monkeypatch.setattr(erofs_build, "start", start)


def built(work: Path, *archives: bytes, limits: pull.PullLimits | None = None) -> list[bytes]:
    """Have the layers made, the lowest first, and return what each is made of."""
    blobs = []
    for data in archives:
        blobs.append(OwnedFd(os.memfd_create("blob", os.MFD_CLOEXEC)))
        os.write(blobs[-1].fileno(), data)
    found = Manifest(
        "sha256:" + "0" * 64,
        Descriptor("x", "sha256:" + "0" * 64, 1),
        tuple(Descriptor(oci.LAYER, oci.digest(data), len(data)) for data in archives),
    )
    made: tuple[pull.Layer, ...] = ()
    try:
        with OwnedFd(os.open(work, os.O_RDONLY | os.O_DIRECTORY)) as directory:
            made = pull.build(
                found,
                [oci.digest(data) for data in archives],
                blobs,
                directory.fileno(),
                (1, 8),
                limits or pull.PullLimits(),
                False,
                lambda *_: None,
            )
        return [(work / layer.name).read_bytes() for layer in made]
    finally:
        close_all([*blobs, *(layer.erofs_fd for layer in made)])


def test_a_layer_opens_nothing_that_is_closed_below(
    scratch: Path, tmp_path: Path, kept_as_archives: None
) -> None:
    tmp_path.chmod(0o700)
    places = []
    for number, data in enumerate(built(tmp_path, BASE, MIDDLE, TOPMOST)):
        places.append(scratch / f"left-out-{number}")
        places[-1].mkdir()
        command = ["tar", "-xpf", "-", "-C", places[-1], "--numeric-owner"]
        subprocess.run(command, input=data, check=True)
    with FsContext.open("overlay") as context:
        context.set_string("lowerdir", ":".join(map(str, reversed(places))))
        context.create()
        with context.mount(MountAttr.RDONLY) as mount:
            assert isinstance(mount, OwnedFd)
            known = {name: os.stat(name, dir_fd=mount.fileno()) for name in (".", "root", "tmp", "home/app")}
    assert {name: (stat.S_IMODE(each.st_mode), each.st_uid) for name, each in known.items()} == {
        ".": (0o755, 0),
        "root": (0o700, 0),
        "tmp": (0o1777, 0),
        "home/app": (0o750, 1000),
    }
    subprocess.run(["rm", "-r", *places], check=True)


def test_what_a_filter_says_that_was_taken_over() -> None:
    for told in (b"1", b'{"found": {}}', b'{"found": {"directories": [["a", 0, 0, "b"]]}}', b'{"found": 1}'):
        with pytest.raises(InvalidImage):
            layers._understand(told, "sha256:x")


def test_all_layers_together_are_bounded(tmp_path: Path, kept_as_archives: None) -> None:
    """While they are made: nothing is left of them then."""
    tmp_path.chmod(0o700)
    large = [archive(Member(name, os.urandom(60_000))) for name in ("a", "b", "c")]
    limits = pull.PullLimits(stored=150_000)
    assert len(built(tmp_path, *large[:2], limits=limits)) == 2
    for each in tmp_path.iterdir():
        each.unlink()
    with pytest.raises(LimitExceeded, match="at most 150000 bytes in the layers of an image"):
        built(tmp_path, *large, limits=limits)
    assert not list(tmp_path.iterdir())
    one = replace(limits, layer=layers.LayerLimits(image=50_000))
    with pytest.raises(LimitExceeded, match="at most 50000 bytes in the file system of a layer"):
        built(tmp_path, *large, limits=one)
