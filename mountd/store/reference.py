"""Names of images in registries, `oci:HOST[:PORT]/REPOSITORY[:TAG][@sha256:DIGEST]`, in one spelling.

Trust goes by the name, so that two spellings of one name, or two names that look alike, are refused instead
of being made equal: upper case, other alphabets, shortened digests, names without a host, and those that
skopeo would take for others (docker.io's, containers-transports(5)). Nothing here does I/O.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from mountd.errors import InvalidParameter

SCHEME = "oci:"
DEFAULT_TAG = "latest"
MAXIMUM_LENGTH = 1024
MAXIMUM_NAME = 255  # host and repository, as registries have it
MAXIMUM_HOST = 253
MAXIMUM_LABEL = 63
MAXIMUM_PORT = 65535
# \Z nowhere: these are used with fullmatch() only.
LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
PORT = re.compile(r"[1-9][0-9]{0,4}")
# Other names of docker.io, which skopeo takes for the same.
ALIASES = ("index.docker.io", "registry-1.docker.io")


@dataclass(frozen=True, slots=True)
class Reference:
    """An image in a registry: `host` with its port if any, `path` of the repository there, and which one.

    At least one of `tag` and `digest` is there; with both, the tag has to lead to the digest when the image
    is pulled, and the digest is what counts when it is mounted.
    """

    host: str
    path: str
    tag: str | None
    digest: str | None

    @property
    def repository(self) -> str:
        """The name that trust goes by, "HOST[:PORT]/PATH"."""
        return f"{self.host}/{self.path}"

    @property
    def identity(self) -> str:
        """The full name as containers-policy.json(5) has it: by the tag, where there is one."""
        return (
            f"{self.repository}:{self.tag}" if self.tag is not None else f"{self.repository}@{self.digest}"
        )

    def __str__(self) -> str:
        at = f"@{self.digest}" if self.tag is not None and self.digest is not None else ""
        return f"{SCHEME}{self.identity}{at}"


def refuse(reason: str) -> NoReturn:
    """Raise InvalidParameter about the reference."""
    raise InvalidParameter("reference", reason)


def parse(text: str) -> Reference:
    """Return the reference that `text` spells. Raises InvalidParameter, with the way to write it."""
    if len(text) > MAXIMUM_LENGTH:
        refuse(f"it is longer than {MAXIMUM_LENGTH} characters")
    if not text.isascii() or not text.isprintable() or " " in text:
        refuse("it has a character that no registry's name has; only ASCII is allowed")
    if not text.startswith(SCHEME):
        refuse(f"it does not start with “{SCHEME}”; write {SCHEME}HOST/REPOSITORY:TAG")
    rest, at, digest = text.removeprefix(SCHEME).partition("@")
    if at and not DIGEST.fullmatch(digest):
        refuse("its digest is not “sha256:” and 64 hexadecimal digits in lower case; give all of it")
    host, slash, path = rest.partition("/")
    if not slash:
        refuse("it has no host; write HOST/REPOSITORY in full")
    path, colon, tag = path.partition(":")
    if colon and not TAG.fullmatch(tag):
        refuse("its tag is not one: letters, digits, “_”, “.” and “-”, 128 at most")
    check_host(host)
    check_path(host, path)
    return Reference(host, path, tag if colon else None if at else DEFAULT_TAG, digest if at else None)


def check_host(text: str) -> None:
    """Refuse a host that is not spelt as it has to be."""
    host, colon, port = text.partition(":")
    if colon and (not PORT.fullmatch(port) or int(port) > MAXIMUM_PORT):
        refuse("its port is not a number from 1 to 65535")
    if "." not in host and host != "localhost" and not colon:
        refuse(f"“{host}” is not a host; write docker.io/library/NAME for an image of Docker's library")
    if host != host.lower():
        refuse("its host has upper case letters; write it in lower case")
    labels = host.split(".")
    if len(host) > MAXIMUM_HOST or any(len(label) > MAXIMUM_LABEL for label in labels):
        refuse("its host is too long")
    if not all(LABEL.fullmatch(label) for label in labels):
        refuse(f"“{host}” is not the name of a host")
    # What such a name shows to people is not what it is.
    if any(label.startswith("xn--") for label in labels):
        refuse(
            "its host is an internationalised name, which can look like another; there is no way to use it"
        )
    if labels[-1].isdecimal() and not is_address(labels):
        refuse(f"“{host}” is not the address of a host")
    if host in ALIASES:
        refuse(f"“{host}” is another name of docker.io; write docker.io")


def is_address(labels: list[str]) -> bool:
    """Whether the labels are an IPv4 address in its usual spelling, which is the only one."""
    return len(labels) == 4 and all(
        label.isdecimal() and str(int(label)) == label and int(label) < 256 for label in labels
    )


def check_path(host: str, path: str) -> None:
    """Refuse a repository that is not spelt as it has to be."""
    if not all(COMPONENT.fullmatch(component) for component in path.split("/")):
        refuse(
            f"“{path}” is not a repository: lower case letters and digits, with “.”, “_”, “-” between them"
        )
    if len(host) + 1 + len(path) > MAXIMUM_NAME:
        refuse(f"its host and repository are longer than {MAXIMUM_NAME} characters")
    if host == "docker.io" and "/" not in path:
        refuse(f"docker.io/{path} is short for another name; write docker.io/library/{path}")
