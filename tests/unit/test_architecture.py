"""Who may import whom: the one-way route of a request, as a test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mountd"
MAXIMUM_LINES = 500
MAXIMUM_FUNCTION_LINES = 60

LEAN = {"fds", "errors", "version"}
# Room -> the rooms it may import besides itself. Models are facts and may be read by every later step.
ALLOWED = {
    "kernel": LEAN,
    "wire": LEAN,
    "caller": LEAN | {"kernel"},
    "source": LEAN | {"kernel", "caller.model"},
    "evidence": LEAN | {"kernel", "caller.model", "source.model"},
    "trust": LEAN | {"caller.model", "source.model", "evidence.model"},
    # Records hold facts of the models; what an image is, the caller of the store finds out.
    "store": LEAN | {"kernel", "source.model", "evidence.model"},
    # The flags are names for numbers, and pure.
    "ledger": LEAN | {"kernel"},
    "plan": LEAN | {"kernel.flags", "caller.model", "source.model", "evidence.model", "trust"},
    "execute": LEAN | {"kernel", "plan"},
    "service": LEAN
    # As a client, of the instance that pulls.
    | {
        "kernel",
        "wire",
        "client",
        "caller",
        "source",
        "evidence",
        "trust",
        "plan",
        "execute",
        "store",
        "ledger",
    },
    "daemon": LEAN | {"kernel", "wire", "caller", "trust", "execute", "service", "store", "ledger"},
    "request": LEAN | {"wire.framing"},
    "asking": LEAN | {"kernel", "wire.framing", "request"},
    "client": LEAN | {"kernel", "wire.rebuilding", "request", "asking"},
    "cli": LEAN | {"kernel", "wire.framing", "client", "request", "asking"},
    "errors": set(),
    "fds": set(),
    "version": set(),
    "__init__": set(),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The modules of mountd that a file imports, as dotted names below the package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mountd":
            inner = node.module.split(".")[1:]
            names |= {".".join([*inner, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("mountd.") for a in node.names if a.name.startswith("mountd.")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    own = room(path)
    allowed = ALLOWED[own] | {own}
    for name in imported(path):
        assert any(name == ok or name.startswith(ok + ".") for ok in allowed), f"{own} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ctypes_stays_in_its_room(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert room(path) == "kernel" or not any(name.split(".")[0] == "ctypes" for name in names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAXIMUM_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAXIMUM_FUNCTION_LINES, f"{path}: {node.name}"


def test_importing_the_package_costs_nothing() -> None:
    assert (PACKAGE / "__init__.py").read_text() == ""
