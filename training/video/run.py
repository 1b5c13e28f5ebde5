"""Label videos: frames, masks, rounds of labellers; resumed, in shards, by several workers.

All that is finished stays finished: frames are files that are complete or absent, labels are
appended pair by pair (see `store`). Repeating a run does what is missing and nothing else; files
made with other settings are refused by name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gim_hloc.errors import GimError, InputError, LockedError, OutputError
from gim_hloc.files import write_atomic
from gim_hloc.matchers.base import Matcher
from gim_hloc.training.video.folder import ImageFormat, VideoFolder, VideoInfo
from gim_hloc.training.video.frames import (
    FrameSource,
    check_max_size,
    grid_length,
    on_grid,
    open_source,
    reduced_size,
    write_frames,
)
from gim_hloc.training.video.labels import (
    LabelRound,
    RoundOptions,
    RoundReport,
    default_labellers,
    frame_record,
    load_labeller,
    zoom_box,
)
from gim_hloc.training.video.masks import FrameMasks, MaskOptions, prepare_masks
from gim_hloc.training.video.sampling import Plan, SamplingOptions, make_plan
from gim_hloc.training.video.sources import VideoSource, download
from gim_hloc.training.video.store import LabelStore, StoreInfo, begin_anew

logger = logging.getLogger(__name__)

Backend = Literal["processes", "ray"]

_FORMAT = 1  # part of the settings: raised when labels are made differently
_ATTEMPTS = 3  # times that workers are started when some of them die
_LOCK_ATTEMPTS = 20
_DOWNLOADS = "downloads"


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How a video is labelled."""

    labellers: tuple[str, ...] = ()  # names of matchers; none: `labels.default_labellers`
    zoom: bool = True  # also the zoom round of every labeller
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    rounds: RoundOptions = field(default_factory=RoundOptions)
    masks: MaskOptions = field(default_factory=MaskOptions)
    max_size: int | None = None  # frames are stored reduced to this long side, px; None keeps them
    image_format: ImageFormat = "jpg"  # of stored frames
    quality: int = 95  # of JPEG
    sequence_fps: float = 30.0  # frames per second of folders of images
    max_height: int = 1080  # rows of downloaded videos, at most
    shard: tuple[int, int] = (0, 1)  # (i, N): the i-th of N parts of the pairs, from 0
    devices: tuple[str, ...] = ("auto",)  # one worker each; the same twice makes two workers on it
    backend: Backend = "processes"  # of workers: on this machine, or Ray's cluster
    batch_size: int | None = None  # pairs a network call; None: 1 on a processor, 4 on a GPU
    cache_gb: float | None = None  # memory for encodings of a worker, 10^9 bytes; None: chosen
    retry_failed: bool = False  # try pairs again that have failed
    overwrite: bool = False  # begin the labels anew
    progress: bool = False  # show progress bars

    def __post_init__(self) -> None:
        i, count = self.shard
        if count < 1 or not 0 <= i < count:
            raise InputError(f"Shard {i} of {count} does not exist: they count from 0.")
        check_max_size(self.max_size)
        if not self.devices:
            raise InputError("No device was named.")
        if self.overwrite and count > 1:
            raise InputError("A shard cannot begin anew what other shards are working on.")
        if len(set(self.labellers)) < len(self.labellers):
            raise InputError(f"A labeller was named twice: {', '.join(self.labellers)}.")


@dataclass(frozen=True, kw_only=True)
class StoreSummary:
    """All labels of one labeller in one round."""

    path: Path
    labeller: str
    zoom: bool
    pairs: int  # labelled
    labels: int  # of them together
    failed: int  # pairs
    missing: int  # pairs of this video's plan that were never tried


