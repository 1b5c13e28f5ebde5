"""Run matchers over ZEB: predictions, evaluation, dumps; each kept, so that nothing is done twice.

Below the output folder::

    predictions/<matcher>-<key>.db      matches, and what protocols said of them
    predictions/<matcher>-<key>.json    the options, weights and versions that <key> stands for
    dump/<protocol>/[T] <matcher> <set> <version>.txt   complete sets

Matches are found by the content of the images, verdicts also by protocol, its library's version and
the truth: what changes is done anew, and what changes back is there. A shard writes a file of its
own, which the next run without one takes over.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from gim_hloc import cache, engine, weights, workers
from gim_hloc.cache import Cache
from gim_hloc.clock import timed
from gim_hloc.errors import LockedError
from gim_hloc.evaluation.options import EvaluationOptions, RunOptions
from gim_hloc.evaluation.zeb.datasets import (
    BadLabel,
    ZebPair,
    ZebSet,
    find_root,
    find_set,
    prepare_image,
    present_sets,
    read_labels,
)
from gim_hloc.evaluation.zeb.dumps import Dump, DumpRecord, Unit, parse_line, write_dump, write_line
from gim_hloc.evaluation.zeb.predictions import (
    FOLDER,
    Prediction,
    Predictions,
    opened,
    refuse_old,
    settings_stem,
)
from gim_hloc.evaluation.zeb.protocol import (
    Protocol,
    estimator_version,
    evaluate_pair,
    make_protocol,
    reference_options,
    slip,
)
from gim_hloc.evaluation.zeb.task import MatchTask, Names
from gim_hloc.lock import FolderLock
from gim_hloc.matchers import Loader, registry
from gim_hloc.types import ImageData, ImageOptions, Matcher, MatcherInfo

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")

_PREPARATION = 1  # part of every key: raised when images are prepared differently
_CHUNKS = 4  # of a worker, at least: more balance the load, fewer encode an image less often


# ------------------------------------------------------------------------------------------ reports


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A pair that could not be matched or judged; it counts as failed."""

    dataset: str  # name of the set
    identifier: str
    message: str  # names the file
    matcher: str | None = None  # None where the data is at fault whatever matcher runs

    def __str__(self) -> str:
        by = f" ({self.matcher})" if self.matcher else ""
        return f"{self.dataset} {self.identifier}{by}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class SetResult:
    """One matcher on one set by one protocol."""

    matcher: str
    dataset: str
    protocol: str  # name of its folder
    pairs: int  # of the set, limit applied, all shards together
    evaluated: int  # of them, now and before
    failures: int  # of the evaluated ones
    dump: Path | None  # None until all pairs are evaluated, and of sets that have none
    predictions: Predictions
    records: tuple[DumpRecord, ...] = field(default=(), repr=False)


