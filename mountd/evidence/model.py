"""What was found out about an image that can make it trustworthy, as plain facts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Evidence:
    """The facts about one source.

    `root_owned_path` is the absolute path of the image in the daemon's mount namespace, every component of
    which belongs to root and is writable by nobody else, and which was proven to lead to this very inode. It
    is None if that is not so, and `location_problem` then says why. `descriptor_writable` is whether the
    caller's descriptor can write to the image, wherever it lies.
    """

    root_owned_path: str | None
    location_problem: str | None
    descriptor_writable: bool
