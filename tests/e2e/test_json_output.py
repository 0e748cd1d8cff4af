"""What --json prints is what protocol/json says: for each verb its real output, and an error."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from varlink import scanner

from mountd.fds import OwnedFd
from mountd.wire.dispatch import interface_directory
from tests.container import USER, in_container
from tests.daemon import ROOT, Daemon
from tests.e2e.conftest import trusting
from tests.e2e.schema import DIRECTORY, NAMES, load, problems
from tests.programs import Done, as_user, run

# Which reply a verb passes on as it is.
REPLIES = {
    "explain": "Mount.Explain",
    "image-gc": "Images.CollectGarbage",
    "image-inspect": "Images.Inspect",
    "image-remove": "Images.Remove",
    "metrics": "Admin.Metrics",
    "policy-reload": "Admin.Reload",
    "revoke": "Admin.Revoke",
    "status": "Admin.Status",
}
# As units/program writes it.
MOUNTCTL = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from mountd.cli.mountctl import main; main()"
# Whose output only a registry or an error can bring about is looked at elsewhere.
ELSEWHERE = {"image-pull"}


@pytest.fixture(scope="module")
def outputs(
    place: Path, installed: Path, images: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, list[Any]]]:
    """What every verb has printed, by the name of its schema."""
    directory = place / "json output"
    directory.mkdir(mode=0o755)
    target = directory / "target"
    target.mkdir()
    own = directory / "own"
    own.mkdir()
    os.chown(own, USER, USER)
    policy = trusting(images["erofs"].parent, attach=f'["{own}"]')
    daemon = Daemon(directory / "daemon", policy)
    found: dict[str, list[Any]] = {}

    def take(name: str, done: Done, statuses: tuple[int, ...] = (0,)) -> Any:
        assert done.returncode in statuses, done
        printed = json.loads(done.stdout)
        found.setdefault(name, []).append(printed)
        return printed

    def call(*arguments: object) -> Done:
        return run([installed / "bin/mountctl", *arguments, "--json"], daemon.socket)

    def call_as_user(*arguments: object) -> Done:
        return as_user([installed / "bin/mountctl", *arguments, "--json"], daemon.socket)

    def with_packages(*arguments: object) -> Done:
        """By the Python of the tests, which has what reads policies; the system's may have not."""
        return run([sys.executable, "-IS", "-c", MOUNTCTL, *arguments, "--json"], daemon.socket)

    try:
        take("explain", call("explain", images["erofs"]))
        take("explain", call("explain", shutil.copy(images["erofs"], directory / "copy.raw")), (1,))
        take("error", call("explain", "/bin/sh"), (32,))
        take("explain", call("explain", "tmpfs:1M"), (0, 1))
        image = take("image-import", call("image", "import", "--name", "x", images["erofs"]))["image"]
        for verb in ("list", "inspect", "verify", "gc", "remove"):
            rest = [image["digest"]] if verb in ("inspect", "verify", "remove") else []
            take(f"image-{verb}", call("image", verb, *rest))
        take("image-list", call("image", "list"))
        take("error", call("image", "inspect", image["digest"]), (1,))
        take("error", call("bogus"), (1,))
        take("error", call_as_user("status"), (1,))
        take("error", run([installed / "bin/mountctl", "status", "--json"], directory / "nobody"), (2,))
        take("status", call("status"))
        take("metrics", call("metrics"))
        take("policy-reload", call("policy", "reload"))
        daemon.set_policy("x = 1\n")
        take("policy-reload", call("policy", "reload"), (1,))
        take("status", call("status"))
        take("metrics", call("metrics"))
        take("policy-check", with_packages("policy", "check", daemon.policy_dir), (1,))
        take("error", with_packages("policy", "show", daemon.policy_dir), (1,))
        daemon.set_policy(policy)
        take("policy-check", with_packages("policy", "check", daemon.policy_dir))
        take("policy-show", with_packages("policy", "show", daemon.policy_dir))
        take("doctor", with_packages("doctor"), (0, 1, 2))
        take("doctor", call_as_user("doctor"), (0, 1, 2))
        fake = as_user(
            [installed / "sbin/mount.mountd", "-f", "--json", images["erofs"], own], daemon.socket
        )
        take("mount-fake", fake)
        found["mount"] = [mounted_in_a_container(installed, daemon, images["erofs"], target)]
        take("mount", call_as_user("mount", images["erofs"], own))
        take("list", call_as_user("list"))
        take("umount", call_as_user("umount", own))
        id = take("mount", call_as_user("mount", images["erofs"], own))["id"]
        with OwnedFd(os.open(own / "hello", os.O_RDONLY)):
            take("revoke", call("revoke", id), (1,))
        take("list", call("list", "--all"))
        yield found
    finally:
        daemon.stop()


