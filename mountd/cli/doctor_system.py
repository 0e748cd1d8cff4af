"""What mountctl doctor looks at outside of the policy: kernel, units, daemon, files, programs, polkit."""

from __future__ import annotations

import os
import stat

from mountd.cli.checks import FAIL, OK, WARN, Finding, not_roots, output, which
from mountd.client import Client, socket_paths
from mountd.errors import ADMIN_INTERFACE, DeniedByPolicy, MountdError, RemoteError
from mountd.fds import close_all
from mountd.kernel import features
from mountd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SECONDS = 10.0  # for the daemon
UNITS = ("mountd.socket", "mountd.service", "mountd-pull.socket", "mountd-pull.service")
PROPERTIES = ("LoadState", "UnitFileState", "ActiveState", "Result")
# As in mountd.store.program and mountd.service.consent, not imported on this side; a test compares.
PULLING_USER = "mountd-pull"
ACTIONS = tuple(
    f"io.mountd.{each}" for each in ("mount-image", "mount-image-writable", "mount-tmpfs", "import-image")
)
ACTIONS_FILE = "/usr/share/polkit-1/actions/io.mountd.policy"
RUNTIME_DIR = "/run/mountd"
STATE_DIR = "/var/lib/mountd"

LINUX = "Linux 6.8 or later is needed, and no sandbox (seccomp) that forbids it"
# What it means that a feature is missing, and what to do; FAIL for what nothing goes without, OK for what
# mountd does without.
MISSING = {
    "fsopen": (FAIL, "mountd cannot mount anything", LINUX),
    "mount_setattr": (FAIL, "what mountd mounts cannot be restricted", LINUX),
    "idmapped-mounts": (FAIL, "ids cannot be mapped for containers", LINUX),
    "statmount": (FAIL, "no image can be trusted for where it lies", LINUX),
    "listmount": (WARN, "it cannot be told what is mounted where", LINUX),
    "open_tree_attr": (WARN, "a mount is copied and changed in two steps", "Linux 6.15 does it in one"),
    "erofs-on-files": (WARN, "a loop device is used for erofs images", "Linux 6.12 needs none"),
    "user-namespaces": (WARN, "users cannot start containers, nor use “mountctl run”",
                        "sysctl user.max_user_namespaces=16384, and look at what AppArmor restricts"),
    "loop": (WARN, "only erofs images can be mounted", "modprobe loop"),
    "fuse": (OK, "there is no FUSE, and mountd does without", ""),
    "dm-verity": (WARN, "images with dm-verity cannot be mounted", "modprobe dm-verity"),
    "dm-crypt": (WARN, "encrypted images cannot be opened", "modprobe dm-crypt"),
    "fs-verity": (WARN, "files of this file system cannot be trusted by fs-verity",
                  "tune2fs -O verity DEVICE for an ext4 on a kernel that has it"),
}  # fmt: skip
PROGRAMS = {
    "skopeo": "images cannot be pulled from registries",
    "mkfs.erofs": "layers of container images cannot be made into images",
    "zstd": "layers that are compressed with zstd cannot be pulled",
    "mkcomposefs": "a composefs cannot be mounted by its description",
    "gpgv": "signatures of OpenPGP cannot be verified",
    "cryptsetup": "encrypted images (LUKS) cannot be opened",
    "newuidmap": "a user has only one id in what “mountctl run” starts",
}
PACKAGES = {
    "mkcomposefs": "composefs",
    "mkfs.erofs": "erofs-utils",
    "cryptsetup": "cryptsetup-bin",
    "newuidmap": "uidmap",
    "pkcheck": "polkitd",
    "pkaction": "polkitd",
}


def check_kernel() -> list[Finding]:
    """What the kernel lets mountd, or this user, do."""
    found = []
    probed = features.probe()
    lacking = {feature.name for feature in probed if feature.state == features.NO}
    for feature in probed:
        state, means, fix = MISSING[feature.name]
        if feature.name == "loop" and "erofs-on-files" in lacking:
            state, means = FAIL, "no image can be mounted"
        if feature.state == features.YES:
            found.append(Finding(feature.name, OK, "works"))
        elif state == OK:
            found.append(Finding(feature.name, OK, means))
        elif feature.state == features.UNKNOWN:
            found.append(Finding(feature.name, WARN, f"not seen: {feature.detail}", "ask again as root"))
        else:
            found.append(Finding(feature.name, state, f"{means}: {feature.detail}", fix))
    return found


def check_units() -> list[Finding]:
    """Whether systemd has the units, starts them at boot, and has them running."""
    if not os.path.isdir("/run/systemd/system"):
        return [Finding("systemd", OK, "it does not run here, so that there are no units to look at")]
    systemctl = which("systemctl")
    if systemctl is None:
        return [Finding("systemd", WARN, "there is no systemctl to ask", "install systemd")]
    found = []
    for unit in UNITS:
        code, said, complaint = output([systemctl, "show", "--property", ",".join(PROPERTIES), "--", unit])
        if code:
            why = complaint.strip() or f"systemctl ends with {code}"
            found.append(Finding(unit, WARN, f"systemd does not say: {why}", "ask again as root"))
            continue
        found.append(
            unit_finding(unit, dict(each.split("=", 1) for each in said.splitlines() if "=" in each))
        )
    return found


