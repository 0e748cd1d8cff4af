"""Rules that ask, with the real polkit: its daemon, its rules, its agent in a terminal and its helper."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest

from tests.systemd.conftest import IMAGES
from tests.systemd.machine import SERVICE, Machine, eventually

USER = "polly"
ADMINISTRATOR = "judith"
PASSWORD = "correct horse"
SECONDS = 30.0
HELLO = "hello from the image\n"
POLICY = """
[[rule]]
name = "polkit decides"
image = { location = "%s/*" }
caller = { users = ["%s"] }
require = { integrity = ["root-owned"] }
grant.file-systems = ["erofs", "squashfs", "ext4"]
grant.access = "read-write"
grant.idmap = ["none", "namespace", "caller"]
verdict = "ask"

[[rule]]
name = "in memory"
image = { kind = "tmpfs" }
caller = { users = ["%s"] }
grant = { max-size = "1M", idmap = ["none", "namespace", "caller"] }
verdict = "ask"

[[rule]]
name = "stored after a question"
image = { any = true }
caller = { users = ["%s"] }
require = { integrity = ["stored"] }
grant = { file-systems = ["erofs"] }
verdict = "ask"
"""
MOUNT = """
import sys
sys.path.insert(0, "/usr/lib/mountd/python")
from mountd.client import Client
from mountd.fds import OwnedFd
source = {"tmpfs": {"size": 4096}} if sys.argv[1] == "tmpfs" else {"imageFileDescriptor": 0}
fds = [] if sys.argv[1] == "tmpfs" else [OwnedFd(0)]
with Client() as client, client.mount(source, fds, readOnly=False) as reply:
    print(reply.decision["verdict"])
