"""One spelling for each name, and none for those that look like another."""

from __future__ import annotations

import pytest

from mountd.errors import InvalidParameter
from mountd.store.reference import Reference, parse

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"

ACCEPTED = {
    "oci:registry.example.com/team/app:1.0": ("registry.example.com", "team/app", "1.0", None),
    "oci:registry.example.com/app": ("registry.example.com", "app", "latest", None),
    f"oci:registry.example.com/app@{DIGEST}": ("registry.example.com", "app", None, DIGEST),
    f"oci:registry.example.com/app:v_1-2@{DIGEST}": ("registry.example.com", "app", "v_1-2", DIGEST),
    "oci:registry.example.com:5000/a/b/c/d:x": ("registry.example.com:5000", "a/b/c/d", "x", None),
    "oci:localhost/app:1": ("localhost", "app", "1", None),
    "oci:build:5000/app:1": ("build:5000", "app", "1", None),
    "oci:127.0.0.1:5000/app:1": ("127.0.0.1:5000", "app", "1", None),
    "oci:docker.io/library/busybox:latest": ("docker.io", "library/busybox", "latest", None),
    "oci:a-b.example/x-y/z__w/q.r:A": ("a-b.example", "x-y/z__w/q.r", "A", None),
}
REFUSED = {
    "": "does not start",
    "registry.example.com/app:1": "does not start",
    "docker://registry.example.com/app:1": "does not start",
    "OCI:registry.example.com/app:1": "does not start",
    "oci:": "no host",
    "oci:app:1": "no host",
    "oci:/app:1": "not a host",
    "oci:library/app:1": "not a host",
    "oci:Registry.example.com/app:1": "upper case",
    "oci:registry.exämple.com/app:1": "only ASCII",
    "oci:registry.ex\u0430mple.com/app:1": "only ASCII",
    "oci:xn--exmple-cua.com/app:1": "internationalised",
    "oci:registry.xn--p1ai/app:1": "internationalised",
    "oci:registry.example.com./app:1": "not the name of a host",
    "oci:.example.com/app:1": "not the name of a host",
    "oci:-a.example.com/app:1": "not the name of a host",
    "oci:a-.example.com/app:1": "not the name of a host",
    "oci:a_b.example.com/app:1": "not the name of a host",
    "oci:user@registry.example.com/app:1": "digest is not",
    "oci:user:password@registry.example.com/app:1": "digest is not",
    "oci:*.example.com/app:1": "not the name of a host",
    "oci:[::1]:5000/app:1": "port is not",
    "oci:registry.example.com:/app:1": "port is not",
    "oci:registry.example.com:0/app:1": "port is not",
    "oci:registry.example.com:05000/app:1": "port is not",
    "oci:registry.example.com:65536/app:1": "port is not",
    "oci:registry.example.com:99999999999/app:1": "port is not",
    "oci:127.0.0.01/app:1": "not the address",
    "oci:127.1/app:1": "not the address",
    "oci:127.0.0.256/app:1": "not the address",
    "oci:1.2.3.4.5/app:1": "not the address",
    "oci:registry.example.com/:1": "not a repository",
    "oci:registry.example.com//app:1": "not a repository",
    "oci:registry.example.com/app/:1": "not a repository",
    "oci:registry.example.com/App:1": "not a repository",
    "oci:registry.example.com/../app:1": "not a repository",
    "oci:registry.example.com/./app:1": "not a repository",
    "oci:registry.example.com/a___b:1": "not a repository",
    "oci:registry.example.com/a%2fb:1": "not a repository",
    "oci:registry.example.com/app?x=1": "not a repository",
    "oci:registry.example.com/app:": "tag is not",
    "oci:registry.example.com/app:-1": "tag is not",
    "oci:registry.example.com/app:a/b": "tag is not",
    "oci:registry.example.com/app:a:b": "tag is not",
    "oci:registry.example.com/app:" + "x" * 129: "tag is not",
    "oci:registry.example.com/app@": "digest is not",
    "oci:registry.example.com/app@sha256:abc": "digest is not",
    f"oci:registry.example.com/app@sha256:{HEX[:-1]}": "digest is not",
    f"oci:registry.example.com/app@sha256:{HEX.upper()}": "digest is not",
    f"oci:registry.example.com/app@sha512:{HEX}": "digest is not",
    f"oci:registry.example.com/app@{DIGEST}@{DIGEST}": "digest is not",
    f"oci:registry.example.com/app@{DIGEST}:1": "digest is not",
    f"oci:registry.example.com/app@{DIGEST}\n": "only ASCII",
    "oci:registry.example.com/app:1\n": "only ASCII",
    "oci:registry.example.com/app :1": "only ASCII",
    "oci:registry.example.com/app\0:1": "only ASCII",
    "oci:index.docker.io/library/busybox:1": "another name of docker.io",
    "oci:registry-1.docker.io/library/busybox:1": "another name of docker.io",
    "oci:docker.io/busybox:1": "write docker.io/library/busybox",
    "oci:" + "a" * 64 + ".example/app:1": "too long",
    "oci:" + "a." * 130 + "example/app:1": "too long",
    "oci:registry.example.com/" + "a/" * 120 + "a:1": "longer than 255",
    "oci:registry.example.com/" + "a" * 2000: "longer than 1024",
}


@pytest.mark.parametrize("text", ACCEPTED)
def test_accepted(text: str) -> None:
    reference = parse(text)
    assert reference == Reference(*ACCEPTED[text])
    assert parse(str(reference)) == reference


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text: str) -> None:
    with pytest.raises(InvalidParameter, match=REFUSED[text]) as caught:
        parse(text)
    assert caught.value.parameters["parameter"] == "reference"


def test_identity_is_by_the_tag_where_there_is_one() -> None:
    assert parse("oci:h.example/a").identity == "h.example/a:latest"
    assert parse(f"oci:h.example/a@{DIGEST}").identity == f"h.example/a@{DIGEST}"
    assert parse(f"oci:h.example/a:1@{DIGEST}").identity == "h.example/a:1"
    assert parse("oci:h.example:5/a/b:1").repository == "h.example:5/a/b"
