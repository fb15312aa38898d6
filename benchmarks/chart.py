"""The chart: seconds of the default case."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from cases import LOCAL, S3
from matplotlib.figure import Figure
from peers import OURS, PEERS
from report import Results

COLOURS = {OURS: "#1a6fdf", "flytekit": "#9a9a9a", "flyte": "#d9822b", "tar": "#6b4c9a", "s3fs": "#3d9970"}


def draw(results: Results, path: Path) -> None:
    """Draw a group of bars for each action and place, on a logarithmic scale, as SVG."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    keys = [("default", place, action) for place in (LOCAL, S3) for action in ("save", "load")]
    groups = [
        [(peer, value) for peer in PEERS if (value := results.median("seconds", key, peer)) is not None] for key in keys
    ]
    # On a logarithmic scale bars begin anywhere but at zero.
    floor = min(value for group in groups for _, value in group) / 3
    labels, position = {}, 0
    for (_, place, action), group in zip(keys, groups, strict=True):
        labels[position + (len(group) - 1) / 2] = f"{action}, {'local disk' if place == LOCAL else 'S3'}"
        for number, (peer, value) in enumerate(group, position):
            bars = axes.bar(number, value - floor, 0.9, bottom=floor, color=COLOURS[peer], label=peer)
            axes.bar_label(bars, [f"{value:.1f}" if value >= 1 else f"{value:.2g}"], fontsize=8, padding=1)
        position += len(group) + 1
    axes.set_ylim(bottom=floor)
    axes.margins(y=0.12)
    axes.set_ylabel("seconds, logarithmic")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(list(labels), list(labels.values()))
    axes.tick_params("x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(
        named.values(), named.keys(), ncols=len(named), frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1)
    )
    # Text as text, and neither a date nor random names: small, and the same for the same numbers.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flytekit_ckpt"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
