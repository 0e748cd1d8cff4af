"""“mountctl policy”: a program of its own, as it needs packages that this side does without."""

from __future__ import annotations

import os
import sys

import mountd
from mountd.cli.report import EXIT_USAGE, fail
from mountd.errors import NotSupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

# -I: nothing in the environment or the current directory has a say in what is imported; but, unlike for
# mountctl itself, the system's packages are.
FLAGS = "-I"
NAME = "mountctl policy"
PROGRAM = """\
import sys
sys.path.insert(0, sys.argv.pop(1))
try:
    from mountd.trust.policy_tool import main
    status = main()
except ImportError as error:
    from mountd.cli.policy import lacking
    status = lacking(error, sys.argv[1:])
except KeyboardInterrupt:
    status = 8
sys.exit(status)
"""


def command(arguments: Sequence[str]) -> list[str]:
    """Return the command of the same installation, run by the same Python."""
    python = sys.executable or "/usr/bin/python3"
    package = os.path.dirname(os.path.abspath(mountd.__file__ or ""))
    return [python, FLAGS, "-c", PROGRAM, os.path.dirname(package), *arguments]


def become_policy_tool(arguments: Sequence[str]) -> NoReturn:
    """Run it in the place of this process. Raises OSError."""
    whole = command(arguments)
    os.execv(whole[0], whole)


def lacking(error: ImportError, arguments: Sequence[str]) -> int:
    """Report, in that program, that there is a package missing, and return the exit status."""
    hint = f"install it for {sys.executable or 'this Python'}: on Debian it is python3-pydantic"
    missing = NotSupported(f"policies, as a package of mountd is missing: {error}", hint=hint)
    fail(NAME, missing, as_json="--json" in arguments)
    return EXIT_USAGE  # whoever checks a policy is to take it for unchecked
