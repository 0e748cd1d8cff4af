"""“mountctl policy”: checking, showing and describing policy files, without the daemon.

A program of its own, which mountctl becomes: it needs the packages that mountctl does without.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mountd.trust.directories import POLICY_DIRS
from mountd.trust.options import shown
from mountd.trust.policy_file import Loader
from mountd.trust.policy_lint import lint
from mountd.trust.policy_tables import PolicyTable
from mountd.trust.policy_text import as_toml, entries
from mountd.trust.root_files import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mountd.trust.policy_file import Loaded

PROGRAM = "mountctl policy"
EXIT_ERRORS = 1  # as for all that mountctl refuses: wrong usage as well
EXIT_OUTPUT = 2
MAXIMUM_MESSAGE = 4096
DENIED = os.strerror(errno.EACCES)
EXAMPLES = """\
examples:
  mountctl policy check
  mountctl policy check ./policy.d
  mountctl policy show --json
  mountctl policy schema > mountd-policy.schema.json
  mountctl policy reload

“reload” has the daemon read the policy again, and says what is wrong with it.

exit status: 0 if nothing is wrong, whatever the warnings; 1 if there are errors or the usage is wrong.
"""


class Wrong(Exception):
    """The command line cannot be understood."""

    def __init__(self, message: str, hint: str) -> None:
        """The hint is the way out."""
        super().__init__(message)
        self.message = message
        self.hint = hint


class Parser(argparse.ArgumentParser):
    """One line for an error, as the other verbs of mountctl have it."""

    def error(self, message: str) -> NoReturn:
        """Raise Wrong."""
        raise Wrong(message, f"see “{self.prog} --help”")

    def _print_message(self, message: str, file: object = None) -> None:
        """Print help at once. Raises OSError."""
        say(message.removesuffix("\n"))

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            known = [*map(str, action.choices), "reload"]
            nearest = difflib.get_close_matches(str(value), known, 1)
            meant = f"did you mean “{nearest[0]}”? " if nearest else ""
            raise Wrong(f"there is no verb “{value}”", f"{meant}see “{self.prog} --help”")


def parser() -> Parser:
    """Return the parser of the command line."""
    top = Parser(
        prog=PROGRAM,
        description="Check and show the policy that says which images whom may mount.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in (
        ("check", "say what is wrong with policy files, and which rules can never match"),
        ("show", "print all rules and keys in the order in which they are tried, with their origins"),
    ):
        verb = add_verb(verbs, name, text, (f"mountctl policy {name}", f"mountctl policy {name} ./policy.d"))
        verb.add_argument("--json", action="store_true", help="print JSON, for errors as well")
        verb.add_argument(
            "directories",
            metavar="DIR",
            nargs="*",
            type=Path,
            help="the first has precedence; your own files are accepted there. default: the system's policy",
        )
    examples = ("mountctl policy schema > mountd-policy.schema.json",)
    add_verb(verbs, "schema", "print the JSON Schema of policy files", examples)
    return top


def add_verb(verbs: Any, name: str, text: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """Add a verb whose help shows examples."""
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=text,
        description=f"{text[:1].upper()}{text[1:]}.",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return verb


def say(text: str, fd: int = 1) -> None:
    """Write a text and a newline. Raises OSError; who has read enough is none."""
    data = f"{text}\n".encode(errors="backslashreplace")
    try:
        while data:
            data = data[os.write(fd, data) :]
    except BrokenPipeError:
        pass


def read(directories: Sequence[Path]) -> Loaded:
    """Read the policy of `directories`, or the system's."""
    own = frozenset({os.geteuid()})
    # What somebody writes in a directory of one's own is not root's before it is installed; but where the
    # daemon reads from, it has to be.
    if not directories or any(each.resolve() in POLICY_DIRS for each in directories):
        own = ROOT
    return Loader(owners=ROOT | own).load(directories or POLICY_DIRS)


def check(options: argparse.Namespace) -> int:
    """Print all errors and warnings; the exit status is 0 if there are no errors."""
    loaded = read(options.directories)
    errors = all_errors(options.directories, loaded)
    found = [*errors, *warnings(loaded, whole=not errors)]
    if options.json:
        say(json.dumps(found, ensure_ascii=False))
    elif found:
        say("\n".join(as_line(each) for each in found))
    return EXIT_ERRORS if errors else 0


def all_errors(directories: Sequence[Path], loaded: Loaded) -> list[dict[str, object]]:
    """Return what is wrong: of the directories, only the system's own need not be there."""
    found = []
    for each in directories:
        with suppress(OSError):  # which whoever has read it has noted
            if not each.is_dir():
                found.append(finding("error", str(each), None, "", "there is no such directory"))
    for problem in loaded.problems:
        reason = f"{DENIED}; look at it as its owner or root" if problem.reason == DENIED else problem.reason
        found.append(finding("error", problem.file, problem.line, problem.key, reason))
    return found


