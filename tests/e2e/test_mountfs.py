"""io.systemd.MountFileSystem as its clients speak it: raw calls, every error, and who tries for more."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mountd.caller.model import FOREIGN
from mountd.daemon.limits import MAXIMUM_CONNECTIONS_PER_OWNER
from mountd.fds import OwnedFd, close_all
from mountd.kernel import mount_api, namespaces, sockets
from mountd.kernel.flags import Clone, MountAttr, Propagation
from mountd.kernel.libc import call as system_call
from tests.container import RANGE, USER, as_user, in_container, user_namespace
from tests.daemon import Daemon
from tests.disks import MIB, Part, build_disk
from tests.e2e.calls import errno_of
from tests.e2e.conftest import trusting
from tests.e2e.test_directories import BIND, rule
from tests.e2e.trust import digest_of, memfd
from tests.e2e.trust import rule as signed_rule
from tests.images import build_image, build_tree
from tests.rogue import Raw, call
from tests.signing import Signatory
from tests.unit.source.test_verity_superblock import superblock

INTERFACE = "io.systemd.MountFileSystem"
SERVICE = "org.varlink.service"
OWN = f"{SERVICE}.GetInfo"
BASE = FOREIGN.start
NSRESOURCED = "io.systemd.NamespaceResource"
SEALS_OF_IMAGE = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
CONTAINER = ((0, 0x00080000, 65536),)  # as nsresourced gives it


class Registrar:
    """In place of systemd-nsresourced: takes mounts, and answers what it is told to."""

    def __init__(self, path: Path) -> None:
        self.answers: dict[str, Any] | None = {"parameters": {}}
        self.told: list[tuple[int, tuple[int, int], bool]] = []
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(path))
        path.chmod(0o666)
        self._listening.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                while True:
                    data, fds, _ = sockets.receive(connection, 65536, 4)
                    if not data:
                        break
                    asked = json.loads(data.rstrip(b"\0"))
                    assert asked["method"] == f"{NSRESOURCED}.AddMountToUserNamespace"
                    userns = fds[asked["parameters"]["userNamespaceFileDescriptor"]].fileno()
                    mount = fds[asked["parameters"]["mountFileDescriptor"]].fileno()
                    directory = stat.S_ISDIR(os.fstat(mount).st_mode)
                    self.told.append((len(fds), namespaces.identity(userns), directory))
                    close_all(fds)
                    if self.answers is None:
                        break
                    connection.sendall(json.dumps(self.answers).encode() + b"\0")

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(5)


@pytest.fixture(scope="module")
def run_systemd(place: Path) -> Path:
    """What the daemon sees as /run/systemd."""
    path = place / "run-systemd"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def serving(place: Path, run_systemd: Path, images: dict[str, Path]) -> Iterator[Daemon]:
    """A daemon that also listens for clients of systemd's service."""
    policy = (
        trusting(place / "trusted")
        + trusting(place / "mountfs-writable", access='"read-write"').replace("in the test", "to write to")
        + signed_rule(
            "sealed", f'digest = ["{digest_of(images["squashfs"].read_bytes())}"]', '"sealed"'
        ).replace('"erofs"', '"squashfs"')
        + rule("own", '"caller", "foreign"', ', access = "read-write"')
    )
    (place / "mountfs-writable").mkdir()
    theirs = place / "mountfs"
    files = []
    for name in ("subuid", "subgid"):
        files.append(place / f"mountfs-{name}")
        files[-1].write_text(f"{USER}:{RANGE[0][1]}:65536\n")

    def elsewhere() -> None:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        os.makedirs("/run/systemd", exist_ok=True)
        system_call("mount", bytes(run_systemd), b"/run/systemd", None, BIND, None)
        for file in files:
            target = b"/etc/" + file.name.split("-")[1].encode()
            system_call("mount", bytes(file), target, None, BIND, None)

    daemon = Daemon(
        place / "mountfs-daemon", policy, ["--mountfs-socket", str(theirs)], preexec_fn=elsewhere
    )
    yield daemon
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log, daemon.log
    assert not theirs.exists()


@pytest.fixture
def registrar(run_systemd: Path) -> Iterator[Registrar]:
    path = run_systemd / NSRESOURCED
    made = Registrar(path)
    yield made
    made.close()
    path.unlink()


