"""Stacks that can be written to: what a hostile top comes to."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from mountd.client import MountReply
from tests.container import USER, as_user, in_container
from tests.daemon import Daemon
from tests.e2e.calls import Outcome, errno_of
from tests.e2e.stacks.calls import names, user
from tests.e2e.tops.calls import INNER_ROOT, MIB, at_mnt, mounted, refusal
from tests.e2e.tops.changes import SETUID, on_disk


def test_nothing_of_roots_is_copied_to_where_a_user_has_it(
    serving: Daemon, images: list[Path], home: Path
) -> None:
    """On the host, without a mapping: neither a file that anybody may write to, nor by another name."""
    os.chown(home, USER, USER)
    with user():
        reply = mounted(serving, images, home, own=False)
    with reply:
        fd = reply.mount.fileno()

        def work() -> tuple[str, ...]:
            def made() -> None:
                os.close(os.open("all/mine", os.O_CREAT | os.O_WRONLY, dir_fd=fd))

            return (
                errno_of(lambda: os.close(os.open("everybodys", os.O_WRONLY, dir_fd=fd))),
                errno_of(lambda: os.link("suid", "all/suid", src_dir_fd=fd, dst_dir_fd=fd)),
                errno_of(made),
            )

        errors = as_user(work)
        assert errors[0] == "EOVERFLOW"
        assert errors[1] in ("EOVERFLOW", "EPERM")
        # Its directory would have to be copied first.
        assert errors[2] == "EOVERFLOW"
        assert on_disk(home / "upper") == {}
        assert (home / "upper").stat().st_uid == USER
    # In memory it comes to no harm: nobody has that but through the mount.
    with user():
        reply = mounted(serving, images, MIB, own=False)
    with reply:
        assert as_user(lambda: errno_of(lambda: open_to_write("everybodys", reply))) == ""
        assert os.fstatvfs(reply.mount.fileno()).f_flag & os.ST_NOSUID


def open_to_write(name: str, reply: MountReply) -> None:
    os.close(os.open(name, os.O_WRONLY, dir_fd=reply.mount.fileno()))


def test_hostile_attributes_in_the_top_say_nothing(
    serving: Daemon, images: list[Path], home: Path, containers: None
) -> None:
    """What a user can write there hides nothing, and nothing leads anywhere."""
    upper = home / "upper"
    (upper / "dir").mkdir(parents=True)
    (upper / "redirected").mkdir()
    (upper / "copied").write_text("")
    (upper / "link").symlink_to("/etc/passwd")
    (upper / "setuid").write_text("")
    (upper / "roots").write_text("root's")
    for each in (upper, *upper.rglob("*")):
        os.chown(each, INNER_ROOT, INNER_ROOT, follow_symlinks=False)
    (upper / "setuid").chmod(SETUID)
    os.chown(upper / "roots", 0, 0)
    (upper / "roots").chmod(0o600)
    attributes = {"dir": "opaque", "redirected": "redirect", "copied": "metacopy"}
    for name, attribute in attributes.items():
        for prefix in ("user", "trusted"):
            if prefix == "trusted" and attribute == "opaque":
                continue  # which says what it may say
            value = {"opaque": b"y", "redirect": b"/etc", "metacopy": b""}[attribute]
            os.setxattr(upper / name, f"{prefix}.overlay.{attribute}", value)

    def work() -> tuple[object, ...]:
        with at_mnt(mounted(serving, images, home)) as top:
            return (
                set(os.listdir(top / "dir")),
                errno_of(lambda: os.listdir(top / "redirected")),
                errno_of(lambda: (top / "copied").read_bytes()),
                os.readlink(top / "link"),
                bool(os.statvfs(top / "setuid").f_flag & os.ST_NOSUID),
                errno_of(lambda: (top / "roots").read_bytes()),
                errno_of(lambda: (top / "roots").chmod(0o666)) in ("EPERM", "EOVERFLOW"),
                (top / "roots").stat().st_uid,
            )

    found = in_container(work)
    assert found[0] == {"a", "b"}
    assert found[1] in ("EPERM", "EIO")
    assert found[2] in ("EPERM", "EIO")
    assert found[3:] == ("/etc/passwd", True, "EACCES", True, 65534)


def test_what_is_in_the_way_of_its_directories(
    serving: Daemon, images: list[Path], home: Path, place: Path, containers: None
) -> None:
    """Only directories of the owner's that lie in this very one are taken; nothing is made elsewhere."""
    victim = place / "victim"
    victim.mkdir(mode=0o777)
    victim.chmod(0o777)

    def refused(name: str, make: Callable[[Path], None]) -> Outcome:
        make(home / name)
        try:
            return in_container(lambda: refusal(serving, images, home))
        finally:
            assert os.listdir(victim) == []
            for each in ("upper", "work"):
                path = home / each
                assert path.is_symlink() or path.exists() is (each == name), (name, each)
            if (home / name).is_dir() and not (home / name).is_symlink():
                (home / name).rmdir()
            else:
                (home / name).unlink()

    ways: list[Callable[[Path], object]] = [
        lambda path: path.symlink_to(victim),
        lambda path: path.write_text(""),
        lambda path: path.mkdir(),  # root's
        lambda path: os.mkfifo(path),
    ]
    for name in ("upper", "work"):
        for way in ways:
            found = refused(name, lambda path, way=way: way(path) and None)  # type: ignore[misc]
            assert found[0] == "BadFileDescriptor", (name, found)
            assert "source.top.directoryFileDescriptor" in found[1]
    victim.rmdir()


