"""A daemon that also listens for clients of systemd's service, and what they hand over."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation
from mountd.kernel.libc import call as system_call
from tests.container import RANGE, USER
from tests.daemon import Daemon
from tests.disks import Part, build_disk
from tests.e2e.conftest import trusting
from tests.e2e.directories import BIND, rule
from tests.e2e.mountfs.registrar import NSRESOURCED, Registrar
from tests.e2e.trust import digest_of
from tests.e2e.trust import rule as signed_rule
from tests.images import build_image, build_tree


@pytest.fixture(scope="package")
def run_systemd(place: Path) -> Path:
    """What the daemon sees as /run/systemd."""
    path = place / "run-systemd"
    path.mkdir()
    return path


@pytest.fixture(scope="package")
def serving(place: Path, run_systemd: Path, images: dict[str, Path]) -> Iterator[Daemon]:
    """A daemon that also listens for clients of systemd's service."""
    policy = (
        trusting(place / "trusted")
        + trusting(place / "mountfs-writable", access='"read-write"').replace("in the test", "to write to")
        + signed_rule(
            "sealed", f'digest = ["{digest_of(images["squashfs"].read_bytes())}"]', '"sealed"'
        ).replace('"erofs"', '"squashfs"')
        + rule("own", '"caller", "foreign"', ', access = "read-write"')
    )
    (place / "mountfs-writable").mkdir()
    theirs = place / "mountfs"
    files = []
    for name in ("subuid", "subgid"):
        files.append(place / f"mountfs-{name}")
        files[-1].write_text(f"{USER}:{RANGE[0][1]}:65536\n")

    def elsewhere() -> None:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        os.makedirs("/run/systemd", exist_ok=True)
        system_call("mount", bytes(run_systemd), b"/run/systemd", None, BIND, None)
        for file in files:
            target = b"/etc/" + file.name.split("-")[1].encode()
            system_call("mount", bytes(file), target, None, BIND, None)

    daemon = Daemon(
        place / "mountfs-daemon", policy, ["--mountfs-socket", str(theirs)], preexec_fn=elsewhere
    )
    yield daemon
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log, daemon.log
    assert not theirs.exists()


@pytest.fixture
def registrar(run_systemd: Path) -> Iterator[Registrar]:
    path = run_systemd / NSRESOURCED
    made = Registrar(path)
    yield made
    made.close()
    path.unlink()


@pytest.fixture
def home(place: Path) -> Iterator[Path]:
    """A directory of USER's."""
    path = Path(tempfile.mkdtemp(prefix="mountfs-home-", dir=place))
    (path / "mine").write_text("mine\n")
    for each in (path, path / "mine"):
        os.chown(each, USER, USER)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="package")
def disk(place: Path, images: dict[str, Path]) -> Path:
    home = build_image("ext4", build_tree(place / "mountfs-tree"), place / "mountfs-part.raw")
    parts = [Part("home", home, label="homes"), Part("root", images["erofs"], label="os")]
    return build_disk(place / "trusted/disk-of-mountfs.raw", [*parts, Part("swap")])
