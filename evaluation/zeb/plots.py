"""Plots of a results table: bars, radar, cumulative error curves. Needs matplotlib, no display."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.evaluation.zeb.published import short_name
from gim_hloc.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gim_hloc.evaluation.zeb.table import Row, Table

# Okabe and Ito's colours, told apart by colour-blind eyes too; then line styles change.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_HATCHES = ("", "///", "...", "xxx")
_GRAY = "#6b757d"
# Curves are drawn to this many degrees, where the largest threshold is not larger.
_CURVE_END = 20.0
_BARS_WIDTH = 13.0  # inches of a panel of bars
# A polygon needs three corners.
_RADAR_SETS = 3


def figures(table: Table) -> list[tuple[str, Figure]]:
    """Return title and figure of every plot that the table allows."""
    first = table.options.thresholds[0]
    drawn = [(f"AUC@{first:g}° of each set", bars(table))]
    if len(table.sets) >= _RADAR_SETS:
        drawn.append((f"AUC@{first:g}°, radar", radar(table)))
    drawn.append(("Share of pairs below an error", curves(table)))
    return drawn


def write_plots(
    table: Table, folder: str | os.PathLike[str], *, suffix: str = ".png"
) -> list[Path]:
    """Write bars, radar (from three sets on) and curves into a folder.

    Args:
        table: what to draw.
        folder: made if it does not exist.
        suffix: .png, .svg or .pdf.

    Returns:
        The files.

    Raises:
        InputError: another suffix.
    """
    if suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"plots are written as .png, .svg or .pdf, not {suffix!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = {"bars": bars(table), "curves": curves(table)}
    if len(table.sets) >= _RADAR_SETS:
        named["radar"] = radar(table)
    paths = []
    for name, figure in named.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:], dpi=150)
        path = folder / f"zeb_{name}{suffix}"
        write_atomic(path, buffer.getvalue())
        paths.append(path)
    return paths


def to_svg(figure: Figure) -> str:
    """Return a figure as an ``<svg>`` element for a web page."""
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt instead of a random one: the same table gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": "zeb"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # What stands before is an XML prologue, which HTML does not take.
    return text[text.index("<svg") :]


def bars(table: Table) -> Figure:
    """Draw AUC at the first threshold: sets side by side, one bar a matcher, interval on top.

    With many matchers the sets go on over several panels.
    """
    from matplotlib.figure import Figure

    threshold = table.options.thresholds[0]
    rows = table.own
    heads = ["mean", *map(short_name, table.sets)]
    heights, lows, highs = (np.empty((len(rows), len(heads))) for _ in range(3))
    for i, row in enumerate(rows):
        values = [row.mean[threshold], *(row.auc[threshold].get(n, math.nan) for n in table.sets)]
        heights[i] = 100 * np.array(values)
        lows[i], highs[i] = _bounds(table, row, threshold)
    group = 0.3 + 0.2 * max(len(rows), 3)  # inches a set
    across = min(len(heads), max(1, int(_BARS_WIDTH / group)))
    down = -(-len(heads) // across)
    across = -(-len(heads) // down)  # panels of about the same length
    figure = Figure(figsize=(max(6.0, across * group + 0.8), 2.9 * down + 1.2))
    panels = figure.subplots(down, 1, sharey=True, squeeze=False)[:, 0]
    width = 0.82 / len(rows)
    for first, axes in zip(range(0, len(heads), across), panels, strict=True):
        part = slice(first, min(first + across, len(heads)))
        count = part.stop - part.start
        for i, row in enumerate(rows):
            places = np.arange(count) - 0.41 + (i + 0.5) * width
            height, low, high = heights[i, part], lows[i, part], highs[i, part]
            axes.bar(
                places,
                height,
                width,
                color=_COLOURS[i % 7],
                hatch=_HATCHES[i // 7 % 4],
                edgecolor="white",
                linewidth=0.4,
                label=row.name,
                zorder=2,
            )
            axes.errorbar(
                places,
                height,
                [np.maximum(height - low, 0), np.maximum(high - height, 0)],
                fmt="none",
                ecolor="#1c2126",
                elinewidth=0.9,
                capsize=min(3.0, 18 * width),
                zorder=3,
            )
            if len(rows) <= 2:
                top = np.where(np.isfinite(high), high, height)
                for x, y, value in zip(places, top, height, strict=True):
                    if math.isfinite(value):
                        axes.text(x, y + 0.8, f"{value:.1f}", ha="center", fontsize=7)
        if first == 0:
            axes.axvline(0.5, color=_GRAY, linewidth=0.8)
        axes.set_xticks(range(count), heads[part])
        # As wide as the panels above, so that bars are equally wide.
        axes.set_xlim(-0.5, across - 0.5)
        axes.set_ylabel(f"AUC@{threshold:g}° in %")
        _clean(axes, grid="y")
    _legend(figure, len(rows))
    return figure


def radar(table: Table) -> Figure:
    """Draw AUC at the first threshold as one polygon a matcher, a set at each corner.

    Rows that lack a set are left out: their polygon would not close.

    Raises:
        InputError: fewer than three sets.
    """
    from matplotlib.figure import Figure

    if len(table.sets) < _RADAR_SETS:
        raise InputError(f"a radar plot needs three sets or more, the dumps have {len(table.sets)}")
    threshold = table.options.thresholds[0]
    figure = Figure(figsize=(7.2, 7.2))
    axes = figure.add_subplot(projection="polar")
    angles = np.linspace(0, 2 * np.pi, len(table.sets), endpoint=False)
    drawn = 0
    top = 0.0
    for i, row in enumerate(table.own):
        if any(name not in row.auc[threshold] for name in table.sets):
            continue
        values = 100 * np.array([row.auc[threshold][name] for name in table.sets])
        closed = np.append(values, values[0])
        style = _STYLES[i // 7 % 4]
        colour = _COLOURS[i % 7]
        turn = np.append(angles, angles[0])
        axes.plot(turn, closed, style, color=colour, linewidth=1.8, label=row.name)
        axes.fill(angles, values, color=colour, alpha=0.08)
        drawn += 1
        top = max(top, float(values.max()))
    polar = axes  # methods of polar axes that the type of add_subplot does not tell
    polar.set_theta_zero_location("N")  # type: ignore[attr-defined]
    polar.set_theta_direction(-1)  # type: ignore[attr-defined]
    axes.set_xticks(angles, [short_name(name) for name in table.sets])
    axes.tick_params(axis="x", pad=6)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = math.sin(angle)  # of the circle, clockwise from the top
        if abs(side) > 0.1:
            label.set_horizontalalignment("left" if side > 0 else "right")
    limit = min(100.0, 10 * math.ceil(max(top, 1.0) / 10))
    axes.set_ylim(0, limit)
    ticks = np.arange(20, limit + 1, 20)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], color=_GRAY, fontsize=8)
    axes.grid(color="#d5d9dc", linewidth=0.7)
    axes.spines["polar"].set_color("#d5d9dc")
    _legend(figure, drawn)
    return figure


def curves(table: Table) -> Figure:
    """Draw the share of pairs below each error, a panel for every set.

    The dotted line is the first threshold: AUC is the mean height of the curve left of it.
    """
    from matplotlib.figure import Figure

    count = len(table.sets)
    across = min(4, count)
    down = -(-count // across)
    figure = Figure(figsize=(max(5.5, 3.0 * across), 2.5 * down + 0.9))
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
    _legend(figure, len(table.own))
    return figure


def _bounds(table: Table, row: Row, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return low and high ends in percent of the mean and of each set; NaN without bootstrap."""
    index = table.options.thresholds.index(threshold)
    bounds = [row.interval[threshold]]
    for name in table.sets:
        if name in row.metrics:
            low, high = row.metrics[name].interval(level=table.options.level)[:, index]
            bounds.append((float(low), float(high)))
        else:
            bounds.append((math.nan, math.nan))
    low_high = 100 * np.array(bounds)
    return low_high[:, 0], low_high[:, 1]


def _clean(axes: Axes, *, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e3e6e8", linewidth=0.7, zorder=0)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _legend(figure: Figure, count: int) -> None:
    """Put one legend above all panels and fit the panels below it."""
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            found.setdefault(label, handle)
    width, height = figure.get_size_inches()
    # An entry is its handle and its text, about 0.085 inches a letter.
    entry = 0.75 + 0.085 * max(map(len, found), default=0)
    columns = max(1, min(count, 4, int(width / entry)))
    lines = -(-len(found) // columns)
    used = (0.12 + 0.26 * lines) / height
    if found:
        figure.legend(
            list(found.values()),
            list(found),
            loc="upper center",
            bbox_to_anchor=(0.5, 1 - 0.02 / height),
            ncols=columns,
            frameon=False,
        )
    figure.tight_layout(rect=(0, 0, 1, 1 - used))
