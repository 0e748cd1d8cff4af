"""Ids: mapped as asked, and only to what the caller controls (THREATS.md, D 54 to 57)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.client import MountReply
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation
from mountd.kernel.libc import call
from tests.container import USER, IdMap, as_user, forked, in_container, user_namespace
from tests.daemon import Daemon
from tests.e2e.calls import Outcome, mount_fds, outcome
from tests.e2e.conftest import trusting

OTHER = 4001
DELEGATED = f"{USER}:400000:65536\n{OTHER}:600000:65536\n{USER}:700000:100\nbroken\n{USER}:x:1\n"
WHOLE: IdMap = ((0, 400000, 65536),)
ONE: IdMap = ((0, USER, 1),)
BIND = 4096  # MS_BIND
NOT = "UserNamespaceNotPermitted"


@pytest.fixture(scope="module")
def image(images: dict[str, Path]) -> Path:
    """On disk, the file hello belongs to 0 and owned to 1000."""
    return images["erofs"]


@pytest.fixture(scope="module")
def delegating(place: Path, images: dict[str, Path]) -> Iterator[Daemon]:
    """A daemon on a machine whose administrator has given ranges of ids to users."""
    files = []
    for name in ("subuid", "subgid"):
        files.append(place / name)
        files[-1].write_text(DELEGATED)

    def with_files() -> None:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        for file in files:
            call("mount", bytes(file), f"/etc/{file.name}".encode(), None, BIND, None)

    daemon = Daemon(place / "delegating", trusting(place / "trusted"), preexec_fn=with_files)
    yield daemon
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


def ask(
    daemon: Daemon, image: Path, userns: int | None = None, idmap: dict[str, object] | None = None
) -> MountReply:
    with OwnedFd(os.open(image, os.O_RDONLY)) as fd:
        fields = {} if userns is None else {"userNamespaceFileDescriptor": 1}
        fds = [fd.fileno()] if userns is None else [fd.fileno(), userns]
        return mount_fds(daemon.socket, {"imageFileDescriptor": 0}, fds, idMap=idmap, **fields)


def owners(reply: MountReply) -> list[tuple[int, int]]:
    """Uid and gid of hello and of owned, as this process sees them."""
    with reply.mount:
        found = [os.stat(name, dir_fd=reply.mount.fileno()) for name in ("hello", "owned")]
    return [(status.st_uid, status.st_gid) for status in found]


def ranges(*rows: tuple[int, int, int], gids: tuple[tuple[int, int, int], ...] = ()) -> dict[str, object]:
    def listed(rows: tuple[tuple[int, int, int], ...]) -> list[dict[str, int]]:
        return [dict(zip(("first", "target", "count"), row, strict=True)) for row in rows]

    return {"kind": "ranges", "uidRanges": listed(rows), "gidRanges": listed(gids or rows)}


def container_root(work: Callable[[], object]) -> object:
    return in_container(work)


def container_user(work: Callable[[], object]) -> object:
    return in_container(lambda: as_user(work, 5))


def host_user(work: Callable[[], object]) -> object:
    return as_user(work)


def host_root(work: Callable[[], object]) -> object:
    return work()


def other_user(work: Callable[[], object]) -> object:
    return as_user(work, OTHER)


def nobody(work: Callable[[], object]) -> object:
    return as_user(work, 65534)


NOBODY = (65534, 65534)
OWN = "/proc/self/ns/user"


@pytest.mark.parametrize(
    ("who", "userns", "idmap", "expected"),
    [
        (container_root, None, None, [NOBODY, NOBODY]),
        (container_root, None, {"kind": "none"}, [NOBODY, NOBODY]),
        (container_root, OWN, None, [(0, 0), (1000, 1000)]),
        (container_root, OWN, {"kind": "namespace"}, [(0, 0), (1000, 1000)]),
        (container_root, OWN, {"kind": "none"}, [NOBODY, NOBODY]),
        (container_root, None, {"kind": "caller"}, [(0, 0), NOBODY]),
        (container_root, None, ranges((0, 5, 1), (1000, 7, 1)), [(5, 5), (7, 7)]),
        (container_root, OWN, ranges((0, 5, 1), (1000, 7, 1), gids=((1000, 9, 1),)), [(5, 65534), (7, 9)]),
        (container_user, None, {"kind": "caller"}, [(5, 5), NOBODY]),
        (container_user, None, ranges((1000, 5, 1)), [NOBODY, (5, 5)]),
        (host_user, None, None, [(0, 0), (1000, 1000)]),
        (host_user, None, {"kind": "caller"}, [(USER, USER), NOBODY]),
        (host_user, None, ranges((1000, USER, 1)), [NOBODY, (USER, USER)]),
        (host_root, None, None, [(0, 0), (1000, 1000)]),
        (host_root, None, {"kind": "caller"}, [(0, 0), NOBODY]),
        (host_root, None, ranges((0, 777, 2), (1000, 33, 1)), [(777, 777), (33, 33)]),
        (nobody, None, None, [(0, 0), (1000, 1000)]),
    ],
)
def test_kinds(
    daemon: Daemon,
    image: Path,
    containers: None,
    who: Callable[[Callable[[], object]], object],
    userns: str | None,
    idmap: dict[str, object] | None,
    expected: object,
) -> None:
    def work() -> object:
        if userns is None:
            return owners(ask(daemon, image, None, idmap))
        with OwnedFd(os.open(userns, os.O_RDONLY)) as fd:
            return owners(ask(daemon, image, fd.fileno(), idmap))

    assert who(work) == expected


# As many lines as the kernel takes, and as many bytes.
LINES: IdMap = (*((row, 2 * row, 1) for row in range(339)), (1000, 2000, 1))
BYTES: IdMap = (*((row, 400000 + 2 * row, 1) for row in range(300)), (1000, 410000, 1))


@pytest.mark.parametrize(
    ("who", "uids", "gids", "expected"),
    [
        (host_user, ONE, None, [(USER, USER), NOBODY]),
        (host_user, WHOLE, None, [(400000, 400000), (401000, 401000)]),
        (host_user, WHOLE, ((0, 400500, 2000),), [(400000, 400500), (401000, 401500)]),
        (host_user, ((0, USER, 1), (1, 400000, 2000)), None, [(USER, USER), (400999, 400999)]),
        (host_user, ((1000, 700000, 100),), None, [NOBODY, (700000, 700000)]),
        (host_user, BYTES, None, [(400000, 400000), (410000, 410000)]),
        (host_root, LINES, None, [(0, 0), (2000, 2000)]),
        (host_root, ((0, 4294901760, 1), (1000, 1, 1)), None, [(4294901760, 4294901760), (1, 1)]),
    ],
)
def test_d54_namespaces_of_any_shape(
    delegating: Daemon,
    image: Path,
    who: Callable[[Callable[[], object]], object],
    uids: IdMap,
    gids: IdMap | None,
    expected: object,
) -> None:
    """All of them without a process in them; uids unlike gids; 340 lines; not from 0 on."""
    with user_namespace(uids, gids, owner=USER) as userns:
        assert who(lambda: owners(ask(delegating, image, userns.fileno()))) == expected


@pytest.mark.parametrize("who", [host_user, host_root, container_root])
@pytest.mark.parametrize(
    ("path", "error", "text"),
    [
        ("/proc/self/ns/mnt", "BadFileDescriptor", "it is not a user namespace"),
        ("/proc/self/ns/net", "BadFileDescriptor", "it is not a user namespace"),
        ("/proc/self/ns/pid", "BadFileDescriptor", "it is not a user namespace"),
        ("/dev/null", "BadFileDescriptor", "it is not a user namespace"),
        ("/", "BadFileDescriptor", "it is not a user namespace"),
        ("host", NOT, "it is the host's"),
        ("empty", NOT, "it maps no ids: its map of uids is empty"),
        ("no gids", NOT, "it maps no ids: its map of gids is empty"),
    ],
)
def test_d54_what_is_none_and_what_maps_nothing(
    daemon: Daemon,
    image: Path,
    containers: None,
    who: Callable[[Callable[[], object]], object],
    path: str,
    error: str,
    text: str,
) -> None:
    with (
        user_namespace((), owner=USER) as empty,
        user_namespace(ONE, (), owner=USER) as no_gids,
        OwnedFd(os.open(OWN, os.O_RDONLY)) as host,
    ):
        made = {"empty": empty.fileno(), "no gids": no_gids.fileno(), "host": host.fileno()}

        def work() -> Outcome:
            if path in made:
                return outcome(lambda: ask(daemon, image, made[path]))
            with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
                return outcome(lambda: ask(daemon, image, fd.fileno()))

        found = who(work)
    assert isinstance(found, tuple)
    assert found[0] == error
    assert text in found[1]


@pytest.mark.parametrize(
    ("who", "uids", "gids", "owner", "text"),
    [
        # D 55: the ids would be the caller's, the namespace is not
        (
            host_user,
            ONE,
            None,
            OTHER,
            f"neither it nor an ancestor of it belongs to the caller's uid {USER}",
        ),
        (host_user, WHOLE, None, 0, "neither it nor an ancestor of it belongs"),
        (other_user, ONE, None, USER, f"belongs to the caller's uid {OTHER}"),
        (container_root, WHOLE, None, USER, "neither the caller's own nor a descendant of it"),
        (nobody, ((0, 65534, 1),), None, 65534, "stands for every unknown id"),
        # D 56: the namespace is the caller's, the ids are not
        (host_user, ((0, 0, 1),), None, USER, "host uids 0, which"),
        (host_user, ((0, USER, 1), (1, 33, 1)), None, USER, "host uids 33, which"),
        (host_user, ((0, 0, 65536),), None, USER, "host uids 0 to 3999, which"),
        (host_user, ((0, 600000, 65536),), None, USER, "host uids 600000 to 665535, which"),
        (host_user, ((0, 400000, 65537),), None, USER, "host uids 465536, which"),
        (host_user, ((0, 399999, 2),), None, USER, "host uids 399999, which"),
        (host_user, ((0, 400000, 9), (9, 700000, 101)), None, USER, "host uids 700100, which"),
        (host_user, ((0, OTHER, 1),), None, USER, f"host uids {OTHER}, which"),
        (host_user, WHOLE, ((0, 0, 1),), USER, "host gids 0, which"),
        (host_user, WHOLE, ((0, 600000, 1),), USER, "host gids 600000, which"),
        (other_user, WHOLE, None, OTHER, "host uids 400000 to 465535, which"),
    ],
)
def test_d55_d56_not_the_callers(
    delegating: Daemon,
    image: Path,
    containers: None,
    who: Callable[[Callable[[], object]], object],
    uids: IdMap,
    gids: IdMap | None,
    owner: int,
    text: str,
) -> None:
    with user_namespace(uids, gids, owner=owner) as userns:
        found = who(lambda: outcome(lambda: ask(delegating, image, userns.fileno())))
    assert isinstance(found, tuple)
    assert found[0] == NOT, found
    assert text in found[1]


def test_d56_without_a_line_in_subuid_only_the_own_id_remains(daemon: Daemon, image: Path) -> None:
    with user_namespace(WHOLE, owner=USER) as whole, user_namespace(ONE, owner=USER) as one:
        assert as_user(lambda: outcome(lambda: ask(daemon, image, whole.fileno())))[0] == NOT
        assert as_user(lambda: outcome(lambda: ask(daemon, image, one.fileno()))) == ("", "")


def test_d55_namespaces_below_others(delegating: Daemon, image: Path, containers: None) -> None:
    """Below mine is mine, whoever made it there; below another's is not."""
    with (
        user_namespace(WHOLE, owner=USER) as mine,
        user_namespace(((0, 5, 10),), owner=7, below=mine.fileno()) as below,
        user_namespace(((0, 600000, 9),), owner=OTHER) as others,
        user_namespace(((0, 3, 1),), owner=0, below=others.fileno()) as below_others,
    ):

        def work() -> list[Outcome]:
            given = [each.fileno() for each in (mine, below, others, below_others)]
            return [outcome(lambda fd=fd: ask(delegating, image, fd)) for fd in given]

        assert [name for name, _ in as_user(work)] == ["", "", NOT, NOT]
        assert as_user(lambda: owners(ask(delegating, image, below.fileno())))[0] == (400005, 400005)
        # Its maker is uid 7 there, which is 400007 here: it has the namespace, but only its own id.
        assert as_user(work, 400007)[1] == (
            NOT,
            "user namespace not permitted: it maps host uids 400005 to 400006, which the caller may not use",
        )


