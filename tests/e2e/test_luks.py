"""Encrypted images, as far as one comes without device-mapper: policy, passwords, and secrecy."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.errors import InvalidParameter, MountdError, NotSupported
from mountd.execute.luks import SEALS
from mountd.fds import OwnedFd
from mountd.kernel import dm_crypt
from tests.container import USER
from tests.container import as_user as forked_as
from tests.daemon import Daemon
from tests.disks import Part
from tests.e2e.calls import explain, mount, mount_fds, outcome, refused
from tests.e2e.conftest import trusting
from tests.e2e.test_disk_images import trusted
from tests.e2e.trust import memfd, users_file
from tests.images import build_image, build_tree
from tests.luks import PASSWORD, build_luks, make_header
from tests.programs import Done, as_user, environment

SOURCE: dict[str, object] = {"imageFileDescriptor": 0}
MOUNTFS = "luks-mountfs"
BY_WHAT_IT_IS = """
[[rule]]
name = "named"
image = {{ digest = ["sha256:{digest}"] }}
caller = {{ any = true }}
require = {{ integrity = ["stored", "sealed"] }}
grant = {{ file-systems = ["erofs"], encrypted = true }}
verdict = "allow"
"""


def what_the_kernel_lacks() -> str:
    """The name of the error that comes of the right password, "" if it opens the image."""
    try:
        dm_crypt.check_available()
    except NotSupported as error:
        return type(error).__name__
    return ""


OPENED = what_the_kernel_lacks()


@pytest.fixture(scope="module")
def volumes(place: Path, images: dict[str, Path]) -> dict[str, Path]:
    """Encrypted images: bare ones, one whose header is damaged, and a partition."""
    work = place / "luks"
    work.mkdir()
    erofs = build_image("erofs", build_tree(work / "tree"), work / "erofs.img")
    header = make_header(work, 1)
    bare = build_luks(place / "trusted/luks.raw", header, erofs)
    made = {"bare": bare, "damaged": place / "trusted/damaged.raw"}
    made["damaged"].write_bytes(bare.read_bytes()[:400])
    made["disk"] = trusted(place, "luks-disk.raw", Part("root", erofs), Part("home", bare))
    return made


@pytest.fixture(scope="module")
def serving(place: Path, volumes: dict[str, Path]) -> Iterator[Daemon]:
    """A daemon whose policy grants that encrypted images are opened, for their place or their digest."""
    digest = hashlib.sha256(volumes["bare"].read_bytes()).hexdigest()
    policy = trusting(place / "trusted", encrypted="true", access='"read-write"')
    policy += BY_WHAT_IT_IS.format(digest=digest)
    daemon = Daemon(place / "luks-daemon", policy, ["--mountfs-socket", str(place / MOUNTFS)])
    yield daemon
    assert daemon.stop() == 0, daemon.log
    assert PASSWORD not in daemon.log
    assert "internal error" not in daemon.log


@pytest.fixture
def opening(serving: Daemon) -> Iterator[Daemon]:
    """The same, which leaves no password in its log."""
    yield serving
    assert PASSWORD not in serving.log


def ask(daemon: Daemon, image: Path, **fields: object) -> tuple[str, str]:
    """What comes of a call of Mount with these very parameters."""

    def call() -> object:
        with OwnedFd(os.open(image, os.O_RDONLY)) as fd:
            return mount_fds(daemon.socket, SOURCE, [fd.fileno()], **fields)

    return outcome(call)


def hint(daemon: Daemon, image: Path, **fields: object) -> str:
    with pytest.raises(MountdError) as caught, OwnedFd(os.open(image, os.O_RDONLY)) as fd:
        mount_fds(daemon.socket, SOURCE, [fd.fileno()], **fields)
    return str(caught.value.hint)


def test_it_has_to_be_granted(daemon: Daemon, volumes: dict[str, Path]) -> None:
    """With the right password or without: nobody learns whether it is."""
    for password in (None, PASSWORD, "another"):
        name, text = ask(daemon, volumes["bare"], password=password)
        assert (name, "does not grant that it is opened" in text) == ("DeniedByPolicy", True), text
    assert "encrypted = true" in hint(daemon, volumes["bare"])
    assert ask(daemon, volumes["disk"])[0] == "DeniedByPolicy"
    assert "imagePolicy" in hint(daemon, volumes["disk"])
    assert ask(daemon, volumes["disk"], imagePolicy="root=open")[0] == ""
    assert PASSWORD not in daemon.log


def test_passwords(opening: Daemon, volumes: dict[str, Path], images: dict[str, Path]) -> None:
    cases: list[tuple[str, object, str]] = [
        ("bare", None, "KeyRequired"),
        ("disk", None, "KeyRequired"),
        ("bare", PASSWORD, OPENED),
        ("disk", PASSWORD, OPENED),
        ("bare", "", "InvalidParameter"),
        ("bare", "x" * 5000, "InvalidParameter"),
        ("bare", "\u00e9" * 2049, "InvalidParameter"),
        ("bare", [PASSWORD], "InvalidParameter"),
        ("bare", {"text": PASSWORD}, "InvalidParameter"),
        ("damaged", PASSWORD, "InvalidImage"),
    ]
    for image, password, expected in cases:
        name, text = ask(opening, volumes[image], password=password)
        assert name == expected, (image, text)
        assert PASSWORD not in text
    assert "--key-file" in hint(opening, volumes["bare"])
    # Whoever expects an encrypted image does not get another one.
    refused(lambda: mount_and_say(opening, images["erofs"]), "InvalidParameter", "nothing in the image")
    refused(lambda: mount_and_say(opening, volumes["disk"], "root=open"), "InvalidParameter", "nothing in")
    if OPENED:
        assert "dm-crypt" in hint(opening, volumes["bare"], password=PASSWORD)


def mount_and_say(daemon: Daemon, image: Path, policy: str | None = None) -> object:
    with OwnedFd(os.open(image, os.O_RDONLY)) as fd:
        return mount_fds(daemon.socket, SOURCE, [fd.fileno()], password=PASSWORD, imagePolicy=policy)


def test_the_image_policy(opening: Daemon, volumes: dict[str, Path], images: dict[str, Path]) -> None:
    for policy in ("root=unprotected", "root=verity+signed", "root=unused", "-", "~"):
        assert ask(opening, volumes["bare"], imagePolicy=policy)[0] == "DeniedByPolicy", policy
    for policy in ("*", "root=encrypted", "root=encrypted+unprotected+xfs", "root=open"):
        assert ask(opening, volumes["bare"], imagePolicy=policy)[0] == "KeyRequired", policy
    assert ask(opening, images["erofs"], imagePolicy="root=encrypted")[0] == "DeniedByPolicy"
    assert ask(opening, images["erofs"], imagePolicy="root=encrypted+unprotected")[0] == ""
    assert (
        ask(opening, volumes["disk"], imagePolicy="root=unprotected:home=unprotected")[0] == "DeniedByPolicy"
    )
    assert ask(opening, volumes["disk"], imagePolicy="root=unprotected:home=encrypted")[0] == "KeyRequired"


def test_what_takes_no_password(opening: Daemon, volumes: dict[str, Path]) -> None:
    with OwnedFd(os.open(volumes["bare"], os.O_RDONLY)) as fd:
        told = explain(opening.socket, SOURCE, [fd.fileno()])
        with Client(str(opening.socket)) as client, pytest.raises(InvalidParameter):
            client.call("Explain", {"source": SOURCE, "password": PASSWORD}, [fd])
    assert told["decision"]["verdict"] == "allow"  # type: ignore[index]
    assert "takes its password" in told["decision"]["reason"]  # type: ignore[index]
    assert told["facts"]["encrypted"] == "LUKS1, aes-xts-plain64"  # type: ignore[index]


def test_what_speaks_for_it_speaks_for_the_ciphertext(
    opening: Daemon, place: Path, volumes: dict[str, Path]
) -> None:
    """A user's own image, that the policy names by its digest: in the store, or in a sealed memfd."""
    data = volumes["bare"].read_bytes()

    def asked(image: Path, password: str | None) -> str:
        return forked_as(lambda: ask(opening, image, password=password)[0])

    with users_file(place, data) as image, memfd(data, SEALS) as fd:
        for password, expected in ((None, "KeyRequired"), (PASSWORD, OPENED)):
            assert asked(image, password) == expected
            sealed = outcome(lambda p=password: mount_fds(opening.socket, SOURCE, [fd], password=p))  # type: ignore[misc]
            assert sealed[0] == expected
    with users_file(place, data[:-1] + b"x") as image:
        assert asked(image, PASSWORD) in ("DeniedByPolicy", "NotImmutable")


