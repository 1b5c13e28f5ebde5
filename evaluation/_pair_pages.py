"""Files of an evaluation on a list of pairs: tables, a contact sheet where there is no truth."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tqdm import tqdm

from gim_hloc import draw, page, pair_pictures
from gim_hloc.errors import GimError
from gim_hloc.evaluation import homography
from gim_hloc.evaluation.fundamental import fundamental_scales
from gim_hloc.evaluation.predictions import Prediction
from gim_hloc.files import write_atomic
from gim_hloc.options import FitOptions
from gim_hloc.two_view import fit_geometry

if TYPE_CHECKING:
    from gim_hloc.evaluation.pair_lists import ListPairs, PairReport, PairRow
    from gim_hloc.evaluation.pair_set import Pair

logger = logging.getLogger(__name__)

_THUMBNAIL = 640  # px, width of a picture on the contact sheet
_QUALITY = 85  # of its JPEG
_NONE = "-"  # a number that is not known
_ABOUT = (
    "Inliers are matches that agree with a fundamental matrix estimated from them. Green: inliers "
    "of OpenCV's USAC; orange: all matches, where no geometry fits. Few wrong matches always agree "
    "with some geometry: about 15 inliers mean nothing, and alike buildings give more."
)
_ACCURACY_SHOWN = (1.0, 3.0, 5.0)  # px, of the accuracies in the table for people


def write(report: PairReport, selection: ListPairs, folder: Path, *, pictures: bool) -> list[Path]:
    """Write all files of a report.

    Args:
        report: figures.
        selection: the pairs, for pictures of them.
        folder: made if it does not exist; files of the same names are replaced.
        pictures: draw the pairs of a list without truth.

    Returns:
        The files that people open first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "results.md": to_markdown(report),
        "results.csv": _table_csv(report),
        "results.json": _json(report),
        "pairs.csv": _pairs_csv(report, selection),
    }
    for name, text in texts.items():
        write_atomic(folder / name, text)
    files = [folder / name for name in texts]
    if report.kind == "none":
        sheet = folder / "index.html"
        write_atomic(sheet, _contact_sheet(report, selection, folder, pictures=pictures))
        files.append(sheet)
    return files


def to_markdown(report: PairReport) -> str:
    """The table of a report as Markdown."""
    rows = report.rows
    header, cells = ["Matcher", "Protocol"], [[row.matcher, row.protocol] for row in rows]

    def add(title: str, values: Iterable[str]) -> None:
        header.append(title)
        for line, value in zip(cells, values, strict=True):
            line.append(value)

    unit = "px" if report.kind == "homography" else "°"
    for i, threshold in enumerate(rows[0].thresholds if rows else ()):
        add(f"AUC@{threshold:g}{unit}", (_auc(row, i) for row in rows))
    if report.kind == "homography":
        for limit in _ACCURACY_SHOWN:
            column = homography.ACCURACY_PX.index(limit)
            add(f"MMA@{limit:g}px", (_percent(row.accuracy[column]) for row in rows))
    if report.kind == "none":
        add("Matches", (_number(row.matches) for row in rows))
        add("Inliers", (_number(row.inliers) for row in rows))
    else:
        add("Precision", (_percent(row.precision_before) for row in rows))
        add("after", (_percent(row.precision_after) for row in rows))
        add("Matches", (_number(row.matches) for row in rows))
        add("Correct", (_number(row.correct_before) for row in rows))
        add("after", (_number(row.correct_after) for row in rows))
    add("Failed", (f"{row.failures} of {row.pairs}" for row in rows))
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join(lines) + "\n"


def _auc(row: PairRow, i: int) -> str:
    if not row.interval:
        return f"{100 * row.auc[i]:.1f}"
    low, high = row.interval[i]
    return f"{100 * row.auc[i]:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _percent(value: float) -> str:
    return _NONE if math.isnan(value) else f"{100 * value:.1f} %"


def _number(value: float) -> str:
    return _NONE if math.isnan(value) else f"{value:.0f}"


def _table_csv(report: PairReport) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    plain = [
        "matcher", "protocol", "pairs", "failures", "matches", "inliers", "precision_before",
        "precision_after", "correct_before", "correct_after",
    ]  # fmt: skip
    thresholds = report.rows[0].thresholds if report.rows else ()
    limits = homography.ACCURACY_PX if report.kind == "homography" else ()
    writer.writerow(
        plain
        + [f"auc@{t:g}{part}" for t in thresholds for part in ("", "_low", "_high")]
        + [f"accuracy@{t:g}px" for t in limits]
    )
    for row in report.rows:
        values: list[Any] = [getattr(row, name) for name in plain]
        for i, value in enumerate(row.auc):
            values += [value, *(row.interval[i] if row.interval else ("", ""))]
        writer.writerow(
            ["" if isinstance(v, float) and math.isnan(v) else v for v in (*values, *row.accuracy)]
        )
    return stream.getvalue()


