"""mountctl doctor: what it says is true, for root and for users, with and without a daemon."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mountd.cli import doctor_policy, doctor_system
from mountd.cli.checks import FAIL, OK, WARN, not_roots
from mountd.daemon.around import LIMITS
from mountd.kernel import device_mapper, features, libc
from mountd.trust.directories import POLICY_DIRS
from tests.container import as_user as forked_as
from tests.container import in_container
from tests.daemon import ROOT, Daemon
from tests.e2e.admin import ask
from tests.e2e.conftest import trusting
from tests.programs import Done, as_user, run

MOUNTCTL = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from mountd.cli.mountctl import main; main()"
USER = 4730


def report(done: Done) -> dict[tuple[str, str], dict[str, Any]]:
    """The findings of a run by area and name; nothing else was printed, and the exit status fits."""
    assert done.stderr == ""
    told = json.loads(done.stdout)
    states = {each["state"] for each in told["checks"]}
    worst = next(each for each in (FAIL, WARN, OK) if each in states)
    assert told["state"] == worst
    assert done.returncode == {OK: 0, WARN: 1, FAIL: 2}[worst]
    for each in told["checks"]:
        assert each["text"]
        assert (each["fix"] is None) == (each["state"] == OK), each
    return {(each["area"], each["name"]): each for each in told["checks"]}


def by_root(daemon: Daemon) -> dict[tuple[str, str], dict[str, Any]]:
    """With the Python of the tests, which has what reads policies."""
    return report(run([sys.executable, "-IS", "-c", MOUNTCTL, "doctor", "--json"], daemon.socket))


class TestRoot:
    """Who can see all."""

    def test_a_daemon_that_is_well(self, start: Callable[..., Daemon], images: dict[str, Path]) -> None:
        found = by_root(start(trusting(images["erofs"].parent)))
        assert found["daemon", "socket"]["state"] == OK
        assert found["daemon", "policy in force"]["text"].startswith("1 rules, 0 keys")
        assert found["daemon", "workers"]["state"] == found["daemon", "store"]["state"] == OK
        assert {name for area, name in found if area == "kernel"} == set(features.NAMES)
        assert {area for area, _ in found} == {
            "kernel", "units", "daemon", "permissions", "policy", "programs", "polkit",
        }  # fmt: skip

    def test_a_policy_with_faults(self, start: Callable[..., Daemon]) -> None:
        daemon = start("")
        daemon.set_policy("x = 1\n")
        ask(daemon, "Reload")
        finding = by_root(daemon)["daemon", "policy in force"]
        assert finding["state"] == FAIL
        assert "the policy from before them is in force" in finding["text"]

    def test_a_policy_that_is_broken(self, start: Callable[..., Daemon]) -> None:
        finding = by_root(start("x = 1\n"))["daemon", "policy in force"]
        assert (finding["state"], finding["fix"]) == (FAIL, "mountctl policy check")

    def test_no_daemon_at_all(self, installed: Path, place: Path) -> None:
        found = report(run([installed / "bin/mountctl", "doctor", "--json"], place / "nobody"))
        assert found["daemon", "socket"]["state"] == FAIL
        assert "No such file" in found["daemon", "socket"]["text"]
        assert ("daemon", "status") not in found

    def test_a_daemon_that_does_not_answer(self, installed: Path, place: Path) -> None:
        import socket

        path = place / "silent"
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(path))
            silent.listen()
            found = report(run([installed / "bin/mountctl", "doctor", "--json"], path, timeout=60))
        path.unlink()
        assert found["daemon", "socket"]["state"] == FAIL
        assert "in time" in found["daemon", "socket"]["text"]


class TestUser:
    """Who cannot see all, and is told so; by the installed copy, whose modules everybody can read."""

    def test_what_is_not_seen_is_a_warning(self, daemon: Daemon, installed: Path) -> None:
        found = report(as_user([installed / "bin/mountctl", "doctor", "--json"], daemon.socket, user=USER))
        assert found["daemon", "socket"]["state"] == OK
        status = found["daemon", "status"]
        assert (status["state"], status["fix"]) == (WARN, "ask again as root")
        assert "only the host's root" in status["text"]
        for name in ("fsopen", "mount_setattr", "statmount", "listmount", "user-namespaces"):
            assert found["kernel", name]["state"] == OK, found["kernel", name]
        erofs = found["kernel", "erofs-on-files"]
        assert (erofs["state"], erofs["fix"]) == (WARN, "ask again as root")

    def test_for_people(self, daemon: Daemon, installed: Path) -> None:
        done = as_user([installed / "bin/mountctl", "doctor"], daemon.socket, user=USER)
        assert "Traceback" not in done.stdout + done.stderr
        assert done.stderr == ""
        for line in done.stdout.splitlines():
            assert line.split(" ", 1)[0] in (OK, WARN, FAIL)
            assert line.startswith("ok") or "(fix: " in line, line
        assert "\x1b" not in done.stdout

    def test_from_a_directory_that_is_not_readable(self, installed: Path, place: Path) -> None:
        closed = place / "closed"
        closed.mkdir(mode=0o700)
        done = as_user(
            [installed / "bin/mountctl", "doctor", "--json"], place / "nobody", cwd=None, user=USER,
            preexec_fn=None,
        )  # fmt: skip
        assert report(done)["daemon", "socket"]["state"] == FAIL
        closed.rmdir()

    def test_in_a_container(self, daemon: Daemon, installed: Path, containers: None) -> None:
        program = [installed / "bin/mountctl", "doctor", "--json"]
        found = report(in_container(lambda: run(program, daemon.socket)))
        assert found["kernel", "fsopen"]["state"] == OK
        assert found["daemon", "status"]["state"] == WARN


class TestKernel:
    """The checks of the kernel do what they say."""

    @pytest.fixture
    def inject(self) -> Iterator[dict[str, int]]:
        yield libc.inject
        libc.inject.clear()

    def test_what_this_machine_has(self) -> None:
        found = {each.name: each for each in features.probe()}
        assert tuple(found) == features.NAMES
        # The other tests make such mounts.
        for name in ("fsopen", "mount_setattr", "idmapped-mounts", "statmount", "listmount", "loop", "fuse"):
            assert found[name].state == features.YES, found[name].detail
        has_mapper = os.path.exists(device_mapper.CONTROL)
        assert has_mapper or found["dm-verity"].state == features.NO

    @pytest.mark.parametrize(
        ("call", "name"),
        [
            ("fsopen", "fsopen"),
            ("mount_setattr", "mount_setattr"),
            ("mount_setattr", "idmapped-mounts"),
            ("statmount", "statmount"),
            ("listmount", "listmount"),
            ("open_tree_attr", "open_tree_attr"),
        ],
    )
    @pytest.mark.parametrize("user", [0, USER])
    def test_what_an_old_kernel_lacks(self, inject: dict[str, int], call: str, name: str, user: int) -> None:
        """The child is a fork, which has the injected failure as well."""
        import errno

        inject[call] = errno.ENOSYS
        found = forked_as(lambda: [(each.name, each.state) for each in features.probe()], user)
        # A user cannot come so far as to try it.
        expected = features.UNKNOWN if user and name == "idmapped-mounts" else features.NO
        assert dict(found)[name] == expected

    def test_what_is_refused_is_not_said_to_be_missing(self, inject: dict[str, int]) -> None:
        import errno

        inject["fsopen"] = errno.EPERM
        found = {each.name: each for each in features.probe()}
        assert found["fsopen"].state == found["erofs-on-files"].state == features.UNKNOWN

    def test_no_user_namespaces(self, inject: dict[str, int]) -> None:
        import errno

        inject["unshare"] = errno.ENOSPC
        found = {each.name: each for each in features.probe()}
        assert found["user-namespaces"].state == features.NO
        assert "max_user_namespaces" in found["user-namespaces"].detail

    def test_nothing_that_ends_in_the_middle_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def die(_: object) -> None:
            os._exit(3)

        monkeypatch.setitem(features.CHECKS, "listmount", die)
        found = {each.name: each for each in features.probe()}
        assert found["statmount"].state == features.YES
        for name in ("listmount", "fuse"):
            assert (found[name].state, bool(found[name].detail)) == (features.UNKNOWN, True)

    def test_the_smallest_erofs_is_one(self, tmp_path: Path) -> None:
        import subprocess

        path = tmp_path / "smallest"
        path.write_bytes(features.smallest_erofs())
        done = subprocess.run(["fsck.erofs", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_every_feature_has_its_advice(self) -> None:
        assert doctor_system.MISSING.keys() == set(features.NAMES)


class TestPermissions:
    """Who could change what."""

    def test_the_same_directories_as_the_daemon(self) -> None:
        assert tuple(map(str, POLICY_DIRS)) == doctor_policy.DIRECTORIES

    def test_not_roots(self, place: Path) -> None:
        directory = place / "owners"
        directory.mkdir(mode=0o755)
        file = directory / "file"
        file.write_text("")
        assert not_roots(str(file)) is None
        file.chmod(0o664)
        assert "can be written to" in str(not_roots(str(file)))
        file.chmod(0o644)
        os.chown(file, USER, 0)
        assert f"uid {USER}" in str(not_roots(str(file)))
        os.chown(file, 0, 0)
        directory.chmod(0o777)
        assert str(not_roots(str(file))).startswith(str(directory))
        directory.chmod(0o1777)
        assert not_roots(str(file)) is None, "in a sticky directory nobody else can replace it"
        (directory / "link").symlink_to(file)
        os.chown(file, USER, 0)
        assert f"uid {USER}" in str(not_roots(str(directory / "link")))
        with pytest.raises(FileNotFoundError):
            not_roots(str(directory / "nothing"))

    def test_the_store(self, place: Path) -> None:
        store = place / "a store"
        for mode, state in ((0o700, OK), (0o755, FAIL), (0o500, WARN)):
            store.mkdir(exist_ok=True)
            store.chmod(mode)
            assert doctor_system.check_place(str(store), "the store", 0o700).state == state
        os.chown(store, USER, 0)
        assert doctor_system.check_place(str(store), "the store", 0o700).state == FAIL
        assert doctor_system.check_place(str(place / "none"), "the store", 0o700).state == WARN

    def test_a_socket_that_not_everybody_can_reach(
        self, start: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        daemon = start("")
        monkeypatch.setenv("MOUNTD_SOCKET", str(daemon.socket))
        states = []
        for mode in (0o666, 0o600):
            daemon.socket.chmod(mode)
            states += [
                each.state
                for each in doctor_system.check_permissions(doctor_system.Places(None))
                if each.name == str(daemon.socket)
            ]
        assert states == [OK, WARN]


class TestPolicy:
    """Files and keys."""

    @staticmethod
    def states(directory: Path) -> dict[str, list[tuple[str, str]]]:
        found: dict[str, list[tuple[str, str]]] = {}
        for each in doctor_policy.check_policy((str(directory),)):
            found.setdefault(each.name, []).append((each.state, each.text))
        return found

    @pytest.fixture
    def directory(self, place: Path) -> Iterator[Path]:
        import shutil

        made = place / "doctor policy"
        made.mkdir(mode=0o755)
        yield made
        shutil.rmtree(made)

    def key(self, directory: Path, path: Path) -> None:
        (directory / "a.toml").write_text(
            f'[key.team]\nx509 = "{path}"\n[[rule]]\nname = "r"\nimage = {{ any = true }}\n'
            'caller = { host = true }\nrequire = { integrity = ["stored"], signature = "team" }\n'
            'grant = { file-systems = ["erofs"] }\nverdict = "allow"\n'
        )

    def test_certificates_and_their_ends(self, directory: Path) -> None:
        for days, state, text in (
            (1000, OK, "ends before"),
            (10, WARN, "ends soon"),
            (-1, FAIL, "has ended"),
        ):
            path = directory / "team.crt"
            path.write_bytes(certificate(days))
            self.key(directory, path)
            found = self.states(directory)
            assert found["key “team”"][0][0] == OK
            assert found["key “team”"][1][0] == state
            assert text in found["key “team”"][1][1]

    def test_a_key_that_others_can_write(self, directory: Path) -> None:
        path = directory / "team.crt"
        path.write_bytes(certificate(1000))
        path.chmod(0o666)
        self.key(directory, path)
        found = self.states(directory)
        assert any(state == FAIL for findings in found.values() for state, _ in findings)

    def test_faults(self, directory: Path) -> None:
        (directory / "a.toml").write_text("x = 1\n")
        found = self.states(directory)
        assert found[f"{directory}/a.toml:1"] == [(FAIL, "x: unknown key; remove it or correct it")]

    def test_no_rules(self, directory: Path) -> None:
        states = [state for findings in self.states(directory).values() for state, _ in findings]
        assert sorted(states) == sorted([OK, WARN])

    def test_what_a_user_may_not_read_is_a_warning(self, directory: Path) -> None:
        file = directory / "a.toml"
        file.write_text(trusting(directory))
        file.chmod(0o600)
        finding = {
            "level": "error",
            "file": str(file),
            "line": None,
            "key": "",
            "reason": "Permission denied",
        }
        assert forked_as(lambda: doctor_policy.problem(finding).state, USER) == WARN
        assert doctor_policy.problem(finding).state == FAIL


def certificate(days: int) -> bytes:
    """A certificate that ends in so many days."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "team")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=100))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def test_units_in_all_states() -> None:
    def state(unit: str, **properties: str) -> str:
        return doctor_system.unit_finding(unit, properties).state

    well = {"LoadState": "loaded", "ActiveState": "active", "UnitFileState": "enabled"}
    assert state("mountd.socket", **well) == OK
    assert state("mountd.socket", **{**well, "UnitFileState": "disabled"}) == WARN
    assert state("mountd.socket", **{**well, "ActiveState": "inactive"}) == FAIL
    assert state("mountd-pull.socket", **{**well, "ActiveState": "inactive"}) == WARN
    assert state("mountd.service", **{**well, "ActiveState": "inactive", "UnitFileState": "static"}) == OK
    assert state("mountd.service", **{**well, "ActiveState": "failed"}) == FAIL
    assert state("mountd.socket", LoadState="masked") == FAIL
    assert state("mountd.socket", LoadState="not-found") == FAIL
    assert state("mountd-pull.socket", LoadState="not-found") == WARN


def test_ends_of_gpg_keys() -> None:
    said = "pub:e:255:22:ABC:1600000000:1700000000::u:::sc::::::23::0:\nsub:e:1:1:D:1:2:\npub:u:1:1:E:1:::\n"
    assert list(doctor_policy.gpg_ends(said)) == [1700000000]


def test_limits_have_names_and_numbers() -> None:
    assert all(isinstance(each, int) and each > 0 for each in LIMITS.values())