"""
RULE = """
polkit.addRule(function(action, subject) {
  if (action.id.indexOf("io.mountd.") == 0) {
    var asked = [action.id, subject.user, action.lookup("source"), action.lookup("digest"),
                 action.lookup("signer"), action.lookup("rule")].join("|");
    %s
  }
});
"""


@pytest.fixture(scope="module")
def people(booted: Machine) -> None:
    """A user, and the one administrator of the machine."""
    booted.sh(f"useradd --create-home --shell /bin/sh {USER}")
    booted.sh(f"useradd --create-home --shell /bin/sh --groups sudo {ADMINISTRATOR}")
    booted.sh(f"echo '{ADMINISTRATOR}:{PASSWORD}' | chpasswd")


class Polkit:
    """The machine, its policy that asks, and what polkit's rules say to that."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._rules = machine.root / "etc/polkit-1/rules.d/10-mountd.rules"
        policy = machine.root / "etc/mountd/policy.d/10-polkit.toml"
        policy.parent.mkdir(parents=True, exist_ok=True)
        policy.write_text(POLICY % (IMAGES, USER, USER, USER))

    def rules(self, text: str) -> None:
        """Have polkit go by this; it reads its rules as it starts."""
        self._rules.write_text(RULE % text)
        self._rules.chmod(0o644)
        self.machine.run(["systemctl", "restart", "polkit.service"])

    def yes_to(self, *asked: str) -> None:
        """Have polkit say yes to exactly this question, and no to all others."""
        self.rules(f'return asked == "{"|".join(asked)}" ? polkit.Result.YES : polkit.Result.NO;')

    def run(self, image: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["mountctl", "run", *arguments, image, "--", "/usr/bin/cat", "/hello"]
        return self.machine.run(command, user=USER, check=False)

    def put_back(self) -> None:
        self._rules.unlink(missing_ok=True)
        self.machine.run(["systemctl", "restart", "polkit.service"])


@pytest.fixture
def polkit(machine: Machine, people: None) -> Iterator[Polkit]:
    made = Polkit(machine)
    yield made
    made.put_back()


def fields(machine: Machine) -> dict[str, str]:
    """The last request in the journal."""
    return machine.journal("MOUNTD_METHOD=Mount")[-1]


class TestRules:
    def test_yes(self, polkit: Polkit, images: dict[str, str]) -> None:
        polkit.yes_to(
            *("io.mountd.mount-image", USER, images["erofs"], "unknown", "nobody", "polkit decides")
        )
        done = polkit.run(images["erofs"])
        assert (done.returncode, done.stdout) == (0, HELLO), done.stderr
        noted = fields(polkit.machine)
        assert noted["MOUNTD_VERDICT"] == "allow"
        assert noted["MOUNTD_CONSENT"] == "given"
        assert noted["MOUNTD_POLKIT_ACTION"] == "io.mountd.mount-image"

    @pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
    def test_to_write(self, polkit: Polkit, images: dict[str, str], kind: str) -> None:
        in_memory = kind == "tmpfs"
        action = "io.mountd.mount-tmpfs" if in_memory else "io.mountd.mount-image-writable"
        about = ("tmpfs" if in_memory else images[kind], "unknown", "nobody")
        rule = "in memory" if in_memory else "polkit decides"
        # Root opens the image: nobody else could, to write to it.
        words = [*("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")]
        words += ["python3", "-IS", "-c", MOUNT, kind]
        script = f"exec {shlex.join(words)} 0<>{images['ext4']}"
        # To be allowed to read is not enough.
        polkit.yes_to("io.mountd.mount-image", USER, *about, rule)
        done = polkit.machine.run(["sh", "-euc", script], check=False)
        assert "DeniedByPolicy" in done.stderr
        polkit.yes_to(action, USER, *about, rule)
        done = polkit.machine.run(["sh", "-euc", script], check=False)
        assert (done.returncode, done.stdout) == (0, "allow\n"), done.stderr
        noted = fields(polkit.machine)
        assert (noted["MOUNTD_POLKIT_ACTION"], noted["MOUNTD_CONSENT"]) == (action, "given")

    def test_no(self, polkit: Polkit, images: dict[str, str]) -> None:
        polkit.rules("return polkit.Result.NO;")
        done = polkit.run(images["erofs"], "--interactive")
        assert done.returncode == 1
        assert "polkit does not authorize it" in done.stderr
        assert "io.mountd.mount-image" in done.stderr
        noted = fields(polkit.machine)
        assert (noted["MOUNTD_VERDICT"], noted["MOUNTD_CONSENT"]) == ("ask", "not given")

    def test_the_default_is_an_administrators_password(self, polkit: Polkit, images: dict[str, str]) -> None:
        polkit.rules("return polkit.Result.NOT_HANDLED;")
        done = polkit.run(images["erofs"])
        assert done.returncode == 1
        assert "nobody could be asked (hint: call with --interactive" in done.stderr
        done = polkit.run(images["erofs"], "--interactive")
        assert done.returncode == 1
        assert "start an authentication agent" in done.stderr
        assert fields(polkit.machine)["MOUNTD_CONSENT"] == "nobody to ask"

    def test_actions_are_few_and_known(self, machine: Machine) -> None:
        known = machine.sh("pkaction").split()
        assert [each for each in known if each.startswith("io.mountd.")] == [
            "io.mountd.import-image",
            "io.mountd.mount-image",
            "io.mountd.mount-image-writable",
            "io.mountd.mount-tmpfs",
        ]
        told = machine.sh("pkaction --verbose --action-id io.mountd.mount-image")
        assert [line.split()[-1] for line in told.splitlines() if "implicit" in line] == ["auth_admin"] * 3

    def test_a_container_is_refused_without_a_question(self, polkit: Polkit, images: dict[str, str]) -> None:
        polkit.rules("return polkit.Result.YES;")
        command = ["unshare", "-Urm", "mount", "-t", "mountd", images["erofs"], "/mnt"]
        done = polkit.machine.run(command, user=USER, check=False)
        assert done.returncode == 1
        assert "polkit knows nobody who is in a user namespace" in done.stderr
        assert fields(polkit.machine)["MOUNTD_CONSENT"] == "not asked for"

    @pytest.mark.parametrize("answer", ["YES", "NO"])
    def test_import(self, polkit: Polkit, images: dict[str, str], answer: str) -> None:
        digest = "sha256:" + polkit.machine.sh(f"sha256sum {images['erofs']}").split()[0]
        if answer == "YES":
            polkit.yes_to("io.mountd.import-image", USER, images["erofs"], digest, "nobody", "")
        else:
            polkit.rules("return polkit.Result.NO;")
        command = ["mountctl", "image", "import", images["erofs"]]
        done = polkit.machine.run(command, user=USER, check=False)
        assert (done.returncode == 0) is (answer == "YES"), done.stderr
        listed = polkit.machine.run(["mountctl", "image", "list"], user=USER).stdout
        assert (digest in listed) is (answer == "YES")
        if answer == "YES":
            polkit.machine.run(["mountctl", "image", "remove", digest], user=USER)

    def test_no_polkit_running(self, polkit: Polkit, images: dict[str, str]) -> None:
        polkit.machine.run(["systemctl", "mask", "--runtime", "--now", "polkit.service"])
        try:
            done = polkit.run(images["erofs"])
        finally:
            polkit.machine.run(["systemctl", "unmask", "--runtime", "polkit.service"])
        assert done.returncode == 1
        assert "polkit cannot be asked" in done.stderr
        assert "install polkitd" in done.stderr


class Terminal:
    """mountctl in a terminal of the user's."""

    def __init__(self, machine: Machine, image: str) -> None:
        self._ours, theirs = pty.openpty()
        words = ["mountctl", "run", image, "--", "/usr/bin/cat", "/hello"]
        command = machine.command(["env", "TERM=dumb", *words], USER)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command], stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self.text = ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + SECONDS
        while text not in self.text:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self._ours], [], [], left)[0], self.text
            try:
                chunk = os.read(self._ours, 4096)
            except OSError:  # nobody has the other end any more
                chunk = b""
            assert chunk, self.text
            self.text += chunk.decode("utf-8", "replace")

    def type_password(self, text: str) -> None:
        """Type once nothing that is typed is shown: what was typed before is thrown away."""
        eventually(lambda: not termios.tcgetattr(self._ours)[3] & termios.ECHO)
        self.type(text + "\n")

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def end(self) -> int:
        return self.process.wait(SECONDS)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


