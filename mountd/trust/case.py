"""All that is judged together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mountd.caller.model import Caller
    from mountd.evidence.model import Evidence
    from mountd.source.model import Source
    from mountd.trust.options import ParsedOptions
    from mountd.trust.wishes import MountWishes


@dataclass(frozen=True, slots=True)
class Case:
    """All that is judged, `asked` being the options of `wishes`, sorted."""

    caller: Caller
    source: Source
    evidence: Evidence
    wishes: MountWishes
    asked: ParsedOptions
