"""Whether what is encrypted may be opened: a grant of its own, which has to be given expressly.

To open a volume is to have a program of the system derive a key from what a caller says, and the kernel
decrypt what is then parsed: more than to mount. What speaks for the image speaks for the ciphertext, and its
password is no evidence: everybody who has made an image knows that of it. So the rule has to allow the image
as it does any other, and what turns out to be in it is judged once more, by the same rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.errors import DeniedByPolicy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mountd.source.model import Source
    from mountd.trust.case import Case
    from mountd.trust.partitions import Use
    from mountd.trust.policy import Grant, Rule

JUDGED_LATER = "what is encrypted takes its password, and is judged once it is open"


def check(rule: Rule, grant: Grant, case: Case, uses: Iterable[Use]) -> bool:
    """Return whether anything that is used has yet to be opened. Raises DeniedByPolicy if it must not be."""
    source = case.source
    encrypted = [use.partition.designator for use in uses if use.partition.luks is not None]
    if (source.luks is not None or encrypted) and not grant.encrypted:
        what = f"the partition {encrypted[0]} is" if encrypted else "the image is"
        raise DeniedByPolicy(
            f"{what} encrypted, and the rule does not grant that it is opened",
            rule=rule.name,
            hint="an administrator can add “encrypted = true” to what the rule grants"
            + (
                "; or leave it out, with an imagePolicy such as “root=open:=unused+absent”"
                if encrypted
                else ""
            ),
        )
    return is_locked(source, uses)


def is_locked(source: Source, uses: Iterable[Use]) -> bool:
    """Return whether anything that is used of a source has yet to be opened."""
    locked = source.luks is not None and source.file_system is None
    return locked or any(use.is_locked for use in uses)
