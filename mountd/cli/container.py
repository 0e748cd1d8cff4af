"""`mountctl run`: a command with an image as its root, in a new user and mount namespace.

Two processes. The first stays what it was: it maps the ids of the second, asks mountd as the user, and
waits. The second makes the namespaces, receives the mount, turns it into its root, and becomes the command.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket

from mountd.cli.agent import with_consent
from mountd.client import Client, Request
from mountd.errors import MountdError, NotFound, SyscallError
from mountd.fds import OwnedFd, close_all
from mountd.kernel import attaching, mount_api, namespaces, sockets
from mountd.kernel.child import end_with_parent
from mountd.kernel.flags import Clone, MoveMount, OpenTree, Propagation, Unmount
from mountd.kernel.libc import call
from mountd.kernel.numbers import AT_FDCWD
from mountd.wire.framing import MAX_FDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Range = tuple[int, int]  # first id and number of ids

EXIT_CANNOT_RUN = 126
EXIT_NO_COMMAND = 127
# From outside, where the image has a directory of that name.
FROM_OUTSIDE = ("proc", "sys", "dev")
PROGRAM_DIRS = ("/usr/bin", "/bin", "/usr/local/bin")
SUBORDINATE = 65536
ATTACH = MoveMount.F_EMPTY_PATH | MoveMount.T_EMPTY_PATH
HINT = "\0"  # between the text of an error and its hint
NO_NAMESPACES = "this system may not let users make user namespaces (sysctl user.max_user_namespaces)"


class CannotRun(MountdError):
    """The image is there, but the command cannot be executed in it."""

    def __init__(self, command: str, number: int) -> None:
        """`number` is the errno of execve(2)."""
        if missing := number == errno.ENOENT:
            hint = "it has to be in the image, and so does the interpreter or loader that it names"
            super().__init__(f"not found in the image: {command}", hint=hint)
        else:
            super().__init__(f"cannot run {command} in the image: {os.strerror(number)}")
        self.exit_status = EXIT_NO_COMMAND if missing else EXIT_CANNOT_RUN


def run_in_image(request: Request, client: Client, command: Sequence[str]) -> int:
    """Run `command` in the image that `request` describes and return its exit status.

    Raises what Mount raises, CannotRun and OSError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            _be_the_command(theirs, command)
        finally:
            os._exit(EXIT_CANNOT_RUN)
    theirs.close()
    try:
        with ours:
            _prepare(ours, pid, request, client)
            # What the user types is for the command; this process only waits.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGQUIT, signal.SIG_IGN)
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda number, _: os.kill(pid, number))
            ours.send(b"go")
            said = ours.recv(64)  # nothing, once the command is running
        status = _status_of(pid)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    if said:
        raise CannotRun(command[0], int(said))
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _status_of(pid: int) -> int:
    """Wait for the end of process `pid`, and return what waitpid(2) says of it.

    In a call that waits for the process only, a signal that came just before it would wait as well, and not
    be passed on.
    """
    woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        with OwnedFd(os.pidfd_open(pid)) as ended:
            poller = select.poll()
            poller.register(ended.fileno(), select.POLLIN)
            poller.register(woken, select.POLLIN)
            while ended.fileno() not in dict(poller.poll()):
                os.read(woken, 512)
        return os.waitpid(pid, 0)[1]
    finally:
        signal.set_wakeup_fd(before)
        os.close(woken)
        os.close(wake)


def _prepare(channel: socket.socket, pid: int, request: Request, client: Client) -> None:
    """Have process `pid` be in the image."""
    _expect(channel, b"namespaces")
    map_ids(pid)
    request.add_namespace(OwnedFd(os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)))
    with with_consent(client.mount, request) as reply:
        if reply.places[0]:
            raise NotFound("a root directory in the image", hint="mount it below one: “mountctl mount”")
        places = ":".join(reply.places)
        sockets.send(channel, f"mount{places}".encode(), [reply.mount, *reply.others])
    _expect(channel, b"ready")


def _expect(channel: socket.socket, word: bytes) -> None:
    """Wait for the command's process to say `word`; raise what it says instead."""
    said = channel.recv(4096)
    if said != word:
        text, _, hint = said.decode("utf-8", "replace").partition(HINT)
        raise MountdError(text or "the process of the command was killed", hint=hint or None)


