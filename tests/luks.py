"""Encrypted volumes, made without device-mapper: the header by cryptsetup(8), the contents by ourselves."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

PASSWORD = "swordfish-4711-secret"
KEY = bytes(range(64))  # of the volume: known, so that contents can be encrypted here
SECTOR = 512
QUICK = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
ARGON2 = (
    "--pbkdf",
    "argon2id",
    "--pbkdf-force-iterations",
    "4",
    "--pbkdf-memory",
    "64",
    "--pbkdf-parallel",
    "2",
)
ROOM, OFFSET = 4 << 20, 1 << 20


@dataclass(frozen=True, slots=True)
class Header:
    """The bytes of a volume up to its data, and the size of the sectors of these."""

    data: bytes
    sector_size: int


def make_header(directory: Path, version: int = 2, *options: str) -> Header:
    """Return the header of a new volume, which is opened by PASSWORD."""
    volume, key = directory / "header.luks", directory / "volume.key"
    with volume.open("wb") as file:
        file.truncate(ROOM)
    key.write_bytes(KEY)
    sector_size = 4096 if version == 2 else SECTOR
    command = [
        "cryptsetup",
        "luksFormat",
        "--batch-mode",
        f"--type=luks{version}",
        f"--volume-key-file={key}",
    ]
    command += ["--key-file=-", "--key-size=512", "--cipher=aes-xts-plain64", *(options or QUICK)]
    if version == 2:
        # As small as it can be, and all keys together.
        command += [
            f"--sector-size={sector_size}",
            "--luks2-keyslots-size=512k",
            f"--offset={OFFSET // SECTOR}",
        ]
    done = subprocess.run([*command, volume], input=PASSWORD.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    data = volume.read_bytes()
    offset = OFFSET if version == 2 else int.from_bytes(data[104:108], "big") * SECTOR
    volume.unlink()
    key.unlink()
    return Header(data[:offset], sector_size)


def encrypted(header: Header, contents: bytes) -> bytes:
    """Return the volume with these contents, which are made to be whole sectors."""
    step = header.sector_size
    contents += bytes(-len(contents) % step)
    made = bytearray(header.data)
    for start in range(0, len(contents), step):
        # The number of the sector, of 512 bytes in any case.
        tweak = (start // SECTOR).to_bytes(16, "little")
        encryptor = Cipher(algorithms.AES(KEY), modes.XTS(tweak)).encryptor()
        made += encryptor.update(contents[start : start + step])
    return bytes(made)


def build_luks(target: Path, header: Header, contents: Path | bytes) -> Path:
    """Write a volume, and return where it is."""
    target.write_bytes(encrypted(header, contents if isinstance(contents, bytes) else contents.read_bytes()))
    return target
