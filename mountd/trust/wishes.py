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
    what the request itself demands of its image. `disk_uids` and `disk_gids` are the ids on disk, first and
    number, that the idmap “ranges” is to make somebody's. `partition_options` are options for one partition
    each, by its designator; those of a partition that is not mounted are nobody's.
    """

    read_only: bool
    file_system_type: str | None
    options: tuple[str, ...]
    idmap_kind: str
    namespace_given: bool
    image_policy: ImagePolicy | None = None
    disk_uids: tuple[tuple[int, int], ...] = ()
    disk_gids: tuple[tuple[int, int], ...] = ()
    partition_options: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def options_of(self, designator: str) -> tuple[str, ...]:
        """Return the options that are for one partition only."""
        return dict(self.partition_options).get(designator, ())