@pytest.fixture
def home(place: Path) -> Iterator[Path]:
    """A directory of USER's."""
    path = Path(tempfile.mkdtemp(prefix="mountfs-home-", dir=place))
    (path / "mine").write_text("mine\n")
    for each in (path, path / "mine"):
        os.chown(each, USER, USER)
    yield path
    shutil.rmtree(path)


class Theirs(Raw):
    """A connection to the socket of systemd's interface."""

    def __init__(self, daemon: Daemon, uid: int | None = USER) -> None:
        where = daemon.directory.parent / "mountfs"
        if uid is not None:
            os.setegid(uid)
            os.seteuid(uid)
        try:
            connection = sockets.connect(str(where))
        finally:
            if uid is not None:
                os.seteuid(0)
                os.setegid(0)
        super().__init__(daemon, fd=connection.detach())


@contextlib.contextmanager
def asked(
    daemon: Daemon, method: str, fds: Sequence[int], uid: int | None = USER, **parameters: Any
) -> Iterator[tuple[dict[str, Any], list[OwnedFd]]]:
    """Make a call that works; its reply, and the descriptors that came with it."""
    with Theirs(daemon, uid) as raw:
        raw.send(call(f"{INTERFACE}.{method}", parameters), fds)
        reply = raw.reply()
        assert reply is not None
        assert "error" not in reply, reply
        yield reply["parameters"], raw.fds


def refusal(
    daemon: Daemon, method: str, fds: Sequence[int], uid: int | None = USER, **parameters: Any
) -> tuple[str, dict[str, Any]]:
    """Make a call that is refused; the full name of the error, and its parameters."""
    with Theirs(daemon, uid) as raw:
        raw.send(call(f"{INTERFACE}.{method}", parameters), fds)
        reply = raw.reply()
        assert reply is not None, daemon.log
        assert not raw.fds
        assert "error" in reply, reply
        return reply["error"], reply["parameters"]


def opened(stack: contextlib.ExitStack, path: Path | str, flags: int = os.O_RDONLY) -> int:
    return stack.enter_context(OwnedFd(os.open(path, flags | os.O_CLOEXEC))).fileno()


def hello(mount: OwnedFd) -> str:
    with open(os.open("hello", os.O_RDONLY, dir_fd=mount.fileno()), encoding="utf-8") as file:
        return file.read()


def info(raw: Raw, method: str, parameters: object = None) -> dict[str, Any]:
    raw.send(call(method, parameters))
    reply = raw.reply()
    assert reply is not None
    return reply


def test_each_socket_has_its_own_interfaces(serving: Daemon) -> None:
    """Whoever reaches one of them gets nothing of the other, whatever it asks for."""
    with Theirs(serving) as theirs, Raw(serving, USER) as ours:
        said = info(theirs, OWN)["parameters"]["interfaces"]
        assert said == [SERVICE, INTERFACE]
        described = info(theirs, f"{SERVICE}.GetInterfaceDescription", {"interface": INTERFACE})
        for name in ("MountImage", "MountDirectory", "MakeDirectory"):
            assert f"method {name}(" in described["parameters"]["description"]
        assert INTERFACE not in info(ours, OWN)["parameters"]["interfaces"]
        not_found = f"{SERVICE}.InterfaceNotFound"
        assert info(ours, f"{INTERFACE}.MountImage", {"imageFileDescriptor": 0})["error"] == not_found
        for method in ("Mount.Mount", "Mount.Attach", "Mount.List", "Admin.Reload", "Images.List"):
            assert info(theirs, f"io.mountd.{method}")["error"] == not_found
        nothing = info(theirs, f"{INTERFACE}.RemoveDirectory", {})
        assert nothing["error"] == f"{SERVICE}.MethodNotFound"


