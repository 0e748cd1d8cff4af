"""The main job: a container gets a locked, id-mapped mount of a trusted image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mountd.client import Client, MountReply, Request, attach
from mountd.errors import SyscallError
from mountd.kernel import mount_api
from mountd.kernel.flags import MountAttr
from tests.container import in_container
from tests.daemon import Daemon
from tests.e2e.conftest import TYPES


def mount(daemon: Daemon, image: Path | str, **wishes: object) -> MountReply:
    with Client(str(daemon.socket)) as client, Request(str(image), **wishes) as request:  # type: ignore[arg-type]
        return client.mount(request.source, request.fds, **request.parameters)


@pytest.mark.parametrize("type", TYPES)
def test_container_gets_a_locked_mapped_mount(
    daemon: Daemon, images: dict[str, Path], place: Path, containers: None, type: str
) -> None:
    target = place / "target"
    target.mkdir(exist_ok=True)

    def work() -> dict[str, object]:
        reply = mount(daemon, images[type])
        with reply.mount:
            attach(reply.mount.fileno(), str(target))
            for flag in (MountAttr.NODEV, MountAttr.NOSUID, MountAttr.RDONLY):
                with pytest.raises(SyscallError, match="EPERM"):
                    mount_api.mount_setattr(reply.mount.fileno(), clear=flag)
        with pytest.raises(PermissionError):
            os.open(target / "null", os.O_RDWR)
        return {
            "text": (target / "hello").read_text(),
            "owners": [(target / name).stat().st_uid for name in ("hello", "owned")],
            "mounts": reply.mounts,
            "decision": reply.decision,
        }

    found = in_container(work)
    assert found["text"] == "hello from the image\n"
    assert found["owners"] == [0, 1000]
    (described,) = found["mounts"]  # type: ignore[misc]
    assert described["fileSystemType"] == type
    assert described["readOnly"] is True
    assert found["decision"] == {
        "verdict": "allow",
        "rule": "trusted in the test",
        "trustedBy": "root-owned",
        "reason": "only root can change the image where it lies",
    }
