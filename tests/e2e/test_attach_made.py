"""Attach for a mount that Mount has made before, that very one, once, as the rule is now."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mountd.client import Client
from mountd.errors import MountdError
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Unmount
from mountd.kernel.mount_info import mount_id
from tests.container import as_user, forked
from tests.daemon import Daemon
from tests.e2e.admin import ask
from tests.e2e.attaching import Answer, User, asked, detached, granting, id_at, records, user_of
from tests.e2e.calls import mounted
from tests.e2e.conftest import trusting

ALICE, BOB = 4240, 4241
Scene = tuple[Daemon, Path]


@pytest.fixture(scope="module")
def scene(place: Path, images: dict[str, Path]) -> Iterator[Scene]:
    with granting(place, "made", lambda grant: trusting(place / "trusted", attach=grant)) as made:
        yield made


@pytest.fixture
def alice(scene: Scene) -> User:
    return user_of(*scene, ALICE)


@pytest.fixture
def bob(scene: Scene) -> User:
    return user_of(*scene, BOB)


def attach(user: User, mount_fd: int, target: Path, **fields: object) -> Answer:
    fds = [OwnedFd(os.dup(mount_fd)), OwnedFd(os.open(target, os.O_PATH))]
    parameters = {"mountFileDescriptor": 0, "targetFileDescriptor": 1, **fields}
    try:
        with Client(str(user.daemon.socket)) as client:
            reply = client.call("Attach", parameters, fds)[0]
    except MountdError as error:
        return type(error).__name__, str(error), 0
    finally:
        for fd in fds:
            fd.close()
    assert isinstance(reply["decision"], dict)
    assert reply["decision"]["rule"] == "trusted in the test"
    return "", "", int(str(reply["id"]))


def test_it_is_attached_once(alice: User, images: dict[str, Path]) -> None:
    target, other = alice.directory("made"), alice.directory("made-other")

    def work() -> tuple[Answer, int, bool, Answer, Answer]:
        with mounted(alice.daemon.socket, images["erofs"]) as reply:
            made = mount_id(reply.mount.fileno())
            answer = attach(alice, reply.mount.fileno(), target)
            seen = (target / "hello").exists()
            again = attach(alice, reply.mount.fileno(), other)
        return answer, made, seen, again, detached(alice.daemon.socket, answer[2])

    answer, made, seen, again, end = as_user(work, ALICE)
    assert (answer, seen) == (("", "", made), True)
    assert (again[0], "attached already" in again[1]) == ("AttachNotPermitted", True)
    assert end[:2] == ("", "")
    assert os.listdir(target) == []


def test_no_copy_of_it(alice: User, images: dict[str, Path]) -> None:
    """Such as somebody else has made, whose flags may be others: it has another id."""
    target, first = alice.directory("copies"), alice.directory("copied-from")
    with alice.attached(images["erofs"], first), mount_api.clone_mount(str(first)) as copy:
        answer = as_user(lambda: attach(alice, copy.fileno(), target), ALICE)
    assert answer[0] == "AttachNotPermitted"
    assert "no mount that mountd has made for the caller" in answer[1]


def test_not_for_another(alice: User, bob: User, images: dict[str, Path]) -> None:
    """Nor what somebody else has mounted, nor what is no mount."""
    target = bob.directory("stolen")
    with as_owner(alice, images["erofs"]) as made:
        for fd in (made, os.open("/usr", os.O_PATH), os.open("/proc", os.O_PATH)):
            name, text, _ = as_user(lambda fd=fd: attach(bob, fd, target), BOB)  # type: ignore[misc]
            assert name in ("AttachNotPermitted", "BadFileDescriptor"), text
            if fd != made:
                os.close(fd)


def test_nothing_else_goes_with_it(alice: User, images: dict[str, Path]) -> None:
    target = alice.directory("wishes")
    with OwnedFd(os.open("/proc", os.O_PATH)) as fd:

        def answer(**fields: object) -> str:
            return as_user(lambda: attach(alice, fd.fileno(), target, **fields), ALICE)[0]

        assert answer(readOnly=False) == "InvalidParameter"
        assert answer(options=["dev"]) == "InvalidParameter"
        assert answer(source={"tmpfs": {"size": 4096}}) == "InvalidParameter"
        assert answer(interactive=True) == "AttachNotPermitted"


def taken(pidfd: int, number: int) -> int:
    """A descriptor of another process (pidfd_getfd(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(438, pidfd, number, 0)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return int(fd)


@contextmanager
def as_owner(user: User, image: Path) -> Iterator[int]:
    """A mount that was made for `user`, in a process of its own; yields a descriptor of it, for this one."""
    ready, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresgid(user.uid, user.uid, user.uid)
            os.setresuid(user.uid, user.uid, user.uid)
            with mounted(user.daemon.socket, image) as reply:
                os.write(say, str(reply.mount.fileno()).encode())
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(say)
    try:
        number = int(os.read(ready, 8))
        with namespaces.pidfd_open(pid) as pidfd, OwnedFd(taken(pidfd.fileno(), number)) as fd:
            yield fd.fileno()
    finally:
        os.close(ready)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def made_in_a_namespace(user: User, image: Path) -> OwnedFd:
    """A mount that was made for `user` in a user namespace, and is handed to this process of the host."""
    ours, theirs = socket.socketpair()

    def work() -> None:
        namespaces.unshare(Clone.NEWUSER | Clone.NEWNS)
        with mounted(user.daemon.socket, image, userns="none") as reply:
            socket.send_fds(theirs, [b"made"], [reply.mount.fileno()])

    with ours, theirs:
        forked(work)
        return OwnedFd(socket.recv_fds(ours, 8, 1)[1][0])


def reloaded(daemon: Daemon, policy: str) -> None:
    """Have another policy in force."""
    daemon.set_policy(policy)
    assert ask(daemon, "Reload")["reloaded"]


def asked_by_source(user: User, image: Path, target: Path) -> Answer:
    with OwnedFd(os.open(target, os.O_PATH)) as fd:
        return asked(user.daemon.socket, image, fd.fileno())


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """Do all of it at the same time, each in a process of the user's; return what they return."""
    start = threading.Barrier(len(works))

    def do(work: Callable[[], Any]) -> Any:
        start.wait()
        return as_user(work, ALICE)

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(do, works))


class TestTheRuleAsItIsNow:
    """Attaching by what the policy no longer lets the caller have, or never did where it is."""

    @pytest.fixture
    def restored(self, alice: User) -> Iterator[str]:
        policy = (alice.daemon.policy_dir / "test.toml").read_text()
        yield policy
        reloaded(alice.daemon, policy)

    def asked(self, user: User, image: Path, name: str, policy: str) -> Answer:
        """Have `image` mounted, and attached once the policy is another."""
        target = user.directory(name)
        with as_owner(user, image) as made:
            reloaded(user.daemon, policy)
            answer = as_user(lambda: attach(user, made, target), user.uid)
            if not answer[0]:
                assert user.detach(answer[2], lazy=True)[0] == ""
        assert os.listdir(target) == []
        return answer

    def test_the_rule_is_for_another_place(
        self, alice: User, images: dict[str, Path], restored: str
    ) -> None:
        """As for the source itself: what may be had in a user namespace is not to be had on the host."""
        target = alice.directory("own")
        reloaded(alice.daemon, restored.replace("{ any = true }", '{ user-namespace = "own" }'))

        def work() -> tuple[Answer, Answer]:
            with made_in_a_namespace(alice, images["erofs"]) as made:
                by_source = asked_by_source(alice, images["erofs"], target)
                return by_source, attach(alice, made.fileno(), target)

        for answer in as_user(work, ALICE):
            assert answer[0] == "DeniedByPolicy", answer
        assert "the caller has no user namespace of its own" in answer[1]
        assert "rule “trusted in the test”" in answer[1]

    @pytest.mark.parametrize(
        ("instead", "text"),
        [
            ("{ users = [1] }", "the caller's uid 4240 is not among its users"),
            ("{ groups = [1] }", "the caller is in none of its groups"),
        ],
    )
    def test_the_rule_is_for_others_by_now(
        self, alice: User, images: dict[str, Path], restored: str, instead: str, text: str
    ) -> None:
        name, said, _ = self.asked(
            alice, images["erofs"], instead[2:7], restored.replace("{ any = true }", instead)
        )
        assert (name, text in said) == ("DeniedByPolicy", True), said

    def test_the_rule_denies_by_now(self, alice: User, images: dict[str, Path], restored: str) -> None:
        lines = restored.split("require =")[0] + 'verdict = "deny"\n'
        name, said, _ = self.asked(alice, images["erofs"], "denies", lines)
        assert (name, "the rule denies it" in said) == ("DeniedByPolicy", True), said

    def test_another_denies_everything(self, alice: User, images: dict[str, Path], restored: str) -> None:
        first = f"""
[[rule]]
name = "not her"
image = {{ any = true }}
caller = {{ users = [{ALICE}] }}
verdict = "deny"
"""
        name, said, _ = self.asked(alice, images["erofs"], "everything", first + restored)
        assert (name, "rule “not her”" in said) == ("DeniedByPolicy", True), said

    def test_the_rule_is_gone(self, alice: User, images: dict[str, Path], restored: str) -> None:
        policy = restored.replace("trusted in the test", "another")
        name, said, _ = self.asked(alice, images["erofs"], "gone", policy)
        assert (name, "grants no place for it" in said) == ("AttachNotPermitted", True), said

    def test_the_rule_asks(self, alice: User, images: dict[str, Path], restored: str) -> None:
        """Whoever was to be asked has been, for the mount itself."""
        policy = restored.replace('verdict = "allow"', 'verdict = "ask"')
        assert self.asked(alice, images["erofs"], "asks", policy)[0] == ""

    def test_the_rule_is_narrower_and_still_for_them(
        self, alice: User, images: dict[str, Path], restored: str
    ) -> None:
        policy = restored.replace("{ any = true }", f"{{ users = [{ALICE}] }}")
        assert self.asked(alice, images["erofs"], "narrower", policy)[0] == ""


def test_what_somebody_else_has_attached_is_not_detached(
    alice: User, images: dict[str, Path], place: Path
) -> None:
    """Whoever asked for it has given it away, for one; whatever is written down of what mountd attaches."""
    theirs = place / "theirs"
    theirs.mkdir()
    shutil.rmtree(alice.daemon.directory / "run/attached", ignore_errors=True)
    with as_owner(alice, images["erofs"]) as made:
        mount_api.move_mount(made, str(theirs))
        try:
            assert alice.detach(mount_id(made), lazy=True)[0] == "NotFound"
            assert (theirs / "hello").exists()
        finally:
            mount_api.umount(str(theirs), Unmount.DETACH)


class TestAtOnce:
    """Whatever comes of several calls about one mount: who has it attached can have it detached."""

    ROUNDS = 25

    def test_two_attach_it(self, alice: User, images: dict[str, Path]) -> None:
        targets = [alice.directory("first"), alice.directory("second")]
        for _ in range(self.ROUNDS):
            with as_owner(alice, images["erofs"]) as made:
                answers = together([partial(attach, alice, made, at) for at in targets])
                assert sorted(answer[0] for answer in answers) == ["", "AttachNotPermitted"], answers
                assert any("just being attached" in answer[1] for answer in answers)
                (id,) = [answer[2] for answer in answers if not answer[0]]
                assert records(alice.daemon) == [str(id)]
                assert alice.detach(id, lazy=True) == ("", "", id)
            assert [os.listdir(at) for at in targets] == [[], []]

    def test_one_detaches_it_meanwhile(self, alice: User, images: dict[str, Path]) -> None:
        target = alice.directory("meanwhile")
        nothing = id_at(target)
        said: set[str] = set()
        for _ in range(self.ROUNDS):
            with as_owner(alice, images["erofs"]) as made:
                id = mount_id(made)
                answer, found = together(
                    [partial(attach, alice, made, target), partial(self.detached_often, alice, id, target)]
                )
                said |= found
                assert answer[0] == "", answer
                if id_at(target) == id:
                    assert alice.detach(id, lazy=True) == ("", "", id)
            assert records(alice.daemon) == []
            assert id_at(target) == nothing
        assert said <= {"", "NotFound", "InUse"}, said

    def detached_often(self, user: User, id: int, target: Path) -> set[str]:
        """Ask for the end of a mount until something is there, or was; return the answers."""
        found: set[str] = set()
        deadline = time.monotonic() + 2
        while id_at(target) != id and not found & {"", "InUse"} and time.monotonic() < deadline:
            found.add(detached(user.daemon.socket, id)[0])
        return found
