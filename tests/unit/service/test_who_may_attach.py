"""Callers for whom nothing is attached, wherever they want it."""

from __future__ import annotations

import errno

import pytest

from mountd.errors import AttachNotPermitted, SyscallError
from mountd.kernel import namespaces
from mountd.service.attach import refuse_capable
from tests.policies import USER


def test_who_is_not_within_the_user_namespace_of_mountd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another directory would be of no use to them."""

    def beyond(_: int) -> None:
        raise SyscallError(errno.EPERM, "ioctl(NS_GET_USERNS)")

    monkeypatch.setattr(namespaces, "owner_of", beyond)
    with pytest.raises(AttachNotPermitted, match="does not lie within mountd's") as caught:
        refuse_capable(USER, 0)
    assert caught.value.hint == "call where mountd runs, or in a container there; or ask the host's mountd"
