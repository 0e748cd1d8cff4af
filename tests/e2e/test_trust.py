"""Which images are trusted through the socket: sealed, signed, named by digest."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.daemon.throttle import LINES
from mountd.errors import NotFound
from mountd.evidence.sealed import SEALS
from tests.container import USER, as_user
from tests.e2e.calls import mount_fds, outcome, text_of
from tests.e2e.trust import (
    NONE,
    SEALED_RULE,
    Case,
    Makers,
    as_the_user,
    both,
    digest_of,
    key_sections,
    memfd,
    rule,
    signed_by,
    source,
    users_file,
)

KINDS = ("x509", "ed25519", "sigstore", "bundle", "ecdsa", "gpg")


class TestSealed:
    def test_all_four_seals(self, begin: Callable[[str], Case]) -> None:
        case = begin(SEALED_RULE)

        def work() -> str:
            with mount_fds(case.daemon.socket, source(), [fd]) as reply:
                assert reply.decision["trustedBy"] == "sealed"
                return text_of(reply)

        with memfd(case.data, sum(SEALS)) as fd:
            assert both(case, fd) == NONE
            assert as_user(work) == "hello from the image\n"

    @pytest.mark.parametrize("missing", sorted(SEALS.values()))
    def test_any_seal_that_is_missing(self, begin: Callable[[str], Case], missing: str) -> None:
        case = begin(SEALED_RULE)
        seals = sum(seal for seal, name in SEALS.items() if name != missing)
        with memfd(case.data, seals) as fd:
            name, text = both(case, fd)
        assert name == "NotImmutable"
        assert f"it lacks {missing}" in text
        assert "hand it over as a memfd with all four seals" in text

    def test_future_writes_sealed_is_not_enough(self, begin: Callable[[str], Case]) -> None:
        case = begin(SEALED_RULE)
        seals = sum(seal for seal, name in SEALS.items() if name != "F_SEAL_WRITE") | 0x10
        with memfd(case.data, seals) as fd:
            assert both(case, fd)[0] == "NotImmutable"


class TestSignatures:
    @pytest.mark.parametrize("kind", KINDS)
    def test_each_kind(self, begin: Callable[[str], Case], makers: Makers, other: bytes, kind: str) -> None:
        # Of the two kinds of ECDSA key, the policy has the one that the rule is about.
        used = "sigstore" if kind == "bundle" else kind
        unused = "ecdsa" if used == "sigstore" else "sigstore"
        sections = key_sections(makers.keys).replace(f"[key.{unused}]\n{unused}", f"[key.{unused}]\necdsa")
        sections = sections.replace(f'[key.{unused}]\necdsa = "{makers.keys}/ecdsa.key"\n', "")
        case = begin(sections + signed_by(kind, "sealed"))
        good = makers.own[kind](case.data)
        with memfd(case.data, sum(SEALS)) as fd:

            def ask(signature: bytes | None) -> tuple[str, str]:
                return both(case, fd, signature)

            assert ask(good) == NONE
            name, text = ask(None)
            assert name == "DeniedByPolicy"
            assert "hand over a detached signature by the key" in text
            assert ask(makers.own[kind](other))[0] == "SignatureInvalid"
            # A bare signature does not say whose it is.
            wrong = "KeyUnknown" if kind in ("x509", "gpg") else "SignatureInvalid"
            assert ask(makers.foreign[kind](case.data))[0] == wrong
            assert ask(good[: len(good) // 2])[0] == "SignatureInvalid"
            assert ask(good[:-1])[0] == "SignatureInvalid"
            assert ask(b"")[0] == "SignatureInvalid"
            assert ask(b"no signature at all")[0] == "SignatureInvalid"
        assert case.stored() == []

    def test_a_key_that_the_rule_does_not_want(self, begin: Callable[[str], Case], makers: Makers) -> None:
        case = begin(key_sections(makers.keys) + signed_by("ed25519", "sealed"))
        with memfd(case.data, sum(SEALS)) as fd:
            name, text = both(case, fd, makers.own["gpg"](case.data))
        assert name == "KeyUnknown"
        assert "sign it with the key “ed25519”" in text

    def test_an_expired_key(self, begin: Callable[[str], Case], makers: Makers) -> None:
        section = f'[key.old]\ngpg = "{makers.keys}/old.key"\n'
        case = begin(section + signed_by("old", "sealed"))
        with memfd(case.data, sum(SEALS)) as fd:
            found = both(case, fd, makers.expired["gpg"](case.data))
        assert found[0] == "SignatureInvalid"
        assert "expired" in found[1]

    def test_a_policy_without_keys(self, begin: Callable[[str], Case], makers: Makers) -> None:
        """The image is not even hashed."""
        case = begin(rule("any", "any = true", '"sealed"', ', min-strength = "signed"'))
        with memfd(case.data, sum(SEALS)) as fd:
            found = both(case, fd, makers.own["gpg"](case.data))
        assert found[0] == "DeniedByPolicy"
        assert "the policy has no keys" in found[1]

    def test_an_image_rule(self, begin: Callable[[str], Case], makers: Makers, other: bytes) -> None:
        """image = { signed = … } is about images that are signed so, and about no others."""
        case = begin(key_sections(makers.keys) + rule("signed", 'signed = "ed25519"', '"sealed"'))
        with memfd(case.data, sum(SEALS)) as fd:
            assert both(case, fd, makers.own["ed25519"](case.data)) == NONE
            for signature in (None, makers.own["ed25519"](other), makers.own["gpg"](case.data)):
                assert both(case, fd, signature)[0] == "DeniedByPolicy"


class TestDigests:
    def test_rules_name_bytes(self, begin: Callable[[str], Case], other: bytes, place: Path) -> None:
        digest = digest_of((place / "trust.raw").read_bytes())
        case = begin(rule("these bytes", f'digest = ["{digest}"]', '"sealed", "stored"'))
        with memfd(case.data, sum(SEALS)) as fd:
            assert both(case, fd) == NONE
        with memfd(other, sum(SEALS)) as fd:
            assert both(case, fd)[0] == "DeniedByPolicy"
        assert case.stored() == []
        with users_file(place, other) as path:
            assert as_the_user(case, path, None)[0] == "DeniedByPolicy"
        assert case.stored() == []
        with users_file(place, case.data) as path:
            assert as_the_user(case, path, None) == NONE
        assert case.stored() == [digest]


IMAGE_POLICIES = {
    "*": "",
    "root=unprotected": "",
    "root=open": "",
    "root=unprotected+read-only-off": "",
    "root=unprotected+read-only-on": "DeniedByPolicy",
    "root=erofs": "",
    "root=signed": "DeniedByPolicy",
    "root=verity": "DeniedByPolicy",
    "root=encrypted": "DeniedByPolicy",
    "root=absent": "DeniedByPolicy",
    "root=ext4": "DeniedByPolicy",
    "usr=open": "DeniedByPolicy",
    "~": "DeniedByPolicy",
    "-": "DeniedByPolicy",
    "root": "InvalidParameter",
    "root=nonsense": "InvalidParameter",
    "": "DeniedByPolicy",
}


def test_an_image_policy_only_narrows(begin: Callable[[str], Case]) -> None:
    case = begin(SEALED_RULE)

    def ask(fd: int, wanted: str) -> str:
        return outcome(lambda: mount_fds(case.daemon.socket, source(), [fd], imagePolicy=wanted))[0]

    def work() -> None:
        with memfd(case.data, sum(SEALS)) as fd:
            assert {wanted: ask(fd, wanted) for wanted in IMAGE_POLICIES} == IMAGE_POLICIES
        with memfd(case.data, 0) as fd:
            assert ask(fd, "*") == "NotImmutable"
            assert ask(fd, "root=unprotected") == "NotImmutable"

    as_user(work)


class TestJournal:
    def test_lines_of_an_owner_are_limited(self, begin: Callable[[str], Case], data: bytes) -> None:
        case = begin(SEALED_RULE)

        def work() -> None:
            with Client(str(case.daemon.socket)) as client:
                for _ in range(3 * LINES):
                    with pytest.raises(NotFound):
                        client.mount({"reference": "stored:sha256:" + "0" * 64}, [])

        as_user(work)
        written = case.daemon.log.count(f"Mount for uid {USER} ")
        # The window may have ended once or twice meanwhile.
        assert LINES <= written < 3 * LINES
        with memfd(data, sum(SEALS)) as fd:  # of another owner, which has lines of its own
            assert outcome(lambda: mount_fds(case.daemon.socket, source(), [fd])) == NONE
        deadline = time.monotonic() + 5
        while "Mount for uid 0 " not in case.daemon.log:  # written after the reply
            assert time.monotonic() < deadline, case.daemon.log
            time.sleep(0.02)
