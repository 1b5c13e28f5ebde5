"""Pictures of the worst pairs of matchers, and of those on which two of them differ most.

Each picture has one column a matcher: image 0 above image 1, matches between them in the colour of
their distance from the true epipolar lines. A page, ``index.html``, shows all of them.
"""

from __future__ import annotations

import hashlib
import html
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gim_hloc.errors import InputError, OutputError
from gim_hloc.evaluation import metrics
from gim_hloc.evaluation.dumps import Dump, DumpRecord, parse_dump_name, read_pose_dump
from gim_hloc.evaluation.options import PictureOptions
from gim_hloc.evaluation.predictions import Prediction, find_predictions
from gim_hloc.evaluation.protocol import CORRECT, epipolar_distance
from gim_hloc.evaluation.zeb.check import find_dumps
from gim_hloc.evaluation.zeb.datasets import ZebPair, find_root, find_set, read_labels
from gim_hloc.evaluation.zeb.run import ZebPairs
from gim_hloc.evaluation.zeb.sets import ZebSet, set_folder
from gim_hloc.files import write_atomic
from gim_hloc.images import read_rgb

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont


logger = logging.getLogger(__name__)

_INDEX = "index.html"
_GAP = 4  # white px between images
_MARGIN = 12  # white px around everything
_TEXT = 15  # px, height of letters
_LEADING = 20  # px, from line to line
_RADIUS = 2  # px of a match's dot
_SHIFT = 4  # bits after the point in OpenCV's drawing coordinates
_GOOD_PX = 0.5  # distances up to here, the threshold of ZEB's RANSAC, have the first colour
# Okabe and Ito's: good, doubtful, wrong; told apart by colour-blind eyes too.
_COLOURS = np.array([(0, 158, 115), (240, 228, 66), (213, 94, 0)], dtype=np.float64)
_UNKNOWN = (140, 140, 140)  # the true pose has no epipolar lines
_BAR = 160  # px, length of the legend


@dataclass(frozen=True, kw_only=True)
class PictureList:
    """The pictures of one list of pairs."""

    dataset: str
    title: str
    files: tuple[Path, ...]  # in the list's order; a pair may be in several lists


@dataclass(frozen=True, kw_only=True)
class PictureReport:
    """What `draw_worst` wrote."""

    index: Path
    lists: tuple[PictureList, ...]
    problems: tuple[str, ...]  # what could not be drawn, one sentence each

    @property
    def pictures(self) -> int:
        """Number of different pictures."""
        return len({path for entry in self.lists for path in entry.files})


@dataclass(frozen=True, kw_only=True)
class _Column:
    """One matcher on one set."""

    title: str
    dump: Dump
    records: dict[str, DumpRecord]
    run: Path  # folder of the run that has the matches


