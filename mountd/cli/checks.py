"""What the checks of mountctl doctor have in common: findings, programs, and who owns a file."""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

OK, WARN, FAIL = "ok", "warn", "fail"
SECONDS = 20  # for a program
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Finding:
    """One line of the report: `state` is OK, WARN or FAIL, `fix` what to do if it is not OK."""

    __slots__ = ("area", "fix", "name", "state", "text")

    def __init__(self, name: str, state: str, text: str, fix: str = "") -> None:
        """`area` is filled in by who asked for it."""
        self.area = ""
        self.name = name
        self.state = state
        self.text = text
        self.fix = fix

    def as_json(self) -> dict[str, object]:
        """Return it for programs."""
        return {
            "area": self.area,
            "name": self.name,
            "state": self.state,
            "text": self.text,
            "fix": self.fix or None,
        }


def is_root() -> bool:
    """Tell whether this is root, of whatever."""
    return os.geteuid() == 0


def which(program: str) -> str | None:
    """Return the path of a program where mountd's own are looked for, None if it is not there."""
    for directory in PATH.split(":"):
        path = os.path.join(directory, program)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def output(command: Sequence[str]) -> tuple[int, str, str]:
    """Run a program that only asks; return its exit status, its output, and what it complains of.

    Raises OSError, TimeoutError.
    """
    import subprocess

    environment = {"PATH": PATH, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
            env=environment,
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]} has not ended after {SECONDS} seconds") from None
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def not_roots(path: str) -> str | None:
    """Return why somebody else than root could change what `path` is, None if nobody can. Raises OSError.

    Every component counts, and so does a link among them.
    """
    at = "/"
    for name in ["", *path.strip("/").split("/")]:
        at = os.path.join(at, name)
        status = os.lstat(at)
        if status.st_uid != 0:
            return f"{at} belongs to uid {status.st_uid}"
        if stat.S_ISLNK(status.st_mode):
            target = not_roots(os.path.realpath(at))
            if target is not None:
                return target
        elif status.st_mode & 0o022 and not (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
            return f"{at} can be written to by its group or by others"
    return None
