"""Pictures of propagated labels: random pairs, a sheet of the whole video, what failed."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gim_hloc.errors import InputError, OutputError
from gim_hloc.files import write_atomic
from gim_hloc.training.video._show_html import SheetData, render_sheet
from gim_hloc.training.video._show_pictures import (
    Failure,
    FrameReader,
    PairView,
    contact_sheet,
    coverage_map,
    covisible,
    data_url,
    draw_pair,
    thumbnail_pair,
    with_footer,
)
from gim_hloc.training.video.options import ShowOptions
from gim_hloc.training.video.propagated import PropagatedStore, StartRecord, VideoFacts
from gim_hloc.training.video.propagation import FILE_NAME

if TYPE_CHECKING:
    from gim_hloc.training.video.folder import VideoFolder
    from gim_hloc.training.video.store import LabelStore

logger = logging.getLogger(__name__)

_PAIR = re.compile(r"\d{8}_\d{8}\.jpg")  # names of our pictures; others are the user's
_GRID = 32  # cells of the coverage map along the long side
_MAPPED = 400  # pairs that coverage is measured on: reading more would take longer than it tells
_IN_SHEET = 960  # width of a drawn pair in the page, pixels


@dataclass(frozen=True, kw_only=True)
class ShowReport:
    """What was written.

    Attributes:
        sheet: the page.
        figures: drawn pairs.
        contact: picture of the failures; None where there are none.
        missing: frames that could not be read.
    """

    sheet: Path
    figures: tuple[Path, ...]
    contact: Path | None
    missing: tuple[int, ...]


class _Frames:
    """Reads the stored frames of a video and notes what is missing."""

    def __init__(self, read: FrameReader, size: tuple[int, int], where: str) -> None:
        self._read = read
        self._size = size
        self._where = where
        self.missing: set[int] = set()

    def __call__(self, index: int) -> np.ndarray | None:
        frame = self._read(index)
        if frame is None:
            self.missing.add(index)
            return None
        if (frame.shape[1], frame.shape[0]) != tuple(self._size):
            raise InputError(
                f"Frame {index} of {self._where} is {frame.shape[1]} x {frame.shape[0]}, its labels"
                f" are for {self._size[0]} x {self._size[1]}: label the video again."
            )
        return frame


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
        output: folder; made if it does not exist.
        options: what to draw.
        labels: of near frames, whose failures are shown too.
        where: the frames, for messages.

    Returns:
        What was written: ``sheet.html``, ``pairs/<i>_<j>.jpg`` and ``failures.jpg``.

    Raises:
        InputError: frames of another size than the labels are for.
        OutputError: the folder cannot be written.
    """
    output = Path(output)
    frames = _Frames(read, store.facts.size, where)
    try:
        (output / "pairs").mkdir(parents=True, exist_ok=True)
        figures, pictures = [], []
        for record in _choose(store, options):
            view, caption = _view(store, record, frames)
            i, j = record.reached or (record.start, record.target)
            path = output / "pairs" / f"{i:08d}_{j:08d}.jpg"
            picture = draw_pair(view, max_size=options.max_size, lines=options.lines)
            write_atomic(path, _jpeg(with_footer(picture, view.text)))
            figures.append(path)
            pictures.append((data_url(picture, width=_IN_SHEET), caption))
        failures = _list_failures(store, labels)
        shown = _spread(failures, options.failures)
        thumbnails = [thumbnail_pair(failure, frames, store.facts.size) for failure in shown]
        contact = output / "failures.jpg"
        if shown:
            title = f"{store.facts.video}: {len(shown)} of {len(failures)} pairs without labels"
            write_atomic(contact, _jpeg(contact_sheet(shown, thumbnails, title)))
        else:
            contact.unlink(missing_ok=True)
        maps, covered, sampled = _coverage(store)
        notes = list(store.notes)
        if frames.missing:
            notes.append(
                f"{len(frames.missing)} of the frames shown here could not be read, for instance "
                f"{min(frames.missing)}."
            )
        data = SheetData(
            facts=store.facts,
            records=store.records,
            rounds=list(dict.fromkeys(state[1] for state in store.settings["labels"])),
            settings=store.settings["options"],
            steps=store.settings["steps"],
            notes=notes,
            pairs=pictures,
            maps=maps,
            covered=covered,
            sampled=sampled,
            failures=[
                (data_url(picture), failure.what, failure.reason)
                for picture, failure in zip(thumbnails, shown, strict=True)
            ],
            failed=len(failures),
            labelling=_labelling(labels),
        )
        sheet = output / "sheet.html"
        write_atomic(sheet, render_sheet(data))
        for path in set((output / "pairs").iterdir()).difference(figures):
            if _PAIR.fullmatch(path.name):
                path.unlink()  # of an earlier page
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error}.") from error
    if frames.missing:
        logger.warning("%s: %s", store.facts.video, notes[-1])
    return ShowReport(
        sheet=sheet,
        figures=tuple(figures),
        contact=contact if shown else None,
        missing=tuple(sorted(frames.missing)),
    )


