"""Draws the bars: reads what `figures.chart` returns as JSON from its input, and writes the PNG named first.

For the system's Python, which Debian's matplotlib belongs to, and which has nothing of this project.
"""

from __future__ import annotations

import json
import sys

import matplotlib  # type: ignore[import-not-found, unused-ignore]

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402 - after it was told that there is no display

COLOURS = {"direct": "#9aa5b1", "mountd": "#2f6f9f"}
LABELS = {"direct": "by root, directly", "mountd": "by mountd, idmapped for a container"}


def draw(panels: list[dict[str, list[float]]], path: str) -> None:
    """Draw a panel of horizontal bars for each quantity, side by side."""
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 4.2), sharey=True)
    for panel, axis in zip(panels, axes, strict=True):
        places = range(len(panel["names"]))
        for offset, who in ((-0.2, "direct"), (0.2, "mountd")):
            at = [place + offset for place in places]
            bars = axis.barh(at, panel[who], height=0.38, color=COLOURS[who], label=LABELS[who])
            axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
        axis.set_title(str(panel["title"]), fontsize=10)
        axis.set_yticks(list(places), panel["names"], fontsize=8)
        axis.margins(x=0.18)
        axis.tick_params(axis="x", labelsize=7)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=2, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    draw(json.load(sys.stdin), sys.argv[1])
