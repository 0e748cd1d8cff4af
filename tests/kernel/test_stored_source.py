"""A stored image as the source of a mount: the evidence that it makes, and the mount that is made of it."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mountd.caller.model import Caller, UserNamespace
from mountd.caller.peer import Peer
from mountd.errors import NotFound
from mountd.evidence.model import Key, Proof, Provenance, Signer
from mountd.execute.run import Inputs, run
from mountd.fds import OwnedFd, close_all
from mountd.kernel.flags import MountAttr
from mountd.plan.operations import Backing, CreateSuperblock, MakeMount, Plan
from mountd.service.context import PolicyInForce, RequestContext
from mountd.service.inspection import inspect_stored
from mountd.service.signatures import fingerprint
from mountd.source.confined import recognise_image
from mountd.store.record import Owner
from mountd.store.store import Known, Store
from mountd.trust.policy import Policy
from tests.sealing import Unsealed

LATER = int(time.time()) + 86400
HOST = UserNamespace(0, 0, (), (), 0, is_host=True)
KEY = Key("team", "ed25519", (b"one",), "test.toml")
LAYERS = ("sha256:" + "1" * 64,)
PROVENANCE = Provenance("example.com/a", "sha256:" + "0" * 64, LAYERS, "signedBy", "team", 1)


def signer(digest: str) -> Signer:
    return Signer("team", "CN=team", "image", digest, fingerprint(KEY))


def caller(uid: int, *, sys_admin: bool = False) -> Caller:
    return Caller(uid, uid, frozenset(), 1, HOST, uid, sys_admin)


@pytest.fixture
def store(scratch: Path, request: pytest.FixtureRequest) -> Store:
    made = Store(scratch / f"stored-{request.node.name[:50]}")
    made.prepare()
    return made


@pytest.fixture
def context(store: Store) -> Iterator[RequestContext]:
    with socket.socket(socket.AF_UNIX) as unconnected:
        yield RequestContext(
            Peer(unconnected), PolicyInForce(Policy((), {"team": KEY}), None), Unsealed(),
            lambda phase, seconds=0: None, store=store,
        )  # fmt: skip


def put(store: Store, path: Path, owner: Owner, *, known: bool) -> str:
    size = path.stat().st_size

    def judge(fd: int, digest: str) -> Known:
        signers = (
            replace(signer(digest), valid_until=LATER),
            replace(signer(digest), key_mark="another key of this name"),
            replace(signer(digest), valid_until=int(time.time()) - 1),
        )
        return Known(recognise_image(fd, size, confined=True) if known else None, signers)

    with path.open("rb") as file:
        return store.add(file.fileno(), size, owner, provenance=PROVENANCE, judge=judge).digest


@pytest.mark.parametrize("known", [True, False], ids=["recorded", "recognised again"])
@pytest.mark.parametrize(("type", "backing"), [("erofs", Backing.FILE), ("ext4", Backing.LOOP)])
def test_evidence_and_mount(
    store: Store, context: RequestContext, images: dict[str, Path], type: str, backing: Backing, known: bool
) -> None:
    digest = put(store, images[type], Owner(0, 0), known=known)
    fds: list[OwnedFd] = []
    try:
        found = inspect_stored(digest, caller(1000), fds, context)
        image_fd, source, evidence = found.image_fd, found.source, found.evidence
        assert [fd.fileno() for fd in fds] == [image_fd]
        assert evidence.proofs == (Proof("stored", digest),)
        assert evidence.digest == digest
        # With a key that has only its name left, nobody has signed it.
        assert evidence.signers == (replace(signer(digest), valid_until=LATER),)
        assert evidence.provenance == PROVENANCE
        # It is not trusted for where it lies.
        assert (evidence.root_owned_path, evidence.descriptor_writable) == (None, False)
        assert evidence.location_problem
        assert source.file_system is not None
        assert source.file_system.type == type
        options = (("noload", None),) if type == "ext4" else ()
        plan = Plan((CreateSuperblock(type, backing, True, options), MakeMount(MountAttr.RDONLY)))
        with run(plan, Inputs(image_fd=image_fd, userns_fd=None, seal=context.seal)) as mount:
            fd = os.open("hello", os.O_RDONLY, dir_fd=mount.fileno())
            with open(fd, encoding="utf-8") as file:
                assert file.read() == "hello from the image\n"
    finally:
        close_all(fds)


@pytest.mark.parametrize(
    ("owner", "who", "seen"),
    [
        (Owner(1000, 1000), caller(1000), True),
        (Owner(1000, 1000), caller(1001), False),
        (Owner(100000, 1000), caller(1000), False),  # who pays is not who may
        (Owner(1000, 1000), caller(0, sys_admin=True), True),
        (Owner(1000, 1000), caller(0), False),
        (Owner(0, 0), caller(1000), True),  # whom it is for is up to the policy
        (Owner(0, 0), caller(0), True),
    ],
)
def test_whose_images_can_be_named(
    store: Store, context: RequestContext, images: dict[str, Path], owner: Owner, who: Caller, seen: bool
) -> None:
    digest = put(store, images["erofs"], owner, known=True)
    fds: list[OwnedFd] = []

    def look() -> None:
        inspect_stored(digest, who, fds, context)

    try:
        if seen:
            look()
        else:
            with pytest.raises(NotFound):
                look()
    finally:
        close_all(fds)


def test_without_a_store(context: RequestContext) -> None:
    context.store = None
    with pytest.raises(NotFound, match="store"):
        inspect_stored("sha256:" + "0" * 64, caller(1000), [], context)


def test_a_look_up_takes_less_than_2_ms(
    store: Store, context: RequestContext, images: dict[str, Path]
) -> None:
    digest = put(store, images["erofs"], Owner(0, 0), known=True)

    def look() -> None:
        fds: list[OwnedFd] = []
        inspect_stored(digest, caller(1000), fds, context)
        close_all(fds)

    assert statistics.median(timed(look) for _ in range(50)) < 0.002


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
