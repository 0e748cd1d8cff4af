"""What a signature and the store add to a warm mount, next to one that is trusted for where it lies.

The same image three ways, in turns of one run: under a rule about a location, by the name of the copy that
the store has, and as a file that its owner can change with a signature, which has to be hashed to find the
copy. All by the root of a container, as most callers are.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mountd.client import Client, Request
from mountd.fds import OwnedFd
from tests.bench.serving import Serving
from tests.container import USER, in_container, mapper
from tests.signing import Signatory

POLICY = """
[key.bench]
ed25519 = "{0}/bench.key"

[[rule]]
name = "by its place"
image = {{ location = "{0}/*" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["erofs"], idmap = ["namespace"] }}
verdict = "allow"

[[rule]]
name = "stored and signed"
image = {{ any = true }}
caller = {{ any = true }}
require = {{ integrity = ["stored"], signature = "bench" }}
grant = {{ file-systems = ["erofs"], idmap = ["namespace"] }}
verdict = "allow"
"""
LOCATION, STORED, SIGNED = "by its place", "by its name in the store", "a file with a signature"
MAXIMUM_ADDED = 0.002  # seconds, in the median
WARM_UP = 30


@dataclass(frozen=True, slots=True)
class Scene:
    """The image where root has put it, a copy of a user's, and a signature over both."""

    daemon: Serving
    trusted: Path
    users: Path
    signature: Path
    digest: str


def prepare(directory: Path, image: Path) -> Scene:
    """Start a daemon in the new `directory`, root's, and have `image` in it in all three ways."""
    trusted, users, private = directory / "trusted", directory / "users", directory / "private"
    for path in (directory, trusted, users, private):
        path.mkdir(mode=0o755)
    data = image.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    signatory = Signatory(private, "ed25519 bench", "ed25519")
    (trusted / "bench.key").write_bytes(signatory.public)
    signature = directory / "signature"
    signature.write_bytes(signatory.ed25519(digest.encode(), private))
    for path in (trusted / "image.raw", users / "image.raw"):
        path.write_bytes(data)
    os.chown(users, USER, USER)
    os.chown(users / "image.raw", USER, USER)
    os.sync()
    daemon = Serving(directory / "daemon", POLICY.format(trusted))
    try:
        with Client(str(daemon.socket)) as client, OwnedFd(os.open(image, os.O_RDONLY)) as fd:
            signed = base64.b64encode(signature.read_bytes()).decode()
            parameters = {"imageFileDescriptor": 0, "signature": signed}
            client.call("io.mountd.Images.Import", parameters, [fd])
    except BaseException:
        daemon.stop()
        raise
    return Scene(daemon, trusted / "image.raw", users / "image.raw", signature, f"sha256:{digest}")


def take_turns(scene: Scene, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each mount; a mount of each way follows one of every other."""

    def client() -> dict[str, list[float]]:
        with (
            Client(str(scene.daemon.socket)) as connection,
            Request(str(scene.trusted)) as by_place,
            Request(f"stored:{scene.digest}") as by_name,
            Request(str(scene.users), signature=str(scene.signature)) as by_signature,
        ):
            ways = {LOCATION: by_place, STORED: by_name, SIGNED: by_signature}
            expected = {LOCATION: "root-owned", STORED: "stored", SIGNED: "stored"}

            def mount(name: str) -> float:
                way = ways[name]
                begin = time.perf_counter()
                reply = connection.mount(way.source, way.fds, **way.parameters)
                reply.mount.close()
                taken = time.perf_counter() - begin
                assert reply.decision["trustedBy"] == expected[name], reply.decision
                return taken

            for _ in range(WARM_UP):
                for name in ways:
                    mount(name)
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name in ways:
                    times[name].append(mount(name))
            return times

    with mapper():
        return in_container(client)


def measure(directory: Path, image: Path, rounds: int) -> dict[str, list[float]]:
    """Set up in `directory`, which does not exist yet, measure, and leave nothing."""
    scene = prepare(directory, image)
    try:
        return take_turns(scene, rounds)
    finally:
        scene.daemon.stop()
        shutil.rmtree(directory)


def report(directory: Path, image: Path, rounds: int, line: Callable[[str, list[float]], str]) -> bool:
    """Measure, print, and tell whether what is added stays below MAXIMUM_ADDED."""
    times = measure(directory, image, rounds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    print(f"{f'trusted … ({image.stat().st_size >> 10} KiB)':<42}{'min':>11}{'median':>11}{'p99':>11}")
    for name, each in times.items():
        print(line(name, each))
    added = {name: medians[name] - medians[LOCATION] for name in (STORED, SIGNED)}
    for name, seconds in added.items():
        print(f"{name} adds {seconds * 1e6:.0f} µs (at most {MAXIMUM_ADDED * 1e6:.0f})")
    return max(added.values()) <= MAXIMUM_ADDED