@pytest.mark.parametrize("type", ["erofs", "ext4"])
def test_an_image_without_partitions(serving: Daemon, images: dict[str, Path], type: str) -> None:
    with contextlib.ExitStack() as stack:
        fd = opened(stack, images[type])
        reply, fds = stack.enter_context(asked(serving, "MountImage", [fd], imageFileDescriptor=0))
        (mount,) = fds
        size = images[type].stat().st_size
        assert reply == {
            "partitions": [
                {
                    "designator": "root",
                    "writable": False,
                    "growFileSystem": False,
                    "fileSystemType": type,
                    "size": size,
                    "offset": 0,
                    "mountFileDescriptor": 0,
                    "mountPoint": ["/"],
                }
            ],
            "singleFileSystem": True,
            "imagePolicy": "*",
            "imageSize": size,
            "sectorSize": 512,
            "imageName": type,
        }
        assert hello(mount)
        flags = os.fstatvfs(mount.fileno()).f_flag
        assert flags & os.ST_NOSUID
        assert flags & os.ST_RDONLY


@pytest.fixture(scope="module")
def disk(place: Path, images: dict[str, Path]) -> Path:
    home = build_image("ext4", build_tree(place / "mountfs-tree"), place / "mountfs-part.raw")
    parts = [Part("home", home, label="homes"), Part("root", images["erofs"], label="os")]
    return build_disk(place / "trusted/disk-of-mountfs.raw", [*parts, Part("swap")])