def test_a_worker_that_has_seen_a_password_ends(opening: Daemon, volumes: dict[str, Path]) -> None:
    for password in ("another", [PASSWORD]):
        before = set(opening.workers)
        ask(opening, volumes["bare"], password=password)
        deadline = time.monotonic() + 10
        while before <= set(opening.workers) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not before <= set(opening.workers)


def test_key_files(opening: Daemon, installed: Path, volumes: dict[str, Path], place: Path) -> None:
    target, key, binary = place / "luks-target", place / "luks.key", place / "binary.key"
    target.mkdir()
    key.write_text(PASSWORD)
    binary.write_bytes(b"\xff\xfe")
    key.chmod(0o644)
    binary.chmod(0o644)
    command = [installed / "bin/mountctl", "run", volumes["bare"]]

    def said(*options: object, **popen: object) -> Done:
        return as_user([*command[:2], *options, command[2], "--", "true"], opening.socket, **popen)

    done = said(stdin=subprocess.DEVNULL)
    assert (done.returncode, "a password is needed" in done.stderr) == (1, True), done.stderr
    done = said("--json", "--key-file", binary)
    assert json.loads(done.stdout)["error"] == InvalidParameter.wire_name
    assert "no text in UTF-8" in done.stderr
    for done in (said("--key-file", key), said("--key-file", "-", input=PASSWORD)):
        assert ("not supported here" in done.stderr) is bool(OPENED), done.stderr
    assert "not found: /nowhere" in said("--key-file", "/nowhere").stderr
    # A file that only root can read is not read for somebody else.
    key.chmod(0o600)
    assert "Permission denied" in said("--key-file", key).stderr
    helper = [installed / "sbin/mount.mountd", volumes["bare"], target, "-o"]
    done = as_user([*helper, f"mountd.key-file={key}"], opening.socket)
    assert "Permission denied" in done.stderr
    done = as_user([*helper, "mountd.key-file="], opening.socket)
    assert "the path of a file with the password" in done.stderr
    # Asking whether it would be allowed takes none.
    key.chmod(0o644)
    done = as_user([*helper, f"mountd.key-file={key}", "-f"], opening.socket)
    assert (done.returncode, done.stderr) == (0, "")
    assert PASSWORD not in done.stderr


