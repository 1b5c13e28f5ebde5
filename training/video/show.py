"""Pictures of propagated labels: random pairs, a sheet of the whole video, what failed."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import plotly.graph_objects as go

from gim_hloc import draw, page
from gim_hloc.errors import InputError, OutputError
from gim_hloc.files import write_atomic
from gim_hloc.images import read_rgb
from gim_hloc.page import plural
from gim_hloc.training.video.options import ShowOptions
from gim_hloc.training.video.propagated import PropagatedStore, StartRecord, VideoFacts
from gim_hloc.training.video.propagation import FILE_NAME

if TYPE_CHECKING:
    from gim_hloc.training.video.folder import VideoFolder
    from gim_hloc.training.video.store import LabelStore

logger = logging.getLogger(__name__)

#: Reads a frame as RGB uint8 (H, W, 3); None where it is missing.
FrameReader = Callable[[int], "np.ndarray | None"]

_PAIR = re.compile(r"\d{8}_\d{8}\.jpg")  # names of our pictures; others are the user's
_GRID = 32  # cells of the coverage map along the long side
_MAPPED = 400  # pairs that coverage is measured on: reading more would take longer than it tells
_IN_SHEET = 960  # width of a drawn pair in the page, pixels
_NARROWEST = 720  # of a drawn pair with its text, pixels
_THUMBNAIL = 190  # longest side of a frame on the contact sheet, pixels
_MAX_ROWS = 240  # of the timeline
_FEW_TO_MANY = ("#8cc8c0", "#1f918c", "#0f5f73")  # labels
_FAILED = "#d4543f"


@dataclass(frozen=True, kw_only=True)
class ShowReport:
    """What was written."""

    sheet: Path  # the page
    figures: tuple[Path, ...]  # drawn pairs
    contact: Path | None  # picture of the failures; None where there are none
    missing: tuple[int, ...]  # frames that could not be read


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A pair without labels."""

    indices: tuple[int, int]  # of the two frames
    what: str  # was tried
    reason: str


class _Frames:
    """Reads the stored frames of a video and notes what is missing."""

    def __init__(self, read: FrameReader, size: tuple[int, int], where: str) -> None:
        self._read, self._size, self._where = read, size, where
        self.missing: set[int] = set()

    def fitted(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """A frame as large as fits into (width, height), or a picture that says it is missing."""
        scale = min(size[0] / self._size[0], size[1] / self._size[1], 1.0)
        shown = (max(1, round(self._size[0] * scale)), max(1, round(self._size[1] * scale)))
        frame = self._read(index)
        if frame is None:
            self.missing.add(index)
            return draw.notice(f"frame {index} is missing", shown)
        if (frame.shape[1], frame.shape[0]) != tuple(self._size):
            raise InputError(
                f"Frame {index} of {self._where} is {frame.shape[1]} x {frame.shape[0]}, its labels"
                f" are for {self._size[0]} x {self._size[1]}: label the video again."
            )
        return draw.resize(frame, shown)


def show(
    store: PropagatedStore,
    read: FrameReader,
    output: str | os.PathLike[str],
    options: ShowOptions = ShowOptions(),
    *,
    labels: Sequence[LabelStore] = (),
    where: str = "the video",
) -> ShowReport:
    """Draw random propagated pairs, the sheet of the video and the contact sheet of failures.

    Args:
        store: the propagated labels, of any number of pairs.
        read: reads a frame as RGB uint8 (H, W, 3); None where it is missing.
        output: folder; made if it does not exist. ``sheet.html``, ``pairs/<i>_<j>.jpg`` and
            ``failures.jpg`` are written.
        options: what to draw.
        labels: of near frames, whose failures are shown too.
        where: the frames, for messages.

    Raises:
        InputError: frames of another size than the labels are for.
        OutputError: the folder cannot be written.
    """
    output = Path(output)
    frames = _Frames(read, store.facts.size, where)
    try:
        (output / "pairs").mkdir(parents=True, exist_ok=True)
        files, figures = [], []
        for record in _choose(store, options):
            found, (i, j) = store.read(record.start, record.target)
            both = [frames.fitted(index, options.max_size) for index in (i, j)]
            picture = draw_pair(both, found, store.facts.size, lines=options.lines)
            text, details = _describe(store.facts, record, found, (i, j))
            path = output / "pairs" / f"{i:08d}_{j:08d}.jpg"
            titled = draw.caption(
                picture, [f"{store.facts.video}    {text}", details], width=_NARROWEST
            )
            write_atomic(path, draw.encode(titled, quality=92))
            files.append(path)
            figures.append((draw.data_url(draw.fit(picture, _IN_SHEET, 4 * _IN_SHEET)), "", [text]))
        failures = _list_failures(store, labels)
        shown = _spread(failures, options.failures)
        thumbnails = [
            draw.join([frames.fitted(k, (_THUMBNAIL, _THUMBNAIL)) for k in failure.indices])[0]
            for failure in shown
        ]
        contact = output / "failures.jpg"
        if shown:
            title = f"{store.facts.video}: {len(shown)} of {len(failures)} pairs without labels"
            texts = [[failure.what, failure.reason] for failure in shown]
            sheet = draw.contact_sheet(thumbnails, texts, title)
            write_atomic(contact, draw.encode(sheet, quality=92))
        else:
            contact.unlink(missing_ok=True)
        notes = list(store.notes)
        if frames.missing:
            notes.append(
                f"{len(frames.missing)} of the frames shown here could not be read, for instance "
                f"{min(frames.missing)}."
            )
            logger.warning("%s: %s", store.facts.video, notes[-1])
        text = _render(
            store,
            notes=notes,
            pairs=figures,
            failures=[
                (draw.data_url(picture), failure.what, failure.reason)
                for picture, failure in zip(thumbnails, shown, strict=True)
            ],
            failed=len(failures),
            labelling=_labelling(labels),
        )
        write_atomic(output / "sheet.html", text)
        for path in set((output / "pairs").iterdir()).difference(files):
            if _PAIR.fullmatch(path.name):
                path.unlink()  # of an earlier page
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error}.") from error
    return ShowReport(
        sheet=output / "sheet.html",
        figures=tuple(files),
        contact=contact if shown else None,
        missing=tuple(sorted(frames.missing)),
    )


