"""Whose ids may be mapped: every way to own a namespace, and every way to pretend to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mountd.caller.model import OVERFLOW_ID, Caller, DelegatedIds, GivenNamespace, IdExtent, UserNamespace
from mountd.errors import UserNamespaceNotPermitted
from mountd.trust.ids import authorize_ids, first_outside, of_containers

DEV = 4
USER = 1000
SUB = range(100000, 165536)


def namespace(
    ino: int, *extents: tuple[int, int, int], owner: int = USER, host: bool = False
) -> UserNamespace:
    ids = tuple(IdExtent(*extent) for extent in extents)
    return UserNamespace(DEV, ino, ids, ids, owner, host)


def chain(*links: UserNamespace) -> GivenNamespace:
    """What is given, then its ancestors."""
    return GivenNamespace(links[0], tuple((link.dev, link.ino, link.owner_uid) for link in links))


def caller(uid: int, inside: UserNamespace, *, powerless: bool = False) -> Caller:
    return Caller(uid, uid, frozenset(), 1, inside, uid, sys_admin=uid == 0 and not powerless)


HOST = namespace(1, (0, 0, 4294967295), owner=0, host=True)
SINGLE = namespace(10, (0, USER, 1))
ROOTLESS = namespace(11, (0, USER, 1), (1, 100000, 65536))
OTHERS = namespace(12, (0, 2000, 1), owner=2000)
CONTAINER = namespace(20, (0, 100000, 65536), owner=0)
INNER = namespace(21, (0, 101000, 100), owner=100000)
INNER_OF_USER = namespace(22, (0, 101000, 1), owner=101000)
SIBLING = namespace(23, (0, 100000, 100), owner=100000)
NONE = DelegatedIds((), ())
DELEGATED = DelegatedIds((SUB,), (SUB,))
IN_HOST = caller(USER, HOST)
IN_CONTAINER = caller(100000, CONTAINER)
USER_IN_CONTAINER = caller(101000, CONTAINER)


@dataclass(frozen=True)
class Row:
    name: str
    caller: Caller
    given: GivenNamespace
    delegated: DelegatedIds = NONE
    refused: str | None = None


ROWS = [
    Row("host root, any", caller(0, HOST), chain(OTHERS)),
    Row("host root without CAP_SYS_ADMIN", caller(0, HOST, powerless=True), chain(OTHERS),
        refused="belongs to the caller"),
    Row("user, own single", IN_HOST, chain(SINGLE)),
    Row("user, own with subids", IN_HOST, chain(ROOTLESS), DELEGATED),
    Row("user, below its own", IN_HOST,
        chain(namespace(31, (0, 100000, 9), owner=100000), ROOTLESS), DELEGATED),
    Row("user, ancestor of another", IN_HOST, chain(namespace(32, (0, USER, 1), owner=7), SINGLE)),
    Row("container root, descendant", IN_CONTAINER, chain(INNER, CONTAINER)),
    Row("container root, its own", IN_CONTAINER, chain(CONTAINER)),
    Row("container root, deep", IN_CONTAINER,
        chain(namespace(33, (0, 101000, 1), owner=5), INNER, CONTAINER)),
    Row("container owner within", caller(USER, ROOTLESS), chain(ROOTLESS)),
    Row(
        "owner but not root within",
        caller(USER, namespace(34, (0, 100000, 9), (9, USER, 1))),
        chain(namespace(34, (0, 100000, 9), (9, USER, 1))),
    ),
    Row("container user, its own", USER_IN_CONTAINER, chain(INNER_OF_USER, CONTAINER)),
    Row("two adjacent extents", IN_HOST, chain(namespace(35, (0, 1000, 3))),
        DelegatedIds((range(1001, 1002), range(1002, 1003)), (range(1001, 1003),))),
    # Refusals.
    Row("host root, the host's", caller(0, HOST), GivenNamespace(HOST, ()), refused="it is the host's"),
    Row("host root, empty", caller(0, HOST), chain(namespace(30)), refused="it maps no ids"),
    Row("host root, no gids", caller(0, HOST), chain(replace(SINGLE, gid_map=())), refused="map of gids"),
    Row("user, the host's", IN_HOST, GivenNamespace(HOST, ()), DELEGATED, "it is the host's"),
    Row("container root, the host's", IN_CONTAINER, GivenNamespace(HOST, ()), refused="it is the host's"),
    Row("overflow on the host", caller(OVERFLOW_ID, HOST),
        chain(namespace(36, (0, OVERFLOW_ID, 1), owner=OVERFLOW_ID)), refused="every unknown id"),
    Row("overflow in a container", caller(OVERFLOW_ID, CONTAINER),
        chain(CONTAINER), refused="every unknown id"),
    Row("another user's", IN_HOST, chain(OTHERS), refused="belongs to the caller's uid 1000"),
    Row("another user's with my ids", IN_HOST,
        chain(replace(SINGLE, owner_uid=2000)), DELEGATED, "belongs to"),
    Row("not a descendant", IN_CONTAINER,
        chain(SINGLE), refused="neither the caller's own nor a descendant"),
    Row("sibling of the same ids", IN_CONTAINER, chain(SIBLING), refused="neither the caller's own"),
    Row("same inode elsewhere", IN_CONTAINER,
        chain(replace(CONTAINER, dev=9)), refused="neither the caller's"),
    Row("ancestor", caller(101000, INNER), chain(CONTAINER), refused="neither the caller's own"),
    Row("container user, container's", USER_IN_CONTAINER,
        chain(CONTAINER), refused="neither root nor owner"),
    Row("container user, another's", USER_IN_CONTAINER, chain(INNER, CONTAINER), refused="uid 101000"),
    Row("host root's uid in a namespace", caller(0, namespace(37, (5, 0, 1), owner=9)), chain(OTHERS),
        refused="neither the caller's own"),
    Row("no chain", IN_HOST, GivenNamespace(SINGLE, ()), refused="could not be found out"),
    Row("chain of another", IN_HOST, GivenNamespace(SINGLE, chain(ROOTLESS).chain), refused="could not be"),
    Row("maps nothing", IN_HOST, chain(namespace(38)), refused="it maps no ids: its map of uids"),
    Row("maps no gids", IN_HOST,
        chain(replace(SINGLE, gid_map=())), refused="it maps no ids: its map of gids"),
    Row("subids not delegated", IN_HOST, chain(ROOTLESS), refused="host uids 100000 to 165535"),
    Row("too many subids", IN_HOST, chain(ROOTLESS), DelegatedIds((range(100000, 165535),), (SUB,)),
        "host uids 165535, which"),
    Row("too few at the start", IN_HOST, chain(ROOTLESS), DelegatedIds((range(100010, 165536),), (SUB,)),
        "host uids 100000 to 100009"),
    Row("gids not delegated", IN_HOST,
        chain(ROOTLESS), DelegatedIds((SUB,), ()), "host gids 100000 to 165535"),
    Row("host root mapped", IN_HOST, chain(namespace(39, (0, 0, 1))), DELEGATED, "host uids 0, which"),
    Row("beyond the container", IN_CONTAINER, chain(namespace(40, (0, 165536, 1), owner=100000), CONTAINER),
        refused="host uids 165536, which"),
    Row("container user, container's ids", USER_IN_CONTAINER,
        chain(namespace(41, (0, 100000, 9), owner=101000), CONTAINER), refused="host uids 100000 to 100008"),
    Row("unmapped ids on both sides", caller(5, namespace(42, (0, 5, 1), (1, 4294967295, 9))),
        chain(namespace(43, (0, 4294967295, 9), owner=5), namespace(42, (0, 5, 1), (1, 4294967295, 9))),
        refused="host uids 4294967295 to"),
    Row("overflow gid is nobody's", replace(IN_HOST, gid=OVERFLOW_ID),
        chain(replace(SINGLE, gid_map=(IdExtent(0, OVERFLOW_ID, 1),))), refused="host gids 65534, which"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_authorize(row: Row) -> None:
    if row.refused is None:
        authorize_ids(row.caller, row.given, row.delegated)
        return
    with pytest.raises(UserNamespaceNotPermitted) as raised:
        authorize_ids(row.caller, row.given, row.delegated)
    assert row.refused in str(raised.value)
    assert "\n" not in str(raised.value)


def test_host_ids_of_a_namespace() -> None:
    assert ROOTLESS.host_uid(0) == USER
    assert ROOTLESS.host_uid(1) == 100000
    assert ROOTLESS.host_gid(65536) == 165535
    assert ROOTLESS.host_uid(65537) is None
    assert ROOTLESS.host_gid(65537) is None


small_ranges = st.builds(
    lambda start, length: range(start, start + length), st.integers(0, 20), st.integers(0, 6)
)


@settings(max_examples=300)
@given(small_ranges, st.lists(small_ranges, max_size=5))
def test_first_outside_is_set_difference(ids: range, allowed: list[range]) -> None:
    outside = first_outside(ids, sorted(allowed, key=lambda part: part.start))
    missing = set(ids).difference(*allowed)
    if outside is None:
        assert not missing
    else:
        assert outside.start == min(missing)
        assert set(outside) <= missing


BLOCK = 0x00080000


@pytest.mark.parametrize(
    ("extents", "blocks"),
    [
        (((0, BLOCK, 65536),), 1),
        (((0, BLOCK, 65536), (BLOCK + 65536, BLOCK + 65536, 65536)), 2),
        ((), 0),
        (((1, BLOCK, 65536),), 0),
        (((0, BLOCK, 65535),), 0),
        (((0, BLOCK, 131072),), 0),
        (((0, BLOCK + 1, 65536),), 0),
        (((0, 0, 65536),), 0),
        (((0, BLOCK - 65536, 65536),), 0),
        (((0, 0x70000000, 65536),), 0),
        (((0, BLOCK, 65536), (65536, BLOCK + 65536, 65536)), 0),
        (((0, BLOCK, 65536), (131072, 131072, 65536)), 0),
    ],
)
def test_ids_of_containers(extents: tuple[tuple[int, int, int], ...], blocks: int) -> None:
    """Only what is mapped as systemd-nsresourced does, and alike for users and groups."""
    found = namespace(30, *extents)
    assert len(of_containers(found).uids) == len(of_containers(found).gids) == blocks
    assert of_containers(replace(found, gid_map=())).uids == ()