def test_d55_members_of_a_container(daemon: Daemon, image: Path, containers: None) -> None:
    """A user of a container who is not its root: what it made itself it may use, for its own id."""

    def work() -> list[Outcome]:
        with (
            OwnedFd(os.open(OWN, os.O_RDONLY)) as own,
            user_namespace(((0, 5, 1),), owner=5) as made,
            user_namespace(((0, 5, 1),), owner=6) as made_by_another,
            user_namespace(((0, 6, 1),), owner=5) as for_another,
        ):
            given = [each.fileno() for each in (own, made, made_by_another, for_another)]
            asked = [lambda fd=fd: outcome(lambda: ask(daemon, image, fd)) for fd in given]
            return [as_user(each, 5) for each in asked] + [each() for each in asked]

    found = in_container(work)
    texts = [text.removeprefix("user namespace not permitted: ") for _, text in found]
    assert texts == [
        "it is the caller's own, of which the caller is neither root nor owner",
        "",
        "neither it nor an ancestor of it belongs to the caller's uid 400005",
        "it maps host uids 400006, which the caller may not use",
        *[""] * 4,
    ]


def test_d55_a_container_cannot_have_what_lies_outside(
    daemon: Daemon, image: Path, containers: None
) -> None:
    """Neither the host's namespace, nor the one that the container's own lies in, nor a sibling's."""
    with OwnedFd(os.open(OWN, os.O_RDONLY)) as host:

        def outer() -> list[str]:
            with OwnedFd(os.open(OWN, os.O_RDONLY)) as parent, user_namespace(((0, 9, 9),)) as sibling:
                given = [each.fileno() for each in (host, parent, sibling)]

                def inner() -> list[str]:
                    namespaces.unshare(Clone.NEWUSER)
                    return [outcome(lambda fd=fd: ask(daemon, image, fd))[1] for fd in given]

                return forked(inner)

        found = in_container(outer)
    assert "it is the host's" in found[0]
    for text in found[1:]:
        assert "neither the caller's own nor a descendant of it" in text


