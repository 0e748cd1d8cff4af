"""Rules that ask: what whoever is asked gets to see."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.service import consent
from tests.container import as_user
from tests.daemon import Daemon
from tests.e2e.calls import mount, outcome
from tests.e2e.conftest import trusting
from tests.e2e.consent.callers import asking
from tests.e2e.consent.polkit import Polkit, details_of


class TestDetails:
    NAME = "a\n'\"”<b>$(rule)%s‮&\x1b]0;x\x07" + "ä" * 100 + "; --allow-user-interaction"

    def test_what_is_shown_is_one_line_without_markup(
        self, begin: Callable[..., Daemon], polkit: Polkit, images: dict[str, Path]
    ) -> None:
        daemon = begin(asking(trusting(images["erofs"].parent / "*")))
        directory = images["erofs"].parent / ("d" * 150)
        directory.mkdir(mode=0o755)
        path = directory / self.NAME
        try:
            path.write_bytes(images["erofs"].read_bytes())
            path.chmod(0o644)
            polkit.answer(0)
            assert as_user(lambda: outcome(lambda: mount(daemon.socket, path))) == ("", "")
        finally:
            path.unlink()
            directory.rmdir()
        words = polkit.asked()
        assert "--allow-user-interaction" not in words
        shown = details_of(words)["source"]
        assert len(shown) <= 101
        assert shown.isprintable()
        assert shown.startswith(str(images["erofs"].parent))
        assert not set(shown) & set('<>&“”"()')


ACTIONS = Path(__file__).parents[3] / "units/polkit-1/actions/io.mountd.policy"
CALLED = "The caller calls it “"
FORGED = (
    "base.raw (contents: sha256:5f1d0c, signed by: ACME”), which rule ‘vetted’ leaves to an administrator"
)


def message(action: str, about: dict[str, str]) -> str:
    """The text of a question, as polkit puts it together."""
    found = ElementTree.parse(ACTIONS).find(f"action[@id='{action}']/message")
    assert found is not None
    return re.sub(r"\$\((\w+)\)", lambda name: about[name[1]], found.text or "")


class TestMessages:
    @pytest.mark.parametrize("action", [consent.MOUNT, consent.MOUNT_WRITABLE, consent.IMPORT])
    @pytest.mark.parametrize("name", [FORGED, "a” „b‟ «c» 〞 ＂ ❞ ″ ）", "x" * 400, "\n\x1b‮”"])
    def test_who_asks_cannot_imitate_what_is_known(self, action: str, name: str) -> None:
        known, _, said = message(action, consent.described(name, "sha256:1", "team", "mine")).partition(
            CALLED
        )
        assert (
            known + CALLED
            == message(action, consent.described("", "sha256:1", "team", "mine")).partition(consent.UNKNOWN)[
                0
            ]
        )
        assert said.endswith("”")
        assert len(said) <= 102
        assert not re.search("[“”„‟«»〞＂❞″‘’(）)\\n\x1b‮]", said[:-1])

    def test_in_memory_nothing_is_said_by_who_asks(self) -> None:
        assert message(consent.MOUNT_TMPFS, {"rule": "mine"}).endswith(
            "which rule “mine” leaves to an administrator"
        )
