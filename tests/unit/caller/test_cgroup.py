"""What the path of a control group says, and what it cannot be made to say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mountd.caller.cgroup import MAXIMUM_BYTES, Place, parse, parse_path

ID = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("path", "unit", "slice", "container"),
    [
        ("/", None, None, None),
        ("/init.scope", "init.scope", None, None),
        ("/system.slice/a.service", "a.service", "system.slice", None),
        ("/system.slice/a@b.service/sub/c.service", "a@b.service", "system.slice", None),
        ("/system.slice/_cpu.service", "cpu.service", "system.slice", None),
        ("/system.slice/system-a.slice/a@1.service", "a@1.service", "system-a.slice", None),
        ("/user.slice/user-1000.slice/session-2.scope", "session-2.scope", "user-1000.slice", None),
        ("/user.slice", None, "user.slice", None),
        # Below a unit, its owner gives the names.
        ("/user.slice/user-1.slice/user@1.service/app.slice/root.service", "user@1.service",
         "user-1.slice", None),
        (f"/user.slice/user-1.slice/user@1.service/user.slice/libpod-{ID}.scope", "user@1.service",
         "user-1.slice", None),
        ("/user.slice/user-1.slice/user@1.service/machine.slice/machine-a.scope", "user@1.service",
         "user-1.slice", None),
        (f"/user.slice/user-1.slice/user@1.service/docker/{ID}", "user@1.service", "user-1.slice", None),
        # Containers.
        ("/machine.slice/machine-a.scope/payload/system.slice/b.service", "machine-a.scope",
         "machine.slice", "nspawn:a"),
        (r"/machine.slice/machine-a\x2db.scope", r"machine-a\x2db.scope", "machine.slice", "nspawn:a-b"),
        ("/machine.slice/systemd-nspawn@a.service/payload", "systemd-nspawn@a.service", "machine.slice",
         "nspawn:a"),
        (f"/machine.slice/libpod-{ID}.scope/container", f"libpod-{ID}.scope", "machine.slice",
         f"podman:{ID}"),
        (f"/system.slice/docker-{ID}.scope", f"docker-{ID}.scope", "system.slice", f"docker:{ID}"),
        (f"/docker/{ID}", None, None, f"docker:{ID}"),
        (f"/docker/{ID}/system.slice/a.service", None, None, f"docker:{ID}"),
        ("/lxc.payload.a", None, None, "lxc:a"),
        ("/lxc.payload.a/init.scope", None, None, "lxc:a"),
        (f"/kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope", f"crio-{ID}.scope", "kubepods-pod1.slice",
         f"cri-o:{ID}"),
        (f"/kubepods.slice/cri-containerd-{ID}.scope", f"cri-containerd-{ID}.scope", "kubepods.slice",
         f"containerd:{ID}"),
        # What looks like something.
        (f"/system.slice/docker-{ID[1:]}.scope", f"docker-{ID[1:]}.scope", "system.slice", None),
        (f"/docker/{ID}0", None, None, None),
        (f"/docker/{ID.upper()}", None, None, None),
        ("/lxc.payload.", None, None, None),
        ("/lxc.monitor.a", None, None, None),
        ("/a/system.slice/a.service", None, None, None),
        ("/a/lxc.payload.b", None, None, None),
        ("/system.slice/lxc.payload.b", None, "system.slice", None),
        ("/system.slice/a/b.service", None, "system.slice", None),
        ("/system.slice/a.service (deleted)", None, "system.slice", None),
        ("/system.slice/a.mount", None, "system.slice", None),
        ("/system.slice/.service", None, "system.slice", None),
        (f"/system.slice/{'a' * 255}.service", None, "system.slice", None),
        # Slices lie below those that their names name, and nowhere else.
        ("/user.slice/system.slice/a.service", None, "user.slice", None),
        ("/user-1000.slice/a.service", None, None, None),
        ("/user.slice/user-1-2.slice/a.service", None, "user.slice", None),
        ("/-.slice/a.service", None, None, None),
        ("/a--b.slice/x.service", None, None, None),
        # Not below the daemon's own root.
        ("/../system.slice/a.service", None, None, None),
        ("/system.slice/../a.service", None, None, None),
        ("system.slice/a.service", None, None, None),
        ("//a.service", None, None, None),
        ("", None, None, None),
    ],
)  # fmt: skip
def test_path(path: str, unit: str | None, slice: str | None, container: str | None) -> None:
    assert parse_path(path) == Place(path, unit, slice, container)


def test_only_the_unified_hierarchy_counts() -> None:
    v1 = b"1:name=systemd:/system.slice/a.service\n"
    assert parse(v1) == Place()
    assert parse(v1 + b"0::/system.slice/b.service\n").unit == "b.service"
    assert parse(b"10::/system.slice/a.service\n") == Place()


@pytest.mark.parametrize(
    "contents", [b"", b"\n", b"0:", b"0::/a.service\n0::/b.service\n", b"0::/a.service\n" * MAXIMUM_BYTES]
)
def test_what_is_unclear_is_not_known(contents: bytes) -> None:
    assert parse(contents).unit is None


def test_bytes_that_are_no_text_can_be_shown() -> None:
    place = parse(b"0::/system.slice/a.service/\xff\n")
    assert place.unit == "a.service"
    assert (place.path or "").endswith(r"\xff")


@given(st.binary(max_size=64), st.sampled_from([b"", b"0::", b"0::/", b"0::/user.slice/", b"0::/docker/"]))
def test_anything_is_a_place(contents: bytes, start: bytes) -> None:
    place = parse(start + contents)
    for name in (place.unit, place.slice, place.container):
        assert name is None or name.isprintable()


@given(st.text(alphabet="abc-./_slicervop@", max_size=60))
def test_what_is_below_a_unit_says_nothing(below: str) -> None:
    path = "/user.slice/user-1.slice/user@1.service"
    place = parse_path(f"{path}/{below}")
    if ".." not in below and "." not in below.split("/"):
        assert (place.unit, place.slice, place.container) == ("user@1.service", "user-1.slice", None)
