"""Locking the attributes of a mount, so that whoever receives it cannot clear them.

The flags of a mount bind only those who do not own its mount namespace: a container that is root in its own
namespaces takes nosuid and nodev off a mount that it was handed, and opens a device node on it. The kernel
locks them only where it *copies* a mount into a less privileged mount namespace (mount_namespaces(7)).

So there is a second mount namespace, the sealer, which belongs to a user namespace of its own and is a slave
copy of the daemon's. No process is in it; a descriptor keeps it. In both there is a staging directory, a
shared mount, with one spot for each worker. A worker

1. attaches the mount at its spot: it propagates into the sealer, and is locked there;
2. enters the sealer, clones what is there, and comes back: a clone of a locked mount is locked;
3. detaches it, some time after the reply: that propagates as well, and the clone stays.

To detach something, the kernel waits until nobody looks at the tree of mounts any more, which takes longer
than all the rest of a request. So there is a stand at the spot, a mount with a directory for each of several
mounts, and it is detached together with all of them.

What others may want, too, is not attached at the spot but kept (`execute.shared`).

Between entering and coming back nothing happens but one system call. The sealer shows the same files as the
daemon's own namespace, and nobody else can get into it.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeVar

from mountd.errors import NotSupported, SyscallError
from mountd.execute import naming, shared
from mountd.execute.shared import SharedMounts
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, moving, namespaces
from mountd.kernel.flags import Clone, Propagation
from mountd.kernel.libc import call
from mountd.kernel.mount_info import namespace_id

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from contextlib import AbstractContextManager
    from typing import NoReturn

    from mountd.execute.shared import Device

MAXIMUM_STAGED = 16
SHARED = "shared"
NAMES = "-names"  # beside the staging directory, which is in the sealer as well
LOST = 70  # exit status of a worker that cannot come back
PUTTING_TOGETHER = "attaching a disk image with several partitions for a caller (Linux 6.15)"
ONE_OF_THEM = (
    "have an imagePolicy use one of them, such as “root=unprotected:usr=unused:home=unused:…”; or mount it "
    "in a mount namespace of your own, as “mountctl run” does"
)
T = TypeVar("T")


class Seal:
    """A worker's way to a locked mount: its spot, and both mount namespaces, borrowed from the `Staging`."""

    __slots__ = ("_own_fd", "_sealer_fd", "_shared", "_staged", "_standing", "naming", "spot")

    def __init__(
        self, directory: str, number: int, own_fd: int, sealer_fd: int, shared_seconds: float
    ) -> None:
        """`own_fd` is the mount namespace of this process. Raises OSError."""
        self.spot = f"{directory}/{number}"
        self.naming = naming.Naming(f"{directory}{NAMES}/{number}")
        self._shared = SharedMounts(f"{directory}/{SHARED}", shared_seconds, self._clone)
        self._own_fd = own_fd
        self._sealer_fd = sealer_fd
        self._standing = False  # whether there is a stand
        self._staged = 0  # mounts on it

    @property
    def fds(self) -> set[int]:
        """The descriptors that the worker has to keep open."""
        return {self._own_fd, self._sealer_fd}

    def __call__(self, mount: OwnedFd, name: str | None = None) -> OwnedFd:
        """Take `mount` over and return a mount of the same with its attributes locked, private, detached.

        With a `name` that this worker is `making`, it is kept for those who ask for that again. `clear` has
        to follow, and does by itself after MAXIMUM_STAGED calls; it is apart as it takes time that nobody
        need wait for. Raises SyscallError.
        """
        try:
            kept = None if name is None else self._shared.keep(name, mount)
            if kept is not None:
                return self._private(kept)
            if self._staged == MAXIMUM_STAGED:
                self.clear()
            if not self._standing:
                self._put_stand()
            place = f"{self.spot}/{self._staged}"
            mount_api.move_mount(mount.fileno(), place)
            self._staged += 1
        finally:
            mount.close()
        return self._private(self._clone(place))

    def again(self, name: str, *, locked: bool = True) -> OwnedFd | None:
        """Return another such mount as was kept under this name, None for none. Raises SyscallError.

        Without `locked` it is one for who may change its attributes anyway, or that nobody gets.
        """
        found = self._shared.find(name) if locked else self._shared.find(name, mount_api.clone_mount)
        return None if found is None else self._private(found)

    def making(self, name: str) -> AbstractContextManager[None]:
        """Be the one who makes what has this name, for as long as a with statement. Raises OSError.

        Who else makes it is waited for; then it may be there.
        """
        return self._shared.making(name)

    def keep(self, mount: OwnedFd, name: str) -> OwnedFd:
        """Take `mount` over, keep it for those who ask for it again, and return one that is not locked.

        It is for who may change its attributes anyway, or for nobody. Raises SyscallError, OSError.
        """
        try:
            kept = self._shared.keep(name, mount, mount_api.clone_mount)
        except BaseException:
            mount.close()
            raise
        if kept is None:
            return mount
        mount.close()
        return self._private(kept)

    def _private(self, sealed: OwnedFd) -> OwnedFd:
        """Return `sealed` without a master or peers, which what it was cloned of would be."""
        try:
            mount_api.mount_setattr(sealed.fileno(), propagation=Propagation.PRIVATE)
        except BaseException:
            sealed.close()
            raise
        return sealed

    def _put_stand(self) -> None:
        with mount_api.clone_mount(self.spot) as stand:
            # Else it would be one with what it is a clone of, and whatever is on one of them be on both.
            mount_api.mount_setattr(stand.fileno(), propagation=Propagation.PRIVATE)
            mount_api.move_mount(stand.fileno(), self.spot)
        self._standing = True

    def put_on(self, mount_fd: int, directory_fd: int) -> None:
        """Attach one of the mounts that this has returned at a directory of another one; both are borrowed.

        Neither is attached anywhere: what is put together is seen by nobody yet. The kernel has that done
        only in the mount namespace that the mount below was cloned in. Raises SyscallError, and NotSupported
        before Linux 6.15.
        """
        try:
            self._in_the_sealer(lambda: moving.attach(mount_fd, directory_fd))
        except SyscallError as error:
            if error.errno_name != "EINVAL":
                raise
            raise NotSupported(PUTTING_TOGETHER, hint=ONE_OF_THEM) from None

    def _clone(self, place: str) -> OwnedFd:
        return self._in_the_sealer(lambda: mount_api.clone_mount(place))

    def _in_the_sealer(self, work: Callable[[], T]) -> T:
        """Do `work`, which is one system call, in the sealer's mount namespace. Raises SyscallError."""
        namespaces.setns(self._sealer_fd, Clone.NEWNS)
        try:
            return work()
        finally:
            try:
                namespaces.setns(self._own_fd, Clone.NEWNS)
            except SyscallError:
                self._be_lost()

    @staticmethod
    def _be_lost() -> NoReturn:
        """End at once: a worker in the wrong mount namespace must not see another request."""
        os._exit(LOST)

    def clear(self) -> None:
        """Detach what the calls have left at the spot. Raises SyscallError."""
        if self._standing:
            self._standing, self._staged = False, 0
            mount_api.umount(self.spot)

    def seconds_left(self) -> float | None:
        """Return in how many seconds to look what is `due`, None for never."""
        return self._shared.seconds_left()

    def due(self) -> dict[str, set[Device]]:
        """Return what is kept and nobody has asked for lately, as `SharedMounts.due`. Raises OSError."""
        return self._shared.due()

    def settle(self, due: Collection[str], used: Collection[str]) -> None:
        """Keep what of that is in use, and take away the rest. Raises SyscallError, OSError."""
        self._shared.settle(due, used)

    def give_up_all(self) -> None:
        """Keep nothing. Raises SyscallError, OSError."""
        self._shared.give_up_all()


