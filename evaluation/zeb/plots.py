"""Plots of a results table: bars and cumulative error curves. Needs matplotlib, no display."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from gim_hloc.errors import InputError
from gim_hloc.evaluation.zeb.sets import short_name
from gim_hloc.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from gim_hloc.evaluation.zeb.table import Row, Table

# Okabe and Ito's colours, told apart by colour-blind eyes too; then line styles change.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_HATCHES = ("", "///", "...", "xxx")
_GRAY = "#6b757d"
# Curves are drawn to this many degrees, where the largest threshold is not larger.
_CURVE_END = 20.0
_BARS_WIDTH = 13.0  # inches of a panel of bars


def figures(table: Table) -> list[tuple[str, Figure]]:
    """Title and figure of every plot."""
    first = table.options.thresholds[0]
    return [
        (f"AUC@{first:g}° of each set", bars(table)),
        ("Share of pairs below an error", curves(table)),
    ]


def write_plots(
    table: Table, folder: str | os.PathLike[str], *, suffix: str = ".png"
) -> list[Path]:
    """Write ``zeb_bars`` and ``zeb_curves`` into a folder, made if it does not exist.

    Raises:
        InputError: another suffix than .png, .svg or .pdf.
    """
    if suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"plots are written as .png, .svg or .pdf, not {suffix!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in (("bars", bars(table)), ("curves", curves(table))):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:], dpi=150)
        paths.append(folder / f"zeb_{name}{suffix}")
        write_atomic(paths[-1], buffer.getvalue())
    return paths


def to_svg(figure: Figure) -> str:
    """A figure as an ``<svg>`` element for a web page."""
    buffer = io.StringIO()
    # A fixed salt instead of a random one: the same table gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": "zeb"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # What stands before is an XML prologue, which HTML does not take.
    return text[text.index("<svg") :]


def bars(table: Table) -> Figure:
    """AUC at the first threshold: sets side by side, one bar a matcher, interval on top.

    With many matchers the sets go on over several panels.
    """
    rows = table.own
    heads = ["mean", *map(short_name, table.sets)]
    height, low, high = (100 * values for values in _heights(table))  # (rows, heads)
    group = 0.3 + 0.2 * max(len(rows), 3)  # inches a set
    across = min(len(heads), max(1, int(_BARS_WIDTH / group)))
    down = -(-len(heads) // across)
    across = -(-len(heads) // down)  # panels of about the same length
    figure = Figure((max(6.0, across * group + 0.8), 2.9 * down + 1.2), layout="constrained")
    panels = figure.subplots(down, 1, sharey=True, squeeze=False)[:, 0]
    width = 0.82 / len(rows)
    for first, axes in zip(range(0, len(heads), across), panels, strict=True):
        part = slice(first, min(first + across, len(heads)))
        places = np.arange(part.stop - part.start) - 0.41
        for i, row in enumerate(rows):
            bar = axes.bar(
                places + (i + 0.5) * width,
                height[i, part],
                width,
                yerr=[height[i, part] - low[i, part], high[i, part] - height[i, part]],
                error_kw={"elinewidth": 0.9, "capsize": min(3.0, 18 * width)},
                color=_COLOURS[i % 7],
                hatch=_HATCHES[i // 7 % 4],
                edgecolor="white",
                linewidth=0.4,
                label=row.name,
                zorder=2,
            )
            if len(rows) <= 2:
                known = [f"{v:.1f}" if math.isfinite(v) else "" for v in height[i, part]]
                axes.bar_label(bar, known, padding=2, fontsize=7)
        if first == 0:
            axes.axvline(0.5, color=_GRAY, linewidth=0.8)
        axes.set_xticks(range(len(places)), heads[part])
        # As wide as the panels above, so that bars are equally wide.
        axes.set_xlim(-0.5, across - 0.5)
        axes.set_ylabel(f"AUC@{table.options.thresholds[0]:g}° in %")
        _clean(axes, grid="y")
    _legend(figure, rows)
    return figure


def _heights(table: Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and each set's AUC at the first threshold with the ends of their intervals.

    (rows, 1 + sets), fractions; ends are the values themselves without bootstrap.
    """
    threshold = table.options.thresholds[0]
    found = np.full((3, len(table.own), 1 + len(table.sets)), np.nan)
    for i, row in enumerate(table.own):
        found[:, i, 0] = (row.mean[threshold], *row.interval[threshold])
        for j, name in enumerate(table.sets, start=1):
            if name in row.metrics:
                ends = row.metrics[name].interval(level=table.options.level)[:, 0]
                found[:, i, j] = (row.auc[threshold][name], *ends)
    value, low, high = found
    low, high = (np.where(np.isfinite(end), end, value) for end in (low, high))
    return value, np.minimum(low, value), np.maximum(high, value)


def curves(table: Table) -> Figure:
    """The share of pairs below each error, a panel for every set.

    The dotted line is the first threshold: AUC is the mean height of the curve left of it.
    """
    count = len(table.sets)
    across = min(4, count)
    down = -(-count // across)
    figure = Figure((max(5.5, 3.0 * across), 2.5 * down + 0.9), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    end = max(_CURVE_END, *table.options.thresholds)
    for axes, name in zip(panels.flat, table.sets, strict=False):
        for i, row in enumerate(table.own):
            if name not in row.dumps:
                continue
            errors = np.sort(row.dumps[name].pose_errors)
            shown = errors[errors < end]
            share = 100 * np.arange(1, len(shown) + 1) / len(errors)
            last = share[-1] if len(share) else 0.0
            axes.plot(
                np.concatenate([[0.0], shown, [end]]),
                np.concatenate([[0.0], share, [last]]),
                _STYLES[i // 7 % 4],
                color=_COLOURS[i % 7],
                linewidth=1.5,
                label=row.name,
            )
        axes.axvline(table.options.thresholds[0], color=_GRAY, linewidth=0.9, linestyle=":")
        axes.set_title(name, fontsize=10)
        axes.set_xlim(0, end)
        axes.set_ylim(0, 100)
        axes.set_xticks(np.linspace(0, end, 5))
        _clean(axes, grid="both")
    for axes in panels.flat[count:]:
        axes.set_visible(False)
    # Panels of a column share the numbers below the last; there may be none below these.
    for axes in panels.flat[max(0, count - across) : count]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("larger of rotation and translation error in degrees", fontsize=10)
    figure.supylabel("pairs in %", fontsize=10)
    _legend(figure, table.own)
    return figure


def _clean(axes: Axes, *, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e3e6e8", linewidth=0.7, zorder=0)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _legend(figure: Figure, rows: Sequence[Row]) -> None:
    """One legend above all panels, of what any of them shows."""
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    # An entry is its handle and its text, about 0.085 inches a letter.
    entry = 0.75 + 0.085 * max(len(row.name) for row in rows)
    columns = max(1, min(len(rows), 4, int(figure.get_figwidth() / entry)))
    figure.legend(
        list(found.values()), list(found), loc="outside upper center", ncols=columns, frameon=False
    )
