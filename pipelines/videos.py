"""Videos among the images: some of their frames are images of the run, in OUTPUT/images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from gim_hloc import images as image_module
from gim_hloc.errors import InputError
from gim_hloc.images import SUFFIXES, ImageRecord, ImageSet, RejectedImage
from gim_hloc.options import VideoOptions, to_mapping
from gim_hloc.page import plural
from gim_hloc.picks import PickReport, choose_frames, frames_csv
from gim_hloc.pipelines.run import RunFolder, Step
from gim_hloc.store import digest
from gim_hloc.videos import VIDEO_SUFFIXES, FrameSource, VideoReader

logger = logging.getLogger(__name__)

FOLDER = "images"  # of OUTPUT


@dataclass(frozen=True, kw_only=True)
class Video:
    """One video.

    Attributes:
        name: of its file, relative to the folder of images.
        prefix: of the names of its frames: ``walk/``, or ``walk_`` where there is no other image.
        reader: gives its frames.
    """

    name: str
    prefix: str
    reader: FrameSource

    @property
    def step(self) -> str:
        """Name of the step that makes its frames."""
        return f"frames {self.reader.digest}"


class Videos:
    """The videos of a run, in the order of their names.

    Args:
        source: a video, or the folder of the images.
        photographs: the images in that folder.
        options: which frames are taken.
        exclude: folders that are not searched.
        show: whether to draw progress bars.

    Raises:
        InputError: the source is a file that is no video.
    """

    def __init__(
        self,
        source: Path,
        photographs: ImageSet,
        options: VideoOptions,
        *,
        exclude: Sequence[Path] = (),
        show: bool = False,
    ) -> None:
        self.source, self.photographs, self.options, self.show = source, photographs, options, show
        self.found: list[Video] = []
        self.rejected: list[RejectedImage] = []
        self.facts: dict[str, dict[str, Any]] = {}  # by step: what became of the videos
        if source.is_file():
            if source.suffix.lower() in SUFFIXES:
                raise InputError(f"{source} is an image: give the folder of all images.")
            reader = VideoReader(source)
            self.found.append(Video(name=source.name, prefix=f"{source.stem}_", reader=reader))
        else:
            self._search(exclude)

    def _search(self, exclude: Sequence[Path]) -> None:
        pictures = [*self.photographs.names, *(image.name for image in self.photographs.rejected)]
        stills = {str(PurePosixPath(name).with_suffix("")): name for name in pictures}
        taken = {str(folder) for name in pictures for folder in PurePosixPath(name).parents}
        readers: dict[str, str] = {}
        for name in sorted(image_module.list_files(self.source, VIDEO_SUFFIXES, exclude)):
            folder = str(PurePosixPath(name).with_suffix(""))
            if folder in stills:
                logger.warning(
                    "%s is passed over as a moving version of %s: rename it if it is not.",
                    name,
                    stills[folder],
                )
                continue
            if problem := image_module.name_problem(name):
                self._reject(name, "unreadable", problem)
                continue
            try:
                reader = VideoReader(self.source / name)
            except InputError as error:
                self._reject(name, "unreadable", str(error))
                continue
            twin = readers.setdefault(reader.digest, name)
            if twin != name:
                self._reject(name, "duplicate", f"same frames as {twin}")
                continue
            if folder in taken:
                folder = name.replace(".", "_")
            taken.add(folder)
            self.found.append(Video(name=name, prefix=f"{folder}/", reader=reader))

    def _reject(self, name: str, reason: Any, detail: str) -> None:
        name = image_module.printable(name)
        self.rejected.append(RejectedImage(name=name, reason=reason, detail=detail))

    # ---------------------------------------------------------------------------------- frames

    def known(self, folder: RunFolder) -> bool:
        """Whether an earlier run in the folder worked on one of them."""
        return any(video.step in folder.steps for video in self.found)

    def pick(self, folder: RunFolder, *, again: bool) -> None:
        """Write the frames that are not there yet to OUTPUT/images.

        Raises:
            InputError: this is a part of an array job, and frames are not there yet.
        """
        todo = []
        for video in self.found:
            facts = None if again else folder.facts(video.step, self._key(video))
            if facts is None:
                todo.append(video)
            else:
                self.facts[video.step] = facts
        if todo and folder.part is not None:
            raise InputError(
                f"The frames of {todo[0].name} are not there yet: first the command without --step "
                "and --shard, with --stop-after frames."
            )
        if todo:

            def make() -> None:
                for video in todo:
                    with folder.making(video.step, self._key(video), large=True) as made:
                        made.facts = self._write(video, made.path / FOLDER)
                    self.facts[video.step] = made.facts

            with folder:
                folder.go([Step("frames", make)])

    def write(self, root: Path) -> None:
        """Write the frames to a folder that is nobody's."""
        for video in self.found:
            self.facts[video.step] = self._write(video, root)

    def _key(self, video: Video) -> str:
        return digest([video.prefix, to_mapping(self.options)])

    def _write(self, video: Video, root: Path) -> dict[str, Any]:
        def path_of(index: int) -> Path:
            return root / f"{video.prefix}{index:06d}.{self.options.format}"

        report, folder = PickReport(), path_of(0).parent
        folder.mkdir(parents=True, exist_ok=True)
        chosen = choose_frames(video.reader, self.options, path_of, report, progress=self.show)
        for picked, content in chosen:
            picked.path.write_bytes(content)
        (folder / "frames.csv").write_text(frames_csv(report.frames))
        remarks = list(video.reader.remarks)
        if report.damaged:
            remarks.append(f"It is damaged in {plural(report.damaged, 'place')}.")
        return {
            "frames": [str(p.path.relative_to(root).as_posix()) for p in report.frames],
            "buckets": report.buckets,
            "still": report.still,
            "remarks": remarks,
        }

    def drop_others(self, folder: RunFolder, *steps: str) -> None:
        """Remove what steps of the videos that are here no more made, but for other ``steps``."""
        ours = {*(video.step for video in self.found), *steps}
        stale = [name for name in folder.steps if name.startswith("frames ") and name not in ours]
        folder.drop(*stale)

    # ---------------------------------------------------------------------------------- images

    def images(self, root: Path, *, min_size: int, known: dict[str, ImageRecord]) -> ImageSet:
        """Photographs and frames together.

        Args:
            root: folder of the frames.
            min_size: see ``images.scan``.
            known: see ``images.scan``.

        Raises:
            InputError: there is one image at most.
        """
        video_of = {
            name: video.name for video in self.found for name in self.facts[video.step]["frames"]
        }
        if len(self.photographs) + len(video_of) < 2:
            raise InputError(self._too_few(len(video_of)))
        frames = image_module.scan(
            root, names=list(video_of), min_size=min_size, known=known, progress=self.show
        )
        records = [replace(record, video=video_of[record.name]) for record in frames]
        images = sorted([*self.photographs, *records], key=lambda record: record.name)
        rejected = [*self.photographs.rejected, *frames.rejected, *self.rejected]
        rejected.sort(key=lambda image: image.name)
        return ImageSet(root=root, images=tuple(images), rejected=tuple(rejected))

    def _too_few(self, frames: int) -> str:
        lengths = [float(video.reader.times[-1]) for video in self.found]
        buckets = sum(self.facts[video.step]["buckets"] for video in self.found)
        still = sum(self.facts[video.step]["still"] for video in self.found)
        return (
            f"{self.source} gives {plural(frames, 'image')}; 2 are needed. It lasts "
            f"{sum(lengths):.1f} s, {plural(buckets, 'time bucket')} (--video.fps makes more); "
            f"{still} of them show no motion (a camera must move; --video.min-motion 0 takes all)."
        )

    def notes(self) -> list[str]:
        """What became of each, for users."""
        found = []
        for video in self.found:
            facts = self.facts[video.step]
            said = f"{video.name}: {len(facts['frames'])} of {len(video.reader.times)} frames used"
            if facts["still"]:
                said += f", {facts['still']} of {facts['buckets']} time buckets show no motion"
            found.append(" ".join([f"{said}.", *facts["remarks"]]))
        return found


__all__ = ["FOLDER", "Video", "Videos"]
