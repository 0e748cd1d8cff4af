"""Stacks: which layer hides what, whose ids they show, and what hostile layers come to."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.client import Client, MountReply
from mountd.fds import OwnedFd
from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from mountd.service.requests import MAXIMUM_LAYERS
from tests.container import USER, as_user, in_container
from tests.daemon import ROOT, Daemon
from tests.e2e.attaching import user_of
from tests.e2e.calls import Outcome, errno_of, explain, mount_fds, outcome
from tests.e2e.conftest import trusting
from tests.e2e.test_directories import rule
from tests.e2e.test_sources import loops_over, wait_until_dropped
from tests.e2e.test_trust_stored import STORED
from tests.e2e.trust import Case, Makers, digest_of, key_sections, source, users_file
from tests.images import build_image
from tests.rights import drop_others, in_effect
from tests.rogue import eventually, settled

OVERLAY = "trusted.overlay"
KILLS = 40


def directory(path: Path, files: dict[str, str]) -> Path:
    """A tree of root's with these files."""
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def layers(place: Path) -> Iterator[dict[str, Path]]:
    """An image each of erofs (topmost), squashfs and ext4 (lowest), where a rule trusts them."""
    trusted = place / "stacked"
    trusted.mkdir(mode=0o755)
    work = Path(tempfile.mkdtemp(prefix="stacks-", dir=place))
    top = directory(work / "top", {"both": "top", "top": "top", "opaque/new": "top", "merged/top": "top"})
    os.mknod(top / "gone", stat.S_IFCHR, os.makedev(0, 0))
    os.setxattr(top / "opaque", f"{OVERLAY}.opaque", b"y")
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    # What would show something else than what is there, if it were heeded.
    directory(top, {"meta": "", "also-meta": "", "redirected/own": "top"})
    os.setxattr(top / "meta", f"{OVERLAY}.metacopy", b"")
    os.setxattr(top / "meta", f"{OVERLAY}.redirect", b"/secret")
    os.setxattr(top / "also-meta", f"{OVERLAY}.metacopy", b"")
    os.setxattr(top / "redirected", f"{OVERLAY}.redirect", b"/merged")
    directory(top, {"users/file": "top"})
    os.setxattr(top / "users", "user.overlay.opaque", b"y")
    middle = directory(
        work / "middle", {"both": "middle", "gone": "middle", "merged/middle": "middle", "users/low": "m"}
    )
    (middle / "private").write_text("of 1000\n")
    (middle / "private").chmod(0o600)
    os.chown(middle / "private", 1000, 1000)
    bottom = directory(
        work / "bottom",
        {"both": "bottom", "opaque/old": "b", "merged/bottom": "b", "secret": "s", "also-meta": "below"},
    )
    made = {
        type: build_image(type, tree, trusted / f"{tree.name}.raw")
        for type, tree in (("erofs", top), ("squashfs", middle), ("ext4", bottom))
    }
    subprocess.run(["sync"], check=True)
    yield made
    shutil.rmtree(work)
    shutil.rmtree(trusted)


@pytest.fixture(scope="module")
def one_daemon(place: Path, layers: dict[str, Path]) -> Iterator[tuple[Daemon, dict[str, object]]]:
    """A daemon, and what it held in the beginning."""
    daemon = Daemon(place / "stacks", trusting(place / "stacked"))
    yield daemon, settled(daemon)
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


@pytest.fixture
def serving(one_daemon: tuple[Daemon, dict[str, object]], layers: dict[str, Path]) -> Iterator[Daemon]:
    """The daemon; nothing is left of what it made, whatever came of it."""
    daemon, before = one_daemon
    yield daemon
    assert eventually(lambda: daemon.held() == before, 10), (before, daemon.held())
    for image in layers.values():
        wait_until_dropped(image)


def stack(paths: list[Path]) -> tuple[dict[str, object], list[int]]:
    """The source and the descriptors, which are the caller's."""
    fds = [os.open(path, os.O_RDONLY) for path in paths]
    kinds = ["directoryFileDescriptor" if path.is_dir() else "imageFileDescriptor" for path in paths]
    return {"layers": [{kind: number} for number, kind in enumerate(kinds)]}, fds


def ask(
    daemon: Daemon,
    paths: list[Path],
    *,
    own: bool = False,
    method: Callable[..., object] = mount_fds,
    **f: object,
) -> object:
    """Ask for a stack, as USER; with `own`, as who runs this, for its own user namespace."""
    source, fds = stack(paths)
    try:
        if own:
            fds.append(os.open("/proc/self/ns/user", os.O_RDONLY))
            return method(daemon.socket, source, fds, userNamespaceFileDescriptor=len(fds) - 1, **f)
        with user():
            return method(daemon.socket, source, fds, **f)
    finally:
        for fd in fds:
            os.close(fd)