@dataclass(kw_only=True)
class LabelReport:
    """What `label_video` did.

    Attributes:
        folder: of the video.
        plan: frames and pairs.
        written: frames written now.
        damaged, remarks: see ``FrameSource``.
        rounds: what was done now, by worker, labeller and round.
        stores: what is there, by labeller and round.
        deaths: workers that ended early.
        seconds: wall time.
    """

    folder: VideoFolder
    plan: Plan
    written: int = 0
    damaged: int = 0
    remarks: list[str] = field(default_factory=list)
    rounds: list[RoundReport] = field(default_factory=list)
    stores: list[StoreSummary] = field(default_factory=list)
    deaths: int = 0
    seconds: float = 0.0

    @property
    def missing(self) -> int:
        """Pairs that no worker has tried in some round; those of other shards."""
        return sum(store.missing for store in self.stores)

    def lines(self) -> Iterator[str]:
        """A summary for people."""
        for store in self.stores:
            mean = store.labels / store.pairs if store.pairs else 0
            yield (
                f"{store.labeller}{' zoom' if store.zoom else ''}: {store.pairs} pairs labelled, "
                f"{mean:.0f} labels each, {store.failed} failed"
                + (f", {store.missing} to do" if store.missing else "")
            )
        yield (
            f"{self.folder.root}: {len(self.plan.frames)} frames {self.plan.gap} apart, "
            f"{len(self.plan.pairs)} pairs at steps {', '.join(map(str, self.plan.steps))}; now "
            f"{sum(r.tried for r in self.rounds)} matched, "
            f"{sum(len(r.encoded) for r in self.rounds)} images encoded, {self.seconds:.0f} s"
        )
        yield from (f"{self.folder.root}: {remark}" for remark in self.remarks)


def label_video(
    source: VideoSource, out: str | os.PathLike[str], options: LabelOptions
) -> LabelReport:
    """Label one video: see `folder` for what is written.

    Args:
        source: the video.
        out: folder of all videos.
        options: see there.

    Returns:
        What was done and what is there. Pairs without labels are noted with the reason; they are
        not tried again unless ``retry_failed``.

    Raises:
        InputError: the video cannot be read or is too short, an unknown labeller, Ray asked for
            and not installed.
        WeightsError: weights of a labeller cannot be had.
        OutputError: what is there was made with other settings, cannot be written, or workers keep
            dying. What is finished is kept.
        LockedError: another run works on the video.
    """
    from gim_hloc.matchers import registry

    began = time.perf_counter()
    options = replace(options, labellers=_ordered(options))
    for name in options.labellers:
        registry.describe(name)  # before frames are written for hours
    folder = VideoFolder(Path(out) / source.id)
    with _locked(folder, options.shard):
        path = source.path or download(
            source.id,
            Path(out) / _DOWNLOADS,
            max_height=options.max_height,
            progress=options.progress,
        )
        video = open_source(path, fps=options.sequence_fps)
        info = describe(source, video, options)
        plan = make_plan(info.fps, info.frames, options.sampling)
        folder.write_info(info)
        report = LabelReport(folder=folder, plan=plan)
        pairs = _shard(plan.pairs, options.shard)
        report.written = _prepare_frames(folder, info, video, plan, pairs, options)
        report.damaged, report.remarks = video.damaged, video.remarks
        used = np.unique(pairs).tolist()
        records = [frame_record(folder.frames / _name(info, n), info.size) for n in used]
        masks = prepare_masks(records, folder.masks, options.masks, device=options.devices[0])
        if options.overwrite:
            for labeller in options.labellers:
                for zoom in (False, True):
                    begin_anew(folder.label_path(labeller, zoom))
        jobs = [
            _Job(
                root=folder.root,
                info=info,
                gap=plan.gap,
                steps=plan.steps,
                pairs=[(int(i), int(j)) for i, j in _shard(pairs, (k, len(options.devices)))],
                masks=masks,
                options=options,
                device=device,
            )
            for k, device in enumerate(options.devices)
        ]
        _run_jobs(jobs, options, report)
        report.stores = [_summary(folder, plan, *key) for key in _rounds(options)]
        if options.shard[1] == 1:
            for store in report.stores:
                with LabelStore.open(store.path) as labels:
                    if not store.missing and labels.unmerged:
                        labels.merge()
    report.seconds = time.perf_counter() - began
    return report


def describe(source: VideoSource, video: FrameSource, options: LabelOptions) -> VideoInfo:
    """What ``video.json`` will say."""
    return VideoInfo(
        id=source.id,
        source=source.address,
        digest=video.digest,
        size=reduced_size(video.size, options.max_size),
        fps=video.fps,
        frames=grid_length(video),
        duration=float(video.times[-1]),
        image_format=options.image_format,
        quality=options.quality,
        max_size=options.max_size,
    )