def test_it_is_asked_for_on_a_terminal(opening: Daemon, installed: Path, volumes: dict[str, Path]) -> None:
    ours, theirs = pty.openpty()
    words = ["setsid", "--ctty", "--wait", str(installed / "bin/mountctl"), "run", str(volumes["bare"])]
    with subprocess.Popen(
        [*words, "--", "true"],
        env=environment(opening.socket), stdin=theirs, stdout=theirs, stderr=theirs, user=USER,
    ) as process:  # fmt: skip
        os.close(theirs)
        seen = b""
        while b"Password of the encrypted image: " not in seen:
            seen += os.read(ours, 1000)
        os.write(ours, PASSWORD.encode() + b"\n")
        with contextlib.suppress(OSError):  # nobody has it open any more
            while piece := os.read(ours, 1000):
                seen += piece
        code = process.wait(30)
    os.close(ours)
    assert PASSWORD.encode() not in seen, "it is not shown"
    assert (code != 0) is bool(OPENED), seen
    assert (b"device-mapper" in seen) is bool(OPENED), seen


def test_in_the_words_of_mountfsd(opening: Daemon, place: Path, volumes: dict[str, Path]) -> None:
    def call(image: Path, **fields: object) -> str:
        with Client(str(place / MOUNTFS)) as client, OwnedFd(os.open(image, os.O_RDONLY)) as fd:
            try:
                _, fds = client.call("io.systemd.MountFileSystem.MountImage", {**SOURCE, **fields}, [fd])
            except MountdError as error:
                return str(getattr(error, "name", "")).removeprefix("io.systemd.MountFileSystem.")
        for each in fds:
            each.close()
        return ""

    assert call(volumes["bare"]) == "KeyNotFound"
    assert call(volumes["bare"], imagePolicy="root=signed") == "DeniedByImagePolicy"
    assert call(volumes["bare"], password=PASSWORD) == ("IncompatibleImage" if OPENED else "")
    # Theirs passes over a password that nothing needs.
    assert call(place / "trusted/erofs.raw", password=PASSWORD) == ""


def test_mounts_of_what_is_encrypted_are_refused_to_write(opening: Daemon, volumes: dict[str, Path]) -> None:
    """Before the password is looked at: the descriptor says what is possible."""
    assert ask(opening, volumes["bare"], readOnly=False)[0] == "BadFileDescriptor"
    assert outcome(lambda: mount(opening.socket, volumes["bare"], read_only=False))[0] == "KeyRequired"
