"""mountctl doctor: whether everything is there that mountd needs, and what to do about what is not.

Everything is found out by trying. It works for root and for ordinary users, with and without a daemon; what
a user may not see is a warning that says so.
"""

from __future__ import annotations

from functools import partial

from mountd.cli.checks import FAIL, OK, WARN, Finding
from mountd.cli.doctor_policy import check_policy
from mountd.cli.doctor_system import (
    Places,
    check_daemon,
    check_kernel,
    check_permissions,
    check_polkit,
    check_programs,
    check_units,
    places,
)
from mountd.cli.report import printable, say, show_json
from mountd.cli.table import GREEN, RED, YELLOW, coloured, wants_colour
from mountd.errors import bug

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

EXIT = {OK: 0, WARN: 1, FAIL: 2}
COLOURS = {OK: GREEN, WARN: YELLOW, FAIL: RED}
CHECKS: tuple[tuple[str, Callable[[Places], list[Finding]]], ...] = (
    ("kernel", lambda _: check_kernel()),
    ("units", lambda _: check_units()),
    ("daemon", lambda _: check_daemon()),
    ("permissions", check_permissions),
    ("policy", lambda where: check_policy(where.policy)),
    ("programs", lambda _: check_programs()),
    ("polkit", lambda _: check_polkit()),
)


def doctor(options: argparse.Namespace) -> int:
    """Print one line for each check; the exit status is that of the worst of them."""
    where = places()
    findings = [finding for area, check in CHECKS for finding in examine(area, partial(check, where))]
    worst = max((finding.state for finding in findings), key=lambda state: EXIT[state], default=OK)
    if options.json:
        show_json({"state": worst, "checks": [each.as_json() for each in findings]})
    else:
        say("\n".join(line(each, colour=wants_colour()) for each in findings))
    return EXIT[worst]


def examine(area: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Return what a check has found, or why it could not be made."""
    try:
        found = check()
    except Exception as error:  # noqa: BLE001 - one check that fails must not hide the others
        found = [Finding("check", WARN, f"this could not be looked at: {bug(error)}")]
    for each in found:
        each.area = area
    return found


def line(finding: Finding, *, colour: bool) -> str:
    """Return a finding for people: its state, what was looked at, what was found, and the way out."""
    state = coloured(f"{finding.state:4}", COLOURS[finding.state], wanted=colour)
    fix = f" (fix: {finding.fix})" if finding.fix else ""
    return f"{state} {printable(f'{finding.area}: {finding.name}: {finding.text}{fix}')}"
