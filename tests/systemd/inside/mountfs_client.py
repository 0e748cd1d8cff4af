"""Speak io.systemd.MountFileSystem as an ordinary user; print what came back as JSON."""

import array
import json
import os
import socket
import sys

ADDRESS, IMAGE, HOME = sys.argv[1:]
INTERFACE = "io.systemd.MountFileSystem"


def call(method, fds, **parameters):
    """The reply of a call, and the descriptors that came with it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(ADDRESS)
        body = json.dumps({"method": f"{INTERFACE}.{method}", "parameters": parameters}).encode() + b"\0"
        socket.send_fds(connection, [body], fds)
        received, numbers = b"", array.array("i")
        while not received.endswith(b"\0"):
            data, more, _, _ = socket.recv_fds(connection, 65536, 16)
            received += data
            numbers.extend(more)
        return json.loads(received[:-1]), list(numbers)


image = os.open(IMAGE, os.O_RDONLY)
home = os.open(HOME, os.O_RDONLY | os.O_DIRECTORY)
found = {}
found["image"], fds = call("MountImage", [image], imageFileDescriptor=0)
found["listed"] = os.listdir(os.open(".", os.O_RDONLY, dir_fd=fds[0])) if fds else []
found["directory"], fds = call("MountDirectory", [home], directoryFileDescriptor=0)
found["made"], fds = call("MakeDirectory", [home], parentFileDescriptor=0, name="machine")
if fds:
    status = os.fstat(fds[0])
    found["owner"] = [status.st_uid, status.st_gid, status.st_mode & 0o7777]
    os.rmdir(HOME + "/machine")
path = os.open(IMAGE, os.O_PATH)
found["flags"], _ = call("MountImage", [path], imageFileDescriptor=0)
json.dump(found, sys.stdout)
