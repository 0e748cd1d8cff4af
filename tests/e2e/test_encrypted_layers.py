"""Stacks with encrypted layers, as far as one comes without device-mapper: policy, passwords, consent."""

from __future__ import annotations

import os
import pty
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.client import Client, Request
from mountd.kernel.flags import Clone
from mountd.kernel.libc import call
from tests.container import USER
from tests.container import as_user as forked_as
from tests.daemon import Daemon
from tests.disks import Part, build_disk
from tests.e2e.calls import mount, mount_fds, outcome, refused
from tests.e2e.conftest import TMPFS_RULE, trusting
from tests.e2e.test_luks import OPENED
from tests.images import build_image, build_tree
from tests.luks import PASSWORD, build_luks, make_header
from tests.programs import Done, as_user, environment

TOP = "tmpfs:1M"
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18


@pytest.fixture(scope="module")
def layers(place: Path) -> Iterator[Path]:
    """Where images are trusted: two that are encrypted, a partition of one that is, and a plain one."""
    trusted, work = place / "layers", place / "layers-work"
    trusted.mkdir(mode=0o755)
    work.mkdir()
    erofs = build_image("erofs", build_tree(work / "tree"), trusted / "plain.raw")
    header = make_header(work)
    one = build_luks(trusted / "one.raw", header, erofs)
    build_luks(trusted / "two.raw", header, erofs)
    build_disk(trusted / "disk.raw", [Part("root", one), Part("home", erofs)])
    yield trusted
    shutil.rmtree(trusted)
    shutil.rmtree(work)


def policy_of(layers: Path) -> str:
    return trusting(layers, encrypted="true") + TMPFS_RULE


@pytest.fixture(scope="module")
def one_daemon(place: Path, layers: Path) -> Iterator[Daemon]:
    daemon = Daemon(place / "layers-daemon", policy_of(layers))
    yield daemon
    assert daemon.stop() == 0, daemon.log
    assert PASSWORD not in daemon.log
    assert "internal error" not in daemon.log


@pytest.fixture
def key(place: Path) -> Iterator[Path]:
    path = place / "layers.key"
    path.write_text(PASSWORD)
    path.chmod(0o644)
    yield path
    path.unlink()


def asked(
    daemon: Daemon, layers: Path, names: str, key: Path | None = None, **wishes: object
) -> tuple[str, str]:
    """What comes of asking for a stack of these images, the topmost first."""
    *above, lowest = (str(layers / f"{name}.raw") for name in names.split())
    file = None if key is None else str(key)
    return outcome(lambda: mount(daemon.socket, lowest, layers=above, key_file=file, **wishes))


def test_passwords(one_daemon: Daemon, layers: Path, key: Path) -> None:
    partition = {"image_policy": "root=encrypted+unprotected:home=unused"}
    cases: list[tuple[str, dict[str, object], str]] = [
        ("one two", {}, "source.layers[0]: "),
        ("plain two", {}, "source.layers[1]: "),
        ("two plain", {}, "source.layers[0]: "),
        ("one", {"top": TOP}, "the image is encrypted"),
        ("plain one", {"top": TOP}, "source.layers[1]: "),
        ("plain disk", partition, "source.layers[1]: a partition"),
    ]
    for names, wishes, text in cases:
        found = asked(one_daemon, layers, names, **wishes)
        assert (found[0], text in found[1]) == ("KeyRequired", True), (names, found)
        found = asked(one_daemon, layers, names, key, **wishes)
        assert found[0] == OPENED, (names, found)
        assert PASSWORD not in found[1]
    # Whoever expects an encrypted layer does not get other ones.
    shutil.copy(layers / "plain.raw", layers / "plain2.raw")
    for names, top in (("plain plain2", None), ("plain", TOP)):
        name, text = asked(one_daemon, layers, names, key, top=top)
        assert (name, "nothing in the image" in text) == ("InvalidParameter", True), text
    (layers / "plain2.raw").unlink()
    assert asked(one_daemon, layers, "plain disk", key)[0] == "NotSupported", "it has two partitions"


def test_each_layer_has_to_be_granted(start: Callable[..., Daemon], layers: Path, key: Path) -> None:
    """With the right password or without."""
    granted = trusting(layers / "one.raw", encrypted="true").replace("/*", "")
    daemon = start(granted + trusting(layers).replace("trusted in", "other in"))
    for file in (key, None):
        name, text = asked(daemon, layers, "one two", file)
        assert (name, "source.layers[1]: " in text, "does not grant" in text) == (
            "DeniedByPolicy",
            True,
            True,
        )
    assert asked(daemon, layers, "one plain", key)[0] == OPENED
    assert PASSWORD not in daemon.log


