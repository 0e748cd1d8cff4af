"""What was measured, as medians and ratios, and as a table of text and of Markdown. No I/O."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

MAXIMUM_RATIO = 1.05
BEGIN = "<!-- by make bench-seed -->"
END = "<!-- until here -->"
QUANTITIES = {"cold": "cold, s", "warm": "warm, s", "memory": "memory, MiB"}


@dataclass(slots=True)
class Pairs:
    """What was measured of both in turns: the values at one place are of the same moment."""

    direct: list[float] = field(default_factory=list)
    mountd: list[float] = field(default_factory=list)

    def ratio(self) -> float:
        """Return the median of the ratios of each pair.

        Somebody else's load comes and goes, and hits both of a pair alike; a ratio of two medians would be
        one of different moments.
        """
        pairs = zip(self.mountd, self.direct, strict=True)
        return statistics.median(mountd / direct for mountd, direct in pairs)

    def medians(self) -> tuple[float, float]:
        """Return the medians of both, the direct one first."""
        return statistics.median(self.direct), statistics.median(self.mountd)

    def noise(self) -> float:
        """Return how far the middle half of the direct values is apart, as a part of their median."""
        if len(self.direct) < 2:
            return 0.0
        low, middle, high = statistics.quantiles(self.direct, n=4, method="inclusive")
        return (high - low) / middle


@dataclass(slots=True)
class Row:
    """A way to mount the tree; `missing` says why it was not measured."""

    name: str
    cold: Pairs = field(default_factory=Pairs)
    warm: Pairs = field(default_factory=Pairs)
    memory: Pairs = field(default_factory=Pairs)
    missing: str | None = None

    def of(self, quantity: str) -> Pairs:
        """Return what was measured of one of QUANTITIES."""
        return {"cold": self.cold, "warm": self.warm, "memory": self.memory}[quantity]

    def exceeding(self) -> list[str]:
        """Return in which quantities mountd is further from direct than it may be."""
        if self.missing is not None:
            return []
        return [each for each in QUANTITIES if self.of(each).ratio() > MAXIMUM_RATIO]


def cells(row: Row) -> list[str]:
    """Return the fields of a row behind its name: for each quantity direct, mountd and the ratio."""
    if row.missing is not None:
        return [row.missing] + [""] * (3 * len(QUANTITIES) - 1)
    found = []
    for quantity in QUANTITIES:
        digits = 0 if quantity == "memory" else 3
        pairs = row.of(quantity)
        found += [f"{value:.{digits}f}" for value in pairs.medians()] + [f"{pairs.ratio():.3f}"]
    return found


def heads() -> list[str]:
    """Return what is above the fields of a row."""
    return [head for name in QUANTITIES.values() for head in (f"{name}: direct", "mountd", "ratio")]


def text_table(rows: Sequence[Row]) -> str:
    """Return the table for a terminal, with how much the direct values vary."""
    lines = [f"{'':<36}" + "".join(f"{name:^28}" for name in QUANTITIES.values())]
    lines.append(f"{'':<36}" + f"{'direct':>8}{'±':>5}{'mountd':>8}{'ratio':>7}" * len(QUANTITIES))
    for row in rows:
        line = f"{row.name:<36}"
        if row.missing is not None:
            lines.append(line + row.missing)
            continue
        values = cells(row)
        for number, quantity in enumerate(QUANTITIES):
            direct, mountd, ratio = values[3 * number : 3 * number + 3]
            line += f"{direct:>8}{row.of(quantity).noise():>5.0%}{mountd:>8}{ratio:>7}"
        lines.append(line)
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the table as Markdown."""
    lines = ["| | " + " | ".join(heads()) + " |", "| --- |" + " ---: |" * len(heads())]
    lines += [f"| {row.name} | " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> str:
    """Say which ratios are more than they may be."""
    found = [f"{row.name}, {quantity}" for row in rows for quantity in row.exceeding()]
    return f"More than {MAXIMUM_RATIO} in this run: {'; '.join(found) or 'none'}."


def replaced(text: str, new: str) -> str:
    """Return `text` with `new` between BEGIN and END. Raises ValueError if it has not one of each."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"there is no one place between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{new.strip()}\n{END}{after}"


def chart(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return what the plot shows: for each quantity the names of the rows and two values of each."""
    measured = [row for row in rows if row.missing is None]
    return [
        {
            "title": title,
            "names": [row.name for row in measured],
            "direct": [row.of(quantity).medians()[0] for row in measured],
            "mountd": [row.of(quantity).medians()[1] for row in measured],
        }
        for quantity, title in QUANTITIES.items()
    ]
