"""Run matchers over ZEB: predictions, evaluation, dumps; each kept, so that nothing is done twice.

Below the output folder::

    predictions/<matcher>-<key>/<set>/<part>.npz       matches, independent of any protocol
    predictions/<matcher>-<key>/<set>/failed/*.txt     pairs that could not be matched, and why
    evaluations/<matcher>-<key>/<protocol>/<set>/<part>.txt   lines of dumps
    dump/<protocol>/[T] <matcher> <set> <version>.txt  complete sets

``<key>`` stands for everything that decides the matches: options, weights, versions. Parts are
complete or absent and hold some pairs each; which pairs depends on where a run was interrupted, the
results do not. Shards of one run may share the folder: they work on different pairs, and whichever
finds all pairs of a set evaluated writes its dump.
"""

from __future__ import annotations

import abc
import hashlib
import io
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np

from gim_hloc.errors import GimError, InputError, OutputError
from gim_hloc.evaluation.zeb.datasets import (
    BadLabel,
    ZebPair,
    ZebSet,
    find_root,
    find_set,
    prepare_image,
    present_sets,
    read_labels,
    set_folder,
)
from gim_hloc.evaluation.zeb.dumps import (
    HEADER,
    Dump,
    DumpRecord,
    Unit,
    format_dump,
    parse_line,
    write_dump,
)
from gim_hloc.evaluation.zeb.protocol import (
    Protocol,
    estimator_version,
    evaluate_pair,
    reference_options,
    require_poselib,
    slip,
)
from gim_hloc.files import write_atomic

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from gim_hloc.matchers.base import ImageData, ImageOptions, Matcher, MatcherInfo, Matches

logger = logging.getLogger(__name__)

Backend = Literal["processes", "ray"]
_Item = TypeVar("_Item")

# Part of every key: raised when images are prepared differently.
_PREPARATION = 1
_PREDICTIONS, _EVALUATIONS, _DUMPS = "predictions", "evaluations", "dump"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What to run, and how."""

    matchers: tuple[str, ...] = ()  # names in the registry
    sets: tuple[str, ...] = ()  # names of sets; none: all that are there
    protocols: tuple[Protocol, ...] = (Protocol(),)  # each gives dumps of its own
    quality: str = "base"  # operating point of matchers that the reference does not set
    reference_settings: bool = True  # gim_* matchers with the options of the reference's test
    version: str | None = None  # last token of dump names; None: the quality
    limit: int | None = None  # pairs per set, drawn at random; None: all
    seed: int = 0  # of that draw
    device: str = "auto"  # of the networks: auto, cpu, cuda:1
    shard: tuple[int, int] = (0, 1)  # (i, N): the i-th of N parts of every set, from 0
    resume: bool = True  # go on with what the output folder holds; else it must hold nothing
    batch_size: int | None = None  # pairs per network call; None: 1 on a processor, 4 on a GPU
    cache_gb: float | None = None  # memory for encodings, 10^9 bytes; None: chosen
    part_pairs: int = 100  # pairs after which results are written: what a kill can cost
    evaluators: int | None = None  # threads for RANSAC; None: 0 (in line) on a processor, else 4
    progress: bool = False  # show progress bars

    def __post_init__(self) -> None:
        i, count = self.shard
        if count < 1 or not 0 <= i < count:
            raise InputError(f"Shard {i} of {count} does not exist: they count from 0.")
        if not self.matchers:
            raise InputError("No matcher was named.")
        if not self.protocols:
            raise InputError("No protocol was named.")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit is {self.limit}, it must be positive.")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}, it must not be negative.")
        if self.part_pairs < 1:
            raise InputError(f"part_pairs is {self.part_pairs}, it must be positive.")
        for name in ("matchers", "protocols"):  # named twice, still run once
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))

    @property
    def dump_version(self) -> str:
        """Last token of dump names. A run on some of the pairs must not pass for one on all."""
        version = self.version or self.quality
        return version if self.limit is None else f"{version}-limit{self.limit}-seed{self.seed}"


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
    predictions: Path  # folder of the matches, for `read_folder`
    records: tuple[DumpRecord, ...] = field(default=(), repr=False)


@dataclass(kw_only=True)
class RunReport:
    """What a run did.

    Attributes:
        results: by matcher, set and protocol, in the order asked for.
        problems: pairs that count as failed for a named reason.
        matched: pairs matched now; others were there already.
        encoded: images encoded now, repetitions included.
        seconds: wall time ``total`` and its parts ``load`` (of matchers), ``encode``, ``match``,
            ``evaluate``; ``read`` and ``write`` beside them. Reading runs ahead in threads, and so
            does evaluation where there are evaluators: their seconds overlap the others. With
            workers, ``total`` is the wall time of all and the parts are their sums.
        by_matcher: the same of each matcher; ``total`` is the sum of the workers' wall times.
        lost: workers that ended before their work, one sentence each.
        keys: matcher -> name of the folder of its predictions and evaluations.
    """

    results: list[SetResult] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    matched: int = 0
    encoded: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    by_matcher: dict[str, dict[str, float]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, or 1 where a pair had a problem that has nothing to do with how well it matches.

        1 as well where a worker was lost.
        """
        return 1 if self.problems or self.lost else 0

    @property
    def outside(self) -> float:
        """Share of the wall time that was spent neither in matchers nor in RANSAC.

        Only where evaluation runs in line: with evaluators, times overlap and the share is a lower
        bound.
        """
        return _outside(list(self.by_matcher.values()))

    def outside_of(self, matcher: str) -> float:
        """As ``outside``, of one matcher."""
        return _outside([self.by_matcher[matcher]])


