"""What mountctl doctor looks at in the policy: the files, what is in them, and the keys that they name."""

from __future__ import annotations

import json
import os
import stat
import time

from mountd.cli import policy
from mountd.cli.checks import FAIL, OK, WARN, Finding, is_root, not_roots, output, which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# As in mountd.trust.directories, which this side does not import; a test compares them.
DIRECTORIES = tuple(f"{each}/mountd/policy.d" for each in ("/etc", "/run", "/usr/local/lib", "/usr/lib"))
KINDS = ("x509", "ed25519", "ecdsa", "sigstore", "gpg")
NO_RULES = "there are none: everything is denied"
SOON = 30 * 86400  # seconds before the end of a certificate
DAY = "%Y-%m-%d"
# Prints the end of each certificate of each file: it needs a package that this side does without.
CERTIFICATES = """\
import json, sys, calendar, warnings
warnings.simplefilter("ignore")
from cryptography import x509
found = {}
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        data = file.read(1 << 20)
    if b"-----BEGIN" in data:
        marker = b"-----END CERTIFICATE-----"
        parts = [part + marker for part in data.split(marker)[:-1]]
        all = [x509.load_pem_x509_certificate(part[part.index(b"-----BEGIN"):]) for part in parts]
    else:
        all = [x509.load_der_x509_certificate(data)]
    found[path] = [
        int(calendar.timegm(
            getattr(each, "not_valid_after_utc", None).utctimetuple()
            if hasattr(each, "not_valid_after_utc") else each.not_valid_after.utctimetuple()
        ))
        for each in all
    ]
print(json.dumps(found))
"""


def check_policy(directories: tuple[str, ...] = ()) -> list[Finding]:
    """Look at the system's policy, or at that in `directories`."""
    found = [check_directory(each) for each in directories or DIRECTORIES]
    # What is not there is a fault of a command line that names it, but none of a policy.
    named = () if directories == DIRECTORIES else directories
    directories = tuple(each for each in named if os.path.isdir(each))
    if named and not directories:
        return [*found, Finding("rules", WARN, NO_RULES, f"add a file to {named[0]}: mountd.policy(5)")]
    code, said, complaint = output(policy.command(["check", "--json", *directories]))
    try:
        told = json.loads(said)
    except ValueError:
        told = None
    if not isinstance(told, list):  # but an error, or nothing
        why = (complaint.strip().splitlines() or [f"it ends with {code}"])[-1]
        fix = "install the packages that mountd depends on"
        return [*found, Finding("check", FAIL, f"the policy cannot be read: {why}", fix)]
    found += [problem(each) for each in told]
    if any(each["level"] == "error" for each in told):
        return found
    code, said, complaint = output(policy.command(["show", "--json", *directories]))
    try:
        entries = json.loads(said) if said.startswith("[") else []
    except ValueError:
        entries = []
    rules = sum("rule" in each for each in entries)
    if not rules and not told:
        fix = f"add a file to {(directories or DIRECTORIES)[0]}: mountd.policy(5)"
        found.append(Finding("rules", WARN, NO_RULES, fix))
    elif rules:
        found.append(Finding("rules", OK, f"{rules} rules without fault"))
    return [*found, *check_keys(entries)]


def check_directory(path: str) -> Finding:
    """Whether nobody but root can add a file of the policy."""
    try:
        why = not_roots(path)
    except FileNotFoundError:
        return Finding(path, OK, "not there, which is fine")
    except OSError as error:
        return Finding(path, WARN, f"not seen: {error.strerror}", "ask again as root")
    if why is not None:
        return Finding(path, FAIL, why, f"chown root: and chmod go-w, for {path} and what it lies in")
    return Finding(path, OK, "nobody but root can change it")


def problem(each: dict[str, Any]) -> Finding:
    """Return what “mountctl policy check” says; what only this user may not read is no fault."""
    file = str(each["file"])
    where = file if each["line"] is None else f"{file}:{each['line']}"
    text = ": ".join(part for part in (str(each["key"]), str(each["reason"])) if part)
    if not is_root() and os.path.lexists(file) and not os.access(file, os.R_OK):
        return Finding(where or "policy", WARN, f"not seen: {text}", "ask again as root")
    if not is_root() and "Permission denied" in text:
        return Finding(where or "policy", WARN, f"not seen: {text}", "ask again as root")
    state = FAIL if each["level"] == "error" else WARN
    return Finding(where or "policy", state, text, "mountd.policy(5); then mountctl policy reload")


