"""Matchers over sets of pairs: one loop matches, one judges; each result is kept.

Below the output folder::

    predictions/<matcher>-<key>.db      matches, and what protocols said of them
    predictions/<matcher>-<key>.json    the options, weights and versions that <key> stands for
    dump/<protocol>/[T] <matcher> <set> <version>.txt   complete sets

Matches are found by the content of the images, verdicts also by protocol, its library's version and
the truth: what changes is done anew, and what changes back is there. A shard writes a file of its
own, which the next run without one takes over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gim_hloc import cache, engine, weights, workers
from gim_hloc.cache import Cache
from gim_hloc.clock import timed
from gim_hloc.errors import InputError, LockedError
from gim_hloc.evaluation.dumps import Dump, DumpRecord, parse_line, write_dump, write_line
from gim_hloc.evaluation.options import EvaluationOptions
from gim_hloc.evaluation.pair_set import PairSet
from gim_hloc.evaluation.predictions import (
    FOLDER,
    Prediction,
    Predictions,
    opened,
    refuse_old,
    settings_stem,
)
from gim_hloc.evaluation.protocol import Protocol, estimator_version
from gim_hloc.lock import FolderLock
from gim_hloc.matchers import Loader, registry
from gim_hloc.tolerant import TolerantMatcher, Unusable
from gim_hloc.types import ImageData, MatcherInfo

logger = logging.getLogger(__name__)

Names = tuple[str, str]

_CHUNKS = 4  # of a worker, at least: more balance the load, fewer encode an image less often


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
        """Log a problem now and keep it for the end."""
        logger.warning("%s", problem)
        self.problems.append(problem)


def evaluate(
    sets: Sequence[PairSet],
    output: str | os.PathLike[str],
    options: EvaluationOptions,
    protocols: Sequence[Protocol],
    *,
    matcher_options: Callable[[str], dict[str, Any]] = lambda name: {},
    progress: bool = False,
) -> RunReport:
    """Run matchers over sets of pairs.

    Args:
        sets: what is matched and judged.
        output: see the module; made if it does not exist. What it holds is gone on from.
        options: who works, with which matchers.
        protocols: each gives dumps of its own.
        matcher_options: name of a matcher -> its options, beside the operating point.
        progress: show bars.

    Returns:
        What was done. A pair with a bad label, a missing or damaged image or on which the matcher
        stopped is named among the problems and stands in the dump as a failure; the others go on.
        Such pairs are tried again by the next call.

    Raises:
        InputError: an unknown matcher.
        LockedError: another run works in the output folder.
        OutputError: a pair killed two workers; what was finished is kept.
        WeightsError: the weights of a matcher cannot be had.
    """
    output = Path(output)
    for name in options.matchers:  # before the first of them works for hours
        for file in registry.describe(name).checkpoint:
            weights.locate(file)
    refuse_old(output)
    index, count = options.part
    lock = f"shard-{index}-of-{count}" if count > 1 else "run"
    report = RunReport()
    with timed(report.seconds, "total"), FolderLock(output, lock):
        for pair_set in sets:
            for bad in pair_set.bad:
                message = f"{bad.label}: {bad.reason}"
                report.add(
                    Problem(dataset=pair_set.name, identifier=bad.identifier, message=message)
                )
        keys = [pair_set.keys() for pair_set in sets]
        for name in options.matchers:
            loader = Loader(name, options.quality, matcher_options(name))
            where = options.where
            matcher = loader.load((*where.devices, where.device)[0])
            settings = {"encode": matcher.encode_settings(), "match": matcher.match_settings()}
            info = matcher.info
            stem, text = settings_stem(info.name, settings)
            if where.devices or where.engine == "ray":  # the work is done elsewhere
                loader.made.clear()
                del matcher
            with opened(output, stem, text, options.part) as kept:
                elsewhere = _known(output / FOLDER / f"{stem}.db") if count > 1 else set()
                for pair_set, own in zip(sets, keys, strict=True):
                    job = _Job(pair_set, own, loader, info, kept, elsewhere, report, options)
                    failed = job.match(progress)
                    records = job.judge(protocols, failed, progress)
                    for protocol in protocols:
                        report.results.append(job.result(protocol, records[protocol], output))
    return report


def _known(path: Path) -> set[str]:
    """What a run without shards left, as far as it can be read now."""
    if not path.exists():
        return set()
    with contextlib.suppress(LockedError), Cache(path) as kept:
        return set(kept.keys())
    return set()


@dataclass(frozen=True)
class _MatchTask:
    """Match pairs of names; what cannot be matched gives the reason. Sent to workers."""

    loader: Loader
    images: PairSet
    batch_size: int
    cache_gb: float | None

    def open(
        self, device: str
    ) -> Callable[[Sequence[Names]], Iterator[tuple[Names, Prediction | str]]]:
        """Load the matcher."""
        matcher = self.loader.load(device)
        tolerant = TolerantMatcher(matcher)

        def read(name: str) -> ImageData | Unusable:
            try:
                return self.images.image(name, matcher.image_options)
            except InputError as error:
                return Unusable(str(error))

        def match(pairs: Sequence[tuple[Any, Any]]) -> list[Prediction | str]:
            return [
                found if isinstance(found, str) else Prediction.of(found, *pair)
                for found, pair in zip(tolerant.match(pairs), pairs, strict=True)
            ]

        batch = self.batch_size or (1 if matcher.device.type == "cpu" else 4)
        return lambda pairs: engine.match(
            tolerant, pairs, read, match, cache_gb=self.cache_gb, batch_size=batch
        )


@dataclass(frozen=True)
class _Job:
    """One matcher on one set."""

    pair_set: PairSet
    keys: Mapping[str, str]  # identifier of a pair -> key of its matches
    loader: Loader
    info: MatcherInfo
    kept: Cache
    elsewhere: set[str]  # keys that a run without shards has
    report: RunReport
    options: EvaluationOptions

    def match(self, progress: bool) -> set[str]:
        """Match what is missing; identifiers of the pairs that could not be matched."""
        left: dict[Names, list[Any]] = {}
        for pair in self._mine():
            key = self.keys[pair.identifier]
            if key not in self.elsewhere and self.kept.get(key) is None:
                left.setdefault((pair.image0, pair.image1), []).append(pair)
        failed: set[str] = set()
        bar = self._bar(sum(map(len, left.values())), "", progress)

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
                        dataset=self.pair_set.name,
                        identifier=pair.identifier,
                        message=result,
                        matcher=self.info.name,
                    )
                )

        options, where = self.options, self.options.where
        images = dataclasses.replace(self.pair_set, pairs=(), bad=())
        task = _MatchTask(self.loader, images, options.batch_size, options.cache_gb)
        chunks = 1 if where.count == 1 else _CHUNKS * where.count
        with bar, timed(self.report.seconds, "match"):
            chunk = max(1, math.ceil(len(left) / chunks))
            workers.run(task, list(left), where, done, chunk=chunk)
        return failed

    def judge(
        self, protocols: Sequence[Protocol], failed: set[str], progress: bool
    ) -> dict[Protocol, dict[str, DumpRecord]]:
        """Judge what is missing; the records of all pairs that are judged or failed."""
        records = {protocol: self._failures(failed) for protocol in protocols}
        mine = {pair.identifier for pair in self._mine()}
        left = []
        for protocol in protocols:
            version = estimator_version(protocol.estimator)
            # The slip is one of the coordinates of warps.
            slips = protocol.padded_slip and self.info.has_warps
            rule = dataclasses.replace(protocol, padded_slip=slips)
            for pair in self.pair_set.pairs:
                if pair.identifier in failed:
                    continue
                key = cache.key(
                    self.keys[pair.identifier],
                    [pair.identifier, pair.covisible0, pair.covisible1, self.pair_set.truth(pair)],
                    [type(protocol).__name__, dataclasses.asdict(protocol), version],
                )
                if (arrays := self.kept.get(key)) is not None:
                    records[protocol][pair.identifier] = parse_line(str(arrays["line"]))
                elif pair.identifier in mine and key not in self.elsewhere:
                    left.append((pair, protocol, rule, key))

        def work(item: tuple[Any, Protocol, Protocol, str]) -> DumpRecord | None:
            pair, _, rule, _ = item
            arrays = self.kept.get(self.keys[pair.identifier])
            if arrays is None:  # matched elsewhere: judged where all is at hand
                return None
            return self.pair_set.judge(pair, Prediction.from_arrays(arrays), rule)

        with self._bar(len(left), "judged", progress) as bar, timed(self.report.seconds, "judge"):
            judged = engine.in_threads(work, left, workers=workers.usable_cores())
            for (pair, protocol, _, key), record in judged:
                if record is not None:
                    records[protocol][pair.identifier] = record
                    self.kept.put(key, {"line": np.array(write_line(record))})
                bar.update()
        return records

    def result(
        self, protocol: Protocol, records: Mapping[str, DumpRecord], output: Path
    ) -> SetResult:
        """Figures by one protocol; the dump is written once all pairs are judged."""
        pair_set = self.pair_set
        total = len(pair_set.pairs) + len(pair_set.bad)
        listed = tuple(records[identifier] for identifier in sorted(records))
        dump = None
        if len(listed) == total and pair_set.dump_name is not None:
            dump = write_dump(
                output / "dump" / protocol.name,
                Dump(
                    matcher=self.info.name,
                    dataset=pair_set.dump_name,
                    version=self.options.dump_version,
                    unit=pair_set.dump_unit,
                    records=listed,
                ),
            )
        return SetResult(
            matcher=self.info.name,
            dataset=pair_set.name,
            protocol=protocol.name,
            pairs=total,
            evaluated=len(listed),
            failures=sum(record.failed for record in listed),
            dump=dump,
            predictions=Predictions(self.kept.path, self.keys),
            records=listed,
        )

    def _mine(self) -> list[Any]:
        """Pairs of this shard."""
        return workers.shard(self.pair_set.pairs, *self.options.part)

    def _failures(self, failed: set[str]) -> dict[str, DumpRecord]:
        pairs = [pair for pair in self.pair_set.pairs if pair.identifier in failed]
        return {
            entry.identifier: DumpRecord(
                identifier=entry.identifier,
                covisible0=entry.covisible0,
                covisible1=entry.covisible1,
            )
            for entry in [*self.pair_set.bad, *pairs]
        }

    def _bar(self, total: int, what: str, progress: bool) -> tqdm[Any]:
        title = f"{self.info.name} {self.pair_set.name} {what}".rstrip()
        return tqdm(total=total, desc=title, unit="pair", disable=not progress)