def test_the_directories_are_swapped_while_it_is_made(
    serving: Daemon, images: list[Path], home: Path, place: Path, containers: None
) -> None:
    """However that ends, nothing is made or changed where a link leads."""
    victim = place / "victim"
    (victim / "work").mkdir(parents=True)
    before = victim.stat().st_mtime_ns
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for name in ("upper", "work"):
                path = home / name
                with contextlib.suppress(OSError):
                    path.rename(home / f"{name}.away")
                with contextlib.suppress(OSError):
                    path.symlink_to(victim)
                with contextlib.suppress(OSError):
                    path.unlink()
                with contextlib.suppress(OSError):
                    (home / f"{name}.away").rename(path)

    def work() -> set[str]:
        thread = threading.Thread(target=swap)
        thread.start()
        try:
            return {refusal(serving, images, home)[0] for _ in range(12)}
        finally:
            stop.set()
            thread.join()

    ends = in_container(work)
    known = {"", "BadFileDescriptor", "NotSupported", "InUse", "MountFailed", "NotFound"}
    assert ends <= known, ends
    assert (victim.stat().st_mtime_ns, os.listdir(victim), os.listdir(victim / "work")) == (
        before,
        ["work"],
        [],
    )
    shutil.rmtree(victim)


def test_a_top_within_a_layer_and_a_layer_within_it(
    serving: Daemon, images: list[Path], home: Path, containers: None
) -> None:
    (home / "upper").mkdir()
    for path in (home / "upper", home / "upper/inner"):
        path.mkdir(exist_ok=True)
        os.chown(path, INNER_ROOT, INNER_ROOT)
    for layer in (home / "upper", home / "upper/inner"):
        name, text = in_container(lambda layer=layer: refusal(serving, [layer, *images], home))  # type: ignore[misc]
        assert (name, "within" in text) == ("InvalidParameter", True), text
    assert set(os.listdir(home)) == {"upper"}

    def work() -> tuple[str, set[str]]:
        with mounted(serving, [home, *images], home) as reply:
            fd = reply.mount.fileno()
            return errno_of(lambda: os.listdir(f"/proc/self/fd/{fd}/upper")), names(reply.mount)

    # The kernel shows no layer in itself.
    found = in_container(work)
    assert found[0] == "ELOOP"
    assert "both" in found[1]
