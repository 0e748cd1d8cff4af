"""A plugin of the pytest in the virtual machine: tells the host of each test at once, one JSON a line."""

from __future__ import annotations

import json

import pytest

PORT = "/dev/ttyS1"
MAXIMUM_TEXT = 20000  # a serial line is slow


def tell(**what: object) -> None:
    """Write one line and have it out before going on: the next step may be the machine's last."""
    with open(PORT, "w") as port:
        port.write(json.dumps(what) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    tell(test=nodeid, outcome="running")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        text = "\n".join([report.longreprtext, *(f"{name}:\n{body}" for name, body in report.sections)])
        tell(test=report.nodeid, outcome=report.outcome, when=report.when, text=text[-MAXIMUM_TEXT:])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        tell(test=report.nodeid, outcome="failed", when="collect", text=report.longreprtext[-MAXIMUM_TEXT:])


def pytest_sessionfinish(exitstatus: int) -> None:
    tell(exit=int(exitstatus))
