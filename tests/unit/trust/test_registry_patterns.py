"""Registry patterns: what matches, what looks like it, and what is refused when it is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mountd.trust.registry import check_pattern, is_canonical, matches

TEAM = "registry.example.com/team/*"


@pytest.mark.parametrize(
    ("pattern", "repository", "match"),
    [
        (TEAM, "registry.example.com/team/app", True),
        (TEAM, "registry.example.com/team/a/b", True),
        (TEAM, "registry.example.com/team", False),
        (TEAM, "registry.example.com/teams/app", False),
        (TEAM, "registry.example.com/other/team/app", False),
        (TEAM, "registry.example.com/team/", False),
        (TEAM, "registry.example.com/team/*", False),
        (TEAM, "registry.example.com/team/..", False),
        (TEAM, "registry.example.com/team/../other", False),
        (TEAM, "registry.example.com/team/app:tag", False),
        (TEAM, "registry.example.com/team/app@sha256:00", False),
        (TEAM, "registry.example.com/team/App", False),
        (TEAM, "registry.example.com/team/app\n", False),
        (TEAM, "Registry.example.com/team/app", False),
        (TEAM, "registry.example.com.evil/team/app", False),
        (TEAM, "registry.example.com.evil.org/team/app", False),
        (TEAM, "evil.registry.example.com/team/app", False),
        (TEAM, "registry-example.com/team/app", False),
        (TEAM, "registryXexample.com/team/app", False),
        (TEAM, "registry.example.com:443/team/app", False),
        (TEAM, "registry.example.com./team/app", False),
        (TEAM, "registry.ехample.com/team/app", False),  # noqa: RUF001 - Cyrillic on purpose
        (TEAM, "registry.example.com@evil.org/team/app", False),
        (TEAM, "user@registry.example.com/team/app", False),
        (TEAM, "https://registry.example.com/team/app", False),
        (TEAM, "evil.org/registry.example.com/team/app", False),
        ("localhost:5000/*", "localhost:5000/a", True),
        ("localhost:5000/*", "localhost:5000/a/b", True),
        ("localhost:5000/*", "localhost:50000/a", False),
        ("localhost:5000/*", "localhost:5001/a", False),
        ("localhost:5000/*", "localhost/a", False),
        ("127.0.0.1:5000/a", "127.0.0.1:5000/a", True),
        ("127.0.0.1:5000/a", "127.0.0.1:5000/a/b", False),
        ("127.0.0.1:5000/a", "127.0.0.1:5000/ab", False),
        ("xn--exmple-cua.com/*", "xn--exmple-cua.com/a", True),
        ("docker.io/library/busybox", "docker.io/library/busybox", True),
    ],
)
def test_match(pattern: str, repository: str, match: bool) -> None:
    check_pattern(pattern)
    assert matches(pattern, repository) is match


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("", "no host"),
        ("/a", "no host"),
        ("busybox", "full name of a host"),
        ("library/busybox", "full name of a host"),
        ("registry.example.com", "has no path"),
        ("registry.example.com/", "component"),
        ("registry.example.com//a", "component"),
        ("registry.example.com/a/", "component"),
        ("registry.example.com/../a", "component"),
        ("registry.example.com/Team/a", "lower case"),
        ("Registry.example.com/team", "lower case"),
        ("registry.example.com./a", "lower case"),
        (".example.com/a", "lower case"),
        ("-a.example.com/a", "lower case"),
        ("*.example.com/a", "lower case"),
        ("*/a", "lower case"),
        ("user@example.com/a", "lower case"),
        ("[::1]:5000/a", "no host"),
        ("registry.exämple.com/a", "xn--"),
        ("registry.example.com/a\n", "plain ASCII"),
        ("registry.example.com/*/a", "whole last"),
        ("registry.example.com/a*", "whole last"),
        ("registry.example.com/**", "whole last"),
        ("registry.example.com/a:latest", "tag or a digest"),
        ("registry.example.com/a@sha256:00", "tag or a digest"),
        ("registry.example.com:/a", "no port"),
        ("registry.example.com:0/a", "no port"),
        ("registry.example.com:080/a", "no port"),
        ("registry.example.com:65536/a", "no port"),
        ("registry.example.com:x/a", "no port"),
        ("docker.io/busybox", "docker.io/library/busybox"),
        ("index.docker.io/library/busybox", "docker.io"),
        ("https://registry.example.com/a", "scheme"),
        ("oci:registry.example.com/a", "scheme"),
        ("registry.example.com/" + "a" * 300, "longer"),
    ],
)
def test_refused(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace(".", r"\.")):
        check_pattern(pattern)


names = st.text(alphabet="ab.-_:/*@A", min_size=1, max_size=12)


@given(names)
def test_only_what_is_written_so_matches(other: str) -> None:
    pattern, repository = "h.example/a/*", f"h.example/{other}"
    if matches(pattern, repository):
        assert repository.startswith("h.example/a/")
        assert is_canonical(repository)
    assert matches("h.example/a", other) is False
