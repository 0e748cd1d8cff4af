"""Stacks: what several rules grant together, and which of them count."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.container import USER
from tests.daemon import Daemon
from tests.e2e.attaching import user_of
from tests.e2e.conftest import trusting
from tests.e2e.stacks.calls import all_layers, mounted, refusal


def test_several_rules_allow_a_stack_together(start: Callable[..., Daemon], layers: dict[str, Path]) -> None:
    """None of them alone answers for it; an option that one of them does not grant is not granted."""
    rules = trusting(layers["ext4"], flags='["noexec"]').replace("/*", "")
    daemon = start(rules.replace("trusted in", "other in") + trusting(layers["erofs"].parent))
    with mounted(daemon, all_layers(layers)) as reply:
        # What one rule locks is locked for all.
        assert os.fstatvfs(reply.mount.fileno()).f_flag & os.ST_NOEXEC
        assert reply.decision["rule"] == "trusted in the test, other in the test"
    name, text = refusal(daemon, all_layers(layers), options=["acl"])
    assert name == "OptionNotPermitted"
    assert "source.layers[0]" in text


def test_a_stack_counts_for_each_rule_that_allows_a_layer(
    start: Callable[..., Daemon], layers: dict[str, Path]
) -> None:
    """And for a rule once, however many layers it allows."""
    rules = trusting(layers["ext4"], max_mounts="2").replace("/*", "").replace("trusted in", "few in")
    daemon = start(rules + trusting(layers["erofs"].parent, max_mounts="3"))
    mixed, others = [layers["erofs"], layers["ext4"]], [layers["erofs"], layers["squashfs"]]
    with mounted(daemon, mixed), mounted(daemon, mixed):
        assert refusal(daemon, mixed)[0] == "LimitExceeded"
        with mounted(daemon, others):
            assert refusal(daemon, others)[0] == "LimitExceeded"
    # What was refused or is gone has no place any more.
    with mounted(daemon, mixed), mounted(daemon, mixed), mounted(daemon, others):
        pass


def test_a_stack_is_attached_where_all_rules_grant_it(
    start: Callable[..., Daemon], layers: dict[str, Path], place: Path
) -> None:
    grounds = place / "stack-grounds"
    grounds.mkdir(mode=0o755)
    rules = trusting(layers["ext4"]).replace("/*", "").replace("trusted in", "nowhere in")
    daemon = start(rules + trusting(layers["erofs"].parent, attach=f'["{grounds}/$UID/**"]'))
    own = user_of(daemon, grounds, USER)
    target = own.directory("stack")
    with own.attached(layers["squashfs"], target, layers=[str(layers["erofs"])]):
        assert (target / "both").read_text() == "top"
        assert set(os.listdir(target / "merged")) == {"top", "middle"}
    name, _, _ = own.attach(layers["ext4"], target, layers=[str(layers["erofs"])])
    assert name == "AttachNotPermitted"
    shutil.rmtree(grounds)
