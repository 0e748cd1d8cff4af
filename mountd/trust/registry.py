"""The patterns of `registry`: repositories of a registry in their canonical form, "HOST[:PORT]/PATH".

Nothing is made canonical here. What is not written as the record of a pull has it can never match, and is an
error rather than a rule that silently never applies: upper case, names in other scripts, a tag, a digest.
The host is compared as a whole, port included, so that no other host looks like it.
"""

from __future__ import annotations

import re

MAXIMUM_LENGTH = 255
LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
HOST = re.compile(rf"{LABEL}(\.{LABEL})*")
PORT = re.compile(r"[1-9][0-9]{0,4}")
# A component of a path, as registries have it: words with one separator between them.
COMPONENT = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*")
# Short for what stands in the record; the record has the full name.
ALIASES = {"index.docker.io": "docker.io", "registry-1.docker.io": "docker.io"}


def check_pattern(pattern: str) -> None:
    """Raise ValueError, saying why, if `pattern` is not HOST[:PORT]/PATH, whose last component may be *."""
    if len(pattern) > MAXIMUM_LENGTH:
        raise ValueError(f"it is longer than {MAXIMUM_LENGTH} characters")
    if not pattern.isascii() or not pattern.isprintable():
        raise ValueError("it is not plain ASCII; write a host name in its xn-- form")
    if "://" in pattern or pattern.startswith("oci:"):
        raise ValueError("it has a scheme; start it with the host")
    authority, slash, path = pattern.partition("/")
    check_host(authority)
    if not slash:
        raise ValueError("it has no path; write HOST/* for all repositories of a host")
    components = path.split("/")
    if components[-1] == "*":
        components.pop()
    for component in components:
        if "@" in component or ":" in component:
            raise ValueError("it has a tag or a digest; the rule is about repositories, write it without")
        if "*" in component:
            raise ValueError("“*” can only be the whole last component")
        if COMPONENT.fullmatch(component) is None:
            raise ValueError(f"“{component}” is no component of a repository; they are lower case")
    if authority == "docker.io" and len(path.split("/")) == 1 and path != "*":
        raise ValueError(f"the full name of the repository is docker.io/library/{path}")


def check_host(authority: str) -> None:
    """Raise ValueError unless this is HOST[:PORT] in its canonical form."""
    host, colon, port = authority.partition(":")
    if HOST.fullmatch(host) is None:
        raise ValueError(f"“{authority}” is no host in lower case")
    if colon and (PORT.fullmatch(port) is None or int(port) > 65535):
        raise ValueError(f"“{port}” is no port")
    if not colon and "." not in host and host != "localhost":
        raise ValueError(f"“{host}” is no full name of a host; write it with its domain or port")
    if host in ALIASES:
        raise ValueError(f"the canonical name of “{host}” is {ALIASES[host]}")


def is_canonical(repository: str) -> bool:
    """Whether this is the canonical name of one repository."""
    try:
        check_pattern(repository)
    except ValueError:
        return False
    return not repository.endswith("*")


def matches(pattern: str, repository: str) -> bool:
    """Whether `repository` matches `pattern`, which `check_pattern` has accepted.

    `*` stands for one or more components.
    """
    if not is_canonical(repository):
        return False
    if pattern.endswith("/*"):
        return repository.startswith(pattern[:-1])
    return repository == pattern
