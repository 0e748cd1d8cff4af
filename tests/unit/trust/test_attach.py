"""Where a rule grants attaching: patterns with a home directory and ids in them."""

from __future__ import annotations

import pytest

from mountd.errors import AttachNotPermitted
from mountd.trust.attach import check_pattern, judge, permits

HOME = "/home/u"


@pytest.mark.parametrize(
    ("pattern", "path", "home", "expected"),
    [
        ("$HOME/**", "/home/u/mnt", HOME, True),
        ("$HOME/**", "/home/u/a/b/.c/d", HOME, True),
        ("$HOME/**", "/home/u", HOME, False),
        ("$HOME/**", "/home/u2/mnt", HOME, False),
        ("$HOME/**", "/home/u/mnt", None, False),
        ("$HOME/**", "/home/v/mnt", None, False),
        ("$HOME/**", "/home/[a]/mnt", "/home/[a]", True),
        ("$HOME/**", "/home/a/mnt", "/home/[a]", False),
        ("$HOME/**", "/home/xx/mnt", "/home/*", False),
        ("$HOME/**", "/home/x/mnt", "/home/?", False),
        ("$HOME/**", "/home/$UID/mnt", "/home/$UID", True),
        ("$HOME/**", "/home/1000/mnt", "/home/$UID", False),
        ("$HOME", "/home/u", HOME, True),
        ("$HOME", "/home/u/mnt", HOME, False),
        ("$HOME/mnt-*", "/home/u/mnt-1", HOME, True),
        ("$HOME/mnt-*", "/home/u/mnt-1/x", HOME, False),
        ("/run/user/$UID/**", "/run/user/1000/mnt", HOME, True),
        ("/run/user/$UID/**", "/run/user/1001/mnt", HOME, False),
        ("/run/user/$UID/**", "/run/user/1000", HOME, False),
        ("/run/user/$UID/**", "/run/user/10000/x", HOME, False),
        ("/srv/$GID-*/**", "/srv/100-x/y", HOME, True),
        ("/srv/*/mnt", "/srv/a/mnt", None, True),
        ("/srv/*/mnt", "/srv/a/b/mnt", None, False),
        ("/srv/*/**", "/srv/.hidden/x", None, False),
        ("/srv/**", "/srv//x", None, False),
        ("/srv/**", "/srv/", None, False),
        ("/srv/**", "srv/x", None, False),
        ("/srv/**", "/srv", None, False),
        ("/srv/**", "/", None, False),
        ("/srv/**", "", None, False),
    ],
)
def test_permits(pattern: str, path: str, home: str | None, expected: bool) -> None:
    check_pattern(pattern)
    assert permits(pattern, path, home=home, uid=1000, gid=100) is expected


def test_the_refusal_says_what_is_granted() -> None:
    judge("mine", ("/a/**", "/b"), "/b", home=None, uid=1, gid=1)
    with pytest.raises(
        AttachNotPermitted, match="rule “mine” grants /a/.., /b, and /c is none of these"
    ) as caught:
        judge("mine", ("/a/**", "/b"), "/c", home=None, uid=1, gid=1)
    assert caught.value.hint == "use a directory of /a/**, /b"
    with pytest.raises(AttachNotPermitted, match="rule “mine” grants no place for it") as caught:
        judge("mine", (), "/c", home=HOME, uid=1, gid=1)
    assert "attach = [" in str(caught.value.hint)
