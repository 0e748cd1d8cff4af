"""The framing: each message whole, byte by byte and with more behind it; each limit."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mountd.errors import LimitExceeded, ProtocolError
from mountd.fds import OwnedFd, close_all
from mountd.wire.framing import MAX_DEPTH, MAX_FDS, MAX_MESSAGE, MessageReader, boundary, decode, encode

SIMPLE_CASES: list[tuple[bytes, dict[str, object]]] = [
    (b"{}", {}),
    (b' {"a" : 1}\n', {"a": 1}),
    (b'{"method":"io.mountd.Mount.Mount"}', {"method": "io.mountd.Mount.Mount"}),
    (b'{"a":[true,false,null,-1,1.5,"x"]}', {"a": [True, False, None, -1, 1.5, "x"]}),
    (b'{"a":9223372036854775807,"b":-9223372036854775808}', {"a": (1 << 63) - 1, "b": -(1 << 63)}),
    ('{"ä":"€ 😀"}'.encode(), {"ä": "€ 😀"}),
    (b'{"a":"\\ud83d\\ude00 \\u0041 \\\\u0000"}', {"a": "😀 A \\u0000"}),
    (b'{"a":"\\\\","b":"\\"[[[[","c":"]]"}', {"a": "\\", "b": '"[[[[', "c": "]]"}),
    (b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}", {"a": None}),
    (b'{"a":"' + b"[" * 1000 + b'"}', {"a": "[" * 1000}),
    (b'{"a":[' + b"[]," * 1000 + b"[]]}", {"a": [[]] * 1001}),
]
SIMPLE_CASES = [(raw, json.loads(raw) if body == {"a": None} else body) for raw, body in SIMPLE_CASES]
BAD_MESSAGES: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{",
    "two values": b"{} {}",
    "array": b"[]",
    "string": b'"a"',
    "number": b"1",
    "null": b"null",
    "byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a":1}'.encode("utf-16-le").replace(b"\0", b"\1"),
    "not UTF-8": b'{"a":"\xff"}',
    "overlong UTF-8": b'{"a":"\xc0\x80"}',
    "surrogate in UTF-8": b'{"a":"\xed\xa0\x80"}',
    "lone surrogate": b'{"a":"\\ud800"}',
    "lone low surrogate": b'{"a":["\\udc00x"]}',
    "lone surrogate in a key": b'{"a":{"\\ud800":1}}',
    "NUL in a string": b'{"a":"x\\u0000y"}',
    "NUL in a key": b'{"a\\u0000":1}',
    "control character": b'{"a":"\n"}',
    "same key twice": b'{"a":1,"a":1}',
    "same key twice, escaped": b'{"a":1,"\\u0061":2}',
    "same key twice, deeper": b'{"a":[{"b":1,"c":2,"b":3}]}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":Infinity}',
    "-Infinity": b'{"a":-Infinity}',
    "overflow": b'{"a":1e400}',
    "negative overflow": b'{"a":-1e400}',
    "2^63": b'{"a":9223372036854775808}',
    "-2^63-1": b'{"a":-9223372036854775809}',
    "5000 digits": b'{"a":' + b"9" * 5000 + b"}",
    "-5000 digits": b'{"a":-' + b"9" * 5000 + b"}",
    "too deep by one": b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    "60,000 arrays": b"[" * 60_000,
    "60,000 objects": b'{"a":' * 60_000,
    "deep behind an escaped quote": b'{"\\"":' + b"[" * 60_000 + b"]" * 60_000 + b"}",
    "deep behind a backslash": b'{"\\\\":' + b"[" * 60_000 + b"]" * 60_000 + b"}",
    "deep behind three backslashes": b'{"\\\\\\"":' + b"[" * 60_000 + b"]" * 60_000 + b"}",
    "backslash outside of a string": b'{"a":\\"' + b"[" * 60_000,
    "closed before opened": b"]" * 60_000 + b"[" * 60_000,
    "leading zero": b'{"a":01}',
    "trailing comma": b'{"a":1,}',
}


def descriptors(count: int) -> list[OwnedFd]:
    return [OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) for _ in range(count)]


@pytest.fixture
def reader() -> Iterator[MessageReader]:
    reader = MessageReader()
    yield reader
    reader.close()


def read_all(reader: MessageReader) -> list[dict[str, object]]:
    bodies = []
    while (message := reader.next_message()) is not None:
        bodies.append(message.body)
        message.close()
    return bodies


@pytest.mark.parametrize(
    "raw",
    [b"", b" ", b" x", b"{", b"{} {}", b"{}\n\t x", b'{"a" 1}', b'{"a":01}', b'{"a":"', b"\xef\xbb\xbf{}"],
)
def test_says_where_it_is_no_json_as_the_package_does(raw: bytes) -> None:
    with pytest.raises(json.JSONDecodeError) as theirs:
        json.JSONDecoder().decode(raw.decode())
    with pytest.raises(ProtocolError) as ours:
        decode(raw)
    assert str(ours.value).endswith(f"not JSON at character {theirs.value.pos}: {theirs.value.msg}")


@pytest.mark.parametrize("value", [{1}, b"x", object(), [{"a": 1j}]])
def test_what_is_no_json_is_a_mistake_of_the_program(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be said in JSON"):
        encode({"a": value})


@pytest.mark.parametrize(("raw", "body"), SIMPLE_CASES)
def test_whole_bytewise_and_with_more_behind(
    reader: MessageReader, raw: bytes, body: dict[str, object]
) -> None:
    assert decode(raw) == body
    # Whole.
    reader.feed(raw + b"\0", [])
    assert reader.pending == len(raw) + 1
    message = reader.next_message()
    assert message is not None
    assert (message.body, message.raw, message.fds) == (body, raw, [])
    assert reader.next_message() is None
    assert reader.pending == 0
    # Byte by byte.
    for index in range(len(raw)):
        reader.feed(raw[index : index + 1], [])
        assert reader.next_message() is None
    reader.feed(b"\0", [])
    assert read_all(reader) == [body]
    # With more behind it.
    reader.feed(raw + b"\0" + raw, [])
    assert read_all(reader) == [body]
    assert reader.pending == len(raw)
    reader.feed(b"\0" + raw + b"\0{", [])
    assert read_all(reader) == [body, body]
    assert reader.pending == 1


@pytest.mark.parametrize("raw", BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_bad_message_is_a_protocol_error_and_the_end(reader: MessageReader, raw: bytes) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(raw)
    assert "\n" not in str(refused.value)
    fds = descriptors(2)
    owned = list(fds)
    reader.feed(raw + b"\0", fds)
    assert fds == []
    with pytest.raises(ProtocolError) as first:
        reader.next_message()
    assert all(fd.closed for fd in owned)
    with pytest.raises(ProtocolError) as second:
        reader.next_message()
    assert second.value is first.value
    late = descriptors(1)
    owned = list(late)
    with pytest.raises(ProtocolError) as third:
        reader.feed(b"{}\0", late)
    assert third.value is first.value
    assert owned[0].closed
    assert reader.pending == 0


@pytest.mark.parametrize(
    ("peeked", "expected"),
    [(b"", None), (b"{}", None), (b"\0", 1), (b"{}\0", 3), (b"{}\0{}\0", 3), (b"{}\0{", 3)],
)
def test_boundary(peeked: bytes, expected: int | None) -> None:
    assert boundary(peeked) == expected


def test_longest_message_and_one_byte_more(reader: MessageReader) -> None:
    raw = b'{"a":"' + b"x" * (MAX_MESSAGE - 8) + b'"}'
    assert len(raw) == MAX_MESSAGE
    reader.feed(raw + b"\0" + raw, [])
    assert len(read_all(reader)) == 1
    with pytest.raises(LimitExceeded, match=f"at most {MAX_MESSAGE} bytes in a message"):
        reader.feed(b" ", [])
    assert reader.pending == 0


@pytest.mark.parametrize("chunk", [4096, MAX_MESSAGE, 4 * MAX_MESSAGE])
def test_unterminated_message_is_refused_at_the_limit(reader: MessageReader, chunk: int) -> None:
    fds = descriptors(1)
    owned = fds[0]
    reader.feed(b" ", fds)
    for _ in range((MAX_MESSAGE - 1) // chunk):
        reader.feed(b" " * chunk, [])
    with pytest.raises(LimitExceeded) as refused:
        reader.feed(b" " * chunk, [])
    assert reader.pending == 0
    assert owned.closed
    with pytest.raises(LimitExceeded) as again:
        reader.next_message()
    assert again.value is refused.value


def test_too_long_with_its_end_in_the_same_bytes(reader: MessageReader) -> None:
    with pytest.raises(LimitExceeded):
        reader.feed(b"{}\0" + b" " * (MAX_MESSAGE + 1) + b"\0", [])


def test_time_is_linear(reader: MessageReader) -> None:
    def bytewise(count: int) -> float:
        start = time.process_time()
        for _ in range(count):
            reader.feed(b" ", [])
            reader.next_message()
        elapsed = time.process_time() - start
        reader.feed(b"{}\0", [])
        read_all(reader)
        return elapsed

    bytewise(1000)
    # Sixteen times the bytes; a rescan of what was fed would make it 256 times the time.
    assert bytewise(320_000) < 80 * bytewise(20_000)
    start = time.process_time()
    reader.feed(b"{}\0" * 200_000, [])
    assert len(read_all(reader)) == 200_000
    assert time.process_time() - start < 20


# Descriptors.


def test_descriptors_go_with_the_message_that_their_first_byte_is_in(reader: MessageReader) -> None:
    fds = descriptors(4)
    a, b, c, d = fds
    reader.feed(b"{}\0", [a])
    reader.feed(b"{", [b])
    reader.feed(b" ", [c])
    reader.feed(b"}\0", [])
    reader.feed(b"{}\0{", [])
    reader.feed(b"}\0", [d])
    found = []
    for _ in range(4):
        message = reader.next_message()
        assert message is not None
        found.append(list(message.fds))
        message.close()
        assert message.fds == []
    assert found == [[a], [b, c], [], [d]]
    assert all(fd.closed for fd in fds)


@pytest.mark.parametrize("data", [b"{}\0{}\0", b"{}\0{", b"\0\0"])
def test_descriptors_with_two_messages_are_refused(reader: MessageReader, data: bytes) -> None:
    fds = descriptors(1)
    owned = fds[0]
    with pytest.raises(ProtocolError, match="more than one message"):
        reader.feed(data, fds)
    assert owned.closed
    assert fds == []


def test_descriptors_without_a_byte_are_refused(reader: MessageReader) -> None:
    owned = descriptors(1)
    with pytest.raises(ProtocolError, match="without a byte"):
        reader.feed(b"", [*owned])
    assert owned[0].closed


@pytest.mark.parametrize("per_feed", [1, 5, MAX_FDS + 1, 253])
def test_too_many_descriptors_in_a_message(reader: MessageReader, per_feed: int) -> None:
    owned = descriptors(MAX_FDS // per_feed * per_feed + per_feed)
    feeds = [owned[start : start + per_feed] for start in range(0, len(owned), per_feed)]
    last = feeds.pop()
    for fds in feeds:
        reader.feed(b" ", fds)
    with pytest.raises(LimitExceeded, match=f"at most {MAX_FDS} descriptors in a message"):
        reader.feed(b" ", last)
    assert all(fd.closed for fd in owned)


def test_the_count_of_descriptors_starts_anew_with_each_message(reader: MessageReader) -> None:
    for _ in range(3):
        reader.feed(b"{", descriptors(MAX_FDS - 1))
        reader.feed(b"}\0", descriptors(1))
    for _ in range(3):
        message = reader.next_message()
        assert message is not None
        assert len(message.fds) == MAX_FDS
        message.close()


def test_an_error_closes_what_earlier_messages_wait_with(reader: MessageReader) -> None:
    waiting = descriptors(1)
    owned = waiting[0]
    reader.feed(b"{}\0", waiting)
    with pytest.raises(ProtocolError):
        reader.feed(b"{}\0{}\0", descriptors(1))
    assert owned.closed


def test_close_closes_what_was_fed_and_takes_nothing_more(reader: MessageReader) -> None:
    fds = descriptors(2)
    owned = list(fds)
    reader.feed(b"{", fds)
    reader.close()
    reader.close()
    assert all(fd.closed for fd in owned)
    late = descriptors(1)
    owned = list(late)
    with pytest.raises(ProtocolError, match="closed"):
        reader.feed(b"}\0", late)
    assert owned[0].closed
    with pytest.raises(ProtocolError, match="closed"):
        reader.next_message()


# Encoding.


def test_encode_is_compact_and_ends_in_its_only_nul() -> None:
    assert encode({"a": [1, "ä"], "b": None}) == '{"a":[1,"ä"],"b":null}'.encode() + b"\0"


def test_encode_knows_the_limit() -> None:
    body = {"a": "x" * (MAX_MESSAGE - 8)}
    assert len(encode(body)) == MAX_MESSAGE + 1
    with pytest.raises(LimitExceeded):
        encode({"a": "x" * (MAX_MESSAGE - 7)})


@pytest.mark.parametrize("value", ["\udcff", float("nan"), float("inf")], ids=repr)
def test_encode_refuses_what_json_cannot_say(value: object) -> None:
    with pytest.raises(ProtocolError):
        encode({"a": value})


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=15,
)
BODIES = st.dictionaries(TEXT, JSON, max_size=5)


@given(bodies=st.lists(BODIES, max_size=5), data=st.data())
def test_round_trip_however_it_is_cut(bodies: list[dict[str, object]], data: st.DataObject) -> None:
    stream = b"".join(encode(body) for body in bodies)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10).map(sorted))
    reader = MessageReader()
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reader.feed(stream[start:end], [])
        if data.draw(st.booleans()):
            found += read_all(reader)
    found += read_all(reader)
    assert found == bodies
    assert reader.pending == 0
    reader.close()


def test_message_closes_what_was_not_taken(reader: MessageReader) -> None:
    reader.feed(b"{}\0", descriptors(2))
    message = reader.next_message()
    assert message is not None
    kept = message.fds.pop(0)
    message.close()
    assert not kept.closed
    close_all([kept])