def _outside(clocks: Sequence[Mapping[str, float]]) -> float:
    total = sum(clock.get("total", 0.0) for clock in clocks)
    parts = ("load", "encode", "match", "evaluate")
    inside = sum(clock.get(part, 0.0) for clock in clocks for part in parts)
    return max(0.0, 1 - inside / total) if total > 0 else 0.0


def run(
    folder: str | os.PathLike[str], output: str | os.PathLike[str], options: RunOptions
) -> RunReport:
    """Run matchers over the sets of an unpacked ZEB.

    Args:
        folder: with ``zeb/`` in it, or ``zeb/`` itself.
        output: see the module; made if it does not exist.
        options: what to run.

    Returns:
        What was done. A pair with a bad label, a missing or damaged image or on which the matcher
        stopped is named among the problems and stands in the dump as a failure; the others go on.
        Such pairs are tried again by the next call.

    Raises:
        InputError: no set is there, an unknown name, a set without labels.
        OutputError: the folder holds results of these matchers and ``resume`` is off.
        WeightsError: the weights of a matcher cannot be had.
    """
    selections = _selections(folder, options)
    _check_names(options)
    if not options.resume and options.shard[1] == 1:
        require_unused(Path(output), options.matchers)
    return run_selections(selections, output, options)


def _selections(folder: str | os.PathLike[str], options: RunOptions) -> list[_ZebSelection]:
    root = find_root(folder)
    named = {entry.name: entry for entry in (find_set(name, root) for name in options.sets)}
    sets = list(named.values()) or present_sets(root)
    return [_select(root, zeb_set, options) for zeb_set in sets]


def run_selections(
    selections: Sequence[Selection], output: str | os.PathLike[str], options: RunOptions
) -> RunReport:
    """Run matchers over any sets of pairs; what `run` does once it has read the labels.

    Args:
        selections: the sets, with what is particular to them.
        output: see the module; what it holds of these sets is gone on from.
        options: as for `run`; ``sets``, ``limit``, ``seed``, ``shard`` and ``resume`` have had
            their effect on the selections.

    Raises:
        InputError: an unknown matcher, or PoseLib is asked for and not installed.
        OutputError: the folder's evaluations were made with another version of the estimator.
        WeightsError: the weights of a matcher cannot be had.
    """
    from gim_hloc.matchers import registry

    output = Path(output)
    _check_names(options)
    _locate_weights(options)
    report = RunReport()
    report.problems += [problem for selection in selections for problem in selection.problems()]
    if options.shard[0] == 0:  # the labels are the same for all shards
        for problem in report.problems:
            logger.warning("%s", problem)
    start = time.perf_counter()
    for name in options.matchers:
        clock = _Clock()
        with clock("total"):
            overrides = reference_options(name) if options.reference_settings else {}
            with clock("load"):
                matcher = registry.load(
                    name,
                    quality=options.quality,  # type: ignore[arg-type]
                    device=options.device,
                    **overrides,
                )
            key = _write_settings(output, name, matcher)
            for protocol in options.protocols:
                _check_estimator(output / _EVALUATIONS / key / protocol.name, protocol)
            for selection in selections:
                _SetRun(output, key, name, matcher, selection, options, report, clock).run()
        report.keys[name] = key
        report.by_matcher[name] = dict(clock.seconds)
    report.seconds = {**_add(report.by_matcher.values()), "total": time.perf_counter() - start}
    return report


