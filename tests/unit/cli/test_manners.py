"""The manners of mountctl: help with examples, one line for what is unknown, tables and bars."""

from __future__ import annotations

import argparse
import os
import pty
import sys
from collections.abc import Iterator

import pytest

from mountd.cli import doctor, table
from mountd.cli.checks import FAIL, OK, WARN, Finding
from mountd.cli.image import bar_of
from mountd.cli.mountctl import act, parse, parser
from mountd.cli.report import UsageError
from mountd.trust import policy_tool


def all_parsers(top: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, inner in action.choices.items():
                yield from all_parsers(inner, f"{name} {verb}")


PARSERS = [*all_parsers(parser(), "mountctl"), *all_parsers(policy_tool.parser(), "mountctl policy")]


@pytest.mark.parametrize(("name", "each"), PARSERS, ids=[name for name, _ in PARSERS])
def test_every_help_shows_examples_and_fits(name: str, each: argparse.ArgumentParser) -> None:
    if (name, each.add_help) == ("mountctl policy", False):
        return  # a program of its own, which comes later in the list
    text = each.format_help()
    assert "\nexamples:\n" in text
    assert f"  {name.split()[0]} {name.split()[1] if ' ' in name else ''}" in text
    assert max(len(line) for line in text.splitlines()) <= 109
    assert each.description


def test_the_exit_statuses_are_documented() -> None:
    text = parser().format_help()
    for status in ("0 done", "1 wrong usage", "2 mountd cannot be reached", "4 a bug", "8 inter", "32 the"):
        assert status in text


@pytest.mark.parametrize(
    ("line", "text", "nearest"),
    [
        ("statsu", "no verb “statsu”", "status"),
        ("image lst", "no verb “lst”", "list"),
        ("status --jsno", "no option “--jsno”", "--json"),
        ("explain --idmpa=none img", "no option “--idmpa”", "--idmap"),
        ("image gc --aeg 3", "no option “--aeg”", "--age"),
        ("qqqqq", "no verb “qqqqq”", None),
        ("image list more", "“more” is too much", None),
        ("explain --idmap ranges img", "“ranges” is none of its values", None),
    ],
)
def test_what_is_unknown(line: str, text: str, nearest: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        parse(line.split())
    assert text in caught.value.message
    hint = str(caught.value.hint)
    assert "--help" in hint
    assert (f"did you mean “{nearest}”?" in hint) == (nearest is not None)


def test_the_policy_tool_as_well(capfd: pytest.CaptureFixture[str]) -> None:
    assert policy_tool.main(["chekc"]) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "did you mean “check”?" in said


def test_wrong_usage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert act(["bogus\x1b"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "\x1b" not in said.err


class TestTable:
    """Tables that fit."""

    ROWS = (["short", "a much longer cell than the terminal is wide", "x"], ["s", "b", "yy"])

    def test_without_a_terminal_nothing_is_cut(self) -> None:
        text = table.table(list(self.ROWS), ["A", "B", "C"], width=None, colour=False)
        assert text.splitlines()[1] == "short  a much longer cell than the terminal is wide  x"
        assert all(line == line.rstrip() for line in text.splitlines())

    @pytest.mark.parametrize("width", [20, 30, 40, 80])
    def test_it_fits(self, width: int) -> None:
        text = table.table(list(self.ROWS), ["A", "B", "C"], width=width, colour=False)
        assert max(len(line) for line in text.splitlines()) <= width
        assert ("…" in text) == (width < 80)
        assert "short" in text, "the widest column is cut, not the others"

    @pytest.mark.parametrize("width", [None, 30, 60])
    def test_wide_characters(self, width: int | None) -> None:
        """Columns are those of the terminal: a wide character takes two, an accent by itself none."""
        names = ("文件系统" * 5, "e\u0301" * 10, "plain")
        text = table.table([[name, "x"] for name in names], ["NAME", "B"], width=width, colour=False)
        lines = text.splitlines()
        cells = [line.removesuffix("x").removesuffix("B") for line in lines]
        assert {table.columns_of(cell) for cell in cells} == {42 if width is None else min(width - 1, 42)}
        assert ("…" in text) == (width == 30)
        assert lines[2].count("e\u0301") == 10
        assert table.columns_of("文e\u0301x") == 4

    def test_one_that_cannot_fit_is_no_error(self) -> None:
        assert table.table(list(self.ROWS), ["A", "B", "C"], width=1, colour=False)

    def test_no_cell_upsets_the_terminal(self) -> None:
        text = table.table([["a\x1b[2J", "b\nc"]], ["A", "B"], width=None, colour=False)
        assert text == "A      B\na?[2J  b?c"

    def test_the_head_is_coloured_alone(self) -> None:
        text = table.table([["a"]], ["A"], width=None, colour=True)
        assert text == "\x1b[1mA\x1b[0m\na"

    def test_no_rows(self) -> None:
        assert table.table([], ["A", "B"], width=10, colour=False) == "A  B"


def test_colours_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import struct
    import termios

    assert not table.wants_colour(), "the output of a test is no terminal"
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("=HHHH", 24, 72, 0, 0))
        with open(theirs, "w", closefd=False) as terminal:
            monkeypatch.setattr(sys, "stdout", terminal)
            for term, no_color, wanted in (
                ("xterm", "", True),
                ("xterm", "1", False),
                ("dumb", "", False),
            ):
                monkeypatch.setenv("TERM", term)
                monkeypatch.setenv("NO_COLOR", no_color)
                assert table.wants_colour() is wanted
            assert table.terminal_width() == 72
            monkeypatch.undo()
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(
    ("done", "total", "columns", "bar"),
    [
        (0, 10, 10, "[----------] "),
        (5, 10, 10, "[#####-----] "),
        (10, 10, 10, "[##########] "),
        (20, 10, 10, "[##########] "),
        (1, 3, 4, ""),
        (1, 3, -7, ""),
        (1, 2, 500, f"[{'#' * 15}{'-' * 15}] "),
    ],
)
def test_bars(done: int, total: int, columns: int, bar: str) -> None:
    assert bar_of(done, total, columns) == bar


class TestDoctor:
    """The lines, and a check that cannot be made."""

    def test_lines(self) -> None:
        finding = Finding("n", FAIL, "t\x1b", "f")
        finding.area = "a"
        assert doctor.line(finding, colour=False) == "fail a: n: t? (fix: f)"
        assert doctor.line(finding, colour=True) == "\x1b[31mfail\x1b[0m a: n: t? (fix: f)"
        assert doctor.line(Finding("n", OK, "t"), colour=False).startswith("ok   ")

    def test_a_check_that_raises_is_a_warning(self) -> None:
        def bad() -> list[Finding]:
            raise ZeroDivisionError("x")

        (found,) = doctor.examine("area", bad)
        assert (found.area, found.state) == ("area", WARN)
        assert "ZeroDivisionError" in found.text