def _ordered(options: LabelOptions) -> tuple[str, ...]:
    """Labellers, the one that zoom rounds crop to first."""
    names = options.labellers or default_labellers()
    base = options.rounds.zoom_base or names[0]
    if options.zoom and base not in names:
        raise InputError(
            f"zoom_base is {base!r}, which is not among the labellers {', '.join(names)}."
        )
    return tuple(sorted(names, key=lambda name: name != base))


def _rounds(options: LabelOptions) -> list[tuple[str, bool]]:
    rounds = (False, True) if options.zoom else (False,)
    return [(name, zoom) for name in options.labellers for zoom in rounds]


def _shard(pairs: np.ndarray, shard: tuple[int, int]) -> np.ndarray:
    """Neighbours share frames, so that a shard is a run of them."""
    i, count = shard
    return pairs[len(pairs) * i // count : len(pairs) * (i + 1) // count]


def _name(info: VideoInfo, index: int) -> str:
    return f"{index:08d}.{info.image_format}"


@contextmanager
def _locked(folder: VideoFolder, shard: tuple[int, int]) -> Iterator[None]:
    """Hold the video, or one shard of it; a run on the whole waits for no shard to be at work."""
    from gim_hloc.store import OutputLock

    shards = folder.labels / ".shards"
    with ExitStack() as stack:
        if shard[1] > 1:
            _wait_for(folder.labels)
            stack.enter_context(OutputLock(shards / f"{shard[0]}-of-{shard[1]}"))
        else:
            stack.enter_context(OutputLock(folder.labels))
            for path in sorted(shards.glob("*-of-*")) if shards.is_dir() else ():
                try:
                    OutputLock(path).close()
                except LockedError:
                    raise LockedError(
                        f"Shard {path.name} of {folder.root} is at work; wait for it."
                    ) from None
        yield


def _wait_for(labels: Path) -> None:
    """Take the lock of the whole and give it back: shards do not begin under a run on the whole.

    Other shards may be doing the same at this moment.
    """
    from gim_hloc.store import OutputLock

    for attempt in range(_LOCK_ATTEMPTS):
        try:
            OutputLock(labels).close()
            return
        except LockedError:
            if attempt + 1 == _LOCK_ATTEMPTS:
                raise
            time.sleep(0.1)


def _prepare_frames(
    folder: VideoFolder,
    info: VideoInfo,
    video: FrameSource,
    plan: Plan,
    pairs: np.ndarray,
    options: LabelOptions,
) -> int:
    """Write the frames of some pairs, and the list of all frames."""
    try:
        folder.frames.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder.frames} cannot be made: {error}.") from error
    written = write_frames(
        video,
        np.unique(pairs),
        lambda n: folder.frames / _name(info, n),
        max_size=options.max_size,
        image_format=info.image_format,
        quality=info.quality,
        progress=options.progress,
    )
    there = {int(p.stem) for p in folder.frames.iterdir() if p.stem.isdigit()}
    listed = sorted(there | set(plan.frames.tolist()))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["frame", "position", "time_s"])
    for n, position in zip(listed, on_grid(video, listed).tolist(), strict=True):
        writer.writerow([n, position, f"{video.times[position]:.6f}"])
    write_atomic(folder.root / "frames.csv", text.getvalue())
    return written


def _summary(folder: VideoFolder, plan: Plan, labeller: str, zoom: bool) -> StoreSummary:
    path = folder.label_path(labeller, zoom)
    with LabelStore.open(path) as store:
        failures = {(i, j) for i, j, _ in store.failures()}
        missing = sum(
            not store.has(i, j) and (i, j) not in failures for i, j in plan.pairs.tolist()
        )
        return StoreSummary(
            path=path,
            labeller=labeller,
            zoom=zoom,
            pairs=len(store.pairs()),
            labels=int(store.counts().sum()),
            failed=len(failures),
            missing=missing,
        )


