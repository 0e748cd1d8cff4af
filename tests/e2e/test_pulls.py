"""io.mountd.Images.Pull: who may ask, and what is passed on of what the instance that pulls says."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.errors import (
    DeniedByPolicy,
    InvalidParameter,
    NotFound,
    NotSupported,
    RegistryFailed,
)
from mountd.evidence.model import Provenance
from mountd.store.record import Owner
from mountd.store.store import Store
from tests.container import USER
from tests.daemon import Daemon
from tests.process import in_child

PULL = "io.mountd.Images.Pull"
REFERENCE = "oci:registry.example.com/app:1"
MANIFEST = "sha256:" + "a" * 64


def pull(daemon: Daemon, reference: str = REFERENCE) -> list[dict[str, object]]:
    with Client(str(daemon.socket)) as client:
        return list(client.call_more(PULL, {"reference": reference}, []))


@contextlib.contextmanager
def instance(daemon: Daemon, *replies: object) -> Iterator[list[bytes]]:
    """What listens where the instance that pulls does, and says `replies`; yield what it was asked."""
    path = daemon.directory / "run/pull"
    asked: list[bytes] = []

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            asked.append(connection.recv(65536))
            for reply in replies:
                connection.send(reply if isinstance(reply, bytes) else json.dumps(reply).encode() + b"\0")

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(20)
        thread = threading.Thread(target=serve, args=[listening], daemon=True)
        thread.start()
        try:
            yield asked
        finally:
            thread.join(20)
            path.unlink()


@pytest.fixture
def pulled(daemon: Daemon) -> Iterator[str]:
    """The digest of an image that the store has as pulled."""
    store = Store(daemon.directory / "state")
    data = b"pulled"
    provenance = Provenance("registry.example.com/app", MANIFEST, (MANIFEST,), "signedBy", "key", 1)
    with open(daemon.directory / "pulled", "w+b") as file:
        file.write(data)
        file.flush()
        store.add(file.fileno(), len(data), Owner(0, 0), provenance=provenance)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    yield digest
    store.remove(digest, 0)


def told(stage: str, **more: object) -> dict[str, object]:
    return {"parameters": {"stage": stage, **more}, "continues": True}


def test_progress_and_the_image_are_passed_on(daemon: Daemon, pulled: str) -> None:
    steps = [told("resolve", done=0), told("fetch", done=1, total=2), told("fetch", done=2, total=2)]
    last = {"parameters": {"stage": "done", "image": {"digest": pulled}}}
    with instance(daemon, *steps, last) as asked:
        replies = pull(daemon)
    assert json.loads(asked[0][:-1]) == {
        "method": PULL,
        "parameters": {"reference": REFERENCE},
        "more": True,
    }
    assert replies[:-1] == [step["parameters"] for step in steps]
    image = replies[-1]["image"]
    assert isinstance(image, dict)
    # From the store, and not from what was said.
    assert (image["digest"], image["size"], image["provenance"]["manifest"]) == (pulled, 6, MANIFEST)


def test_what_is_no_progress_is_not_passed_on(daemon: Daemon, pulled: str) -> None:
    steps = [told("bogus"), told("verify", done="x", total=None), told("fetch", done=1), told("verify")]
    last = {"parameters": {"stage": "done", "image": {"digest": pulled}}}
    with instance(daemon, *steps, last):
        stages = [reply for reply in pull(daemon) if "image" not in reply]
    assert stages == [{"stage": "verify"}, {"stage": "verify"}]


def test_an_error_is_passed_on(daemon: Daemon) -> None:
    parameters = {"registry": "registry.example.com", "reason": "it is gone", "hint": "wait"}
    with (
        instance(
            daemon, told("resolve"), {"error": "io.mountd.Images.RegistryFailed", "parameters": parameters}
        ),
        pytest.raises(RegistryFailed, match="it is gone") as failed,
    ):
        pull(daemon)
    assert failed.value.hint == "wait"


@pytest.mark.parametrize(
    "replies", [[], [told("resolve")], [b"nonsense\0"], [b"\0"], [{"parameters": []}], [b"x" * 100]]
)
def test_an_instance_that_does_not_answer_as_it_should(daemon: Daemon, replies: list[object]) -> None:
    with instance(daemon, *replies), pytest.raises(NotSupported, match="pulling") as failed:
        pull(daemon)
    assert "mountd-pull.service" in str(failed.value.hint)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"image": {"digest": MANIFEST}}, {"image": {"digest": "x"}}, {"image": {}}, {"layers": [1]}],
)
def test_an_image_that_is_not_in_the_store(daemon: Daemon, parameters: dict[str, object]) -> None:
    with instance(daemon, {"parameters": {"stage": "done", **parameters}}), pytest.raises(NotFound):
        pull(daemon)


def test_an_image_that_was_not_pulled_is_none(daemon: Daemon) -> None:
    store = Store(daemon.directory / "state")
    with open(daemon.directory / "imported", "w+b") as file:
        file.write(b"imported")
        file.flush()
        record = store.add(file.fileno(), 8, Owner(0, 0))
    last = {"parameters": {"stage": "done", "image": {"digest": record.digest}}}
    try:
        with instance(daemon, last), pytest.raises(NotFound, match="after it was pulled"):
            pull(daemon)
    finally:
        store.remove(record.digest, 0)


def test_a_socket_that_nobody_listens_on(daemon: Daemon) -> None:
    path = daemon.directory / "run/pull"
    with socket.socket(socket.AF_UNIX) as unheard:
        unheard.bind(str(path))
    try:
        with pytest.raises(NotSupported, match="pulling from registries"):
            pull(daemon)
    finally:
        path.unlink()


def test_without_an_instance_nothing_is_pulled(daemon: Daemon) -> None:
    path = daemon.directory / "run/pull"
    with pytest.raises(NotSupported, match=f"pulling from registries: nothing listens at {path}") as failed:
        pull(daemon)
    assert "systemctl enable --now mountd-pull.socket" in str(failed.value.hint)
    assert os.listdir(daemon.directory / "state/incoming") == []


@pytest.mark.parametrize(
    "reference",
    ["", "app", "docker://example.com/app:1", "oci:app", "oci:Example.com/a:1", "oci:é.com/a:1"],
)
def test_references_that_are_none(daemon: Daemon, reference: str) -> None:
    with pytest.raises(InvalidParameter, match="reference"):
        pull(daemon, reference)


def test_a_user_whom_no_rule_lets(daemon: Daemon) -> None:
    def ask() -> None:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        with pytest.raises(DeniedByPolicy, match="no rule lets this caller") as denied:
            pull(daemon)
        assert "registry.example.com/app" in str(denied.value.hint)

    with socket.socket(socket.AF_UNIX) as listening:
        path: Path = daemon.directory / "run/pull"
        listening.bind(str(path))
        listening.listen()
        listening.setblocking(False)
        try:
            in_child(ask)
            # The one that pulls has not even heard of it.
            with pytest.raises(BlockingIOError):
                listening.accept()
        finally:
            path.unlink()
