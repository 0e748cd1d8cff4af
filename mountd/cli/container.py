"""`mountctl run`: a command with an image as its root, in a new user and mount namespace.

Two processes. The first stays what it was: it maps the ids of the second, asks mountd as the user, and
waits. The second makes the namespaces, receives the mount, turns it into its root, and becomes the command.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket

from mountd.client import Client, Request
from mountd.errors import MountdError, NotFound, SyscallError
from mountd.fds import OwnedFd, close_all
from mountd.kernel import mount_api, namespaces, sockets
from mountd.kernel.abi import AT_FDCWD
from mountd.kernel.flags import Clone, MoveMount, OpenTree, Propagation, Unmount
from mountd.kernel.libc import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_CANNOT_RUN = 126
EXIT_NO_COMMAND = 127
STAGE = "/tmp"  # noqa: S108 - any directory does: what is attached there is seen by this process alone
# From outside, where the image has a directory of that name.
FROM_OUTSIDE = ("proc", "sys", "dev")
SUBORDINATE = 65536
ATTACH = MoveMount.F_EMPTY_PATH | MoveMount.T_EMPTY_PATH


def run_in_image(request: Request, client: Client, command: Sequence[str]) -> int:
    """Run `command` in the image that `request` describes and return its exit status.

    Raises what Mount raises, and OSError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _be_the_command(theirs, command)
    theirs.close()
    try:
        with ours:
            _expect(ours, b"namespaces")
            map_ids(pid)
            request.add_namespace(OwnedFd(os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)))
            reply = client.mount(request.source, request.fds, **request.parameters)
            with reply.mount:
                sockets.send(ours, b"mount", [reply.mount])
            _expect(ours, b"ready")
            # What the user types is for the command; this process only waits.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGQUIT, signal.SIG_IGN)
            ours.send(b"go")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _expect(channel: socket.socket, word: bytes) -> None:
    """Wait for the command's process to say `word`; raise what it says instead."""
    said = channel.recv(4096)
    if said != word:
        raise MountdError(said.decode("utf-8", "replace") or "the process of the command has ended")


def map_ids(pid: int) -> None:
    """Map ids of the new namespace: root is the caller, and the rest its subordinate ids if it has some.

    Raises OSError.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 or not _map_with_helpers(pid, uid, gid):
        # One id, which everybody may map (user_namespaces(7)).
        _write(f"/proc/{pid}/setgroups", "deny")
        _write(f"/proc/{pid}/uid_map", f"0 {uid} 1")
        _write(f"/proc/{pid}/gid_map", f"0 {gid} 1")


def _map_with_helpers(pid: int, uid: int, gid: int) -> bool:
    """Map with newuidmap(1) and newgidmap(1); say whether that worked."""
    for program, id, file in (("newuidmap", uid, "/etc/subuid"), ("newgidmap", gid, "/etc/subgid")):
        path = shutil.which(program, path="/usr/bin:/bin:/usr/local/bin")
        first = first_subordinate(file, uid)
        if path is None or first is None:
            return False
        arguments = [program, str(pid), "0", str(id), "1", "1", str(first), str(SUBORDINATE)]
        if os.spawnv(os.P_WAIT, path, arguments):
            return False
    return True


def first_subordinate(file: str, uid: int) -> int | None:
    """Return the first id of a range for `uid` that is long enough, None if there is none."""
    import pwd

    try:
        names = (str(uid), pwd.getpwuid(uid).pw_name)
    except KeyError:
        names = (str(uid), str(uid))
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                fields = line.strip().split(":")
                if len(fields) == 3 and fields[0] in names and int(fields[2]) >= SUBORDINATE:
                    return int(fields[1])
    except (OSError, ValueError):
        return None
    return None


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _be_the_command(channel: socket.socket, command: Sequence[str]) -> None:
    """Be the second process; never returns."""
    try:
        namespaces.unshare(Clone.NEWUSER | Clone.NEWNS)
        channel.send(b"namespaces")
        data, fds, _ = sockets.receive(channel, 16, 1)
        if data != b"mount" or len(fds) != 1:
            close_all(fds)
            os._exit(EXIT_CANNOT_RUN)
        with fds.pop() as mount:
            make_root(mount.fileno())
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        channel.send(b"ready")
        channel.recv(2)
    except (SyscallError, MountdError, OSError) as error:
        channel.send(str(error).encode()[:4000])
        os._exit(EXIT_CANNOT_RUN)
    try:
        os.execvp(command[0], list(command))
    except FileNotFoundError:
        os.write(2, f"mountctl: {NotFound(command[0] + ' in the image')}\n".encode())
        os._exit(EXIT_NO_COMMAND)
    except OSError as error:
        os.write(2, f"mountctl: {command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(EXIT_CANNOT_RUN)


def make_root(mount_fd: int) -> None:
    """Make the mount the root directory, with the kernel's file systems of outside in it."""
    mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
    outside = []
    for name in FROM_OUTSIDE:
        flags = OpenTree.CLONE | OpenTree.RECURSIVE | OpenTree.NO_AUTOMOUNT
        outside.append((name, mount_api.open_tree(AT_FDCWD, f"/{name}", flags)))
    stage = os.open(STAGE, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    mount_api.move_mount(mount_fd, "", to_dir_fd=stage, flags=ATTACH)
    os.close(stage)
    for name, tree in outside:
        with tree:
            attach_below(mount_fd, name, tree.fileno())
    os.fchdir(mount_fd)
    call("pivot_root", b".", b".")
    mount_api.umount(".", Unmount.DETACH)
    os.chdir("/")


def attach_below(root_fd: int, name: str, tree_fd: int) -> None:
    """Attach a mount at a directory of the image, if the image has it."""
    try:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        target = OwnedFd(os.open(name, flags, dir_fd=root_fd))
    except OSError:
        return
    with target:
        mount_api.move_mount(tree_fd, "", to_dir_fd=target.fileno(), flags=ATTACH)
