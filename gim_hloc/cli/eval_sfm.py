"""``gim-eval-sfm MODEL [MODEL ...] TRUTH``: how far models are from a COLMAP model as the truth."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gim_hloc.cli import common
from gim_hloc.errors import InputError, OutputError

if TYPE_CHECKING:
    from gim_hloc.evaluation import sfm

COLUMNS = {
    "registered": ("images", "{:.0f}"),
    "auc@0.5": ("AUC@0.5°", "{:.2f}"),
    "auc@1": ("@1°", "{:.2f}"),
    "auc@3": ("@3°", "{:.2f}"),
    "auc@5": ("@5°", "{:.2f}"),
    "rotation_median": ("rot med °", "{:.3f}"),
    "rotation_mean": ("mean", "{:.3f}"),
    "rotation_max": ("max", "{:.3f}"),
    "centre_median": ("centre med", "{:.4g}"),
    "centre_mean": ("mean", "{:.4g}"),
    "centre_max": ("max", "{:.4g}"),
    "centre_radius_mean": ("mean %rad", "{:.4f}"),
    "centre_extent_mean": ("%ext", "{:.4f}"),
    "points": ("points", "{:.0f}"),
    "track_length": ("track", "{:.2f}"),
    "reprojection": ("reproj px", "{:.3f}"),
}
"""Metric -> heading and format in the printed table."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Compare models with a truth: rotation, centre and relative pose errors.

    The alignment is one similarity fitted to the camera centres. Percentages are of the scene
    radius (mean distance of the true camera centres from their mean) and of the extent (largest
    distance between two of them). AUC is over the relative poses of all pairs of true images;
    a pair with a missing image counts as failure.
    """

    # One argument and not two: a list before a single path swallows that path too.
    paths: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL [MODEL ...] TRUTH")
    ]
    """COLMAP models (folders, binary or text) or output folders of gim-reconstruct; the last is
    taken as the truth and needs no points."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write all numbers, those of each image included, to this file."""
    csv: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write one row a model to this file."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write cumulative error curves and the cameras from above to this picture."""
    per_image: bool = False
    """Print the errors of each image."""
    robust: bool = False
    """Align with a fit that ignores cameras which are plainly wrong."""
    bounds: Annotated[str, tyro.conf.arg(metavar="NAME=VALUE,...")] = ""
    """Limits such as auc@1=90,centre=0.06; exit code 1 when a model misses one. Names are those
    in the JSON file; centre is the mean in percent of the radius, rotation the mean in degrees."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    options = common.parse(EvalOptions, prog="gim-eval-sfm", args=common.prog(argv))
    common.configure_logging()
    return common.run(lambda: _run(options))


def _run(options: EvalOptions) -> int:
    from gim_hloc.evaluation import sfm

    *models, truth_path = options.paths or (None,)
    if not models or truth_path is None:
        raise InputError("two folders are needed: a model, and after it the truth")
    bounds = sfm.parse_bounds(options.bounds)
    truth = sfm.read_cameras(truth_path)
    scores = []
    for model in models:
        _, others = sfm.find_model(model)
        scores.append(sfm.evaluate(model, truth, robust=options.robust))
        if others:
            names = ", ".join(f"{p.name} ({len(sfm.read_cameras(p))} images)" for p in others)
            sys.stdout.write(f"{model}: judged is the first model; it also holds {names}\n")
    sys.stdout.write(table(scores) + "\n")
    if options.per_image:
        sys.stdout.write("".join(f"\n{per_image_table(one)}\n" for one in scores))
    _write(options, scores)
    missed = [line for one in scores for line in sfm.missed_bounds(one, bounds)]
    sys.stdout.write("".join(f"missed: {line}\n" for line in missed))
    return 1 if missed else 0


def table(scores: Sequence[sfm.SfmScores]) -> str:
    """One row a model, aligned."""
    from gim_hloc.evaluation import sfm

    rows = [["model", *(heading for heading, _ in COLUMNS.values())]]
    for one in scores:
        values = {name: sfm.METRICS[name].value(one) for name in COLUMNS}
        cells = [
            "-" if math.isnan(values[name]) else form.format(values[name])
            for name, (_, form) in COLUMNS.items()
        ]
        cells[0] += f"/{one.total}"
        rows.append([one.model, *cells])
    return _aligned(rows)


def per_image_table(scores: sfm.SfmScores) -> str:
    """One row an image of the truth, worst centre last."""
    rows = [[scores.model, "rotation °", "centre", "% radius"]]
    for image in sorted(scores.images, key=lambda i: (not i.registered, i.centre, i.name)):
        if not image.registered:
            rows.append([image.name, "missing", "", ""])
            continue
        percent = 100 * image.centre / scores.radius if scores.radius else math.nan
        numbers = f"{image.rotation_deg:.4f}", f"{image.centre:.4g}", f"{percent:.4f}"
        rows.append([image.name, *numbers])
    return _aligned(rows)


def _write(options: EvalOptions, scores: Sequence[sfm.SfmScores]) -> None:
    from gim_hloc.evaluation import sfm

    try:
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps([one.as_dict() for one in scores], indent=1)
            options.json.write_text(text + "\n")
        if options.csv is not None:
            options.csv.parent.mkdir(parents=True, exist_ok=True)
            with options.csv.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["model", "total", *sfm.METRICS])
                for one in scores:
                    values = [metric.value(one) for metric in sfm.METRICS.values()]
                    writer.writerow([one.model, one.total, *values])
        if options.plot is not None:
            sfm.plot(scores, options.plot)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write the result: {error}") from error


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
