"""The outermost layer of OpenPGP (RFC 9580): armour, and which packets there are. The rest is gpgv's.

gpgv gets exactly one signature packet and nothing else, so that of its many parsers only that one meets what
comes from an enemy.
"""

from __future__ import annotations

import base64
import binascii

ARMOUR = b"-----BEGIN PGP "
SIGNATURE, SECRET_KEY, PUBLIC_KEY, SECRET_SUBKEY, PUBLIC_SUBKEY = 2, 5, 6, 7, 14  # packet types
RSA_ALGORITHMS = (1, 3)  # that can sign
MINIMUM_RSA_BITS = 2048
MAXIMUM_PACKETS = 4096  # a key that many have signed has one for each


class OpenPgpError(Exception):
    """It is not what it has to be; the text says why."""


def is_signature(data: bytes) -> bool:
    """Return whether `data` begins as an OpenPGP signature does, armoured or binary."""
    if data.lstrip().startswith(ARMOUR):
        return True
    # Old format with a length of one, two or four bytes; new format.
    return data[:1] in (b"\x88", b"\x89", b"\x8a", b"\xc2")


def signature(data: bytes) -> bytes:
    """Return the one signature packet that `data` is, binary. Raises OpenPgpError."""
    binary = _dearmoured(data, b"SIGNATURE")
    kinds = [kind for kind, _ in packets(binary)]
    if kinds.count(SIGNATURE) > 1:
        raise OpenPgpError("it has more than one signer")
    if kinds != [SIGNATURE]:
        raise OpenPgpError("it is not a detached OpenPGP signature")
    return binary


def public_keys(data: bytes) -> bytes:
    """Return the binary form of the exported public keys `data`. Raises OpenPgpError."""
    binary = _dearmoured(data, b"PUBLIC KEY BLOCK")
    found = packets(binary)
    if not found or found[0][0] != PUBLIC_KEY:
        raise OpenPgpError("no exported OpenPGP public key")
    for kind, body in found:
        if kind in (SECRET_KEY, SECRET_SUBKEY):
            raise OpenPgpError("a secret key, where a public one belongs")
        # Version 4: the version, four bytes of time, the algorithm, and the modulus with its bits before it.
        if kind in (PUBLIC_KEY, PUBLIC_SUBKEY) and body[:1] == b"\x04" and body[5:6]:
            bits = int.from_bytes(body[6:8], "big")
            if body[5] in RSA_ALGORITHMS and bits < MINIMUM_RSA_BITS:
                raise OpenPgpError(
                    f"an RSA key of {bits} bits, where it has to be {MINIMUM_RSA_BITS} or more"
                )
    return binary


def packets(data: bytes) -> list[tuple[int, bytes]]:
    """Return type and body of each packet. Raises OpenPgpError, also for bodies in parts."""
    found: list[tuple[int, bytes]] = []
    position = 0
    while position < len(data):
        first = data[position]
        if not first & 0x80:
            raise OpenPgpError(f"no OpenPGP packet at byte {position}")
        if first & 0x40:
            kind, (length, position) = first & 0x3F, _new_length(data, position + 1)
        else:
            kind, (length, position) = first >> 2 & 0x0F, _old_length(data, position + 1, first & 3)
        if position + length > len(data):
            raise OpenPgpError(
                f"it is cut off: {position + length - len(data)} bytes are missing at its end"
            )
        if len(found) == MAXIMUM_PACKETS:
            raise OpenPgpError(f"more than {MAXIMUM_PACKETS} packets")
        found.append((kind, data[position : position + length]))
        position += length
    return found


def _new_length(data: bytes, position: int) -> tuple[int, int]:
    first = _number(data, position, 1)
    if first < 192:
        return first, position + 1
    if first < 224:
        return (first - 192 << 8) + _number(data, position + 1, 1) + 192, position + 2
    if first == 255:
        return _number(data, position + 1, 4), position + 5
    raise OpenPgpError("an OpenPGP packet in parts")


def _old_length(data: bytes, position: int, kind: int) -> tuple[int, int]:
    if kind == 3:
        raise OpenPgpError("an OpenPGP packet without a length")
    count = 1 << kind
    return _number(data, position, count), position + count


def _number(data: bytes, position: int, count: int) -> int:
    if position + count > len(data):
        raise OpenPgpError("it is cut off within the header of a packet")
    return int.from_bytes(data[position : position + count], "big")


def _dearmoured(data: bytes, what: bytes) -> bytes:
    """Return the binary form of `data`: of each armoured block in it, which has to be of the kind `what`."""
    if not data.lstrip().startswith(ARMOUR):
        return data
    begin, end = ARMOUR + what + b"-----", b"-----END PGP " + what + b"-----"
    found = b""
    body: list[bytes] | None = None
    headers = False
    for line in data.splitlines():
        text = line.strip()
        if body is None:
            if text and text != begin:
                raise OpenPgpError(f"text that is no OpenPGP {what.decode().lower()}")
            if text:
                body, headers = [], True
        elif text == end:
            found += _block(body)
            body = None
        elif headers and (b": " in text or not text):
            headers = bool(text)
        else:
            headers = False
            body.append(text)
    if body is not None:
        raise OpenPgpError("its armour is cut off")
    return found


def _block(lines: list[bytes]) -> bytes:
    """Decode the lines of one block; the last may be its checksum (RFC 9580, 6.1)."""
    checksum = lines.pop() if lines and lines[-1].startswith(b"=") else None
    try:
        binary = base64.b64decode(b"".join(lines), validate=True)
        wanted = None if checksum is None else base64.b64decode(checksum[1:], validate=True)
    except (binascii.Error, ValueError):
        raise OpenPgpError("its armour is not base64") from None
    if wanted is not None and wanted != _crc24(binary).to_bytes(3, "big"):
        raise OpenPgpError("its armour is damaged: the checksum differs")
    return binary


def _crc24(data: bytes) -> int:
    crc = 0xB704CE
    for byte in data:
        crc ^= byte << 16
        for _ in range(8):
            crc = crc << 1 ^ (0x1864CFB if crc & 0x800000 else 0)
    return crc
