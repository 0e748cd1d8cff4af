"""Pulls the image that standard input's second document names, and says as JSON what came of it."""

import json
import os
import subprocess
import sys

sys.path.insert(0, "/usr/lib/mountd/python")

from dataclasses import asdict
from pathlib import Path

from mountd.errors import MountdError
from mountd.store import layers, pull, reference

arguments = json.loads(sys.argv[1])
phases = []
resolve = pull.resolve


def resolve_and_wait(*all):
    """Resolve, and let something happen before the image is fetched."""
    found = resolve(*all)
    subprocess.run(["sh", "-euc", arguments.get("between", "")], check=True, stdout=sys.stderr)
    return found


def progress(phase, done, total):
    """Note the phases in their order."""
    assert 0 <= done <= (total or done), (phase, done, total)
    if phase not in phases:
        phases.append(phase)


pull.resolve = resolve_and_wait
os.makedirs(arguments["work"], mode=0o700, exist_ok=True)
work = os.open(arguments["work"], os.O_RDONLY | os.O_DIRECTORY)
before = os.listdir("/proc/self/fd")
try:
    limits = pull.PullLimits(**arguments.get("limits", {}))
    pulled = pull.pull(
        reference.parse(arguments["reference"]),
        work,
        progress=progress,
        limits=limits,
        **arguments.get("options", {}),
    )
    answer = {
        "provenance": asdict(pulled.provenance),
        "phases": phases,
        "layers": [
            {
                "name": layer.name,
                "size": layer.size,
                "digest": layer.digest,
                "diff_id": layer.diff_id,
                "summary": layers.serialise(layer.summary),
                "sha256": subprocess.run(
                    ["sha256sum", f"{arguments['work']}/{layer.name}"], capture_output=True, text=True
                ).stdout.split()[0],
            }
            for layer in pulled.layers
        ],
    }
    pulled.close()
except MountdError as error:
    answer = {"error": type(error).__name__, "message": str(error), "hint": error.hint}
answer["left"] = sorted(os.listdir(arguments["work"]))
assert len(os.listdir("/proc/self/fd")) == len(before), "a descriptor was left open"
children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
assert not children, "a child was left"
sys.stdout.write(json.dumps(answer))
