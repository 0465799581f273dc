"""Curves of a report as inline SVG. Text and axes take the page's own colour, so they read in light and dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from stage_ray.errors import ConfigError

Bands = Mapping[str, Sequence[tuple[float, float] | None]]
"""Label -> value and half width of its band at each step; None is a gap."""

INK = "#010203"  # stands for the page's text colour until the SVG is written
PALETTE = ("#3b82d0", "#e07b39", "#2f9e6e", "#a565c9", "#c94f6d", "#8a8f3c")
DASHES = ("-", "--", ":")
SMOOTH = 9
SPIKE = 30.0  # times the median: a curve with such a value is drawn on a logarithmic scale, lest it look flat
SIZE = (4.6, 2.3)  # inches, of one chart on a page
COLUMNS = 3  # of the charts of a figure
LETTERS = 14  # of a legend that an inch holds, about
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a scorer's name may hold dollars
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


def chart(steps: Sequence[int], series: Mapping[str, Sequence[float | None]], total: str = "") -> str:
    """Curves over steps as an ``<svg>``: each series' values faint, its running mean strong. None is a gap.

    With ``total`` the series are areas on top of each other instead, but for the one of that name: a line.
    """
    with _figure(series) as (axes, svg):
        data = {label: np.asarray(values, dtype=float) for label, values in series.items()}  # None becomes NaN
        if total:
            if total in data:
                axes.plot(steps, data.pop(total), color=INK, linewidth=0.9, label=total)
            layers = [np.nan_to_num(values) for values in data.values()]
            axes.stackplot(steps, *layers, labels=list(data), colors=PALETTE, alpha=0.75, linewidth=0)
            axes.set_ylim(bottom=0)
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        else:
            for color, (label, values) in zip(PALETTE * 3, data.items(), strict=False):
                alone = "." if len(steps) == 1 else None  # a line of one point is invisible
                axes.plot(steps, values, color=color, alpha=0.4, linewidth=0.8, marker=alone)
                axes.plot(steps, running_mean(values), color=color, linewidth=1.6, label=label)
            if len(data) > 1:
                axes.legend(loc="best")
    return svg[0]


def banded_chart(steps: Sequence[int], series: Bands) -> str:
    """Curves of values with their standard errors as bands, the first one strong. None is a gap."""
    with _figure(series) as (axes, svg):
        _draw_bands(axes, steps, series)
        if len(series) > 1 and max(map(len, series)) > LETTERS:  # beside the curves, they would leave these no room
            figure = axes.get_figure(root=True)
            assert figure is not None
            figure.set_size_inches(SIZE[0], SIZE[1] + 0.17 * len(series))
            figure.legend(loc="outside lower left")
        elif len(series) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg[0]


def banded_figure(path: Path, charts: Mapping[str, tuple[Sequence[int], Bands]]) -> None:
    """All of these charts, by their titles, as one picture for a paper or a page: the suffix is its format.

    Each as `banded_chart` has it; one legend for all. Written whole or not at all.

    Raises:
        ConfigError: a format that matplotlib does not write.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "-".join(charts)}):
        rows, width = -(-len(charts) // COLUMNS), 3.3 * COLUMNS
        figure = Figure(layout="constrained")
        kind = path.suffix[1:].lower()
        if kind not in (known := figure.canvas.get_supported_filetypes()):
            raise ConfigError(f"{path} is in no format that can be written; end its name in one of {', '.join(known)}")
        lines: dict[str, Line2D] = {}
        for place, (title, (steps, series)) in enumerate(charts.items(), start=1):
            axes = figure.add_subplot(rows, COLUMNS, place)
            axes.set_title(title, fontsize=STYLE["font.size"])
            _rule(axes)
            _draw_bands(axes, steps, series)
            lines |= {str(line.get_label()): line for line in axes.lines}
        beside = max(1, min(len(lines), int(width * LETTERS / (6 + max(map(len, lines), default=0)))))
        figure.set_size_inches(width, 2.1 * rows + 0.2 + 0.2 * -(-len(lines) // beside))
        figure.legend([*lines.values()], [*lines], loc="outside lower center", ncols=beside)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".tmp")
        figure.savefig(scratch, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
        scratch.replace(path)


def _draw_bands(axes: Axes, steps: Sequence[int], series: Bands) -> None:
    dots = "." if len(steps) <= 20 else None
    styles = [(color, dash) for dash in DASHES for color in PALETTE]  # as many arms are told apart
    for (color, dash), (label, points) in zip(styles, series.items(), strict=False):
        data = np.asarray([point or (np.nan, np.nan) for point in points], dtype=float)  # [n, 2]
        values, errors = data.T
        strong = label == next(iter(series))
        width = 1.6 if strong else 0.8
        axes.plot(steps, values, color=color, linestyle=dash, linewidth=width, marker=dots, label=label)
        axes.fill_between(steps, values - errors, values + errors, color=color, alpha=0.15, linewidth=0)
    _tame(axes, [point[0] for points in series.values() for point in points if point])


def _tame(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic scale where single values tower over the rest, as k3 of one unlikely token does."""
    usual = float(np.nanmedian(values)) if values else 0.0
    if usual > 0 and np.nanmax(values) > SPIKE * usual:
        axes.set_yscale("log")
        axes.set_ylim(bottom=usual / SPIKE)
        axes.yaxis.set_major_formatter("{x:g}")  # powers would be written as formulas
        axes.yaxis.set_minor_formatter(NullFormatter())


@contextmanager
def _figure(series: Iterable[str]) -> Iterator[tuple[Axes, list[str]]]:
    """The axes of a chart to draw into, and a list that holds its ``<svg>`` when the context ends."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "-".join(series)}):
        figure, buffer, svg = Figure(figsize=SIZE, layout="constrained"), io.StringIO(), list[str]()
        axes = figure.add_subplot()
        _rule(axes)
        yield axes, svg
        unnamed = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # without any of them there is no <metadata>
        figure.savefig(buffer, format="svg", transparent=True, metadata=unnamed)
    head, _, body = buffer.getvalue().partition("<svg")[2].partition(">")
    # The page decides size and font; namespaces are for XML, not for SVG inside HTML.
    head = re.sub(r' (width|height|xmlns(:xlink)?)="[^"]*"', "", head)
    svg.append(re.sub(r" font-family: [^;\"]*;", "", f"<svg{head}>{body}".replace(INK, "currentColor")))


def _rule(axes: Axes) -> None:
    """Ticks and lines of every chart over steps."""
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def running_mean(values: Sequence[float | None] | np.ndarray) -> np.ndarray:
    """Centred mean over up to nine values, gaps (None or NaN) skipped: [n] -> [n]."""
    data = np.asarray(values, dtype=float)
    half = min(SMOOTH, len(data)) // 2  # fewer near the ends
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(data, half, constant_values=np.nan), 2 * half + 1)
    with warnings.catch_warnings(action="ignore"):  # a mean of nothing is NaN, as it should be
        return np.nanmean(windows, axis=1)
