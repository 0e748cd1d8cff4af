"""Where a key stands, for messages: right where files are written as usual, and never an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mountd.trust.toml_lines import line_of, line_of_syntax_error

TEXT = '''\
# [[rule]]
[key.team]
x509 = "/a"

[[rule]]
name = "one"
image = { location = "/srv/*", kind = "location = 1" }
caller = { any = true }

  [rule.grant]
  file-systems = ["ext4"] # options = []
  options = [
     "acl",
  ]

[[rule]]
name    = """
[[rule]]
"""
image   = { location = [
    "/a",
] , registry = "x" }
require.integrity = []
grant.access = "x"
[other]
x = 1
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("key", "team"), 2),
        (("key", "team", "x509"), 3),
        (("key", "other"), None),
        (("rule", 0), 5),
        (("rule", 0, "name"), 6),
        (("rule", 0, "image", "location"), 7),
        (("rule", 0, "image", "location", 0), 7),
        (("rule", 0, "image", "registry"), 7),
        (("rule", 0, "grant"), 10),
        (("rule", 0, "grant", "file-systems"), 11),
        (("rule", 0, "grant", "options"), 12),
        (("rule", 0, "grant", "systems"), 10),
        (("rule", 0, "missing"), 5),
        (("rule", 1), 16),
        (("rule", 1, "name"), 17),
        (("rule", 1, "image", "registry"), 22),
        (("rule", 1, "require", "integrity"), 23),
        (("rule", 1, "grant", "access"), 24),
        (("rule", 2), None),
        (("other",), 25),
        (("other", "x"), 26),
        (("nothing",), None),
        ((), None),
    ],
)
def test_line(path: tuple[str | int, ...], line: int | None) -> None:
    assert line_of(TEXT, path) == line


def test_line_of_a_syntax_error() -> None:
    assert line_of_syntax_error("Invalid value (at line 12, column 5)") == 12
    assert line_of_syntax_error("Invalid value (at end of document)") is None


@given(st.text(alphabet="rule[]{}=.\"'#\n key", max_size=80))
def test_any_text_is_looked_through(text: str) -> None:
    line = line_of(text, ("rule", 1, "key", "e"))
    assert line is None or 1 <= line <= text.count("\n") + 1
