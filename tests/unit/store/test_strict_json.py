"""One meaning for each document, within bounds."""

from __future__ import annotations

import time

import pytest

from mountd.store.strict_json import MAXIMUM_DEPTH, JSONError, loads

MAXIMUM = 4 << 20
REFUSED = {
    b"": "not JSON",
    b"{": "not JSON",
    b"{}{}": "not JSON",
    b"{'a': 1}": "not JSON",
    b'{"a": 1,}': "not JSON",
    b'\xef\xbb\xbf{"a": 1}': "not JSON",
    b'{"a": "\xff"}': "UTF-8 at byte 7",
    b'{"a": 1, "a": 1}': '"a" is there twice',
    b'{"x": [{"a": 1, "b": 2, "\\u0061": 3}]}': '"a" is there twice',
    b'{"a": NaN}': "NaN is not JSON",
    b'{"a": -Infinity}': "-Infinity is not JSON",
    b"9" * 5000: "not JSON",
    b"[" * (MAXIMUM_DEPTH + 1): "nested deeper",
    b'{"a":' * 100_000: "nested deeper",
    b'["\\"", ' + b"[" * (MAXIMUM_DEPTH + 1): "nested deeper",
    b'["\\\\", ' + b"[" * (MAXIMUM_DEPTH + 1): "nested deeper",
    b" " * (MAXIMUM + 1): "larger than",
}


@pytest.mark.parametrize("data", REFUSED, ids=lambda data: repr(data[:30]))
def test_refused(data: bytes) -> None:
    with pytest.raises(JSONError, match=REFUSED[data]):
        loads(data, MAXIMUM)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a": [1, 2.5, null, true, {"b": "c"}]}', {"a": [1, 2.5, None, True, {"b": "c"}]}),
        (b"[" * MAXIMUM_DEPTH + b"]" * MAXIMUM_DEPTH, None),
        (b'"' + b"[" * 1000 + b'"', "[" * 1000),
        (b'"\\"' + b"{" * 1000 + b'\\\\"', '"' + "{" * 1000 + "\\"),
    ],
)
def test_accepted(data: bytes, value: object) -> None:
    found = loads(data, MAXIMUM)
    assert value is None or found == value


def test_many_keys_take_no_long_time() -> None:
    keys = b",".join(b'"%d":0' % number for number in range(300_000))
    began = time.monotonic()
    loads(b"{" + keys + b"}", MAXIMUM)
    assert time.monotonic() - began < 5
