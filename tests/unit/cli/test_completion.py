"""Completion of mountctl in the real shells: what they offer is what mountctl has."""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mountd.cli.mountctl import parser
from mountd.trust import policy_tool

ROOT = Path(__file__).parents[3]
SHELLS = ("bash", "zsh", "fish")
SECONDS = 30
DIGEST = "sha256:" + "0123456789abcdef" * 4
SIGNER = {"digest": "sha256:" + "f" * 64}
STORE = json.dumps({"images": [{"digest": DIGEST, "name": "base", "signers": [SIGNER]}]})

BASH = r"""
. /usr/share/bash-completion/bash_completion
. "$1"
COMP_LINE=$2
COMP_POINT=${#COMP_LINE}
read -r -a COMP_WORDS <<< "$3"
[ -n "${COMP_LINE##* }" ] || COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_mountctl
printf '%s\n' "${COMPREPLY[@]}"
"""
# What is offered goes to a file: the terminal has colours, columns and questions.
ZSH = r"""
fpath=("$DIRECTORY" $fpath)
autoload -Uz compinit
compinit -u -d "$DIRECTORY/dump"
zstyle ':completion:*' insert-tab false
compadd() {
  if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]]; then
    builtin compadd "$@"
    return
  fi
  local -a offered
  builtin compadd -A offered "$@"
  (($#offered)) && print -rl -- $offered >> "$DIRECTORY/offered"
  builtin compadd "$@"
}
ended() { print >> "$DIRECTORY/ended"; exit }
comppostfuncs=(ended)
bindkey '^I' complete-word
print READY
"""


class Place:
    """A directory with files, and a mountctl that has one image in its store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "bin").mkdir()
        program = path / "bin/mountctl"
        program.write_text(f"#!/bin/sh\n[ \"$*\" = 'image list --json' ] && echo '{STORE}'\n")
        program.chmod(0o755)
        (path / "base.raw").write_text("")
        (path / "directory").mkdir()

    @property
    def run(self) -> dict[str, Any]:
        path = f"{self.path}/bin:/usr/bin:/bin"
        environment = {"PATH": path, "HOME": str(self.path), "LC_ALL": "C.UTF-8", "TERM": "vt100"}
        return {"cwd": self.path, "env": environment | {"DIRECTORY": str(self.path)}}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def bash(place: Place, line: str) -> list[str]:
    # As readline has it: it breaks words at colons and equal signs as well.
    words = re.sub(r"([:=])", r" \1 ", line)
    file = ROOT / "units/completion/mountctl.bash"
    command = ["bash", "--norc", "-c", BASH, "bash", file, line, words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True, **place.run)
    return [word.strip() for word in done.stdout.splitlines() if word.strip()]


def fish(place: Place, line: str) -> list[str]:
    script = f'source {ROOT}/units/completion/mountctl.fish; complete -C "{line}"'
    command = ["fish", "--no-config", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True, **place.run)
    assert done.stderr == ""
    return [offered.split("\t")[0] for offered in done.stdout.splitlines()]


def zsh(place: Place, line: str) -> list[str]:
    (place.path / "_mountctl").write_text((ROOT / "units/completion/mountctl.zsh").read_text())
    (place.path / "setup").write_text(ZSH)
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            ["zsh", "-f", "-i"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            **place.run,
        )
        os.close(theirs)
        seen = b""
        os.write(ours, b". ./setup\n")
        while b"\nREADY" not in seen:
            seen += os.read(ours, 4096)
        os.write(ours, f"{line}\t".encode())
        try:
            while not (place.path / "ended").exists():
                seen += os.read(ours, 4096)
        except OSError:
            pass  # it has ended
        assert process.wait(SECONDS) == 0, seen
    finally:
        os.close(ours)
    offered = place.path / "offered"
    return offered.read_text().splitlines() if offered.exists() else []


COMPLETE: dict[str, Callable[[Place, str], list[str]]] = {"bash": bash, "zsh": zsh, "fish": fish}


@pytest.fixture(params=SHELLS)
def complete(request: pytest.FixtureRequest, place: Place) -> Callable[[str], set[str]]:
    """Return what the shell offers for a line."""

    def ask(line: str) -> set[str]:
        for name in ("offered", "ended"):
            (place.path / name).unlink(missing_ok=True)
        return {word.rstrip("/ ") for word in COMPLETE[request.param](place, line)}

    return ask


def verbs_of(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the verbs below one."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def options_of(verb: argparse.ArgumentParser) -> set[str]:
    """The long options of a verb."""
    found = {option for action in verb._actions for option in action.option_strings}
    return {option for option in found if option.startswith("--")}


def all_verbs() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """All verbs without verbs below them, with their parsers."""
    for name, verb in verbs_of(parser()).items():
        inner = verbs_of(verb) | (verbs_of(policy_tool.parser()) if name == "policy" else {})
        for below, each in inner.items():
            yield f"{name} {below}", each
        if not inner:
            yield name, verb


def test_verbs(complete: Callable[[str], set[str]]) -> None:
    assert complete("mountctl ") - {"-h", "--help", "--version"} == set(verbs_of(parser()))


@pytest.mark.parametrize("verb", ["policy", "image"])
def test_verbs_below(complete: Callable[[str], set[str]], verb: str) -> None:
    known = {name.split()[1] for name, _ in all_verbs() if name.startswith(f"{verb} ")}
    assert complete(f"mountctl {verb} ") - {"-h", "--help"} == known


@pytest.mark.parametrize("name", [name for name, _ in all_verbs()])
def test_options(complete: Callable[[str], set[str]], name: str) -> None:
    verb = dict(all_verbs())[name]
    offered = {word for word in complete(f"mountctl {name} --") if word.startswith("--")}
    assert offered == options_of(verb)


def test_stored_digests(complete: Callable[[str], set[str]]) -> None:
    """Those of images, and not those that signatures are over."""
    digits = DIGEST.removeprefix("sha256:")
    offered = complete("mountctl image remove sha256:0")
    assert len(offered) == 1
    assert offered.pop().endswith(digits)
    offered = complete("mountctl mount stored:sha256:0")
    assert len(offered) == 1
    assert offered.pop().endswith(digits)


def test_files_and_directories(complete: Callable[[str], set[str]]) -> None:
    assert {"base.raw", "directory"} <= complete("mountctl explain ")
    assert "directory" in complete("mountctl mount base.raw d")
    offered = complete("mountctl umount ")
    assert "directory" in offered
    assert "base.raw" not in offered


@pytest.mark.parametrize("verb", ["mount", "run", "explain"])
def test_kinds_of_sources(complete: Callable[[str], set[str]], verb: str) -> None:
    assert {"stored:", "oci:", "composefs:", "tmpfs:"} <= complete(f"mountctl {verb} ")


def test_the_file_of_a_composefs(complete: Callable[[str], set[str]]) -> None:
    offered = complete("mountctl mount composefs:ba")
    assert {each.removeprefix("composefs:") for each in offered} == {"base.raw"}


def test_a_value_of_an_option(complete: Callable[[str], set[str]]) -> None:
    assert complete("mountctl mount --idmap ") == {"none", "namespace", "caller"}
