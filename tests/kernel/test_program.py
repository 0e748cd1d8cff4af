"""A program that is run as nobody: what it has, what it cannot do, and how it is ended."""

from __future__ import annotations

import errno
import os
import select
import signal
import tempfile
import time

import pytest

from mountd.errors import NotSupported
from mountd.fds import OwnedFd
from mountd.kernel import child, program
from mountd.kernel.sandbox import NOBODY
from tests.container import as_user

pytestmark = pytest.mark.kernel
PYTHON = "/usr/bin/python3"  # one that nobody may run, too
MEMORY = 256 << 20


def python(text: str, *fds: int, seconds: float = 10) -> program.Finished:
    return program.run(PYTHON, ("-I", "-S", "-c", text), fds, seconds=seconds, memory=MEMORY)


def printed(text: str, *fds: int) -> str:
    done = python(text, *fds)
    assert (done.status, done.timed_out) == (0, False), done.output
    return done.output.decode().strip()


def test_what_it_is() -> None:
    status = printed("print(open('/proc/self/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["65534"] * 4
    assert fields["Gid"].split() == ["65534"] * 4
    assert fields["Groups"].strip() == ""
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(fields[name], 16) == 0, name
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    assert fields["SigBlk"] == "0" * 16


def test_what_it_has() -> None:
    with open("/etc/passwd") as kept:
        os.set_inheritable(kept.fileno(), True)
        first, second = OwnedFd(os.memfd_create("a")), OwnedFd(os.memfd_create("b"))
        with first, second:
            os.pwrite(first.fileno(), b"one", 0)
            os.pwrite(second.fileno(), b"two", 0)
            said = printed(
                "import os; print(os.listdir('/proc/self/fd'), os.pread(3, 9, 0), os.pread(4, 9, 0),"
                " dict(os.environ), os.getcwd(), os.read(0, 9))",
                first.fileno(),
                second.fileno(),
            )
    # The fifth is that of listing them.
    assert said == "['0', '1', '2', '3', '4', '5'] b'one' b'two' {'LC_CTYPE': 'C.UTF-8'} / b''"


@pytest.mark.parametrize("low", [3, 4, 5])
def test_descriptors_are_not_mixed_up(low: int) -> None:
    """Whatever numbers they have before, among them those that they get."""
    with OwnedFd(os.memfd_create("a")) as first, OwnedFd(os.memfd_create("b")) as second:
        os.pwrite(first.fileno(), b"one", 0)
        os.pwrite(second.fileno(), b"two", 0)
        fds = [second.fileno(), first.fileno(), second.fileno()][: low - 2]
        wanted = [b"two", b"one", b"two"][: low - 2]
        said = printed(f"import os; print([os.pread(fd, 9, 0) for fd in range(3, {3 + len(fds)})])", *fds)
    assert said == str(wanted)


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.socket(socket.AF_INET)",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.socketpair()",
        "import os; os.fork()",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.kill(os.getppid(), 0)",
        "import ctypes; l = ctypes.CDLL(None, use_errno=True); l.unshare(0x10000000) and fail()",
        "import ctypes; l = ctypes.CDLL(None, use_errno=True); l.ptrace(0, 0, 0, 0) and fail()",
        "import ctypes; l = ctypes.CDLL(None, use_errno=True); l.syscall(425, 1, 0) and fail()",
        "open('/etc/shadow')",
        "import os; os.setuid(0)",
    ],
)
def test_what_it_cannot_do(attempt: str) -> None:
    text = f"""
def fail():
    raise OSError(ctypes.get_errno(), "refused")
try:
    {attempt}
except PermissionError:
    print("refused")
except OSError as error:
    print("refused" if error.errno == 1 else error)
"""
    assert printed(text) == "refused"


def test_what_it_cannot_write() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o777)
        path = f"{directory}/x"
        done = python(f"import os; os.write(os.open({path!r}, os.O_CREAT | os.O_WRONLY), b'x')")
        assert done.status != 0
        assert os.stat(path).st_size == 0


def test_its_memory_ends() -> None:
    assert "MemoryError" in printed(
        "try:\n  bytes(1 << 30)\nexcept MemoryError as e:\n  print(type(e).__name__)"
    )


def test_its_status_and_its_signal() -> None:
    assert python("import os; os._exit(7)").status == 7
    assert python("import os; os.abort()").status == -signal.SIGABRT


@pytest.mark.parametrize(
    "text", ["while True: pass", "import time; time.sleep(60)", "import os; os.close(1)\nwhile True: pass"]
)
def test_one_that_does_not_end(text: str) -> None:
    start = time.monotonic()
    done = python(text, seconds=0.4)
    assert time.monotonic() - start < 3
    assert done.status == -signal.SIGKILL
    assert done.timed_out == ("close" not in text)


