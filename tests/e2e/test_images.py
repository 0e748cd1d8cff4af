"""io.mountd.Images through the socket: who may import, see and remove what, and how progress is told."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.errors import DeniedByPolicy, InUse, InvalidParameter, NotFound
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
from tests.e2e.stored import IMAGES, MIB, as_uid, call, digest_of, empty, import_file, more, mount
from tests.process import in_child
from tests.programs import run


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
    with closing(sockets.connect(str(daemon.socket), 10)) as connection:
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
