"""A FUSE file system at argv[1] with one file, whose server never answers when the file is closed.

Prints “serving”, then “asked” at each close. Whoever closes the file waits, and cannot be killed, until this
process has ended.
"""

import ctypes
import os
import struct
import sys

LOOKUP, GETATTR, OPEN, FLUSH, INIT = 1, 3, 14, 25, 26
HEADER = struct.Struct("=IIQQIIII")
SIZE = 65536

device = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(b"silent", sys.argv[1].encode(), b"fuse", 0, options) == 0, ctypes.get_errno()


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def attributes(node: int) -> bytes:
    mode, size = (0o40755, 0) if node == 1 else (0o100644, SIZE)
    return struct.pack("=QQQQQQIIIIIIIIII", node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def answer(unique: int, data: bytes = b"", error: int = 0) -> None:
    os.write(device, struct.pack("=IiQ", 16 + len(data), -error, unique) + data)


say("serving")
while True:
    request = os.read(device, 1 << 20)
    _, operation, unique, node, *_ = HEADER.unpack_from(request)
    if operation == INIT:
        answer(unique, struct.pack("=IIIIHHIIHHII24x", 7, 31, 65536, 0, 0, 0, 65536, 1, 0, 0, 0, 0))
    elif operation == LOOKUP:
        answer(unique, struct.pack("=QQQQII", 2, 0, 60, 60, 0, 0) + attributes(2))
    elif operation == GETATTR:
        answer(unique, struct.pack("=QII", 60, 0, 0) + attributes(node))
    elif operation == OPEN:
        answer(unique, struct.pack("=QII", 1, 0, 0))
    elif operation == FLUSH:
        say("asked")
    elif unique:
        answer(unique, error=38)
