"""Images that cannot change anyway, and are copied into the store where a rule wants that."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.evidence.sealed import SEALS
from mountd.fds import OwnedFd
from tests.container import USER, as_user, drop_capabilities, forked
from tests.e2e.calls import explain, mount_fds, outcome, text_of
from tests.e2e.directories import peer
from tests.e2e.trust import (
    NONE,
    STORED,
    Case,
    Makers,
    both,
    digest_of,
    key_sections,
    memfd,
    rule,
    source,
    users_file,
)


class TestCopied:
    @pytest.mark.parametrize("by", ["signature", "digest"])
    def test_a_sealed_image(
        self, begin: Callable[[str], Case], makers: Makers, other: bytes, data: bytes, by: str
    ) -> None:
        """Where a rule wants it stored, it does not matter that it could not change anyway."""
        if by == "signature":
            case, signature = begin(key_sections(makers.keys) + STORED), makers.own["ed25519"](data)
        else:
            case, signature = begin(rule("named", f'digest = ["{digest_of(data)}"]', '"stored"')), None

        def work() -> str:
            with mount_fds(case.daemon.socket, source(signature), [fd]) as reply:
                assert reply.decision["trustedBy"] == "stored"
                assert reply.decision["digest"] == digest_of(data)
                return text_of(reply)

        with memfd(other, sum(SEALS)) as fd:
            assert both(case, fd, signature)[0] in ("NotImmutable", "DeniedByPolicy")
            assert case.stored() == []
        with memfd(data, sum(SEALS)) as fd:
            for unfit in ({"readOnly": False}, {"options": ["suid"]}):
                assert both(case, fd, signature, **unfit)[0] == "OptionNotPermitted"
            assert case.stored() == []
            assert both(case, fd, signature) == NONE
            assert case.stored() == [digest_of(data)]
            assert case.store().record(digest_of(data)).belongs_to(USER)
            assert as_user(work) == "hello from the image\n"

    def test_who_can_have_nothing_in_the_store(
        self, begin: Callable[[str], Case], makers: Makers, place: Path, data: bytes
    ) -> None:
        """Explain says so, as Mount does."""
        case = begin(key_sections(makers.keys) + STORED)
        signature = makers.own["ed25519"](data)

        def ask(fd: int) -> set[tuple[str, bool]]:
            def work() -> set[tuple[str, bool]]:
                drop_capabilities()
                given = (case.daemon.socket, source(signature), [fd])
                found = [outcome(lambda: mount_fds(*given)), outcome(lambda: explain(*given))]
                return {(name, "root without CAP_SYS_ADMIN" in text) for name, text in found}

            return forked(work)

        with memfd(data, sum(SEALS)) as fd:
            assert ask(fd) == {("DeniedByPolicy", True)}
        with users_file(place, data) as path, OwnedFd(os.open(path, os.O_RDONLY)) as file:
            assert ask(file.fileno()) == {("DeniedByPolicy", True)}
        assert case.stored() == []

    def test_a_sealed_image_that_nobody_vouches_for(
        self, begin: Callable[[str], Case], makers: Makers, data: bytes
    ) -> None:
        case = begin(key_sections(makers.keys) + STORED)
        with memfd(data, sum(SEALS)) as fd:
            assert both(case, fd)[0] == "NotImmutable"
            assert both(case, fd, makers.foreign["ed25519"](data))[0] == "NotImmutable"
            # Signed, but by another key: a copy would not help.
            assert both(case, fd, makers.own["gpg"](data))[0] == "KeyUnknown"
        assert case.stored() == []

    def test_a_sealed_image_that_is_good_as_it_is(
        self, begin: Callable[[str], Case], makers: Makers, data: bytes
    ) -> None:
        both_kinds = rule("either", "any = true", '"sealed", "stored"', ', signature = "ed25519"')
        case = begin(key_sections(makers.keys) + both_kinds)
        with memfd(data, sum(SEALS)) as fd:
            assert both(case, fd, makers.own["ed25519"](data)) == NONE
        assert case.stored() == []

    def test_an_image_of_roots(
        self, begin: Callable[[str], Case], makers: Makers, place: Path, data: bytes
    ) -> None:
        """It is copied, unless a rule about where it lies denies it."""
        path = place / "trust.raw"
        signature = makers.own["ed25519"](data)
        denied = f"""
[[rule]]
name = "not these"
image = {{ location = "{place}/*" }}
caller = {{ any = true }}
verdict = "deny"
"""
        for policy, found, stored in (
            (denied + STORED, "DeniedByPolicy", []),
            (STORED, "", [digest_of(data)]),
        ):
            case = begin(key_sections(makers.keys) + policy)
            with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
                assert both(case, fd.fileno(), signature)[0] == found
            assert case.stored() == stored


class TestTakenOutAgain:
    """What was copied for a composefs, and is refused for what comes with it."""

    def refusals(
        self, case: Case, makers: Makers, place: Path, data: bytes, objects: Path, **composefs: object
    ) -> str:
        signature = source(makers.own["ed25519"](data))["signature"]
        about = {"imageFileDescriptor": 0, "objectsFileDescriptors": [1], **composefs}
        with (
            users_file(place, data) as path,
            OwnedFd(os.open(path, os.O_RDONLY)) as fd,
            OwnedFd(os.open(objects, os.O_RDONLY)) as other,
            peer(),
        ):
            given = {"composefs": about, "signature": signature}
            return outcome(lambda: mount_fds(case.daemon.socket, given, [fd.fileno(), other.fileno()]))[0]

    def test_the_metadata_of_a_composefs(
        self, begin: Callable[[str], Case], makers: Makers, place: Path, images: dict[str, Path]
    ) -> None:
        case = begin(key_sections(makers.keys) + STORED)
        of_roots, own = place / "taken-roots", place / "taken-own"
        for path, uid in ((of_roots, 0), (own, USER)):
            path.mkdir(mode=0o755)
            os.chown(path, uid, uid)
        data = images["erofs"].read_bytes()
        refused = lambda *given, **more: self.refusals(case, makers, place, *given, **more)  # noqa: E731
        assert refused(data, own) == "NotImmutable"
        assert case.stored() == []
        assert refused(data, of_roots, digest="0" * 64) == "InvalidImage"
        assert case.stored() == []
        assert refused(images["ext4"].read_bytes(), of_roots) == "UnsupportedFileSystem"
        assert case.stored() == []
        assert refused(data, of_roots) == ""
        assert case.stored() == [digest_of(data)]
        of_roots.rmdir()
        own.rmdir()
