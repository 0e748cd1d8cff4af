"""The manual pages: clean, and complete, by what the programs, the interfaces and the policy have."""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from mountd.cli import mount_helper
from mountd.cli.mountctl import parser
from mountd.trust import policy_tool
from mountd.trust.options import ALLOWED
from mountd.trust.policy_tables import CallerTable, GrantTable, ImageTable, KeyTable, RequireTable, RuleTable

ROOT = Path(__file__).parents[2]
MAN = ROOT / "units/man"
PAGES = sorted(path.name for path in MAN.iterdir())
FIELD = r"MOUNTD_[A-Z_]+"


def text(page: str) -> str:
    """A page as it is read, without emphasis, on lines as long as they want."""
    command = ["groff", "-man", "-Tascii", "-P-cbou", "-rLL=1000n", "-rHY=0", MAN / page]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def words(page: str) -> set[str]:
    """Everything in a page that could be a name."""
    return set(re.findall(r"[A-Za-z0-9_.-]+", text(page)))


def plain(line: str) -> str:
    """A line of a page's source without what makes it look good."""
    line = re.sub(r"^\.[A-Z]{1,2} ", "", line)
    line = re.sub(r"\\f[A-Z]", "", line)
    return line.replace(r"\-", "-").replace(r"\ ", " ").replace('"', "")


def entries(page: str) -> Iterator[tuple[str, str, str]]:
    """The paragraphs with tags: the section that they are in, the tag, and the line after it."""
    section = ""
    lines = (MAN / page).read_text().splitlines()
    for at, line in enumerate(lines):
        if line.startswith((".SH ", ".SS ")):
            section = plain(line)
        elif line in (".TP", ".TQ"):
            yield section, plain(lines[at + 1]), plain(lines[at + 2])


def test_pages() -> None:
    assert [
        *("mount.mountd.8", "mountctl.1", "mountd-protocol.7"),
        *("mountd.8", "mountd.policy.5", "umount.mountd.8"),
    ] == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_formatters_have_nothing_to_say(page: str) -> None:
    commands = [["groff", "-man", "-ww", "-z", MAN / page]]
    commands.append(["man", "--warnings", "--local-file", "--encoding=utf8", "--troff", MAN / page])
    if shutil.which("mandoc"):
        commands.append(["mandoc", "-T", "lint", "-W", "warning", MAN / page])
    for command in commands:
        done = subprocess.run(command, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b""), command
    (MAN / page).read_text("ascii")


@pytest.mark.parametrize("page", PAGES)
def test_pages_that_are_referred_to_are_there(page: str) -> None:
    own = {f"{name}({section})" for name, _, section in (each.rpartition(".") for each in PAGES)}
    for found in re.findall(r"[a-z.-]*mount(?:d[a-z.-]*|ctl)\([1-8]\)", text(page)):
        assert found in own


