"""io.mountd.Images through the socket: who may import, see and remove what, and how progress is told."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.client import Client, Request
from mountd.errors import (
    BadFileDescriptor,
    DeniedByPolicy,
    InUse,
    InvalidImage,
    InvalidParameter,
    KeyUnknown,
    MountdError,
    NotFound,
)
from mountd.fds import OwnedFd
from mountd.kernel import namespaces, sockets
from mountd.kernel.flags import Clone, MountAttr
from mountd.kernel.fs_context import FsContext
from mountd.store.record import Owner
from mountd.store.store import Store
from mountd.wire.framing import encode
from tests.container import USER, drop_capabilities, in_container
from tests.daemon import ROOT, Daemon
from tests.e2e.calls import refused
from tests.fuse import Fuse
from tests.process import in_child
from tests.programs import Done, check_line, run

MIB = 1 << 20
IMAGES = "io.mountd.Images"


@pytest.fixture
def clean(daemon: Daemon) -> Iterator[Store]:
    """The store of the shared daemon, empty before and after."""
    store = Store(daemon.directory / "state")
    empty(store)
    yield store
    empty(store)


def empty(store: Store) -> None:
    for record in list(store.records()):
        deadline = time.monotonic() + 5
        while True:
            try:
                store.remove(record.digest, 0)
                break
            except InUse:  # the worker closes what it was handed a moment later
                assert time.monotonic() < deadline
                time.sleep(0.02)


def call(daemon: Daemon, method: str, fds: tuple[int, ...] = (), **parameters: object) -> dict[str, object]:
    owned = [OwnedFd(os.dup(fd)) for fd in fds]
    try:
        with Client(str(daemon.socket)) as client:
            reply, received = client.call(f"{IMAGES}.{method}", parameters, owned)
            assert received == []
            return reply
    finally:
        for fd in owned:
            fd.close()


def more(
    daemon: Daemon, method: str, fds: tuple[int, ...] = (), **parameters: object
) -> list[dict[str, object]]:
    owned = [OwnedFd(os.dup(fd)) for fd in fds]
    try:
        with Client(str(daemon.socket)) as client:
            return list(client.call_more(f"{IMAGES}.{method}", parameters, owned))
    finally:
        for fd in owned:
            fd.close()


def import_file(daemon: Daemon, path: Path, **parameters: object) -> dict[str, object]:
    with path.open("rb") as file:
        reply = call(daemon, "Import", (file.fileno(),), imageFileDescriptor=0, **parameters)
    image = reply["image"]
    assert isinstance(image, dict)
    return image


def digest_of(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def as_uid(uid: int, work: Callable[[], object]) -> None:
    def become() -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        work()

    in_child(become)


def test_import_list_inspect_verify_remove(daemon: Daemon, images: dict[str, Path], clean: Store) -> None:
    image = import_file(daemon, images["erofs"], name="base")
    digest = digest_of(images["erofs"])
    assert image["digest"] == digest
    assert (image["name"], image["ownerUids"], image["size"]) == (
        "base",
        [0],
        images["erofs"].stat().st_size,
    )
    assert image["fileSystem"]["type"] == "erofs"  # type: ignore[index]
    assert image["signers"] == []
    assert call(daemon, "List") == {"images": [image]}
    assert call(daemon, "Inspect", digest=digest) == {"image": image}
    assert call(daemon, "Verify", digest=digest) == {"image": image}
    assert call(daemon, "CollectGarbage") == {"removed": [], "freed": 0, "inUse": []}
    assert call(daemon, "Remove", digest=digest) == {}
    assert call(daemon, "List") == {"images": []}
    with pytest.raises(NotFound):
        call(daemon, "Inspect", digest=digest)


def test_progress_is_told_if_it_is_wanted(
    daemon: Daemon, images: dict[str, Path], clean: Store, place: Path
) -> None:
    path = place / "large"
    with path.open("wb") as file:
        file.truncate(512 * MIB)
        file.seek(0)
        file.write(images["erofs"].read_bytes())
    size = path.stat().st_size
    with path.open("rb") as file:
        *steps, last = more(daemon, "Import", (file.fileno(),), imageFileDescriptor=0)
        digest = last["image"]["digest"]  # type: ignore[index]
        assert set(last) == {"image"}
        assert len(steps) >= 2
        check_steps(steps, size)
        assert set(call(daemon, "Import", (file.fileno(),), imageFileDescriptor=0)) == {"image"}
    *steps, last = more(daemon, "Verify", digest=digest)
    check_steps(steps, size)
    assert len(steps) >= 2
    assert last["image"]["digest"] == digest  # type: ignore[index]
    path.unlink()


def check_steps(steps: list[dict[str, object]], size: int) -> None:
    done = [step["progress"]["done"] for step in steps]  # type: ignore[index]
    assert all(
        step == {"progress": {"done": each, "total": size}} for step, each in zip(steps, done, strict=True)
    )
    assert done == sorted(set(done))
    assert 0 < done[0] <= done[-1] <= size


@pytest.mark.parametrize("method", ["List", "Inspect", "Remove", "CollectGarbage"])
def test_short_methods_offer_no_progress(daemon: Daemon, method: str) -> None:
    with pytest.raises(InvalidParameter, match="more"):
        more(daemon, method)


def test_errors_have_the_name_of_the_interface(daemon: Daemon) -> None:
    with sockets.connect(str(daemon.socket), 10) as connection:
        request = {"method": f"{IMAGES}.Inspect", "parameters": {"digest": "sha256:" + "0" * 64}}
        connection.send(encode(request))
        assert json.loads(connection.recv(65536)[:-1])["error"] == f"{IMAGES}.NotFound"


def test_only_root_may_import(daemon: Daemon, images: dict[str, Path], clean: Store) -> None:
    def work() -> None:
        with pytest.raises(DeniedByPolicy, match="no rule lets") as raised:
            import_file(daemon, images["erofs"])
        assert raised.value.hint
        assert call(daemon, "List") == {"images": []}

    as_uid(USER, work)
    assert list(clean.records()) == []


def test_everybody_has_their_own(daemon: Daemon, images: dict[str, Path], clean: Store) -> None:
    roots = import_file(daemon, images["erofs"])["digest"]
    with images["squashfs"].open("rb") as file:
        size = images["squashfs"].stat().st_size
        mine = clean.add(file.fileno(), size, Owner(USER, USER), name="mine").digest
        clean.add(file.fileno(), size, Owner(USER + 1, USER + 1))
    with images["ext4"].open("rb") as file:
        size = images["ext4"].stat().st_size
        ours = clean.add(file.fileno(), size, Owner(USER + 1, USER + 1), name="theirs").digest
        clean.add(file.fileno(), size, Owner(USER, USER))

    def work() -> None:
        listed = call(daemon, "List")["images"]
        # Nor who else has it, and what they call it.
        found = {(each["digest"], *each["ownerUids"], each.get("name")) for each in listed}  # type: ignore[attr-defined]
        assert found == {(mine, USER, "mine"), (ours, USER, None)}
        for method in ("Inspect", "Verify", "Remove"):
            with pytest.raises(NotFound):
                call(daemon, method, digest=roots)
        call(daemon, "Verify", digest=mine)
        assert call(daemon, "CollectGarbage", maximumAge=0)["removed"] == []
        for digest in (mine, ours):
            call(daemon, "Remove", digest=digest)
        assert call(daemon, "List") == {"images": []}

    as_uid(USER, work)
    listed = {each["digest"]: each["ownerUids"] for each in call(daemon, "List")["images"]}  # type: ignore[attr-defined]
    assert listed == {roots: [0], mine: [USER + 1], ours: [USER + 1]}


def test_a_containers_root_is_not_the_hosts(
    daemon: Daemon, images: dict[str, Path], clean: Store, containers: None
) -> None:
    digest = import_file(daemon, images["erofs"])["digest"]

    def work() -> None:
        assert os.getuid() == 0
        assert call(daemon, "List") == {"images": []}
        with pytest.raises(NotFound):
            call(daemon, "Remove", digest=digest)
        with pytest.raises(DeniedByPolicy):
            import_file(daemon, images["squashfs"])

    in_container(work)


def test_a_uid_0_that_is_not_the_hosts_root_is_nobody(
    daemon: Daemon, images: dict[str, Path], clean: Store
) -> None:
    digest = str(import_file(daemon, images["erofs"])["digest"])

    def ask() -> None:
        for method, parameters in (
            ("List", {}),
            ("Remove", {"digest": digest}),
            ("CollectGarbage", {"maximumAge": 0}),
        ):
            with pytest.raises(DeniedByPolicy, match="CAP_SYS_ADMIN"):
                call(daemon, method, **parameters)
        with pytest.raises(DeniedByPolicy):
            import_file(daemon, images["squashfs"])

    def without_capability() -> None:
        drop_capabilities()
        ask()

    def in_namespace_with_the_hosts_root() -> None:
        namespaces.unshare(Clone.NEWUSER)
        Path("/proc/self/uid_map").write_text("0 0 1")
        ask()

    in_child(without_capability)
    in_child(in_namespace_with_the_hosts_root)
    assert call(daemon, "Inspect", digest=digest)


def test_many_are_listed_on_several_pages(daemon: Daemon, clean: Store) -> None:
    names = [f"{each:03} " + "ä" * 125 for each in range(600)]
    with OwnedFd(os.memfd_create("image", os.MFD_CLOEXEC)) as fd:
        for name in names:
            os.pwrite(fd.fileno(), name.encode(), 0)
            clean.add(fd.fileno(), len(name.encode()), Owner(0, 0), name=name)
    first = call(daemon, "List")
    assert len(first["images"]) < 600  # type: ignore[arg-type]
    done = run(
        [sys.executable, "-m", "mountd.cli.mountctl", "image", "list", "--json"], daemon.socket, cwd=ROOT
    )
    listed = json.loads(done.stdout)["images"]
    assert {image["name"] for image in listed} == set(names)
    assert len(listed) == 600


class TestRefused:
    def test_descriptors(self, daemon: Daemon, images: dict[str, Path], place: Path, clean: Store) -> None:
        with contextlib.ExitStack() as stack:
            for flags, path in (
                (os.O_PATH, images["erofs"]),
                (os.O_WRONLY, images["erofs"]),
                (os.O_RDONLY | os.O_DIRECTORY, place),
                (os.O_RDONLY, Path("/dev/zero")),
            ):
                fd = stack.enter_context(OwnedFd(os.open(path, flags | os.O_CLOEXEC)))
                with pytest.raises(BadFileDescriptor):
                    call(daemon, "Import", (fd.fileno(),), imageFileDescriptor=0)
        with pytest.raises(InvalidParameter):
            call(daemon, "Import", imageFileDescriptor=0)
        with images["erofs"].open("rb") as file, pytest.raises(InvalidParameter):
            call(daemon, "List", (file.fileno(),))

    def test_a_file_of_fuse(self, daemon: Daemon, place: Path, clean: Store) -> None:
        with (
            Fuse(place / "fuse", b"x" * 4096) as fuse,
            fuse.path.open("rb") as file,
            pytest.raises(BadFileDescriptor, match="FUSE"),
        ):
            call(daemon, "Import", (file.fileno(),), imageFileDescriptor=0)

    def test_8_eib(self, daemon: Daemon, place: Path, clean: Store) -> None:
        with OwnedFd(os.memfd_create("image", os.MFD_CLOEXEC)) as fd:
            os.ftruncate(fd.fileno(), (1 << 63) - 1)
            with pytest.raises(MountdError, match="at most .* bytes in an image"):
                call(daemon, "Import", (fd.fileno(),), imageFileDescriptor=0)

    @pytest.mark.parametrize(
        ("method", "parameters"),
        [
            ("Inspect", {"digest": "sha256:../../lock"}),
            ("Verify", {"digest": ""}),
            ("Remove", {"digest": "stored:x"}),
            ("CollectGarbage", {"maximumAge": -1}),
            ("List", {"after": "x"}),
        ],
    )
    def test_parameters(self, daemon: Daemon, method: str, parameters: dict[str, object]) -> None:
        with pytest.raises(InvalidParameter):
            call(daemon, method, **parameters)

    @pytest.mark.parametrize(
        ("field", "value", "error"),
        [
            ("name", "two\nlines", InvalidParameter),
            ("name", "", InvalidParameter),
            ("signature", "not base64!", InvalidParameter),
            ("signature", "A" * 400_000, InvalidParameter),
        ],
    )
    def test_fields(
        self,
        daemon: Daemon,
        images: dict[str, Path],
        clean: Store,
        field: str,
        value: str,
        error: type[MountdError],
    ) -> None:
        with pytest.raises(error, match=field):
            import_file(daemon, images["erofs"], **{field: value})
        assert list(clean.records()) == []

    def test_a_signature_without_a_key(self, daemon: Daemon, images: dict[str, Path], clean: Store) -> None:
        with pytest.raises(KeyUnknown, match="the policy has no keys"):
            import_file(daemon, images["erofs"], signature=base64.b64encode(b"x").decode())
        assert list(clean.records()) == []

    def test_a_damaged_image(
        self, daemon: Daemon, images: dict[str, Path], place: Path, clean: Store
    ) -> None:
        path = place / "damaged"
        path.write_bytes(images["erofs"].read_bytes()[:8192])
        with pytest.raises(InvalidImage):
            import_file(daemon, path)
        assert list(clean.records()) == []
        path.write_bytes(b"no file system at all" * 500)
        assert "fileSystem" not in import_file(daemon, path)

    def test_without_a_store(
        self, start: Callable[..., Daemon], place: Path, images: dict[str, Path]
    ) -> None:
        """The daemon serves mounts all the same."""
        (place / "a file").write_text("")
        daemon = start("", "--state-dir", str(place / "a file"))
        with pytest.raises(NotFound, match="the store"):
            call(daemon, "List")
        with pytest.raises(DeniedByPolicy):
            mount(daemon, str(images["erofs"]))
        assert "there is no store" in daemon.log


class TestInUse:
    def test_what_is_mounted_is_not_removed(
        self, daemon: Daemon, images: dict[str, Path], clean: Store
    ) -> None:
        digest = str(import_file(daemon, images["erofs"])["digest"])
        fd, _ = clean.lookup(digest)
        with fd:
            context = FsContext.open("erofs")
            context.set_string("source", f"/proc/self/fd/{fd.fileno()}")
            context.set_flag("ro")
            context.create()
            with context.mount(MountAttr.RDONLY):
                context.close()
                fd.close()
                with pytest.raises(InUse):
                    call(daemon, "Remove", digest=digest)
                assert call(daemon, "CollectGarbage", maximumAge=0)["inUse"] == [digest]
        empty(clean)


def test_an_abandoned_import_leaves_nothing(
    daemon: Daemon, place: Path, images: dict[str, Path], clean: Store
) -> None:
    path = place / "large"
    with path.open("wb") as file:
        file.truncate(2048 * MIB)
    incoming = daemon.directory / "state/incoming"
    with path.open("rb") as file, Client(str(daemon.socket)) as client:
        owned = [OwnedFd(os.dup(file.fileno()))]
        steps = client.call_more(f"{IMAGES}.Import", {"imageFileDescriptor": 0}, owned)
        assert "progress" in next(steps)
        assert len(list(incoming.iterdir())) == 1
        owned[0].close()
    gone(incoming)
    path.unlink()
    assert list(clean.records()) == []


def gone(incoming: Path) -> None:
    deadline = time.monotonic() + 5
    while list(incoming.iterdir()):
        assert time.monotonic() < deadline, list(incoming.iterdir())
        time.sleep(0.02)


def test_who_does_not_read_progress_gets_the_image(
    daemon: Daemon, images: dict[str, Path], clean: Store
) -> None:
    with sockets.connect(str(daemon.socket), 10) as connection, images["ext4"].open("rb") as file:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        body = {"method": f"{IMAGES}.Import", "parameters": {"imageFileDescriptor": 0}, "more": True}
        with OwnedFd(os.dup(file.fileno())) as fd:
            sockets.send(connection, encode(body), [fd])
        deadline = time.monotonic() + 10
        while not list(clean.records()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        data = b""
        while b'"image"' not in data or not data.endswith(b"\0"):
            data += connection.recv(65536)
        *steps, last = [json.loads(each) for each in data.split(b"\0")[:-1]]
        assert all(step["continues"] for step in steps)
        assert not last.get("continues")


def test_a_killed_worker_leaves_nothing(start: Callable[..., Daemon], place: Path) -> None:
    daemon = start("")
    path = place / "large"
    with path.open("wb") as file:
        file.truncate(4096 * MIB)
    incoming = daemon.directory / "state/incoming"
    with path.open("rb") as file, Client(str(daemon.socket)) as client:
        with OwnedFd(os.dup(file.fileno())) as fd:
            steps = client.call_more(f"{IMAGES}.Import", {"imageFileDescriptor": 0}, [fd])
            next(steps)
        for pid in daemon.workers:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(MountdError, match="its process ended"):
            list(steps)
    assert len(list(incoming.iterdir())) == 1
    # The next import sweeps, and so does the next start.
    (place / "small").write_bytes(b"x" * 5000)
    import_file(daemon, place / "small")
    gone(incoming)
    path.unlink()


class TestReference:
    def test_what_speaks_for_a_stored_image(
        self, daemon: Daemon, images: dict[str, Path], clean: Store
    ) -> None:
        digest = import_file(daemon, images["erofs"])["digest"]
        with Client(str(daemon.socket)) as client:
            reply = client.explain({"reference": f"stored:{digest}"}, [])
        facts = reply["facts"]
        assert isinstance(facts, dict)
        assert (facts["file system"], facts["digest"], facts["immutable by"]) == ("erofs", digest, "stored")
        assert "path" not in facts

    def test_an_image_of_others_is_not_found(
        self, daemon: Daemon, images: dict[str, Path], clean: Store
    ) -> None:
        """Who names a digest has not proven to have the image."""
        with images["erofs"].open("rb") as file:
            size = images["erofs"].stat().st_size
            digest = clean.add(file.fileno(), size, Owner(USER + 1, USER + 1)).digest

        def work() -> None:
            refused(lambda: mount(daemon, f"stored:{digest}"), "NotFound")
            refused(lambda: mount(daemon, "stored:sha256:" + "0" * 64), "NotFound")

        as_uid(USER, work)
        import_file(daemon, images["erofs"])  # root's now as well: then it is for the policy to say
        as_uid(
            USER, lambda: refused(lambda: mount(daemon, f"stored:{digest}", userns="none"), "DeniedByPolicy")
        )

    def test_references(self, daemon: Daemon) -> None:
        refused(lambda: mount(daemon, "stored:x"), "InvalidParameter", "source.reference")


def mount(daemon: Daemon, source: str, **wishes: object) -> object:
    with Client(str(daemon.socket)) as client, Request(source, **wishes) as request:  # type: ignore[arg-type]
        return client.mount(request.source, request.fds, **request.parameters)


class TestCommandLine:
    """mountctl image, as installed."""

    @pytest.fixture
    def mountctl(self, daemon: Daemon, installed: Path, clean: Store) -> Callable[..., Done]:
        return lambda *arguments: run([installed / "bin/mountctl", "image", *arguments], daemon.socket)

    def test_all_verbs(self, mountctl: Callable[..., Done], images: dict[str, Path]) -> None:
        digest = digest_of(images["erofs"])
        done = mountctl("import", images["erofs"], "--name", "base image")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{digest}\n", "")
        done = mountctl("list")
        assert done.stdout.split() == [digest, *size_words(images["erofs"]), "erofs", "base", "image"]
        listed = json.loads(mountctl("list", "--json").stdout)["images"]
        assert [each["digest"] for each in listed] == [digest]
        assert f"digest: {digest}" in mountctl("inspect", digest).stdout.splitlines()
        assert mountctl("verify", f"stored:{digest}").stdout == f"{digest} is as it was stored\n"
        assert json.loads(mountctl("verify", "--json", digest).stdout) == {"image": listed[0]}
        assert mountctl("gc").stdout == "0 bytes freed\n"
        assert json.loads(mountctl("gc", "--age", "1d", "--json").stdout)["removed"] == []
        assert mountctl("remove", digest).returncode == 0
        assert mountctl("list").stdout == ""

    def test_failures_are_one_line(self, mountctl: Callable[..., Done], place: Path) -> None:
        missing = "sha256:" + "0" * 64
        for verb in ("inspect", "verify", "remove"):
            done = mountctl(verb, missing)
            assert done.returncode == 1
            check_line(done, f"not found: the stored image {missing}.*hint: ")
        check_line(mountctl("import", place / "nothing"), "not found: ")
        check_line(
            mountctl("import", place), "bad file descriptor in imageFileDescriptor: it is a directory"
        )
        done = mountctl("inspect", "x", "--json")
        assert json.loads(done.stdout)["parameters"]["parameter"] == "digest"

    def test_progress_on_a_terminal(
        self, daemon: Daemon, installed: Path, place: Path, clean: Store
    ) -> None:
        path = place / "large"
        with path.open("wb") as file:
            file.truncate(768 * MIB)
        ours, theirs = pty.openpty()
        try:
            program = installed / "bin/mountctl"
            done = run([program, "image", "import", path], daemon.socket, capture_output=False,
                       stdout=subprocess.PIPE, stderr=theirs)  # fmt: skip
            shown = os.read(ours, 65536).decode()
        finally:
            os.close(ours)
            os.close(theirs)
        assert re.search(r"\rimporting: \d+ % of 768\.0 MiB\x1b\[K", shown)
        assert shown.endswith("\r\x1b[K")
        assert done.stdout.startswith("sha256:")
        path.unlink()


def size_words(path: Path) -> list[str]:
    return f"{path.stat().st_size / 1024:.1f} KiB".split()