def test_d57_a_map_is_read_again_until_it_is_written(daemon: Daemon, image: Path) -> None:
    """Every worker forgets what was empty, so that what is mounted is what was judged."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        namespaces.unshare(Clone.NEWUSER)
        os.write(writer, b"k")
        os.read(reader, 1)  # until it is killed
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    found = []
    with OwnedFd(os.open(f"/proc/{pid}/ns/user", os.O_RDONLY)) as userns:
        for name, text in ((None, ""), ("uid_map", f"0 {USER} 1\n"), ("gid_map", f"0 {USER} 1\n")):
            if name is not None:
                Path(f"/proc/{pid}/{name}").write_text(text)
            for _ in range(20):
                found.append(as_user(lambda: outcome(lambda: ask(daemon, image, userns.fileno())))[1])
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        # What is known of it stays true without a process in it.
        assert as_user(lambda: owners(ask(daemon, image, userns.fileno())))[0] == (USER, USER)
    os.close(reader)
    assert [text.rpartition(": ")[2] for text in found] == [
        *["its map of uids is empty"] * 20,
        *["its map of gids is empty"] * 20,
        *[""] * 20,
    ]


@pytest.mark.parametrize(
    ("who", "idmap", "error", "text"),
    [
        (host_user, ranges((0, 0, 1)), NOT, "host uids 0, which"),
        (host_user, ranges((0, USER, 2)), NOT, f"host uids {USER + 1}, which"),
        (host_user, ranges((0, USER, 1), gids=((0, 0, 1),)), NOT, "host gids 0, which"),
        (container_user, ranges((0, 6, 1)), NOT, "host uids 400006, which"),
        (container_root, ranges((0, 65536, 1)), "InvalidParameter", "does not map 65536"),
        (container_root, ranges((0, 65530, 9)), "InvalidParameter", "does not map 65536"),
        (container_root, ranges((0, 5, 2), (1, 9, 1)), "InvalidParameter", "two ranges have the first 1"),
        (container_root, ranges((0, 5, 2), (7, 6, 1)), "InvalidParameter", "two ranges have the target 6"),
        (container_root, ranges((0, 5, 0)), "InvalidParameter", "no range of ids"),
        (container_root, ranges((-1, 5, 1)), "InvalidParameter", "no range of ids"),
        (container_root, ranges((0, -5, 1)), "InvalidParameter", "no range of ids"),
        (container_root, ranges((4294967295, 5, 1)), "InvalidParameter", "no range of ids"),
        (container_root, ranges(), "InvalidParameter", "there are no ranges"),
        (container_root, {"kind": "ranges"}, "InvalidParameter", "there are no ranges"),
        (container_root, ranges(*((2 * n, n, 1) for n in range(341))), "LimitExceeded", "at most 340"),
        (
            container_root,
            ranges(*((2 * n, n, 1) for n in range(340))),
            "LimitExceeded",
            "at most 4095 bytes",
        ),
        (container_root, {"kind": "none", "uidRanges": []}, "InvalidParameter", "idMap.uidRanges"),
        (container_root, {"kind": "namespace"}, "InvalidParameter", "userNamespaceFileDescriptor"),
        (nobody, ranges((0, 65534, 1)), NOT, "stands for every unknown id"),
    ],
)
def test_ranges_that_are_refused(
    daemon: Daemon,
    image: Path,
    containers: None,
    who: Callable[[Callable[[], object]], object],
    idmap: dict[str, object],
    error: str,
    text: str,
) -> None:
    found = who(lambda: outcome(lambda: ask(daemon, image, None, idmap)))
    assert isinstance(found, tuple)
    assert found[0] == error, found
    assert text in found[1]


def test_as_many_ranges_as_the_kernel_takes(daemon: Daemon, image: Path, containers: None) -> None:
    assert owners(ask(daemon, image, None, ranges(*LINES))) == [(0, 0), (2000, 2000)]
    rows = [(row, target - 400000, count) for row, target, count in BYTES]
    found = in_container(lambda: owners(ask(daemon, image, None, ranges(*rows))))
    assert found == [(0, 0), (10000, 10000)]


def test_a_range_over_two_lines_of_the_namespaces_map(daemon: Daemon, image: Path, containers: None) -> None:
    def work() -> object:
        return owners(ask(daemon, image, None, ranges((0, 1, 2000))))

    two_lines = ((0, 400000, 500), (500, 410000, 2000))
    assert in_container(work, uids=two_lines) == [(1, 1), (1001, 1001)]