@dataclass(kw_only=True)
class RunReport:
    """What a run did.

    Attributes:
        results: by matcher, set and protocol, in the order asked for.
        problems: pairs that count as failed for a named reason.
        matched: pairs matched now; others were there already.
        seconds: wall time ``total``, and in it ``match`` (reading and encoding included) and
            ``judge``.
    """

    results: list[SetResult] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    matched: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, or 1 where a pair had a problem that has nothing to do with how well it matches."""
        return 1 if self.problems else 0

    def add(self, problem: Problem) -> None:
        """Tell of a problem, now and at the end."""
        logger.warning("%s", problem)
        self.problems.append(problem)


# --------------------------------------------------------------------------------------------- sets


@dataclass(frozen=True, kw_only=True)
class Selection(abc.ABC):
    """The pairs of one set that a run is about, and what is particular to the set.

    Attributes:
        name: of the set, in messages and results.
        root: folder of the data.
        dump_name: name of the set in its dump; None: no dump is written.
        dump_unit: of the errors in it.
        pairs: of all shards; what `run` needs of a pair is ``identifier``, the names ``image0`` and
            ``image1``, and ``covisible0`` and ``covisible1``.
        bad: labels that are no pairs.
    """

    name: str
    root: Path
    dump_name: str | None
    pairs: tuple[Any, ...]
    bad: tuple[BadLabel, ...]
    dump_unit: Unit = "deg"

    @property
    @abc.abstractmethod
    def shown(self) -> list[Any]:
        """How images are shown, in numbers and text."""

    @abc.abstractmethod
    def path(self, name: str) -> Path:
        """File of an image, ``image0`` or ``image1`` of a pair."""

    @abc.abstractmethod
    def read(self, name: str, options: ImageOptions) -> ImageData:
        """Read an image as matchers are to see it.

        Raises:
            InputError: the file does not exist or cannot be read, named.
        """

    @abc.abstractmethod
    def truth(self, pair: Any) -> list[Any]:
        """What decides the verdict on a pair besides its matches, in numbers and text."""

    @abc.abstractmethod
    def evaluate(
        self, prediction: Prediction, pair: Any, protocol: Protocol, info: MatcherInfo
    ) -> DumpRecord:
        """Judge the matches of one pair."""

    def keys(self) -> dict[str, str]:
        """Identifier of each pair -> key of its matches, by the content of the images."""
        names = list({name for pair in self.pairs for name in (pair.image0, pair.image1)})
        with ThreadPoolExecutor(workers.usable_cores()) as pool:
            digests = dict(zip(names, pool.map(_digest, map(self.path, names)), strict=True))
        return {
            pair.identifier: cache.key(
                _PREPARATION,
                self.shown,
                [[name, digests[name]] for name in (pair.image0, pair.image1)],
            )
            for pair in self.pairs
        }


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # told where it is read
        return None


@dataclass(frozen=True, kw_only=True)
class ZebSelection(Selection):
    """A set of ZEB."""

    zeb_set: ZebSet

    @property
    def shown(self) -> list[Any]:
        """The set's rule."""
        return ["zeb", self.zeb_set.img_size, self.zeb_set.padded_size]

    def path(self, name: str) -> Path:
        """In the set's folder."""
        return self.root / self.zeb_set.folder / name

    def read(self, name: str, options: ImageOptions) -> ImageData:
        """By the set's rule."""
        return prepare_image(self.path(name), self.zeb_set, options)

    def truth(self, pair: ZebPair) -> list[Any]:
        """Calibration and pose."""
        return [matrix.tolist() for matrix in (pair.K0, pair.K1, pair.T_0to1)]

    def evaluate(
        self, prediction: Prediction, pair: ZebPair, protocol: Protocol, info: MatcherInfo
    ) -> DumpRecord:
        """By the relative pose."""
        points0 = prediction.points0.astype(np.float64)
        points1 = prediction.points1.astype(np.float64)
        if protocol.padded_slip and info.has_warps:
            points0 = slip(points0, prediction.size0, self.zeb_set)
            points1 = slip(points1, prediction.size1, self.zeb_set)
        return evaluate_pair(
            points0,
            points1,
            pair.K0,
            pair.K1,
            pair.T_0to1,
            protocol,
            identifier=pair.identifier,
            covisible=(pair.covisible0, pair.covisible1),
        )


def select(root: Path, zeb_set: ZebSet, options: RunOptions) -> ZebSelection:
    """Return what a run on a set is about."""
    labels = read_labels(root, zeb_set)
    pairs, bad = draw(labels.pairs, labels.bad, options)
    return ZebSelection(
        name=zeb_set.name,
        root=root,
        dump_name=zeb_set.dump_name,
        pairs=pairs,
        bad=bad,
        zeb_set=zeb_set,
    )


def draw(
    pairs: tuple[_Item, ...], bad: tuple[BadLabel, ...], options: EvaluationOptions
) -> tuple[tuple[_Item, ...], tuple[BadLabel, ...]]:
    """Return the pairs and the bad labels that the limit leaves, drawn from both together."""
    total = len(pairs) + len(bad)
    if options.limit is None or options.limit >= total:
        return pairs, bad
    generator = np.random.default_rng(options.seed)
    chosen = set(generator.choice(total, options.limit, replace=False).tolist())
    return (
        tuple(pair for i, pair in enumerate(pairs) if i in chosen),
        tuple(label for i, label in enumerate(bad, start=len(pairs)) if i in chosen),
    )


# --------------------------------------------------------------------------------------------- runs