def draw_worst(
    folder: str | os.PathLike[str],
    dumps: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    matchers: Sequence[str] = (),
    sets: Sequence[str] = (),
    run: str | os.PathLike[str] | None = None,
    options: PictureOptions | None = None,
) -> PictureReport:
    """Draw the worst pairs of one or two matchers, and of two those on which they differ most.

    Args:
        folder: with the images: ``zeb/`` in it, or ``zeb/`` itself.
        dumps: files or folders of `gim_hloc.evaluation.zeb.run`; of each set, one or two remain.
        output: folder of the pictures, made if it does not exist.
        matchers: only these.
        sets: only these.
        run: folder of the run with the matches; by default the one that a dump lies in.
        options: which pairs, and how large.

    Returns:
        What was drawn. A pair without image, label or matches is named among the problems, and so
        is a set without matches; the rest is drawn.

    Raises:
        InputError: more than two dumps of a set, none at all, no set, or nothing could be drawn.
    """
    options = options or PictureOptions()
    root, output = find_root(folder), Path(output)
    by_set, problems = _columns(dumps, matchers, sets, run)
    for dataset, columns in by_set.items():
        if len(columns) == 2 and columns[0].records.keys().isdisjoint(columns[1].records):
            problems.append(f"{dataset}: {' and '.join(c.title for c in columns)} share no pair")
    output.mkdir(parents=True, exist_ok=True)
    lists: list[PictureList] = []
    captions: dict[Path, list[str]] = {}
    for dataset, columns in by_set.items():
        try:
            drawer = _Set(root, dataset, columns, output, options)
        except (InputError, OutputError) as error:
            problems.append(f"{dataset}: {error}")
            continue
        for title, identifiers in _chosen(columns, options):
            files = []
            for identifier in identifiers:
                try:
                    path = drawer.draw(identifier)
                except InputError as error:
                    problems.append(f"{dataset} {identifier}: {error}")
                    continue
                captions[path] = drawer.caption(identifier)
                files.append(path)
            if len(identifiers) < options.count:
                logger.info("%s: %s has %d pairs.", dataset, title, len(identifiers))
            lists.append(PictureList(dataset=dataset, title=title, files=tuple(files)))
    problems = list(dict.fromkeys(problems))
    for problem in problems:
        logger.warning("%s", problem)
    if not any(entry.files for entry in lists):
        raise InputError("No picture could be drawn: " + "; ".join(problems[:3] or ["no pair"]))
    index = output / _INDEX
    write_atomic(index, _page(lists, captions, problems))
    return PictureReport(index=index, lists=tuple(lists), problems=tuple(problems))


def _columns(
    dumps: Sequence[str | os.PathLike[str]],
    matchers: Sequence[str],
    sets: Sequence[str],
    run: str | os.PathLike[str] | None,
) -> tuple[dict[str, list[_Column]], list[str]]:
    """The one or two dumps of each set, and what is wrong with others."""
    wanted = {set_folder(name) for name in sets}
    problems: list[str] = []
    found: dict[str, list[Dump]] = {}
    for path in find_dumps(dumps):
        named = parse_dump_name(path.name)
        if named is not None and (
            (matchers and named[0] not in matchers)
            or (wanted and set_folder(named[1]) not in wanted)
        ):
            continue
        try:
            dump = read_pose_dump(path)
        except InputError as error:
            problems.append(str(error))
            continue
        found.setdefault(dump.dataset, []).append(dump)
    if not found:
        raise InputError(
            "There is no dump of these matchers and sets" + "".join(f"; {p}" for p in problems[:3])
        )
    having = {dump.matcher for own in found.values() for dump in own}
    problems += [f"There is no dump of {name}" for name in matchers if name not in having]
    result: dict[str, list[_Column]] = {}
    for dataset, own in found.items():
        # In the order asked for: "A is better" then means the first.
        own.sort(key=lambda dump: list(matchers).index(dump.matcher) if matchers else 0)
        if len(own) > 2:
            names = ", ".join(str(dump.path) for dump in own)
            raise InputError(
                f"Two dumps of a set can be compared, {dataset} has {len(own)} ({names}): name one "
                "or two matchers."
            )
        titles = [f"{dump.matcher} ({dump.version})" for dump in own]
        if len(set(titles)) < len(titles):
            places = [dump.path.resolve().parent for dump in own if dump.path]
            folders = [place.name for place in places]
            if len(set(folders)) < len(folders):  # by one protocol, but of two runs
                folders = [str(place) for place in places]
            titles = [f"{title}, {name}" for title, name in zip(titles, folders, strict=True)]
        columns = []
        for title, dump in zip(titles, own, strict=True):
            assert dump.path is not None  # it was read
            home = Path(run) if run is not None else _run_folder(dump.path.resolve())
            records = {record.identifier: record for record in dump.unique}
            columns.append(_Column(title=title, dump=dump, records=records, run=home))
        result[dataset] = columns
    return result, problems


def _run_folder(path: Path) -> Path:
    """Of <run>/dump/<protocol>/<file>; the root where the path is shorter."""
    return path.parents[min(2, len(path.parents) - 1)]