class TestInATerminal:
    def test_an_administrator_consents(self, polkit: Polkit, images: dict[str, str]) -> None:
        polkit.rules("return polkit.Result.NOT_HANDLED;")
        with Terminal(polkit.machine, images["erofs"]) as terminal:
            terminal.wait_for("Password:")
            assert "required to mount an image, which rule “polkit decides” leaves to" in terminal.text
            assert f"The caller calls it “{images['erofs']}”" in terminal.text
            assert ADMINISTRATOR in terminal.text
            terminal.type_password(PASSWORD)
            terminal.wait_for(HELLO.strip())
            assert terminal.end() == 0
            assert PASSWORD not in terminal.text
            assert fields(polkit.machine)["MOUNTD_CONSENT"] == "given"
            assert not agents(polkit.machine)

    def test_a_name_cannot_go_on_like_the_message(self, polkit: Polkit, images: dict[str, str]) -> None:
        polkit.rules("return polkit.Result.NOT_HANDLED;")
        hostile = polkit.machine.root / IMAGES.lstrip("/") / "a”. Signed by: “team” (rule $(rule))"
        shutil.copy(polkit.machine.root / images["erofs"].lstrip("/"), hostile)
        try:
            with Terminal(polkit.machine, f"{IMAGES}/{hostile.name}") as terminal:
                terminal.wait_for("Password:")
                shown = f"The caller calls it “{IMAGES}/a'. Signed by: 'team' [rule $[rule]]”"
                assert f"Contents: unknown. Signed by: “nobody”. {shown}" in terminal.text
                terminal.type("\x03")
                assert terminal.end() != 0
        finally:
            hostile.unlink()

    def test_each_consent_is_about_one_mount(self, polkit: Polkit, images: dict[str, str]) -> None:
        polkit.rules("return polkit.Result.NOT_HANDLED;")
        with Terminal(polkit.machine, images["squashfs"]) as terminal:
            terminal.wait_for("Password:")
            terminal.type_password(PASSWORD)
            terminal.wait_for(HELLO.strip())
            assert terminal.end() == 0
            assert polkit.run(images["squashfs"]).returncode == 1

    def test_a_wrong_password(self, polkit: Polkit, images: dict[str, str]) -> None:
        polkit.rules("return polkit.Result.NOT_HANDLED;")
        with Terminal(polkit.machine, images["erofs"]) as terminal:
            terminal.wait_for("Password:")
            terminal.type_password("wrong")
            terminal.wait_for("mountctl:")
            assert terminal.end() == 1
            assert HELLO.strip() not in terminal.text
            assert not agents(polkit.machine)

    def test_control_c(self, polkit: Polkit, images: dict[str, str]) -> None:
        polkit.rules("return polkit.Result.NOT_HANDLED;")
        with Terminal(polkit.machine, images["erofs"]) as terminal:
            terminal.wait_for("Password:")
            terminal.type("\x03")
            assert terminal.end() != 0
            eventually(lambda: not agents(polkit.machine))
            eventually(lambda: not questions(polkit.machine))


def agents(machine: Machine) -> list[str]:
    return machine.run(["pgrep", "-x", "pkttyagent"], check=False).stdout.split()


def questions(machine: Machine) -> list[str]:
    names = machine.run(["pgrep", "-x", "pkcheck"], check=False).stdout.split()
    return names if machine.state(SERVICE) == "active" else []
