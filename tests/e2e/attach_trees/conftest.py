"""A daemon that attaches disk images with several partitions for users."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.kernel.mount_info import listmount
from tests.disks import Part, build_disk
from tests.e2e.attach_trees.asking import TINA, Scene
from tests.e2e.attaching import User, granting, records, user_of
from tests.e2e.conftest import trusting
from tests.e2e.trees import build_contents, build_tree_disk
from tests.images import build_image


@pytest.fixture(scope="package")
def contents(place: Path, images: dict[str, Path]) -> dict[str, Path]:
    """File systems for partitions, each with a file that names it."""
    return build_contents(place / "parts-of-trees")


@pytest.fixture(scope="package")
def disk(place: Path, contents: dict[str, Path]) -> Path:
    """An image with a partition of each kind, in an order that is not the one of attaching."""
    return build_tree_disk(place / "trusted/tree.raw", contents)


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
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
