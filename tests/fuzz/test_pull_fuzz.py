"""Whatever a registry sends: one of the named errors, or something that keeps every promise."""

from __future__ import annotations

import io
import json
import os
import tarfile
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mountd.errors import DeniedByPolicy, InvalidImage, InvalidParameter, LimitExceeded, NotFound
from mountd.store import containers_policy, manifest, reference, strict_json, tar_header
from mountd.store.decompress import Gunzip
from mountd.store.manifest import Index, Manifest
from mountd.store.tar_filter import Filter, Limits
from tests.oci import Member, archive, compress

FUZZ = settings(
    max_examples=int(os.environ.get("MOUNTD_FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
HEX = "0123456789abcdef" * 4
PIECES = st.sampled_from(
    [
        *("oci:", "docker://", "registry.example.com", "localhost", ":5000", ":0", "/", "//", "team", "App"),
        *(":1.0", ":", "@", f"@sha256:{HEX}", f"@sha256:{HEX[1:]}", "..", ".", "-", "_", "__", "xn--a", "é"),
        *(
            "1.2.3.4",
            "docker.io",
            "index.docker.io",
            "library",
            "*",
            "%2f",
            "\0",
            "\n",
            " ",
            "[::1]",
            "a" * 250,
        ),
    ]
)
NAMES = st.one_of(
    st.lists(PIECES, max_size=10).map("".join),
    st.lists(PIECES, max_size=8).map(lambda pieces: "oci:registry.example.com/" + "".join(pieces)),
    st.text(max_size=60),
)


@FUZZ
@given(NAMES)
def test_references(text: str) -> None:
    try:
        found = reference.parse(text)
    except InvalidParameter:
        return
    # One name, one spelling.
    assert str(found) in (text, text + ":latest")
    assert reference.parse(str(found)) == found
    assert found.host == found.host.lower()
    assert found.repository.isascii()
    assert not set(found.repository) & set(" @%*?#\\\"'\n\0")
    assert ".." not in found.repository
    assert containers_policy.scopes(found)[0] == found.identity


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@FUZZ
@given(st.one_of(st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode())))
@example(b"[" * 100_000)
@example(b'{"a":' * 20_000)
@example(b"1" * 10_000)
def test_json(data: bytes) -> None:
    try:
        found = strict_json.loads(data, 1 << 20)
    except strict_json.JSONError:
        return
    assert found == json.loads(data)


def image() -> dict[str, Any]:
    def descriptor(media_type: str) -> dict[str, Any]:
        return {"mediaType": media_type, "digest": f"sha256:{HEX}", "size": 7}

    return {
        "schemaVersion": 2,
        "mediaType": manifest.MANIFESTS[0],
        "config": descriptor(manifest.CONFIGURATIONS[0]),
        "layers": [descriptor(each) for each in manifest.LAYERS],
    }


def index() -> dict[str, Any]:
    platform = {"os": "linux", "architecture": "amd64"}
    entry = {"mediaType": manifest.MANIFESTS[0], "digest": f"sha256:{HEX}", "size": 7, "platform": platform}
    return {"schemaVersion": 2, "mediaType": manifest.INDEXES[0], "manifests": [entry, dict(entry)]}


def configuration() -> dict[str, Any]:
    listed = [f"sha256:{HEX}"] * len(manifest.LAYERS)
    return {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": listed}}


def policy() -> dict[str, Any]:
    gpg = {
        "type": "signedBy",
        "keyType": "GPGKeys",
        "keyPath": "/k",
        "signedIdentity": {"type": "matchExact"},
    }
    fulcio = {"caPath": "/c", "oidcIssuer": "i", "subjectEmail": "e"}
    sigstore = {"type": "sigstoreSigned", "fulcio": fulcio, "rekorPublicKeyPath": "/r"}
    return {
        "default": [{"type": "reject"}],
        "transports": {"docker": {"registry.example.com": [gpg, sigstore], "": [{"type": "reject"}]}},
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, below in inner for place in places(below, (*path, key)))]


WORDS = st.sampled_from(
    [
        *(*manifest.MANIFESTS, *manifest.INDEXES, *manifest.CONFIGURATIONS, *manifest.LAYERS),
        *("layers", "linux", "reject", "signedBy", "sigstoreSigned", "insecureAcceptAnything", "keyPath"),
        *(f"sha256:{HEX}", "sha256:../../etc", "sha512:" + HEX, "", "type", "config", "manifests"),
        *("keyPaths", "urls"),
    ]
)


def check_text(error: Exception) -> None:
    """What is said about a stranger's bytes is fit for a terminal."""
    assert str(error).isprintable()
    assert len(str(error)) < 1000


@st.composite
def spoilt(draw: st.DrawFn, document: dict[str, Any]) -> bytes:
    """A document with some values replaced, removed or doubled."""
    value: Any = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(places(value)[1:] or [("x",)]))
        at = value
        for step in path[:-1]:
            at = at[step]
        new = draw(st.one_of(WORDS, JSON, st.just([]), st.just({}), st.integers(-2, 1 << 64)))
        how = draw(st.integers(0, 3))
        if how == 0 and isinstance(at, dict):
            at[draw(WORDS)] = new
        elif how == 1:
            at.pop(path[-1], None) if isinstance(at, dict) else at.pop()
        elif isinstance(at, dict) or path[-1] < len(at):
            at[path[-1]] = new
    data = json.dumps(value).encode()
    if draw(st.booleans()):
        return data
    cut = draw(st.integers(0, len(data)))
    return data[:cut] + draw(st.sampled_from([b"", b'"', b"}", b",", b"\xff", b"\\"])) + data[cut:]


@FUZZ
@given(st.one_of(spoilt(image()), spoilt(index()), st.binary(max_size=100)))
def test_manifests(data: bytes) -> None:
    try:
        found = manifest.parse(data, manifest.digest_of(data))
    except (InvalidImage, LimitExceeded) as error:
        check_text(error)
        return
    if isinstance(found, Index):
        try:
            chosen = manifest.for_machine(found, "x86_64")
        except NotFound:
            return
        assert all(reference.DIGEST.fullmatch(each.digest) for each in chosen)
        return
    for each in (found.configuration, *found.layers):
        assert reference.DIGEST.fullmatch(each.digest)
        assert 0 <= each.size <= manifest.MAXIMUM_SIZE
    assert 0 < len(found.layers) <= manifest.MAXIMUM_LAYERS
    assert all(each.media_type in manifest.LAYERS for each in found.layers)


@FUZZ
@given(spoilt(configuration()))
def test_configurations(data: bytes) -> None:
    own = image()
    own["config"]["digest"] = manifest.digest_of(data)
    encoded = json.dumps(own).encode()
    found = manifest.parse(encoded, manifest.digest_of(encoded))
    assert isinstance(found, Manifest)
    try:
        listed = manifest.diff_ids(data, found)
    except InvalidImage as error:
        check_text(error)
        return
    assert len(listed) == len(found.layers)
    assert all(reference.DIGEST.fullmatch(each) for each in listed)


@FUZZ
@given(spoilt(policy()))
def test_policies(data: bytes) -> None:
    app = reference.parse("oci:registry.example.com/app:1.0")
    try:
        found = containers_policy.parse("p", data)
        requirement = containers_policy.require(found, app, read_key=lambda path: b"key")
    except DeniedByPolicy:
        return
    # Whatever passes is somebody's signature.
    assert requirement.signer
    assert set(requirement.name.split("+")) <= {"signedBy", "sigstoreSigned"}


ARCHIVE = archive(
    Member("d/file", b"x" * 700, xattrs={"user.a": "b"}),
    Member("link", type=tarfile.SYMTYPE, link="d"),
    Member("hard", type=tarfile.LNKTYPE, link="d/file"),
    Member("n" * 150, b"long"),
    Member("null", type=tarfile.CHRTYPE, device=(1, 3)),
    Member("d/.wh.gone", b""),
)
OFFSETS = range(0, len(ARCHIVE), 512)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """An archive with some bytes changed, the checksums often put right again."""
    data = bytearray(ARCHIVE)
    for _ in range(draw(st.integers(1, 4))):
        block = draw(st.sampled_from(OFFSETS))
        at = block + draw(st.integers(0, 511))
        value = draw(
            st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"../", b"/", b"\xff" * 8]))
        )
        data[at : at + len(value)] = value
        if draw(st.booleans()):
            data[block + 148 : block + 156] = b" " * 8
            data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


