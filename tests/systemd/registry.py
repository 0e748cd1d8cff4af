"""A real registry in the machine, with the keys that images are signed with and the policy about them."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import oci
from tests.oci import Layout, Member, archive
from tests.systemd.machine import HERE, Machine

HOST = "registry.example.com:5000"
PLACE = "/var/lib/test"
BLOBS = "var/lib/docker-registry/docker/registry/v2/blobs/sha256"
HELLO = b"hello from the registry\n"
POLICY = "etc/containers/policy.json"

# What a service that pulls needs, and no more.
PROPERTIES = (
    "CapabilityBoundingSet=CAP_SYS_ADMIN CAP_SETUID CAP_SETGID CAP_CHOWN CAP_DAC_OVERRIDE CAP_KILL",
    "LockPersonality=yes",
    "MemoryDenyWriteExecute=yes",
    "MemoryMax=1G",
    "NoNewPrivileges=yes",
    "PrivateDevices=yes",
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectHome=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectSystem=strict",
    f"ReadWritePaths={PLACE} /var/lib/docker-registry /var/lib/lookaside",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
    "RestrictNamespaces=mnt pid net ipc uts",
    "RestrictRealtime=yes",
    "SystemCallArchitectures=native",
    "SystemCallFilter=~@clock @cpu-emulation @debug @module @obsolete @raw-io @reboot @swap",
    "SystemCallErrorNumber=EPERM",
    "TasksMax=512",
    "UMask=0077",
)


def gpg(name: str = "team") -> dict[str, object]:
    return {"type": "signedBy", "keyType": "GPGKeys", "keyPath": f"/etc/keys/{name}.gpg"}


def sigstore(name: str, identity: str = "matchRepository") -> dict[str, object]:
    return {
        "type": "sigstoreSigned",
        "keyPath": f"/etc/keys/{name}.pub",
        "signedIdentity": {"type": identity},
    }


def rules() -> dict[str, Any]:
    """The policy: who has to have signed what, by repository."""
    return {
        "default": [{"type": "reject"}],
        "transports": {
            "docker": {
                f"{HOST}/gpg": [gpg()],
                f"{HOST}/sigstore": [sigstore("sigstore", "matchRepoDigestOrExact")],
                f"{HOST}/cosign": [sigstore("cosign")],
                f"{HOST}/both": [gpg(), sigstore("sigstore", "matchRepoDigestOrExact")],
                f"{HOST}/open": [{"type": "insecureAcceptAnything"}],
                f"{HOST}/open/closed": [{"type": "reject"}],
                "unproven.example.com:5000": [gpg()],
                "registry.example.com:5999": [gpg()],
            }
        },
    }


def layer(*more: Member) -> bytes:
    """A layer with what a layer may have, and what is to be left out of it."""
    return archive(
        oci.directory("./", mode=0o755),
        oci.directory("./etc", mode=0o700, uid=7),
        Member("./etc/hello", HELLO, mode=0o640, uid=1000, xattrs={"user.colour": "blue"}),
        Member("./deep/er/than/that", b"x" * 100_000),
        Member("./link", type=tarfile.SYMTYPE, link="/etc/hello"),
        Member("./hard", type=tarfile.LNKTYPE, link="./etc/hello"),
        Member("./null", type=tarfile.CHRTYPE, device=(1, 3)),
        Member("./capable", b"#!", xattrs={"security.capability": "x", "trusted.overlay.opaque": "y"}),
        Member("./" + "long/" * 30 + "n" * 200, b"long", mtime=oci.TIME + 0.5),
        Member("./.wh.gone", b""),
        *more,
    )


@dataclass
class Registry:
    """The machine's registry, and what was pushed to it."""

    machine: Machine
    count: int = 0
    pushed: dict[str, str] = field(default_factory=dict)

    def inside(self, name: str) -> tuple[Path, str]:
        """A new path in the machine, as the host and as the machine has it."""
        self.count += 1
        path = f"{PLACE}/{name}-{self.count}"
        return self.machine.root / path.lstrip("/"), path

    def push(self, layout: str, name: str, *options: str) -> str:
        """Copy a layout of the machine to the registry; return its digest there."""
        environment = ["env", f"GNUPGHOME={PLACE}/gnupg"]
        digest_file = f"{PLACE}/digest"
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", *options, f"--digestfile={digest_file}"]
        self.machine.run([*environment, *command, f"oci:{layout}", f"docker://{HOST}/{name}"])
        return (self.machine.root / digest_file.lstrip("/")).read_text().strip()

    def image(
        self, name: str, *options: str, archives: tuple[bytes, ...] = (), compression: str = "gzip"
    ) -> str:
        """Make an image and push it."""
        host, path = self.inside("layout")
        layout = Layout(host)
        layout.close(layout.image(archives or (layer(),), compression=compression))
        return self.push(path, name, *options)

    def cosign(self, name: str, digest: str) -> None:
        """Sign with the real cosign, without any log."""
        environment = ["env", "COSIGN_PASSWORD=", f"SSL_CERT_FILE={PLACE}/tls/ca.crt", "HOME=/root"]
        command = ["cosign", "sign", f"--key={PLACE}/cosign.key", "--tlog-upload=false", "--yes"]
        self.machine.run([*environment, *command, f"{HOST}/{name}@{digest}"])

    def pull(self, reference: str, **arguments: Any) -> dict[str, Any]:
        """Pull with mountd as root, under the limits of a service; say what came of it."""
        arguments = {"work": self.inside("work")[1], "reference": reference, **arguments}
        script = (HERE / "inside/pull_image.py").read_text()
        confined = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect"]
        confined += [f"--property={each}" for each in PROPERTIES]
        python = ["python3", "-I", "-W", "error", "-", json.dumps(arguments)]
        done = self.machine.run([*confined, *python], input=script, check=False)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert isinstance(answer, dict)
        return {"work": arguments["work"], **answer}

    def refused(self, reference: str, error: str, **arguments: Any) -> dict[str, Any]:
        """Pull what has to be refused with `error`, and look that nothing of it is left."""
        answer = self.pull(reference, **arguments)
        assert answer.get("error") == error, answer
        assert answer["left"] == []
        return answer

    def blob(self, digest: str) -> Path:
        """The file in which the registry keeps a blob."""
        hex = digest.removeprefix("sha256:")
        return self.machine.root / BLOBS / hex[:2] / hex / "data"

    def policy(self, value: object) -> None:
        path = self.machine.root / POLICY
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        path.chmod(0o644)

    @property
    def sign_gpg(self) -> tuple[str, ...]:
        return ("--sign-by=team@example.com",)

    @property
    def sign_sigstore(self) -> tuple[str, ...]:
        return (
            f"--sign-by-sigstore-private-key={PLACE}/sigstore.private",
            f"--sign-passphrase-file={PLACE}/passphrase",
        )


def key_digest(registry: Registry, name: str) -> str:
    return oci.digest((registry.machine.root / "etc/keys" / name).read_bytes())


def look(registry: Registry, work: str, name: str, script: str) -> str:
    """Mount an image that was made, and run a script in it."""
    return registry.machine.sh(
        f"mount -t erofs -o loop,ro {work}/{name} /mnt; cd /mnt; {script.strip()}; cd /; umount /mnt"
    )


def check_provenance(registry: Registry, answer: dict[str, Any], name: str, digest: str) -> dict[str, Any]:
    provenance = answer["provenance"]
    manifest = json.loads(registry.blob(digest).read_text())
    assert provenance["repository"] == f"{HOST}/{name}"
    assert provenance["manifest"] == digest
    assert provenance["layers"] == [each["digest"] for each in manifest["layers"]]
    assert provenance["time"] > oci.TIME
    assert answer["phases"] == ["resolve", "fetch", "verify", "build"]
    assert answer["left"] == [each["name"] for each in answer["layers"]]
    assert isinstance(provenance, dict)
    return provenance
