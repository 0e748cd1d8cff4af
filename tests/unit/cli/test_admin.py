"""What mountctl makes of the replies of io.mountd.Admin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mountd.cli import admin
from mountd.cli.admin import describe, exposition, labels, number, replace_file, span
from mountd.cli.mountctl import parse

POOL = {
    "workers": 3, "idle": 1, "busy": 1, "stuck": 1, "killed": 2, "forks": 9, "restarts": 0, "connections": 4,
    "accepted": 40, "queue": 0,
}  # fmt: skip
METRICS: dict[str, Any] = {
    "version": '1"\\',
    "started": 1000,
    "requests": [{"method": "a.B", "result": "allow", "count": 7}],
    "bounds": [0.5, 1.0],
    "latencies": [{"method": "a.B", "at": [1, 3, 7], "sum": 12.5}],
    "pool": POOL,
    "policyGeneration": 2,
    "policySince": 1001,
}
STATUS: dict[str, Any] = {
    "version": "1",
    "pid": 7,
    "started": 1000,
    "sockets": ["/run/x"],
    "policy": {
        "generation": 2, "since": 1600, "rules": 1, "keys": 0, "broken": False, "directories": ["/p"],
        "files": [
            {"path": "/p/a.toml", "mask": False},
            {"path": "/p/b.toml", "mask": True},
            {"path": "/q/b.toml", "mask": False, "maskedBy": "/p/b.toml"},
        ],
        "faults": [{"file": "/p/c\x1b.toml", "line": 3, "key": "k", "reason": "r"}],
    },
    "store": {"path": "/s", "images": 2, "bytes": 1024, "maximumBytes": 4096},
    "pool": POOL,
    "limits": [
        {"name": "connections", "maximum": 10000},
        {"name": "bytes of one owner in the store", "maximum": 32 << 30},
    ],
    "kernel": [{"name": "fsopen", "available": True}, {"name": "loop", "available": False, "detail": "no"}],
}  # fmt: skip


def test_the_text_for_prometheus() -> None:
    text = exposition(METRICS)
    lines = text.splitlines()
    assert 'mountd_info{version="1\\"\\\\"} 1' in lines
    assert 'mountd_requests_total{method="a.B",result="allow"} 7' in lines
    assert lines[lines.index("# TYPE mountd_request_duration_seconds histogram") + 1 :][:5] == [
        'mountd_request_duration_seconds_bucket{method="a.B",le="0.5"} 1',
        'mountd_request_duration_seconds_bucket{method="a.B",le="1.0"} 3',
        'mountd_request_duration_seconds_bucket{method="a.B",le="+Inf"} 7',
        'mountd_request_duration_seconds_sum{method="a.B"} 12.5',
        'mountd_request_duration_seconds_count{method="a.B"} 7',
    ]
    # What is not known is not there.
    for name in ("live_mounts", "store_bytes", "store_images", "last_reload"):
        assert name not in text
    full = exposition(
        METRICS | {"liveMounts": 0, "storeBytes": 5, "storeImages": 1, "lastReloadWorked": False}
    )
    for line in ("live_mounts 0", "store_bytes 5", "store_images 1", "policy_last_reload_successful 0"):
        assert f"mountd_{line}" in full.splitlines()


def test_values_and_labels() -> None:
    assert [number(each) for each in (3, True, 0.25, float("inf"))] == ["3", "1", "0.25", "+Inf"]
    assert labels({}) == ""
    assert labels({"a": "x\ny"}) == '{a="x\\ny"}'


def test_status_for_people() -> None:
    text = describe(STATUS, width=None, colour=False, now=4600.0)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "mountd 1, pid 7, for 60 min"
    assert "  fault: /p/c?.toml:3: k: r" in lines
    assert "  The files have faults; the policy from before them is in force." in lines
    assert ["/q/b.toml", "masked", "by", "/p/b.toml"] in [line.split() for line in lines]
    assert "store:    /s: 2 images, 1.0 KiB of 4.0 KiB" in lines
    assert [line.split()[-1] for line in lines if line.startswith("connections ")] == ["10000"]
    assert [line.split()[-2:] for line in lines if line.startswith("bytes of ")] == [["32.0", "GiB"]]
    assert "mounts" not in text
    assert "mounts:   4 alive" in describe(STATUS | {"liveMounts": 4}, width=None, colour=False, now=0.0)
    coloured = describe(STATUS, width=40, colour=True, now=0.0)
    assert coloured.startswith("\x1b[1mmountd 1, pid 7, for 0 s\x1b[0m\n")
    broken = STATUS | {"policy": STATUS["policy"] | {"broken": True}}
    assert "broken: everything is denied" in describe(broken, width=None, colour=False, now=0.0)
    nothing = STATUS | {"store": {"path": "/s", "reason": "there is none"}}
    assert "store:    /s: there is none" in describe(nothing, width=None, colour=False, now=0.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (1e6, "11 d")]
)
def test_span(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_a_file_is_replaced_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.prom"
    replace_file(str(path), "one\n")
    assert path.read_text() == "one\n"

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(admin.os, "rename", fail)
    with pytest.raises(OSError, match="No space"):
        replace_file(str(path), "two\n")
    assert os.listdir(tmp_path) == ["x.prom"]
    assert path.read_text() == "one\n"


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    path = f"{tmp_path}/nowhere/x.prom"
    with pytest.raises(FileNotFoundError) as caught:
        replace_file(path, "one\n")
    assert caught.value.filename == path


@pytest.mark.parametrize(
    ("output", "kind"), [("", FileNotFoundError), ("/", IsADirectoryError), (".", IsADirectoryError)]
)
def test_what_is_no_name_of_a_file_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, output: str, kind: type[OSError]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(admin, "call", asked.append)
    with pytest.raises(kind) as caught:
        admin.metrics(parse(["metrics", "--output", output]))
    assert caught.value.filename == output
    assert not asked
