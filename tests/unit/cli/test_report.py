"""What users are told, and with which exit status."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd import errors
from mountd.cli import report
from mountd.cli.container import CannotRun

ROOT = Path(__file__).parents[3]


def bug() -> int:
    raise KeyError("x\n")


def secret() -> int:
    b"p\xe4ss".decode()
    raise AssertionError


def interrupt() -> int:
    raise KeyboardInterrupt


def missing() -> int:
    raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/a\x1b[2J")


MOVE = errors.SyscallError(errno.EPERM, "move_mount(/mnt)")
STATUS: list[tuple[BaseException, int]] = [
    (errors.DeniedByPolicy("no"), 1),
    (errors.NotImmutable("no"), 1),
    (errors.InteractiveAuthenticationRequired(), 1),
    (errors.SignatureInvalid("no"), 1),
    (errors.KeyUnknown("no"), 1),
    (errors.KeyRequired("no"), 1),
    (errors.WrongKey("no"), 1),
    (errors.OptionNotPermitted("x"), 1),
    (errors.UserNamespaceNotPermitted("no"), 1),
    (errors.AttachNotPermitted("no"), 1),
    (errors.BadFileDescriptor("x", "no"), 1),
    (errors.InvalidParameter("x"), 1),
    (errors.NotFound("x"), 1),
    (PermissionError(errno.EACCES, "Permission denied"), 1),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory"), 1),
    (errors.Unreachable("no"), 2),
    (errors.ShuttingDown(), 2),
    (errors.TimedOut(3), 2),
    (errors.PeerGone("no"), 2),
    (errors.LimitExceeded("mounts", 3), 2),
    (errors.ProtocolError("no"), 2),
    (errors.RegistryFailed("h", "no"), 2),
    (errors.StorageFull("no"), 2),
    (OSError(errno.EMFILE, "Too many open files"), 2),
    (errors.MountFailed("fsconfig", "EINVAL"), 32),
    (MOVE, 32),
    (errors.UnsupportedFileSystem("no"), 32),
    (errors.InvalidImage("no"), 32),
    (errors.NotSupported("x"), 32),
    (errors.InUse("x"), 32),
    (errors.AttachNotPermitted("no"), 1),
    (errors.RemoteError("io.mountd.Mount.Later", {}), 32),
    (CannotRun("x", errno.ENOENT), 127),
    (CannotRun("x", errno.EACCES), 126),
]


@pytest.mark.parametrize(("error", "status"), STATUS, ids=lambda value: type(value).__name__)
def test_exit_status(error: BaseException, status: int) -> None:
    assert report.exit_status(error) == status


def test_every_error_has_an_exit_status_in_the_table() -> None:
    known = {type(error) for error, _ in STATUS}
    assert {cls for cls in errors.MountdError.__subclasses__() if cls.__module__ == "mountd.errors"} <= known


@pytest.mark.parametrize(
    ("error", "text", "hint"),
    [
        (errors.NotFound("/x", hint="make it"), "not found: /x", "make it"),
        (MOVE, "move_mount(/mnt): EPERM (Operation not permitted)", report.ATTACHING),
        (errors.SyscallError(errno.EPERM, "setns(3)"), "setns(3): EPERM (Operation not permitted)", None),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "/x"),
            "/x: No such file",
            "see that the path is right",
        ),
        (OSError(errno.EIO, "Input/output error", b"/\xff"), "/\udcff: Input/output error", None),
        (OSError(errno.EIO, "Input/output error"), "Input/output error", None),
        (OSError("bare"), "bare", None),
    ],
)
def test_explain_error(error: BaseException, text: str, hint: str | None) -> None:
    assert report.explain_error(error) == (text, hint)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain “text”", "plain “text”"), ("a\nb\x1b[0m\x7f", "a?b?[0m?"), ("\udcff\u202e", "??"), ("", "")],
)
def test_printable(text: str, shown: str) -> None:
    assert report.printable(text) == shown


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("", "p: not found: /x (hint: h)\n"),
        ("/mnt", "p: /mnt: not found: /x (hint: h)\n"),
        ("/x", "p: not found: /x (hint: h)\n"),
    ],
)
def test_fail(capsys: pytest.CaptureFixture[str], where: str, line: str) -> None:
    assert report.fail("p", errors.NotFound("/x", hint="h"), where=where, as_json=True) == 1
    said = capsys.readouterr()
    assert said.err == line
    assert json.loads(said.out) == {
        "error": "NotFound",
        "message": "not found: /x",
        "hint": "h",
        "parameters": {"what": "/x", "hint": "h"},
    }


@pytest.mark.parametrize(
    ("work", "status", "line"),
    [
        (lambda: 0, 0, ""),
        (lambda: 5, 5, ""),
        (interrupt, 8, ""),
        (missing, 1, "p: /a?[2J: No such file or directory (hint: see that the path is right)\n"),
        (bug, 4, "p: this is a bug of mountd, please report it: KeyError('x\\n')\n"),
        (
            secret,
            4,
            "p: this is a bug of mountd, please report it: UnicodeDecodeError: invalid continuation byte\n",
        ),
    ],
)
def test_end(capsys: pytest.CaptureFixture[str], work: Callable[[], int], status: int, line: str) -> None:
    with pytest.raises(SystemExit) as ended:
        report.end("p", work)
    assert ended.value.code == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("closed", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_nothing_is_opened_as_a_standard_descriptor(closed: tuple[int, ...]) -> None:
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from mountd.cli.report import end
end("p", lambda: os.open("/", os.O_RDONLY))
"""

    def close() -> None:
        for fd in closed:
            os.close(fd)

    run = subprocess.run([sys.executable, "-IS", "-c", program], preexec_fn=close, timeout=20, check=False)
    assert run.returncode == 3


def test_json_of_undecodable_names_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"a\xff\xf0")
    report.show_json({"name": name})
    assert json.loads(capsys.readouterr().out) == {"name": name}