def verbs_of(top: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """All verbs, and those below them, with their parsers."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                yield name, verb
                for below, each in verbs_of(verb):
                    yield f"{name} {below}", each


def all_verbs() -> dict[str, argparse.ArgumentParser]:
    own = {f"policy {name}": each for name, each in verbs_of(policy_tool.parser())}
    return dict(verbs_of(parser())) | own


def options_of(*parsers: argparse.ArgumentParser) -> set[str]:
    return {option for each in parsers for action in each._actions for option in action.option_strings}


def documented_options(page: str) -> set[str]:
    """The options that have a paragraph of their own."""
    tags = " ".join(tag for section, tag, _ in entries(page) if section != "EXIT STATUS")
    return set(re.findall(r"(?<![\w-])-{1,2}[A-Za-z][a-z-]*", tags))


def synopsis_options(page: str) -> set[str]:
    """The long options in the synopsis."""
    source = (MAN / page).read_text()
    lines = source[source.index(".SH SYNOPSIS") : source.index(".SH DESCRIPTION")].splitlines()
    return set(re.findall(r"(?<![\w-])--[a-z-]+", "\n".join(map(plain, lines))))


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith((".1", ".8"))])
def test_the_synopsis_has_no_option_of_its_own(page: str) -> None:
    assert "--help" in synopsis_options(page)
    assert synopsis_options(page) <= documented_options(page)


def test_every_verb_and_option_of_mountctl() -> None:
    verbs = all_verbs()
    sections = ("VERBS", "policy", "image")
    tags = [tag.split() for section, tag, _ in entries("mountctl.1") if section in sections]
    found = {" ".join(tag[:2]) if tag[0] in ("policy", "image") else tag[0] for tag in tags}
    assert found == verbs.keys() - {"policy", "image"}
    assert documented_options("mountctl.1") == options_of(parser(), *verbs.values())


def test_every_option_of_the_daemon() -> None:
    command = [sys.executable, "-m", "mountd.daemon.main", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    has = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", done.stdout, re.MULTILINE))
    assert "--policy-dir" in has
    assert documented_options("mountd.8") == has
    assert synopsis_options("mountd.8") == has


def test_every_option_of_the_mount_helper() -> None:
    page = words("mount.mountd.8")
    assert {name for name in page if re.fullmatch(r"mountd\.[a-z-]+", name)} - {
        *("mountd.access", "mountd.squashfs", "mountd.composefs", "mountd.policy")
    } == set(mount_helper.OWN) - {"mountd.access", "mountd.policy"}
    for name in mount_helper.OWN:
        assert f" {name}=" in text("mount.mountd.8")


def interfaces() -> str:
    return "".join(path.read_text() for path in sorted((ROOT / "protocol").glob("*.varlink")))


@pytest.mark.parametrize("kind", ["method", "error", "interface"])
def test_every_method_and_error_of_the_protocol(kind: str) -> None:
    declared = set(re.findall(rf"^{kind} ([A-Za-z.]+)", interfaces(), re.MULTILINE))
    found = [(section, tag) for section, tag, _ in entries("mountd-protocol.7")]
    if kind == "interface":
        sections = {section for section, _ in found if section.startswith("IO.")}
        assert sections == set(map(str.upper, declared))
    elif kind == "method":
        # Two interfaces may have methods of the same name.
        for path in sorted((ROOT / "protocol").glob("*.varlink")):
            own = set(re.findall(r"^method ([A-Za-z]+)", path.read_text(), re.MULTILINE))
            assert {tag for section, tag in found if section == path.stem.upper()} == own
    else:
        assert {tag for section, tag in found if section == "ERRORS"} == declared


def test_every_field_of_a_live_mount() -> None:
    source = (ROOT / "protocol/io.mountd.Mount.varlink").read_text()
    declared = re.search(r"^type LiveMount \((.*?)^\)", source, re.MULTILINE | re.DOTALL)
    assert declared is not None
    fields = set(re.findall(r"^  (\w+):", declared[1], re.MULTILINE)) | {"after", "next"}
    page = text("mountd-protocol.7")
    assert "maybeAttached" in fields
    assert fields <= set(re.findall(r"\w+", page[page.index(" List ") : page.index("IO.MOUNTD.IMAGES")]))


def keys_of(table: type[BaseModel]) -> set[str]:
    return {name.replace("_", "-") for name in table.model_fields}


@pytest.mark.parametrize(
    ("section", "table"),
    [
        *(("RULES", RuleTable), ("image", ImageTable), ("caller", CallerTable)),
        *(("require", RequireTable), ("grant", GrantTable), ("KEYS", KeyTable)),
    ],
)
def test_every_key_of_the_policy(section: str, table: type[BaseModel]) -> None:
    found: set[str] = set()
    for where, tag, _ in entries("mountd.policy.5"):
        if where == section:
            found |= set(re.findall(r"[a-z0-9-]+", tag))
    assert found == keys_of(table)


def test_every_option_that_can_be_granted() -> None:
    found = {
        tag: set(description.split(", "))
        for section, tag, description in entries("mountd.policy.5")
        if section == "MOUNT OPTIONS THAT CAN BE GRANTED"
    }
    assert found == {name: set(options) for name, options in ALLOWED.items()}


def test_every_field_of_the_journal_and_message_id() -> None:
    sources = {path: path.read_text() for path in (ROOT / "mountd").rglob("*.py")}
    journal = sources[ROOT / "mountd/daemon/journal.py"]
    ids = set(re.findall(r'^[A-Z]+_ID = "([0-9a-f]{32})"', journal, re.MULTILINE))
    assert ids
    assert ids <= words("mountd.8")
    notes = sources[ROOT / "mountd/service/context.py"]
    fields = re.findall(r'^ {12,16}"([a-z_]+)": (?:caller|decision|self\._file)', notes, re.MULTILINE)
    assert len(fields) > 10
    for source in sources.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "log":
                fields += [keyword.arg for keyword in node.keywords if keyword.arg]
            fields += notes_in(node)
    assert {"source", "target", "mount", "consent", "polkit_action"} <= set(fields)
    named = {f"MOUNTD_{field.upper()}" for field in fields if field != "message_id"}
    told = {
        found for section, tag, _ in entries("mountd.8") if section == "JOURNAL" for found in fields_in(tag)
    }
    assert told == named


def fields_in(tag: str) -> list[str]:
    return re.findall(FIELD, tag)


def notes_in(node: ast.AST) -> list[str]:
    """The fields that a statement notes about a request."""

    def about_notes(target: ast.expr) -> bool:
        return isinstance(target, ast.Attribute | ast.Name) and "notes" in ast.unparse(target).split(".")

    found: list[ast.expr | None] = []
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and about_notes(node.value):
        found = [node.slice]
    elif isinstance(node, ast.AugAssign) and about_notes(node.target) and isinstance(node.value, ast.Dict):
        found = node.value.keys
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("notes.setdefault"):
        found = list(node.args[:1])
    return [str(ast.literal_eval(each)) for each in found if each is not None]


def test_every_variable_of_the_environment() -> None:
    mentioned = set()
    for page in PAGES:
        mentioned |= set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", text(page)))
    read: set[str] = set()
    for path in (ROOT / "mountd").rglob("*.py"):
        source = path.read_text()
        read |= set(re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', source))
        read |= set(re.findall(r'"([A-Z_]+)" (?:not )?in os\.environ', source))
        read |= set(re.findall(r'^[A-Z_]+ = "(MOUNTD_[A-Z]+)"', source, re.MULTILINE))
    assert "MOUNTD_SOCKET" in read
    assert read - {"TERM", "COLUMNS"} <= mentioned
