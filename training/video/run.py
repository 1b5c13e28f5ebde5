"""Label videos: frames, masks, rounds of labellers; resumed, in shards, by several workers.

All that is finished stays finished: frames are files that are complete or absent, labels are kept
pair by pair (see `store`). Repeating a run does what is missing and nothing else.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gim_hloc import matchers, workers
from gim_hloc.errors import GimError, InputError, OutputError
from gim_hloc.files import write_atomic
from gim_hloc.lock import FolderLock
from gim_hloc.matchers import Loader
from gim_hloc.training.video.folder import VideoFolder, VideoInfo
from gim_hloc.training.video.frames import grid_length, on_grid, write_frames
from gim_hloc.training.video.labels import (
    ERROR,
    Item,
    LabelTask,
    SettingsTask,
    crop_box,
    default_labellers,
    frame_record,
    labeller,
    zoom_box,
)
from gim_hloc.training.video.masks import prepare_masks
from gim_hloc.training.video.options import LabelOptions
from gim_hloc.training.video.sampling import Plan, make_plan
from gim_hloc.training.video.sources import VideoSource, download
from gim_hloc.training.video.store import LabelWriter, StoreInfo
from gim_hloc.videos import FrameSource, open_source, reduced_size

logger = logging.getLogger(__name__)

_FORMAT = 1  # part of the settings: raised when labels are made differently
_CHUNK = 256  # pairs that a worker gets at a time: neighbours, which share frames
_MOST_ERRORS = 20  # in a row, after which a round stops: a device that failed, a broken matcher
_DOWNLOADS = "downloads"


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One labeller in one round.

    Attributes:
        labeller, zoom: which.
        path: of the h5 file.
        tried: pairs, now.
        pairs: labelled ones that are there.
        labels: of them together.
        failed: pairs that were tried and have none.
    """

    labeller: str
    zoom: bool
    path: Path
    tried: int
    pairs: int
    labels: int
    failed: int

    def line(self) -> str:
        """One line for people."""
        mean = self.labels / self.pairs if self.pairs else 0
        return (
            f"{self.labeller}{' zoom' if self.zoom else ''}: {self.pairs} pairs labelled, "
            f"{mean:.0f} labels each, {self.failed} failed"
        )


@dataclass(kw_only=True)
class LabelReport:
    """What `label_video` did.

    Attributes:
        folder: of the video.
        plan: frames and pairs.
        written: frames written now.
        damaged, remarks: see ``FrameSource``.
        rounds: by labeller and round; of a shard, what that has.
        seconds: wall time.
    """

    folder: VideoFolder
    plan: Plan
    written: int = 0
    damaged: int = 0
    remarks: list[str] = field(default_factory=list)
    rounds: list[RoundReport] = field(default_factory=list)
    seconds: float = 0.0

    def lines(self) -> Iterator[str]:
        """A summary for people."""
        yield from (one.line() for one in self.rounds)
        yield (
            f"{self.folder.root}: {len(self.plan.frames)} frames {self.plan.gap} apart, "
            f"{len(self.plan.pairs)} pairs at steps {', '.join(map(str, self.plan.steps))}; now "
            f"{sum(one.tried for one in self.rounds)} matched, {self.seconds:.0f} s"
        )
        yield from (f"{self.folder.root}: {remark}" for remark in self.remarks)


def label_video(
    source: VideoSource,
    out: str | os.PathLike[str],
    options: LabelOptions,
    *,
    progress: bool = False,
) -> LabelReport:
    """Label one video: see `folder` for what is written.

    Args:
        source: the video.
        out: folder of all videos.
        options: see there.
        progress: show progress bars.

    Returns:
        What was done and what is there. Pairs without labels are noted with the reason; they are
        not tried again unless ``retry_failed``.

    Raises:
        InputError: the video cannot be read or is too short, an unknown labeller, Ray asked for
            and not installed.
        WeightsError: weights of a labeller cannot be had.
        OutputError: frames that are there were made with other settings, files cannot be written,
            or workers keep dying. What is finished is kept.
        LockedError: another run works on the video.
    """
    began = time.perf_counter()
    names = _ordered(options)
    for name in names:
        matchers.describe(name)  # before frames are written for hours
    i, count = options.part
    folder = VideoFolder(Path(out) / source.id)
    with FolderLock(folder.root, "run" if count == 1 else f"shard-{i}-of-{count}"):
        path = source.path or download(
            source.id, Path(out) / _DOWNLOADS, max_height=options.max_height, progress=progress
        )
        video = open_source(path, fps=options.sequence_fps)
        info = describe(source, video, options)
        plan = make_plan(info.fps, info.frames, options)
        folder.write_info(info)
        pairs = np.array(workers.shard(plan.pairs.tolist(), i, count), np.int64).reshape(-1, 2)
        report = LabelReport(folder=folder, plan=plan)
        report.written = _prepare_frames(folder, info, video, plan, pairs, options, progress)
        report.damaged, report.remarks = video.damaged, video.remarks
        rounds = _Rounds(folder, info, plan, pairs, options, progress)
        report.rounds = rounds.run(names)
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
        image_format=options.format,
        quality=options.jpeg_quality,
        max_size=options.max_size,
    )


def _ordered(options: LabelOptions) -> tuple[str, ...]:
    """Labellers, the one that zoom rounds crop to first."""
    names = options.labellers or default_labellers()
    base = options.zoom_base or names[0]
    if options.zoom and base not in names:
        raise InputError(
            f"zoom_base is {base!r}, which is not among the labellers {', '.join(names)}."
        )
    return tuple(sorted(names, key=lambda name: name != base))