def unit_finding(unit: str, properties: dict[str, str]) -> Finding:
    """Return what there is to say about one unit."""
    active, enabled = properties.get("ActiveState", ""), properties.get("UnitFileState", "")
    if properties.get("LoadState") == "masked":
        return Finding(unit, FAIL, "it is masked", f"systemctl unmask {unit}")
    if properties.get("LoadState") != "loaded":
        needed = FAIL if unit.startswith("mountd.") else WARN
        text = f"it is not there ({properties.get('LoadState', 'unknown')})"
        return Finding(unit, needed, text, "install mountd with its units, then systemctl daemon-reload")
    if active == "failed":
        text = f"it has failed ({properties.get('Result', 'unknown')})"
        fix = f"journalctl -u {unit} says why; then systemctl reset-failed {unit}"
        return Finding(unit, FAIL, text, fix)
    if unit.endswith(".service"):
        # Its socket starts it; when idle, it ends.
        return Finding(unit, OK, f"installed, {active}")
    if active != "active":
        state = FAIL if unit == "mountd.socket" else WARN
        return Finding(unit, state, f"it is {active or 'unknown'}", f"systemctl enable --now {unit}")
    if enabled not in ("enabled", "enabled-runtime", "static", "linked", "alias", "indirect", "generated"):
        text = f"active, but {enabled or 'not enabled'}: gone after a boot"
        return Finding(unit, WARN, text, f"systemctl enable {unit}")
    return Finding(unit, OK, f"{enabled}, {active}")


class Places:
    """Where things are: as the daemon says it, to root; else where they usually are."""

    __slots__ = ("policy", "runtime", "sockets", "state")

    def __init__(self, status: dict[str, Any] | None) -> None:
        """`status` is a reply of Status, None where there is none."""
        told = status or {}
        self.sockets: list[str] = told.get("sockets") or list(socket_paths())
        directories = {os.path.dirname(each) for each in told.get("sockets") or () if each[:1] == "/"}
        self.runtime: list[str] = sorted(directories) or [RUNTIME_DIR]
        self.state: str = (told.get("store") or {}).get("path") or STATE_DIR
        # Empty for the system's own, also where the daemon knows none as its policy was never read.
        self.policy: tuple[str, ...] = tuple((told.get("policy") or {}).get("directories") or ())


def places() -> Places:
    """Return where things are; whatever the daemon does not say is told by the other checks."""
    for path in socket_paths():
        try:
            with Client(path, timeout=SECONDS) as client:
                reply, fds = client.call(f"{ADMIN_INTERFACE}.Status", {}, [])
            close_all(fds)
        except (MountdError, OSError):
            continue
        return Places(reply)
    return Places(None)


def check_daemon() -> list[Finding]:
    """Whether a socket is there, somebody answers at it, and how that one does."""
    failures = []
    for path in socket_paths():
        try:
            with Client(path, timeout=SECONDS) as client:
                reply, fds = client.call("org.varlink.service.GetInfo", {}, [])
            close_all(fds)
        except (MountdError, OSError) as error:
            text = str(error).removeprefix("cannot reach mountd: ")
            failures.append(text if path in text else f"{path}: {text}")
            continue
        return [answering(path, str(reply.get("version"))), *check_status(path)]
    fix = "systemctl enable --now mountd.socket; in a container, mount the host's at /run/host/mountd"
    return [Finding("socket", FAIL, f"nobody answers: {'; '.join(failures)}", fix)]


def answering(path: str, version: str) -> Finding:
    """Return what there is to say about who answers."""
    if version == VERSION:
        return Finding("socket", OK, f"{path}: mountd {version} answers")
    text = f"{path}: mountd {version} answers, and this is mountctl {VERSION}"
    return Finding("socket", WARN, text, "systemctl restart mountd.service")


def check_status(path: str) -> list[Finding]:
    """What the daemon says of itself, to root."""
    try:
        with Client(path, timeout=SECONDS) as client:
            reply, fds = client.call(f"{ADMIN_INTERFACE}.Status", {}, [])
        close_all(fds)
    except DeniedByPolicy as error:
        return [Finding("status", WARN, f"not seen: {error.parameters.get('reason')}", "ask again as root")]
    except RemoteError as error:
        fix = "systemctl restart mountd.service"
        return [Finding("status", WARN, f"the daemon does not say: {error}", fix)]
    except (MountdError, OSError) as error:
        fix = "look into the journal of mountd.service"
        return [Finding("status", FAIL, f"the daemon does not say: {error}", fix)]
    return list(status_findings(reply))