def show_folder(
    video: VideoFolder,
    output: str | os.PathLike[str] | None = None,
    options: ShowOptions = ShowOptions(),
) -> ShowReport:
    """Show the propagated labels in the folder of a video.

    Args:
        video: the folder.
        output: folder to write to; ``show`` within the video's by default.
        options: what to draw.

    Raises:
        InputError: as `show`; the labels were not propagated.
        OutputError: as `show`.
    """

    def read(index: int) -> np.ndarray | None:
        return _read_frame(video.frame_path(index))

    labels = video.stores() if video.label_paths() else []
    try:
        with PropagatedStore(video.root / FILE_NAME) as store:
            return show(
                store,
                read,
                video.root / "show" if output is None else output,
                options,
                labels=labels,
                where=str(video.frames),
            )
    finally:
        for one in labels:
            one.close()


def _read_frame(path: Path) -> np.ndarray | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        logger.debug("%s cannot be read: %s", path, error)
        return None


def _jpeg(picture: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------- pairs


def _choose(store: PropagatedStore, options: ShowOptions) -> list[StartRecord]:
    made = [record for record in store.records if not record.failure]
    if len(made) <= options.pairs:
        return made
    generator = np.random.default_rng(options.seed)
    rows = np.sort(generator.choice(len(made), options.pairs, replace=False))
    return [made[row] for row in rows.tolist()]


def _view(store: PropagatedStore, record: StartRecord, frames: _Frames) -> tuple[PairView, str]:
    """What is drawn of a pair, and its caption."""
    labels, (i, j) = store.read(record.start, record.target)
    facts = store.facts
    seen = covisible(labels, facts.size)
    caption = f"{len(labels):,} labels, frames {i} to {j}: {_apart(j - i, facts)}"
    view = PairView(
        frames=(frames(i), frames(j)),
        indices=(i, j),
        labels=labels,
        size=facts.size,
        text=(
            f"{facts.video}    {caption}",
            f"Boxes of the labels: {100 * seen[0]:.0f} % and {100 * seen[1]:.0f} % of a frame; "
            f"frames {facts.size[0]} x {facts.size[1]}; asked for {record.start} to "
            f"{record.target}; {record.hops} hops, {record.joined:,} labels before the last fit. "
            f"The chain ended: {record.ended}.",
        ),
    )
    return view, caption


def _apart(distance: int, facts: VideoFacts) -> str:
    seconds = f" ({distance / facts.fps:.1f} s)" if facts.fps else ""
    return f"{distance} frames{seconds}"


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


# ----------------------------------------------------------------------------------------- coverage


def _coverage(
    store: PropagatedStore,
) -> tuple[tuple[str, str] | None, tuple[float, float], int]:
    """Maps of where labels lie, mean shares of cells with labels, and pairs they were made of."""
    pairs = store.pairs()
    if not len(pairs):
        return None, (0.0, 0.0), 0
    rows = np.unique(np.linspace(0, len(pairs) - 1, min(_MAPPED, len(pairs))).round().astype(int))
    width, height = store.facts.size
    cell = max(width, height) / _GRID
    shape = (max(1, round(height / cell)), max(1, round(width / cell)))
    grids = np.zeros((2, *shape))
    for start, target in pairs[rows].tolist():
        labels, _ = store.read(start, target)
        for end, grid in enumerate(grids):
            x = np.clip((labels[:, 2 * end] + 0.5) / width * shape[1], 0, shape[1] - 1)
            y = np.clip((labels[:, 2 * end + 1] + 0.5) / height * shape[0], 0, shape[0] - 1)
            hit = np.zeros(shape, dtype=bool)
            hit[y.astype(int), x.astype(int)] = True
            grid += hit
    grids /= len(rows)
    first, last = (data_url(coverage_map(grid), png=True) for grid in grids)
    return (first, last), (float(grids[0].mean()), float(grids[1].mean())), len(rows)
