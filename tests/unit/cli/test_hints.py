"""Every error that a command line can end with says what to do about it."""

from __future__ import annotations

import errno
import os

import pytest

from mountd import errors
from mountd.cli import report
from mountd.cli.helper import Place
from mountd.cli.mountctl import parse
from mountd.errors import MountdError, NotFound, SyscallError
from mountd.request import Request

LEAST: dict[type[MountdError], tuple[object, ...]] = {
    errors.AmbiguousRoot: (),
    errors.BadFileDescriptor: ("targetFileDescriptor", "it is not a directory"),
    errors.InteractiveAuthenticationRequired: (),
    errors.LimitExceeded: ("mounts", 3),
    errors.MountFailed: ("fsconfig", "EINVAL"),
    errors.RegistryFailed: ("r.example", "it does not answer"),
    errors.RemoteError: ("io.mountd.Mount.Later", {}),
    errors.ShuttingDown: (),
    errors.TimedOut: (30,),
    errors.VerityMismatch: (),
}


def named() -> list[type[MountdError]]:
    """All classes with a name of their own in the module of errors, and that of the command line."""
    found, kinds = [], [MountdError]
    while kinds:
        below = kinds.pop().__subclasses__()
        found += [each for each in below if each.__module__ == "mountd.errors"]
        kinds += below
    return sorted([*found, report.UsageError], key=lambda each: each.__name__)


@pytest.mark.parametrize("kind", named(), ids=lambda kind: kind.__name__)
def test_no_error_leaves_people_alone(kind: type[MountdError]) -> None:
    """Also if whoever raised it had nothing to add."""
    error = kind(*LEAST.get(kind, ("no reason",)))
    assert "(hint: " in report.line_about("p", error)


def test_the_hint_of_who_has_raised_it_comes_first() -> None:
    assert report.explain_error(NotFound("x", hint="this")) == ("not found: x", "this")


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (errors.BadFileDescriptor("s", "it is a block device, not a regular file"), "“loop” out"),
        (errors.BadFileDescriptor("s", "it lies on a FUSE file system"), "use a copy"),
        (errors.BadFileDescriptor("u", "it is not a user namespace"), "/proc/PID/ns/user"),
        (errors.InvalidImage("erofs was asked for, but the image holds xfs"), "ask for no type"),
        (errors.UnsupportedFileSystem("erofs was asked for, but the source is a tmpfs"), "ask for no type"),
        (errors.UnsupportedFileSystem("no signature of a known file system"), "“blkid -p IMAGE”"),
        (SyscallError(errno.EBUSY, "umount2(/mnt)"), "fuser"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), "the path is right"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "mountd opens nothing for you"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), "give a directory"),
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "/x"), "a shorter path"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), "give a file"),
    ],
)
def test_what_it_says(error: BaseException, hint: str) -> None:
    assert hint in str(report.explain_error(error)[1])


@pytest.mark.parametrize("name", ["", "tmpfs", "/nowhere.raw"])
def test_a_source_that_is_not_there(name: str) -> None:
    with pytest.raises(NotFound) as caught:
        Request(name)
    assert caught.value.message == f"not found: {name or '“”'}"
    assert "tmpfs:64M" in str(caught.value.hint)


@pytest.mark.parametrize("line", ["run --root-hash-signature x a b", "mount -l a b", "image gc --age x y"])
def test_wrong_usage(line: str) -> None:
    with pytest.raises(report.UsageError) as caught:
        parse(line.split())
    assert "--help" in str(caught.value.hint)


def test_a_namespace_without_a_name() -> None:
    with pytest.raises(report.UsageError, match="-N has no value"):
        Place("")
