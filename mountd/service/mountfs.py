"""The methods of io.systemd.MountFileSystem, for clients of systemd: its words, mountd's route and policy.

Each request becomes one of io.mountd.Mount and is judged as that is. What comes first is said in the order
in which systemd's own service looks at things, so that a client sees the same error: whether the fields fit
together, how the image was opened, what the user namespace is.

Where the two differ, it is on purpose: `readOnly` means what it says; a read-only mount is returned where
nothing else is granted, and the reply says so; and a user namespace may be any that the caller may have
ids mapped into, whoever has made it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mountd.caller.identify import host_namespace
from mountd.caller.model import FOREIGN, OVERFLOW_ID
from mountd.errors import (
    DeniedByPolicy,
    InvalidParameter,
    MountdError,
    OptionNotPermitted,
    UserNamespaceNotPermitted,
)
from mountd.evidence.model import Evidence, Ownership
from mountd.fds import OwnedFd, close_all
from mountd.kernel import making, namespaces
from mountd.kernel.paths import fd_flags, statx
from mountd.plan.idmap import IdMapKind, IdMapWish
from mountd.service import directories, encrypted, nsresourced
from mountd.service.descriptors import Descriptors
from mountd.service.handing_out import handing_out
from mountd.service.inspection import Inspected
from mountd.service.mount import Judged, allowed, judge, make
from mountd.service.mountfs_errors import BAD_FLAGS, TheirError, of_image, system
from mountd.service.phase import Phase
from mountd.service.requests import PARTITION_OPTIONS, MountRequest
from mountd.source.descriptor import KINDS, WANTED
from mountd.source.model import SourceKind
from mountd.source.partition_types import MOUNT_POINTS
from mountd.trust import image_policy
from mountd.trust.followed import followed
from mountd.trust.options import shown
from mountd.trust.wishes import MountWishes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mountd.service.context import RequestContext
    from mountd.trust.decide import Decision

    Reply = tuple[dict[str, object], list[OwnedFd]]

INTERFACE = "io.systemd.MountFileSystem"
IMAGE, USERNS, VERITY = "imageFileDescriptor", "userNamespaceFileDescriptor", "verityDataFileDescriptor"
DIRECTORY, PARENT = "directoryFileDescriptor", "parentFileDescriptor"
# What a descriptor may have been opened with beside its access mode.
FLAGS = os.O_ACCMODE | os.O_NOFOLLOW
OF_IMAGES = os.O_NONBLOCK
OF_DIRECTORIES = os.O_DIRECTORY | os.O_PATH
HEX = re.compile("[0-9a-fA-F]*")
# Of what is to be a regular file or a directory: the errno for some of what else there is.
WRONG_KINDS = {
    stat.S_IFREG: {stat.S_IFDIR: errno.EISDIR, stat.S_IFLNK: errno.ELOOP},
    stat.S_IFDIR: {stat.S_IFLNK: errno.ELOOP},
}
HAND_OVER = "hand over a descriptor of the image file or of the directory itself"
SECTOR = 512  # bytes, as an image without a partition table has it
DEFAULT_MODE, MODE_BITS = 0o700, 0o775
MAXIMUM_NAME = 255  # bytes


class Fields:
    """The descriptors that the fields of one message name: a list of its own for the request of mountd."""

    def __init__(self, parameters: Mapping[str, Any], fds: list[OwnedFd]) -> None:
        """Borrow both."""
        self._parameters = parameters
        self._fds = fds
        self._table = Descriptors(fds)
        self.given: list[OwnedFd] = []

    def owned(self, field: str, more: int = 0, kind: int | None = None) -> OwnedFd | None:
        """Return the descriptor that a field names, None for none; `more` are flags that it may have.

        `kind` is what it has to be of (S_IFREG, S_IFDIR). Raises InvalidParameter, an errno for another
        kind, BadFileDescriptorFlags, SyscallError.
        """
        index: int | None = self._parameters.get(field)
        if index is None:
            return None
        self._table.take(index, field)
        if kind is not None:
            check_kind(self._fds[index].fileno(), field, kind)
        flags = fd_flags(self._fds[index].fileno()) & ~(FLAGS | more | always_there())
        if flags:
            raise TheirError(
                BAD_FLAGS,
                f"it was opened with flags that it must not have ({flags:#o})",
                hint="open it for reading or for both, with nothing but O_CLOEXEC",
                parameter=field,
            )
        return self._fds[index]

    def add(self, fd: OwnedFd | None) -> int | None:
        """Return the index that a descriptor has in the request of mountd."""
        if fd is None:
            return None
        self.given.append(fd)
        return len(self.given) - 1

    def user_namespace(self) -> OwnedFd | None:
        """Return the user namespace that was given, None for none or the host's. Raises as `owned`."""
        fd = self.owned(USERNS)
        if fd is None:
            return None
        if not namespaces.is_user_namespace(fd.fileno()):
            raise InvalidParameter(USERNS, "it is not a user namespace")
        return None if namespaces.identity(fd.fileno()) == host_namespace() else fd

    def check_all_named(self) -> None:
        """Raise InvalidParameter for a descriptor that no field names."""
        self._table.check_all_named()

    def give_back(self, count: int) -> None:
        """Have what was opened on the way, beyond the first `count`, closed with those of the message."""
        self._fds += self.given[count:]


