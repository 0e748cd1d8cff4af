"""Asking a registry for what a name leads to, and fetching it: the real skopeo(1), confined.

skopeo speaks to the registry, checks its certificate and enforces containers-policy.json(5), under the
configuration of the system (registries.conf, registries.d, certs.d). It is given the very bytes of the
policy that mountd has read, and nothing of anybody's home directory. What it leaves is verified again by
mountd.

It writes a directory in the format "dir" (containers-transports(5)), which keeps the manifest as it is: in
the OCI's layout, Docker's manifests would become others, whose digests nobody has signed.
"""

from __future__ import annotations

import fcntl
import os
import re
from typing import TYPE_CHECKING

from mountd.errors import (
    DeniedByPolicy,
    InvalidImage,
    KeyUnknown,
    LimitExceeded,
    MountdError,
    NotFound,
    NotSupported,
    RegistryFailed,
    SignatureInvalid,
    StorageFull,
)
from mountd.fds import OwnedFd
from mountd.store import program
from mountd.store.child import Deadline, finish
from mountd.store.manifest import ARCHITECTURES, MAXIMUM_MANIFEST, OPERATING_SYSTEM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mountd.store.child import Child
    from mountd.store.reference import Reference

PROGRAM = "skopeo"
IMAGE = "image"  # the directory that it makes
REGISTRIES_D = "/etc/containers/registries.d"
CPU_SECONDS = 3600
# Go reserves address space generously and uses little of it.
MEMORY = 8 << 30
MESSAGE = re.compile(r'level=fatal msg="((?:[^"\\]|\\.)*)"')
SIGN_HINT = "sign the image with the key that the system's policy names, see containers-policy.json(5)"
CA_HINT = "put the certificate of its authority into /etc/containers/certs.d/{host}/ca.crt"
CREDENTIALS_HINT = "mountd pulls without credentials; the repository has to allow that"
FULL_HINT = "free space where mountd keeps its images"

# What skopeo says, in the order in which it is looked for -> what that means.
REJECTED = "Source image rejected: "
UNSIGNED = "A signature was required, but no signature exists"
BY_POLICY = "is rejected by policy"
OTHER_KEY = re.compile(r"Signature by key (\w+) is not accepted")
# gpg-error.h: 9 is GPG_ERR_NO_PUBKEY
GPG_KEY_UNKNOWN = re.compile(r'Fingerprint:"(\w+)", Status:gpgme\.Error\{err:0x9\}')
FULL = re.compile(r"no space left on device|disk quota exceeded|file too large", re.I)
TAMPERED = re.compile(
    r"digest did not match|does not match (?:provided manifest|expected) digest|digest mismatch|"
    r"unexpected EOF|blob size mismatch|did not match the expected",
    re.I,
)
UNPROVEN = re.compile(r"x509:|tls: |certificate|server gave HTTP response to HTTPS client")
MISSING = re.compile(r"manifest unknown|name unknown|repository name not known|manifest not found", re.I)
UNREACHABLE = re.compile(
    r"connection refused|no such host|i/o timeout|network is unreachable|no route to host|"
    r"connection reset|server misbehaving|context deadline exceeded|Temporary failure",
    re.I,
)
FORBIDDEN = re.compile(r"unauthorized|authentication required|access denied|denied:", re.I)


def inspect(reference: Reference, directory: int, seconds: int, tick: Callable[[], None]) -> bytes:
    """Return the manifest or index that a name leads to now, as its bytes, of which nothing is proven.

    `directory` is a quarantine, borrowed. Raises RegistryFailed, NotFound, LimitExceeded, NotSupported,
    TimedOut, and what `tick` raises.
    """
    command = [PROGRAM, "inspect", "--raw", "--no-tags", "--no-creds", source(reference)]
    # It writes nothing.
    limits = program.Limits(seconds, MEMORY, MAXIMUM_MANIFEST)
    with _start(command, limits, directory, maximum_output=MAXIMUM_MANIFEST) as child:
        finish([child], Deadline(seconds), tick)
        if child.code:
            raise failure(reference, child)
        contents = child.outputs[0].kept
    if len(contents) > MAXIMUM_MANIFEST:
        raise LimitExceeded("bytes in the manifest of an image", MAXIMUM_MANIFEST)
    return contents