def show_folder(
    video: VideoFolder,
    output: str | os.PathLike[str] | None = None,
    options: ShowOptions = ShowOptions(),
) -> ShowReport:
    """Show the propagated labels of a video in ``output``, by default ``show`` in its folder.

    Raises:
        InputError: as `show`; the labels were not propagated.
        OutputError: as `show`.
    """

    def read(index: int) -> np.ndarray | None:
        try:
            return read_rgb(video.frame_path(index), upright=False)
        except InputError as error:
            logger.debug("%s", error)
            return None

    labels = video.stores() if video.label_paths() else []
    try:
        with PropagatedStore(video.root / FILE_NAME) as store:
            folder = video.root / "show" if output is None else output
            return show(store, read, folder, options, labels=labels, where=str(video.frames))
    finally:
        for one in labels:
            one.close()


# -------------------------------------------------------------------------------------------- pairs


def _choose(store: PropagatedStore, options: ShowOptions) -> list[StartRecord]:
    made = [record for record in store.records if not record.failure]
    if len(made) <= options.pairs:
        return made
    generator = np.random.default_rng(options.seed)
    rows = np.sort(generator.choice(len(made), options.pairs, replace=False))
    return [made[row] for row in rows.tolist()]


def _describe(
    facts: VideoFacts, record: StartRecord, labels: np.ndarray, reached: tuple[int, int]
) -> tuple[str, str]:
    """The caption of a pair, and its details."""
    i, j = reached
    seconds = f" ({(j - i) / facts.fps:.1f} s)" if facts.fps else ""
    seen = [100 * share for share in covisible(labels, facts.size)]
    return (
        f"{len(labels):,} labels, frames {i} to {j}: {j - i} frames{seconds}",
        f"Boxes of the labels: {seen[0]:.0f} % and {seen[1]:.0f} % of a frame; frames "
        f"{facts.size[0]} x {facts.size[1]}; asked for {record.start} to {record.target}; "
        f"{record.hops} hops, {record.joined:,} labels before the last fit. "
        f"The chain ended: {record.ended}.",
    )


def covisible(labels: np.ndarray, size: tuple[int, int]) -> tuple[float, float]:
    """Share of each frame of (width, height) in the bounding box of the labels (n, 4)."""
    if not len(labels):
        return 0.0, 0.0
    extent = np.ptp(labels, axis=0)
    area = size[0] * size[1]
    return float(extent[0] * extent[1] / area), float(extent[2] * extent[3] / area)