def run(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: RunOptions,
    *,
    progress: bool = False,
) -> RunReport:
    """Run matchers over the sets of an unpacked ZEB.

    Args:
        folder: with ``zeb/`` in it, or ``zeb/`` itself.
        output: see the module; made if it does not exist. What it holds is gone on from.
        options: what to run.
        progress: show bars.

    Returns:
        What was done. A pair with a bad label, a missing or damaged image or on which the matcher
        stopped is named among the problems and stands in the dump as a failure; the others go on.
        Such pairs are tried again by the next call.

    Raises:
        InputError: no set is there, an unknown name, a set without labels.
        LockedError: another run works in the output folder.
        OutputError: a pair killed two workers; what was finished is kept.
        WeightsError: the weights of a matcher cannot be had.
    """
    root = find_root(Path(folder).resolve())  # workers may have another working directory
    named = {entry.name: entry for entry in (find_set(name, root) for name in options.sets)}
    sets = list(named.values()) or present_sets(root)
    selections = [select(root, zeb_set, options) for zeb_set in sets]
    protocols = [make_protocol(n, padded_slip=options.padded_slip) for n in options.protocols]
    return run_selections(selections, output, options, protocols, progress=progress)


def run_selections(
    selections: Sequence[Selection],
    output: str | os.PathLike[str],
    options: EvaluationOptions,
    protocols: Sequence[Protocol],
    *,
    reference_settings: bool = True,
    progress: bool = False,
) -> RunReport:
    """Run matchers over any sets of pairs; what `run` does once it has read the labels.

    Args:
        selections: the sets, with what is particular to them.
        output: as for `run`.
        options: who works, with which matchers.
        protocols: each gives dumps of its own.
        reference_settings: ``gim_*`` matchers with the options of the reference's test.
        progress: show bars.

    Raises:
        InputError: an unknown matcher.
        OutputError: as for `run`.
        WeightsError: the weights of a matcher cannot be had.
    """
    output = Path(output)
    for name in options.matchers:  # before the first of them works for hours
        for file in registry.describe(name).checkpoint:
            weights.locate(file)
    refuse_old(output)
    index, count = options.part
    report = RunReport()
    with (
        timed(report.seconds, "total"),
        FolderLock(output, f"shard-{index}-of-{count}" if count > 1 else "run"),
    ):
        for selection in selections:
            for label in selection.bad:
                message = f"{label.label}: {label.reason}"
                report.add(
                    Problem(dataset=selection.name, identifier=label.identifier, message=message)
                )
        keys = [selection.keys() for selection in selections]
        for name in options.matchers:
            overrides = reference_options(name) if reference_settings else {}
            task = MatchTask(
                Loader(name, options.quality, overrides),
                batch_size=options.batch_size,
                cache_gb=options.cache_gb,
            )
            where = options.where
            matcher = task.loader.load((*where.devices, where.device)[0])
            stem, settings = settings_stem(name, matcher_settings(matcher))
            info = matcher.info
            if where.devices or where.engine == "ray":  # the work is done elsewhere
                task.loader.made.clear()
                del matcher
            with opened(output, stem, settings, options.part) as kept:
                elsewhere = _known(output / FOLDER / f"{stem}.db") if count > 1 else set()
                for selection, own in zip(selections, keys, strict=True):
                    job = _Job(selection, own, task, info, kept, report, options, progress)
                    failed = job.match(elsewhere)
                    report.results += job.judge(protocols, failed, elsewhere, output)
    return report


def matcher_settings(matcher: Matcher) -> dict[str, Any]:
    """Everything that decides the matches of ZEB's pairs, JSON-able."""
    return {"encode": matcher.encode_settings(), "match": matcher.match_settings()}


def _known(path: Path) -> set[str]:
    """What a run without shards left, as far as it can be read now."""
    if not path.exists():
        return set()
    with contextlib.suppress(LockedError), Cache(path) as kept:
        return set(kept.keys())
    return set()