# ------------------------------------------------------------------------------------------ workers


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What one worker does; may be sent to another process or machine."""

    root: Path
    info: VideoInfo
    gap: int
    steps: tuple[int, ...]
    pairs: list[tuple[int, int]]
    masks: FrameMasks
    options: LabelOptions
    device: str


def _work(job: _Job, tick: Callable[[int], None] = lambda count: None) -> list[RoundReport]:
    """All rounds of one worker."""
    from gim_hloc.engine import default_workers, usable_cores

    folder, options = VideoFolder(job.root), job.options
    # A name of its own: an orphan of a killed run may still be writing to the old one.
    part = f"{options.shard[0]}-{options.shard[1]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    reports: list[RoundReport] = []
    base_key = (options.labellers[0], False)
    base: LabelStore | None = None
    for name in options.labellers:
        matcher = load_labeller(
            name, quality=options.rounds.quality, size=job.info.size, device=job.device
        )
        crowd = len(options.devices) if matcher.device.type == "cpu" else 1
        threads = max(1, min(default_workers(matcher.device, False), usable_cores() // crowd))
        for zoom in (False, True) if options.zoom else (False,):
            info = _store_info(job, name, zoom, matcher, base.info if zoom and base else None)
            path = folder.label_path(name, zoom)
            with LabelStore.open(path, "a", info=info, part=part) as store:
                if options.retry_failed:
                    store.forget_failures()
                labelling = LabelRound(
                    matcher,
                    store,
                    lambda n: frame_record(folder.frames / _name(job.info, n), job.info.size),
                    job.masks,
                    options.rounds,
                    base=base if zoom else None,
                    batch_size=options.batch_size,
                    workers=threads,
                    cache_gb=options.cache_gb,
                    tick=tick,
                )
                reports.append(labelling.run(job.pairs))
            if (name, zoom) == base_key:
                base = LabelStore.open(path)
        del matcher
    if base is not None:
        base.close()
    return reports


def _store_info(
    job: _Job, labeller: str, zoom: bool, matcher: Matcher, base: StoreInfo | None
) -> StoreInfo:
    options = job.options.rounds
    settings: dict[str, Any] = {
        "format": _FORMAT,
        "frames": job.info.settings,
        "encode": matcher.encode_settings(),
        "match": matcher.match_settings(),
        **job.masks.settings,
        "static_px": options.static_px,
        "fit": [options.fit_px, options.fit_confidence, options.fit_iterations],
        "min_labels": options.min_labels,
    }
    if base is not None:
        settings["zoom_box"] = zoom_box(labeller, job.info.size, options)
        settings["zoom_base"] = base.labeller
        # Which pairs were asked for decides no label.
        told = replace(base, steps=(), gap=0).to_json()
        settings["base_settings"] = hashlib.sha256(told.encode()).hexdigest()[:24]
    return StoreInfo(
        video=job.info.id,
        labeller=labeller,
        zoom=zoom,
        steps=job.steps,
        size=job.info.size,
        fps=job.info.fps,
        gap=job.gap,
        settings=settings,
    )


def _run_jobs(jobs: Sequence[_Job], options: LabelOptions, report: LabelReport) -> None:
    from tqdm import tqdm

    total = sum(len(job.pairs) for job in jobs) * len(_rounds(options))
    bar = tqdm(total=total, desc="labels", unit="pair", disable=None if options.progress else True)
    with bar:
        if options.backend == "ray":
            _run_ray(jobs, bar, report)
        elif len(jobs) == 1:
            report.rounds += _work(jobs[0], _quiet(bar.update))
        else:
            _run_processes(jobs, bar, report)


def _quiet(update: Callable[[int], Any]) -> Callable[[int], None]:
    def tick(count: int) -> None:
        update(count)

    return tick


def _run_ray(jobs: Sequence[_Job], bar: Any, report: LabelReport) -> None:
    """Run workers on Ray's cluster, which must see the same folders.

    Ray starts the task of a dead worker again, which goes on from what that one finished.

    Raises:
        InputError: Ray is not installed, or GPUs are asked for and the cluster has none.
        GimError: a worker's, or OutputError when workers keep dying.
    """
    try:
        import ray
    except ImportError:
        raise InputError('--ray needs Ray: pip install "ray"') from None
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if not gpus and any(job.device.startswith("cuda") for job in jobs):
        raise InputError("Ray's cluster has no GPU: give --devices cpu.")  # it would wait for ever
    counter = ray.remote(_Counter).options(num_cpus=0).remote()
    tasks = []
    for job in jobs:
        # Ray shows a worker only the GPUs that it was given, so that all of them call theirs
        # "cuda", and none where it was given none.
        cuda = job.device.startswith("cuda") or (job.device == "auto" and gpus > 0)
        far = replace(
            job,
            root=job.root.resolve(),
            masks=job.masks.resolved(),
            device="cuda" if cuda else job.device,
        )
        remote = ray.remote(_far_child).options(num_gpus=int(cuda), max_retries=_ATTEMPTS - 1)
        tasks.append(remote.remote(far, counter))
    left = list(tasks)
    try:
        while left:
            done, left = ray.wait(left, num_returns=1, timeout=0.5)
            bar.n = min(ray.get(counter.value.remote()), bar.total)
            bar.refresh()
            for task in done:
                result = ray.get(task)
                if isinstance(result, BaseException):
                    raise result
                report.rounds += result
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise OutputError(
            f"A worker on Ray ended early: {lines[-1].strip() if lines else type(error).__name__} "
            "What is finished is kept; the same command goes on from it."
        ) from error
    finally:
        for task in left:  # of a run that was stopped
            ray.cancel(task, force=True)
        ray.kill(counter)


class _Counter:
    """Pairs that all workers on Ray are through with."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, count: int) -> None:
        self._count += count

    def value(self) -> int:
        return self._count


