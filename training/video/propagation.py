"""Labels of far frames from labels of near ones: chains through pixels that two labels share.

A label of frames (A, B) and one of (B, C) join where their points in B fall on the same pixel;
frame A is chained so with ever later frames until too few points are left. The rules are those of
GIM (arXiv 2402.11095; thresholds of its code by default, of its paper as a preset), on labels of
any number of matchers. Where the reference goes wrong we do not follow it:

* What is recorded is where a chain truly begins. There, a chain whose first segments have no labels
  carries the frame that was asked for, and a sub-chain like that even counts as reaching it.
* A segment without labels ends the chain. There, the next segment is joined all the same, through
  points of two different frames.
* A start without any label is a failure with a reason, not an error that ends the run.

`Propagator` is the algorithm on arrays; `propagate_video` works on files, resumes, and uses several
processes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import logging
import os
import re
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from gim_hloc import workers
from gim_hloc.errors import InputError
from gim_hloc.files import write_atomic
from gim_hloc.lock import FolderLock
from gim_hloc.store import digest
from gim_hloc.training.video.fit import epipolar_inliers
from gim_hloc.training.video.options import FINAL_CONFIDENCE, FINAL_ITERATIONS, PropagationOptions
from gim_hloc.training.video.propagated import (
    PropagatedWriter,
    StartRecord,
    VideoFacts,
)
from gim_hloc.training.video.store import LabelStore
from gim_hloc.workers import Where

if TYPE_CHECKING:
    from gim_hloc.training.video.folder import VideoFolder

logger = logging.getLogger(__name__)

Pair = tuple[int, int]
#: For a pair of frames one array (n, 4) per labelling round; absent rounds are empty or left out.
LabelMap = Mapping[Pair, Sequence[np.ndarray]]

_COLUMNS = (
    *("start", "target", "from", "to", "distance", "hops", "joined", "labels"),
    *("ended", "failure"),
)
_REACHED = "the target was reached"
_CHUNK = 16  # starts that a worker gets at a time: neighbours, which share their sub-chains


@dataclass(frozen=True, kw_only=True, eq=False)
class Propagated:
    """What became of one start frame."""

    record: StartRecord
    labels: np.ndarray | None  # (n, 4) float32 x0, y0, x1, y1 in the frames reached; None if failed


# ------------------------------------------------------------------------------------------- starts


def find_starts(
    counts: Mapping[int, Sequence[Mapping[Pair, int]]], options: PropagationOptions
) -> list[Pair]:
    """Frames to start from, each with the frame that its chain is to reach.

    A frame is a start if all pairs that a full largest step from it can be made of are labelled,
    and one more largest step (video.md section 6 for three steps; the same rule for any number).
    Its target lies ``reach`` largest steps ahead, at most at the end of the last pair of one.

    Args:
        counts: step -> for each labelling round, pair -> number of labels.
        options: of them ``start_labels_above``, ``require`` and ``reach``.
    """
    steps = check_steps(counts)
    largest = steps[-1]
    labelled: dict[int, set[Pair]] = {}
    for step in steps:
        above = options.start_labels_above if step == largest else 0
        present: dict[Pair, int] = {}
        for table in counts[step]:
            for pair, count in table.items():
                if pair[1] - pair[0] == step and count > above:
                    present[pair] = present.get(pair, 0) + 1
        needed = options.required(len(counts[step]))
        if needed > len(counts[step]):
            raise InputError(
                f"require is {needed}, but there are {len(counts[step])} labelling rounds at step "
                f"{step}."
            )
        labelled[step] = {pair for pair, number in present.items() if number >= needed}
    begins = {step: {i for i, _ in pairs} for step, pairs in labelled.items()}
    if not labelled[largest]:
        return []
    first, last = min(begins[largest]), max(j for _, j in labelled[largest])
    starts = []
    for a in sorted(begins[largest]):
        whole = a + largest in begins[largest] and all(
            a + offset in begins[step] for step in steps[:-1] for offset in range(0, largest, step)
        )
        target = min(max(a + options.reach * largest, first), last)
        if whole and target - a >= largest:
            starts.append((a, target))
    return starts


def check_steps(steps: Iterable[int]) -> tuple[int, ...]:
    """Steps in ascending order.

    Raises:
        InputError: none, or one that is no multiple of the smallest, which no chain could bridge.
    """
    ordered = tuple(sorted({int(step) for step in steps}))
    if not ordered:
        raise InputError("There are no labels at any step.")
    if ordered[0] < 1 or any(step % ordered[0] for step in ordered):
        raise InputError(
            f"Steps between frames are {ordered}; they must be multiples of the smallest."
        )
    return ordered


# ------------------------------------------------------------------------------------------ joining


@dataclass(slots=True, eq=False)
class _Segment:
    """Labels between two frames, with what joins derive from them."""

    points0: np.ndarray  # (n, 2) float32 pixels
    points1: np.ndarray
    cells0: np.ndarray  # (n,) int32 cells of the points in the table of `_Joiner`
    cells1: np.ndarray
    # Made when a join needs them: rows that are the last of their cell 0, and these cells; a k-d
    # tree of points0.
    last: tuple[np.ndarray, np.ndarray] | None = None
    tree: Any = None

    @classmethod
    def concatenate(cls, parts: Sequence[_Segment]) -> _Segment:
        if len(parts) == 1:
            return parts[0]
        rows = ((part.points0, part.points1, part.cells0, part.cells1) for part in parts)
        points0, points1, cells0, cells1 = (np.concatenate(t) for t in zip(*rows, strict=True))
        return cls(points0, points1, cells0, cells1)

    @property
    def nbytes(self) -> int:
        return 40 * len(self.cells0)  # about; derived parts included


@dataclass(frozen=True, slots=True, eq=False)
class _Link:
    """Labels of a chain, as rows of its first and last segment: what a join need not touch."""

    head: _Segment
    first: np.ndarray | None  # rows of the head; None: all
    tail: _Segment
    last: np.ndarray | None  # rows of the tail; None: all

    def __len__(self) -> int:
        return len(self.head.cells0 if self.first is None else self.first)

    def rows(self) -> np.ndarray:
        """(n, 4) float32 labels between the two ends."""
        return np.concatenate(
            [_take(self.head.points0, self.first), _take(self.tail.points1, self.last)], axis=1
        )

    def segment(self) -> _Segment:
        if self.first is None:
            return self.head
        return _Segment(
            _take(self.head.points0, self.first),
            _take(self.tail.points1, self.last),
            _take(self.head.cells0, self.first),
            _take(self.tail.cells1, self.last),
        )


def _take(values: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    return values if rows is None else values[rows]


class _Joiner:
    """Joins labels A -> B and B -> C."""

    def __init__(self, size: tuple[int, int], options: PropagationOptions) -> None:
        self._size = size
        self._options = options
        # A cell for every pixel and a ring of one around the frame, where halves round to; cell 0
        # stands for everything farther out, which never joins. Filled and cleared by every join:
        # scattering into it is an order of magnitude faster than sorting keys.
        self._table = np.full((size[0] + 2) * (size[1] + 2) + 1, -1, dtype=np.int32)

    def segment(self, rows: np.ndarray) -> _Segment:
        """Prepare labels (n, 4) for joins."""
        points0, points1 = (np.ascontiguousarray(part) for part in (rows[:, :2], rows[:, 2:]))
        return _Segment(points0, points1, self._cells(points0), self._cells(points1))

    def __call__(self, left: _Link, right: _Segment) -> _Link:
        """Rows (point of ``left`` in A, point of ``right`` in C), in the order of ``left``.

        Each row of either side is used at most once.
        """
        if not len(left) or not len(right.cells0):
            nothing = np.empty(0, dtype=np.int64)
            return _Link(left.head, nothing, right, nothing)
        join = self._near if self._options.by_distance else self._shared
        rows0, rows1 = join(left, right)
        first = rows0 if left.first is None else left.first[rows0]
        return _Link(left.head, first, right, rows1)

    def _shared(self, left: _Link, right: _Segment) -> tuple[np.ndarray, np.ndarray]:
        if right.last is None:
            right.last = self._last_of_cells(right.cells0)
        last_rows, last_cells = right.last
        cells = _take(left.tail.cells1, left.last)
        table = self._table
        # NumPy assigns in order, so that the last row of a pixel stays.
        table[cells] = np.arange(len(cells), dtype=np.int32)
        table[0] = -1
        rows0 = table[last_cells]
        table[cells] = -1
        hits = np.flatnonzero(rows0 >= 0)
        partner = np.full(len(cells), -1, dtype=np.int32)
        partner[rows0[hits]] = last_rows[hits]
        rows0 = np.flatnonzero(partner >= 0)
        return rows0, partner[rows0]

    def _last_of_cells(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.arange(len(cells), dtype=np.int32)
        self._table[cells] = order
        last = np.flatnonzero((self._table[cells] == order) & (cells > 0)).astype(np.int32)
        self._table[cells] = -1
        return last, cells[last]

    def _cells(self, points: np.ndarray) -> np.ndarray:
        width, height = self._size
        x, y = np.rint(points).T  # half to even
        inside = (x >= -1) & (x <= width) & (y >= -1) & (y <= height)
        x, y = (np.where(inside, part, 0).astype(np.int32) for part in (x, y))
        return np.where(inside, (y + 1) * np.int32(width + 2) + (x + 2), np.int32(0))

    def _near(self, left: _Link, right: _Segment) -> tuple[np.ndarray, np.ndarray]:
        from scipy.spatial import cKDTree

        if right.tree is None:
            right.tree = cKDTree(right.points0)
        limit = self._options.join_distance
        points = _take(left.tail.points1, left.last)
        distance, partner = right.tree.query(points, distance_upper_bound=limit)
        rows = np.flatnonzero(distance < limit)
        # Of several rows nearest to one point the closest stays; of equally close ones the first.
        order = rows[np.lexsort((rows, distance[rows], partner[rows]))]
        first = np.ones(len(order), dtype=bool)
        first[1:] = partner[order[1:]] != partner[order[:-1]]
        rows = np.sort(order[first])
        return rows, partner[rows]


# ----------------------------------------------------------------------------------------- chaining


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chain:
    rows: np.ndarray  # (n, 4) float32
    start: int
    end: int
    hops: int
    ended: str


class Propagator:
    """Chains the labels of one video. Sub-chains are kept, so that starts share them.

    Args:
        labels: pair -> arrays (n, 4) of x0, y0, x1, y1 in frame pixels, one a labelling round. They
            are pooled in this order, which decides which of two labels of a pixel is used.
        steps: frame distances of labelled pairs; longer chains are made of the largest.
        size: (width, height) of the frames in pixels.
        options: the constants.
    """

    def __init__(
        self,
        labels: LabelMap,
        *,
        steps: Iterable[int],
        size: tuple[int, int],
        options: PropagationOptions = PropagationOptions(),
    ) -> None:
        self.labels = labels
        self.steps = check_steps(steps)
        self.options = options
        self._join = _Joiner(size, options)
        self._kept: OrderedDict[tuple[int, int, int], _Segment | None] = OrderedDict()
        self._kept_bytes = 0

    def run(self, start: int, target: int) -> Propagated:
        """Propagate from one start frame towards another."""
        chain = self._chain(start, target, len(self.steps))
        # A chain of one segment is redone with the smaller steps, whose labels it was not made of
        # alone: what it then reaches has passed at least one join.
        for level in range(len(self.steps) - 1, 0, -1):
            if chain is None or chain.end - chain.start != self.steps[level]:
                break
            redone = self._chain(chain.start, chain.end, level)
            # What the first chain met is why there is no longer one.
            chain = None if redone is None else replace(redone, ended=chain.ended)
        record = StartRecord(
            start=start, target=target, reached=None, joined=0, count=0, hops=0, ended=""
        )
        if chain is None:
            return Propagated(record=replace(record, failure="no labels to chain"), labels=None)
        record = replace(
            record,
            reached=(chain.start, chain.end),
            joined=len(chain.rows),
            hops=chain.hops,
            ended=chain.ended,
        )
        labels = self._fit(chain.rows)
        failure = ""
        if chain.end - chain.start == self.steps[0]:
            failure = f"reached no farther than the smallest step, {self.steps[0]} frames"
        elif len(labels) < self.options.min_final:
            failure = (
                f"{len(labels)} of {len(chain.rows)} labels fit one motion; "
                f"{self.options.min_final} are needed"
            )
        if failure:
            return Propagated(record=replace(record, failure=failure), labels=None)
        return Propagated(record=replace(record, count=len(labels)), labels=labels)

    def _chain(self, start: int, target: int, level: int) -> _Chain | None:
        """Chain segments of the ``level`` smallest steps as far as they go."""
        step, smallest = self.steps[level - 1], self.steps[0]
        segments = deque(_segments(start, target, step))
        link: _Link | None = None
        begin = end = hops = 0
        ended = ""  # the first obstacle: shortening only tells how close to it the chain comes
        while segments:
            p, q = segments.popleft()
            candidate = self._candidate(p, q, level)
            if candidate is None:
                if link is None:
                    continue
                ended = ended or f"no labels between {p} and {q}"
                break
            if link is None:
                link, begin, end, hops = _Link(candidate, None, candidate, None), p, q, 1
                continue
            joined = self._join(link, candidate)
            if len(joined) >= self.options.fewest_joined:
                link, end, hops = joined, q, hops + 1
                continue
            ended = (
                ended or f"{len(joined)} labels left at {q}; {self.options.fewest_joined} needed"
            )
            shorter = (p, q - smallest)
            segments = deque([shorter] if shorter[1] > p else [])
        if link is None:
            return None
        ended = ended or _REACHED
        return _Chain(rows=link.rows(), start=begin, end=end, hops=hops, ended=ended)

    def _candidate(self, p: int, q: int, level: int) -> _Segment | None:
        """Labels of one segment: its own where its length is a step, and those of sub-chains."""
        key = (p, q, level)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        parts = self._stored((p, q)) if q - p == self.steps[level - 1] else []
        whole = self._whole(p, q, level - 1) if level > 1 else None
        if whole is not None:
            parts.append(whole)
        candidate = _Segment.concatenate(parts) if parts else None
        self._keep(key, candidate)
        return candidate

    def _whole(self, p: int, q: int, level: int) -> _Segment | None:
        """A sub-chain from p to q exactly.

        One that skips a segment or must be shortened cannot be that, so it ends at once.
        """
        link: _Link | None = None
        for left, right in _segments(p, q, self.steps[level - 1]):
            candidate = self._candidate(left, right, level)
            if candidate is None:
                return None
            if link is None:
                link = _Link(candidate, None, candidate, None)
                continue
            link = self._join(link, candidate)
            if len(link) < self.options.fewest_joined:
                return None
        return None if link is None else link.segment()

    def _stored(self, pair: Pair) -> list[_Segment]:
        try:
            arrays = self.labels[pair]
        except KeyError:
            return []
        rows = [np.asarray(array, dtype=np.float32) for array in arrays if len(array)]
        for array in rows:
            if array.ndim != 2 or array.shape[1] != 4 or not np.isfinite(array).all():
                raise InputError(
                    f"Labels of the frames {pair[0]}, {pair[1]} are not finite rows of x0, y0, x1, "
                    f"y1 (shape {array.shape}): label this pair again."
                )
        return [self._join.segment(array) for array in rows]

    def _keep(self, key: tuple[int, int, int], segment: _Segment | None) -> None:
        self._kept[key] = segment
        self._kept_bytes += segment.nbytes if segment else 0
        while self._kept_bytes > self.options.memory_mb * 2**20 and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._kept_bytes -= old.nbytes if old else 0

    def _fit(self, rows: np.ndarray) -> np.ndarray:
        inliers = epipolar_inliers(
            rows,
            threshold=self.options.final_px,
            confidence=FINAL_CONFIDENCE,
            max_iterations=FINAL_ITERATIONS,
        )
        kept: np.ndarray = rows[inliers]
        return kept


def _segments(start: int, target: int, step: int) -> list[Pair]:
    """Hops of ``step`` from start to target; the last may be shorter."""
    return list(itertools.pairwise([*range(start, target, step), target]))


def propagate(
    labels: LabelMap,
    *,
    steps: Iterable[int],
    size: tuple[int, int],
    options: PropagationOptions = PropagationOptions(),
) -> Iterator[Propagated]:
    """Propagate labels in memory, start by start.

    Args:
        labels: pair -> arrays (n, 4), one a labelling round. The number of rounds of a step is the
            longest list among its pairs; rounds without labels of a pair are empty or left out.
        steps: frame distances of labelled pairs.
        size: (width, height) of the frames in pixels.
        options: the constants.

    Yields:
        What became of each start, by start.
    """
    steps = check_steps(steps)
    counts: dict[int, list[dict[Pair, int]]] = {step: [] for step in steps}
    for (i, j), arrays in labels.items():
        tables = counts.get(j - i)
        if tables is None:
            continue
        tables += [{} for _ in range(len(arrays) - len(tables))]
        for table, array in zip(tables, arrays, strict=False):
            table[i, j] = len(array)
    propagator = Propagator(labels, steps=steps, size=size, options=options)
    for start, target in find_starts(counts, options):
        yield propagator.run(start, target)


# ------------------------------------------------------------------------------------------- videos


@dataclass(frozen=True, kw_only=True)
class PropagationSummary:
    """What came of propagating one video."""

    path: Path  # h5 file of the labels
    facts: VideoFacts
    records: tuple[StartRecord, ...]  # by start
    rounds: tuple[str, ...]  # labelling rounds used, e.g. ``sift``, ``sift (zoom)``
    steps: tuple[int, ...]  # between frames of the labels
    resumed: int  # starts taken over from an earlier run
    seconds: float  # wall time
    notes: tuple[str, ...] = ()  # what kept starts from being found, where there are none

    @property
    def made(self) -> list[StartRecord]:
        """Starts with labels."""
        return [record for record in self.records if not record.failure]

    @property
    def most_failed(self) -> str:
        """The most frequent failure, in the words of the first start that met it."""
        kinds: dict[str, list[StartRecord]] = {}
        for record in self.records:
            if record.failure:
                kinds.setdefault(re.sub(r"\d+", "#", record.failure), []).append(record)
        if not kinds:
            return ""
        most = max(kinds.values(), key=len)
        text = f"{len(most)} of them: {most[0].failure}"
        if most[0].ended and most[0].ended != _REACHED:
            text += f" (start {most[0].start}: {most[0].ended})"
        return text

    def line(self) -> str:
        """One line for the log."""
        made = self.made
        text = f"{self.facts.video}: {len(made)} of {len(self.records)} starts propagated"
        if made:
            counts = [record.count for record in made]
            distances = [record.distance for record in made]
            middle = statistics.median(distances)
            fps = self.facts.fps
            seconds = f" ({middle / fps:.1f} s)" if fps else ""
            text += (
                f"; labels {min(counts)} to {max(counts)}, median {statistics.median(counts):g}; "
                f"distance median {middle:g} frames{seconds}, longest {max(distances)}"
            )
        elif self.records:
            text += f"; {self.most_failed}"
        if self.resumed:
            text += f"; {self.resumed} from an earlier run"
        return f"{text}; {self.seconds:.1f} s"

    def to_json(self) -> str:
        """All of it as JSON."""
        value = {
            **asdict(self.facts),
            "rounds": self.rounds,
            "steps": self.steps,
            "starts": len(self.records),
            "propagated": len(self.made),
            "seconds": round(self.seconds, 3),
            "notes": self.notes,
            "records": [asdict(record) for record in self.records],
        }
        return json.dumps(value, indent=1) + "\n"

    def to_csv(self) -> str:
        """One row per start."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for r in self.records:
            ends = (r.start, r.target, *(r.reached or ("", "")))
            writer.writerow([*ends, r.distance, r.hops, r.joined, r.count, r.ended, r.failure])
        return text.getvalue()


