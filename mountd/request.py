"""What a command line asks for, as the parameters and descriptors of a call."""

from __future__ import annotations

import errno
import os
import time

from mountd.errors import InvalidParameter, NotFound, OptionNotPermitted
from mountd.fds import OwnedFd, close_all
from mountd.wire.framing import is_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    # The path of the hash data, the root hash in hexadecimal, the path of a signature of the root hash.
    Verity = tuple[str, str, str | None]

HOST_ID_MAP = ["0", "0", "4294967295"]
IDMAPS = ("none", "namespace", "caller")  # those that need no ranges
TMPFS = "tmpfs:"
TOP_SIZE = "64M"  # of a top in memory for which none is given
STORED = "stored:"
OCI = "oci:"
COMPOSEFS = "composefs:"
MAXIMUM_DESCRIPTION = 64 << 20  # bytes of a composefs as text
MAXIMUM_SIGNATURE = 256 << 10  # bytes
MAXIMUM_KEY = 4096  # bytes
PATIENCE = 60  # seconds for what comes through a pipe
STANDARD_INPUT = 0
MAXIMUM_INTEGER = (1 << 63) - 1
NO_FILE = "there is no such file; see that the path is right"
SOURCES = (
    "there is no such file; or write stored:sha256:… for an image of the store, "
    "oci:HOST/REPOSITORY:TAG for one that was pulled, tmpfs:64M for memory"
)


def open_image(path: str, *, writable: bool = False, hint: str = NO_FILE) -> OwnedFd:
    """Open an image to hand it over; `hint` is what NotFound says. Raises NotFound, OSError."""
    access = os.O_RDWR if writable else os.O_RDONLY
    try:
        # Not to be held up by a pipe, or by a lease on the file.
        return OwnedFd(os.open(path, access | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK))
    except FileNotFoundError:
        raise NotFound(path or "“”", hint=hint) from None


