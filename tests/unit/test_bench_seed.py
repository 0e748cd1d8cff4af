"""What `make bench-seed` makes of its measurements, and the tree that it measures."""

from __future__ import annotations

import ast
import os
import stat
from pathlib import Path

import pytest

from tests.bench.seed.figures import (
    BEGIN,
    END,
    Pairs,
    Row,
    chart,
    markdown_table,
    replaced,
    text_table,
    verdict,
)
from tests.bench.seed.tree import CONTENTS, Copied, copy_tree, share_of

ROOT = Path(__file__).parents[2]


def row(name: str = "erofs", factor: float = 1.0) -> Row:
    """A row in which mountd is slower by `factor`, measured while other load came and went."""
    made = Row(name)
    for pairs, value in ((made.cold, 2.0), (made.warm, 0.5), (made.memory, 100.0)):
        for load in (1.0, 5.0, 1.0, 3.0, 1.1):
            pairs.direct.append(value * load)
            pairs.mountd.append(value * load * factor)
    return made


def test_the_ratio_is_of_pairs_and_not_of_different_moments() -> None:
    """More than half of the time the machine is ten times slower, and one value is off: no harm is done."""
    pairs = Pairs([1.0, 1.0, 10.0, 10.0, 10.0], [1.02, 1.02, 10.2, 1.0, 10.2])
    assert pairs.ratio() == pytest.approx(1.02)
    assert pairs.medians() == (10.0, 1.02)


def test_what_is_not_of_pairs_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="zip"):
        Pairs([1.0, 2.0], [1.0]).ratio()


@pytest.mark.parametrize(("factor", "exceeding"), [(1.0, 0), (1.049, 0), (1.051, 3), (0.5, 0)])
def test_what_exceeds_the_bound(factor: float, exceeding: int) -> None:
    assert len(row(factor=factor).exceeding()) == exceeding


def test_each_quantity_is_judged() -> None:
    slow = row()
    slow.memory.mountd = [2 * value for value in slow.memory.direct]
    assert slow.exceeding() == ["memory"]
    assert verdict([row(), slow]) == "More than 1.05 in this run: erofs, memory."
    assert verdict([row()]) == "More than 1.05 in this run: none."


def test_noise_is_of_the_middle_half() -> None:
    assert Pairs([10.0, 9.0, 11.0, 1000.0, 10.0], []).noise() == pytest.approx(0.1)
    assert Pairs([10.0], []).noise() == 0.0


def test_tables_have_a_line_for_each_row_and_say_what_is_missing() -> None:
    rows = [row("plain"), row("slow", 1.5), Row("composefs", missing="not built")]
    text = text_table(rows).splitlines()
    assert [line.split()[0] for line in text[2:]] == ["plain", "slow", "composefs"]
    assert text[3].split().count("1.500") == 3
    assert text[4].endswith("not built")
    lines = markdown_table(rows).splitlines()
    assert {line.count("|") for line in lines} == {11}
    assert lines[2] == "| plain | 2.200 | 2.200 | 1.000 | 0.550 | 0.550 | 1.000 | 110 | 110 | 1.000 |"
    assert rows[2].exceeding() == []


def test_the_plot_has_the_medians_of_what_was_measured() -> None:
    cold, warm, memory = chart([row("plain"), row("slow", 2.0), Row("composefs", missing="not built")])
    assert cold["names"] == warm["names"] == memory["names"] == ["plain", "slow"]
    assert (cold["direct"], cold["mountd"]) == ([2.2, 2.2], [2.2, 4.4])
    assert memory["mountd"] == pytest.approx([110.0, 220.0])


def test_only_the_one_place_is_replaced() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = replaced(text, "new\n")
    assert new == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert replaced(new, "new") == new
    for wrong in ("nothing", BEGIN, END + BEGIN, text + text):
        with pytest.raises(ValueError, match="no one place"):
            replaced(wrong, "new")


def test_the_readme_has_the_place() -> None:
    assert "new" in replaced((ROOT / "README.md").read_text(), "new")


def test_the_plot_is_drawn_by_a_python_that_has_nothing_of_ours() -> None:
    """It is run by the system's, which has matplotlib, and not in the virtual environment."""
    tree = ast.parse((ROOT / "tests/bench/seed/plot.py").read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [each.name for each in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {"__future__", "json", "sys", "matplotlib"}


def test_a_part_of_a_tree_has_something_of_each_directory() -> None:
    paths = [f"{top}/{number}" for top in ("bin", "lib", "share") for number in range(100)]
    assert share_of(paths, 300) == paths
    assert share_of(paths, 9) == [
        f"{top}/{number}" for top in ("bin", "lib", "share") for number in range(3)
    ]


def test_the_copy_is_like_the_original(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "directory").mkdir(parents=True)
    (source / "directory/large").write_bytes(b"x" * (CONTENTS + 1))
    (source / "directory/set-uid").touch(0o755)
    (source / "directory/set-uid").chmod(0o4755)
    os.link(source / "directory/large", source / "linked")
    (source / "link").symlink_to("directory/large")
    os.mkfifo(source / "pipe")
    os.setxattr(source / "linked", "user.kind", b"large")
    os.utime(source / "directory", ns=(1, 2))
    target = tmp_path / "target"
    assert copy_tree(source, target, 100) == Copied(5, 5)
    assert sorted(os.listdir(target)) == ["directory", "link", "linked"]
    assert (target / "linked").samefile(target / "directory/large")
    assert (target / "linked").stat().st_size == CONTENTS
    assert os.getxattr(target / "linked", "user.kind") == b"large"
    assert os.readlink(target / "link") == "directory/large"
    assert stat.S_IMODE((target / "directory/set-uid").stat().st_mode) == 0o4755
    assert (target / "directory").stat().st_mtime_ns == 2