def _add(clocks: Iterable[Mapping[str, float]]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for clock in clocks:
        for part, value in clock.items():
            seconds[part] = seconds.get(part, 0.0) + value
    return seconds


def _check_names(options: RunOptions) -> None:
    """Raise InputError for what would only be noticed after the first matcher ran for hours."""
    from gim_hloc.matchers import registry

    for name in options.matchers:
        registry.describe(name)
    if any(protocol.estimator == "poselib" for protocol in options.protocols):
        require_poselib()


def _locate_weights(options: RunOptions) -> None:
    """Fetch what is missing, or raise WeightsError, before the first matcher runs for hours."""
    from gim_hloc import weights
    from gim_hloc.matchers import registry

    for name in options.matchers:
        for file in registry.describe(name).checkpoint:
            weights.locate(file)


def run_workers(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: RunOptions,
    devices: Sequence[str],
    *,
    backend: Backend = "processes",
) -> RunReport:
    """Run with one worker per device, each on its own part of every set.

    Args:
        folder: as for `run`.
        output: as for `run`; all workers must see it under the same path.
        options: as for `run`; ``device`` is set here, and a ``shard`` is split further.
        devices: one worker each; the same name twice makes two workers on it.
        backend: "processes" on this machine, or "ray" on the cluster that Ray is connected to.

    Returns:
        The results of all. A worker that died or stopped is named in ``lost``: the others go on,
        and the same call matches what it left.

    Raises:
        InputError: as `run`; no device; Ray is asked for and not installed.
        GimError: all workers were lost.
    """
    # Workers elsewhere have another working directory.
    source = partial(_selections, str(Path(folder).resolve()))
    selections = source(options)
    _check_names(options)
    if not options.resume and options.shard[1] == 1:
        require_unused(Path(output), options.matchers)
    return run_spread(selections, source, output, options, devices, backend=backend)


def run_spread(
    selections: Sequence[Selection],
    source: Source,
    output: str | os.PathLike[str],
    options: RunOptions,
    devices: Sequence[str],
    *,
    backend: Backend = "processes",
) -> RunReport:
    """Run any sets of pairs with one worker per device; what `run_workers` does with ZEB's.

    Args:
        selections: the sets, as ``source`` gives them for ``options``.
        source: reads the sets again in every worker, for its shard: must be picklable and hold
            absolute paths.
        output: as for `run_workers`; what it holds of these sets is gone on from.
        options: as for `run_workers`.
        devices: one worker each.
        backend: see `run_workers`.

    Raises:
        InputError: no device, an unknown matcher; Ray or PoseLib is asked for and not installed.
        GimError: all workers were lost.
    """
    if not devices:
        raise InputError("No device was named.")
    start = time.perf_counter()
    _check_names(options)
    _locate_weights(options)  # once, before workers would fetch them side by side
    part, parts = options.shard
    count = len(devices)
    jobs = [
        replace(
            options,
            device=device,
            shard=(part * count + i, parts * count),
            resume=True,
            progress=options.progress and i == 0,  # bars of several would overwrite each other
        )
        for i, device in enumerate(devices)
    ]
    ends = _MAPS[backend](source, str(Path(output).resolve()), jobs)
    done = [end for end in ends if isinstance(end, RunReport)]
    report = RunReport(
        lost=[
            f"Worker {i + 1} of {count} on {devices[i]} {end}. What it left is matched when the "
            "run is resumed by the same command."
            for i, end in enumerate(ends)
            if not isinstance(end, RunReport)
        ]
    )
    if not done:
        stopped = next((end for end in ends if isinstance(end, _Stopped)), None)
        if stopped is not None:
            raise stopped.error
        raise GimError(" ".join(report.lost))
    report.problems += [problem for selection in selections for problem in selection.problems()]
    for end in done:
        # Bad labels are known to each of them.
        report.problems += [problem for problem in end.problems if problem.matcher is not None]
        report.matched += end.matched
        report.encoded += end.encoded
        report.keys.update(end.keys)
    for problem in report.problems:  # workers have no terminal
        logger.warning("%s", problem)
    for name in options.matchers:
        report.by_matcher[name] = _add(end.by_matcher.get(name, {}) for end in done)
        for selection in selections:
            report.results += [
                _assemble(Path(output), report.keys[name], name, selection, protocol, options)
                for protocol in options.protocols
            ]
    report.seconds = {
        **_add(report.by_matcher.values()),
        "total": time.perf_counter() - start,
    }
    return report


@dataclass(frozen=True)
class _Stopped:
    """A worker that stopped with an error."""

    error: GimError

    def __str__(self) -> str:
        return f"stopped: {self.error}"


@dataclass(frozen=True)
class _Died:
    """A worker that ended without a word."""

    how: str

    def __str__(self) -> str:
        return f"died ({self.how})"


_End = RunReport | _Stopped | _Died


def _run_job(source: Source, output: str, job: RunOptions) -> _End:
    """Do one worker's part, in the worker."""
    try:
        report = run_selections(source(job), output, job)
    except GimError as error:
        return _Stopped(error)
    except Exception as error:  # whatever it is, it must come back as something to be told
        logger.exception("A worker on %s stopped", job.device)
        return _Stopped(GimError(_words(error)))
    report.results.clear()  # as far as this worker saw them; they are collected anew
    return report


def _work(
    connection: Connection, source: Source, output: str, job: RunOptions, threads: int
) -> None:
    """Body of a local process."""
    threading.Thread(target=_leave_with_caller, daemon=True).start()
    # Ctrl-C reaches the caller too, which stops its workers: once, so that each can write what it
    # has matched.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    import torch

    if threads:
        torch.set_num_threads(threads)
    connection.send(_run_job(source, output, job))


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _leave_with_caller() -> None:
    """End this worker when its caller was killed: nobody would take its report."""
    caller = multiprocessing.parent_process()
    if caller is not None:
        caller.join()
        os._exit(1)  # files are complete or absent


def _map_processes(source: Source, output: str, jobs: Sequence[RunOptions]) -> list[_End]:
    # Not forked: CUDA and the threads of PyTorch do not survive it. Not a pool: it takes all
    # processes down when one of them dies.
    from gim_hloc.engine import usable_cores

    context = multiprocessing.get_context("spawn")
    processors = sum(_on_processor(job.device) for job in jobs)
    workers = []
    ends: list[_End] = []
    try:
        for job in jobs:
            mine, theirs = context.Pipe(duplex=False)
            # Each would take all cores.
            shared = _on_processor(job.device) and processors > 1
            threads = max(1, usable_cores() // processors) if shared else 0
            process = context.Process(target=_work, args=(theirs, source, output, job, threads))
            process.start()
            theirs.close()  # so that the death of the worker ends the connection
            workers.append((process, mine))
        for process, connection in workers:
            try:
                ends.append(connection.recv())
            except EOFError:
                process.join()
                ends.append(_Died(_death(process.exitcode)))
    except BaseException:
        for process, _ in workers:
            process.terminate()
        raise
    finally:
        for process, connection in workers:
            process.join()
            connection.close()
    return ends


def _on_processor(device: str) -> bool:
    import torch

    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}, perhaps out of memory" if name == "SIGKILL" else name
    return f"exit code {code}"


def _map_ray(source: Source, output: str, jobs: Sequence[RunOptions]) -> list[_End]:
    try:
        import ray
    except ImportError:
        raise InputError('The backend ray needs Ray: pip install "ray"') from None
    ray.init(ignore_reinit_error=True)
    # Ray shows a worker only the GPUs that it was given, so that all of them call theirs "cuda".
    # Not tried again by Ray: what kills a worker once, such as too little memory, does it again.
    tasks = [
        ray.remote(_run_job)
        .options(num_gpus=int(job.device.startswith("cuda")), max_retries=0)
        .remote(
            source, output, replace(job, device="cuda") if job.device.startswith("cuda") else job
        )
        for job in jobs
    ]
    ends: list[_End] = []
    for task in tasks:
        try:
            ends.append(ray.get(task))
        except ray.exceptions.RayError as error:
            ends.append(_Died(_words(error)))
    return ends


# Reads the sets that a run is about, for its limit and shard.
Source: TypeAlias = "Callable[[RunOptions], Sequence[Selection]]"

_MAPS = {"processes": _map_processes, "ray": _map_ray}


# ---------------------------------------------------------------------------------------- selection


@dataclass(frozen=True, kw_only=True)
class Selection(abc.ABC):
    """The pairs of one set that a run is about, and what is particular to the set.

    Attributes:
        name: of the set, in messages and results.
        folder: name of the folder of its predictions.
        root: folder of the data.
        evaluation_folder: name of the folder of its evaluations.
        dump_name: name of the set in its dump; None: no dump is written.
        dump_unit: of the errors in it.
        pairs: of all shards; what `run` needs of a pair is ``identifier``, the names ``image0`` and
            ``image1``, and ``covisible0`` and ``covisible1``.
        bad: labels that are no pairs.
        mine: identifiers of this shard.
    """

    name: str
    folder: str
    root: Path
    evaluation_folder: str
    dump_name: str | None
    pairs: tuple[Any, ...]
    bad: tuple[BadLabel, ...]
    mine: frozenset[str]
    dump_unit: Unit = "deg"

    @abc.abstractmethod
    def read(self, name: str, options: ImageOptions) -> ImageData:
        """Read an image as matchers are to see it.

        Args:
            name: ``image0`` or ``image1`` of a pair.
            options: of the matcher.

        Raises:
            InputError: the file does not exist or cannot be read, named.
        """

    @abc.abstractmethod
    def evaluate(
        self, prediction: Prediction, pair: Any, protocol: Protocol, info: MatcherInfo
    ) -> DumpRecord:
        """Judge the matches of one pair."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong with the labels."""
        for label in self.bad:
            yield Problem(
                dataset=self.name,
                identifier=label.identifier,
                message=f"{label.label}: {label.reason}",
            )


@dataclass(frozen=True, kw_only=True)
class _ZebSelection(Selection):
    """A set of ZEB."""

    zeb_set: ZebSet

    def read(self, name: str, options: ImageOptions) -> ImageData:
        return prepare_image(self.root / self.zeb_set.folder / name, self.zeb_set, options)

    def evaluate(
        self, prediction: Prediction, pair: ZebPair, protocol: Protocol, info: MatcherInfo
    ) -> DumpRecord:
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


def _select(root: Path, zeb_set: ZebSet, options: RunOptions) -> _ZebSelection:
    labels = read_labels(root, zeb_set)
    pairs, bad = draw(labels.pairs, labels.bad, options)
    return _ZebSelection(
        name=zeb_set.name,
        folder=zeb_set.folder,
        evaluation_folder=zeb_set.folder,
        dump_name=zeb_set.dump_name,
        pairs=pairs,
        bad=bad,
        mine=share(pairs, options),
        root=root,
        zeb_set=zeb_set,
    )


def draw(
    pairs: tuple[_Item, ...], bad: tuple[BadLabel, ...], options: RunOptions
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


def share(pairs: Sequence[Any], options: RunOptions) -> frozenset[str]:
    """Return the identifiers of a shard's pairs."""
    i, count = options.shard
    # Neighbours in the order share images: runs of them keep most scenes in one shard.
    first, last = len(pairs) * i // count, len(pairs) * (i + 1) // count
    return frozenset(pair.identifier for pair in pairs[first:last])


# --------------------------------------------------------------------------------------------- keys


def matcher_settings(matcher: Matcher) -> dict[str, Any]:
    """Everything that decides the matches of ZEB's pairs, JSON-able."""
    return {
        "encode": matcher.encode_settings(),
        "match": matcher.match_settings(),
        "preparation": _PREPARATION,
    }


def require_unused(output: Path, names: Iterable[str], folder: str = "*") -> None:
    """Refuse to go on with what an earlier run left, where that was not asked for.

    Args:
        output: of the run.
        names: of matchers.
        folder: of the set, see `Selection`; by default all of them.

    Raises:
        OutputError: there are predictions of one of the matchers.
    """
    for name in names:
        if any((output / _PREDICTIONS).glob(f"{name}-*/{folder}/*.npz")):
            raise OutputError(
                f"{output} holds predictions of {name} by an earlier run: resume it (leave out "
                "--no-resume), or choose another folder."
            )


def _write_settings(output: Path, name: str, matcher: Matcher) -> str:
    """Make the folder of a matcher's predictions; returns its name."""
    settings = json.dumps(matcher_settings(matcher), indent=1, sort_keys=True, default=str)
    key = f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    folder = output / _PREDICTIONS / key
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "settings.json", settings + "\n")
    return key


def _check_estimator(folder: Path, protocol: Protocol) -> None:
    """Note the library's version beside evaluations, which depend on it; never mix two.

    Raises:
        OutputError: the folder's evaluations were made with another version.
    """
    version = estimator_version(protocol.estimator)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "estimator.txt"
    before = path.read_text(encoding="utf-8").strip() if path.exists() else version
    if before != version:
        raise OutputError(
            f"The evaluations in {folder} were made with {before}, now it is {version}: delete "
            "that folder to evaluate anew (predictions are kept), or install the other version."
        )
    write_atomic(path, version + "\n")


def _check_data(folder: Path, selection: Selection) -> None:
    """Note beside predictions which data they are of; pairs of two may have the same names.

    Raises:
        OutputError: they are of data in another folder.
    """
    path, data = folder / "data.txt", str(selection.root.resolve())
    before = path.read_text(encoding="utf-8").rstrip("\n") if path.exists() else data
    if before != data:
        raise OutputError(
            f"{folder} holds predictions on {before}, not on {data}: choose another folder with "
            f"--out, or delete {path} if it is the same data."
        )
    write_atomic(path, data + "\n")


# -------------------------------------------------------------------------------------- predictions


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """The matches of one pair.

    Attributes:
        identifier: of the pair.
        points0: (M, 2) float32 original pixels of image 0, hloc's frame.
        points1: (M, 2) the same in image 1.
        scores: (M,) float32.
        size0: (width, height) of image 0 in pixels.
        size1: of image 1.
    """

    identifier: str
    points0: np.ndarray
    points1: np.ndarray
    scores: np.ndarray
    size0: tuple[int, int]
    size1: tuple[int, int]


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions to one file, complete or not at all."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        identifiers=np.array([p.identifier for p in predictions], dtype=np.str_),
        counts=np.array([len(p.scores) for p in predictions], dtype=np.int64),
        sizes=np.array([(*p.size0, *p.size1) for p in predictions], dtype=np.int64),
        points0=np.concatenate([p.points0 for p in predictions]).astype(np.float32, copy=False),
        points1=np.concatenate([p.points1 for p in predictions]).astype(np.float32, copy=False),
        scores=np.concatenate([p.scores for p in predictions]).astype(np.float32, copy=False),
    )
    write_atomic(path, buffer.getvalue())


