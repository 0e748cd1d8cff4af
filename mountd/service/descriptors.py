"""The descriptors that came with a call, and which of its fields each belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.errors import InvalidParameter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mountd.fds import OwnedFd


class Descriptors:
    """The descriptors of one message, each of which exactly one field may name."""

    def __init__(self, fds: Sequence[OwnedFd]) -> None:
        """Borrow `fds`."""
        self._fds = fds
        self._named: dict[int, str] = {}

    def take(self, index: int, field: str) -> int:
        """Return the descriptor with this index, borrowed. Raises InvalidParameter naming the field."""
        if not 0 <= index < len(self._fds):
            raise InvalidParameter(
                field, f"there is no descriptor {index}, only {len(self._fds)} came along"
            )
        if index in self._named:
            raise InvalidParameter(field, f"descriptor {index} is {self._named[index]} already")
        self._named[index] = field
        return self._fds[index].fileno()

    def optional(self, index: int | None, field: str) -> int | None:
        """As `take`, for a field that may be missing."""
        return None if index is None else self.take(index, field)

    def check_all_named(self) -> None:
        """Refuse a message with a descriptor that no field names."""
        for index in range(len(self._fds)):
            if index not in self._named:
                raise InvalidParameter("fileDescriptors", f"no field names descriptor {index}")
