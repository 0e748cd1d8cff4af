"""Detached OpenPGP signatures, as `gpg --detach-sign` makes them, verified by gpgv(1).

What has to be signed is the short text of `content.py`, the digits of the image's digest, for example by
`printf %s "$digest" | gpg --detach-sign`: gpgv would have to read all of the image otherwise.

No library reads OpenPGP, so that this is the one kind that needs a program. It runs for one signature, as
nobody, without capabilities, network, environment or a home (kernel/program.py), and it has TIME seconds for
all keys together. Its keyring, the signature and the text are in memory only, and it sees the keys of one
[key.NAME] section at a time, which is how it is known whose key it was. What it says is read from its status
lines (doc/DETAILS of GnuPG), and "good" is only believed where every one of them fits.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mountd.errors import KeyUnknown, NotSupported, SignatureInvalid
from mountd.evidence import openpgp
from mountd.evidence.model import Signer
from mountd.fds import OwnedFd
from mountd.kernel import program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mountd.evidence.content import Content
    from mountd.evidence.keys import Loaded

GPGV = "/usr/bin/gpgv"
TIME = 10.0  # seconds
MEMORY = 256 << 20
ARGUMENTS = (
    "--homedir=/nonexistent",
    "--status-fd=1",
    "--enable-special-filenames",
    "--keyring=/proc/self/fd/3",
    "--",
    "-&4",
    "-&5",
)
HASHES = {"8", "9", "10"}  # SHA-256, SHA-384, SHA-512 (RFC 9580, 9.5)
PUBLIC_KEYS = {"1", "3", "19", "22", "27"}  # RSA, RSA for signatures, ECDSA, EdDSA, Ed25519 (9.1)
BINARY_DOCUMENT = "00"
PREFIX = "[GNUPG:] "
NO_PUBLIC_KEY = "9"  # the reason in ERRSIG
REFUSALS = {
    "EXPSIG": "it has expired",
    "EXPKEYSIG": "its key has expired",
    "REVKEYSIG": "its key was revoked",
}
Lines = dict[str, list[str]]


def verify(data: bytes, keys: Sequence[Loaded[bytes]], contents: Sequence[Content], now: int) -> Signer:
    """Return who has made the signature `data` (armoured or binary) over one of `contents`.

    `keys` are of the kind "gpg". Raises SignatureInvalid, KeyUnknown, and NotSupported without gpgv.
    """
    try:
        binary = openpgp.signature(data)
    except openpgp.OpenPgpError as error:
        raise SignatureInvalid(str(error)) from None
    if not os.path.exists(GPGV):
        raise NotSupported(f"OpenPGP signatures, without {GPGV}", hint="install gpgv")
    deadline = time.monotonic() + TIME
    for loaded in keys:
        for content in contents:
            if content.payload.data is None:
                continue
            lines = _ask(loaded.value, binary, content.payload.data, deadline)
            verdict = _judge(lines)
            if verdict == "unknown":
                break
            if verdict == "good":
                subject = _check(lines, now)
                return Signer(loaded.name, subject, content.covers, content.digest)
        else:
            raise SignatureInvalid(
                f"the key “{loaded.name}” has signed something else than this image",
                hint="sign the hexadecimal digits of the digest, without a newline",
            )
    names = ", ".join(loaded.name for loaded in keys)
    raise KeyUnknown(f"it was not made with one of the OpenPGP keys that count ({names})")


def _ask(keyring: bytes, signature: bytes, text: bytes, deadline: float) -> Lines:
    """Run gpgv; return the words after each keyword of its status lines. Raises SignatureInvalid."""
    with ExitStack() as stack:
        fds = [stack.enter_context(_in_memory(each)).fileno() for each in (keyring, signature, text)]
        left = deadline - time.monotonic()
        done = program.run(GPGV, ARGUMENTS, fds, seconds=max(left, 0), memory=MEMORY)
    if done.timed_out:
        raise SignatureInvalid(f"gpgv did not come to an end within {TIME:.0f} seconds")
    lines: Lines = {"status": [str(done.status)]}
    for line in done.output.decode("utf-8", "replace").splitlines():
        if line.startswith(PREFIX):
            keyword, *words = line.removeprefix(PREFIX).split(" ")
            # Some come for each key that was looked at; those that count come once for each signature.
            if keyword in lines and keyword not in ("KEY_CONSIDERED", "KEYEXPIRED"):
                raise SignatureInvalid(f"gpgv says {keyword[:32]} of it more than once")
            lines[keyword] = words
    return lines


def _in_memory(data: bytes) -> OwnedFd:
    """Return a descriptor at the beginning of a nameless file that contains `data`."""
    fd = OwnedFd(os.memfd_create("mountd", os.MFD_CLOEXEC))
    try:
        os.pwrite(fd.fileno(), data, 0)
    except BaseException:
        fd.close()
        raise
    return fd


def _judge(lines: Lines) -> str:
    """Return "good", "bad" (for another text) or "unknown" (for another key).

    Raises SignatureInvalid for whatever no other key and no other text would change.
    """
    if "BADSIG" in lines:
        return "bad"
    if "NO_PUBKEY" in lines or lines.get("ERRSIG", [])[5:6] == [NO_PUBLIC_KEY]:
        return "unknown"
    for keyword, reason in REFUSALS.items():
        if keyword in lines:
            raise SignatureInvalid(reason)
    if "ERRSIG" in lines:
        raise SignatureInvalid("gpgv does not know its algorithm, or takes it for too weak")
    if lines["status"] != ["0"] or not {"NEWSIG", "GOODSIG", "VALIDSIG"} <= lines.keys():
        raise SignatureInvalid("gpgv cannot read it")
    return "good"


def _check(lines: Lines, now: int) -> str:
    """Have a good signature be one that counts; return who made it. Raises SignatureInvalid."""
    words = lines["VALIDSIG"]
    if len(words) < 10 or not all(word.isascii() and word.isdecimal() for word in words[2:4]):
        raise SignatureInvalid("gpgv says something about it that is not understood")
    made, expires = int(words[2]), int(words[3])
    if words[7] not in HASHES:
        raise SignatureInvalid("it uses a hash that is not SHA-256, SHA-384 or SHA-512")
    if words[6] not in PUBLIC_KEYS:
        raise SignatureInvalid("it uses an algorithm that is not RSA, ECDSA or EdDSA")
    if words[8] != BINARY_DOCUMENT:
        raise SignatureInvalid("it is a signature of a text, not of a binary document")
    if made > now:
        raise SignatureInvalid("it was made in the future")
    if expires and expires < now:
        raise SignatureInvalid("it has expired")
    user = "".join(each if each.isprintable() else "?" for each in " ".join(lines["GOODSIG"][1:]))
    return f"{words[9]} ({user[:200]})"