def map_ids(pid: int) -> None:
    """Map ids of the new namespace: as many as this process may.

    For root, all that its own namespace has. For others, root is the caller, and the rest are its
    subordinate ids if it has some. Raises MountdError, OSError.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        with contextlib.suppress(PermissionError):  # root without capabilities
            uids, gids = namespaces.process_id_maps(os.getpid())
            _write(f"/proc/{pid}/uid_map", "".join(f"{id} {id} {count}\n" for id, _, count in uids))
            _write(f"/proc/{pid}/gid_map", "".join(f"{id} {id} {count}\n" for id, _, count in gids))
            return
    elif _map_with_helpers(pid, uid, gid):
        return
    # One id, which everybody may map (user_namespaces(7)).
    _write(f"/proc/{pid}/setgroups", "deny")
    _write(f"/proc/{pid}/uid_map", f"0 {uid} 1")
    _write(f"/proc/{pid}/gid_map", f"0 {gid} 1")


def _map_with_helpers(pid: int, uid: int, gid: int) -> bool:
    """Map with newuidmap(1) and newgidmap(1), False if nothing was mapped. Raises MountdError, OSError."""
    uids, gids = subordinate("/etc/subuid", uid), subordinate("/etc/subgid", uid)
    programs = [find_program("newuidmap"), find_program("newgidmap")]
    if uids is None or gids is None or None in programs:
        return False
    for path, id, (first, count) in ((programs[0], uid, uids), (programs[1], gid, gids)):
        words = [str(path), str(pid), "0", str(id), "1", "1", str(first), str(count)]
        quiet = [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        helper = os.posix_spawn(words[0], words, {}, file_actions=quiet)
        if os.waitpid(helper, 0)[1]:
            if path == programs[0]:
                return False
            raise MountdError(f"{' '.join(words)} failed", hint="correct the user's lines in /etc/subgid")
    return True


def find_program(name: str) -> str | None:
    """Return the path of a program of the system."""
    for directory in PROGRAM_DIRS:
        path = f"{directory}/{name}"
        if os.access(path, os.X_OK):
            return path
    return None


def subordinate(file: str, uid: int) -> Range | None:
    """Return the longest range of ids that subuid(5) gives to `uid`, None if it gives none."""
    import pwd

    names = {str(uid)}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(uid).pw_name)
    best = None
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                fields = line.strip().split(":")
                if len(fields) != 3 or fields[0] not in names or not all(map(str.isdecimal, fields[1:])):
                    continue
                first, count = int(fields[1]), min(int(fields[2]), SUBORDINATE)
                if count and (best is None or count > best[1]):
                    best = (first, count)
    except OSError:
        return None
    return best


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _be_the_command(channel: socket.socket, command: Sequence[str]) -> None:
    """Be the second process. Returns if that cannot be, after saying so on the channel."""
    # The command gets what Python has changed as it was; until then, Ctrl-C ends this process in silence.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        if not _enter_image(channel):
            return
    except (SyscallError, MountdError, OSError) as error:
        hint = NO_NAMESPACES if isinstance(error, SyscallError) and "unshare" in error.call else ""
        channel.send(f"{error}{HINT}{hint}".encode("utf-8", "replace")[:4000])
        return
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        channel.send(str(error.errno).encode())


def _enter_image(channel: socket.socket) -> bool:
    """Make the namespaces, have the image as root, and tell whether to go on. Raises OSError."""
    namespaces.unshare(Clone.NEWUSER | Clone.NEWNS)
    channel.send(b"namespaces")
    data, fds, _ = sockets.receive(channel, 4096, MAX_FDS)
    places = data.removeprefix(b"mount").decode().split(":")
    if not data.startswith(b"mount") or len(fds) != len(places):
        close_all(fds)
        return False
    try:
        numbers = [each.fileno() for each in fds]
        make_root(numbers[0], list(zip(numbers, places, strict=True))[1:])
    finally:
        close_all(fds)
    with contextlib.suppress(PermissionError):  # not with one id only
        os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # Not to outlive the process that whoever wants to end the command knows.
    end_with_parent()
    channel.send(b"ready")
    return channel.recv(2) == b"go"


def make_root(mount_fd: int, parts: Sequence[tuple[int, str]] = ()) -> None:
    """Make the mount the root directory, with the kernel's file systems of outside in it.

    `parts` are the other mounts of its image, and their places below it.
    """
    mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
    outside = []
    for name in FROM_OUTSIDE:
        flags = OpenTree.CLONE | OpenTree.RECURSIVE | OpenTree.NO_AUTOMOUNT
        if os.path.isdir(f"/{name}"):
            outside.append((name, mount_api.open_tree(AT_FDCWD, f"/{name}", flags)))
    # On top of everything, where this process alone sees it.
    with OwnedFd(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as top:
        mount_api.move_mount(mount_fd, "", to_dir_fd=top.fileno(), flags=ATTACH)
    attaching.attach_parts(mount_fd, parts)
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