def status_findings(reply: dict[str, Any]) -> list[Finding]:
    """Return what there is to say about a reply of Status."""
    policy, pool, store = reply["policy"], reply["pool"], reply["store"]
    found = []
    if policy["broken"]:
        found.append(Finding("policy in force", FAIL, "none: everything is denied", "mountctl policy check"))
    elif policy["faults"]:
        text = "the files have faults, and the policy from before them is in force"
        found.append(Finding("policy in force", FAIL, text, "mountctl policy check, then policy reload"))
    else:
        text = f"{policy['rules']} rules, {policy['keys']} keys, read without fault"
        found.append(Finding("policy in force", OK, text))
    if pool["stuck"]:
        text = f"{pool['stuck']} hang in the kernel, for the sake of file systems that do not answer"
        found.append(Finding("workers", WARN, text, "look for unreachable servers and FUSE that hangs"))
    else:
        found.append(Finding("workers", OK, f"{pool['workers']}, none of which hangs"))
    if store.get("reason"):
        found.append(Finding("store", WARN, store["reason"], "journalctl -u mountd.service"))
    else:
        found.append(Finding("store", OK, f"{store['images']} images"))
    lacking = [each["name"] for each in reply["kernel"] if not each["available"]]
    bad = [name for name in lacking if MISSING.get(name, (WARN,))[0] == FAIL]
    if bad:
        text = f"it cannot use: {', '.join(bad)}"
        found.append(Finding("kernel as the daemon has it", FAIL, text, "look at what its unit restricts"))
    return found


def check_permissions(where: Places) -> list[Finding]:
    """Whether nobody else can change what mountd relies on, and everybody can reach its socket."""
    found = [check_place(each, "the socket's directory", None) for each in where.runtime]
    found.append(check_place(where.state, "the store's directory", 0o700))
    for path in where.sockets:
        try:
            mode = os.stat(path).st_mode
        except OSError:
            continue  # told elsewhere
        if not stat.S_ISSOCK(mode):
            found.append(
                Finding(path, FAIL, "it is no socket", f"rm {path}; systemctl restart mountd.socket")
            )
        elif mode & 0o666 != 0o666:
            text = f"its mode is {mode & 0o777:04o}, so that not everybody can ask"
            found.append(Finding(path, WARN, text, f"chmod 0666 {path}"))
        else:
            found.append(Finding(path, OK, "everybody can ask"))
    return found


def check_place(path: str, what: str, mode: int | None) -> Finding:
    """Return what there is to say about a directory of mountd's own."""
    try:
        why = not_roots(path)
        found = stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        return Finding(path, WARN, f"{what} is not there yet", "it is made when mountd first starts")
    except OSError as error:
        return Finding(path, WARN, f"not seen: {error.strerror}", "ask again as root")
    if why is not None:
        return Finding(path, FAIL, why, f"chown root: and chmod go-w, for {path} and what it lies in")
    if mode is not None and found != mode:
        text = f"{what} has the mode {found:04o} instead of {mode:04o}"
        return Finding(path, FAIL if found & 0o077 else WARN, text, f"chmod {mode:04o} {path}")
    return Finding(path, OK, f"root's, mode {found:04o}")


def check_programs() -> list[Finding]:
    """Whether the programs are there that mountd calls, and the user that some run as."""
    found = []
    for program, without in PROGRAMS.items():
        path = which(program)
        if path is None:
            fix = f"apt-get install {PACKAGES.get(program, program)}"
            found.append(Finding(program, WARN, f"it is not there: {without}", fix))
        else:
            found.append(Finding(program, OK, path))
    return [*found, pulling_user()]


def pulling_user() -> Finding:
    """Whether what is pulled is unpacked by a user that does nothing else."""
    import pwd

    try:
        uid = pwd.getpwnam(PULLING_USER).pw_uid
    except KeyError:
        text = "there is no such user: what is pulled is unpacked by “nobody”, as whom others may run, too"
        return Finding(PULLING_USER, WARN, text, "systemd-sysusers mountd.conf")
    return Finding(PULLING_USER, OK, f"uid {uid}")


def check_polkit() -> list[Finding]:
    """Whether an administrator can be asked, as rules with the verdict “ask” want it."""
    found = []
    for program in ("pkcheck", "pkaction"):
        path = which(program)
        if path is None:
            text = "it is not there: rules with the verdict “ask” deny"
            found.append(Finding(program, WARN, text, f"apt-get install {PACKAGES[program]}"))
        elif program == "pkcheck":
            found.append(Finding(program, OK, path))
        else:
            found += polkit_findings(*output([path]))
    return found


def polkit_findings(code: int, said: str, complaint: str) -> list[Finding]:
    """Return what there is to say about polkit, from what pkaction(1) says."""
    if code:
        lines = complaint.strip().splitlines() or [f"pkaction ends with {code}"]
        fix = "systemctl start dbus.service polkit.service"
        return [Finding("polkitd", WARN, f"it does not answer: {lines[-1]}", fix)]
    lacking = [each for each in ACTIONS if each not in said.split()]
    if lacking:
        text = f"polkit does not know {', '.join(lacking)}: rules with the verdict “ask” deny"
        actions = Finding("actions", WARN, text, f"install mountd with its {ACTIONS_FILE}")
    else:
        actions = Finding("actions", OK, "polkit knows them all")
    return [Finding("polkitd", OK, "it answers"), actions]