def test_explain_says_that_it_is_judged_later(one_daemon: Daemon, layers: Path) -> None:
    above = [str(layers / "plain.raw")]
    with (
        Client(str(one_daemon.socket)) as client,
        Request(str(layers / "two.raw"), layers=above) as request,
    ):
        told = client.explain(request.source, request.fds, **request.parameters)
    decision, found = told["decision"], told["facts"]
    assert isinstance(decision, dict)
    assert isinstance(found, dict)
    assert decision["verdict"] == "allow"
    assert "each of its 2 layers is allowed; what is encrypted takes its password" in decision["reason"]
    assert found["layers[1]: encrypted"].startswith("LUKS2, ")


def test_the_metadata_of_a_composefs(one_daemon: Daemon, layers: Path, place: Path) -> None:
    with_top: dict[str, object] = {"top": {"sizeBytes": 1 << 20}}
    fds = [os.open(layers / "one.raw", os.O_RDONLY), os.open(place / "layers-work/tree", os.O_RDONLY)]
    composefs = {"composefs": {"imageFileDescriptor": 0, "objectsFileDescriptors": [1]}}
    try:
        for source in (composefs, composefs | with_top):
            wishes = {"password": PASSWORD, "readOnly": source is composefs}
            refused(
                lambda s=source, w=wishes: mount_fds(one_daemon.socket, s, fds, **w),  # type: ignore[misc]
                "UnsupportedFileSystem",
                "encrypted contents",
            )
    finally:
        for fd in fds:
            os.close(fd)


def test_consent_comes_before_the_password_is_used(
    start: Callable[..., Daemon], layers: Path, place: Path, key: Path
) -> None:
    """And nobody is asked about what would fail anyway."""
    questions, program = place / "questions", place / "pkcheck"
    program.write_text(f"#!/bin/sh\necho asked > {questions}\nexit 0\n")
    program.chmod(0o755)
    os.mkfifo(questions, 0o600)
    # Open at both ends: whoever opens one of them does not wait.
    told = os.open(questions, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    os.makedirs("/run/dbus", exist_ok=True)

    def enter() -> None:
        """Be where polkit is this program, which says yes."""
        call("unshare", Clone.NEWNS)
        call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        call("mount", b"tmpfs", b"/run/dbus", b"tmpfs", 0, None)
        socket.socket(socket.AF_UNIX).bind("/run/dbus/system_bus_socket")
        call("mount", os.fsencode(program), b"/usr/bin/pkcheck", b"", MS_BIND, None)

    rules = trusting(layers, encrypted="true").replace('verdict = "allow"', 'verdict = "ask"')
    daemon = start(rules, preexec_fn=enter)

    def said(names: str, file: Path | None) -> tuple[str, int]:
        name = forked_as(lambda: asked(daemon, layers, names, file))[0]
        try:
            return name, os.read(told, 1000).count(b"asked")
        except BlockingIOError:
            return name, 0

    assert said("plain two", None) == ("KeyRequired", 0)
    assert said("one two", None) == ("KeyRequired", 0)
    shutil.copy(layers / "plain.raw", layers / "plain2.raw")
    assert said("plain plain2", key) == ("InvalidParameter", 0)
    (layers / "plain2.raw").unlink()
    assert said("one two", key) == (OPENED, 2)
    os.close(told)
    assert PASSWORD not in daemon.log


def test_key_files(one_daemon: Daemon, installed: Path, layers: Path, key: Path) -> None:
    command = [installed / "bin/mountctl", "run", "--layer", layers / "one.raw"]

    def said(*options: object, **popen: object) -> Done:
        words = [*command, *options, layers / "plain.raw", "--", "true"]
        return as_user(words, one_daemon.socket, **popen)

    done = said(stdin=subprocess.DEVNULL)
    assert (done.returncode, "a password is needed" in done.stderr) == (1, True), done.stderr
    for done in (said("--key-file", key), said("--key-file", "-", input=PASSWORD)):
        assert ("not supported here" in done.stderr) is bool(OPENED), done.stderr
        assert PASSWORD not in done.stderr


def test_it_is_asked_for_on_a_terminal(one_daemon: Daemon, installed: Path, layers: Path) -> None:
    ours, theirs = pty.openpty()
    words = ["setsid", "--ctty", "--wait", str(installed / "bin/mountctl"), "run"]
    words += ["--layer", str(layers / "one.raw"), str(layers / "two.raw"), "--", "true"]
    with subprocess.Popen(
        words, env=environment(one_daemon.socket), stdin=theirs, stdout=theirs, stderr=theirs, user=USER
    ) as process:
        os.close(theirs)
        seen = b""
        while b"Password of the encrypted image: " not in seen:
            seen += os.read(ours, 1000)
        os.write(ours, PASSWORD.encode() + b"\n")
        try:
            while piece := os.read(ours, 1000):
                seen += piece
        except OSError:
            pass  # nobody has it open any more
        code = process.wait(30)
    os.close(ours)
    assert PASSWORD.encode() not in seen, "it is not shown"
    assert (code != 0, b"device-mapper" in seen) == (bool(OPENED), bool(OPENED)), seen