def draw_pair(
    frames: Sequence[np.ndarray], labels: np.ndarray, size: tuple[int, int], *, lines: int = 150
) -> np.ndarray:
    """The two frames with their labels; below them the same in grey with lines.

    A dot has the colour of its place in the first frame, so that the same colours must lie in the
    same order in both. The boxes hold all labels of a frame.

    Args:
        frames: two pictures of one size.
        labels: (n, 4) pixels of frames of ``size`` (width, height).
        size: of the frames that the labels are for.
        lines: about how many labels have one.
    """
    ends = [draw.scale_points(labels[:, k : k + 2], size, frames[0]) for k in (0, 2)]
    colours = draw.place_colours(labels[:, :2], size)
    plain = [frame.copy() for frame in frames]
    for picture, xy in zip(plain, ends, strict=True):
        if len(xy):
            low, high = (np.rint(corner).astype(int).tolist() for corner in (xy.min(0), xy.max(0)))
            for thick, tone in ((3, (0, 0, 0)), (1, (255, 255, 255))):
                cv2.rectangle(picture, low, high, tone, thick)
        draw.draw_points(picture, xy, colours, radius=2)
    grey = [np.repeat(0.6 * f.mean(axis=2, keepdims=True), 3, 2).astype(np.uint8) for f in frames]
    chosen = draw.spread(labels[:, :2], lines, size)
    below = draw.draw_matches(
        grey, [xy[chosen] for xy in ends], colours[chosen], lines=len(chosen), gap=2 * draw.GAP
    )
    rows = [draw.join(plain, gap=2 * draw.GAP)[0], below]
    return draw.join(rows, below=True, gap=2 * draw.GAP, margin=2 * draw.GAP)[0]


# ----------------------------------------------------------------------------------------- failures


def _list_failures(store: PropagatedStore, labels: Sequence[LabelStore]) -> list[Failure]:
    """Starts that failed, then pairs of near frames that have no labels."""
    largest = max(store.settings["steps"], default=0)
    found = []
    for record in store.records:
        if record.failure:
            i, j = record.reached or (record.start, record.start + largest)
            reason = record.failure
            if record.ended and record.reached:
                reason += f"; the chain ended: {record.ended}"
            found.append(
                Failure(indices=(i, j), what=f"Start {record.start}, up to {j}", reason=reason)
            )
    for one in labels:
        found += [
            Failure(indices=(i, j), what=f"{one.info.name}, frames {i} and {j}", reason=reason)
            for i, j, reason in one.failures()
        ]
    return found