class StoredLabels(Mapping[Pair, Sequence[np.ndarray]]):
    """The labels of a video, read when they are asked for."""

    def __init__(self, base: Mapping[int, Sequence[LabelStore]]) -> None:
        self._base = base
        self.counts: dict[int, list[dict[Pair, int]]] = {}
        for step, stores in base.items():
            self.counts[step] = []
            for store in stores:
                rows = zip(store.pairs().tolist(), store.counts().tolist(), strict=True)
                self.counts[step].append({(i, j): n for (i, j), n in rows if j - i == step})

    def __getitem__(self, pair: Pair) -> list[np.ndarray]:
        step = pair[1] - pair[0]
        stores = self._base.get(step, ())
        found = [
            store.read(*pair)
            for store, table in zip(stores, self.counts.get(step, ()), strict=True)
            if table.get(pair)
        ]
        if not found:
            raise KeyError(pair)
        return found

    def __iter__(self) -> Iterator[Pair]:
        return iter({pair: None for tables in self.counts.values() for t in tables for pair in t})

    def __len__(self) -> int:
        return sum(1 for _ in self)


def propagate_video(
    base: Mapping[int, Sequence[LabelStore]],
    output: str | os.PathLike[str],
    options: PropagationOptions = PropagationOptions(),
    *,
    where: Where = Where(),
    overwrite: bool = False,
    progress: bool = False,
) -> PropagationSummary:
    """Propagate the labels of one video into one h5 file.

    Beside ``NAME.h5``, ``NAME.json`` and ``NAME.csv`` say what became of every start. A run that
    was interrupted goes on where it stopped; what was made of other labels or with other options
    stands until this is finished, and is kept for when they come back, unless ``overwrite``.
    ``base`` holds the labelling rounds of each step in the order in which they are pooled.

    Raises:
        InputError: labels of different videos or frame sizes, steps that do not fit, a round that
            is missing at a step while all are required, damaged labels.
        OutputError: the file cannot be written, or workers died.
        LockedError: another run works in the folder.
    """
    began = time.perf_counter()
    output = Path(output)
    steps = check_steps(base)
    facts, rounds = _check_rounds(base, options)
    labels = StoredLabels(base)
    starts = find_starts(labels.counts, options)
    notes = () if starts else (_why_no_starts(labels.counts, options),)
    settings = {"options": options.settings(), "steps": list(steps), "labels": _states(base)}
    task = PropagationTask(
        paths={step: [store.path.resolve() for store in stores] for step, stores in base.items()},
        size=facts.size,
        options=options,
    )
    with (
        FolderLock(output.parent),
        PropagatedWriter(output, settings, facts, overwrite=overwrite) as writer,
    ):
        before = {pair: record for pair in starts if (record := writer.done(*pair)) is not None}
        records = before | _propagate(task, starts, before, where, writer, progress)
        ordered = [records[pair] for pair in starts]
        writer.finish(ordered, notes)
        summary = PropagationSummary(
            path=output,
            facts=facts,
            records=tuple(ordered),
            rounds=rounds,
            steps=steps,
            resumed=len(before),
            seconds=time.perf_counter() - began,
            notes=notes,
        )
        write_atomic(output.with_suffix(".json"), summary.to_json())
        write_atomic(output.with_suffix(".csv"), summary.to_csv())
    logger.info("%s", summary.line())
    for note in notes:
        logger.warning("%s: %s", facts.video, note)
    return summary


