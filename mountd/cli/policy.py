"""“mountctl policy”: a program of its own, as it needs packages that this side does without."""

from __future__ import annotations

import os
import sys

import mountd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

# -I: nothing in the environment or the current directory has a say in what is imported; but, unlike for
# mountctl itself, the system's packages are.
FLAGS = "-I"
PROGRAM = """\
import sys
sys.path.insert(0, sys.argv.pop(1))
try:
    from mountd.trust.policy_tool import main
    status = main()
except ImportError as error:
    status = f"mountctl policy: a package of mountd is missing: {error}"
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
