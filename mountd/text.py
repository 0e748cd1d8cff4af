"""What people write and what can be said on the wire: sizes and options."""

from __future__ import annotations

from mountd.errors import InvalidParameter, OptionNotPermitted
from mountd.wire.framing import is_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MAXIMUM_INTEGER = (1 << 63) - 1


def check_text(options: Sequence[str], file_system_type: str | None) -> None:
    """Raise OptionNotPermitted or InvalidParameter for what cannot be said on the wire, which is UTF-8."""
    for option in options:
        if not is_text(option):
            raise OptionNotPermitted(option, "it is no text", hint="write it in UTF-8")
    if file_system_type is not None and not is_text(file_system_type):
        raise InvalidParameter("fileSystemType", "it is no text")


def parse_size(text: str) -> int:
    """Return a number of bytes; K, M, G and T are powers of 1024. Raises InvalidParameter."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    unit = units.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    size = int(digits) * unit if digits.isdecimal() and len(digits) <= 18 else 0
    if not 0 < size <= MAXIMUM_INTEGER:
        raise InvalidParameter("SOURCE", f"“tmpfs:{text}” has no size such as 64M")
    return size