def _far_child(job: _Job, counter: Any) -> Any:
    """What a worker on Ray gives: its reports, or the error that users are to read."""
    try:
        return _work(job, lambda count: counter.add.remote(count))
    except GimError as error:
        return error


def _run_processes(jobs: Sequence[_Job], bar: Any, report: LabelReport) -> None:
    """Run workers on this machine; those that die are started again on what is left.

    Raises:
        GimError: a worker's, or OutputError when workers keep dying.
    """
    left = list(jobs)
    for attempt in range(_ATTEMPTS):
        dead = _run_once(left, bar, report)
        if not dead:
            return
        report.deaths += len(dead)
        codes = ", ".join(f"{job.device} (exit code {code})" for job, code in dead)
        if attempt + 1 < _ATTEMPTS:
            logger.warning("Workers ended early: %s. They are started again.", codes)
        left = [job for job, _ in dead]
        bar.n, bar.total = 0, sum(len(job.pairs) for job in left) * len(_rounds(jobs[0].options))
    raise OutputError(
        f"Workers keep ending early: {codes}. -9 often means that memory ran out: take fewer "
        "workers or a smaller --max-size. What is finished is kept."
    )


def _run_once(jobs: Sequence[_Job], bar: Any, report: LabelReport) -> list[tuple[_Job, int | None]]:
    # Not forked: CUDA and the threads of PyTorch do not survive it.
    context = multiprocessing.get_context("spawn")
    count = context.Value("q", 0)
    started: list[tuple[_Job, Any, Any]] = []
    dead: list[tuple[_Job, int | None]] = []
    try:
        for job in jobs:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(job, count, sender), daemon=True)
            process.start()
            sender.close()
            started.append((job, process, receiver))
        waiting = list(started)
        while waiting:
            ready = multiprocessing.connection.wait([w[2] for w in waiting], timeout=0.3)
            bar.n = count.value
            bar.refresh()
            for item in [w for w in waiting if w[2] in ready]:
                job, process, receiver = item
                waiting.remove(item)
                try:
                    result = receiver.recv()
                except EOFError:
                    process.join()
                    dead.append((job, process.exitcode))
                    continue
                process.join()
                if isinstance(result, BaseException):
                    raise result
                report.rounds += result
    finally:
        for _, process, receiver in started:
            if process.is_alive():
                process.terminate()
            process.join()
            receiver.close()
    return dead


def _child(job: _Job, count: Any, sender: Any) -> None:
    import torch

    from gim_hloc.cli.common import configure_logging
    from gim_hloc.engine import usable_cores

    configure_logging()
    torch.set_num_threads(max(1, usable_cores() // len(job.options.devices)))
    parent = os.getppid()

    def tick(pairs: int) -> None:
        if os.getppid() != parent:
            sys.exit(1)  # the run was killed: its successor has other workers
        with count.get_lock():
            count.value += pairs

    try:
        result: Any = _work(job, tick)
    except GimError as error:
        result = error
    sender.send(result)
    sender.close()