def copy(
    reference: Reference,
    policy: bytes,
    directory: int,
    *,
    machine: str,
    maximum: int,
    seconds: int,
    tick: Callable[[], None],
) -> None:
    """Fetch an image into the directory IMAGE of a quarantine, if it passes `policy`.

    `machine` is what uname(2) calls the kind of machine, `maximum` the size of one file in bytes. Raises
    SignatureInvalid, KeyUnknown and DeniedByPolicy where the image does not pass, RegistryFailed, NotFound,
    InvalidImage, StorageFull, NotSupported, TimedOut, and what `tick` raises.
    """
    with sealed(policy) as policy_fd:
        command = [
            PROGRAM,
            f"--policy=/proc/self/fd/{program.FIRST_EXTRA}",
            f"--registries.d={REGISTRIES_D}",
            f"--override-os={OPERATING_SYSTEM}",
            f"--override-arch={ARCHITECTURES.get(machine, machine)}",
            "copy",
            "--quiet",
            "--preserve-digests",
            "--remove-signatures",
            "--src-no-creds",
            source(reference),
            f"dir:{program.HOME}/{IMAGE}",
        ]
        limits = program.Limits(CPU_SECONDS, MEMORY, maximum)
        with _start(command, limits, directory, extra=[policy_fd.fileno()]) as child:
            finish([child], Deadline(seconds), tick)
            if child.code:
                raise failure(reference, child)


def _start(
    command: Sequence[str],
    limits: program.Limits,
    directory: int,
    *,
    maximum_output: int = program.MAXIMUM_MESSAGES,
    extra: Sequence[int] = (),
) -> Child:
    try:
        return program.start(
            command, limits, directory=directory, network=True, maximum_output=maximum_output, extra=extra
        )
    except NotSupported as error:
        if error.hint is None:
            raise
        raise NotSupported(f"pulling from registries without {PROGRAM}", hint="install skopeo") from None


def source(reference: Reference) -> str:
    """Return a reference as skopeo takes it: by the tag where there is one.

    The system's policy may say different things about different tags, and signatures are of one; what is
    fetched is compared with the digest afterwards.
    """
    return f"docker://{reference.identity}"


def sealed(contents: bytes) -> OwnedFd:
    """Return a file in memory that everybody may read and nobody can change."""
    fd = OwnedFd(os.memfd_create("policy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.fchmod(fd.fileno(), 0o444)
        view = memoryview(contents)
        while view:
            view = view[os.write(fd.fileno(), view) :]
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seals)
    except BaseException:
        fd.close()
        raise
    return fd


def failure(reference: Reference, child: Child) -> MountdError:
    """Return the error for a skopeo that has failed."""
    said = child.outputs[-1].kept.decode("utf-8", "replace")
    fatal = MESSAGE.findall(said)
    text = re.sub(r"\\(.)", r"\1", fatal[-1]) if fatal else said
    return explain(reference, text, program.excerpt(text, child.code))


def explain(reference: Reference, text: str, shown: str) -> MountdError:
    """Return the error that `text` means, of which `shown` is fit for a message.

    A registry has a say in the text, so that the class of the error is a service to people, and no decision.
    """
    if REJECTED in text:
        return _rejected(reference, text, shown.rpartition(REJECTED)[2])
    if FULL.search(text):
        return StorageFull(f"{reference}: {shown}", hint=FULL_HINT)
    if TAMPERED.search(text):
        return InvalidImage(f"{reference}: what the registry sent is not what was asked for: {shown}")
    if UNPROVEN.search(text):
        reason = f"it does not prove who it is: {shown}"
        return RegistryFailed(reference.host, reason, hint=CA_HINT.format(host=reference.host))
    if MISSING.search(text):
        return NotFound(f"{reference}: {shown}", hint="check the name and the tag")
    if UNREACHABLE.search(text):
        return RegistryFailed(reference.host, f"it cannot be reached: {shown}", hint="try again later")
    hint = CREDENTIALS_HINT if FORBIDDEN.search(text) else None
    return RegistryFailed(reference.host, shown, hint=hint)


def _rejected(reference: Reference, text: str, shown: str) -> MountdError:
    if UNSIGNED in text:
        return SignatureInvalid(f"{reference} is not signed", hint=SIGN_HINT)
    if BY_POLICY in text:
        return DeniedByPolicy(f"the system's policy rejects {reference}", hint=SIGN_HINT)
    if match := OTHER_KEY.search(text) or GPG_KEY_UNKNOWN.search(text):
        reason = f"{reference} is signed with {match[1]}, which the system's policy does not name"
        return KeyUnknown(reason, hint=SIGN_HINT)
    return SignatureInvalid(f"{reference}: {shown}", hint=SIGN_HINT)