def check_kind(fd: int, field: str, wanted: int) -> None:
    """Raise the errno that systemd has for it if a descriptor is of another kind; nobody is waited for."""
    kind = stat.S_IFMT(statx(fd, "", WANTED, sync=False).stx_mode)
    if kind == wanted:
        return
    number = WRONG_KINDS[wanted].get(kind, errno.ENOTDIR if wanted == stat.S_IFDIR else errno.EBADFD)
    found, name = KINDS.get(kind, "no file" if kind != stat.S_IFREG else "a regular file"), KINDS.get(wanted)
    raise system(number, f"{field}: it is {found}, not {name or 'a regular file'}", hint=HAND_OVER)


@lru_cache(maxsize=1)
def always_there() -> int:
    """Return the flags that the kernel itself gives to every descriptor, O_LARGEFILE on most machines."""
    with OwnedFd(os.open("/", os.O_RDONLY | os.O_CLOEXEC)) as fd:
        return fd_flags(fd.fileno())


def mount_image(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """io.systemd.MountFileSystem.MountImage: return the mounts of an image, and what they are."""
    try:
        return _mount_image(parameters, fds, context)
    except MountdError as error:
        raise of_image(error) from None


def _mount_image(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    root_hash = parameters.get("verityRootHash")
    if root_hash is not None and HEX.fullmatch(root_hash) is None:
        raise InvalidParameter("verityRootHash", "it is not hexadecimal")
    wished = parameters.get("imagePolicy")
    if wished is not None:
        image_policy.parse(wished)
    options = options_of(parameters.get("mountOptions") or {})
    fields = Fields(parameters, fds)
    if (parameters.get(VERITY) is None) is not (root_hash is None):
        raise InvalidParameter(VERITY, "it goes with verityRootHash, and that with it")
    signature = parameters.get("verityRootHashSignature")
    if signature is not None and root_hash is None:
        raise InvalidParameter("verityRootHashSignature", "it goes with verityRootHash")
    image = fields.owned(IMAGE, OF_IMAGES, stat.S_IFREG)
    mode = 0 if image is None else fd_flags(image.fileno()) & os.O_ACCMODE
    if mode == os.O_WRONLY:
        raise system(errno.EBADF, "the image is open for writing only", hint="open it for reading as well")
    userns = fields.user_namespace()
    source: dict[str, object] = {"imageFileDescriptor": fields.add(image)}
    if root_hash is not None:
        data = fields.add(fields.owned(VERITY, OF_IMAGES))
        source["verity"] = {"dataFileDescriptor": data, "rootHash": root_hash.lower()}
        if signature is not None:
            source["verity"] |= {"signature": signature}  # type: ignore[operator]
    fields.check_all_named()
    request: dict[str, Any] = {
        "source": source,
        "readOnly": mode == os.O_RDONLY or parameters.get("readOnly") is True,
        PARTITION_OPTIONS: options,
        USERNS: fields.add(userns),
        "imagePolicy": wished,
        "interactive": parameters.get("allowInteractiveAuthentication") is True,
        "password": parameters.pop("password", None),
    }
    count = len(fields.given)
    try:
        judged = judged_as_granted(request, fields.given, context)
        unsigned = judged.inspected.evidence.signature_error
        if unsigned is not None and isinstance(judged.decision.error, DeniedByPolicy):
            # Their names tell what is wrong with a signature from what is wrong without one.
            raise unsigned
        if not encrypted.is_encrypted(judged):
            # Their clients may give one that they have for another image.
            judged = replace(judged, request=replace(judged.request, password=None))
        judged = allowed(judged, fields.given, context)
        used_by = policy_of(judged)
        with encrypted.opened(judged, context) as judged:
            made = handed_out(judged, context, userns)
    finally:
        fields.give_back(count)
    return image_reply(judged, used_by), made


def options_of(by_designator: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the mount options of each partition, by its designator. Raises InvalidParameter."""
    found: dict[str, list[str]] = {}
    for name, text in by_designator.items():
        designator = name.replace("_", "-")
        if designator not in image_policy.DESIGNATORS or designator in found:
            raise InvalidParameter(
                "mountOptions", f"“{shown(name)}” is no kind of partition, or there twice"
            )
        found[designator] = list(filter(None, text.split(",")))
    return found


def judged_as_granted(request: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Judged:
    """Judge a request, and once more for a read-only mount if nothing but writing is in its way."""
    context.registers = True
    password = request.get("password")
    judged = judge(request, fds, context, may_change=True)
    error = judged.decision.error
    if isinstance(error, OptionNotPermitted) and error.parameters["option"] == "rw":
        return judge({**request, "readOnly": True, "password": password}, fds, context, may_change=True)
    return judged


def policy_of(judged: Judged) -> image_policy.ImagePolicy:
    """Return the image policy by which what was allowed is used."""
    inspected, wished = judged.inspected, judged.request.wishes.image_policy
    return followed(inspected.source, inspected.evidence, judged.decision.trusted_by, wished)


def handed_out(judged: Judged, context: RequestContext, userns: OwnedFd | None) -> list[OwnedFd]:
    """Make what was allowed; the mounts are the caller's, and known to who guards its user namespace."""
    context.peer.check()
    context.enter(Phase.MOUNT)
    context.writable = not judged.decision.read_only
    with handing_out(judged, context) as entry:
        made = make(judged, context, entry.notice)
        try:
            if userns is not None:
                nsresourced.add_mounts(userns, made, must_be_registered=context.must_be_registered)
            entry.take_down(made)
            context.peer.check()
        except BaseException:
            close_all(made)
            raise
    return made


def image_reply(judged: Judged, policy: image_policy.ImagePolicy) -> dict[str, object]:
    """Return what the client is told about an image, which was used by this image policy."""
    source = judged.inspected.source
    disk, backing = source.disk, source.backing
    size = backing.size if backing is not None else 0
    name = os.path.basename((backing.path_hint if backing is not None else None) or "").removesuffix(".raw")
    reply = {
        "partitions": partitions(judged.decision) if disk is not None else [bare(judged, size)],
        "singleFileSystem": disk is None,
        "imagePolicy": image_policy.described(policy),
        "imageSize": size,
        "sectorSize": disk.sector_size if disk is not None else SECTOR,
        "imageName": name or None,
        "imageUuid": image_uuid(judged),
    }
    return {field: value for field, value in reply.items() if value is not None}


def image_uuid(judged: Judged) -> str | None:
    """Return the UUID of the partition table, or else that of the file system, if it has one."""
    source = judged.inspected.source
    if source.disk is not None:
        return source.disk.uuid
    return source.file_system.uuid if source.file_system is not None else None


def bare(judged: Judged, size: int) -> dict[str, object]:
    """Return the mount of an image without a partition table."""
    found = judged.inspected.source.file_system
    return {
        "designator": "root",
        "writable": not judged.decision.read_only,
        "growFileSystem": False,
        "fileSystemType": found.type if found is not None else "",
        "size": size,
        "offset": 0,
        "mountFileDescriptor": 0,
        "mountPoint": ["/"],
    }


def partitions(decision: Decision) -> list[dict[str, object]]:
    """Return the mounts of a disk image, in the order of their descriptors."""
    found = []
    for number, use in enumerate(decision.uses):
        partition = use.partition
        fields: dict[str, object] = {
            "designator": partition.designator.replace("-", "_"),
            "writable": not use.read_only,
            "growFileSystem": partition.grow and not use.read_only,
            "partitionNumber": partition.number,
            "architecture": partition.architecture,
            "partitionUuid": partition.uuid,
            "fileSystemType": use.type,
            "partitionLabel": partition.label or None,
            "size": partition.window.size,
            "offset": partition.window.offset,
            "mountFileDescriptor": number,
            "mountPoint": [f"/{MOUNT_POINTS[partition.designator]}"],
        }
        found.append({field: value for field, value in fields.items() if value is not None})
    return found


def mount_directory(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """io.systemd.MountFileSystem.MountDirectory: return a mount of a directory."""
    fields = Fields(parameters, fds)
    directory = fields.owned(DIRECTORY, OF_DIRECTORIES, stat.S_IFDIR)
    userns = fields.user_namespace()
    fields.check_all_named()
    request: dict[str, Any] = {
        "source": {DIRECTORY: fields.add(directory)},
        "readOnly": parameters.get("readOnly") is True,
        "idMap": {"kind": id_map(parameters.get("mode"), directory, context) if userns else "none"},
        USERNS: fields.add(userns),
        "interactive": parameters.get("allowInteractiveAuthentication") is True,
    }
    judged = allowed(judged_as_granted(request, fields.given, context), fields.given, context)
    return {"mountFileDescriptor": 0}, handed_out(judged, context, userns)


def id_map(mode: str | None, directory: OwnedFd | None, context: RequestContext) -> str:
    """Return the idMap that a mode is for this directory. Raises InvalidParameter if it is none for it."""
    if directory is None or mode == "identity":
        return "none"
    _, evidence = directories.look_at(directory.fileno(), context.peer.identify(), context)
    modes = {Ownership.CALLER: "root", Ownership.FOREIGN: "foreign"}
    own = modes.get(evidence.ownership or Ownership.OTHER)
    if mode in (None, "auto"):
        return "none" if own is None else "namespace"
    if mode != own:
        raise InvalidParameter("mode", f"the directory is {evidence.ownership}-owned, which that is not for")
    return "namespace"


def make_directory(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """io.systemd.MountFileSystem.MakeDirectory: return a new directory of the foreign range.

    The policy decides about it as about a writable mount of what would be made.
    """
    name, mode = parameters["name"], parameters.get("mode")
    if not is_name(name):
        raise InvalidParameter("name", "it is no name of a file")
    mode = DEFAULT_MODE if mode is None else mode
    if not 0 <= mode <= 0o777:
        raise InvalidParameter("mode", "it is not of 0 to 0777")
    fields = Fields(parameters, fds)
    parent = fields.owned(PARENT, OF_DIRECTORIES, stat.S_IFDIR)
    fields.check_all_named()
    if parent is None:
        raise InvalidParameter(PARENT, "it is missing")
    interactive = parameters.get("allowInteractiveAuthentication") is True
    judged = allowed(judged_new(parent, context, interactive=interactive), fields.given, context)
    caller = judged.caller
    context.peer.check()
    context.enter(Phase.MOUNT)
    made = making.make_directory(
        parent.fileno(),
        name,
        mode & MODE_BITS,
        uid=caller.uid,
        gid=caller.gid,
        owner_uid=FOREIGN.start,
        owner_gid=FOREIGN.start,
    )
    return {"directoryFileDescriptor": 0}, [made]


def judged_new(parent: OwnedFd, context: RequestContext, *, interactive: bool) -> Judged:
    """Judge a directory that is to be made in one of the caller's. Raises DeniedByPolicy for any other."""
    context.enter(Phase.VERIFY)
    caller = context.caller_to_judge()
    if OVERFLOW_ID in (caller.uid, caller.gid):
        raise UserNamespaceNotPermitted("the caller's ids are not mapped on the host")
    source, evidence = directories.look_at(parent.fileno(), caller, context, PARENT)
    directory = source.directory
    wishes = MountWishes(
        read_only=False,
        file_system_type=None,
        options=(),
        idmap_kind=IdMapKind.NAMESPACE.value,
        namespace_given=True,
    )
    if directory is not None and directory.uid == caller.uid and caller.uid != 0:
        directory = replace(directory, uid=FOREIGN.start, gid=FOREIGN.start)
        evidence = Evidence(None, "it is not root's", False, ownership=Ownership.FOREIGN)
    else:
        problem = "it would lie in a directory that is not an ordinary user's own"
        evidence = replace(evidence, ownership=Ownership.OTHER, ownership_problem=problem)
    source = replace(source, directory=directory)
    decision = context.policy.decide(caller, source, evidence, wishes)
    context.note_decision(decision, directory.file_system if directory is not None else "")
    request = MountRequest(
        SourceKind.DIRECTORY,
        None,
        None,
        None,
        None,
        IdMapWish(IdMapKind.NAMESPACE),
        wishes,
        interactive=interactive,
        directory_fd=parent.fileno(),
    )
    return Judged(
        request, caller, Inspected(source, evidence), decision, (), (), context.notes.get("source")
    )


def is_name(name: str) -> bool:
    """Tell whether a file in a directory can have this name."""
    return name not in ("", ".", "..") and "/" not in name and len(os.fsencode(name)) <= MAXIMUM_NAME


METHODS = {
    f"{INTERFACE}.MountImage": mount_image,
    f"{INTERFACE}.MountDirectory": mount_directory,
    f"{INTERFACE}.MakeDirectory": make_directory,
}
