"""Virtual machines with a kernel of Debian's, booted once to run tests of this checkout in them."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import mkosi

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PARTS = ("mountd", "protocol", "pyproject.toml", "tests", "units")
IMAGES = "mkosi"  # beside these: disk images that are built here, as it would take too long there

# Without KVM: about ten times slower than the host. The whole run, and a single step without a word.
SECONDS = 900.0
SILENT_SECONDS = 150.0
BUILD_SECONDS = "600"  # once for each package list
MEMORY = "2048"
TAIL = 4000


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a test went in the machine: what pytest calls it, and what it says about it."""

    outcome: str
    text: str


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine boots: the directory of kernel and initrd, its disk, and its first program there."""

    kernel: Path
    disk: Path
    init: str


@dataclass(frozen=True, slots=True)
class Run:
    """All tests of one boot, by id; `exit` is pytest's exit status, None if it did not come to that."""

    outcomes: dict[str, Outcome]
    exit: int | None
    problem: str | None
    console: str


def debian_13() -> Machine:
    """Return the machine for all but the newest systemd, which is built if it is missing or out of date."""
    built = Path(output_of("timeout", BUILD_SECONDS, HERE / "build_machine"))
    return Machine(built, built / "root.img", "/checkout/tests/vm/inside/init")


def newest() -> Machine:
    """Return the machine with the newest systemd, which has the same kernel."""
    kernel = debian_13().kernel
    disk = output_of("timeout", BUILD_SECONDS, HERE / "newest/build_machine", kernel)
    return Machine(kernel, Path(disk), "/checkout/tests/vm/newest/init")


def output_of(*command: str | Path) -> str:
    """Return what a command says. Raises CalledProcessError."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def found(suites: Sequence[str]) -> list[str]:
    """Return the ids of the tests, as pytest has them on both sides."""
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", *suites]
    done = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def run(what: Machine, arguments: Sequence[str], seconds: float = SECONDS) -> Run:
    """Boot a machine, have it run pytest with `arguments`, and return what it told, however it ended."""
    with tempfile.TemporaryDirectory(prefix="mountd-vm-", dir="/var/tmp") as name:
        place = Path(name)
        pack(place / "checkout.tar", mkosi.build())
        results, console = place / "results", place / "console"
        # The machine must not outlive the tests, however they end.
        with subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command(what, place, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ) as machine:
            try:
                problem = watch(machine, (results, console), seconds)
            finally:
                machine.kill()
        return understand(
            results.read_text("utf-8", "replace"), problem, console.read_text("utf-8", "replace")
        )


def pack(archive: Path, images: Path) -> None:
    """Write the checkout as an archive, which the machine gets as a disk, with what mkosi has made."""

    def clean(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if member.name.endswith("__pycache__") else member

    with tarfile.open(archive, "w") as tar:
        for part in PARTS:
            tar.add(ROOT / part, part, filter=clean)
        for name in mkosi.SIGNED:
            tar.add(images / name, f"{IMAGES}/{name}")


def command(what: Machine, place: Path, arguments: Sequence[str]) -> list[str]:
    """Return the command that is the machine."""
    # The first disk is shared between runs: what is written to it is forgotten.
    disks = (f"{what.disk},snapshot=on", f"{place}/checkout.tar,read-only=on")
    # To turn itself off on a panic is to end qemu.
    # On a busy machine the kernel's look at the emulated timer fails, and it would stop there.
    # nsresourced (test_systemd_clients.py) guards its namespaces with a security module in BPF.
    quiet = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check lsm=landlock,bpf"
    return [
        *("qemu-system-x86_64", "-accel", "tcg", "-machine", "pc", "-cpu", "max", "-m", MEMORY, "-smp", "1"),
        *("-nodefaults", "-display", "none", "-no-reboot", "-device", "virtio-rng-pci"),
        *("-kernel", f"{what.kernel}/vmlinuz", "-initrd", f"{what.kernel}/initrd.img"),
        *("-append", f"{quiet} -- {' '.join((what.init, *arguments))}"),
        *("-serial", f"file:{place}/console", "-serial", f"file:{place}/results"),
        *(word for disk in disks for word in ("-drive", f"if=virtio,format=raw,file={disk}")),
    ]


def watch(machine: subprocess.Popen[bytes], files: Sequence[Path], seconds: float) -> str | None:
    """Wait until the machine has turned itself off; return what is wrong if it does not or dies."""
    deadline = time.monotonic() + seconds
    heard, length = time.monotonic(), -1
    while machine.poll() is None:
        now = time.monotonic()
        total = sum(file.stat().st_size for file in files if file.exists())
        if total != length:
            heard, length = now, total
        if now > deadline:
            return f"the machine was still at work after {seconds:.0f} seconds"
        if now - heard > SILENT_SECONDS:
            return f"the machine said nothing for {SILENT_SECONDS:.0f} seconds"
        time.sleep(0.1)
    return f"qemu ended with status {machine.returncode}" if machine.returncode else None


def understand(results: str, problem: str | None, console: str) -> Run:
    """Turn what came over the serial line into outcomes; a later report never makes a failed test pass."""
    outcomes: dict[str, Outcome] = {}
    exit = None
    for line in results.splitlines():
        try:
            told = json.loads(line)
            name = told.get("test")
        except (ValueError, AttributeError):
            problem = problem or f"the machine told what is no report: {line[:200]!r}"
            continue
        if "exit" in told:
            exit = told["exit"]
        elif (before := outcomes.get(name)) is None or before.outcome in ("running", "passed"):
            text = f"{told.get('when')}: {told.get('text', '')}"
            outcomes[name] = Outcome(told["outcome"], text)
    if exit is None:
        problem = problem or "the machine turned itself off before the tests had ended"
    return Run(outcomes, exit, problem, console[-TAIL:])