def mounted_in_a_container(installed: Path, daemon: Daemon, image: Path, target: Path) -> Any:
    from tests.container import mapper

    with mapper():
        program = [installed / "bin/mountctl", "mount", "--json", image, target]
        done = in_container(lambda: run(program, daemon.socket))
    assert done.returncode == 0, done
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", sorted(set(NAMES) - ELSEWHERE))
def test_the_output_is_as_declared(outputs: dict[str, list[Any]], name: str) -> None:
    assert outputs[name]
    for printed in outputs[name]:
        assert problems(printed, name) == []


@pytest.mark.parametrize("name", sorted(set(NAMES) - ELSEWHERE))
def test_another_output_would_be_noticed(outputs: dict[str, list[Any]], name: str) -> None:
    """The test of the test: each field that has to be there, taken away; and one that nobody knows."""
    printed = outputs[name][0]
    if isinstance(printed, dict):
        assert problems({**printed, "unknownField": 1}, name)
        for key in load(name).get("required", ()):
            changed = copy.deepcopy(printed)
            del changed[key]
            assert problems(changed, name) == [f"$: {key} is missing"]
    assert problems("text", name)
    assert problems([{}] if isinstance(printed, list) else [], name)


@pytest.mark.parametrize(("name", "method"), sorted(REPLIES.items()))
def test_the_schema_says_what_the_interface_says(name: str, method: str) -> None:
    interface_name, _, member = method.partition(".")
    text = (interface_directory() / f"io.mountd.{interface_name}.varlink").read_text()
    interface = scanner.Interface(text)
    schema = load(name)
    compare(interface, interface.members[member].out_type, schema, schema)


@pytest.mark.parametrize("name", ["image-import", "image-list", "image-pull", "image-verify"])
def test_an_image_is_what_the_interface_says(name: str) -> None:
    """Also of what only a registry can bring about."""
    interface = scanner.Interface((interface_directory() / "io.mountd.Images.varlink").read_text())
    schema = load(name)
    compare(interface, interface.members["Image"].type, schema["$defs"]["Image"], schema)
    assert {"$ref": "#/$defs/Image"} in (
        *schema["properties"].values(),
        schema["properties"].get("images", {}).get("items"),
    )


def test_a_live_mount_is_what_the_interface_says() -> None:
    """What is printed is all of them, however many replies it takes."""
    interface = scanner.Interface((interface_directory() / "io.mountd.Mount.varlink").read_text())
    schema = load("list")
    compare(interface, interface.members["LiveMount"].type, schema["$defs"]["LiveMount"], schema)
    assert schema["properties"]["mounts"]["items"] == {"$ref": "#/$defs/LiveMount"}
    assert schema["required"] == list(schema["properties"]) == ["mounts"]


def compare(interface: Any, declared: Any, schema: dict[str, Any], whole: dict[str, Any]) -> None:
    if isinstance(declared, scanner._CustomType):
        compare(interface, interface.members[declared.name].type, whole["$defs"][declared.name], whole)
    elif isinstance(declared, scanner._Struct):
        fields = declared.fields
        assert schema["type"] == "object"
        assert set(schema["properties"]) == set(fields)
        optional = {key for key, each in fields.items() if isinstance(each, scanner._Maybe)}
        assert set(schema["required"]) == set(fields) - optional
        for key, each in fields.items():
            inner = each.element_type if isinstance(each, scanner._Maybe) else each
            compare(interface, inner, schema["properties"][key], whole)
    elif isinstance(declared, scanner._Array):
        assert schema["type"] == "array"
        compare(interface, declared.element_type, schema["items"], whole)
    elif isinstance(declared, scanner._Enum):
        assert set(schema["enum"]) == set(declared.fields)
    elif not isinstance(declared, scanner._Dict | scanner._Object):
        kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
        assert schema["type"] == kinds[type(declared)]


def test_every_verb_has_a_schema() -> None:
    from mountd.cli import image

    verbs = {f"image-{verb}" for verb in image.VERBS} | {"mount", "umount", "list", "revoke", "explain"}
    verbs |= {"status", "metrics", "doctor", "policy-check", "policy-show", "policy-reload"}
    # What is no verb's: an error, and what mount.mountd says with -f.
    assert verbs | {"error", "mount-fake"} == set(NAMES)


def test_the_schemas_are_installed(installed: Path) -> None:
    there = sorted(path.name for path in (installed / "lib/mountd/json").iterdir())
    assert there == sorted(path.name for path in DIRECTORY.iterdir())


def test_json_is_one_line(start: Callable[..., Daemon], installed: Path) -> None:
    daemon = start("")
    done = run([installed / "bin/mountctl", "status", "--json"], daemon.socket)
    assert done.stdout.count("\n") == 1
