"""Rules about who calls, through the socket: groups, the host's user namespace, and any other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mountd.kernel import namespaces
from mountd.kernel.flags import Clone
from mountd.trust.match import OVERFLOW_ID
from tests.container import USER, as_user, forked, in_container, user_namespace
from tests.daemon import Daemon
from tests.e2e.calls import explain, mount, mount_fds, outcome
from tests.e2e.conftest import trusting
from tests.rogue import Raw, error, mount_call, opened

GROUP = 4500
MAPPED = ((0, 400000, 65536),)
Start = Callable[..., Daemon]


def only(images: dict[str, Path], caller: str) -> str:
    """A rule for the images of the tests that only some callers can use."""
    return trusting(images["erofs"].parent).replace("caller = { any = true }", f"caller = {{ {caller} }}")


def says(daemon: Daemon, image: Path, **wishes: object) -> str:
    """Ask for a mount, and return what came of it: the name of the error, "" for a mount."""
    return outcome(lambda: mount(daemon.socket, image, **wishes))[0]


def reason(daemon: Daemon, image: Path) -> str:
    """Why the rule of the test does not apply, "" if it does; the verdict is the same as that of Mount."""
    with opened(image) as fds:
        reply = explain(daemon.socket, {"imageFileDescriptor": 0}, fds)
    steps, decision = reply["steps"], reply["decision"]
    assert isinstance(steps, list)
    assert isinstance(decision, dict)
    applies = decision["verdict"] == "allow"
    assert steps[0]["applies"] == applies
    assert says(daemon, image) == ("" if applies else "DeniedByPolicy")
    return "" if applies else str(steps[0]["reason"])


@pytest.mark.parametrize(
    ("gid", "groups", "fits"),
    [
        (GROUP, (), True),
        (USER, (GROUP,), True),
        (USER, (USER, *range(5000, 5200), GROUP), True),  # however many there are
        (USER, (), False),
        (USER, (GROUP - 1, GROUP + 1), False),
        (OVERFLOW_ID, (OVERFLOW_ID,), False),
    ],
)
def test_groups(start: Start, images: dict[str, Path], gid: int, groups: Sequence[int], fits: bool) -> None:
    daemon = start(only(images, f"groups = [{GROUP}]"))
    said = as_user(lambda: reason(daemon, images["erofs"]), gid=gid, groups=groups)
    assert said == ("" if fits else "the caller is in none of its groups")


def test_no_rule_can_be_about_the_group_of_nobody(start: Start, images: dict[str, Path]) -> None:
    """The kernel says 65534 for all that it cannot say; a policy that names it denies everything."""
    daemon = start(only(images, f"groups = [{OVERFLOW_ID}]"))
    said = as_user(lambda: says(daemon, images["erofs"]), gid=OVERFLOW_ID, groups=(OVERFLOW_ID,))
    assert said == "DeniedByPolicy"
    assert str(OVERFLOW_ID) in daemon.log
    assert "the policy is broken, everything is denied" in daemon.log


def test_groups_are_those_of_the_host(start: Start, images: dict[str, Path], containers: None) -> None:
    """Whoever has a range of ids can be in any group of its own, and in none of the host's."""
    daemon = start(only(images, f"groups = [{GROUP}]"))
    mapped = start(only(images, f"groups = [{400000 + GROUP}]"))

    def in_the_group() -> list[str]:
        os.setgroups([GROUP])
        os.setresgid(GROUP, GROUP, GROUP)
        return [reason(daemon, images["erofs"]), reason(mapped, images["erofs"])]

    assert in_container(in_the_group, uids=MAPPED) == ["the caller is in none of its groups", ""]


def test_groups_are_those_from_when_it_connected(start: Start, images: dict[str, Path]) -> None:
    daemon = start(only(images, f"groups = [{GROUP}]"))

    def work(before: list[int], after: list[int]) -> str | None:
        os.setgroups(before)
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, 0)
        with Raw(daemon) as raw, opened(images["erofs"]) as fds:
            os.setresuid(0, 0, 0)
            os.setgroups(after)
            raw.send(mount_call(), fds)
            return error(raw.reply())

    assert forked(lambda: work([GROUP], [])) == ""
    assert forked(lambda: work([], [GROUP])) == "DeniedByPolicy"


ON_HOST = "the caller is in the host's user namespace"
IN_ANOTHER = "the caller is not in the host's user namespace"
PLACES = [
    # The rule's words, and what it says to a caller on the host and to one in a container.
    ("host = true", "", IN_ANOTHER),
    ("host = false", ON_HOST, ""),
    ("nested = true", ON_HOST, ""),
    ("nested = false", "", IN_ANOTHER),
]


@pytest.mark.parametrize(("words", "on_host", "nested"), PLACES)
def test_host_and_nested(
    start: Start, images: dict[str, Path], containers: None, words: str, on_host: str, nested: str
) -> None:
    """For users and for root, in a container, and in one within it."""
    daemon, image = start(only(images, words)), images["erofs"]
    assert as_user(lambda: reason(daemon, image)) == on_host
    assert reason(daemon, image) == on_host

    def outer() -> list[str]:
        return [reason(daemon, image), forked(alone)]

    def alone() -> str:
        """In a namespace within the container, with one id."""
        namespaces.unshare(Clone.NEWUSER)
        for name in ("uid_map", "gid_map"):
            if name == "gid_map":
                Path("/proc/self/setgroups").write_text("deny")
            Path(f"/proc/self/{name}").write_text("0 0 1")
        return reason(daemon, image)

    assert in_container(outer, uids=MAPPED) == [nested, nested]
    assert in_container(lambda: reason(daemon, image), uids=MAPPED, owner=0) == nested


def test_a_namespace_that_is_handed_over_does_not_change_where_the_caller_is(
    start: Start, images: dict[str, Path]
) -> None:
    """A user on the host who has made a user namespace is on the host all the same."""
    daemons = [start(only(images, words)) for words in ("nested = true", "host = true")]

    def handing_over(daemon: Daemon) -> str:
        with opened(images["erofs"], f"/proc/self/fd/{own.fileno()}") as fds:
            source = {"imageFileDescriptor": 0}
            return outcome(lambda: mount_fds(daemon.socket, source, fds, userNamespaceFileDescriptor=1))[0]

    with user_namespace(((0, USER, 1),), owner=USER) as own:
        assert as_user(lambda: [handing_over(daemon) for daemon in daemons]) == ["DeniedByPolicy", ""]


def test_all_words_of_a_rule_have_to_fit(start: Start, images: dict[str, Path], containers: None) -> None:
    daemon, image = (
        start(only(images, f"groups = [{GROUP}, {400000 + GROUP}], nested = true")),
        images["erofs"],
    )

    def in_the_group() -> str:
        os.setresgid(GROUP, GROUP, GROUP)
        return reason(daemon, image)

    assert in_container(in_the_group, uids=MAPPED) == ""
    assert in_container(lambda: reason(daemon, image), uids=MAPPED) == "the caller is in none of its groups"
    assert as_user(lambda: reason(daemon, image), gid=GROUP) == ON_HOST