def read_predictions(path: Path) -> list[Prediction]:
    """Read what `write_predictions` wrote.

    Raises:
        OutputError: the file is damaged or not of this kind.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            identifiers = arrays["identifiers"].tolist()
            ends = np.cumsum(arrays["counts"])[:-1]
            points0, points1, scores = (
                np.split(arrays[key], ends) for key in ("points0", "points1", "scores")
            )
            sizes = arrays["sizes"].tolist()
    except Exception as error:  # zipfile, NumPy and zlib raise several classes
        raise _damaged(path, error) from error
    return [
        Prediction(
            identifier=identifier,
            points0=points0[i],
            points1=points1[i],
            scores=scores[i],
            size0=(sizes[i][0], sizes[i][1]),
            size1=(sizes[i][2], sizes[i][3]),
        )
        for i, identifier in enumerate(identifiers)
    ]


def find_predictions(
    output: str | os.PathLike[str],
    matcher: str,
    dataset: str,
    identifiers: Iterable[str] | None = None,
) -> dict[str, Prediction]:
    """Read a matcher's matches of pairs, for pictures of them.

    Args:
        output: of `run`.
        matcher: its name, or the name of its folder if there are several settings of it.
        dataset: name of the set.
        identifiers: which pairs; None reads all.

    Returns:
        Predictions by identifier; pairs without are left out.

    Raises:
        InputError: no predictions of that matcher, or of several settings.
        OutputError: a file is damaged.
    """
    base = Path(output) / _PREDICTIONS
    folders = [
        path
        for path in sorted(base.glob("*"))
        if path.is_dir() and matcher in (path.name, path.name.rpartition("-")[0])
    ]
    if len(folders) != 1:
        found = ", ".join(path.name for path in folders) or "none"
        raise InputError(
            f"Predictions of one setting of {matcher} are needed in {base}, the matches that "
            f"gim-zeb run keeps: {found}."
        )
    # Not find_set alone: it knows other sets than the twelve only by their folder of images.
    return read_folder(folders[0] / set_folder(dataset), identifiers)


def read_folder(folder: Path, identifiers: Iterable[str] | None = None) -> dict[str, Prediction]:
    """Read the predictions of one matcher on one set, or those of some pairs.

    Raises:
        OutputError: a file is damaged.
    """
    wanted = None if identifiers is None else set(identifiers)
    result: dict[str, Prediction] = {}
    for path in sorted(folder.glob("*.npz")):
        if wanted is not None and wanted.isdisjoint(_identifiers(path)):
            continue
        for prediction in read_predictions(path):
            if wanted is None or prediction.identifier in wanted:
                result[prediction.identifier] = prediction
    return result


def _identifiers(path: Path) -> list[str]:
    """Which pairs a file of predictions holds; their matches are not read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names: list[str] = arrays["identifiers"].tolist()
    except Exception as error:  # zipfile, NumPy and zlib raise several classes
        raise _damaged(path, error) from error
    return names