def sealed_copy(file: OwnedFd, path: str) -> OwnedFd:
    """Return what is in `file`, borrowed, as a sealed memfd. Raises InvalidParameter, OSError."""
    import fcntl

    made = OwnedFd(os.memfd_create("mountd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        done = 0
        while piece := os.pread(file.fileno(), 1 << 20, done):
            done += len(piece)
            if done > MAXIMUM_DESCRIPTION:
                raise InvalidParameter("SOURCE", f"{path} is longer than {MAXIMUM_DESCRIPTION} bytes")
            while piece:
                piece = piece[os.write(made.fileno(), piece) :]
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(made.fileno(), fcntl.F_ADD_SEALS, seals)
    except BaseException:
        made.close()
        raise
    return made


def open_directory(path: str) -> OwnedFd:
    """Open a directory to hand it over; one that cannot be read, in a way that proves no access."""
    flags = os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return OwnedFd(os.open(path, flags | os.O_RDONLY))
    except PermissionError:
        return OwnedFd(os.open(path, flags | os.O_PATH))


def in_user_namespace() -> bool:
    """Tell whether this process is in a user namespace that does not map all ids, as the host's does."""
    with open("/proc/self/uid_map", encoding="utf-8") as file:
        return file.read().split() != HOST_ID_MAP


class Request:
    """What a command line asked for, turned into the parameters of Mount and Explain.

    Owns the descriptors that go along.
    """

    __slots__ = ("asks", "fds", "parameters", "source")

    def __init__(
        self,
        source: str,
        *,
        read_only: bool | None = None,
        file_system_type: str | None = None,
        options: Sequence[str] = (),
        userns: str | None = None,
        idmap: str | None = None,
        image_policy: str | None = None,
        signature: str | None = None,
        verity: Verity | None = None,
        interactive: bool | None = None,
        layers: Sequence[str] = (),
        objects: Sequence[str] = (),
        digest: str | None = None,
        check_contents: bool | None = None,
        key_file: str | None = None,
        top: str | None = None,
    ) -> None:
        """Open what has to be opened.

        `source` is the path of an image or of a directory, "stored:sha256:…" for one of mountd's store,
        "oci:HOST/REPOSITORY:TAG" or "…@sha256:…" for one pulled into it, or "tmpfs:SIZE"; "composefs:FILE"
        for an image of metadata or its description, with `objects`, the directories of contents, the
        fs-verity `digest` of the image in hexadecimal, and whether fs-verity has to check contents.
        `read_only` is None for what fits: images are mounted read-only, a tmpfs is not. `userns` is the path
        of a user namespace, "none" for none, None for that of this process if it is not the host's. `layers`
        are such sources as well, which come over it, the topmost first. `top` is what takes what is written:
        "tmpfs:SIZE", "tmpfs" for 64M of it, or the path of a directory in which it stays. `image_policy` is
        in the grammar of systemd.image-policy(7), `signature` the path of a detached signature of the image,
        `verity` the paths of hash data and of the signature of the root hash. With `interactive` an
        administrator may be asked, where the policy wants that. `key_file` has the password of what is
        encrypted, all of it, "-" for the standard input; without, whoever uses this may ask for one on a
        terminal as long as `asks` is true. Raises NotFound, InvalidParameter, OptionNotPermitted, OSError.
        """
        check_text(options, file_system_type, image_policy)
        if read_only is None:
            read_only = top is None and not source.startswith(TMPFS)
        self.fds: list[OwnedFd] = []
        about = (objects, digest, check_contents)
        self.parameters: dict[str, object] = {
            "readOnly": read_only,
            "fileSystemType": file_system_type,
            "options": list(options) or None,
            "idMap": {"kind": idmap} if idmap else None,
            "imagePolicy": image_policy,
            "interactive": interactive,
            "password": None if key_file is None else read_key(key_file),
        }
        self.asks = key_file is None
        try:
            self.source = self._read_all(source, layers, about, top, read_only=read_only)
            self._add_companions(signature, verity)
            self._add_own_namespace(userns, idmap)
        except BaseException:
            self.close()
            raise

    def _read_all(
        self,
        source: str,
        layers: Sequence[str],
        about: tuple[Sequence[str], str | None, bool | None],
        top: str | None,
        *,
        read_only: bool,
    ) -> dict[str, object]:
        if source.startswith(COMPOSEFS):
            found = self._read_composefs(source, layers, *about)
        else:
            # With a top, nothing is written to what is below it.
            below = read_only or top is not None
            found = self._read_stack(source, layers, below, composefs=any(about))
        if top is not None:
            found["top"] = self._read_top(top)
        return found

    def _read_source(self, source: str, read_only: bool) -> dict[str, object]:
        if source.startswith(TMPFS):
            return {"tmpfs": {"size": parse_size(source.removeprefix(TMPFS))}}
        if source.startswith((STORED, OCI)):
            if not is_text(source):
                raise InvalidParameter("SOURCE", "it is no text")
            return {"reference": source}
        try:
            if os.path.isdir(source):
                return {"directoryFileDescriptor": self._add(open_directory(source))}
            image = open_image(source, writable=not read_only, hint=SOURCES)
            return {"imageFileDescriptor": self._add(image)}
        except OSError as error:
            if read_only or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
                raise
            reason = f"{source}: {error.strerror}"
            raise OptionNotPermitted("rw", reason, hint="ask for a read-only mount") from None

    def _read_stack(
        self, source: str, layers: Sequence[str], read_only: bool, *, composefs: bool
    ) -> dict[str, object]:
        if composefs:
            raise InvalidParameter("SOURCE", f"object directories and a digest go with {COMPOSEFS}FILE")
        lowest = self._read_source(source, read_only)
        if not layers:
            return lowest
        return {"layers": [*(self._read_source(each, read_only) for each in layers), lowest]}

    def _read_composefs(
        self,
        source: str,
        layers: Sequence[str],
        objects: Sequence[str],
        digest: str | None,
        check_contents: bool | None,
    ) -> dict[str, object]:
        path = source.removeprefix(COMPOSEFS)
        if layers:
            raise InvalidParameter("SOURCE", "a composefs is no layer, nor are there any over one")
        if not objects:
            raise InvalidParameter("SOURCE", "a composefs needs object directories, one at least")
        file = open_image(path)
        try:
            # What the first line of a description begins with; that of an image is no text.
            described = os.pread(file.fileno(), 1, 0) == b"/"
        except OSError as error:
            file.close()
            raise OSError(error.errno, error.strerror, path) from None
        if described:
            with file:
                file = sealed_copy(file, path)
        about = {
            "dumpFileDescriptor" if described else "imageFileDescriptor": self._add(file),
            "objectsFileDescriptors": [self._add(open_directory(each)) for each in objects],
            "digest": digest,
            "verity": check_contents,
        }
        return {"composefs": given(about)}

    def _read_top(self, top: str) -> dict[str, object]:
        if top == TMPFS[:-1] or top.startswith(TMPFS):
            return {"sizeBytes": parse_size(top[len(TMPFS) :] or TOP_SIZE, "top")}
        return {"directoryFileDescriptor": self._add(open_directory(top))}

    def _add_companions(self, signature: str | None, verity: Verity | None) -> None:
        composefs = self.source.get("composefs")
        if signature is not None and isinstance(composefs, dict) and "imageFileDescriptor" in composefs:
            self.source["signature"] = read_signature(signature)
            signature = None
        if (signature or verity) and "imageFileDescriptor" not in self.source:
            raise InvalidParameter("SOURCE", "a signature and dm-verity go with the file of an image only")
        if signature is not None:
            self.source["signature"] = read_signature(signature)
        if verity is not None:
            data, root_hash, of_root_hash = verity
            self.source["verity"] = given(
                {
                    "dataFileDescriptor": self._add(open_image(data)),
                    "rootHash": root_hash,
                    "signature": None if of_root_hash is None else read_signature(of_root_hash),
                }
            )

    def _add_own_namespace(self, userns: str | None, idmap: str | None) -> None:
        if userns is None and idmap in (None, "namespace") and in_user_namespace():
            userns = "/proc/self/ns/user"
        if userns not in (None, "none"):
            self.add_namespace(open_image(str(userns)))

    def add_namespace(self, userns: OwnedFd) -> None:
        """Have ids mapped into this user namespace, which is taken over."""
        self.parameters["userNamespaceFileDescriptor"] = self._add(userns)

    def add_target(self, target: OwnedFd) -> None:
        """Have the mount attached at this directory, which is taken over: for Attach."""
        self.parameters["targetFileDescriptor"] = self._add(target)

    def _add(self, fd: OwnedFd) -> int:
        self.fds.append(fd)
        return len(self.fds) - 1

    def close(self) -> None:
        """Close the descriptors."""
        close_all(self.fds)

    def __enter__(self) -> Request:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_key(path: str) -> str:
    """Return the text of a key file, “-” for standard input. Raises NotFound, InvalidParameter, OSError."""
    data = read_bounded(STANDARD_INPUT, MAXIMUM_KEY, path) if path == "-" else read_file(path, MAXIMUM_KEY)
    if not 0 < len(data) <= MAXIMUM_KEY:
        raise InvalidParameter("password", f"{path} has not 1 to {MAXIMUM_KEY} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        # Without what it quotes.
        raise InvalidParameter("password", f"{path} is no text in UTF-8") from None


def read_signature(path: str) -> str:
    """Return a detached signature in base64. Raises NotFound, InvalidParameter, OSError."""
    data = read_file(path, MAXIMUM_SIGNATURE)
    if not 0 < len(data) <= MAXIMUM_SIGNATURE:
        raise InvalidParameter("signature", f"{path} has not 1 to {MAXIMUM_SIGNATURE} bytes")
    import binascii

    return binascii.b2a_base64(data, newline=False).decode()


def read_file(path: str, maximum: int) -> bytes:
    """Return what is in a file, or comes through a pipe, as `read_bounded`. Raises NotFound, OSError.

    A pipe that nobody writes to is not waited for for ever: whoever it belongs to could hold others up.
    """
    import select

    poller, end = select.poll(), time.monotonic() + PATIENCE
    with open_image(path) as fd:
        poller.register(fd.fileno(), select.POLLIN)

        def wait() -> None:
            if not poller.poll(max(0.0, end - time.monotonic()) * 1000):
                raise OSError(errno.ETIMEDOUT, f"nothing came for {PATIENCE} seconds")

        return read_bounded(fd.fileno(), maximum, path, wait)


def read_bounded(fd: int, maximum: int, path: str, wait: Callable[[], None] | None = None) -> bytes:
    """Read until the end, or until it is more than `maximum` bytes. Raises OSError, which names `path`.

    `wait` is called before each piece.
    """
    data = b""
    try:
        while len(data) <= maximum:
            if wait is not None:
                wait()
            piece = os.read(fd, maximum + 1 - len(data))
            if not piece:
                break
            data += piece
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    return data


def given(parameters: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters that are not None."""
    return {name: value for name, value in parameters.items() if value is not None}


def check_text(options: Sequence[str], file_system_type: str | None, image_policy: str | None) -> None:
    """Raise OptionNotPermitted or InvalidParameter for what cannot be said on the wire, which is UTF-8."""
    for option in options:
        if not is_text(option):
            raise OptionNotPermitted(option, "it is no text", hint="write it in UTF-8")
    if file_system_type is not None and not is_text(file_system_type):
        raise InvalidParameter("fileSystemType", "it is no text")
    if image_policy is not None and not is_text(image_policy):
        raise InvalidParameter("imagePolicy", "it is no text")


def split_options(text: str) -> list[str]:
    """Return the entries of mount options as libmount reads them, but without the quotes.

    A comma between quotes belongs to an entry. Raises OptionNotPermitted for a quote that is not closed: of
    that, libmount and all behind it would ignore the rest without a word.
    """
    # Every other piece was between quotes.
    first, *pieces = text.split('"')
    entries = first.split(",")
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            entries[-1] += piece
            continue
        rest, *others = piece.split(",")
        entries[-1] += rest
        entries += others
    if len(pieces) % 2:
        raise OptionNotPermitted(entries[-1], "a quote in it is not closed", hint="close it, or take it out")
    return [each for each in entries if each]


def parse_size(text: str, parameter: str = "SOURCE") -> int:
    """Return a number of bytes; K, M, G and T are powers of 1024. Raises InvalidParameter."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    unit = units.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    size = int(digits) * unit if digits.isdecimal() and len(digits) <= 18 else 0
    if not 0 < size <= MAXIMUM_INTEGER:
        raise InvalidParameter(parameter, f"“tmpfs:{text}” has no size such as 64M")
    return size