def warnings(loaded: Loaded, *, whole: bool) -> Iterator[dict[str, object]]:
    """Return what can never be; of a policy that is not `whole`, it cannot be said what is missing."""
    for each in lint(loaded.policy) if whole else ():
        placed = loaded.rules.get(each.rule or "") or loaded.keys.get(each.named_key or "")
        if placed is None:
            yield finding("warning", "", None, "", each.reason)
            continue
        at = placed.drop_in.line(*placed.path, *each.key.split(".")) if each.key else placed.line
        key = f"key.{each.named_key}" if each.rule is None else f"rule {int(placed.path[1]) + 1}"
        key += f": {each.key}" if each.key else ""
        yield finding("warning", placed.drop_in.file, at, key, each.reason)
    for rule in loaded.policy.rules:
        placed = loaded.rules[rule.name]
        for pattern in rule.image.location:
            link = link_in(pattern)
            if link is not None:
                yield finding(
                    "warning",
                    placed.drop_in.file,
                    placed.drop_in.line(*placed.path, "image", "location"),
                    f"rule {int(placed.path[1]) + 1}: image.location",
                    f"“{pattern}” can never match: {link} is a symbolic link; write the path it leads to",
                )


def link_in(pattern: str) -> str | None:
    """Return the first symbolic link among the directories that `pattern` names, None if there is none.

    Where an image lies is a path without links, so that a pattern through one matches nothing.
    """
    at = Path("/")
    for name in pattern.split("/")[1:-1]:
        if any(character in name for character in "*?["):
            return None
        at /= name
        try:
            if at.is_symlink():
                return str(at)
        except OSError:
            return None
    return None


def finding(level: str, file: str, line: int | None, key: str, reason: str) -> dict[str, object]:
    """Return an error or a warning."""
    return {"level": level, "file": file, "line": line, "key": key, "reason": reason}


def as_line(each: dict[str, object]) -> str:
    """Return an error or a warning as "FILE:LINE: KEY: REASON"."""
    where = f"{each['file']}:{each['line']}" if each["line"] is not None else str(each["file"])
    level = "warning" if each["level"] == "warning" else ""
    parts = (where, level, str(each["key"]), str(each["reason"]))
    return shown(": ".join(part for part in parts if part), MAXIMUM_MESSAGE)


def show(options: argparse.Namespace) -> int:
    """Print the policy that is in force; of a broken one, what is wrong."""
    loaded = read(options.directories)
    if errors := all_errors(options.directories, loaded):
        for each in errors:
            say(as_line(each), 2)
        if options.json:
            message = f"the policy is broken: {as_line(errors[0])}"
            say_error("InvalidPolicy", message, "“mountctl policy check” says all that is wrong", errors)
        return EXIT_ERRORS
    if options.json:
        say(json.dumps(entries(loaded), ensure_ascii=False))
    elif loaded.rules or loaded.keys:
        say(as_toml(loaded))
    else:
        say("# There are no rules: everything is denied.")
    return 0


def schema(_: argparse.Namespace) -> int:
    """Print the JSON Schema of a policy file."""
    described = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **PolicyTable.model_json_schema(by_alias=True),
        "title": "mountd policy file",
    }
    say(json.dumps(described, ensure_ascii=False, indent=2))
    return 0


VERBS = {"check": check, "show": show, "schema": schema}


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says, and return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    try:
        options = parser().parse_args(words)
        return VERBS[options.verb](options)
    except Wrong as problem:
        fail("UsageError", problem.message, problem.hint, as_json="--json" in words)
        return EXIT_ERRORS
    except OSError as problem:
        where = "" if problem.filename is None else f"{os.fsdecode(problem.filename)}: "
        fail(type(problem).__name__, f"{where}{problem.strerror}", None, as_json="--json" in words)
        return EXIT_OUTPUT


def fail(name: str, message: str, hint: str | None, *, as_json: bool) -> None:
    """Say what is wrong in one line, and in JSON as every verb of mountctl has it (error.schema.json)."""
    message = shown(message, MAXIMUM_MESSAGE)
    say(f"{PROGRAM}: {message}" + ("" if hint is None else f" (hint: {hint})"), 2)
    if as_json:
        with suppress(OSError):  # it may be that nothing can be written there
            say_error(name, message, hint)


def say_error(name: str, message: str, hint: str | None, faults: Sequence[object] = ()) -> None:
    """Print an error as JSON. Raises OSError."""
    parameters = ({"faults": faults} if faults else {}) | ({} if hint is None else {"hint": hint})
    said = {"error": name, "message": message, "hint": hint, "parameters": parameters}
    say(json.dumps(said))
