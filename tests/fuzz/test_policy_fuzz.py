"""Whatever the bytes of a policy file: PolicyError with a place in it, or a policy, the same each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mountd.trust.policy_file import PolicyError, load

RELAXED = settings(
    max_examples=int(os.environ.get("MOUNTD_FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
WHOLE = b"""\
[[rule]]
name = "images of the team"
image = { location = ["/srv/images/*.raw", "/var/lib/machines/*"] }
caller = { users = ["root", 1000], groups = [0], user-namespace = "own", slices = ["user.slice"] }
require = { integrity = ["root-owned", "stored"], min-strength = "location" }
grant = { file-systems = ["erofs", "ext4"], access = "read-write", \
flags = ["noexec"], idmap = ["namespace", "caller"], attach = ["$HOME/**"], max-mounts = 64 }
verdict = "allow"

[[rule]]
name = "small memory"
image = { kind = "tmpfs" }
caller = { any = true }
grant = { max-size = "64M", idmap = ["none"] }
verdict = "allow"
"""
WORDS = [
    *(b'"', b"[", b"]", b"{", b"}", b"=", b"#", b"\n", b"\r", b"\0", b"\xff", b"'''", b'"""', b"[[rule]]"),
    *(
        b"null",
        b"true",
        b"nan",
        b"inf",
        b"-1",
        b"1e400",
        b"9" * 400,
        b"[" * 2000,
        b"{a=" * 500,
        b"a." * 2000,
    ),
    *(b"1979-05-27", b"[key.", b'"*" * 9', b'location = "/**"', b"\\ud800", b"/" * 5000, b"*" * 300),
]
PIECES = st.one_of(st.binary(max_size=8), st.sampled_from(WORDS))


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Where only root could put a policy file."""
    with TemporaryDirectory(prefix="mountd-fuzz-", dir="/var/lib") as made:
        yield Path(made)


def check(directory: Path, data: bytes) -> None:
    """Load `data` as the only file."""
    (directory / "fuzzed.toml").write_bytes(data)
    error: PolicyError | None = None
    try:
        found = load([directory])
    except PolicyError as raised:
        error = raised
    if error is None:
        assert load([directory]) == found
        return
    assert "fuzzed.toml" in str(error)
    assert error.line is None or 1 <= error.line <= data.count(b"\n") + 1
    assert "\n" not in str(error)


@RELAXED
@given(st.integers(0, len(WHOLE)), st.integers(0, 40), PIECES)
def test_patched(directory: Path, offset: int, length: int, piece: bytes) -> None:
    check(directory, WHOLE[:offset] + piece + WHOLE[offset + length :])


@RELAXED
@given(st.lists(st.one_of(PIECES, st.sampled_from(WHOLE.splitlines(keepends=True))), max_size=40))
def test_put_together(directory: Path, pieces: list[bytes]) -> None:
    check(directory, b"".join(pieces))


@RELAXED
@given(st.binary(max_size=400))
def test_anything(directory: Path, data: bytes) -> None:
    check(directory, data)


def test_the_whole_is_one(directory: Path) -> None:
    """Else what is patched would never have been good."""
    (directory / "fuzzed.toml").write_bytes(WHOLE)
    assert [rule.name for rule in load([directory]).rules] == ["images of the team", "small memory"]
