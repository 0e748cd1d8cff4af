"""From what was decided about layers to the operations for an overlay of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mountd.kernel.flags import MountAttr
from mountd.plan.operations import MakeMount, MakeOverlay, Seal
from mountd.plan.stack import FORCED, plan_stack
from mountd.trust.decide import Decision
from mountd.trust.policy import Verdict
from tests.policies import ROOT, USER

LOCKED = frozenset({"nosuid", "nodev"})
ALLOWED = Decision(Verdict.ALLOW, "r", None, "", None, (), None, True, LOCKED, ())


def test_an_overlay_is_made_locked_and_not_mapped() -> None:
    plan = plan_stack(ALLOWED, USER, 3)
    attributes = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV
    assert plan.operations == (MakeOverlay(3, FORCED), MakeMount(attributes), Seal())
    # The layers may change their order, and another request has other layers.
    assert plan.shared is None


def test_it_is_called_as_it_was_asked_for() -> None:
    assert plan_stack(ALLOWED, USER, 3, name="oci:a.example/b:1").operations[0] == MakeOverlay(
        3, FORCED, None, "oci:a.example/b:1"
    )


def test_what_the_host_s_root_gets_is_not_locked() -> None:
    plan = plan_stack(replace(ALLOWED, attributes=frozenset()), ROOT, 2)
    assert plan.operations[1:] == (MakeMount(MountAttr.RDONLY),)


def test_attributes_of_hostile_layers_are_not_followed() -> None:
    options = dict(FORCED)
    assert options["metacopy"] == "off"
    assert options["redirect_dir"] == "nofollow"
    assert options["index"] == options["nfs_export"] == options["xino"] == "off"
    assert "userxattr" not in options


def test_what_is_no_stack() -> None:
    with pytest.raises(ValueError, match="two layers"):
        plan_stack(ALLOWED, USER, 1)
    with pytest.raises(ValueError, match="write"):
        plan_stack(replace(ALLOWED, read_only=False), USER, 2)


def test_it_can_be_printed() -> None:
    lines = plan_stack(ALLOWED, USER, 2).describe()
    assert lines[0].startswith("make a read-only overlay of 2 layers (metacopy=off,redirect_dir=nofollow,")
