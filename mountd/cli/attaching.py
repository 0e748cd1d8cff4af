"""“mountctl mount” and “mountctl umount”: in the own mount namespace if that is possible, else by mountd."""

from __future__ import annotations

import errno
import os

from mountd.asking import Client, attach_reply, open_target
from mountd.cli.agent import with_consent
from mountd.cli.report import printable, say, show_json, tell_done, tell_left_out
from mountd.errors import InUse, MountdError, NotFound, SyscallError, Unreachable
from mountd.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping
    from typing import TypeVar

    Reply = TypeVar("Reply")

    from mountd.asking import MountReply
    from mountd.request import Request

    Report = dict[str, object]  # of what was attached, by whom

CAP_SYS_ADMIN = 21  # linux/capability.h
ALL_IDS = ["0", "0", "4294967295"]  # /proc/self/uid_map outside of all user namespaces
# How long one who has interrupted a call waits to hear whether it was carried out all the same.
SECONDS_OF_REGRET = 1.0
# How long those wait for mountd to detach who may do so without.
SECONDS_TO_DETACH = 10.0
NO_MORE = "nothing more is to be done"
MOUNTED = "“findmnt” shows what is mounted"


def can_attach() -> bool:
    """Tell whether this process may attach mounts itself, as far as its capabilities say."""
    # Without the module that knows about namespaces: mount.mountd has no other use for it.
    with open("/proc/self/status", encoding="utf-8") as file:
        effective = next((line.split()[1] for line in file if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> CAP_SYS_ADMIN & 1)


def mount(options: argparse.Namespace, request: Request, client: Client) -> int:
    """Mount and attach, or have mountd attach."""
    with open_target(options.target) as target:
        reply = mount_and_attach(options, request, client, target) if can_attach() else None
        if reply is None:
            request.add_target(OwnedFd(os.dup(target.fileno())))
            done = regretting(client, lambda: with_consent(client.attach, request))
            reply = {"attachedBy": "mountd", **done}
    tell_left_out("mountctl", left_out_of(reply))

    def print_it() -> None:
        if options.json:
            show_json({"target": options.target, **reply})
        else:
            say(printable(f"{options.source}: attached at {options.target}{judged(reply)}"))

    line = f"mountctl: {options.target}: it is mounted and stays so"
    hint = f"“mountctl umount {options.target}” unmounts it"
    return tell_done(line, hint, print_it, needed=options.json)


def mount_and_attach(
    options: argparse.Namespace, request: Request, client: Client, target: OwnedFd
) -> Report | None:
    """Get the mount and attach it; None if it turns out that this process may not. Raises as `mount`."""
    with with_consent(client.mount, request) as made:
        return attached(made, lambda: attach_reply(made, target.fileno(), options.target), or_ask=True)


def attached(made: MountReply, attach: Callable[[], list[str]], *, or_ask: bool) -> Report | None:
    """Attach what Mount returned by `attach`; return, as Attach does, what there is then.

    None if this process may not, whatever its capabilities say, and mountd can be asked to, `or_ask`: they
    may be over a user namespace that does not own the mount namespace. If it is interrupted, nothing stays
    attached. Raises KeyboardInterrupt, NotFound, SyscallError.
    """
    try:
        left_out = attach()
    except KeyboardInterrupt:
        drop(made.mount)
        raise
    except SyscallError as error:
        if error.errno != errno.EPERM or not or_ask:
            raise
        return None
    reply = {"id": made.mounts[0].get("id"), "mounts": made.mounts, "decision": made.decision}
    return {"attachedBy": "this process", **reply, **({"leftOut": left_out} if left_out else {})}


def drop(mount: OwnedFd) -> None:
    """Detach a mount that may have been attached already."""
    from mountd.kernel import moving

    try:
        moving.detach(mount.fileno())
    except OSError:
        return  # it was not


def left_out_of(reply: Mapping[str, object]) -> list[str]:
    """Return which mounts of the image Attach has left out: their places."""
    places = reply.get("leftOut")
    return [str(each) for each in places] if isinstance(places, list) else []


def regretting(client: Client, call: Callable[[], Reply]) -> Reply:
    """Do `call`, which attaches something; if it is interrupted, what was attached is detached again.

    Raises KeyboardInterrupt, and what `call` raises.
    """
    try:
        return call()
    except KeyboardInterrupt:
        # mountd attaches nothing for a process that has ended; what it did before that, it says.
        reply = client.late_reply(SECONDS_OF_REGRET)
        if reply is not None and isinstance(reply.get("id"), int):
            client.detach(int(str(reply["id"])), lazy=True)
        raise


def judged(reply: Mapping[str, object]) -> str:
    """Return which rule has allowed it, for people."""
    decision = reply.get("decision")
    rule = decision.get("rule") if isinstance(decision, dict) else None
    return f" (rule “{rule}”)" if rule else ""


def umount(options: argparse.Namespace) -> int:
    """Detach a mount, or have mountd detach it."""
    id = mount_at(options.target)
    by = "this process"
    busy = None
    # With what mountd and umount(8) know of it, if that is anything.
    asked = done = detached_by_mountd(id, lazy=options.lazy)
    try:
        done = done or (can_attach() and detach_here(options.target, lazy=options.lazy))
    except SyscallError as error:
        if error.errno != errno.EBUSY:
            raise
        # A tree of mounts is, and mountd takes down those that it has attached.
        done, busy = False, error
    if asked or not done:
        by = "mountd"
    if not done:
        try:
            with Client() as client:
                client.detach(id, lazy=options.lazy)
        except (NotFound, Unreachable) as error:
            if busy is not None:
                raise busy from None
            if isinstance(error, Unreachable):
                raise
            # Nobody knows a mount by its id.
            raise NotFound(
                f"a mount at {options.target} that is attached for you", hint=error.hint
            ) from None

    def print_it() -> None:
        if options.json:
            show_json({"target": options.target, "detachedBy": by, "id": id})
        else:
            say(printable(f"{options.target}: detached"))

    return tell_done(f"mountctl: {options.target}: it is detached", NO_MORE, print_it, needed=options.json)


def detached_by_mountd(id: int, *, lazy: bool) -> bool:
    """Have mountd detach a mount for the host's root, if it has attached it, for whomever.

    What it has written down of it, and the line that umount(8) reads, go with it. False if it has not, or
    cannot be asked. Raises InUse.
    """
    if not is_host_root():
        return False
    try:
        with Client(timeout=SECONDS_TO_DETACH) as client:
            client.detach(id, lazy=lazy)
    except InUse:
        raise
    except MountdError:
        return False
    return True


def is_host_root() -> bool:
    """Tell whether this is root, and that of no container: mountd has attached nothing for others."""
    if os.geteuid() != 0:
        return False
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return file.read().split() == ALL_IDS


def mount_at(path: str) -> int:
    """Return the unique id of what is mounted at `path`. Raises NotFound, OSError."""
    from mountd.kernel import moving

    try:
        root = open_target(path)
    except NotFound:
        raise NotFound(path or "“”", hint=MOUNTED) from None  # without the hint to make it
    with root:
        id = moving.mount_at(root.fileno())
    if id is None:
        raise NotFound(f"a mount at {path}", hint=MOUNTED)
    return id


def detach_here(path: str, *, lazy: bool) -> bool:
    """Detach what is mounted at `path`, if this process may. Raises SyscallError for another reason."""
    from mountd.kernel import moving

    try:
        moving.unmount(path, moving.DETACH if lazy else 0)
    except SyscallError as error:
        if error.errno == errno.EPERM:
            return False
        raise SyscallError(error.errno or 0, f"umount2({path})") from None
    return True
