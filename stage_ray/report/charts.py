"""Curves of a report as inline SVG. Text and axes take the page's own colour, so they read in light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#010203"  # stands for the page's text colour until the SVG is written
PALETTE = ("#3b82d0", "#e07b39", "#2f9e6e", "#a565c9", "#c94f6d", "#8a8f3c")
SMOOTH = 9
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
Series = Mapping[str, Sequence[float | None]]


def curves(steps: Sequence[int], series: Series) -> str:
    """Lines over steps: the values faint, their running mean strong. None is a gap. Returns an ``<svg>``."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "-".join(series)}):
        figure, axes = _axes()
        for color, (label, values) in zip(PALETTE * 3, series.items(), strict=False):
            data = np.array([np.nan if value is None else value for value in values], dtype=float)
            smooth = _running_mean(data)
            axes.plot(steps, data, color=color, alpha=0.4, linewidth=0.8, marker="." if len(steps) == 1 else None)
            axes.plot(steps, smooth, color=color, linewidth=1.6, label=label)
        if len(series) > 1:
            axes.legend(loc="best")
        return _svg(figure)


def stacked(steps: Sequence[int], series: Series, total: Sequence[float | None] | None = None) -> str:
    """Stacked areas over steps, and a line for their total where it is known. Returns an ``<svg>``."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "-".join(series)}):
        figure, axes = _axes()
        layers = [[value or 0.0 for value in values] for values in series.values()]
        axes.stackplot(steps, layers, labels=list(series), colors=PALETTE, alpha=0.75, linewidth=0)
        if total is not None:
            data = [np.nan if value is None else value for value in total]
            axes.plot(steps, data, color=INK, linewidth=0.9, label="whole step")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return _svg(figure)


def _axes() -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(4.6, 2.3), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def _running_mean(data: np.ndarray) -> np.ndarray:
    """Centred mean over up to nine values, gaps skipped: [n] -> [n]."""
    half = min(SMOOTH, len(data)) // 2
    padded = np.pad(data, half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    known = ~np.isnan(windows)
    counts = known.sum(axis=1)
    sums = np.where(known, windows, 0.0).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # The page decides size and font; namespaces are for XML, not for SVG inside HTML.
    for clutter in (r' width="[^"]*"', r' height="[^"]*"', r' xmlns(:xlink)?="[^"]*"', r' xmlns(:xlink)?="[^"]*"'):
        text = re.sub(rf"(<svg[^>]*?){clutter}", r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r" font-family: [^;\"]*;", "", text)