def test_an_image_with_partitions(serving: Daemon, disk: Path) -> None:
    with contextlib.ExitStack() as stack:
        fd = opened(stack, disk, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        reply, fds = stack.enter_context(
            asked(serving, "MountImage", [fd], imageFileDescriptor=0, imagePolicy="root=open:home=open")
        )
        assert reply["singleFileSystem"] is False
        assert reply["imagePolicy"] == "root=open:home=open"
        assert reply["imageName"] == "disk-of-mountfs"
        root, home = reply["partitions"]
        assert (root["designator"], root["fileSystemType"], root["partitionLabel"]) == (
            "root",
            "erofs",
            "os",
        )
        assert (home["designator"], home["mountPoint"], home["partitionNumber"]) == ("home", ["/home"], 1)
        assert (root["architecture"], "architecture" in home) == (Part("root").architecture, False)
        assert home["offset"] == MIB
        assert len(root["partitionUuid"]) == len(reply["imageUuid"]) == 36
        assert [hello(each) != "" for each in fds] == [True, True]


def test_for_a_user_namespace(serving: Daemon, images: dict[str, Path], containers: None) -> None:
    """There is no nsresourced: then nobody has to be told. The host's namespace is none."""
    with contextlib.ExitStack() as stack:
        userns = stack.enter_context(user_namespace(RANGE, owner=USER)).fileno()
        fds = [opened(stack, images["ext4"]), userns]
        wishes = {"imageFileDescriptor": 0, "userNamespaceFileDescriptor": 1}
        _, (mount,) = stack.enter_context(asked(serving, "MountImage", fds, **wishes))
        assert os.fstat(mount.fileno()).st_uid == RANGE[0][1]
        lift = (MountAttr.RDONLY, MountAttr.NOSUID, MountAttr.NODEV)

        def work() -> list[str]:
            fd = mount.fileno()
            return [errno_of(lambda each=each: mount_api.mount_setattr(fd, clear=each)) for each in lift]  # type: ignore[misc]

        assert in_container(work) == ["EPERM"] * 3
        fds[1] = opened(stack, "/proc/self/ns/user")
        _, (mount,) = stack.enter_context(asked(serving, "MountImage", fds, **wishes))
        assert os.fstat(mount.fileno()).st_uid == 0


@pytest.mark.parametrize(
    ("access", "read_only", "writable"),
    [
        (os.O_RDWR, False, True),
        (os.O_RDWR, None, True),
        (os.O_RDONLY, False, False),
    ],
)
def test_who_may_write(
    serving: Daemon,
    place: Path,
    images: dict[str, Path],
    access: int,
    read_only: bool | None,
    writable: bool,
) -> None:
    """`readOnly` is what it says, and the descriptor is what proves that one may write."""
    image = place / "mountfs-writable/ext4.raw"
    shutil.copy(images["ext4"], image)
    with contextlib.ExitStack() as stack:
        fd = opened(stack, image, access)
        wishes = {"imageFileDescriptor": 0, "readOnly": read_only}
        reply, (mount,) = stack.enter_context(asked(serving, "MountImage", [fd], **wishes))
        assert reply["partitions"][0]["writable"] is writable
        assert bool(os.fstatvfs(mount.fileno()).f_flag & os.ST_RDONLY) is not writable


def test_bytes_that_cannot_change_are_read_only_whatever_is_wished(
    serving: Daemon, images: dict[str, Path]
) -> None:
    """A client may wish to write where it cannot: the reply says so."""
    with contextlib.ExitStack() as stack:
        fds = [stack.enter_context(memfd(images["squashfs"].read_bytes(), SEALS_OF_IMAGE))]
        wishes: dict[str, Any] = {"imageFileDescriptor": 0, "readOnly": False}
        reply, (mount,) = stack.enter_context(asked(serving, "MountImage", fds, **wishes))
        assert reply["partitions"][0]["writable"] is False
        assert "imageName" in reply
        assert hello(mount)
        fds = [stack.enter_context(memfd(images["squashfs"].read_bytes(), 0))]
        assert refusal(serving, "MountImage", fds, **wishes)[0] == f"{INTERFACE}.DeniedByImagePolicy"
        fds = [opened(stack, images["ext4"], os.O_RDWR)]
        name, said = refusal(serving, "MountImage", fds, **wishes)
        assert name == f"{INTERFACE}.DeniedByImagePolicy"
        assert "open the image read-only" in said["hint"]


def test_root_hashes(start: Callable[..., Daemon], place: Path, images: dict[str, Path]) -> None:
    """Which are signed with which key is found out before the kernel sees any of it."""
    keys = place / "mountfs-keys"
    keys.mkdir()
    own, foreign = (Signatory(keys, name) for name in ("mountfs-own", "mountfs-foreign"))
    image, tree, digits = images["erofs"], place / "mountfs-verified.tree", "ab" * 32
    blocks = image.stat().st_size // 4096
    tree.write_bytes(superblock(data_blocks=blocks).ljust((blocks // 64 + 8) * 4096, b"\0"))
    shutil.copy(own.pem, keys / "key.pem")
    policy = f'[key.one]\nx509 = "{keys}/key.pem"\n' + signed_rule("signed", 'signed = "one"', '"dm-verity"')
    socket_path = place / "mountfs-signed"
    daemon = start(policy, "--mountfs-socket", str(socket_path))

    def error(root_hash: str, signature: bytes | None) -> str:
        with contextlib.ExitStack() as stack, Raw(daemon, fd=connect_as(socket_path)) as raw:
            fields: dict[str, Any] = {"verityDataFileDescriptor": 1, "verityRootHash": root_hash}
            if signature is not None:
                fields["verityRootHashSignature"] = base64.b64encode(signature).decode()
            fds = [opened(stack, image), opened(stack, tree)]
            raw.send(call(f"{INTERFACE}.MountImage", {"imageFileDescriptor": 0, **fields}), fds)
            reply = raw.reply()
            assert reply is not None
            return f"{reply.get('error')} {reply['parameters'].get('parameter', '')}".strip()

    assert error(digits, foreign.cms(digits.encode())) == f"{INTERFACE}.KeyNotFound"
    assert error(digits, own.cms(b"0" * 64)) == f"{INTERFACE}.VerityFailure"
    assert error(digits.upper(), b"nonsense") == f"{INTERFACE}.VerityFailure"
    assert error(digits, None) == f"{INTERFACE}.DeniedByImagePolicy"
    assert error("ab" * 64, own.cms(digits.encode())) == f"{PARAMETER} verityRootHash"
    # What is right gets as far as the kernel, which may have no dm-verity, or finds that it does not fit.
    named = {f"{INTERFACE}.{name}" for name in ("KeyNotFound", "VerityFailure", "DeniedByImagePolicy")}
    assert error(digits, own.cms(digits.encode())) not in named


def test_options(serving: Daemon, images: dict[str, Path]) -> None:
    with contextlib.ExitStack() as stack:
        fds = [opened(stack, images["ext4"])]
        options = {"root": "noexec,nosuid"}
        _, (mount,) = stack.enter_context(
            asked(serving, "MountImage", fds, imageFileDescriptor=0, mountOptions=options)
        )
        assert os.fstatvfs(mount.fileno()).f_flag & os.ST_NOEXEC


PARAMETER = f"{SERVICE}.InvalidParameter"
PERMISSION = f"{SERVICE}.PermissionDenied"
HASH = "0" * 64
# What is handed over, what is said about it, the error, and its parameter or a part of its reason.
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("erofs", {"verityRootHash": HASH}, PARAMETER, "verityDataFileDescriptor"),
    ("erofs+erofs", {"verityDataFileDescriptor": 1}, PARAMETER, "verityDataFileDescriptor"),
    ("erofs", {"verityRootHashSignature": "AAAA"}, PARAMETER, "verityRootHashSignature"),
    ("erofs+erofs", {"verityDataFileDescriptor": 1, "verityRootHash": "xy"}, PARAMETER, "verityRootHash"),
    ("erofs+erofs", {"verityDataFileDescriptor": 1, "verityRootHash": "ab"}, PARAMETER, "verityRootHash"),
    ("path", {}, f"{INTERFACE}.BadFileDescriptorFlags", "imageFileDescriptor"),
    ("append", {}, f"{INTERFACE}.BadFileDescriptorFlags", "imageFileDescriptor"),
    ("path+path", {"verityRootHash": HASH}, PARAMETER, "verityDataFileDescriptor"),
    ("path+pipe", {"userNamespaceFileDescriptor": 1}, f"{INTERFACE}.BadFileDescriptorFlags", "imageFileDe"),
    ("write", {}, "io.systemd.System", "writing only"),
    ("directory", {}, f"{INTERFACE}.BadFileDescriptorFlags", "imageFileDescriptor"),
    ("pipe", {}, PARAMETER, "imageFileDescriptor"),
    ("erofs+pipe", {"userNamespaceFileDescriptor": 1}, PARAMETER, "userNamespaceFileDescriptor"),
    (
        "erofs+path",
        {"userNamespaceFileDescriptor": 1},
        f"{INTERFACE}.BadFileDescriptorFlags",
        "userNamespaceFileDescriptor",
    ),
    ("erofs+mount", {"userNamespaceFileDescriptor": 1}, PARAMETER, "userNamespaceFileDescriptor"),
    ("erofs+others", {"userNamespaceFileDescriptor": 1}, PARAMETER, "userNamespaceFileDescriptor"),
    ("erofs", {"userNamespaceFileDescriptor": 0}, PARAMETER, "userNamespaceFileDescriptor"),
    ("erofs", {"imageFileDescriptor": 1}, PARAMETER, "imageFileDescriptor"),
    ("erofs", {"imageFileDescriptor": -1}, PARAMETER, "imageFileDescriptor"),
    ("erofs+erofs", {}, PARAMETER, "fileDescriptors"),
    ("erofs", {"imagePolicy": "root=what"}, PARAMETER, "imagePolicy"),
    ("erofs", {"mountOptions": {"attic": "ro"}}, PARAMETER, "mountOptions"),
    ("erofs", {"mountOptions": {"root": "acl"}}, PERMISSION, "acl"),
    ("erofs", {"nothing": 1}, PARAMETER, "nothing"),
    ("erofs", {"imagePolicy": "root=verity"}, f"{INTERFACE}.DeniedByImagePolicy", "own imagePolicy"),
    ("erofs", {"imagePolicy": "~"}, f"{INTERFACE}.DeniedByImagePolicy", "own imagePolicy"),
    ("elsewhere", {}, f"{INTERFACE}.DeniedByImagePolicy", "directory that a rule trusts"),
    ("noise", {}, f"{INTERFACE}.IncompatibleImage", ""),
    ("rootless", {}, f"{INTERFACE}.RootPartitionNotFound", "neither a root"),
]


@pytest.fixture(scope="module")
def sources(place: Path, images: dict[str, Path], disk: Path) -> dict[str, Callable[[], int]]:
    noise = place / "trusted/noise.raw"
    noise.write_bytes(bytes(range(256)) * 4096)
    elsewhere = place / "mountfs-elsewhere.raw"
    shutil.copy(images["erofs"], elsewhere)
    os.chown(elsewhere, USER, USER)
    rootless = build_disk(place / "trusted/rootless.raw", [Part("home", images["ext4"])])
    erofs = images["erofs"]

    def pipe() -> int:
        reader, writer = os.pipe()
        os.close(writer)
        return reader

    return {
        "erofs": lambda: os.open(erofs, os.O_RDONLY),
        "path": lambda: os.open(erofs, os.O_PATH),
        "append": lambda: os.open(erofs, os.O_RDWR | os.O_APPEND),
        "write": lambda: os.open(erofs, os.O_WRONLY),
        "directory": lambda: os.open(place, os.O_RDONLY | os.O_DIRECTORY),
        "pipe": pipe,
        "mount": lambda: os.open("/proc/self/ns/mnt", os.O_RDONLY),
        "others": lambda: user_namespace(RANGE, owner=USER + 1).take(),
        "elsewhere": lambda: os.open(elsewhere, os.O_RDONLY),
        "noise": lambda: os.open(noise, os.O_RDONLY),
        "rootless": lambda: os.open(rootless, os.O_RDONLY),
    }


@pytest.mark.parametrize(("what", "fields", "error", "text"), REFUSED)
def test_image_refused(
    serving: Daemon,
    sources: dict[str, Callable[[], int]],
    what: str,
    fields: dict[str, Any],
    error: str,
    text: str,
) -> None:
    fds = [OwnedFd(sources[each]()) for each in what.split("+")]
    try:
        wishes = {"imageFileDescriptor": 0, **fields}
        name, parameters = refusal(serving, "MountImage", [fd.fileno() for fd in fds], **wishes)
        assert name == error, parameters
        assert parameters["reason"]
        said = parameters.get("parameter", parameters["reason"])
        assert text in said, parameters
        if name == "io.systemd.System":
            assert (parameters["errno"], parameters["errnoName"], parameters["origin"]) == (
                9,
                "EBADF",
                "linux",
            )
    finally:
        close_all(fds)


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


@pytest.mark.parametrize("flags", [os.O_RDONLY | os.O_DIRECTORY, os.O_PATH | os.O_DIRECTORY])
@pytest.mark.parametrize("mode", [None, "auto", "root"])
def test_a_directory_of_ones_own(
    serving: Daemon, home: Path, containers: None, flags: int, mode: str | None
) -> None:
    with contextlib.ExitStack() as stack:
        userns = stack.enter_context(user_namespace(RANGE, owner=USER)).fileno()
        fds = [opened(stack, home, flags), userns]
        wishes: dict[str, Any] = {"directoryFileDescriptor": 0, "userNamespaceFileDescriptor": 1}
        if mode is not None:
            wishes["mode"] = mode
        reply, (mount,) = stack.enter_context(asked(serving, "MountDirectory", fds, **wishes))
        assert reply == {"mountFileDescriptor": 0}

        def work() -> int:
            made = os.open("made", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=mount.fileno())
            os.close(made)
            return os.fstat(mount.fileno()).st_uid

        assert in_container(work) == 0
        assert (home / "made").stat().st_uid == USER


def test_a_directory_as_it_is(serving: Daemon, home: Path) -> None:
    """identity, or no user namespace at all; read-only where it is said."""
    with contextlib.ExitStack() as stack:
        userns = stack.enter_context(user_namespace(RANGE, owner=USER)).fileno()
        fds = [opened(stack, home, os.O_DIRECTORY), userns]
        for wishes in (
            {"userNamespaceFileDescriptor": 1, "mode": "identity", "readOnly": True},
            {"mode": "root", "readOnly": True},
            {"readOnly": True},
        ):
            given = fds if "userNamespaceFileDescriptor" in wishes else fds[:1]
            all_wishes: dict[str, Any] = {"directoryFileDescriptor": 0, **wishes}
            _, (mount,) = stack.enter_context(asked(serving, "MountDirectory", given, **all_wishes))
            assert os.fstat(mount.fileno()).st_uid == USER
            assert os.fstatvfs(mount.fileno()).f_flag & os.ST_RDONLY


DIRECTORIES: list[tuple[str, dict[str, Any], str, str]] = [
    ("home", {"mode": "foreign", "userNamespaceFileDescriptor": 1}, PARAMETER, "mode"),
    ("home", {"mode": "all"}, PARAMETER, "mode"),
    ("nonblock", {}, f"{INTERFACE}.BadFileDescriptorFlags", "directoryFileDescriptor"),
    ("file", {}, PARAMETER, "directoryFileDescriptor"),
    ("theirs", {}, PERMISSION, "the caller is"),
    ("roots", {}, PERMISSION, ""),
    ("proc", {}, "io.systemd.System", "file system"),
]


@pytest.mark.parametrize(("what", "fields", "error", "text"), DIRECTORIES)
def test_directory_refused(
    serving: Daemon,
    home: Path,
    images: dict[str, Path],
    what: str,
    fields: dict[str, Any],
    error: str,
    text: str,
) -> None:
    theirs = home / "theirs"
    theirs.mkdir()
    os.chown(theirs, USER + 1, USER + 1)
    paths: dict[str, tuple[Path, int]] = {
        "home": (home, os.O_DIRECTORY),
        "nonblock": (home, os.O_NONBLOCK),
        "file": (images["erofs"], os.O_RDONLY),
        "theirs": (theirs, os.O_DIRECTORY),
        "roots": (Path("/etc"), os.O_DIRECTORY),
        "proc": (Path("/proc"), os.O_DIRECTORY),
    }
    with contextlib.ExitStack() as stack:
        fds = [opened(stack, *paths[what])]
        if "userNamespaceFileDescriptor" in fields:
            fds.append(stack.enter_context(user_namespace(RANGE, owner=USER)).fileno())
        wishes = {"directoryFileDescriptor": 0, **fields}
        name, said = refusal(serving, "MountDirectory", fds, **wishes)
        assert name == error, said
        assert text in said.get("parameter", said["reason"]), said


def make(daemon: Daemon, parent: Path, name: str, uid: int | None = USER, **fields: Any) -> os.stat_result:
    with contextlib.ExitStack() as stack:
        fds = [opened(stack, parent, os.O_PATH | os.O_DIRECTORY)]
        reply, (made,) = stack.enter_context(
            asked(daemon, "MakeDirectory", fds, uid, parentFileDescriptor=0, name=name, **fields)
        )
        assert reply == {"directoryFileDescriptor": 0}
        found = os.fstat(made.fileno())
        assert (found.st_dev, found.st_ino) == ((parent / name).stat().st_dev, (parent / name).stat().st_ino)
        return found


def test_make_a_directory_and_fill_it(serving: Daemon, home: Path, containers: None) -> None:
    """As what unpacks an image without privileges does: make, mount for a container, write there."""
    made = make(serving, home, "machine")
    assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode)) == (BASE, BASE, 0o700)
    assert stat.S_IMODE(make(serving, home, "wide", mode=0o7777).st_mode) == 0o775
    assert stat.S_IMODE(make(serving, home, "narrow", mode=0).st_mode) == 0
    assert sorted(os.listdir(home)) == ["machine", "mine", "narrow", "wide"]
    with contextlib.ExitStack() as stack:
        userns = stack.enter_context(user_namespace(RANGE, owner=USER)).fileno()
        fds = [opened(stack, home / "machine", os.O_PATH | os.O_DIRECTORY), userns]
        wishes: dict[str, Any] = {"directoryFileDescriptor": 0, "userNamespaceFileDescriptor": 1}
        _, (mount,) = stack.enter_context(asked(serving, "MountDirectory", fds, **wishes, mode="foreign"))

        def work() -> None:
            os.mkdir("etc", dir_fd=mount.fileno())
            os.chown("etc", 42, 42, dir_fd=mount.fileno())

        in_container(work)
        name, _ = refusal(serving, "MountDirectory", fds, **wishes, mode="root")
        assert name == PARAMETER
    assert (home / "machine/etc").stat().st_uid == BASE + 42
    assert as_user(lambda: errno_of(lambda: os.listdir(home / "machine"))) == "EACCES"


NAMES = ["", ".", "..", "a/b", "/etc", "x" * 256]


@pytest.mark.parametrize("name", NAMES)
def test_no_name(serving: Daemon, home: Path, name: str) -> None:
    with contextlib.ExitStack() as stack:
        fds = [opened(stack, home, os.O_PATH)]
        error, said = refusal(serving, "MakeDirectory", fds, parentFileDescriptor=0, name=name)
        assert (error, said["parameter"]) == (PARAMETER, "name")


def test_directories_that_are_not_made(serving: Daemon, home: Path, place: Path) -> None:
    """Nor in anybody else's, over what is there, and with no more rights than the caller has there."""
    before = sorted(os.listdir(home))
    theirs = home / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    os.chown(theirs, USER + 1, USER + 1)
    with contextlib.ExitStack() as stack:

        def refused(parent: Path, name: str, **fields: Any) -> tuple[str, dict[str, Any]]:
            fds = [opened(stack, parent, os.O_PATH)]
            return refusal(serving, "MakeDirectory", fds, parentFileDescriptor=0, name=name, **fields)

        assert refused(theirs, "new")[0] == PERMISSION
        assert refused(place, "new")[0] == PERMISSION
        assert refused(Path("/tmp"), "new")[0] == PERMISSION
        error, said = refused(home, "mine")
        assert (error, said["errnoName"]) == ("io.systemd.System", "EEXIST")
        error, said = refused(home, "new", mode=-1)
        assert (error, said["parameter"]) == (PARAMETER, "mode")
        # Its group would be one that is not the caller's to give away.
        os.chown(home, USER, 0)
        home.chmod(0o2755)
        assert refused(home, "new")[0] == "io.systemd.System"
    assert sorted(os.listdir(home)) == sorted([*before, "theirs"])
    assert os.listdir(theirs) == []
    os.chown(home, USER, USER)


def test_what_no_rule_lets_be_mounted_is_not_made(
    start: Callable[..., Daemon], place: Path, home: Path
) -> None:
    daemon = start(trusting(place / "trusted"), "--mountfs-socket", str(place / "mountfs-strict"))
    with Raw(daemon, fd=connect_as(place / "mountfs-strict")) as raw, contextlib.ExitStack() as stack:
        fields = {"parentFileDescriptor": 0, "name": "new"}
        raw.send(call(f"{INTERFACE}.MakeDirectory", fields), [opened(stack, home, os.O_PATH)])
        reply = raw.reply()
        assert reply is not None
        assert reply["error"] == PERMISSION
    assert not (home / "new").exists()


def connect_as(path: Path, uid: int = USER) -> int:
    os.seteuid(uid)
    try:
        return sockets.connect(str(path)).detach()
    finally:
        os.seteuid(0)


def test_no_message_at_all(serving: Daemon) -> None:
    """What is no request is answered in words of that interface, and the neighbours go on."""
    with Theirs(serving) as raw:
        raw.send(b"{\0")
        reply = raw.reply()
        assert reply is not None
        assert reply["error"] == PARAMETER
        assert raw.ended()


def test_swapping_what_is_made(serving: Daemon, home: Path, place: Path) -> None:
    """Whoever renames as fast as it can what is being made loses, or gives away what is its own."""
    precious = place / "mountfs-precious"
    precious.mkdir(exist_ok=True)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for name in os.listdir(home):
                if name.startswith(".#"):
                    with contextlib.suppress(OSError):
                        os.rename(home / name, home / "taken")
                        os.symlink(precious, home / name)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for number in range(100):
            with contextlib.ExitStack() as stack, Theirs(serving) as raw:
                fields = {"parentFileDescriptor": 0, "name": f"n{number}"}
                raw.send(call(f"{INTERFACE}.MakeDirectory", fields), [opened(stack, home, os.O_PATH)])
                assert raw.reply() is not None
    finally:
        stop.set()
        thread.join()
    assert precious.stat().st_uid == 0
    assert stat.S_IMODE(precious.stat().st_mode) == 0o755


def test_the_listener_speaks_their_words_too(serving: Daemon) -> None:
    """It answers by itself, having read nothing, whoever has too many connections of either kind."""
    with contextlib.ExitStack() as stack:
        half = MAXIMUM_CONNECTIONS_PER_OWNER // 2
        for kind in (Theirs, Raw):
            raws = [stack.enter_context(kind(serving, USER)) for _ in range(half)]
            # Then those before it were taken in as well.
            assert "error" not in info(raws[-1], OWN)
        reply = stack.enter_context(Theirs(serving)).reply()
        assert reply is not None
        assert (reply["error"], reply["parameters"]["errnoName"]) == ("io.systemd.System", "EUSERS")
        reply = stack.enter_context(Raw(serving, USER)).reply()
        assert reply is not None
        assert reply["error"] == "io.mountd.Mount.LimitExceeded"
