"""What a reconstruction works on, and everything that can be wrong with it before the long work.

Options, images, masks, known poses, cameras, the matcher with its linker, and the settings that
decide what of an earlier run is reused.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from gim_hloc import colmap, engine, matchers
from gim_hloc import images as image_module
from gim_hloc import poses as pose_module
from gim_hloc.clock import Stopwatch, timed
from gim_hloc.colmap.export import FORMATS
from gim_hloc.errors import InputError, some
from gim_hloc.masks import MaskFolder
from gim_hloc.options import PoseUse, Quality, replace, to_mapping
from gim_hloc.page import plural
from gim_hloc.pairs.files import read_pairs
from gim_hloc.pairs.retrieval import Lazy
from gim_hloc.pairs.select import Selection, plan, select
from gim_hloc.pipelines.exports import reference
from gim_hloc.pipelines.extension import Extension, gather
from gim_hloc.pipelines.imported import ImportedMatcher
from gim_hloc.pipelines.matching import Photographs
from gim_hloc.pipelines.methods import (
    CASCADES,
    Method,
    choose_matcher,
    imported_method,
    load_method,
)
from gim_hloc.pipelines.options import ReconstructOptions
from gim_hloc.pipelines.outcome import versions
from gim_hloc.pipelines.panoramas import LIST as PANORAMAS
from gim_hloc.pipelines.panoramas import NUM_VIEWS, Panoramas, rigs_of_views
from gim_hloc.pipelines.run import (
    MODEL_FILES,
    RunFolder,
    keep_scan,
    part_of,
    progress_bar,
    read_state,
    refuse_other_images,
    scanned,
)
from gim_hloc.pipelines.videos import FOLDER as FRAMES
from gim_hloc.pipelines.videos import Videos
from gim_hloc.poses import KnownPoses, radius
from gim_hloc.schedule import encoding_bytes
from gim_hloc.store import digest, pair_keys
from gim_hloc.surveys import Fix, read_positions

if TYPE_CHECKING:
    from gim_hloc.images import ImageRecord, ImageSet

logger = logging.getLogger(__name__)

Pair = tuple[str, str]

_GPS_STDDEV_M = 5.0  # of phones and drones, and of heights more: COLMAP's loss is robust


class Inputs:
    """Of one run.

    Args:
        images: folder of images and videos, or a video.
        output: folder of the run.
        options: all settings.
        show: whether to draw progress bars.

    Raises:
        InputError: something of it cannot be used, by name.
        OutputError: the folder holds files that no run made, or another image set.
    """

    def __init__(
        self, images: Path, output: Path, options: ReconstructOptions, *, show: bool
    ) -> None:
        self.source, self.output, self.options, self.show = images, output, options, show
        self.root = images  # of the images' names
        self.part = part_of(options.step, options.shard)
        self.base: Extension | None = None  # the run whose model is extended
        self.added: list[str] = []  # images that are new to it
        self.known: KnownPoses | None = None
        self.fixes: dict[str, Fix] = {}  # GPS positions that known centres come from
        self._others: dict[tuple[str, Quality], Method] = {}
        self._check_options()
        self._check_folders()
        self._choose_matcher()
        self._scan()
        self._read_poses()
        self._assign_cameras()
        self._load_matchers()
        self._prepare_keys()
        self.folder.about = {
            "images": str(self.root.resolve()),
            "options": to_mapping(self.options),
            "matcher": to_mapping(self.matcher.options),
            "weights": dict(self.matcher.weights_hashes),
            "versions": versions(),
        }

    def _check_options(self) -> None:
        """Options that contradict each other."""
        options = self.options
        given = [name for name in ("features", "matches") if getattr(options, name) is not None]
        if len(given) == 1:
            other = "matches" if given[0] == "features" else "features"
            raise InputError(f"--{given[0]} needs --{other}: both are taken from hloc, or neither.")
        if given and options.pairs in ("auto", "exhaustive", "sequential", "retrieval", "spatial"):
            raise InputError(
                "--features and --matches need the pair list that the matches were made for: "
                "--pairs FILE."
            )
        if given and options.dry_run:
            raise InputError("--dry-run estimates matching, and --features leaves none to be done.")
        if options.extend is not None and (options.model is not None or given):
            raise InputError("--extend goes without --model, --features and --matches.")
        known = options.model is not None or options.extend is not None
        if options.poses == "refine" and not known:
            raise InputError(f"--poses {options.poses} needs known poses: --model POSES.")
        if options.poses == "prior":
            if options.extend is not None:
                raise InputError("--extend keeps the poses (--poses fixed) or moves them (refine).")
            if options.mapper not in ("incremental", "auto"):
                raise InputError("--poses prior works with COLMAP's incremental mapper only.")
        reference(options)
        if self.part is not None and (given or options.extend is not None):
            raise InputError("--step goes without --features, --matches and --extend.")

    def _check_folders(self) -> None:
        if not self.root.exists():
            raise InputError(f"There is no image folder or video {self.root}.")
        output, root = self.output.resolve(), self.root.resolve()
        if output == root:
            raise InputError(f"The output folder must not be the image folder ({self.root}).")
        if self.options.extend is not None:
            if output == self.options.extend.resolve():
                raise InputError(
                    f"--extend {self.options.extend} is not changed: give another folder for "
                    "OUTPUT."
                )
            self.base = Extension(self.options.extend)
            self.options = self.base.options(self.options)
        self.folder = RunFolder(
            self.output,
            "reconstruct",
            makes=[
                *("pairs.txt", "database.db"),
                *(f"sparse/[0-9]*/{name}" for name in MODEL_FILES),
                *("sparse/[0-9]*/cameras.txt", "sparse/[0-9]*/images.txt"),
                f"sparse/[0-9]*/{PANORAMAS}",
                *(
                    f"export/[0-9]*/{name}"
                    for kind in self.options.export
                    for name in FORMATS[kind].files
                ),
                *(["dense/**/*"] if self.options.dense else []),
            ],
            writes=[
                *("features.h5", "matches.h5", "anchors.h5", "raw_matches.h5"),
                *("features.cache", "matches.cache", "anchors.cache", "raw_matches.cache"),
                *("database.cache", "depth.cache", "report.html", "report.json"),
            ],
            overwrite=self.options.overwrite,
            part=self.part,
        )

    def _choose_matcher(self) -> None:
        """What ``--matcher auto`` stands for; a run that goes on keeps what it began with."""
        options = self.options
        if options.matcher != "auto":
            return
        before = (read_state(self.output, tell=False) or {}).get("options", {})
        name = choose_matcher(options.quality, options.where)
        if before.get("quality") == options.quality and not options.overwrite:
            name = before.get("matcher") or name
            matchers.refuse_code(name, f"{self.output / 'run.yaml'}", "--matcher")
        self.options = replace(options, {"matcher": name})

    def _scan(self) -> None:
        options = self.options
        with timed(self.folder.timings, "scan"):
            self.image_set = self._photographs()
        self._read_videos()
        self._take_panoramas_apart()
        with timed(self.folder.timings, "scan"):
            if self.base is not None:
                image_module.require_usable(self.image_set, 1)
                self.image_set, self.added = self.base.images(self.image_set)
            image_module.require_usable(self.image_set)
        for rejected in self.image_set.rejected:
            logger.warning("Left out: %s (%s: %s)", rejected.name, rejected.reason, rejected.detail)
        if not self.videos.found and not self.panoramas.found:
            refuse_other_images(self.image_set, self.output, overwrite=options.overwrite)
        self._take_images()

    def _photographs(self) -> ImageSet:
        if not self.root.is_dir():
            return image_module.ImageSet(root=self.root, images=())
        return image_module.scan(
            self.root,
            min_size=self.options.min_image_size,
            exclude=self._not_searched(),
            known=scanned(self.output),
            progress=self.show,
        )

    def _not_searched(self) -> list[Path]:
        folders = (self.output, self.options.masks, self.options.extend)
        return [folder for folder in folders if folder is not None]

    def _read_videos(self) -> None:
        """Add frames of the videos to the images."""
        options = self.options
        self.videos = Videos(
            self.source,
            self.image_set,
            options.video,
            exclude=self._not_searched(),
            show=self.show,
        )
        if not self.videos.found:
            rejected = (*self.image_set.rejected, *self.videos.rejected)
            self.image_set = dataclasses.replace(self.image_set, rejected=rejected)
            return
        self._make_root(known=self.videos.known(self.folder))
        if options.dry_run:
            self.videos.write(self.root)
        else:
            self.videos.pick(self.folder, again=options.again("frames") or options.overwrite)
        self.image_set = self.videos.images(
            self.root, min_size=options.min_image_size, known=scanned(self.output)
        )
        for note in self.videos.notes():
            logger.info("%s", note)
            self.folder.notes.append(note)

    def _make_root(self, *, known: bool) -> None:
        """Take OUTPUT/images, or for a dry run a folder of no one, for the images' root."""
        root = self.output / FRAMES
        if root.resolve() in (self.source.resolve(), *self.source.resolve().parents):
            raise InputError(
                f"Frames of videos and views of panoramas go to {root}, where {self.source} is: "
                "choose another output folder."
            )
        if not known:
            refuse_other_images(self.image_set, self.output, overwrite=self.options.overwrite)
        if self.options.dry_run:
            self._scratch = TemporaryDirectory(prefix="gim-hloc-")
            root = Path(self._scratch.name)
        self.root = root

    def _take_panoramas_apart(self) -> None:
        """Put views in the place of panoramas."""
        options = self.options
        self.panoramas = Panoramas(self.image_set, options.cameras.panorama)
        if not self.panoramas.found:
            return
        if not self.videos.found:
            self._make_root(known=not self.folder.steps.keys().isdisjoint(self.panoramas.steps))
        if options.dry_run:
            self.panoramas.write(self.root)
        else:
            again = options.again("frames") or options.overwrite
            self.panoramas.render(self.folder, again=again)
        self.image_set = self.panoramas.images(self.root, known=scanned(self.output))
        self.folder.notes.append(
            f"{plural(len(self.panoramas.found), 'equirectangular panorama')} taken apart into "
            f"{NUM_VIEWS} views each, a rig; poses of the panoramas: sparse/N/{PANORAMAS}."
        )
        logger.info("%s", self.folder.notes[-1])

    def _take_images(self) -> None:
        self.records = {record.name: record for record in self.image_set.images}
        self.names = list(self.records)
        masks = None
        if self.options.masks is not None:
            masks = MaskFolder(
                self.options.masks, erode_px=self.options.mask_erode, image_root=self.source
            )
        self.photographs = Photographs(self.records, masks)

    def _read_poses(self) -> None:
        """Read known poses and say which images have none."""
        self.pair_model = self.options.pair.model
        if self.base is not None:
            self.known = self.base.poses(
                list(self.records.values()), intrinsics=self.options.cameras.intrinsics
            )
            logger.info("%d new images for a model of %d", len(self.added), len(self.known.poses))
            self.pair_model = self.pair_model or self.base.map.model_folder
            return
        path = self.options.model
        if path is None:
            if self.options.poses == "prior":
                self._read_gps()
            return
        self.known = pose_module.read_poses(
            path, self.names, {name: record.size for name, record in self.records.items()}
        )
        self.folder.notes += self.known.notes
        logger.info("Known poses: %d of %d images", len(self.known.poses), len(self.names))
        for note in self.known.notes:
            logger.info("%s", note)
        missing = [name for name in self.names if name not in self.known.poses]
        if missing and self.options.missing_poses == "leave-out":
            self._leave_out(missing, f"no pose in {path}")
        elif missing and self.options.poses != "prior":
            self.folder.note(
                f"{len(missing)} images have no pose in {path} and are registered by the mapper "
                f"afterwards: {some(missing)}."
            )
        elif missing:
            self.folder.note(f"{len(missing)} images have no pose in {path}: {some(missing)}.")
        if len(self.known.poses) < 2:
            raise InputError(f"{path} has a pose of one image only; two are needed.")
        if not radius(self.known.centres().values()) > 0:
            raise InputError(f"{path}: all cameras are in one place; nothing can be triangulated.")
        if self.pair_model is None and path.is_dir() and not (path / "transforms.json").is_file():
            self.pair_model = path

    def _read_gps(self) -> None:
        """GPS positions as known centres."""
        source = self.options.gps or "exif"
        self.fixes = (
            {n: r.exif.gps for n, r in self.records.items() if r.exif.gps is not None}
            if source == "exif"
            else read_positions(Path(source), self.names)
        )
        places = colmap.positions_enu(self.fixes)
        if len(places) < 3:
            raise InputError(
                "--poses prior without --model takes GPS positions with heights, and "
                f"{len(places)} images have one; three are needed: --gps FILE, or --model POSES."
            )
        logger.info("GPS positions: %d of %d images", len(places), len(self.names))
        self.known = KnownPoses(
            poses={name: (np.eye(3), -place) for name, place in places.items()},
            cameras={},
            source=source,
        )

    def turned_records(self) -> dict[str, ImageRecord]:
        """Images with the orientation in which they were matched in the place of a wrong one."""
        turns = self.photographs.turns
        return {n: image_module.turned(r, turns.get(n, 0)) for n, r in self.records.items()}

    def _leave_out(self, names: Sequence[str], detail: str) -> None:
        gone = set(names)
        rejected = [
            image_module.RejectedImage(name=name, reason="no_pose", detail=detail) for name in names
        ]
        self.image_set = image_module.ImageSet(
            root=self.image_set.root,
            images=tuple(r for r in self.image_set.images if r.name not in gone),
            rejected=(*self.image_set.rejected, *rejected),
        )
        self.folder.note(f"{len(names)} images are left out ({detail}): {some(names)}.")
        image_module.require_usable(self.image_set)
        self._take_images()

    def poses_if(self, *uses: PoseUse) -> dict[str, Any] | None:
        """Known poses when they are used in one of these ways."""
        if self.known is None or self.options.poses not in uses:
            return None
        return {name: pose for name, pose in self.known.poses.items() if name in self.records}

    def poses_key(self) -> Any:
        """What stands for the known poses in the keys of steps."""
        if self.known is None:
            return None
        listed = {
            name: [np.asarray(part).tolist() for part in pose]
            for name, pose in sorted(self.known.poses.items())
        }
        return digest([self.options.poses, self.prior_stddev(), listed])

    def prior_stddev(self) -> float:
        """Standard deviation of known camera centres, in their unit."""
        if self.options.prior_stddev is not None or self.known is None:
            return self.options.prior_stddev or 1.0
        if self.fixes:
            return _GPS_STDDEV_M
        return 0.01 * radius(self.known.centres().values())

    def _assign_cameras(self) -> None:
        if self.photographs.masks is not None:
            for warning in self.photographs.masks.check(self.names):
                self.folder.note(warning)
        colmap.camera_param_count(self.options.cameras.camera_model)  # an unknown name is an error
        known = None
        if self.known is not None and (
            self.options.cameras.intrinsics is None or self.base is not None
        ):
            known = self.known.cameras
        self.cameras, notes = colmap.assign_cameras(
            list(self.records.values()), self.options.cameras, known, rigs_of_views(self.names)
        )
        guessed = [spec for spec in self.cameras if not spec.given]
        if self.known is not None and guessed and self.options.poses == "fixed":
            notes.append(
                "The poses are known but not the intrinsics, which are guessed"
                + (" from EXIF" if all(spec.prior for spec in guessed) else "")
                + f" for {sum(len(spec.names) for spec in guessed)} images and not refined with "
                "fixed poses: give --intrinsics, or --poses refine."
            )
        for note in notes:
            self.folder.note(note)

    def _load_matchers(self) -> None:
        """The matcher, its linker, and the detector whose keypoints are the first anchors."""
        options = self.options
        self.pair_options = dataclasses.replace(
            options.pair,
            mode=options.pairs if options.pairs != "auto" else options.pair.mode,
            seed=options.seed,
            model=self.pair_model,
        )
        self.frames = [name for name in self.names if self.records[name].video is not None]
        self.plan = plan(self.pair_options, self.names, self.frames)
        self.where = options.where
        device = self.where.devices[0] if self.where.devices else options.device
        self.imported: ImportedMatcher | None = None
        if options.features is not None and options.matches is not None:
            self.imported = ImportedMatcher(options.features, options.matches)
            self.method = imported_method(options, self.imported)
        else:
            self.method = load_method(options, self.levels[0], options.quality, device)
        self.folder.notes += self.method.notes
        self.matcher, self.linker = self.method.matcher, self.method.linker
        self.detector = self.method.detector
        if options.refine_warps and not self.matcher.info.has_warps:
            raise InputError(
                f"--refine-warps needs a dense matcher; {self.matcher.info.name} has no warps."
            )
        self.threads = options.threads or engine.default_workers(
            self.matcher.device, options.deterministic or bool(self.where.devices)
        )
        self.batch = options.batch_size or (16 if self.matcher.device.type != "cpu" else 1)
        logger.info(
            "%d images, %d camera%s, matcher %s (%s) on %s",
            len(self.names),
            len(self.cameras),
            "" if len(self.cameras) == 1 else "s",
            ", then ".join([self.matcher.info.name, *self.levels[1:]]),
            options.quality,
            ", ".join(self.where.devices) or self.matcher.device,
        )
        logger.info("Pairs: %s (%s)", self.plan.mode, self.plan.why)

    def _prepare_keys(self) -> None:
        """The pairs' names in h5 files; and what an extended model rests on must be as it was."""
        keys = pair_keys(self.names)
        escaped = [name for name in self.names if keys[name] != name.replace("/", "-")]
        if escaped:
            self.folder.notes.append(
                "hloc's key of a pair writes / as -, which makes some of your names collide; "
                f"those pairs are stored under escaped keys that hloc cannot read ({escaped[0]})."
            )
        self.pair_key = lambda name: "/".join(keys[n] for n in name.split("\t"))
        if self.base is not None:
            stored = self.base.map.sources
            self.photographs.turns.update(self.base.map.turns)
            changed = [
                name
                for name in stored
                if name in self.records and not self.photographs.is_source(name, stored[name])
            ]
            if changed:
                raise InputError(
                    f"{len(changed)} images of the map (or their masks) have changed since it was "
                    f"made: {some(changed)}. Reconstruct anew."
                )

    def estimate(self) -> dict[str, Any]:
        """Time two images and one pair, and tell what the whole will take."""
        two = self.names[:2]
        watch = Stopwatch()
        encodings = dict(
            engine.encode(
                self.matcher, two, lambda n: self.photographs.read(n, self.matcher.image_options)
            )
        )
        per_image = watch.seconds / 2
        watch = Stopwatch()
        self.matcher.match_batch([(encodings[two[0]], encodings[two[1]])])
        per_pair = watch.seconds
        pairs, exact = self._expected_pairs()
        # Features; matches of a third of the keypoints, raw and verified; and the cache's copy.
        size = (
            max(map(encoding_bytes, encodings.values())) if self.matcher.info.has_keypoints else 0
        )
        disk = 2.0 * len(self.names) * size + pairs * 40_000
        seconds = per_image * len(self.names) + per_pair * pairs
        logger.info(
            "Estimate: %s%d pairs; encoding %.2f s an image, matching %.2f s a pair, about %s until"
            " mapping; disk %.0f MB",
            "" if exact else "at most ",
            pairs,
            per_image,
            per_pair,
            _duration(seconds),
            disk / 1e6,
        )
        return {
            "images": len(self.names),
            "pairs": pairs,
            "pairs_exact": exact,
            "seconds_per_image": per_image,
            "seconds_per_pair": per_pair,
            "seconds": seconds,
            "disk_bytes": disk,
        }

    def _expected_pairs(self) -> tuple[int, bool]:
        """Number of pairs, and whether it is exact rather than an upper bound."""
        count = len(self.names)
        if not self.plan.needs_descriptors:
            return len(self.select_pairs().pairs), True
        bound = count * self.plan.neighbours
        if "sequential" in self.plan.components:
            bound += count * self.pair_options.window * (2 if self.pair_options.quadratic else 1)
        return min(count * (count - 1) // 2, bound), False

    def select_pairs(self, local_descriptors: Callable[[], Lazy] | None = None) -> Selection:
        """The pairs to be matched, by the descriptors of all images where the plan needs them."""
        selection = select(
            self.pair_options,
            self.names,
            local_descriptors=local_descriptors,
            gps={name: record.exif.gps for name, record in self.records.items()},
            load_image=self.photographs.read,
            left_out=[rejected.name for rejected in self.image_set.rejected],
            frames=self.frames,
            adaptive=self.adaptive,
        )
        if self.base is not None:
            selection = dataclasses.replace(selection, pairs=self._extended(selection.pairs))
        return selection

    def _extended(self, chosen: Sequence[Pair]) -> list[Pair]:
        """The map's pairs, and of the chosen ones those with a new image."""
        old: list[Pair] = []
        if self.base is not None and (self.base.folder / "pairs.txt").is_file():
            left_out = [rejected.name for rejected in self.image_set.rejected]
            old = read_pairs(self.base.folder / "pairs.txt", self.names, skip=left_out)
        added = set(self.added)
        return sorted({*old, *(p for p in chosen if p[0] in added or p[1] in added)})

    def open_folder(self) -> None:
        """Keep the scan, and put what an extension starts from in its place."""
        if self.part is None:
            keep_scan(self.folder, self.image_set)
            self.videos.drop_others(self.folder, *self.panoramas.steps)
        extends = self.base is not None and self.base.map.images != self.root
        made = self.root == self.output / FRAMES  # holds some of the images; links make it all
        outside = any(self.root not in record.path.parents for record in self.records.values())
        if self.part is None and (extends or (made and outside)):
            self.root = self.output / FRAMES
            self.folder.own(*(f"{FRAMES}/{name}" for name in self.names))
            self.folder.save()
            gather(list(self.records.values()), self.root)
        if self.base is not None:
            self.base.seed(
                self.output,
                detector_free=self.linker.detector_free,
                overwrite=self.options.overwrite,
            )

    @property
    def adaptive(self) -> bool:
        """Whether similar images that nobody asked for are matched where the graph is weak."""
        chosen = self.pair_options
        return (
            len(self.levels) > 1
            and self.base is None
            and chosen.mode == "auto"
            and not chosen.neighbours
            and "retrieval" in self.plan.components
        )

    @property
    def levels(self) -> tuple[str, ...]:
        """Matchers of the run, in the order in which they are tried."""
        name = self.options.matcher
        return (name,) if self.options.features else CASCADES.get(name, (name,))

    def method_of(self, name: str, quality: Quality) -> Method:
        """Another matcher than the run's own, for some pairs; loaded once."""
        if (name, quality) not in self._others:
            as_first = self.method if name in self.levels[1:2] else None
            device = str(self.method.matcher.device)
            self._others[name, quality] = load_method(
                self.options, name, quality, device, detect_as=as_first, own=False
            )
        return self._others[name, quality]

    def bar(self, total: int | None, title: str, unit: str, done: int = 0) -> Any:
        """A progress bar."""
        return progress_bar(total, title, unit, done=done, show=self.show)

    def scale(self, method: Method | None = None) -> dict[str, float]:
        """Pixels that keypoints were found at for a stored one, at most 1."""
        options = (method or self.method).detector.image_options
        return {
            name: min(1.0, max(image_module.network_size(*r.upright_size, options)) / max(r.size))
            for name, r in self.records.items()
        }


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
