"""The lean side starts in milliseconds: what it may not import, as a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {
    "argparse", "asyncio", "cryptography", "dataclasses", "inspect", "logging", "multiprocessing",
    "pydantic", "pyroute2", "ssl", "subprocess", "systemd", "tempfile", "threading", "tomllib", "typing",
    "urllib", "varlink",
}  # fmt: skip


# What mount(8) calls, and mountctl, whose command line is read by argparse when there is one to be read.
CLIENTS = [
    "mountd.client",
    "mountd.cli.report",
    "mountd.cli.helper",
    "mountd.cli.mount_helper",
    "mountd.cli.umount_helper",
    "mountd.cli.mountctl",
]
# What a mount waits for, of the standard library, besides what the interpreter has loaded by then: nothing
# that is made of enumerations or regular expressions, each of which takes as long as all of this.
LEANEST = {
    *(
        "__future__",
        "errno",
        "os",
        "os.path",
        "stat",
        "_stat",
        "posixpath",
        "genericpath",
        "_collections_abc",
    ),
    *("_json", "_socket", "select", "struct", "_struct"),
}
# For whoever attaches the mount, or finds out what is mounted: system calls.
CALLS = {"ctypes", "ctypes._endian", "_ctypes", "types"}
MAXIMUM_OWN = 20  # modules of mountd
LEAN_ROOMS = (
    *("errors", "fds", "version", "kernel", "wire", "wire.framing", "wire.rebuilding"),
    *("request", "asking", "client", "cli"),
)


def lean_modules() -> list[str]:
    """Everything that a helper called by mount(8) may load."""
    kernel = sorted(path.stem for path in (ROOT / "mountd/kernel").glob("*.py") if path.stem != "__init__")
    return [
        "mountd.fds",
        "mountd.errors",
        "mountd.wire.framing",
        *(f"mountd.kernel.{name}" for name in kernel),
        *CLIENTS,
        "mountd.cli.container",
        "mountd.cli.policy",
        "mountd.cli.image",
        "mountd.cli.admin",
        "mountd.cli.doctor",
    ]


def loaded_by(program: str) -> set[str]:
    """The modules that are loaded after `program`, on top of what an empty one has."""
    # -S as well as -I: what site loads for an editable installation is not the module's doing.
    text = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", text], capture_output=True, text=True, check=True
    )
    return set(run.stdout.splitlines()[-1].split())


def foreign(modules: set[str]) -> set[str]:
    """Those of `modules` that are neither the standard library's nor on the lean side of mountd."""
    lean = {"mountd", *(f"mountd.{room}" for room in LEAN_ROOMS)}
    kernel = ("mountd.kernel.", "mountd.cli.")
    return {
        name
        for name in modules
        if name.split(".")[0] not in {*sys.stdlib_module_names, "__main__"}
        and name not in lean
        and not name.startswith(kernel)
    }


@pytest.mark.parametrize("module", lean_modules())
def test_lean_module_loads_nothing_heavy(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert module in loaded
    assert not loaded & HEAVY
    assert not foreign(loaded)


@pytest.mark.parametrize(
    ("program", "standard"),
    [
        ("import mountd.asking", LEANEST),
        ("import mountd.cli.mount_helper", LEANEST),
        ("import mountd.cli.mount_helper, mountd.kernel.moving", LEANEST | CALLS),
        ("import mountd.cli.umount_helper, mountd.kernel.abi", LEANEST | CALLS),
        # How a refusal is told is part of it; only JSON for programs, and asking in a terminal, are not.
        (
            "import mountd.cli.mount_helper, mountd.wire.rebuilding; from mountd.cli.helper import failed;"
            "failed('p', mountd.wire.rebuilding.rebuild('io.mountd.Mount.NotFound', {'what': 'x'}))",
            LEANEST,
        ),
    ],
)
def test_a_mount_loads_nothing_that_it_does_not_need(program: str, standard: set[str]) -> None:
    loaded = loaded_by(program) - loaded_by("pass")
    own = {name for name in loaded if name.split(".")[0] == "mountd"}
    assert not loaded - own - standard
    assert len(own) <= MAXIMUM_OWN


def test_who_uses_the_client_has_everything_loaded() -> None:
    """It may be in another root directory, or be another user, when it asks for a mount and attaches it."""
    needed = {"mountd.kernel.attaching", "mountd.kernel.moving", "mountd.wire.rebuilding"}
    assert needed <= loaded_by("import mountd.client")


def test_nothing_is_loaded_in_another_mount_namespace() -> None:
    """A module that was looked for there would be whoever's that namespace is."""
    program = """
from mountd.cli import attaching, helper, mount_helper, umount_helper
from mountd.asking import MountReply, attach_reply, open_target
from mountd.fds import OwnedFd
import os

def attempt(work):
    try:
        work()
    except Exception as error:
        str(error), error.args  # as it is told

def reply(*places):
    fds = [OwnedFd(os.open("/", os.O_PATH)) for _ in places]
    return MountReply(fds[0], [{"mountPoint": place} for place in places], {}, fds[1:])

with helper.Place("/proc/self/ns/mnt") as place, reply("") as one, reply("usr", "efi") as parts:
    with place.inside():
        before = set(sys.modules)
        for path in ("/", "/proc", "/proc/version", "/nonexistent"):
            attempt(lambda: open_target(path).close())
            attempt(lambda: attaching.mount_at(path))
        attempt(lambda: attach_reply(one, -1, "dir"))
        with OwnedFd(os.open("/proc/self/fdinfo", os.O_PATH)) as nowhere:
            attempt(lambda: attach_reply(parts, nowhere.fileno(), "dir"))
        attempt(lambda: umount_helper.moving.unmount("/nonexistent", 2))
        attempt(lambda: umount_helper.busy("dir"))
        late = set(sys.modules) - before
print("late:", *late)
"""
    text = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", text], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("late:\n", "")


def test_mountctl_reads_its_command_line_with_argparse_and_nothing_else() -> None:
    program = 'from mountd.cli import mountctl; mountctl.parse(["run", "-o", "noexec", "image", "ls"])'
    loaded = loaded_by(program)
    assert loaded & HEAVY == {"argparse"}
    assert not foreign(loaded)
