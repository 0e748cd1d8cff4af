"""Asks for mounts with the varlink package's own client, which takes no descriptors; prints JSON."""

import json
import os
import sys

import varlink

address, number = sys.argv[1], int(sys.argv[2])


def descriptors():
    """How many this process has, with the one that the list is read through."""
    return len(os.listdir("/proc/self/fd"))


replies, held = [], set()
before = descriptors()
with (
    varlink.Client(address=f"unix:{address}") as client,
    client.open("io.mountd.Mount") as mount,
):
    for _ in range(number):
        replies.append(mount.Mount(source={"tmpfs": {"size": 65536}}, readOnly=False))
        held.add(descriptors())
json.dump({"replies": replies, "held": sorted(held), "before": before, "after": descriptors()}, sys.stdout)
