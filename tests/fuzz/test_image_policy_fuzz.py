"""Whatever the text of an image policy: our error for it, or a policy that its own text says again."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mountd.errors import InvalidParameter
from mountd.trust import image_policy
from mountd.trust.image_policy import DESIGNATORS, EVERYTHING, GROUPS, MAXIMUM_LENGTH, ImagePolicy
from tests.bounds import FOUR, check_in_proportion, cost

EXAMPLES = int(os.environ.get("MOUNTD_FUZZ_EXAMPLES", "300"))
RELAXED = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FEW = settings(RELAXED, max_examples=max(1, EXAMPLES // 5))
WORDS = st.sampled_from([*DESIGNATORS, *sorted(EVERYTHING), "open", "ignore", "-", "*", "~", ""])
SIGNS = st.sampled_from(["=", "=", ":", "+", "+", " ", "\t", "\n", "\\", "\0", "\ud800", "é", "\u2003", "ﬀ"])
PIECES = st.lists(st.one_of(WORDS, SIGNS), max_size=24).map("".join)
# Per character, and for whatever there is of it; what a policy of all designators takes is within that.
LINES, MORE_LINES = 8, 40
BYTES, MORE_BYTES = 64, 16 << 10


def read(text: str) -> ImagePolicy | None:
    """Return the policy, None for what is refused as it should be."""
    refused: InvalidParameter | None = None
    try:
        return image_policy.parse(text)
    except InvalidParameter as error:
        refused = error
    assert refused.parameters["parameter"] == "imagePolicy"
    assert refused.message.isprintable()
    assert len(refused.message) < 1200
    return None


def check(text: str) -> None:
    policy = read(text)
    if policy is None:
        return
    assert len(text) <= MAXIMUM_LENGTH
    assert set(policy.partitions) <= set(DESIGNATORS)
    for flags in (policy.default, *policy.partitions.values()):
        assert flags <= EVERYTHING
        assert all(flags & group for group in GROUPS)
    again = image_policy.parse(image_policy.described(policy))
    assert again.default == policy.default
    for designator in DESIGNATORS:
        assert again.flags(designator) == policy.flags(designator)
    # Blanks around the words say nothing, and blanks around it all are none of them.
    if ":" in text or "=" in text:
        assert read(text.replace("=", " =\t").replace("+", "\n+ ").replace(":", " : ")) == policy


@RELAXED
@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    check(text)


@RELAXED
@given(PIECES)
def test_put_together(text: str) -> None:
    check(text)


@RELAXED
@given(
    st.dictionaries(
        st.sampled_from(["", *DESIGNATORS]),
        st.lists(st.sampled_from([*sorted(EVERYTHING), "open", "ignore"]), max_size=10).map("+".join),
        min_size=1,
    ),
    st.lists(st.tuples(st.integers(0, 400), st.text(max_size=3)), max_size=2),
)
def test_good_ones_with_changes(rules: dict[str, str], changes: list[tuple[int, str]]) -> None:
    text = ":".join(f"{name}={flags}" for name, flags in rules.items())
    assert read(text) is not None
    for at, more in changes:
        text = text[:at] + more + text[at + 1 :]
    check(text)


@FEW
@given(PIECES)
def test_what_it_costs(text: str) -> None:
    text = text[:MAXIMUM_LENGTH]
    found = cost(lambda: read(text))
    assert found.lines <= LINES * len(text) + MORE_LINES
    assert found.memory <= BYTES * len(text) + MORE_BYTES


@FEW
@given(st.one_of(PIECES, st.sampled_from(["root=open+", "open+", "+", ":", "=:", "a", " ", "-"])))
def test_what_more_of_it_costs(piece: str) -> None:
    """As much again for as much again, whatever is repeated, and wherever it fails."""
    piece = piece or "+"
    heads = ("", "root=", "root=open+")
    count = max(1, (MAXIMUM_LENGTH - max(map(len, heads))) // FOUR // len(piece))
    for head in heads:
        check_in_proportion(lambda size, head=head: lambda: read(head + piece * size), count)  # type: ignore[misc]


@pytest.mark.parametrize("sign", ["x", "+", ":", "=", "root=open:"])
def test_what_is_too_long_is_not_looked_at(sign: str) -> None:
    text = sign * (1 << 20)
    found = cost(lambda: read(text))
    assert found.lines < 40
    assert found.memory < MORE_BYTES
