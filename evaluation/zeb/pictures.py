"""Pictures of the worst pairs of matchers, and of those on which two of them differ most.

Each picture has one column a matcher: image 0 above image 1, matches between them in the colour of
their distance from the true epipolar lines. A page, ``index.html``, shows all of them.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from gim_hloc import draw, page
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

logger = logging.getLogger(__name__)

_INDEX = "index.html"
_MARGIN = 12  # white px around everything
_GOOD_PX = 0.5  # distances up to here, the threshold of ZEB's RANSAC, have the first colour


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
    galleries = [
        (
            f"{entry.dataset}: {entry.title}",
            [
                (link := quote(f"{path.parent.name}/{path.name}"), link, captions[path])
                for path in entry.files
            ],
        )
        for entry in lists
    ]
    text = page.render(
        "pictures.html.j2", name="Pairs of ZEB sets", problems=problems, galleries=galleries
    )
    write_atomic(index, text)
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
        sheet = _sheet(panels, title, _limit_px(pair))
        write_atomic(path, draw.encode(sheet, quality=90))
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
    """Distance (M,) of matches from the true epipolar lines, in pixels.

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


def _panel(
    folder: Path,
    pair: ZebPair,
    prediction: Prediction | None,
    lines: Sequence[str],
    options: PictureOptions,
) -> np.ndarray:
    """One matcher: lines of text, then image 0 above image 1 with the matches."""
    full = [read_rgb(folder / name, upright=False) for name in (pair.image0, pair.image1)]
    pictures = [draw.fit(one, options.side, options.side, enlarge=True) for one in full]
    ends, colours = [np.zeros((0, 2))] * 2, np.zeros((0, 3), np.uint8)
    if prediction is not None:
        errors = match_errors(prediction, pair)
        # Wrong ones last, so that they are on top.
        order = np.argsort(np.nan_to_num(errors, nan=0.0), kind="stable")
        ends = [
            draw.scale_points(points[order], (one.shape[1], one.shape[0]), picture)
            for points, one, picture in zip(
                (prediction.points0, prediction.points1), full, pictures, strict=True
            )
        ]
        colours = draw.error_colours(errors[order], _GOOD_PX, _limit_px(pair))
    drawn = draw.draw_matches(pictures, ends, colours, lines=options.lines, radius=2, below=True)
    return draw.caption(drawn, lines, above=True)


def _sheet(panels: Sequence[np.ndarray], title: str, limit: float) -> np.ndarray:
    """Panels side by side under a title, above what the colours mean."""
    colours = draw.error_colours(np.geomspace(_GOOD_PX, limit, 160), _GOOD_PX, limit)
    bar = np.repeat(colours[None], 14, axis=0)
    legend = f"{_GOOD_PX:g} px to {limit:.1f} px from the true epipolar line"
    rows = [
        draw.caption(draw.join(panels, gap=_MARGIN)[0], [title], above=True),
        draw.caption(bar, [legend], width=480),
    ]
    return draw.join(rows, below=True, gap=_MARGIN, margin=_MARGIN)[0]