@FUZZ
@given(archives(), st.booleans(), st.booleans(), st.integers(1, 2000))
def test_archives(data: bytes, lowest: bool, devices: bool, piece: int) -> None:
    source, sink = io.BytesIO(data), io.BytesIO()
    limits = Limits(bytes=100_000, entries=50, names=5000)
    walk = Filter(
        lambda length: source.read(min(length, piece)),
        sink.write,
        limits=limits,
        lowest=lowest,
        devices=devices,
    )
    try:
        summary = walk.run()
    except (InvalidImage, LimitExceeded) as error:
        check_text(error)
        return
    check_result(sink.getvalue(), lowest, devices)
    assert summary.entries <= limits.entries
    assert summary.content <= limits.bytes


def check_result(out: bytes, lowest: bool, devices: bool) -> None:
    """What came out keeps all promises, as another reader of archives sees it."""
    seen: dict[str, tarfile.TarInfo] = {}
    with tarfile.open(fileobj=io.BytesIO(out), errors="surrogateescape") as file:
        for member in file:
            name = "" if member.name == "." else member.name
            assert not name.startswith("/")
            assert ".." not in name.split("/")
            assert name not in seen or (member.isdir() and seen[name].isdir())
            above = name.rpartition("/")[0]
            assert not name or seen[above].isdir()
            assert devices or not member.isdev() or member.isfifo()
            assert not (lowest and ".wh." in name)
            assert all(key.startswith("SCHILY.xattr.user.") for key in member.pax_headers if "xattr" in key)
            assert not member.islnk() or not seen[member.linkname].isdir()
            seen[name] = member
    assert seen[""].isdir()


@FUZZ
@given(st.binary(max_size=400), st.integers(0, 200), st.integers(1, 1000))
def test_compressed(data: bytes, at: int, wanted: int) -> None:
    whole = bytearray(compress(ARCHIVE[:2000], "gzip"))
    whole[at : at + len(data)] = data
    source = io.BytesIO(bytes(whole))
    gunzip = Gunzip(source.read)
    total = 0
    try:
        while found := gunzip.read(wanted):
            assert len(found) <= wanted
            total += len(found)
    except InvalidImage:
        return
    assert source.read() == b""


@FUZZ
@given(st.binary(min_size=1, max_size=300))
def test_pax_headers(data: bytes) -> None:
    try:
        found = tar_header.parse_pax(data, 0)
        entry = tar_header.Entry(b"a", tar_header.REGULAR)
        tar_header.apply_pax(entry, found, 0)
    except InvalidImage:
        return
    assert b"".join(tar_header.record(key, value) for key, value in found.items()) == data


def test_the_archive_itself_is_accepted() -> None:
    source, sink = io.BytesIO(ARCHIVE), io.BytesIO()
    Filter(source.read, sink.write, limits=Limits(), lowest=False, devices=True).run()
    check_result(sink.getvalue(), lowest=False, devices=True)
