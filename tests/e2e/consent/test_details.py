"""Rules that ask: what whoever is asked gets to see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
        assert len(shown) <= 201
        assert shown.isprintable()
        assert shown.startswith(str(images["erofs"].parent))
        assert not set(shown) & set('<>&“”"')