def _json(report: PairReport) -> str:
    from gim_hloc.evaluation.pair_lists import problems

    pair_list = report.pair_list
    content = {
        "list": pair_list.name,
        "format": pair_list.format,
        "judged": report.kind,
        "pairs": len(pair_list),
        "rows": [dataclasses.asdict(row) for row in report.rows],
        "problems": problems(report),
        "seconds": report.run.seconds,
    }
    return json.dumps(_finite(content), indent=1) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not known is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pairs_csv(report: PairReport, selection: ListPairs) -> str:
    names = {pair.identifier: (pair.image0, pair.image1) for pair in selection.pairs}
    if report.kind == "none":
        columns = {"matches": "correct_before", "inliers": "correct_after"}
    elif report.kind == "homography":
        columns = {
            "corner_error_px": "rotation_error", "precision_before": "precision_before",
            "correct_before": "correct_before", "precision_after": "precision_after",
            "correct_after": "correct_after",
        }  # fmt: skip
    else:
        columns = {
            "rotation_error_deg": "rotation_error", "translation_error_deg": "translation_error",
            "precision_before": "precision_before", "correct_before": "correct_before",
            "precision_after": "precision_after", "correct_after": "correct_after",
        }  # fmt: skip
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["matcher", "protocol", "identifier", "image0", "image1", *columns])
    for result in report.run.results:
        for record in result.records:
            writer.writerow(
                [
                    *(result.matcher, result.protocol, record.identifier),
                    *names.get(record.identifier, ("", "")),
                    *(getattr(record, name) for name in columns.values()),
                ]
            )
    return stream.getvalue()


# ------------------------------------------------------------------------------------ contact sheet


def _contact_sheet(
    report: PairReport, selection: ListPairs, folder: Path, *, pictures: bool
) -> str:
    from gim_hloc.evaluation.pair_lists import problems

    results = {result.matcher: result for result in report.run.results}
    predictions = {matcher: result.predictions.read() for matcher, result in results.items()}
    counts: dict[tuple[str, str], list[str]] = {}
    for result in report.run.results:
        for record in result.records:
            counts.setdefault((result.matcher, record.identifier), []).append(
                f"{record.correct_after} inliers ({result.protocol})"
            )
    galleries = []
    bar = tqdm(selection.pairs, desc="pictures", unit="pair", disable=not pictures)
    for number, pair in enumerate(bar, start=1):
        figures: list[tuple[Any, ...]] = []
        for matcher in results:
            prediction = predictions[matcher].get(pair.identifier)
            if prediction is None:
                figures.append(("", "", [matcher, "failed, see the problems above"]))
                continue
            found = [f"{len(prediction.scores)} matches", *counts[matcher, pair.identifier]]
            lines = [matcher, ", ".join(found)]
            links = {}
            if pictures:
                try:
                    links = _draw(
                        prediction, pair, selection, folder, f"{number:04d}-{matcher}", lines
                    )
                except GimError as error:  # the image has gone since it was matched
                    logger.warning("%s", error)
            more = [(links["warp"], "image 1 projected onto image 0")] if "warp" in links else []
            figures.append((links.get("small", ""), links.get("match", ""), lines, *more))
        galleries.append((f"{number}. {pair.image0} and {pair.image1}", figures))
    return page.render(
        "pictures.html.j2",
        name=f"{report.pair_list.name}: {len(galleries)} pairs without ground truth",
        about=_ABOUT,
        problems=problems(report),
        heads=["Matcher", "Protocol", "Matches a pair", "Inliers a pair", "Failed"],
        rows=[[r.matcher, r.protocol, r.matches, r.inliers, r.failures] for r in report.rows],
        galleries=galleries,
    )


def _draw(
    prediction: Prediction,
    pair: Pair,
    selection: ListPairs,
    folder: Path,
    base: str,
    lines: list[str],
) -> dict[str, str]:
    """Write the pictures of one pair; returns their addresses, and adds a remark to ``lines``."""
    target = folder / "pictures"
    target.mkdir(exist_ok=True)
    points = prediction.points0, prediction.points1
    scale0, scale1 = fundamental_scales(prediction)
    fit = fit_geometry(*points, FitOptions(), scale0=scale0, scale1=scale1)
    images = selection.record(pair.image0), selection.record(pair.image1)
    matches = pair_pictures.draw_inliers(images, *points, fit, plain=False)
    pictures = {
        "small": draw.fit(matches, _THUMBNAIL, _THUMBNAIL),
        "match": matches,
        "warp": pair_pictures.draw_projection(images, points[0], fit),
    }
    links = {}
    for kind, picture in pictures.items():
        path = target / (f"{base}.jpg" if kind == "small" else f"{base}_{kind}.jpg")
        if picture is None:
            path.unlink(missing_ok=True)  # of an earlier run: it would pass for this one's
            continue
        # As JPEG: a list of a hundred pairs would give a gigabyte of PNG.
        write_atomic(path, draw.encode(picture, quality=_QUALITY))
        links[kind] = quote(f"pictures/{path.name}")
    if fit.remark:
        lines.append(fit.remark)
    return links