@contextlib.contextmanager
def user() -> Iterator[None]:
    os.setegid(USER)
    os.seteuid(USER)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def mounted(daemon: Daemon, paths: list[Path], **fields: object) -> MountReply:
    reply = ask(daemon, paths, **fields)  # type: ignore[arg-type]
    assert isinstance(reply, MountReply)
    return reply


def refusal(daemon: Daemon, paths: list[Path], **fields: object) -> Outcome:
    return outcome(lambda: ask(daemon, paths, **fields))  # type: ignore[arg-type]


def names(mount: OwnedFd, path: str = ".") -> set[str]:
    return set(os.listdir(f"/proc/self/fd/{mount.fileno()}/{path}"))


def read(mount: OwnedFd, path: str) -> str:
    with open(os.open(path, os.O_RDONLY, dir_fd=mount.fileno()), encoding="utf-8") as file:
        return file.read()


def all_layers(layers: dict[str, Path]) -> list[Path]:
    return [layers[type] for type in ("erofs", "squashfs", "ext4")]


def test_the_first_layer_is_the_topmost(serving: Daemon, layers: dict[str, Path]) -> None:
    with mounted(serving, all_layers(layers)) as reply:
        (told,) = reply.mounts
        assert (told["fileSystemType"], told["readOnly"]) == ("overlay", True)
        assert reply.decision["rule"] == "trusted in the test"
        assert read(reply.mount, "both") == "top"
        assert names(reply.mount, "merged") == {"top", "middle", "bottom"}
        assert os.fstatvfs(reply.mount.fileno()).f_flag & os.ST_RDONLY
    with mounted(serving, all_layers(layers)[::-1]) as reply:
        assert read(reply.mount, "both") == "bottom"
        assert read(reply.mount, "gone") == "middle"


def test_whiteouts_and_opaque_directories(serving: Daemon, layers: dict[str, Path]) -> None:
    with mounted(serving, all_layers(layers)) as reply:
        assert "gone" not in names(reply.mount)
        assert errno_of(lambda: os.stat("gone", dir_fd=reply.mount.fileno())) == "ENOENT"
        assert names(reply.mount, "opaque") == {"new"}
        # An attribute that any user can set on a file says nothing.
        assert names(reply.mount, "users") == {"file", "low"}


def test_hostile_attributes_lead_nowhere(serving: Daemon, layers: dict[str, Path]) -> None:
    with mounted(serving, all_layers(layers)) as reply:
        fd = reply.mount.fileno()
        for name in ("meta", "also-meta"):
            assert errno_of(lambda n=name: os.close(os.open(n, os.O_RDONLY, dir_fd=fd))) == "EPERM"  # type: ignore[misc]
        assert errno_of(lambda: os.listdir(f"/proc/self/fd/{fd}/redirected")) == "EPERM"
        assert errno_of(lambda: os.stat("redirected/middle", dir_fd=fd)) == "EPERM"


def test_a_container_gets_it_with_its_ids_and_locked(
    serving: Daemon, layers: dict[str, Path], containers: None
) -> None:
    def work() -> tuple[object, ...]:
        with mounted(serving, all_layers(layers), own=True) as reply:
            fd = reply.mount.fileno()
            mount_api.move_mount(fd, "/mnt")
            attributes = (MountAttr.NOSUID, MountAttr.NODEV, MountAttr.RDONLY)
            os.seteuid(1000)
            text = Path("/mnt/private").read_text()
            os.seteuid(0)
            return (
                os.stat("/mnt/both").st_uid,
                os.stat("/mnt/private").st_uid,
                text,
                Path("/mnt/private").read_text(),
                [errno_of(lambda a=a: mount_api.mount_setattr(fd, clear=a)) for a in attributes],  # type: ignore[misc]
                errno_of(lambda: os.close(os.open("/mnt/null", os.O_RDONLY))),
                errno_of(lambda: os.close(os.open("/mnt/new", os.O_CREAT | os.O_WRONLY))),
            )

    found = in_container(work)
    assert found == (0, 1000, "of 1000\n", "of 1000\n", ["EPERM"] * 3, "EACCES", "EROFS")


