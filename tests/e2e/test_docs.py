"""What the documents show is so: their policies can be used, and their commands do what they say.

An ordinary user's commands are run with an installed copy, by the system's own Python; the daemon, and
root's commands, with the packages that the tests have. Directories and policy are as a package makes them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.cli.mountctl import parse
from mountd.trust import policy_tool
from mountd.trust.policy_file import Loader
from tests.container import forked
from tests.daemon import ROOT
from tests.images import build_image
from tests.programs import build_root, etc_files

UID = 4001
PLACES = ("/var/lib/machines", "/run/mount", "/run/mountd", "/etc/mountd", "/home")
SECONDS = 60
SET_UP = r"""
prefix=$1 image=$2 passwd=$3 uid=$4 block=$5 python=$7
for place in /var/lib/machines /run/mount /run/mountd /etc/mountd /home; do
  mount -t tmpfs -o mode=0755 tmpfs "$place"
done
mount --bind "$passwd" /etc/passwd
mount -t overlay -o "lowerdir=$prefix/sbin:/usr/sbin" overlay /usr/sbin
mkdir -p /etc/mountd/policy.d /home/me
cp "$prefix"/lib/mountd/policy.d/*.toml /etc/mountd/policy.d/
cp "$image" /var/lib/machines/base.raw
chmod 0644 /var/lib/machines/base.raw
cp "$image" /home/me/mine.raw
cp "$image" /home/me/base.raw
chown -R "$uid:$uid" /home/me
export PATH=$prefix/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
"$python" -m mountd.daemon.main --state-dir /run/mountd/state --shared-seconds 0 > /run/mountd/log 2>&1 &
daemon=$!
until [ -S /run/mountd/io.mountd.Mount ]; do
  kill -0 $daemon || { cat /run/mountd/log >&2; exit 99; }
  sleep 0.05
done
status=0
if [ "$6" = user ]; then
  setpriv --reuid="$uid" --regid="$uid" --clear-groups \
    env -C /home/me HOME=/home/me sh -euc "$block" < /dev/null || status=$?
else
  mountctl="mountctl() { $python -m mountd.cli.mountctl \"\$@\"; }"
  env HOME=/root sh -euc "$mountctl
$block" < /dev/null || status=$?
fi
kill $daemon
wait $daemon || cat /run/mountd/log >&2
[ $status = 0 ] || cat /run/mountd/log >&2
exit $status
"""


def unformatted(block: str) -> str:
    """The text of an example in a page."""
    return re.sub(r"\\f[A-Z]", "", block).replace(r"\-", "-").replace(r"\e", "\\")


def examples(marker: str) -> Iterator[tuple[str, str, str]]:
    """The examples of the pages after a comment with `marker`: page, the comment's rest, text."""
    for page in sorted((ROOT / "units/man").iterdir()):
        pattern = rf'^\.\\" {marker}([^\n]*)\n\.EX\n(.*?)^\.EE$'
        for found in re.finditer(pattern, page.read_text(), re.MULTILINE | re.DOTALL):
            yield page.name, found[1].strip(": "), unformatted(found[2])


def readme_policies() -> Iterator[tuple[str, str]]:
    text = (ROOT / "README.md").read_text()
    for found in re.finditer(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield "README.md", found[1]


def readme_lines() -> list[str]:
    """The commands of the README that are about the installed programs."""
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line.partition(" #")[0].strip() for line in lines if line.startswith("    ")]
    return [each for each in commands if each.split()[0] in ("mountctl", "mount", "umount")]


POLICIES = [*readme_policies(), *((page, text) for page, _, text in examples("policy"))]
BLOCKS = list(examples("run"))
PLACEHOLDER = re.compile("…|\\b[A-Z]{3,}\\b")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory /etc/mountd with the key that the examples name."""
    place = tmp_path_factory.mktemp("etc")
    (place / "keys").mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        + ["-subj", "/CN=team", "-keyout", place / "team.key", "-out", place / "keys/team.crt"],
        capture_output=True,
        check=True,
    )
    return place


@pytest.fixture(scope="module")
def places() -> Iterator[None]:
    """Directories to mount at, which this machine need not have."""
    made = [Path(each) for each in PLACES if not Path(each).exists()]
    for each in made:
        each.mkdir()
    yield
    for each in made:
        each.rmdir()


@pytest.mark.parametrize(("where", "text"), POLICIES)
def test_policies(where: str, text: str, keys: Path, places: None, tmp_path: Path) -> None:
    (tmp_path / "example.toml").write_text(text)

    def load() -> list[str]:
        subprocess.run(["mount", "--bind", keys, "/etc/mountd"], check=True)
        loader = Loader(resolve_user=lambda _: 1000, resolve_group=lambda _: 1000)
        loaded = loader.load([tmp_path])
        assert loaded.policy.rules or loaded.problems
        return [str(each) for each in loaded.problems]

    enter = etc_files(tmp_path, {})

    def work() -> list[str]:
        enter()
        return load()

    assert forked(work) == []


def test_there_is_something_to_test() -> None:
    assert len(POLICIES) >= 6
    assert len(BLOCKS) >= 5
    assert len([line for line in readme_lines() if not PLACEHOLDER.search(line)]) >= 8
    # Each example of a page either says what it is, or is none for this machine: units, other programs.
    for page in sorted((ROOT / "units/man").iterdir()):
        every = re.finditer(r"^([^\n]*)\n\.EX\n(.*?)^\.EE$", page.read_text(), re.MULTILINE | re.DOTALL)
        for found in every:
            if not found[1].startswith('.\\" '):
                assert not re.search(r"^mountctl|^\[\[rule", found[2], re.MULTILINE), f"{page}: {found[2]}"


@pytest.fixture(scope="module")
def system(place: Path, installed: Path, places: None) -> tuple[Path, ...]:
    """What a block is run with: the installation, an image with a shell, and a table of users."""
    image = build_image("erofs", build_root(place / "docs-root"), place / "docs.raw")
    passwd = place / "docs-passwd"
    passwd.write_text(f"{Path('/etc/passwd').read_text()}me:x:{UID}:{UID}::/home/me:/bin/sh\n")
    return installed, image, passwd


def run_block(system: tuple[Path, ...], block: str, who: str) -> subprocess.CompletedProcess[str]:
    installed, image, passwd = system
    command = ["unshare", "--mount", "--propagation", "private", "bash", "-euc", SET_UP, "docs"]
    words = [installed, image, passwd, str(UID), block, who, sys.executable]
    command += [str(each) for each in words]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, cwd=ROOT)


@pytest.mark.parametrize(("page", "how", "block"), BLOCKS)
def test_commands_of_pages(page: str, how: str, block: str, system: tuple[Path, ...]) -> None:
    found = re.fullmatch(r"(user|root)(?:, status ([0-9]+))?(?:, with ([a-z]+))?", how)
    assert found is not None, how
    who, status, program = found.groups()
    if program is not None and shutil.which(program) is None:
        return  # a newer system has it: tests/systemd
    done = run_block(system, block, who)
    assert done.returncode == int(status or 0), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_commands_of_the_readme(system: tuple[Path, ...]) -> None:
    """In their order, each by whom it is for."""
    lines = [line for line in readme_lines() if not PLACEHOLDER.search(line)]
    for_root = ("mountctl image", "mountctl status", "mountctl policy")
    for who in ("user", "root"):
        own = [line for line in lines if line.startswith(for_root) == (who == "root")]
        assert own
        # “doctor” says by its status what this machine lacks.
        block = "\n".join(f"{line} || [ $? -le 2 ]" if "doctor" in line else line for line in own)
        done = run_block(system, ("mkdir -p ~/base\n" if who == "user" else "") + block, who)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", [line for line in readme_lines() if line.startswith("mountctl")])
def test_mountctl_understands_the_lines_of_the_readme(line: str) -> None:
    words = line.split()[1:]
    if words[0] == "policy" and words[1] != "reload":
        policy_tool.parser().parse_args(words[1:])
    else:
        parse(words)