def _chosen(columns: Sequence[_Column], options: PictureOptions) -> list[tuple[str, list[str]]]:
    """Titles of lists and the identifiers in them."""
    lists = []
    if len(columns) == 2:
        first, second = columns
        try:
            gaps = metrics.most_different(
                first.dump, second.dump, count=len(first.records), limit=options.limit
            )
        except InputError:  # no pair in common, which is told
            gaps = []
        for column, sign in ((first, -1), (second, 1)):
            better = [gap.identifier for gap in gaps if gap.gap * sign > 0][: options.count]
            lists.append((f"{column.title} is better", better))
    for column in columns:
        pairs = metrics.worst(column.dump, count=options.count)
        lists.append((f"Worst pairs of {column.title}", [identifier for identifier, _ in pairs]))
    return lists


class _Set:
    """Draws pairs of one set."""

    def __init__(
        self,
        root: Path,
        dataset: str,
        columns: Sequence[_Column],
        output: Path,
        options: PictureOptions,
    ) -> None:
        self.zeb_set: ZebSet = find_set(dataset, root)
        self.folder = root / self.zeb_set.folder
        self.pairs = {pair.identifier: pair for pair in read_labels(root, self.zeb_set).pairs}
        self.columns, self.options = columns, options
        self.output = output / self.zeb_set.folder
        names = {name for _, identifiers in _chosen(columns, options) for name in identifiers}
        wanted = ZebPairs(
            name=dataset,
            root=root,
            dump_name=None,
            pairs=tuple(self.pairs[name] for name in names if name in self.pairs),
            bad=(),
            zeb_set=self.zeb_set,
        )
        keys = wanted.keys()
        self.predictions = [
            find_predictions(column.run, column.dump.matcher, keys).read() for column in columns
        ]
        if not any(self.predictions):
            runs = ", ".join(dict.fromkeys(str(column.run) for column in columns))
            raise InputError(f"{runs} has no matches of these pairs.")
        self.output.mkdir(parents=True, exist_ok=True)

    def draw(self, identifier: str) -> Path:
        """Draw one pair unless it is drawn already; returns the file."""
        pair = self.pairs.get(identifier)
        if pair is None:
            raise InputError(f"{self.folder} has no usable label of it")
        known = [predictions.get(identifier) for predictions in self.predictions]
        if not any(known):
            raise InputError(f"there are no matches of {pair.image0} and {pair.image1} as they are")
        path = self.output / f"{_file_name(identifier)}.jpg"
        panels = [
            _panel(self.folder, pair, prediction, self._lines(column, identifier), self.options)
            for column, prediction in zip(self.columns, known, strict=True)
        ]
        overlap = (pair.covisible0 + pair.covisible1) / 2
        title = f"{self.zeb_set.name}  {identifier}  overlap {overlap:.2f}"
        write_atomic(path, _jpeg(_sheet(panels, title, _limit_px(pair))))
        return path

    def caption(self, identifier: str) -> list[str]:
        """Lines for the page: the identifier, then each matcher with its numbers."""
        lines = [identifier]
        for column in self.columns:
            title, *numbers = self._lines(column, identifier)
            lines.append(f"{title}: {'; '.join(numbers)}")
        return lines

    def _lines(self, column: _Column, identifier: str) -> list[str]:
        record = column.records.get(identifier)
        if record is None:
            return [column.title, "not run on this pair"]
        if record.failed:
            error = "no pose"
        else:
            error = (
                f"error {record.pose_error:.2f}° (R {record.rotation_error:.2f}°, "
                f"t {record.translation_error:.2f}°)"
            )
        return [column.title, error, _counts(record)]


def _counts(record: DumpRecord) -> str:
    text = f"{record.correct_before} correct matches"
    if record.precision_before > 0:
        total = round(record.correct_before / record.precision_before)
        text = f"{record.correct_before} of {total} matches correct"
    if record.precision_after > 0:
        inliers = round(record.correct_after / record.precision_after)
        text += f", {record.correct_after} of {inliers} inliers"
    return text


def _file_name(identifier: str) -> str:
    """A name that every file system takes, different for different identifiers."""
    safe = re.sub(r"[^\w.-]+", "_", identifier, flags=re.ASCII)[-80:]
    return f"{safe}-{hashlib.sha256(identifier.encode()).hexdigest()[:8]}"