def _propagate(
    task: PropagationTask,
    starts: Sequence[Pair],
    before: Mapping[Pair, StartRecord],
    where: Where,
    writer: PropagatedWriter,
    progress: bool,
) -> dict[Pair, StartRecord]:
    """Do what was not done before."""
    todo = [pair for pair in starts if pair not in before]
    records: dict[Pair, StartRecord] = {}
    bar = tqdm(total=len(starts), initial=len(before), unit="start", disable=not progress)

    def done(pair: Pair, result: Propagated) -> None:
        writer.put(result.record, result.labels)
        records[pair] = result.record
        bar.update()

    # Each worker walks through stretches of the video, so that few sub-chains are made twice.
    chunk = max(1, min(_CHUNK, -(-len(todo) // where.count)))
    with bar:
        workers.run(task, todo, where, done, chunk=chunk)
    return records


@dataclass(frozen=True, kw_only=True)
class PropagationTask:
    """Starts -> what becomes of them; see ``workers.Task``."""

    paths: Mapping[int, Sequence[Path]]  # step -> files of the labels
    size: tuple[int, int]  # (width, height) of the frames in pixels
    options: PropagationOptions

    def open(self, device: str) -> Callable[[Sequence[Pair]], Iterator[tuple[Pair, Propagated]]]:
        """Open the labels; all work is the processor's."""
        stores = {path: LabelStore(path) for some in self.paths.values() for path in some}
        base = {step: [stores[path] for path in some] for step, some in self.paths.items()}
        propagator = Propagator(
            StoredLabels(base), steps=base, size=self.size, options=self.options
        )
        return lambda pairs: ((pair, propagator.run(*pair)) for pair in pairs)


def _check_rounds(
    base: Mapping[int, Sequence[LabelStore]], options: PropagationOptions
) -> tuple[VideoFacts, tuple[str, ...]]:
    """Facts on the video that all labels agree on, and the names of the rounds."""
    present = {step: [store.info.name for store in stores] for step, stores in base.items()}
    names = list(dict.fromkeys(name for some in present.values() for name in some))
    if not names:
        raise InputError("There are no labels to propagate: label the video first.")
    for step, some in sorted(present.items()):
        missing = [name for name in names if name not in some]
        if missing and options.require == "all":
            raise InputError(
                f"{', '.join(missing)}: no labels at step {step}, while all rounds are required. "
                "Finish labelling, leave that labeller out, or require fewer (--require any)."
            )
    infos = [store.info for stores in base.values() for store in stores]
    first = infos[0]
    for info in infos:
        for name, what in (("video", "the video"), ("size", "frames of size"), ("fps", "fps")):
            mine, other = getattr(info, name), getattr(first, name)
            if mine != other:
                raise InputError(
                    f"Labels of {info.name} are of {what} {mine}, those of {first.name} of "
                    f"{other}: they cannot be joined. Label again."
                )
    facts = VideoFacts(video=first.video, size=first.size, fps=first.fps or None, gap=first.gap)
    return facts, tuple(names)


def _states(base: Mapping[int, Sequence[LabelStore]]) -> list[Any]:
    """What tells whether the labels are the same as in an earlier run."""
    return [
        [
            step,
            store.info.name,
            digest([store.info.settings, store.pairs().tolist(), store.counts().tolist()]),
        ]
        for step, stores in sorted(base.items())
        for store in stores
    ]


def _why_no_starts(
    counts: Mapping[int, Sequence[Mapping[Pair, int]]], options: PropagationOptions
) -> str:
    largest = max(counts)
    parts = []
    for step in sorted(counts):
        above = options.start_labels_above if step == largest else 0
        present: dict[Pair, int] = {}
        for table in counts[step]:
            for pair, count in table.items():
                present[pair] = present.get(pair, 0) + (count > above)
        needed = options.required(len(counts[step]))
        good = sum(1 for number in present.values() if number >= needed)
        parts.append(
            f"{good} of {len(present)} at step {step}"
            + (f" (with more than {above} labels)" if above else "")
        )
    return (
        f"no frame to start from. Pairs that {options.require} of "
        f"{max(len(tables) for tables in counts.values())} rounds have labelled: "
        f"{'; '.join(parts)}. A start needs two largest steps in a row and all smaller ones between"
        " them; require fewer rounds (--require any) or label more of the video."
    )


def rounds_by_step(stores: Iterable[LabelStore]) -> dict[int, list[LabelStore]]:
    """Step -> labelling rounds that were asked for it, by labeller, plain before zoomed."""
    ordered = sorted(stores, key=lambda store: (store.info.labeller, store.info.zoom))
    steps = sorted({step for store in ordered for step in store.info.steps})
    return {step: [store for store in ordered if step in store.info.steps] for step in steps}


#: Name of the propagated labels in the folder of a video.
FILE_NAME = "propagated.h5"


def propagate_folder(
    video: VideoFolder,
    options: PropagationOptions = PropagationOptions(),
    *,
    labellers: Sequence[str] = (),
    where: Where = Where(),
    overwrite: bool = False,
    progress: bool = False,
) -> PropagationSummary:
    """Propagate labels in the folder of a video, of all or some labellers; see `propagate_video`.

    Raises:
        InputError: labels of frames of another size than the stored ones.
    """
    size = video.info.size
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(store) for store in video.stores(labellers)]
        for store in stores:
            if store.info.size != size:
                raise InputError(
                    f"{store.path} holds labels of frames of size {store.info.size}, the frames in "
                    f"{video.frames} are {size}: label again (--overwrite)."
                )
        output = video.root / FILE_NAME
        rounds = rounds_by_step(stores)
        return propagate_video(
            rounds, output, options, where=where, overwrite=overwrite, progress=progress
        )