@dataclass(frozen=True)
class _Job:
    """One matcher on one set."""

    selection: Selection
    keys: Mapping[str, str]
    task: MatchTask
    info: MatcherInfo
    kept: Cache
    report: RunReport
    options: EvaluationOptions
    progress: bool

    @property
    def mine(self) -> list[Any]:
        """Pairs of this shard."""
        return workers.shard(self.selection.pairs, *self.options.part)

    def match(self, elsewhere: set[str]) -> set[str]:
        """Match what is missing; identifiers of the pairs that could not be matched."""
        left: dict[Names, list[Any]] = {}
        for pair in self.mine:
            key = self.keys[pair.identifier]
            if key not in elsewhere and self.kept.get(key) is None:
                left.setdefault((pair.image0, pair.image1), []).append(pair)
        failed: set[str] = set()
        bar = self._bar(sum(map(len, left.values())), "")

        def done(names: Names, result: Prediction | str) -> None:
            pairs = left[names]
            bar.update(len(pairs))
            if isinstance(result, Prediction):
                self.kept.put(self.keys[pairs[0].identifier], result.to_arrays())
                self.report.matched += len(pairs)
                return
            for pair in pairs:
                failed.add(pair.identifier)
                self.report.add(
                    Problem(
                        dataset=self.selection.name,
                        identifier=pair.identifier,
                        message=result,
                        matcher=self.info.name,
                    )
                )

        images: Any = dataclasses.replace(self.selection, pairs=(), bad=())
        where = self.options.where
        chunks = 1 if where.count == 1 else _CHUNKS * where.count
        with bar, timed(self.report.seconds, "match"):
            workers.run(
                dataclasses.replace(self.task, images=images),
                list(left),
                where,
                done,
                chunk=max(1, math.ceil(len(left) / chunks)),
            )
        return failed

    def judge(
        self, protocols: Sequence[Protocol], failed: set[str], elsewhere: set[str], output: Path
    ) -> list[SetResult]:
        """Judge what is missing; write the dump of a set whose pairs are all judged."""
        versions = {p: estimator_version(p.estimator) for p in protocols}
        keys = {
            (pair.identifier, protocol): cache.key(
                self.keys[pair.identifier],
                [pair.identifier, pair.covisible0, pair.covisible1, self.selection.truth(pair)],
                [type(protocol).__name__, dataclasses.asdict(protocol), versions[protocol]],
            )
            for pair in self.selection.pairs
            for protocol in protocols
        }
        lines = {
            name: str(arrays["line"])
            for name, key in keys.items()
            if (arrays := self.kept.get(key)) is not None
        }
        left = [
            (pair, missing)
            for pair in self.mine
            if pair.identifier not in failed
            and (
                missing := [
                    protocol
                    for protocol in protocols
                    if (pair.identifier, protocol) not in lines
                    and keys[pair.identifier, protocol] not in elsewhere
                ]
            )
        ]

        def work(item: tuple[Any, list[Protocol]]) -> list[DumpRecord]:
            pair, missing = item
            arrays = self.kept.get(self.keys[pair.identifier])
            if arrays is None:  # matched elsewhere: judged where all is at hand
                return []
            prediction = Prediction.from_arrays(arrays)
            return [self.selection.evaluate(prediction, pair, p, self.info) for p in missing]

        with self._bar(len(left), "judged") as bar, timed(self.report.seconds, "judge"):
            judged = engine.in_threads(work, left, workers=workers.usable_cores())
            for (pair, missing), records in judged:
                for protocol, record in zip(missing, records, strict=bool(records)):
                    name = pair.identifier, protocol
                    lines[name] = write_line(record)
                    self.kept.put(keys[name], {"line": np.array(lines[name])})
                bar.update()
        return [self._result(protocol, lines, failed, output) for protocol in protocols]

    def _result(
        self,
        protocol: Protocol,
        lines: Mapping[tuple[str, Protocol], str],
        failed: set[str],
        output: Path,
    ) -> SetResult:
        selection = self.selection
        records = {
            entry.identifier: DumpRecord(
                identifier=entry.identifier,
                covisible0=entry.covisible0,
                covisible1=entry.covisible1,
            )
            for entry in [*selection.bad, *(p for p in selection.pairs if p.identifier in failed)]
        }
        for (identifier, judge), line in lines.items():
            if judge == protocol and identifier not in failed:
                records[identifier] = parse_line(line)
        total = len(selection.pairs) + len(selection.bad)
        dump = None
        if len(records) == total and selection.dump_name is not None:
            dump = write_dump(
                output / "dump" / protocol.name,
                Dump(
                    matcher=self.info.name,
                    dataset=selection.dump_name,
                    version=self.options.dump_version,
                    unit=selection.dump_unit,
                    records=tuple(records.values()),
                ),
            )
        return SetResult(
            matcher=self.info.name,
            dataset=selection.name,
            protocol=protocol.name,
            pairs=total,
            evaluated=len(records),
            failures=sum(record.failed for record in records.values()),
            dump=dump,
            predictions=Predictions(self.kept.path, self.keys),
            records=tuple(records[identifier] for identifier in sorted(records)),
        )

    def _bar(self, total: int, what: str) -> Any:
        title = f"{self.info.name} {self.selection.name} {what}".rstrip()
        return tqdm(total=total, desc=title, unit="pair", disable=not self.progress)