# ---------------------------------------------------------------------------------------- drawing


def match_errors(prediction: Prediction, pair: ZebPair) -> np.ndarray:
    """Return the distance (M,) of matches from the true epipolar lines, in pixels.

    The root mean square over both images, that of normalised coordinates times the mean focal
    length; NaN where the true pose has no translation and so no lines.
    """
    points = (prediction.points0.astype(np.float64), prediction.points1.astype(np.float64))
    if not pair.T_0to1[:3, 3].any():
        return np.full(len(points[0]), np.nan)
    squared = epipolar_distance(*points, pair.K0, pair.K1, pair.T_0to1)
    errors: np.ndarray = np.sqrt(squared / 2) * _focal(pair)
    return errors


def _focal(pair: ZebPair) -> float:
    return float(np.mean([K[i, i] for K in (pair.K0, pair.K1) for i in (0, 1)]))


def _limit_px(pair: ZebPair) -> float:
    """Distance in pixels from which ZEB counts a match as wrong."""
    return math.sqrt(CORRECT / 2) * _focal(pair)


def error_colours(errors: np.ndarray, limit: float) -> np.ndarray:
    """Return RGB (M, 3) uint8: green up to half a pixel, yellow, red from ``limit`` on.

    Args:
        errors: (M,) px; NaN is gray.
        limit: px from which a match is wrong.
    """
    span = math.log(max(limit, 2 * _GOOD_PX) / _GOOD_PX)
    with np.errstate(divide="ignore", invalid="ignore"):
        place = np.clip(np.log(errors / _GOOD_PX) / span, 0, 1) * (len(_COLOURS) - 1)
    known = np.isfinite(place)
    low = np.where(known, place, 0).astype(int).clip(0, len(_COLOURS) - 2)
    part = (np.where(known, place, 0) - low)[:, None]
    mixed = _COLOURS[low] * (1 - part) + _COLOURS[low + 1] * part
    mixed[~known] = _UNKNOWN
    return np.rint(mixed).astype(np.uint8)


def _panel(
    folder: Path,
    pair: ZebPair,
    prediction: Prediction | None,
    lines: Sequence[str],
    options: PictureOptions,
) -> np.ndarray:
    """One matcher: lines of text, then image 0 above image 1 with the matches."""
    import cv2

    pictures, scales = [], []
    for name in (pair.image0, pair.image1):
        full = read_rgb(folder / name, upright=False)
        height, width = full.shape[:2]
        scale = options.side / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        pictures.append(cv2.resize(full, size, interpolation=how))
        scales.append(np.array([size[0] / width, size[1] / height]))
    (h0, w0), (h1, w1) = (picture.shape[:2] for picture in pictures)
    top = _LEADING * len(lines) + _GAP
    # As wide as the text at least.
    width = max(w0, w1, *(_width(line, bold=k == 0) for k, line in enumerate(lines)))
    canvas = np.full((top + h0 + _GAP + h1, width, 3), 255, np.uint8)
    origins = [np.array([0, top]), np.array([0, top + h0 + _GAP])]
    for picture, (x, y) in zip(pictures, origins, strict=True):
        canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    if prediction is not None and len(prediction.scores):
        errors = match_errors(prediction, pair)
        # Wrong ones last, so that they are on top.
        order = np.argsort(np.nan_to_num(errors, nan=0.0), kind="stable")
        ends = [
            np.rint(((points[order] + 0.5) * scale - 0.5 + origin) * (1 << _SHIFT)).astype(int)
            for points, scale, origin in zip(
                (prediction.points0, prediction.points1), scales, origins, strict=True
            )
        ]
        colours = error_colours(errors[order], _limit_px(pair)).tolist()
        drawn = canvas.copy()
        count = len(order)
        shown = np.unique(np.linspace(0, count - 1, min(count, options.lines)).astype(int))
        for k in shown.tolist():
            a, b = ends[0][k].tolist(), ends[1][k].tolist()
            cv2.line(drawn, a, b, colours[k], 1, cv2.LINE_AA, _SHIFT)
        canvas = cv2.addWeighted(drawn, 0.65, canvas, 0.35, 0)
        for points in ends:
            for point, colour in zip(points.tolist(), colours, strict=True):
                cv2.circle(canvas, point, _RADIUS << _SHIFT, colour, -1, cv2.LINE_AA, _SHIFT)
    return _write(canvas, [(0, _LEADING * k, line, k == 0) for k, line in enumerate(lines)])