def _spread(failures: Sequence[Failure], count: int) -> list[Failure]:
    """At most ``count``: half of them starts where there are enough of both."""
    starts = [failure for failure in failures if failure.what.startswith("Start ")]
    pairs = failures[len(starts) :]
    of_pairs = min(len(pairs), max(count // 2, count - len(starts)))
    chosen = []
    for some, number in ((starts, count - of_pairs), (pairs, of_pairs)):
        rows = np.linspace(0, len(some) - 1, min(number, len(some))).round().astype(int)
        chosen += [some[row] for row in np.unique(rows).tolist()]
    return chosen


def _labelling(labels: Sequence[LabelStore]) -> list[tuple[str, int, int, int, int]]:
    rows = []
    for one in sorted(labels, key=lambda one: (one.info.labeller, one.info.zoom)):
        pairs, counts = one.pairs(), one.counts()
        failed = [j - i for i, j, _ in one.failures()]
        for step in one.info.steps:
            mine = counts[pairs[:, 1] - pairs[:, 0] == step]
            median = int(np.median(mine)) if len(mine) else 0
            rows.append((one.info.name, step, len(mine), failed.count(step), median))
    return rows


def _ends(records: Sequence[StartRecord]) -> list[tuple[str, str, int]]:
    """Reason, kind and number of starts: why chains ended, by kind and then number."""
    reasons: dict[str, Counter[str]] = {"with labels": Counter(), "failed": Counter()}
    for record in records:
        text = reason_kind(record.failure or record.ended)
        if record.failure and record.ended:  # what kept it from going on is the cause
            text += f"; the chain ended: {reason_kind(record.ended)}"
        reasons["failed" if record.failure else "with labels"][text] += 1
    return [
        (text, kind, number)
        for kind, counter in reasons.items()
        for text, number in counter.most_common(12)
    ]


def reason_kind(reason: str) -> str:
    """A reason without what is particular to one pair: what is counted by kind."""
    for pattern, general in (
        (r"^\d+ labels left at \d+; (\d+) needed", r"fewer than \1 labels left"),
        (r"^no labels between \d+ and \d+", "a segment without labels"),
        (r"^\d+ of \d+ labels fit one motion; (\d+) are needed", r"fewer than \1 fit one motion"),
    ):
        reason = re.sub(pattern, general, reason)
    return reason


# ------------------------------------------------------------------------------------------- page


def _render(store: PropagatedStore, **values: Any) -> str:
    facts, made = store.facts, [record for record in store.records if not record.failure]
    counts = [record.count for record in made]
    distances = [record.distance for record in made]
    charts = {}
    if made:
        charts["distances"] = _histogram(distances, "frames", "starts")
        charts["counts"] = _histogram(counts, "labels", "starts")
    if store.records:
        charts["timeline"] = _timeline(store.records)
    maps, covered, sampled = _coverage(store)
    return page.render(
        "video.html.j2",
        charts={name: page.chart(figure, name) for name, figure in charts.items()},
        facts=facts,
        records=store.records,
        made=made,
        counts=counts,
        distances=distances,
        median_count=np.median(counts) if made else None,
        median_distance=np.median(distances) if made else None,
        rounds=list(dict.fromkeys(state[1] for state in store.settings["labels"])),
        steps=store.settings["steps"],
        settings=store.settings["options"],
        maps=maps,
        covered=covered,
        sampled=sampled,
        ends=_ends(store.records),
        shown_rows=min(len(store.records), _MAX_ROWS),
        **values,
    )


def _histogram(values: Sequence[int], x: str, y: str) -> go.Figure:
    figure = go.Figure(go.Histogram(x=values, nbinsx=20, marker_color=_FEW_TO_MANY[1]))
    figure.update_layout(
        height=260, bargap=0.06, margin={"l": 10, "r": 10, "t": 10, "b": 10}, dragmode=False
    )
    figure.update_xaxes(title_text=x, showgrid=False, fixedrange=True)
    figure.update_yaxes(title_text=y, fixedrange=True)
    return figure


def _timeline(records: Sequence[StartRecord]) -> go.Figure:
    """A line a start, from its first to its last frame, in the colour of its number of labels."""
    counts = sorted(record.count for record in records if not record.failure)
    thirds = [counts[len(counts) * k // 3] for k in (1, 2)] if counts else [0, 0]
    if len(records) > _MAX_ROWS:
        chosen = np.linspace(0, len(records) - 1, _MAX_ROWS).round().astype(int)
        records = [records[k] for k in chosen.tolist()]
    figure = go.Figure()
    names = (
        f"fewer than {thirds[0]:,} labels",
        f"{thirds[0]:,} labels or more",
        f"{thirds[1]:,} labels or more",
    )
    for kind, (name, colour) in enumerate(zip(names, _FEW_TO_MANY, strict=True)):
        rows = [
            (row, record.reached, record)
            for row, record in enumerate(records)
            if not record.failure
            and record.reached
            and sum(record.count >= limit for limit in thirds) == kind
        ]
        if rows:
            figure.add_bar(
                y=[row for row, _, _ in rows],
                x=[j - i for _, (i, j), _ in rows],
                base=[i for _, (i, _), _ in rows],
                orientation="h",
                name=name,
                marker_color=colour,
                hovertext=[
                    page.plain(f"{i} to {j}: {plural(record.count, 'label')}; {record.ended}")
                    for _, (i, j), record in rows
                ],
            )
    failed = [(row, record) for row, record in enumerate(records) if record.failure]
    if failed:
        figure.add_scatter(
            y=[row for row, _ in failed],
            x=[record.start for _, record in failed],
            mode="markers",
            name="failed",
            marker={"color": _FAILED, "size": 6},
            hovertext=[page.plain(f"{record.start}: {record.failure}") for _, record in failed],
        )
    figure.update_traces(hovertemplate="%{hovertext}<extra></extra>")
    figure.update_layout(
        height=130 + min(320, 12 * len(records)),
        barmode="overlay",
        bargap=0.15,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        dragmode=False,
    )
    figure.update_xaxes(title_text="frame", fixedrange=True, zeroline=False)
    figure.update_yaxes(visible=False, autorange="reversed", fixedrange=True)
    return figure


def _coverage(store: PropagatedStore) -> tuple[list[str], list[float], int]:
    """Pictures of where labels lie in first and last frames, mean covered shares, pairs read."""
    pairs = store.pairs()
    if not len(pairs):
        return [], [], 0
    rows = np.unique(np.linspace(0, len(pairs) - 1, min(_MAPPED, len(pairs))).round().astype(int))
    size = np.array(store.facts.size)
    cells = np.maximum(1, np.rint(_GRID * size / size.max())).astype(int)
    grids = np.zeros((2, cells[1], cells[0]))
    for start, target in pairs[rows].tolist():
        labels, _ = store.read(start, target)
        for end, grid in enumerate(grids):
            place = (labels[:, 2 * end : 2 * end + 2] + 0.5) / size * cells
            x, y = np.clip(place, 0, cells - 1).astype(int).T
            hit = np.zeros(grid.shape, dtype=bool)
            hit[y, x] = True
            grid += hit
    grids /= len(rows)
    shape = (16 * int(cells[0]), 16 * int(cells[1]))
    maps = [draw.data_url(draw.heat(grid, shape), ".png") for grid in grids]
    return maps, [float(grid.mean()) for grid in grids], len(rows)
