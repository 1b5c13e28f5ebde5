"""Files of an evaluation on a list of pairs: tables, a contact sheet where there is no truth."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tqdm import tqdm

from gim_hloc import draw, page, pair_pictures
from gim_hloc.errors import GimError
from gim_hloc.evaluation import homography
from gim_hloc.evaluation.fundamental import fundamental_scales
from gim_hloc.evaluation.predictions import Prediction
from gim_hloc.files import json_value, write_atomic
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
_PLAIN = [
    "matcher", "protocol", "pairs", "failures", "matches", "inliers", "precision_before",
    "precision_after", "correct_before", "correct_after",
]  # fmt: skip
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
    lines = [_shown(report, row) for row in report.rows]
    heads = list(lines[0]) if lines else []
    rules = ["---:" if k > 1 else "---" for k in range(len(heads))]
    rows = [[head.strip() for head in heads], rules, *(list(line.values()) for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _shown(report: PairReport, row: PairRow) -> dict[str, str]:
    """A row as people read it; heads that are alike differ by blanks."""
    unit = "px" if report.kind == "homography" else "°"
    aucs = {f"AUC@{t:g}{unit}": _auc(row, i) for i, t in enumerate(row.thresholds)}
    if report.kind == "none":
        counts = {"Matches": _number(row.matches), "Inliers": _number(row.inliers)}
    else:
        counts = {
            "Precision": _percent(row.precision_before),
            "after": _percent(row.precision_after),
            "Matches": _number(row.matches),
            "Correct": _number(row.correct_before),
            "after ": _number(row.correct_after),
        }
    return {
        "Matcher": row.matcher,
        "Protocol": row.protocol,
        **aucs,
        **{
            f"MMA@{limit:g}px": _percent(value)
            for limit, value in zip(homography.ACCURACY_PX, row.accuracy, strict=False)
            if limit in _ACCURACY_SHOWN
        },
        **counts,
        "Failed": f"{row.failures} of {row.pairs}",
    }


def _auc(row: PairRow, i: int) -> str:
    if not row.interval:
        return f"{100 * row.auc[i]:.1f}"
    low, high = row.interval[i]
    return f"{100 * row.auc[i]:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _percent(value: float) -> str:
    return _NONE if math.isnan(value) else f"{100 * value:.1f} %"


def _number(value: float) -> str:
    return _NONE if math.isnan(value) else f"{value:.0f}"


def _csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Numbers that are not known are empty."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value != value else value for key, value in row.items()})
    return stream.getvalue()


def _table_csv(report: PairReport) -> str:
    rows = []
    for row in report.rows:
        line = {name: getattr(row, name) for name in _PLAIN}
        for i, t in enumerate(row.thresholds):
            low, high = row.interval[i] if row.interval else ("", "")
            line |= {f"auc@{t:g}": row.auc[i], f"auc@{t:g}_low": low, f"auc@{t:g}_high": high}
        accuracy = zip(homography.ACCURACY_PX, row.accuracy, strict=False)
        rows.append(line | {f"accuracy@{limit:g}px": value for limit, value in accuracy})
    return _csv(rows, list(rows[0]) if rows else _PLAIN)


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
    return json.dumps(json_value(content), indent=1) + "\n"


def _pairs_csv(report: PairReport, selection: ListPairs) -> str:
    names = {pair.identifier: (pair.image0, pair.image1) for pair in selection.pairs}
    judged = ("precision_before", "correct_before", "precision_after", "correct_after")
    columns = {
        "none": {"matches": "correct_before", "inliers": "correct_after"},
        "homography": {"corner_error_px": "rotation_error", **{name: name for name in judged}},
        "pose": {
            "rotation_error_deg": "rotation_error",
            "translation_error_deg": "translation_error",
            **{name: name for name in judged},
        },
    }[report.kind]
    rows = []
    for result in report.run.results:
        for record in result.records:
            image0, image1 = names.get(record.identifier, ("", ""))
            known = {"matcher": result.matcher, "protocol": result.protocol}
            known |= {"identifier": record.identifier, "image0": image0, "image1": image1}
            rows.append(known | {key: getattr(record, name) for key, name in columns.items()})
    return _csv(rows, ["matcher", "protocol", "identifier", "image0", "image1", *columns])


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