def check_keys(entries: list[dict[str, Any]]) -> list[Finding]:
    """Look at the files with keys that the policy names, and at when what is in them ends."""
    found = []
    for entry in entries:
        if "key" not in entry:
            continue
        kind = next((kind for kind in KINDS if isinstance(entry["table"].get(kind), str)), None)
        if kind is None:
            continue
        path = str(entry["table"][kind])
        finding = check_key(str(entry["key"]), path)
        found.append(finding)
        if finding.state == OK and kind == "x509":
            found.append(certificates(str(entry["key"]), path))
        elif finding.state == OK and kind == "gpg":
            found.append(gpg_keys(str(entry["key"]), path))
    return found


def check_key(name: str, path: str) -> Finding:
    """Whether a file with keys is root's alone to change, and can be read."""
    label = f"key “{name}”"
    try:
        why = not_roots(path)
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except PermissionError:
        return Finding(label, WARN, f"not seen: {path} cannot be read by this user", "ask again as root")
    except OSError as error:
        return Finding(label, FAIL, f"{path}: {error.strerror}", "put the file there, or take the key out")
    if why is not None:
        return Finding(label, FAIL, why, f"chown root: and chmod go-w, for {path} and what it lies in")
    return Finding(label, OK, f"{path} is root's")


def certificates(name: str, path: str) -> Finding:
    """When the certificates in a file, or in the .crt files of a directory, end."""
    import sys

    label = f"key “{name}”"
    files = [path]
    if stat.S_ISDIR(os.stat(path).st_mode):
        files = sorted(os.path.join(path, each) for each in os.listdir(path) if each.endswith(".crt"))
    python = sys.executable or "/usr/bin/python3"
    code, said, complaint = output([python, "-I", "-c", CERTIFICATES, *files])
    if code:
        why = (complaint.strip().splitlines() or [f"it ends with {code}"])[-1]
        return Finding(label, WARN, f"when its certificates end is not known: {why}", "look at the file")
    return ending(label, [end for ends in json.loads(said).values() for end in ends], "certificate")


def gpg_keys(name: str, path: str) -> Finding:
    """When the keys of OpenPGP in a file end; that is read by gpg, if it is there."""
    label, gpg = f"key “{name}”", which("gpg")
    if gpg is None:
        return Finding(label, WARN, "when it ends is not known: there is no gpg", "apt-get install gpg")
    command = [gpg, "--no-options", "--batch", "--homedir", "/nonexistent", "--no-default-keyring"]
    code, said, complaint = output([*command, "--with-colons", "--show-keys", path])
    if code and not said:
        why = (complaint.strip().splitlines() or [f"gpg ends with {code}"])[-1]
        return Finding(label, WARN, f"when it ends is not known: {why}", "look at the file")
    return ending(label, list(gpg_ends(said)), "key")


def gpg_ends(said: str) -> Iterator[int]:
    """Yield the end of each primary key in the output of gpg --with-colons, as far as there is one."""
    for line in said.splitlines():
        fields = line.split(":")
        if fields[0] == "pub" and len(fields) > 6 and fields[6].isdecimal():
            yield int(fields[6])


def ending(label: str, ends: list[int], what: str) -> Finding:
    """Return what there is to say about when something ends; the first of them counts."""
    now = time.time()
    if not ends:
        return Finding(label, OK, f"no {what} in it ends")
    first = min(ends)
    day = time.strftime(DAY, time.gmtime(first))
    fix = "get a new one, put it beside the old one, then mountctl policy reload"
    if first <= now:
        return Finding(label, FAIL, f"a {what} in it has ended on {day}", fix)
    if first <= now + SOON:
        return Finding(label, WARN, f"a {what} in it ends soon, on {day}", fix)
    return Finding(label, OK, f"no {what} in it ends before {day}")