class NoSeal:
    """The seal of a worker that makes no mounts."""

    fds: frozenset[int] = frozenset()
    naming = None

    def __call__(self, mount: OwnedFd, name: str | None = None) -> OwnedFd:
        """Refuse, and close `mount`. Raises NotSupported."""
        mount.close()
        raise NotSupported("mounting by what only pulls")

    def again(self, name: str, *, locked: bool = True) -> OwnedFd | None:
        """Return None: there is none."""

    def making(self, name: str) -> AbstractContextManager[None]:
        """Do nothing: nobody else makes any."""
        return nullcontext()

    def keep(self, mount: OwnedFd, name: str) -> OwnedFd:
        """Return `mount`: nothing is kept."""
        return mount

    def put_on(self, mount_fd: int, directory_fd: int) -> None:
        """Refuse: there are no mounts. Raises NotSupported."""
        raise NotSupported("mounting by what only pulls")

    def clear(self) -> None:
        """There is nothing to clear."""

    def seconds_left(self) -> float | None:
        """Return None: there is nothing to look at."""

    def due(self) -> dict[str, set[Device]]:
        """Return nothing: nothing is kept."""
        return {}

    def settle(self, due: Collection[str], used: Collection[str]) -> None:
        """There is nothing to settle."""


class Staging:
    """The staging directory in a mount namespace that is nobody else's, and the sealer."""

    def __init__(self, directory: str, spots: int, shared_seconds: float) -> None:
        """Leave the mount namespace for a private one, stage at `directory`, and make the sealer.

        `shared_seconds` is for how long a mount is kept for those who ask for the same again. Raises
        SyscallError, OSError, and NotSupported without user namespaces or in a chroot.
        """
        self.directory = directory
        self._shared_seconds = shared_seconds
        namespaces.unshare(Clone.NEWNS)
        # What happens outside still arrives; what is mounted here never leaves.
        mount_api.set_propagation("/", Propagation.SLAVE, recursive=True)
        self._own = OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
        self._refuse_chroot()
        call("mount", b"mountd", directory.encode(), b"tmpfs", 0, b"mode=0700,size=64k")
        mount_api.set_propagation(directory, Propagation.SHARED)
        for number in range(spots):
            for place in range(MAXIMUM_STAGED):
                os.makedirs(f"{directory}/{number}/{place}", 0o700)
        shared.prepare(f"{directory}/{SHARED}")
        self._sealer = self._make_sealer()
        # After the sealer, which has no use for them.
        os.makedirs(f"{directory}{NAMES}", 0o700, exist_ok=True)
        naming.prepare(f"{directory}{NAMES}", spots)

    def seal(self, number: int) -> Seal:
        """Return the way to the sealer for the worker with this number. Raises OSError."""
        return Seal(self.directory, number, self._own.fileno(), self._sealer.fileno(), self._shared_seconds)

    def clean(self, number: int) -> None:
        """Detach what a worker that was killed has left. Raises SyscallError."""
        shared.take_away(f"{self.directory}/{number}")
        naming.detach(f"{self.directory}{NAMES}/{number}")

    def keep_nothing(self) -> None:
        """Take away all that is kept: nobody is going to ask for it. Raises SyscallError, OSError."""
        self.seal(0).give_up_all()

    def namespaces(self) -> frozenset[int]:
        """Return the ids of both mount namespaces. Raises SyscallError, NotSupported."""
        return frozenset(namespace_id(each.fileno()) for each in (self._own, self._sealer))

    def close(self) -> None:
        """Give up the sealer; the staging directory goes with the last process in this mount namespace."""
        self._sealer.close()
        self._own.close()

    def _refuse_chroot(self) -> None:
        """Refuse to go on where coming back from the sealer would lead to another root directory."""
        before = os.stat("/")
        namespaces.setns(self._own.fileno(), Clone.NEWNS)
        after = os.stat("/")
        if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino):
            raise NotSupported(
                "running in a chroot", hint="give mountd a mount namespace of its own instead"
            )

    @staticmethod
    def _make_sealer() -> OwnedFd:
        try:
            with namespaces.Child(lambda: namespaces.unshare(Clone.NEWUSER | Clone.NEWNS), keep=[]) as child:
                return OwnedFd(os.open(f"/proc/{child.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
        except SyscallError as error:
            if error.errno_name in ("ENOSYS", "EINVAL", "ENOSPC", "EPERM"):
                raise NotSupported(
                    f"user namespaces, which locking the flags of a mount needs ({error.errno_name})"
                ) from None
            raise
