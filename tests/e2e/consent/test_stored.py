"""Rules that ask: what the store holds while they do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.errors import InUse
from mountd.fds import OwnedFd
from tests.container import as_user
from tests.daemon import Daemon
from tests.e2e.calls import mount_fds, outcome, refused
from tests.e2e.consent.callers import Caller, asking, eventually
from tests.e2e.consent.polkit import Polkit, details_of
from tests.e2e.trust import Case, Makers, digest_of, key_sections, rule, source, users_file

STORED = rule("asks", "any = true", '"stored"', ', signature = "ed25519"')


def removed(case: Case, digest: str) -> bool:
    """Remove an image from the store, unless a mount is still there for who asks for the same again."""
    try:
        case.store().remove(digest, 0)
    except InUse:
        return False
    return True


class TestStored:
    """What is asked about is in the store before anybody is asked, and out of it again after a no."""

    def test_consent_is_about_the_copy(
        self, start: Callable[..., Daemon], polkit: Polkit, makers: Makers, place: Path, data: bytes
    ) -> None:
        policy = key_sections(makers.keys) + asking(STORED)
        case = Case(start(policy, preexec_fn=polkit.enter), data)
        signature = makers.own["ed25519"](data)
        with users_file(place, data) as path:

            def work() -> object:
                with OwnedFd(os.open(path, os.O_RDWR)) as fd:
                    return mount_fds(case.daemon.socket, source(signature), [fd.fileno()])

            caller = Caller(work)
            words = polkit.asked()
            assert details_of(words)["digest"] == digest_of(data)
            assert details_of(words)["signer"] != "nobody"
            assert case.stored() == [digest_of(data)]
            # Whoever is asked has seen another image: what is mounted is still the one that is named.
            path.write_bytes(bytes(len(data)))
            polkit.answer(0)
            assert caller.result() == ("", "")
            path.write_bytes(data)
            eventually(lambda: removed(case, digest_of(data)))
            polkit.answer(1)
            assert as_user(lambda: outcome(work))[0] == "DeniedByPolicy"
            assert case.stored() == []

    @pytest.mark.parametrize("status", [0, 1, 2])
    def test_an_import_is_asked_about_before_it_is_one(
        self,
        start: Callable[..., Daemon],
        polkit: Polkit,
        makers: Makers,
        place: Path,
        data: bytes,
        status: int,
    ) -> None:
        case = Case(start(key_sections(makers.keys) + asking(STORED), preexec_fn=polkit.enter), data)
        with users_file(place, data) as path:

            def work() -> None:
                with OwnedFd(os.open(path, os.O_RDONLY)) as fd, Client(str(case.daemon.socket)) as client:
                    parameters = {"imageFileDescriptor": 0, "interactive": True}
                    list(client.call_more("io.mountd.Images.Import", parameters, [fd]))

            caller = Caller(work)
            words = polkit.asked()
            assert words[1] == "io.mountd.import-image"
            assert "--allow-user-interaction" in words
            assert details_of(words) == {"source": str(path), "digest": digest_of(data), "signer": "nobody"}
            assert list(case.store().records()) == []
            # The next of the same owner would hold another of the places for transfers.
            as_user(lambda: refused(work, "LimitExceeded", "at most 1 questions of one owner"))
            polkit.answer(status)
            name = {0: "", 1: "DeniedByPolicy", 2: "InteractiveAuthenticationRequired"}[status]
            assert caller.result()[0] == name
            assert case.stored() == ([] if status else [digest_of(data)])
