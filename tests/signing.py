"""Keys, certificates and signatures, made by the programs that people make them with: openssl and gpg."""

from __future__ import annotations

import subprocess
from pathlib import Path

from mountd.evidence.model import Key

ALGORITHMS = {
    "p256": ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"),
    "p384": ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"),
    "p521": ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521"),
    "k256": ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"),
    "rsa1024": ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"),
    "rsa2048": ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"),
    "ed25519": ("-algorithm", "ED25519"),
    "ed448": ("-algorithm", "ED448"),
}
AUTHORITY = "basicConstraints=critical,CA:TRUE"
LEAF = "basicConstraints=CA:FALSE\nkeyUsage=digitalSignature"


def run(*command: object, data: bytes = b"") -> bytes:
    """Run a program, give it `data`, and return what it prints."""
    words = [str(each) for each in command]
    done = subprocess.run(words, input=data, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


class Signatory:
    """A private key and a certificate in files, by a name that is the subject."""

    def __init__(
        self,
        directory: Path,
        name: str,
        algorithm: str = "p256",
        extensions: str = AUTHORITY,
        issuer: Signatory | None = None,
        digest: str = "sha256",
    ) -> None:
        """Make both; without an issuer, the certificate is signed by itself."""
        self.name = name
        self.key = directory / f"{name}.key"
        self.pem = directory / f"{name}.pem"
        run("openssl", "genpkey", *ALGORITHMS[algorithm], "-out", self.key)
        request, options = directory / f"{name}.csr", directory / f"{name}.ext"
        run("openssl", "req", "-new", "-key", self.key, "-subj", f"/CN={name}", "-out", request)
        options.write_text(f"subjectKeyIdentifier=hash\n{extensions}\n")
        signing = ("-CA", issuer.pem, "-CAkey", issuer.key) if issuer else ("-signkey", self.key)
        md = () if (issuer.name if issuer else name).startswith("ed") else (f"-{digest}",)
        run(
            *(
                "openssl",
                "x509",
                "-req",
                "-in",
                request,
                "-days",
                365,
                "-extfile",
                options,
                "-out",
                self.pem,
            ),
            *("-set_serial", 1 + sum(name.encode()), *md, *signing),
        )

    @property
    def public(self) -> bytes:
        """The public key in PEM."""
        return run("openssl", "pkey", "-in", self.key, "-pubout")

    @property
    def der(self) -> bytes:
        """The certificate in DER."""
        return run("openssl", "x509", "-in", self.pem, "-outform", "DER")

    def anchor(self, name: str = "team") -> Key:
        """The certificate as a key of the policy."""
        return Key(name, "x509", (self.pem.read_bytes(),), str(self.pem))

    def bare(self, kind: str, name: str = "team") -> Key:
        """The public key alone as a key of the policy."""
        return Key(name, kind, (self.public,), str(self.key))

    def cms(self, data: bytes, *options: object) -> bytes:
        """A detached signature with attributes and certificates, as `openssl cms` makes it."""
        return run(
            *("openssl", "cms", "-sign", "-binary", "-outform", "DER"),
            *("-signer", self.pem, "-inkey", self.key, *options),
            data=data,
        )

    def roothash(self, data: bytes, *options: object) -> bytes:
        """A signature as systemd's tools make it of a root hash: without attributes and certificates."""
        return run(
            *("openssl", "smime", "-sign", "-nocerts", "-noattr", "-binary", "-outform", "der"),
            *("-signer", self.pem, "-inkey", self.key, *options),
            data=data,
        )

    def raw(self, data: bytes, digest: str = "sha256") -> bytes:
        """An ECDSA signature, as `openssl dgst` makes it, and cosign before its base64."""
        return run("openssl", "dgst", f"-{digest}", "-sign", self.key, data=data)

    def ed25519(self, data: bytes, directory: Path) -> bytes:
        """An Ed25519 signature, which openssl makes of files only."""
        (directory / "signed").write_bytes(data)
        return run("openssl", "pkeyutl", "-sign", "-rawin", "-inkey", self.key, "-in", directory / "signed")


class Gpg:
    """A home of gpg with keys in it, whose path has to be short: its agent listens in it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(mode=0o700, exist_ok=True)

    def run(self, *arguments: object, data: bytes = b"") -> bytes:
        """Run gpg there."""
        options = (
            "--homedir",
            self.home,
            "--batch",
            "--quiet",
            "--passphrase",
            "",
            "--pinentry-mode=loopback",
        )
        return run("gpg", *options, *arguments, data=data)

    def generate(
        self, user: str, algorithm: str = "ed25519", expires: str = "never", *options: object
    ) -> None:
        """Make a key that can sign."""
        self.run(*options, "--quick-generate-key", user, algorithm, "sign", expires)

    def key(self, user: str, name: str = "team", *options: object) -> Key:
        """The public key of `user` as a key of the policy."""
        return Key(name, "gpg", (self.run("--export", *options, user),), f"{self.home}/{user}")

    def sign(self, data: bytes, user: str, *options: object) -> bytes:
        """A detached signature."""
        return self.run("--local-user", user, *options, "--detach-sign", data=data)

    def close(self) -> None:
        """End the agent that gpg has started."""
        run("gpgconf", "--homedir", self.home, "--kill", "all")
