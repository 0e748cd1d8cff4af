"""What a request wants to be done with its source, as far as the policy has a say in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mountd.trust.image_policy import ImagePolicy

IDMAP_KINDS = ("none", "namespace", "caller", "ranges")


@dataclass(frozen=True, slots=True)
class MountWishes:
    """The wishes of a request: its word against which nothing is granted, and which can only narrow.

    `idmap_kind` is one of IDMAP_KINDS. `namespace_given` is whether the request came with a user namespace
    that `ids.authorize_ids` accepted; one that it did not accept must not get this far. `image_policy` is
    what the request itself demands of its image.
    """

    read_only: bool
    file_system_type: str | None
    options: tuple[str, ...]
    idmap_kind: str
    namespace_given: bool
    image_policy: ImagePolicy | None = None
