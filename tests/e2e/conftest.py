"""A daemon with a real socket, images in a directory that a rule trusts, and callers of every kind."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.fds import OwnedFd
from mountd.store.store import Store
from tests.container import mapper
from tests.daemon import ROOT, Daemon
from tests.e2e.stored import empty
from tests.e2e.trust import Case, Makers, signing_keys
from tests.images import build_image, build_tree

HERE = Path(__file__).parent
TYPES = ("erofs", "squashfs", "ext4", "xfs", "btrfs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.kernel)


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A directory that is root's all the way up, and that everybody can enter."""
    path = Path(tempfile.mkdtemp(prefix="mountd-e2e-", dir="/var/lib"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def images(place: Path) -> dict[str, Path]:
    """One image of each file system in the trusted directory."""
    tree = build_tree(place / "tree")
    trusted = place / "trusted"
    trusted.mkdir(mode=0o755)
    made = {type: build_image(type, tree, trusted / f"{type}.raw") for type in TYPES}
    subprocess.run(["sync"], check=True)
    return made


def trusting(directory: Path, **grant: str) -> str:
    """A rule that trusts the images in `directory`; `grant` are TOML values that replace the usual ones."""
    fields = {
        "file-systems": '["erofs", "squashfs", "ext4", "xfs", "btrfs"]',
        "idmap": '["none", "namespace", "caller", "ranges"]',
    } | {name.replace("_", "-"): value for name, value in grant.items()}
    lines = "\n".join(f"  {name} = {value}" for name, value in fields.items())
    return f"""
[[rule]]
name = "trusted in the test"
image = {{ location = "{directory}/*" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
verdict = "allow"
  [rule.grant]
{lines}
"""


TMPFS_RULE = """
[[rule]]
name = "small tmpfs"
image = { kind = "tmpfs" }
caller = { any = true }
grant = { max-size = "8M", idmap = ["none", "namespace", "caller"] }
verdict = "allow"
"""


@pytest.fixture(scope="session")
def shared_daemon(place: Path, images: dict[str, Path]) -> Iterator[Daemon]:
    """One daemon for all tests that leave it as it was."""
    daemon = Daemon(place / "daemon", trusting(place / "trusted") + TMPFS_RULE)
    yield daemon
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


@pytest.fixture
def daemon(shared_daemon: Daemon) -> Iterator[Daemon]:
    """The shared daemon; what it holds is the same afterwards."""
    before = shared_daemon.settled()
    yield shared_daemon
    deadline = time.monotonic() + 5
    while (after := shared_daemon.held()) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert after == before, shared_daemon.log[-3000:]


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Daemon]]:
    """Start a daemon of one's own: start(policy, *arguments, **popen)."""
    started: list[Daemon] = []

    def begin(policy: str, *arguments: str, **run: object) -> Daemon:
        directory = Path(tempfile.mkdtemp(prefix="daemon-", dir=place))
        directory.chmod(0o755)
        started.append(Daemon(directory, policy, arguments, **run))
        return started[-1]

    yield begin
    for daemon in started:
        daemon.stop()
        assert "internal error" not in daemon.log, daemon.log
        shutil.rmtree(daemon.directory)


@pytest.fixture
def held() -> Iterator[list[OwnedFd]]:
    """Mounts that are dropped at the end."""
    mounts: list[OwnedFd] = []
    yield mounts
    for each in mounts:
        each.close()


@pytest.fixture
def containers() -> Iterator[None]:
    """A process that maps ids for containers."""
    with mapper():
        yield


@pytest.fixture(scope="session")
def installed(place: Path) -> Path:
    """The prefix of an installation by `make install`, for the system's own Python."""
    prefix = place / "usr"
    subprocess.run(["make", "-s", "install", f"PREFIX={prefix}"], cwd=ROOT, check=True)
    return prefix


@pytest.fixture(scope="session")
def makers(place: Path) -> Iterator[Makers]:
    """Signatures of all kinds, by keys that are in a directory which a policy may name."""
    with signing_keys(place / "keys") as made:
        yield made


@pytest.fixture(scope="session")
def data(place: Path) -> bytes:
    """An image that is where no rule trusts it."""
    tree = build_tree(place / "tree-trust")
    return build_image("erofs", tree, place / "trust.raw").read_bytes()


@pytest.fixture(scope="session")
def other(place: Path) -> bytes:
    """Another such image."""
    tree = build_tree(place / "tree-other")
    (tree / "hello").write_text("hello from another image\n")
    return build_image("erofs", tree, place / "other.raw").read_bytes()


@pytest.fixture
def begin(start: Callable[..., Daemon], data: bytes) -> Callable[[str], Case]:
    """Start a daemon of one's own with a policy, for that image."""
    return lambda policy: Case(start(policy), data)


@pytest.fixture
def clean(daemon: Daemon) -> Iterator[Store]:
    """The store of the shared daemon, empty before and after."""
    store = Store(daemon.directory / "state")
    empty(store)
    yield store
    empty(store)
