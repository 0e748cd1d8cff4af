"""Targets that are not the caller's alone, or not where a rule grants anything (THREATS.md, C 49)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation, Unmount
from tests.container import as_user, drop_capabilities, forked, set_dumpable
from tests.daemon import Daemon
from tests.e2e.attaching import DIRECTORY, Answer, User, asked, detached, granting, records, user_of
from tests.e2e.calls import errno_of
from tests.e2e.conftest import trusting
from tests.fuse import Fuse, Op
from tests.rogue import eventually

DORA, EVE = 4220, 4221
Scene = tuple[Daemon, Path]
MakeTarget = Callable[[User, User], int]  # what is handed over, opened by root


@pytest.fixture(scope="module")
def scene(place: Path, images: dict[str, Path]) -> Iterator[Scene]:
    with granting(place, "refused", lambda grant: trusting(place / "trusted", attach=grant)) as made:
        yield made


@pytest.fixture
def dora(scene: Scene) -> User:
    return user_of(*scene, DORA)


@pytest.fixture
def eve(scene: Scene) -> User:
    return user_of(*scene, EVE, 0o755)


def opened(path: Path | str, flags: int = DIRECTORY) -> int:
    return os.open(path, flags)


def another_s(dora: User, eve: User) -> int:
    """Handed along by its owner, or found in /proc."""
    return opened(eve.directory("eve's"))


def below_another_s(dora: User, eve: User) -> int:
    above = dora.directory("given-away")
    target = dora.directory("given-away/target")
    os.chown(above, eve.uid, eve.uid)
    return opened(target)


def below_what_others_write_to(dora: User, eve: User) -> int:
    dora.directory("open", 0o777)
    return opened(dora.directory("open/target"))


def below_what_the_group_writes_to(dora: User, eve: User) -> int:
    dora.directory("group", 0o775)
    return opened(dora.directory("group/target"))


def elsewhere(dora: User, eve: User) -> int:
    """The caller's own, and root's above it; but no rule grants the place."""
    path = dora.own.parent.parent / "attach-elsewhere"
    path.mkdir()
    os.chown(path, dora.uid, dora.uid)
    return opened(path)


def the_granted_directory_itself(dora: User, eve: User) -> int:
    return opened(dora.own)


def removed(dora: User, eve: User) -> int:
    path = dora.directory("removed")
    fd = opened(path)
    path.rmdir()
    return fd


def removed_and_made_anew(dora: User, eve: User) -> int:
    path = dora.directory("anew")
    fd = opened(path)
    os.rename(path, path.with_name("other"))
    path.with_name("other").rmdir()
    path.with_name("anew (deleted)").mkdir()
    return fd


def a_file(dora: User, eve: User) -> int:
    path = dora.own / "file"
    path.touch()
    os.chown(path, dora.uid, dora.uid)
    return opened(path, os.O_PATH)


def a_link(dora: User, eve: User) -> int:
    path = dora.own / "link"
    path.symlink_to("/etc")
    return opened(path, os.O_PATH | os.O_NOFOLLOW)


def below_secret(dora: User, eve: User) -> int:
    """The caller cannot even go there."""
    root = dora.own / "root's"
    root.mkdir(mode=0o700)
    target = root / "target"
    target.mkdir()
    os.chown(target, dora.uid, dora.uid)
    return opened(target)


NOT_PERMITTED = {
    another_s: r"belongs to uid 4221",
    below_another_s: r"given-away belongs to uid 4221, who may put something else in its place",
    below_what_others_write_to: r"open is writable by others, who may put something else there",
    below_what_the_group_writes_to: r"group is writable by others",
    elsewhere: r"rule “trusted in the test” grants .*/\*\*, and .*/attach-elsewhere is none of these",
    the_granted_directory_itself: r"4220 is none of these",
    removed: r"is not at its path in the mount namespace of the caller",
    removed_and_made_anew: r"is not at its path",
    below_secret: r"its path cannot be checked .EACCES",
    lambda dora, eve: opened(dora.directory("sticky", 0o1755)): r"sticky is sticky",
    lambda dora, eve: opened(dora.directory("shared", 0o775)): r"writable by others than the caller",
    lambda dora, eve: opened(dora.directory("public", 0o777)): r"writable by others than the caller",
    lambda dora, eve: opened("/tmp"): r"/tmp belongs to uid 0, not to the caller",
    lambda dora, eve: opened("/etc"): r"/etc belongs to uid 0",
    lambda dora, eve: opened("/proc/self"): r"/proc/[0-9]+ belongs to uid 0, not to the caller",
    lambda dora, eve: opened("/"): r"its path is not a plain one",
}
NOT_A_DIRECTORY = (
    a_file,
    a_link,
    lambda dora, eve: opened("/dev/null", os.O_RDWR),
    lambda dora, eve: os.memfd_create("target"),
    lambda dora, eve: opened("/proc/self/ns/mnt", os.O_RDONLY),
)


@pytest.mark.parametrize("make", NOT_PERMITTED, ids=lambda make: make.__name__)
def test_targets_that_are_refused(dora: User, eve: User, images: dict[str, Path], make: MakeTarget) -> None:
    with OwnedFd(make(dora, eve)) as target:
        name, text, _ = dora.attach(images["erofs"], target.fileno())
    assert name == "AttachNotPermitted", text
    assert re.search(NOT_PERMITTED[make], text), text
    assert records(dora.daemon) == []
    # That the policy has allowed the image is not why, and no rule is to blame.
    assert eventually(lambda: f": refused with AttachNotPermitted: {text}\n" in dora.daemon.log)


@pytest.mark.parametrize("make", NOT_A_DIRECTORY, ids=lambda make: make.__name__)
def test_what_is_no_directory(dora: User, eve: User, images: dict[str, Path], make: MakeTarget) -> None:
    with OwnedFd(make(dora, eve)) as target:
        name, text, _ = dora.attach(images["erofs"], target.fileno())
    assert (name, text) == (
        "BadFileDescriptor",
        "bad file descriptor in targetFileDescriptor: it is not a directory",
    )


def test_something_is_mounted_there(dora: User, images: dict[str, Path]) -> None:
    """Its own tmpfs, even: what is stacked is hard to tell apart, and has no end."""
    target = dora.directory("mounted")
    options = f"uid={dora.uid},gid={dora.uid},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", target], check=True)
    try:
        name, text, _ = dora.attach(images["erofs"], target)
        assert (name, f"something is mounted at {target} already" in text) == ("AttachNotPermitted", True)
        below = dora.directory("mounted/below")
        with dora.attached(images["erofs"], below):
            assert (below / "hello").exists()
    finally:
        subprocess.run(["umount", target], check=True)


def test_a_target_below_what_is_mounted_over_it(dora: User, images: dict[str, Path]) -> None:
    """Its path leads to another directory; what is attached to it would be seen nowhere."""
    above, target = dora.directory("over"), dora.directory("over/target")
    options = f"uid={dora.uid},gid={dora.uid},mode=755"
    with OwnedFd(opened(target)) as fd:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", above], check=True)
        try:
            dora.directory("over/target")
            name, text, _ = dora.attach(images["erofs"], fd.fileno())
        finally:
            subprocess.run(["umount", above], check=True)
    assert (name, "is not at its path" in text) == ("AttachNotPermitted", True)


@contextmanager
def in_namespaces(uid: int, kinds: Clone, act: Callable[[], None]) -> Iterator[int]:
    """A process of `uid` in new namespaces that has done `act` there; yields its pid."""
    ready, done = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            namespaces.unshare(kinds)
            set_dumpable()
            act()
            os.write(done, b"k")
            signal.pause()
        finally:
            os._exit(1)
    os.close(done)
    try:
        assert os.read(ready, 1) == b"k"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_target_in_another_mount_namespace(dora: User, images: dict[str, Path]) -> None:
    """The same directory, by a mount that the caller does not have."""
    target = dora.directory("other-namespace")
    kinds = Clone.NEWUSER | Clone.NEWNS
    with (
        in_namespaces(dora.uid, kinds, lambda: None) as pid,
        OwnedFd(opened(f"/proc/{pid}/root{target}")) as fd,
    ):
        name, text, _ = dora.attach(images["erofs"], fd.fileno())
    assert (name, "is not at its path" in text) == ("AttachNotPermitted", True)


def test_a_target_below_a_mount_of_the_caller_s_own(dora: User, images: dict[str, Path]) -> None:
    """A path in the granted place, in a namespace of its own, that leads to where nothing is granted."""
    place = dora.directory("bound")
    path = dora.own.parent.parent / "not granted"
    path.mkdir()
    os.chown(path, dora.uid, dora.uid)
    (path / "target").mkdir()
    os.chown(path / "target", dora.uid, dora.uid)

    def bind() -> None:
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with mount_api.clone_mount(str(path)) as clone:
            mount_api.move_mount(clone.fileno(), str(place))

    with (
        in_namespaces(dora.uid, Clone.NEWUSER | Clone.NEWNS, bind) as pid,
        OwnedFd(opened(f"/proc/{pid}/root{place}/target")) as fd,
    ):
        name, text, _ = dora.attach(images["erofs"], fd.fileno())
    assert (name, "is not at its path" in text) == ("AttachNotPermitted", True)
    assert not (path / "target/hello").exists()


def test_a_target_below_a_locked_mount(dora: User, images: dict[str, Path]) -> None:
    """What hides it on the host hides it in a user namespace, and is as good a place as any."""
    hidden = dora.directory("hidden")
    below = dora.directory("hidden/target")
    options = f"uid={dora.uid},gid={dora.uid},mode=755"

    def outside() -> list[str]:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with OwnedFd(opened(below)) as covered:
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", hidden], check=True)
            dora.directory("hidden/target")
            return as_user(lambda: inside(covered.fileno()), dora.uid)

    def inside(covered: int) -> list[str]:
        namespaces.unshare(Clone.NEWUSER | Clone.NEWNS)
        Path("/proc/self/uid_map").write_text(f"{dora.uid} {dora.uid} 1")
        said = [errno_of(lambda: mount_api.umount(str(hidden), Unmount.DETACH))]  # it is locked
        drop_capabilities()
        said += asked(dora.daemon.socket, images["erofs"], covered, userns="none")[:2]
        with OwnedFd(opened(below)) as fd:
            name, text, id = asked(dora.daemon.socket, images["erofs"], fd.fileno(), userns="none")
        said += [name, text, str((below / "hello").exists()), detached(dora.daemon.socket, id)[0]]
        return [*said, str(os.path.ismount(hidden)), *os.listdir(below)]

    locked, name, text, *rest = forked(outside)
    assert (locked, name, "is not at its path" in text) == ("EINVAL", "AttachNotPermitted", True), text
    assert rest == ["", "", "True", "", "True"]
    assert os.listdir(below) == []


def test_a_silent_server(dora: User, images: dict[str, Path]) -> None:
    """What a FUSE server says about owners counts for nothing, and it is not waited for."""
    path = dora.directory("served")
    with Fuse(path, b"contents") as fuse, OwnedFd(opened(path)) as fd:
        fuse.silence(Op.GETATTR, Op.LOOKUP, Op.STATFS, Op.OPENDIR)
        name, text, _ = dora.attach(images["erofs"], fd.fileno())
        fuse.abort()
    assert name == "AttachNotPermitted", text


def test_nobody_owns_nothing(scene: Scene, images: dict[str, Path]) -> None:
    nobody = user_of(*scene, 65534)
    with contextlib.suppress(FileExistsError):
        nobody.directory("target")
    name, text, _ = nobody.attach(images["erofs"], nobody.own / "target")
    assert (name, "the caller is nobody" in text) == ("AttachNotPermitted", True)


def test_a_rule_without_places(daemon: Daemon, dora: User, images: dict[str, Path]) -> None:
    target = dora.directory("no-grant")

    def work() -> Answer:
        with OwnedFd(opened(target)) as fd:
            return asked(daemon.socket, images["erofs"], fd.fileno())

    name, text, _ = as_user(work, dora.uid)
    assert (name, text) == (
        "AttachNotPermitted",
        "attaching not permitted: rule “trusted in the test” grants no place for it",
    )


def test_the_policy_comes_first(dora: User, place: Path, images: dict[str, Path]) -> None:
    """A refused image is refused as by Mount, wherever it is to be attached."""
    copy = place / "untrusted.raw"
    copy.write_bytes(images["erofs"].read_bytes())
    name, text, _ = dora.attach(copy, dora.directory("policy"))
    assert (name, "denied by policy: " in text) == ("DeniedByPolicy", True)