def _name(info: VideoInfo, index: int) -> str:
    return f"{index:08d}.{info.image_format}"


def _prepare_frames(
    folder: VideoFolder,
    info: VideoInfo,
    video: FrameSource,
    plan: Plan,
    pairs: np.ndarray,
    options: LabelOptions,
    progress: bool,
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
        options,
        progress=progress,
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


class _Rounds:
    """The labelling rounds of one video, or of one shard of it."""

    def __init__(
        self,
        folder: VideoFolder,
        info: VideoInfo,
        plan: Plan,
        pairs: np.ndarray,
        options: LabelOptions,
        progress: bool,
    ) -> None:
        self.folder, self.info, self.plan = folder, info, plan
        self.options, self.progress = options, progress
        self.pairs = [(int(i), int(j)) for i, j in pairs]
        self.where = options.where
        device = (*self.where.devices, options.device)[0]
        used = np.unique(pairs).tolist()
        records = [frame_record(folder.frames / _name(info, n), info.size) for n in used]
        self.masks = prepare_masks(records, folder.masks, options, device=device).resolved()

    def run(self, names: Sequence[str]) -> list[RoundReport]:
        """Label by all labellers; zoom rounds crop to what the first one found."""
        reports = []
        with contextlib.ExitStack() as stack:
            base: LabelWriter | None = None
            for asked in names:
                found: dict[str, dict[str, Any]] = {}
                loader = labeller(asked, self.options.quality, self.info.size)
                name = loader.entry.info.name
                task = SettingsTask(loader=loader, options=self.options)
                workers.run(task, [name], self.where, found.__setitem__)
                plain = stack.enter_context(self._open(name, found[name]))
                reports.append(self._label(plain, loader))
                base = base or plain
                if self.options.zoom:
                    with self._open(name, found[name], base) as zoomed:
                        reports.append(self._label(zoomed, loader, base))
        return reports

    def _open(
        self, labeller: str, settings: dict[str, Any], base: LabelWriter | None = None
    ) -> LabelWriter:
        settings = {
            "format": _FORMAT,
            "frames": self.info.settings,
            **settings,
            **self.masks.settings,
        }
        if base is not None:
            # Which pairs were asked for decides no label.
            told = replace(base.info, steps=(), gap=0).to_json()
            settings |= {
                "zoom_box": zoom_box(labeller, self.info.size, self.options),
                "zoom_base": base.info.labeller,
                "base_settings": hashlib.sha256(told.encode()).hexdigest()[:24],
            }
        info = StoreInfo(
            video=self.info.id,
            labeller=labeller,
            zoom=base is not None,
            steps=self.plan.steps,
            size=self.info.size,
            fps=self.info.fps,
            gap=self.plan.gap,
            settings=settings,
        )
        return LabelWriter(
            self.folder.label_path(labeller, info.zoom),
            info,
            shard=self.options.part,
            overwrite=self.options.overwrite,
        )

    def _label(
        self, writer: LabelWriter, loader: Loader, base: LabelWriter | None = None
    ) -> RoundReport:
        """Label pairs that are neither labelled nor noted as failed; errors are tried again."""
        again = "" if self.options.retry_failed else ERROR
        todo = [
            pair
            for pair in self.pairs
            if pair not in writer.counts and again in writer.failures.get(pair, again)
        ]
        about = writer.info
        bar = tqdm(
            total=len(self.pairs),
            initial=len(self.pairs) - len(todo),
            desc=about.name,
            unit="pair",
            disable=not self.progress,
        )
        errors = 0

        def done(item: Item, result: np.ndarray | str) -> None:
            nonlocal errors
            if isinstance(result, str):
                writer.fail(*item[:2], result)
                errors = errors + 1 if ERROR in result else 0
                if ERROR in result:
                    logger.warning("%s, frames %d and %d: %s", about.name, *item[:2], result)
            else:
                writer.put(*item[:2], result)
                errors = 0
            bar.update()
            if errors >= _MOST_ERRORS:
                raise GimError(
                    f"{errors} pairs in a row cannot be labelled with {about.labeller}. The last: "
                    f"{result}. The same command tries again."
                )

        def items() -> Iterator[Item]:
            for pair in todo:
                if base is None:
                    yield pair
                elif pair in base.counts:
                    labels = base.read(*pair)
                    crop0, crop1 = (crop_box(labels[:, k : k + 2], about.size) for k in (0, 2))
                    yield (*pair, crop0, crop1)
                else:
                    why = base.failures.get(pair, "not tried")
                    done(pair, f"no plain labels of {base.info.labeller}: {why}")

        task = LabelTask(
            loader=loader,
            frames=self.folder.frames.resolve(),
            format=self.info.image_format,
            size=self.info.size,
            masks=self.masks,
            options=self.options,
        )
        with bar:
            if todo:
                chunk = max(1, min(_CHUNK, -(-len(todo) // self.where.count)))
                workers.run(task, items(), self.where, done, chunk=chunk)
        if self.options.part[1] == 1:
            writer.write()
        return RoundReport(
            labeller=about.labeller,
            zoom=about.zoom,
            path=writer.path,
            tried=len(todo),
            pairs=len(writer.counts),
            labels=sum(writer.counts.values()),
            failed=len(writer.failures),
        )