def _sheet(panels: Sequence[np.ndarray], title: str, limit: float) -> np.ndarray:
    """Panels side by side under a title, above what the colours mean."""
    height = max(panel.shape[0] for panel in panels)
    width = sum(panel.shape[1] for panel in panels) + _MARGIN * (len(panels) - 1)
    width = max(width, _width(title, bold=True), _BAR + 330)
    top = _MARGIN + _LEADING + _GAP
    canvas = np.full((top + height + 2 * _MARGIN + _LEADING, width + 2 * _MARGIN, 3), 255, np.uint8)
    x = _MARGIN
    for panel in panels:
        canvas[top : top + panel.shape[0], x : x + panel.shape[1]] = panel
        x += panel.shape[1] + _MARGIN
    below = top + height + _MARGIN
    bar = np.geomspace(_GOOD_PX, max(limit, 2 * _GOOD_PX), _BAR)
    canvas[below + 3 : below + 3 + _TEXT, _MARGIN : _MARGIN + _BAR] = error_colours(bar, limit)
    legend = f"{_GOOD_PX:g} px to {limit:.1f} px from the true epipolar line"
    return _write(
        canvas,
        [(_MARGIN, _MARGIN, title, True), (_MARGIN + _BAR + 8, below, legend, False)],
    )


def _write(canvas: np.ndarray, texts: Sequence[tuple[int, int, str, bool]]) -> np.ndarray:
    """Write (x, y, text, bold) onto a picture. OpenCV's fonts have no letters beyond ASCII."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for x, y, text, bold in texts:
        draw.text((x, y), text, fill=(28, 33, 38), font=_font(bold))
    return np.asarray(picture)


def _width(text: str, *, bold: bool) -> int:
    """Pixels that a line takes."""
    return math.ceil(_font(bold).getlength(text)) + 1


def _font(bold: bool) -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), _TEXT)


def _jpeg(picture: np.ndarray) -> bytes:
    import cv2

    quality = [cv2.IMWRITE_JPEG_QUALITY, 90]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), quality)
    if not done:
        raise OutputError(f"A picture of {picture.shape[1]}x{picture.shape[0]} cannot be coded.")
    return bytes(data)


# -------------------------------------------------------------------------------------------- page


def _page(
    lists: Sequence[PictureList], captions: dict[Path, list[str]], problems: Sequence[str]
) -> str:
    from urllib.parse import quote

    write: Callable[[str], str] = html.escape
    parts = ["<h1>Pairs of ZEB sets</h1>"]
    if problems:
        items = "".join(f"<li>{write(problem)}</li>" for problem in problems)
        parts.append(f"<h2>Problems</h2><ul>{items}</ul>")
    for entry in lists:
        parts.append(f"<h2>{write(entry.dataset)}: {write(entry.title)}</h2>")
        if not entry.files:
            parts.append("<p>None.</p>")
        figures = []
        for path in entry.files:
            link = quote(f"{path.parent.name}/{path.name}")
            text = "<br>".join(write(line) for line in captions[path])
            figures.append(
                f'<figure><a href="{link}"><img src="{link}" loading="lazy" alt=""></a>'
                f"<figcaption>{text}</figcaption></figure>"
            )
        parts.append(f'<div class="sheet">{"".join(figures)}</div>')
    return _PAGE.replace("@BODY@", "\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Pairs of ZEB sets</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem; color: #1c2126; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 1.2rem; }
figure { margin: 0; } img { width: 100%; height: auto; border: 1px solid #e3e6e8; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
</style></head><body>
@BODY@
</body></html>
"""