def test_others_read_no_more_than_modes_let_them(serving: Daemon, layers: dict[str, Path]) -> None:
    """An overlay reads its layers as mountd; who reads the overlay is judged before."""
    with mounted(serving, all_layers(layers)) as reply:
        fd = reply.mount.fileno()

        def opened(uid: int) -> str:
            act = lambda: os.close(os.open("private", os.O_RDONLY, dir_fd=fd))  # noqa: E731
            return as_user(lambda: errno_of(act), uid)

        assert (opened(1000), opened(1001)) == ("", "EACCES")


def test_one_refused_layer_refuses_the_stack(serving: Daemon, layers: dict[str, Path], place: Path) -> None:
    stray = place / "stray-layer.raw"
    shutil.copy(layers["erofs"], stray)
    paths = [layers["ext4"], stray, layers["squashfs"]]
    name, text = refusal(serving, paths)
    assert name == "DeniedByPolicy"
    assert "source.layers[1]: " in text
    told = ask(serving, paths, method=explain)
    assert isinstance(told, dict)
    assert told["decision"]["verdict"] == "deny"
    assert told["decision"]["reason"].startswith("source.layers[1]: ")
    assert {step["reason"].split(":")[0] for step in told["steps"]} == {
        f"source.layers[{number}]" for number in range(3)
    }
    assert told["facts"]["layers"] == "3"
    assert told["facts"]["layers[2]: file system"] == "squashfs"
    wait_until_dropped(layers["ext4"])
    stray.unlink()


def test_several_rules_allow_a_stack_together(start: Callable[..., Daemon], layers: dict[str, Path]) -> None:
    """None of them alone answers for it; an option that one of them does not grant is not granted."""
    rules = trusting(layers["ext4"], flags='["noexec"]').replace("/*", "")
    daemon = start(rules.replace("trusted in", "other in") + trusting(layers["erofs"].parent))
    with mounted(daemon, all_layers(layers)) as reply:
        # What one rule locks is locked for all.
        assert os.fstatvfs(reply.mount.fileno()).f_flag & os.ST_NOEXEC
        assert reply.decision["rule"] == "trusted in the test, other in the test"
    name, text = refusal(daemon, all_layers(layers), options=["acl"])
    assert name == "OptionNotPermitted"
    assert "source.layers[0]" in text


def test_numbers_and_kinds_of_layers(serving: Daemon, layers: dict[str, Path]) -> None:
    image = layers["erofs"]
    assert refusal(serving, [image])[0] == "InvalidParameter"
    reference = {"reference": "stored:sha256:" + "0" * 64}

    def refused(source: list[dict[str, object]]) -> Outcome:
        return outcome(lambda: mount_fds(serving.socket, {"layers": source}, []))

    assert refused([reference] * (MAXIMUM_LAYERS + 1))[0] == "LimitExceeded"
    for inner in ({"layers": [reference] * 2}, {"tmpfs": {"size": 4096}}, {}):
        name, text = refused([reference, inner])
        assert name == "InvalidParameter"
        assert "source.layers[1]" in text or not inner
    name, text = refused([reference] * 2)
    assert (name, "source.layers[0]" in text) == ("NotFound", True)
    assert refusal(serving, [image] * 2, readOnly=False)[0] == "NotSupported"
    assert refusal(serving, [image] * 2, fileSystemType="erofs")[0] == "InvalidParameter"


def test_an_image_twice_is_no_stack(serving: Daemon, layers: dict[str, Path]) -> None:
    """The kernel refuses an overlay of a directory on itself; nothing is left of what was made."""
    name, text = refusal(serving, [layers["ext4"]] * 2)
    assert name in ("", "MountFailed"), text
    wait_until_dropped(layers["ext4"])


def test_a_layer_that_cannot_be_mounted_leaves_nothing(
    serving: Daemon, layers: dict[str, Path], place: Path
) -> None:
    """The layers below it were made by then, or not begun."""
    broken = layers["erofs"].parent / "broken.raw"
    data = bytearray(layers["squashfs"].read_bytes())
    data[96:] = bytes(len(data) - 96)
    broken.write_bytes(data)
    name, text = refusal(serving, [layers["ext4"], broken])
    assert name in ("MountFailed", "InvalidImage"), text
    assert "source.layers[1]" in text
    wait_until_dropped(layers["ext4"])
    wait_until_dropped(broken)
    broken.unlink()


def test_layers_go_with_the_stack(serving: Daemon, layers: dict[str, Path]) -> None:
    reply = mounted(serving, all_layers(layers))
    assert len(loops_over(layers["ext4"])) == 1
    reply.close()
    wait_until_dropped(layers["ext4"])
    wait_until_dropped(layers["squashfs"])