def _damaged(path: Path, error: Exception) -> OutputError:
    return OutputError(f"{path} is damaged ({error}): delete it and resume.")


# ------------------------------------------------------------------------------------------ one set


class _Unreadable:
    """Stands for the image or the encoding of a file that cannot be used."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Encoder:
    """What the scheduler needs of a matcher."""

    def __init__(self, matcher: Matcher, clock: _Clock) -> None:
        self._matcher, self._clock = matcher, clock
        self.device = matcher.device

    def encode(self, image: Any) -> Any:
        from gim_hloc.engine import spoils_the_rest

        if isinstance(image, _Unreadable):
            return image
        with self._clock("encode"):
            try:
                return self._matcher.encode(image)
            except Exception as error:
                if spoils_the_rest(error):
                    raise
                logger.exception("%s cannot be encoded", image.name)
                return _Unreadable(f"{image.name} cannot be encoded ({_words(error)})")

    def smaller(self) -> bool:
        """No: a benchmark must not go on at another resolution when memory runs out."""
        return False


class _SetRun:
    """One matcher on one set."""

    def __init__(
        self,
        output: Path,
        key: str,
        name: str,
        matcher: Matcher,
        selection: Selection,
        options: RunOptions,
        report: RunReport,
        clock: _Clock,
    ) -> None:
        self.output, self.key, self.name, self.matcher = output, key, name, matcher
        self.selection, self.options, self.report, self.clock = selection, options, report, clock
        self.pairs = {pair.identifier: pair for pair in selection.pairs}
        self.predictions = output / _PREDICTIONS / key / selection.folder
        self.evaluations = {
            protocol: output / _EVALUATIONS / key / protocol.name / selection.evaluation_folder
            for protocol in options.protocols
        }
        self.failed: dict[str, str] = {}  # identifier -> why, pairs without a prediction
        for folder in (self.predictions, *self.evaluations.values()):
            folder.mkdir(parents=True, exist_ok=True)
        _check_data(self.predictions, selection)

    def run(self) -> None:
        with self._evaluator() as submit:
            done = self._finish_parts(submit)
            todo = [
                pair
                for pair in self.selection.pairs
                if pair.identifier in self.selection.mine and pair.identifier not in done
            ]
            for pair in todo:  # tried again
                _failure_file(self.predictions, pair.identifier).unlink(missing_ok=True)
            if todo:
                self._predict(todo, submit)
        for identifier, message in self.failed.items():
            problem = Problem(
                dataset=self.selection.name,
                identifier=identifier,
                message=message,
                matcher=self.name,
            )
            logger.warning("%s", problem)
            self.report.problems.append(problem)
        for protocol in self.options.protocols:
            with self.clock("write"):
                result = _assemble(
                    self.output,
                    self.key,
                    self.name,
                    self.selection,
                    protocol,
                    self.options,
                )
            self.report.results.append(result)

    # -- evaluation

    @contextmanager
    def _evaluator(self) -> Iterator[Callable[[str, list[Prediction] | None], None]]:
        """Yield what evaluates a part: in threads beside the network, or in line."""
        count = self.options.evaluators
        if count is None:
            count = 0 if self.matcher.device.type == "cpu" else 4
        if count == 0:
            yield self._evaluate_part
            return
        futures: list[Future[None]] = []
        with ThreadPoolExecutor(count) as pool:
            yield lambda part, known: futures.append(pool.submit(self._evaluate_part, part, known))
            for future in futures:
                future.result()

    def _finish_parts(self, submit: Callable[[str, list[Prediction] | None], None]) -> set[str]:
        """Evaluate parts that an earlier run left; returns the pairs that have predictions."""
        done: set[str] = set()
        for path in sorted(self.predictions.glob("*.npz")):
            names = _identifiers(path)
            done.update(names)
            # Other shards evaluate their own parts.
            if not self.selection.mine.isdisjoint(names):
                submit(path.stem, None)
        return done

    def _evaluate_part(self, part: str, known: list[Prediction] | None) -> None:
        for protocol, folder in self.evaluations.items():
            path = folder / f"{part}.txt"
            if path.exists() and known is None:
                continue
            if known is None:
                known = read_predictions(self.predictions / f"{part}.npz")
            with self.clock("evaluate"):
                records = [
                    self.selection.evaluate(
                        prediction, self.pairs[prediction.identifier], protocol, self.matcher.info
                    )
                    for prediction in known
                    # A limited run may meet parts of a complete one, and those of lost labels.
                    if prediction.identifier in self.pairs
                ]
            if len(records) == len(known):
                write_atomic(path, format_dump(records))
            else:
                write_atomic(path.with_suffix(".some"), format_dump(records))

    # -- prediction

    def _predict(
        self,
        todo: Sequence[Any],
        submit: Callable[[str, list[Prediction] | None], None],
    ) -> None:
        from gim_hloc.engine import match_scheduled

        by_names: dict[tuple[str, str], list[Any]] = {}
        for pair in todo:
            by_names.setdefault((pair.image0, pair.image1), []).append(pair)
        waiting: list[Prediction] = []
        bar = _progress(len(todo), f"{self.name} {self.selection.name}", self.options.progress)

        def flush(*, evaluate: bool = True) -> None:
            if not waiting:
                return
            part = _part_name(waiting)
            with self.clock("write"):
                write_predictions(self.predictions / f"{part}.npz", waiting)
            if evaluate:
                submit(part, list(waiting))
            waiting.clear()

        def done(names: tuple[str, str], result: Prediction | str) -> None:
            for pair in by_names[names]:
                bar.update()
                if isinstance(result, str):
                    self.failed[pair.identifier] = result
                    # Whichever shard ends last has to know of it.
                    path = _failure_file(self.predictions, pair.identifier)
                    path.parent.mkdir(exist_ok=True)
                    write_atomic(path, f"{pair.identifier}\n{result}\n")
                    continue
                self.report.matched += 1
                values = {**vars(result), "identifier": pair.identifier}
                waiting.append(Prediction(**values))
            if len(waiting) >= self.options.part_pairs:
                flush()

        batch = self.options.batch_size or (1 if self.matcher.device.type == "cpu" else 4)
        try:
            schedule = match_scheduled(
                _Encoder(self.matcher, self.clock),
                list(by_names),
                self._read,
                self._match,
                done,
                cache_gb=self.options.cache_gb,
                batch_size=batch,
            )
            self.report.encoded += len(schedule.encoded)
            flush()
        finally:
            bar.close()
            flush(evaluate=False)  # interrupted: what is matched stays matched

    def _read(self, name: str) -> Any:
        """The image as the set shows it, or why there is none."""
        with self.clock("read"):
            try:
                return self.selection.read(name, self.matcher.image_options)
            except InputError as error:
                return _Unreadable(str(error))

    def _match(self, encodings: list[tuple[Any, Any]]) -> list[Prediction | str]:
        """Match a batch; what cannot be matched gives the reason."""
        results: list[Prediction | str] = [_broken(a, b) for a, b in encodings]
        rows = [row for row, result in enumerate(results) if not result]
        if not rows:
            return results
        with self.clock("match"):
            found = self._match_batch([encodings[row] for row in rows])
        for row, matches in zip(rows, found, strict=True):
            if isinstance(matches, str):
                results[row] = matches
                continue
            a, b = encodings[row]
            results[row] = Prediction(
                identifier="",
                points0=matches.keypoints0.numpy(),
                points1=matches.keypoints1.numpy(),
                scores=matches.scores.numpy(),
                size0=a.size,
                size1=b.size,
            )
        return results

    def _match_batch(self, pairs: list[tuple[Any, Any]]) -> list[Matches | str]:
        from gim_hloc.engine import spoils_the_rest

        try:
            return [*self.matcher.match_batch(pairs)]
        except Exception as error:
            if spoils_the_rest(error):
                raise
            if len(pairs) == 1:
                logger.exception("%s and %s cannot be matched", pairs[0][0].name, pairs[0][1].name)
                return [f"cannot be matched ({_words(error)})"]
        return [self._match_batch([pair])[0] for pair in pairs]


# ------------------------------------------------------------------------------------------- dumps


def _assemble(
    output: Path,
    key: str,
    matcher: str,
    selection: Selection,
    protocol: Protocol,
    options: RunOptions,
) -> SetResult:
    """Collect the lines of a set; write its dump once all pairs are there."""
    total = len(selection.pairs) + len(selection.bad)
    predictions = output / _PREDICTIONS / key / selection.folder
    records = _collect(
        output / _EVALUATIONS / key / protocol.name, selection, _read_failures(predictions)
    )
    dump = None
    if len(records) == total and selection.dump_name is not None:
        dump = write_dump(
            output / _DUMPS / protocol.name,
            Dump(
                matcher=matcher,
                dataset=selection.dump_name,
                version=options.dump_version,
                unit=selection.dump_unit,
                records=tuple(records.values()),
            ),
        )
    return SetResult(
        matcher=matcher,
        dataset=selection.name,
        protocol=protocol.name,
        pairs=total,
        evaluated=len(records),
        failures=sum(record.failed for record in records.values()),
        dump=dump,
        predictions=predictions,
        records=tuple(records[identifier] for identifier in sorted(records)),
    )


def _collect(base: Path, selection: Selection, failed: Iterable[str]) -> dict[str, DumpRecord]:
    """Records by identifier: of bad labels, of pairs without matches, of what is evaluated."""
    pairs = {pair.identifier: pair for pair in selection.pairs}
    without = [*selection.bad, *(pairs[name] for name in failed if name in pairs)]
    records = {
        entry.identifier: DumpRecord(
            identifier=entry.identifier,
            covisible0=entry.covisible0,
            covisible1=entry.covisible1,
        )
        for entry in without
    }
    folder = base / selection.evaluation_folder
    for path in sorted([*folder.glob("*.txt"), *folder.glob("*.some")]):
        for record in _read_lines(path):
            if record.identifier in pairs:
                records[record.identifier] = record
    return records


def _failure_file(predictions: Path, identifier: str) -> Path:
    """Where it is noted that a pair could not be matched; one a pair: shards do not collide."""
    return predictions / "failed" / f"{_digest(identifier)}.txt"


def _read_failures(predictions: Path) -> list[str]:
    """Identifiers of the pairs that could not be matched when they were last tried."""
    return [
        path.read_text(encoding="utf-8").split("\n", 1)[0]
        for path in sorted((predictions / "failed").glob("*.txt"))
    ]


def _read_lines(path: Path) -> list[DumpRecord]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if not lines or lines[0] != HEADER:
            raise ValueError("no header")
        return [parse_line(line) for line in lines[1:]]
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} is damaged ({error}): delete it and resume.") from error


def _broken(*encodings: Any) -> str:
    """Why a pair of encodings cannot be matched; empty if it can."""
    messages = [e.message for e in encodings if isinstance(e, _Unreadable)]
    return "; ".join(dict.fromkeys(messages))


def _words(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _part_name(predictions: Sequence[Prediction]) -> str:
    return _digest("\n".join(prediction.identifier for prediction in predictions))


def _digest(text: str) -> str:
    # Names of files need not be valid text.
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _progress(total: int, title: str, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit="pair", disable=not show)


class _Clock:
    """Adds up seconds by name; usable from several threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mutex = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            with self._mutex:
                self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
