"""Images made by the distribution's own tools, and a scratch directory that is root's all the way up."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.store.store import Store
from tests.images import build_image, build_tree

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.kernel)


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A directory whose every component is root's and writable by nobody else, unlike /tmp."""
    path = Path(tempfile.mkdtemp(prefix="mountd-test-", dir="/var/lib"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def tree(scratch: Path) -> Path:
    """A small directory tree with a set-uid file and a device node in it."""
    return build_tree(scratch / "tree")


@pytest.fixture(scope="session")
def images(scratch: Path, tree: Path) -> dict[str, Path]:
    """One image of each file system, made from the tree."""
    made = {}
    for type in ("erofs", "squashfs", "ext4", "xfs", "btrfs"):
        made[type] = build_image(type, tree, scratch / f"{type}.img")
    subprocess.run(["sync"], check=True)
    return made


@pytest.fixture
def home(scratch: Path, request: pytest.FixtureRequest) -> Path:
    """The directory that the state directory is in."""
    path = scratch / f"store-{request.node.name[:60].replace('/', '_')}"
    path.mkdir()
    return path


@pytest.fixture
def store(home: Path) -> Store:
    """An empty store, in `home`/state."""
    made = Store(home / "state")
    made.prepare()
    return made