def test_it_is_listed_and_revoked(serving: Daemon, layers: dict[str, Path]) -> None:
    with mounted(serving, all_layers(layers)) as reply:
        id = reply.mounts[0]["id"]
        with Client(str(serving.socket)) as client:
            listed = client.call("List", {"all": True}, [])[0]["mounts"]
            assert isinstance(listed, list)
            (found,) = [each for each in listed if each["id"] == id]
            assert found["fileSystemType"] == "overlay"
            assert all(str(path) in found["source"] for path in layers.values())
            told = client.call("io.mountd.Admin.Revoke", {"id": id}, [])[0]
            assert "held" in told
    with Client(str(serving.socket)) as client:
        left = client.call("List", {"all": True}, [])[0]["mounts"]
        assert isinstance(left, list)
        assert id not in [each["id"] for each in left]


def test_with_the_capabilities_of_the_unit(
    start: Callable[..., Daemon], layers: dict[str, Path], containers: None
) -> None:
    """Files of others can be read by them; the daemon has the capability for that in effect only then."""
    daemon = start(trusting(layers["erofs"].parent), preexec_fn=drop_others)

    def work() -> str:
        with mounted(daemon, all_layers(layers), own=True) as reply:
            os.seteuid(1000)
            return read(reply.mount, "private")

    assert in_container(work) == "of 1000\n"
    with mounted(daemon, all_layers(layers)):
        for pid in daemon.workers:
            status = Path(f"/proc/{pid}/status").read_text()
            effective = int(status.partition("CapEff:")[2].split()[0], 16)
            assert effective == in_effect()


def test_a_stack_counts_for_each_rule_that_allows_a_layer(
    start: Callable[..., Daemon], layers: dict[str, Path]
) -> None:
    """And for a rule once, however many layers it allows."""
    rules = trusting(layers["ext4"], max_mounts="2").replace("/*", "").replace("trusted in", "few in")
    daemon = start(rules + trusting(layers["erofs"].parent, max_mounts="3"))
    mixed, others = [layers["erofs"], layers["ext4"]], [layers["erofs"], layers["squashfs"]]
    with mounted(daemon, mixed), mounted(daemon, mixed):
        assert refusal(daemon, mixed)[0] == "LimitExceeded"
        with mounted(daemon, others):
            assert refusal(daemon, others)[0] == "LimitExceeded"
    # What was refused or is gone has no place any more.
    with mounted(daemon, mixed), mounted(daemon, mixed), mounted(daemon, others):
        pass


