"""io.systemd.MountFileSystem: user namespaces that nsresourced knows, or should."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from mountd.kernel import namespaces
from tests.container import RANGE, USER, user_namespace
from tests.daemon import Daemon
from tests.e2e.mountfs.calls import PARAMETER, asked, opened, refusal
from tests.e2e.mountfs.registrar import CONTAINER, NSRESOURCED, Registrar


def test_a_registered_namespace_is_told_about_each_mount(
    serving: Daemon, disk: Path, images: dict[str, Path], registrar: Registrar
) -> None:
    """Ids of the range for containers are the caller's if nsresourced says so, and only then."""
    with contextlib.ExitStack() as stack:
        userns = stack.enter_context(user_namespace(CONTAINER, owner=USER))
        fds = [opened(stack, disk), userns.fileno()]
        wishes: dict[str, Any] = {"imageFileDescriptor": 0, "userNamespaceFileDescriptor": 1}
        _, made = stack.enter_context(asked(serving, "MountImage", fds, **wishes))
        identity = namespaces.identity(userns.fileno())
        assert registrar.told == [(2, identity, True)] * 2
        assert [os.fstat(each.fileno()).st_uid for each in made] == [CONTAINER[0][1]] * 2
        # Of whom the service knows nothing.
        registrar.answers = {"error": f"{NSRESOURCED}.UserNamespaceNotRegistered", "parameters": {}}
        name, said = refusal(serving, "MountImage", fds, **wishes)
        assert (name, said["parameter"]) == (PARAMETER, "userNamespaceFileDescriptor")
        assert "not registered" in said["reason"]
        # Another namespace of the same kind, of somebody else's.
        fds[1] = stack.enter_context(user_namespace(CONTAINER, owner=USER + 1)).fileno()
        registrar.answers = {"parameters": {}}
        assert refusal(serving, "MountImage", fds, **wishes)[0] == PARAMETER
        # One that maps more than that service would.
        for odd in (((0, 0x00080000, 65537),), ((0, 0x00080001, 65536),), ((0, 0, 65536),)):
            fds[1] = stack.enter_context(user_namespace(odd, owner=USER)).fileno()
            assert refusal(serving, "MountImage", fds, **wishes)[0] == PARAMETER
        # One of the administrator's giving is no business of the service.
        registrar.answers = {"error": f"{NSRESOURCED}.UserNamespaceNotRegistered", "parameters": {}}
        fds[1] = stack.enter_context(user_namespace(RANGE, owner=USER)).fileno()
        stack.enter_context(asked(serving, "MountImage", fds, **wishes))


def test_a_registrar_that_fails(serving: Daemon, images: dict[str, Path], registrar: Registrar) -> None:
    """Whether it knows the namespace is not known then, so that nothing is handed out."""
    with contextlib.ExitStack() as stack:
        userns = stack.enter_context(user_namespace(RANGE, owner=USER))
        fds = [opened(stack, images["ext4"]), userns.fileno()]
        wishes: dict[str, Any] = {"imageFileDescriptor": 0, "userNamespaceFileDescriptor": 1}
        for answers in ({"error": "io.systemd.System", "parameters": {"errno": 5}}, None):
            registrar.answers = answers  # type: ignore[assignment]
            name, said = refusal(serving, "MountImage", fds, **wishes)
            assert name == "io.systemd.System"
            assert "AddMountToUserNamespace" in said["reason"]


def test_without_a_registrar_the_range_of_containers_is_nobodys(
    serving: Daemon, images: dict[str, Path]
) -> None:
    with contextlib.ExitStack() as stack:
        userns = stack.enter_context(user_namespace(CONTAINER, owner=USER))
        fds = [opened(stack, images["ext4"]), userns.fileno()]
        wishes: dict[str, Any] = {"imageFileDescriptor": 0, "userNamespaceFileDescriptor": 1}
        name, said = refusal(serving, "MountImage", fds, **wishes)
        assert (name, said["parameter"]) == (PARAMETER, "userNamespaceFileDescriptor")
