"""Files of an evaluation on a list of pairs: tables, a contact sheet where there is no truth."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gim_hloc.errors import GimError, OutputError
from gim_hloc.evaluation import homography
from gim_hloc.evaluation.fundamental import fundamental_scales
from gim_hloc.evaluation.predictions import Prediction
from gim_hloc.files import write_atomic

if TYPE_CHECKING:
    from gim_hloc.evaluation.pair_lists import ListPairs, PairReport, PairRow
    from gim_hloc.evaluation.pair_set import Pair
    from gim_hloc.pipelines.match_pair import MatchResult

logger = logging.getLogger(__name__)

_THUMBNAIL = 640  # px, width of a picture on the contact sheet
_QUALITY = 85  # of its JPEG
_NONE = "-"  # a number that is not known
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
    """Return the table of a report as Markdown."""
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

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 2000px; padding: 0 1rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; overflow-wrap: anywhere; }
.row { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }
figure { margin: 0; }
img { width: 100%; height: auto; }
figcaption, td { font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
.remark { color: #a33; }
"""  # noqa: E501


def _contact_sheet(
    report: PairReport, selection: ListPairs, folder: Path, *, pictures: bool
) -> str:
    from tqdm import tqdm

    results = {result.matcher: result for result in report.run.results}
    predictions = {matcher: result.predictions.read() for matcher, result in results.items()}
    counts: dict[tuple[str, str], list[str]] = {}
    for result in report.run.results:
        for record in result.records:
            counts.setdefault((result.matcher, record.identifier), []).append(
                f"{record.correct_after} inliers ({result.protocol})"
            )
    sections = []
    bar = tqdm(selection.pairs, desc="pictures", unit="pair", disable=not pictures)
    for number, pair in enumerate(bar):
        figures = []
        for matcher in results:
            prediction = predictions[matcher].get(pair.identifier)
            told = counts.get((matcher, pair.identifier), [])
            figures.append(
                _figure(number, pair, matcher, prediction, told, selection, folder, pictures)
            )
        title = html.escape(f"{number + 1}. {pair.image0} and {pair.image1}")
        sections.append(f'<h2>{title}</h2>\n<div class="row">{"".join(figures)}</div>')
    return _page(report, sections)


def _figure(
    number: int,
    pair: Pair,
    matcher: str,
    prediction: Prediction | None,
    told: Sequence[str],
    selection: ListPairs,
    folder: Path,
    pictures: bool,
) -> str:
    name = html.escape(matcher)
    if prediction is None:
        caption = f'{name}: <span class="remark">failed, see the problems above</span>'
        return f"<figure><figcaption>{caption}</figcaption></figure>"
    caption = f"{name}: {len(prediction.scores)} matches, " + html.escape(", ".join(told))
    links = ""
    if pictures:
        try:
            result = match_result(prediction, pair, matcher, selection)
            links = _draw(result, folder, f"{number + 1:04d}-{matcher}")
        except GimError as error:  # the image has gone since it was matched
            logger.warning("%s", error)
        else:
            if result.remark:
                caption += f'<br><span class="remark">{html.escape(result.remark)}</span>'
    return f"<figure>{links}<figcaption>{caption}</figcaption></figure>"


def match_result(
    prediction: Prediction, pair: Pair, matcher: str, selection: ListPairs
) -> MatchResult:
    """A prediction with the geometry of GIM's demo, as `gim_hloc.pipelines.match_pair` has it."""
    from gim_hloc.pipelines.match_pair import FitOptions, MatchResult, fit_geometry

    scales = fundamental_scales(prediction)
    return MatchResult(
        matcher=matcher,
        images=(selection.record(pair.image0), selection.record(pair.image1)),
        keypoints0=prediction.points0,
        keypoints1=prediction.points1,
        scores=prediction.scores,
        fit=fit_geometry(
            prediction.points0,
            prediction.points1,
            FitOptions(),
            scale0=scales[0],
            scale1=scales[1],
        ),
    )


def _draw(result: MatchResult, folder: Path, base: str) -> str:
    """Write the pictures of one pair; returns the HTML that shows them."""
    import cv2

    from gim_hloc.pipelines import _match_pictures

    target = folder / "pictures"
    target.mkdir(exist_ok=True)
    matches = _match_pictures.draw_matches(result)
    # The upper half shows the images without matches.
    half = matches[matches.shape[0] // 2 :]
    height = max(1, round(half.shape[0] * _THUMBNAIL / half.shape[1]))
    pictures = {
        "": cv2.resize(half, (_THUMBNAIL, height), interpolation=cv2.INTER_AREA),
        "_match": matches,
        "_warp": _match_pictures.draw_warp(result),
    }
    names = {}
    for kind, picture in pictures.items():
        path = target / f"{base}{kind}.jpg"
        if picture is None:
            path.unlink(missing_ok=True)  # of an earlier run: it would pass for this one's
            continue
        write_atomic(path, _jpeg(picture))
        names[kind] = html.escape(f"pictures/{path.name}")
    image = (
        f'<a href="{names["_match"]}"><img loading="lazy" width="{_THUMBNAIL}" '
        f'height="{height}" alt="matches" src="{names[""]}"></a>'
    )
    if "_warp" in names:
        image += f'<br><a href="{names["_warp"]}">image 1 projected onto image 0</a>'
    return image


def _jpeg(rgb: np.ndarray) -> bytes:
    """As JPEG: a list of a hundred pairs would give a gigabyte of PNG."""
    import cv2

    done, data = cv2.imencode(
        ".jpg", np.ascontiguousarray(rgb[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    )
    if not done:
        raise OutputError(f"A picture of {rgb.shape[1]} x {rgb.shape[0]} cannot be coded.")
    return bytes(data)


def _page(report: PairReport, sections: Sequence[str]) -> str:
    from gim_hloc.evaluation.pair_lists import problems

    name = html.escape(report.pair_list.name)
    rows = "".join(
        f"<tr><td>{html.escape(row.matcher)}</td><td>{html.escape(row.protocol)}</td>"
        f"<td>{row.matches:.0f}</td><td>{row.inliers:.0f}</td><td>{row.failures}</td></tr>"
        for row in report.rows
    )
    faults = "".join(f"<li>{html.escape(fault)}</li>" for fault in problems(report))
    faults = f'<h2>Problems</h2><ul class="remark">{faults}</ul>' if faults else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{name}: {len(sections)} pairs without ground truth</h1>\n"
        "<p>Inliers are matches that agree with a fundamental matrix estimated from them. Green: "
        "inliers of OpenCV's USAC; orange: all matches, where no geometry fits. Few wrong matches "
        "always agree with some geometry: about 15 inliers mean nothing, and alike buildings give "
        "more.</p>\n"
        "<table><tr><th>Matcher</th><th>Protocol</th><th>Matches a pair</th><th>Inliers a pair"
        f"</th><th>Failed</th></tr>{rows}</table>\n{faults}\n" + "\n".join(sections) + "\n"
        "</body></html>\n"
    )