def test_from_the_command_line(serving: Daemon, layers: dict[str, Path], containers: None) -> None:
    """The topmost layer comes first, the source lies below all."""

    def work() -> tuple[str, str]:
        command = [sys.executable, "-m", "mountd.cli.mountctl", "mount"]
        above = ["--layer", str(layers["erofs"]), "--layer", str(layers["squashfs"])]
        done = subprocess.run(
            [*command, *above, str(layers["ext4"]), "/mnt"],
            cwd=ROOT,
            env={"MOUNTD_SOCKET": str(serving.socket), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stderr, " ".join(sorted(os.listdir("/mnt/merged")))

    assert in_container(work, uids=((0, 0, 65536),), owner=0) == ("", "bottom middle top")


def test_a_stack_is_attached_where_all_rules_grant_it(
    start: Callable[..., Daemon], layers: dict[str, Path], place: Path
) -> None:
    grounds = place / "stack-grounds"
    grounds.mkdir(mode=0o755)
    rules = trusting(layers["ext4"]).replace("/*", "").replace("trusted in", "nowhere in")
    daemon = start(rules + trusting(layers["erofs"].parent, attach=f'["{grounds}/$UID/**"]'))
    own = user_of(daemon, grounds, USER)
    target = own.directory("stack")
    with own.attached(layers["squashfs"], target, layers=[str(layers["erofs"])]):
        assert (target / "both").read_text() == "top"
        assert set(os.listdir(target / "merged")) == {"top", "middle"}
    name, _, _ = own.attach(layers["ext4"], target, layers=[str(layers["erofs"])])
    assert name == "AttachNotPermitted"
    shutil.rmtree(grounds)


def test_a_refused_stack_leaves_no_copy_of_a_layer(
    begin: Callable[[str], Case], makers: Makers, place: Path, other: bytes
) -> None:
    """The first layer can be had by a copy in the store, the second one not at all."""
    case = begin(key_sections(makers.keys) + STORED)
    signature, of_other = (source(makers.own["ed25519"](each)) for each in (case.data, other))

    def work(second: dict[str, object]) -> Outcome:
        with (
            OwnedFd(os.open(path, os.O_RDONLY)) as fd,
            OwnedFd(os.open(stray, os.O_RDONLY)) as another,
        ):
            fds = [fd.fileno(), another.fileno()]
            above = {"layers": [signature, {**second, "imageFileDescriptor": 1}]}
            return outcome(lambda: mount_fds(case.daemon.socket, above, fds))

    with users_file(place, case.data) as path, users_file(place, other) as stray:
        name, text = as_user(lambda: work({}))
        assert name, text
        assert "source.layers[1]" in text
        assert case.stored() == []
        assert as_user(lambda: work(of_other)) == ("", "")
        assert case.stored() == sorted(digest_of(each) for each in (case.data, other))


def test_a_stack_is_revoked_by_the_digest_of_any_layer(
    begin: Callable[[str], Case], makers: Makers, place: Path, other: bytes
) -> None:
    case = begin(key_sections(makers.keys) + STORED)
    with users_file(place, case.data) as one, users_file(place, other) as two:
        fds = [os.open(path, os.O_RDONLY) for path in (one, two)]
        signatures = [source(makers.own["ed25519"](each)) for each in (case.data, other)]
        both = {"layers": [{**each, "imageFileDescriptor": n} for n, each in enumerate(signatures)]}
        with user():
            reply = mount_fds(case.daemon.socket, both, fds)
        with reply, Client(str(case.daemon.socket)) as client:
            assert reply.decision["trustedBy"] == "stored"
            for each in (case.data, other):
                told = client.call("io.mountd.Admin.Revoke", {"digest": digest_of(each)}, [])[0]
                assert told["held"]
        for fd in fds:
            os.close(fd)


def test_workers_are_killed_at_any_moment(start: Callable[..., Daemon], layers: dict[str, Path]) -> None:
    """What a worker had made of a stack goes with it."""
    daemon, dice = start(trusting(layers["erofs"].parent)), random.Random(41)
    before = settled(daemon)
    begun = time.perf_counter()
    mounted(daemon, all_layers(layers)).close()
    longest = time.perf_counter() - begun
    ends = {"": 0}
    for _ in range(KILLS):
        assert eventually(lambda: len(daemon.workers) >= 1)
        killer = threading.Timer(dice.uniform(0, longest), kill_workers, (daemon,))
        killer.start()
        try:
            name, _ = refusal(daemon, all_layers(layers))
        finally:
            killer.join()
        ends[name] = ends.get(name, 0) + 1
    assert set(ends) <= {"", "SyscallError", "MountFailed", "Unreachable", "RemoteError"}, ends
    assert sum(ends.values()) > ends[""] > 0, ends
    # The last ones may have been killed at rest, and one be asked before that is noticed.
    settled(daemon)
    assert eventually(lambda: refusal(daemon, all_layers(layers)) == ("", ""))
    assert eventually(lambda: daemon.held() == before, 10), (before, daemon.held())
    for image in layers.values():
        wait_until_dropped(image)


def kill_workers(daemon: Daemon) -> None:
    for pid in daemon.workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_directory_of_the_callers_over_an_image(
    start: Callable[..., Daemon], layers: dict[str, Path], place: Path, containers: None
) -> None:
    """Its owner is the root of a container there, as in a mount of its own; nobody else can be seen."""
    daemon = start(trusting(layers["ext4"].parent) + rule("own", '"caller"'))
    home = directory(Path(tempfile.mkdtemp(prefix="layer-", dir=place)), {"both": "home", "roots": "root's"})
    os.chown(home, USER, USER)
    os.chown(home / "both", USER, USER)
    (home / "roots").chmod(0o600)

    with mounted(daemon, [home, layers["ext4"]]) as reply:
        fd = reply.mount.fileno()
        assert reply.decision["trustedBy"] == "caller-owned, root-owned"
        assert names(reply.mount) >= {"both", "roots", "secret"}
        assert read(reply.mount, "both") == "home"
        assert errno_of(lambda: os.unlink("both", dir_fd=fd)) == "EROFS"
        opened = as_user(lambda: errno_of(lambda: os.close(os.open("roots", os.O_RDONLY, dir_fd=fd))))
        assert opened == "EACCES"
    os.chown(home, USER + 1, USER + 1)
    name, text = refusal(daemon, [layers["ext4"], home])
    assert name == "DeniedByPolicy"
    assert "source.layers[1]" in text
    shutil.rmtree(home)