def test_one_that_says_too_much() -> None:
    done = python("while True: print('x' * 1000)")
    assert len(done.output) <= program.MAXIMUM_OUTPUT
    assert done.status != 0


def test_program_that_is_not_there() -> None:
    done = program.run("/nonexistent", (), (), seconds=5, memory=MEMORY)
    assert (done.status, done.output, done.timed_out) == (child.EXIT_RAISED, b"", False)


def test_its_input() -> None:
    """What it is given, with other descriptors or without."""
    for fds in ([], [os.open("/dev/null", os.O_RDONLY)]):
        reader, writer = child.pipe()
        with reader:
            with writer:
                os.write(writer.fileno(), b"said to it")
            done = program.run(
                PYTHON,
                ("-I", "-S", "-c", "import os; print(os.read(0, 99), os.listdir('/proc/self/fd'))"),
                fds,
                stdin=reader.fileno(),
                seconds=10,
                memory=MEMORY,
            )
        numbers = [str(number) for number in range(4 + len(fds))]
        assert done.output.decode().strip() == f"b'said to it' {numbers}"
        for fd in fds:
            os.close(fd)


ATTEMPTS = """
import os, threading
def attempt(what):
    try:
        what()
        return "done"
    except (PermissionError, RuntimeError):
        return "refused"
def spawn():
    os.posix_spawn("/bin/true", ["true"], {})
def thread():
    each = threading.Thread(target=list)
    each.start()
    each.join()
print(attempt(thread), attempt(os.fork), attempt(spawn))
"""


@pytest.mark.parametrize("threads", [False, True])
def test_threads(threads: bool) -> None:
    """They are for those that need them; processes are for none."""
    done = program.run(
        PYTHON, ("-I", "-c", ATTEMPTS), (), seconds=10, memory=MEMORY, threads=threads
    )  # fmt: skip
    assert done.output.decode().split() == ["done" if threads else "refused", "refused", "refused"]


@pytest.mark.parametrize("secret", [False, True])
def test_nobody_looks_into_what_has_a_secret(secret: bool) -> None:
    """Another process of the same user can otherwise, where nothing but the user is asked."""

    def look(pid: int) -> str:
        try:
            with open(f"/proc/{pid}/environ", "rb"), open(f"/proc/{pid}/maps", "rb") as maps:
                return "seen" if maps.read() else "nothing"
        except OSError as error:
            return str(error.errno)

    # The program says who it is by a pipe of its own, and waits until it was looked at.
    reader, writer = child.pipe()
    wait, go = child.pipe()
    text = "import os; os.write(3, str(os.getpid()).encode()); os.close(3); os.read(4, 1)"
    arguments = ("-I", "-S", "-c", text)
    with reader, wait, go:
        with writer:
            fds = [writer.fileno(), wait.fileno()]
            runner = os.fork()
            if runner == 0:
                done = program.run(PYTHON, arguments, fds, seconds=10, memory=MEMORY, secret=secret)
                os._exit(done.status)
        pid = int(os.read(reader.fileno(), 99))
        found = as_user(lambda: look(pid), NOBODY)
        os.write(go.fileno(), b"x")
        assert os.waitpid(runner, 0)[1] == 0
    assert found == (str(errno.EACCES) if secret else "seen")


@pytest.mark.parametrize("secret", [False, True])
def test_it_ends_with_who_runs_it(secret: bool) -> None:
    """Also if that is killed, and has no time to end it."""
    reader, writer = child.pipe()
    text = "import os, time; os.write(3, str(os.getpid()).encode()); time.sleep(60)"
    with reader:
        with writer:
            fds = [writer.fileno()]
            runner = os.fork()
            if runner == 0:
                program.run(PYTHON, ("-I", "-S", "-c", text), fds, seconds=60, memory=MEMORY, secret=secret)
                os._exit(0)
        pid = int(os.read(reader.fileno(), 99))
        os.kill(runner, signal.SIGKILL)
        os.waitpid(runner, 0)
        # Its end of the pipe closes with it.
        assert select.select([reader], [], [], 20) == ([reader], [], [])
        assert os.read(reader.fileno(), 1) == b""
    with pytest.raises(ProcessLookupError):
        wait_until_gone(pid)


def wait_until_gone(pid: int) -> None:
    """Raise ProcessLookupError once there is no such process, or only what is left of one."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                raise ProcessLookupError(pid)
        time.sleep(0.01)


def test_machine_whose_numbers_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "FORBIDDEN", {})
    with pytest.raises(NotSupported, match="a seccomp filter"):
        python("pass")


def test_signals_that_the_daemon_ignores_are_its_own() -> None:
    was = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        said = printed("import signal; print(signal.getsignal(signal.SIGHUP) is signal.SIG_DFL)")
    finally:
        signal.signal(signal.SIGHUP, was)
    assert said == "True"
