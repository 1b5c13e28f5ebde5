"""From an image folder to a COLMAP model: the steps, in their order, and what each rests on.

Every step leaves complete files or none, and its state is on disk when it ends (``run``): the same
command continues where an earlier one stopped, and does again only what has changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gim_hloc import colmap, engine, matchers, workers
from gim_hloc import images as image_module
from gim_hloc import poses as pose_module
from gim_hloc.cache import Cache
from gim_hloc.errors import GimError, InputError, MappingError, OutputError, some
from gim_hloc.export import FILES, export_model
from gim_hloc.masks import MaskFolder
from gim_hloc.matchers.base import Matcher, SparseEncoding
from gim_hloc.matchers.common import parse_matcher_options
from gim_hloc.options import CameraOptions, PoseUse, VerifyOptions, replace, to_mapping
from gim_hloc.pairs.files import read_pairs, write_pairs
from gim_hloc.pairs.retrieval import Lazy
from gim_hloc.pairs.select import Selection, plan, select
from gim_hloc.pipelines import rotations
from gim_hloc.pipelines.extension import Extension, gather
from gim_hloc.pipelines.imported import ImportedMatcher
from gim_hloc.pipelines.matching import (
    EncodeTask,
    Loader,
    MatchTask,
    Photographs,
    Stored,
    VerifyTask,
    pair_name,
    spread,
    take_parts,
)
from gim_hloc.pipelines.options import ReconstructOptions
from gim_hloc.pipelines.outcome import build_report, confidence_sums, scene_view, versions
from gim_hloc.pipelines.report import write_report
from gim_hloc.pipelines.run import (
    HIDDEN,
    MODEL_FILES,
    Made,
    Part,
    RunFolder,
    Step,
    keep_scan,
    part_of,
    progress_bar,
    refuse_other_images,
    scanned,
)
from gim_hloc.poses import radius
from gim_hloc.schedule import EncodingPool, encoding_bytes, memory_budget, order_pairs
from gim_hloc.store import (
    H5Store,
    digest,
    pair_keys,
    rows_from_matches0,
)
from gim_hloc.tracks.base import matches0_arrays
from gim_hloc.tracks.linker import ImagePoints, Linker, linker_for

if TYPE_CHECKING:
    from gim_hloc.colmap import MapJob, Refined
    from gim_hloc.images import ImageSet
    from gim_hloc.poses import KnownPoses

logger = logging.getLogger(__name__)

Pair = tuple[str, str]

# Raised when the meaning of a stored array changes, so that older files are not reused.
FORMAT = 1

_ROUNDS = 3  # of looking for images that are stored rotated


@dataclass(kw_only=True)
class ReconstructResult:
    """What a reconstruction left.

    Attributes:
        output: folder of the run.
        models: folders of COLMAP models, largest first; empty for a dry run.
        report: the content of report.json.
        estimate: of a dry run.
    """

    output: Path
    models: list[Path] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    estimate: dict[str, Any] = field(default_factory=dict)

    @property
    def registered(self) -> int:
        """Images with a pose in the largest model."""
        return int(self.report.get("summary", {}).get("registered", 0))

    def model(self, index: int = 0) -> Any:
        """Read a model as ``pycolmap.Reconstruction``."""
        return colmap.read_model(self.models[index])


def reconstruct(
    images: Path | str,
    output: Path | str,
    options: ReconstructOptions | None = None,
    *,
    progress: bool = True,
    **overrides: Any,
) -> ReconstructResult:
    """Reconstruct an image folder.

    Args:
        images: folder of images, searched recursively.
        output: folder of the run; what an earlier run with the same settings left there is reused.
        options: all settings; ``None`` takes the defaults.
        progress: whether to draw progress bars.
        **overrides: single fields of ``ReconstructOptions`` or ``CameraOptions``, such as
            ``matcher="sift"`` or ``camera_mode="single"``.

    Returns:
        Models, report and folder.

    Raises:
        InputError: unusable images or options; nothing was written over.
        OutputError: the folder holds files that no run made, or another image set.
        WeightsError: the matcher's weights are missing.
        LockedError: another run holds the folder.
        MappingError: no model came out; features, matches, database and report are kept.
    """
    options = with_overrides(options or ReconstructOptions(), overrides)
    return _Reconstruction(Path(images), Path(output), options, progress=progress).run()


def with_overrides(options: ReconstructOptions, overrides: Mapping[str, Any]) -> ReconstructOptions:
    """Replace single fields, those of the camera options included; unknown ones are errors."""
    names = {f.name for f in dataclasses.fields(CameraOptions)}
    own = {name: value for name, value in overrides.items() if name not in names}
    camera = {name: value for name, value in overrides.items() if name in names}
    options = replace(options, own)
    return replace(options, {"cameras": replace(options.cameras, camera)})


class _Reconstruction:
    """One run: its inputs, its folder, and what the steps have found so far."""

    def __init__(
        self, images: Path, output: Path, options: ReconstructOptions, *, progress: bool
    ) -> None:
        self.root, self.output, self.options = images, output, options
        self.show = progress
        self.part = part_of(options.step, options.shard)
        self.base: Extension | None = None  # the run whose model is extended
        self.added: list[str] = []  # images that are new to it
        self.known: KnownPoses | None = None
        self.encoded: set[str] = set()  # in this run, not reused
        self.matched: set[Pair] = set()  # likewise
        self.dense_encodings = 0  # by a matcher without keypoints, in this run
        self.rounds = 0  # of rotations
        self.failure: GimError | None = None
        self.map_notes: list[str] = []  # kept, so that a reused model tells them again
        self.left_model: dict[str, str] = {}  # image -> why it left a model
        self.intrinsics: list[dict[str, dict[str, Any]]] = []  # of each model's cameras
        self.models: list[Path] = []
        self.report: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------- order

    def run(self) -> ReconstructResult:
        start = time.perf_counter()
        self._check_options()
        self._check_folders()
        self._scan()
        self._read_poses()
        # Everything that can be wrong with the options is found before the long work.
        self._assign_cameras()
        self._load_matchers()
        self._prepare_keys()
        if self.options.dry_run:
            return ReconstructResult(output=self.output, estimate=self._estimate())
        self.folder.about = {
            "images": str(self.root.resolve()),
            "options": to_mapping(self.options),
            "matcher": to_mapping(self.matcher.options),
            "weights": dict(self.matcher.weights_hashes),
            "versions": versions(),
        }
        with self.folder, self._seeded():
            self._open_folder()
            try:
                if self.part is not None:
                    self._do_part(self.part)
                    return ReconstructResult(output=self.output)
                self.folder.go(
                    self.steps(), again=self.options.start, until=self.options.stop_after
                )
                self._tell_kept()
            finally:
                self.geometries.close()
                for store in self._stores():
                    store.close()
        if self.report:
            self.report["summary"]["seconds"] = time.perf_counter() - start
        if self.failure is not None:
            raise self.failure
        return ReconstructResult(output=self.output, models=self.models, report=self.report)

    def steps(self) -> list[Step]:
        """The order of the work."""
        if self.imported is not None:
            matching = [Step("pairs", self._choose_pairs), Step("import", self._import)]
        else:
            matching = [
                Step("encode", self._encode),
                Step("pairs", self._choose_pairs),
                Step("match", self._match),
                Step("rotations", self._rotate),  # another pass where images lie on their sides
            ]
        if self.linker.detector_free:
            matching.append(Step("link", self._link))
        return [
            *matching,
            Step("verify", self._verify),
            Step("map", self._map),  # writes the database anew where cameras were parted
            Step("refine", self._refine),
            Step("export", self._export),
            Step("report", self._report),
        ]

    def _do_part(self, part: Part) -> None:
        """Do one part of one step, whose results a later run without --step takes."""
        if part.step == "encode":
            self._encode()
        elif part.step == "match":
            self._choose_pairs()
            self._match()
        else:
            self._choose_pairs()
            self._verify()

    # -------------------------------------------------------------------------- inputs, checked

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
        if options.poses != "fixed" and options.model is None and options.extend is None:
            raise InputError(f"--poses {options.poses} needs known poses: --model POSES.")
        if options.poses == "prior":
            if options.extend is not None:
                raise InputError("--extend keeps the poses (--poses fixed) or moves them (refine).")
            if options.mapper not in ("incremental", "auto"):
                raise InputError("--poses prior works with COLMAP's incremental mapper only.")
        if self.part is not None and (given or options.extend is not None):
            raise InputError("--step goes without --features, --matches and --extend.")

    def _check_folders(self) -> None:
        if not self.root.is_dir():
            raise InputError(f"There is no image folder {self.root}.")
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
                *(f"export/[0-9]*/{name}" for kind in self.options.export for name in FILES[kind]),
                *(["dense/**/*"] if self.options.dense else []),
            ],
            writes=[
                *("features.h5", "matches.h5", "anchors.h5", "raw_matches.h5"),
                *("report.html", "report.json"),
            ],
            overwrite=self.options.overwrite,
            part=self.part,
        )

    def _scan(self) -> None:
        options = self.options
        with self.folder.timed("scan"):
            self.image_set: ImageSet = image_module.scan(
                self.root,
                min_size=options.min_image_size,
                exclude=[
                    self.output,
                    *(folder for folder in (options.masks, options.extend) if folder is not None),
                ],
                known=scanned(self.output),
                progress=self.show,
            )
            if self.base is not None:
                image_module.require_usable(self.image_set, 1)
                self.image_set, self.added = self.base.images(self.image_set)
            image_module.require_usable(self.image_set)
        for rejected in self.image_set.rejected:
            logger.warning("Left out: %s (%s: %s)", rejected.name, rejected.reason, rejected.detail)
        refuse_other_images(self.image_set, self.output, overwrite=options.overwrite)
        self._take_images()

    def _take_images(self) -> None:
        self.records = {record.name: record for record in self.image_set.images}
        self.names = list(self.records)
        masks = None
        if self.options.masks is not None:
            masks = MaskFolder(
                self.options.masks, erode_px=self.options.mask_erode, image_root=self.root
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

    def _poses_if(self, *uses: PoseUse) -> dict[str, Any] | None:
        """Known poses when they are used in one of these ways."""
        if self.known is None or self.options.poses not in uses:
            return None
        return {name: pose for name, pose in self.known.poses.items() if name in self.records}

    def _poses_key(self) -> Any:
        """What stands for the known poses in the keys of steps."""
        if self.known is None:
            return None
        listed = {
            name: [np.asarray(part).tolist() for part in pose]
            for name, pose in sorted(self.known.poses.items())
        }
        return digest([self.options.poses, self._prior_stddev(), listed])

    def _prior_stddev(self) -> float:
        if self.options.prior_stddev is not None or self.known is None:
            return self.options.prior_stddev or 1.0
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
            list(self.records.values()), self.options.cameras, known
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
        self.plan = plan(self.pair_options, self.names)
        self.where = workers.Where(
            devices=options.devices,
            engine=options.engine,
            workers=options.workers if options.engine == "ray" else 0,
            device=options.device,
        )
        device = options.devices[0] if options.devices else options.device
        self.imported: ImportedMatcher | None = None
        self.matcher: Matcher[Any]
        if options.features is not None and options.matches is not None:
            self.imported = self.matcher = ImportedMatcher(options.features, options.matches)
        else:
            self.loader = Loader(options.matcher, options.quality, self._overrides())
            self.matcher = self.loader.load(device)
        self.linker: Linker = linker_for(
            self.matcher, options.tracks, anchored=options.anchored, quantized=options.quantized
        )
        self.detector: Matcher[SparseEncoding] = self.matcher
        self.detector_loader = None if self.imported else self.loader
        if self.linker.detector_free:
            self._load_detector(device)
        if options.refine_warps and not self.matcher.info.has_warps:
            raise InputError(
                f"--refine-warps needs a dense matcher; {self.matcher.info.name} has no warps."
            )
        self.threads = 0 if options.engine == "ray" else options.workers
        self.threads = self.threads or engine.default_workers(
            self.matcher.device, options.deterministic or bool(options.devices)
        )
        self.batch = options.batch_size or (16 if self.matcher.device.type != "cpu" else 1)
        logger.info(
            "%d images, %d camera%s, matcher %s (%s) on %s",
            len(self.names),
            len(self.cameras),
            "" if len(self.cameras) == 1 else "s",
            self.matcher.info.name,
            options.quality,
            ", ".join(options.devices) or self.matcher.device,
        )
        logger.info("Pairs: %s (%s)", self.plan.mode, self.plan.why)

    def _overrides(self) -> dict[str, Any]:
        overrides = parse_matcher_options(self.options.matcher_options)
        for name in ("max_size", "max_keypoints"):
            value = getattr(self.options, name)
            if value is not None:
                overrides[name] = value
        if not matchers.describe(self.options.matcher).has_keypoints:
            overrides.pop("max_keypoints", None)  # of the anchors
        return overrides

    def _load_detector(self, device: str) -> None:
        options = self.options
        name = matchers.choose_detector(options.anchors)
        count = options.max_keypoints
        self.detector_loader = Loader(
            name, options.quality, {} if count is None else {"max_keypoints": count}
        )
        detector = self.detector_loader.load(device)
        if not detector.info.has_keypoints:
            raise InputError(f"{name} has no keypoints; choose a sparse matcher for the anchors.")
        if options.anchors == "auto" and name != "aliked_lightglue":
            self.folder.notes.append(
                f"The weights of aliked_lightglue are missing: anchors are {name}'s."
            )
        self.detector = detector

    def _prepare_keys(self) -> None:
        """Settings that decide what of an earlier run is reused."""
        encode = {f"encode.{k}": v for k, v in self.detector.encode_settings().items()}
        self.feature_settings: dict[str, Any] = {"format": FORMAT, **encode}
        if self.photographs.masks is not None:
            self.feature_settings["mask_erode"] = self.options.mask_erode
        self.match_settings = {**self.feature_settings, **self.linker.settings()}
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

    def _estimate(self) -> dict[str, Any]:
        """Time two images and one pair, and tell what the whole will take."""
        two = self.names[:2]
        watch = engine.Stopwatch()
        encodings = dict(
            engine.encode(
                self.matcher, two, lambda n: self.photographs.read(n, self.matcher.image_options)
            )
        )
        per_image = watch.seconds / 2
        watch = engine.Stopwatch()
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
            return len(self._selected().pairs), True
        bound = count * self.plan.neighbours
        if "sequential" in self.plan.components:
            bound += count * self.pair_options.window * (2 if self.pair_options.quadratic else 1)
        return min(count * (count - 1) // 2, bound), False

    # ------------------------------------------------------------------------------------ folder

    def _open_folder(self) -> None:
        if self.part is None:
            keep_scan(self.folder, self.image_set)
        if self.base is not None:
            if self.base.map.images != self.root:
                self.root = self.output / "images"
                self.folder.own(*(f"images/{name}" for name in self.names))
                self.folder.save()
                gather(list(self.records.values()), self.root)
            self.base.seed(
                self.output,
                detector_free=self.linker.detector_free,
                overwrite=self.options.overwrite,
            )
        self._read_rotations()
        self._open_stores()

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        import torch

        threads = torch.get_num_threads()
        torch.manual_seed(self.options.seed)
        colmap.set_seed(self.options.seed)
        if self.options.deterministic:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _open_stores(self) -> None:
        """The caches of the steps. ``detected`` and ``raw`` are what linking starts from."""
        if self.linker.detector_free:
            self.detected = self._store("anchors.h5", self.feature_settings)
            self.raw = self._store("raw_matches.h5", self.match_settings, pairs=True)
            self.features = self._store("features.h5", self.match_settings)
            self.matches = self._store("matches.h5", self.match_settings, pairs=True)
        else:
            self.detected = self.features = self._store("features.h5", self.feature_settings)
            self.raw = self.matches = self._store("matches.h5", self.match_settings, pairs=True)
        self.geometries = Cache(self.folder.cache_file("database.db"))
        if self.part is None:
            stores = {store.cache_file.stem: store for store in self._stores()}
            take_parts(self.folder, {**stores, "database": self.geometries})
        for store, what in ((self.detected, "Features"), (self.raw, "Matches")):
            if store.changed_settings:
                logger.info(
                    "%s of the earlier run are not reused: %s changed.",
                    what,
                    ", ".join(store.changed_settings),
                )

    def _store(self, name: str, settings: dict[str, Any], *, pairs: bool = False) -> H5Store:
        return H5Store(
            self.output / name,
            settings,
            key_of=self.pair_key if pairs else None,
            # What an extension starts from was just put there.
            overwrite=self.options.overwrite and self.base is None and self.part is None,
            cache_file=self.folder.cache_file(name),
        )

    def _stores(self) -> list[H5Store]:
        return list(dict.fromkeys((self.detected, self.raw, self.features, self.matches)))

    def _bar(self, total: int | None, title: str, unit: str, done: int = 0) -> Any:
        return progress_bar(total, title, unit, done=done, show=self.show)

    # ------------------------------------------------------------------------------------ encode

    def _encode(self) -> None:
        photographs, store = self.photographs, self.detected
        names = self.folder.share(self.names)
        todo = [n for n in names if not store.has(n, photographs.source(n))]
        with self._bar(len(names), "Encode", "images", len(names) - len(todo)) as bar:

            def done(name: str, entry: tuple[dict[str, np.ndarray], dict[str, Any]]) -> None:
                arrays, attributes = entry
                store.put(name, arrays, photographs.source(name), **attributes)
                self.encoded.add(name)
                logger.debug("encoded %s: %d keypoints", name, len(arrays["keypoints"]))
                bar.update()

            task = EncodeTask(self.detector_loader, photographs, self.threads)
            spread(task, todo, self.where, done, chunk=4)
        if self.part is not None:
            return
        store.finalize(self.names, {"matcher": self.detector.info.name})
        self._read_keypoints(store)
        logger.info(
            "Encoded %d images (%d reused), %.0f keypoints an image",
            len(self.encoded),
            len(self.names) - len(self.encoded),
            np.mean([len(k) for k in self.keypoints.values()]),
        )

    def _read_keypoints(self, store: H5Store) -> None:
        self.keypoints = {name: store.get(name)[0]["keypoints"] for name in self.names}

    def _import(self) -> None:
        """Take keypoints and matches over from hloc's files."""
        if self.imported is None:
            raise TypeError("only for imported files")
        with self._bar(len(self.selection.pairs), "Import", "pairs") as bar:
            notes = self.imported.take_over(
                self.records, self.selection.pairs, self.features, self.matches, bar.update
            )
        for note in notes:
            self.folder.note(note)
        self._read_keypoints(self.features)
        logger.info(
            "Imported %.0f keypoints an image, %d pairs",
            np.mean([len(k) for k in self.keypoints.values()]),
            len(self.selection.pairs),
        )

    # ------------------------------------------------------------------------------------- pairs

    def _choose_pairs(self) -> None:
        key = digest(
            [
                to_mapping(self.pair_options),
                [[name, self.photographs.source(name)] for name in self.names],
                [_file_stamp(path) for path in self.plan.files],
                self.feature_settings if self.plan.needs_descriptors else None,
                self.added,
            ]
        )
        facts = self.folder.facts("pairs", key)
        path = self.output / "pairs.txt"
        if facts is not None:
            listed = read_pairs(path, self.names)
            self.selection = Selection(pairs=listed, **facts)
        elif self.part is not None and self.plan.needs_descriptors:
            raise InputError(
                f"--step {self.part.step} works on pairs that are not chosen yet: run the same "
                "command with --stop-after pairs instead of --step first."
            )
        else:
            self.selection = self._selected()
            if self.part is None:
                with self.folder.making("pairs", key) as made:
                    write_pairs(made.path / "pairs.txt", self.selection.pairs)
                    made.facts = {k: v for k, v in vars(self.selection).items() if k != "pairs"}
        self.folder.notes += self.selection.notes

    def _selected(self) -> Selection:
        def local_descriptors() -> Lazy:
            return Lazy(self.names, lambda name: self.detected.get(name)[0]["descriptors"].T)

        selection = select(
            self.pair_options,
            self.names,
            local_descriptors=local_descriptors,
            gps={name: record.exif.gps for name, record in self.records.items()},
            load_image=self.photographs.read,
            left_out=[rejected.name for rejected in self.image_set.rejected],
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

    # ------------------------------------------------------------------------------------- match

    def _match(self) -> None:
        photographs, store = self.photographs, self.raw
        pairs = self.folder.share(self.selection.pairs)
        todo = [p for p in pairs if not store.has(pair_name(p), photographs.pair_source(p))]
        logger.debug("to match: %d of %d pairs", len(todo), len(pairs))
        if self.part is not None:
            self._require_encoded(todo)
        task = self._match_task(todo)
        start = time.perf_counter()
        with self._bar(len(pairs), "Match", "pairs", len(pairs) - len(todo)) as bar:

            def done(pair: Pair, arrays: dict[str, np.ndarray]) -> None:
                store.put(pair_name(pair), arrays, photographs.pair_source(pair))
                self.matched.add(pair)
                count = len(self.linker.confidences(arrays))
                logger.debug("matched %s | %s: %d matches", *pair, count)
                bar.update()

            chunk = 16 if self.matcher.info.has_keypoints else 64  # neighbours share encodings
            spread(task, todo, self.where, done, chunk=chunk)
        if self.part is not None:
            return
        self.folder.notes += task.report.notes
        if self.linker.detector_free and task.report.encoded:
            self.dense_encodings += len(task.report.encoded)
            logger.info(
                "Encoded %d images %d times for %d pairs (%d encodings fit in memory)",
                len(set(task.report.encoded)),
                len(task.report.encoded),
                len(todo),
                task.report.capacity,
            )
        store.finalize([pair_name(p) for p in pairs], {"matcher": self.matcher.info.name})
        logger.info(
            "Matched %d pairs (%d reused) in %.1f s",
            len(todo),
            len(pairs) - len(todo),
            time.perf_counter() - start,
        )

    def _require_encoded(self, pairs: Sequence[Pair]) -> None:
        store = self.detected
        names = sorted({name for pair in pairs for name in pair})
        missing = [n for n in names if not store.has(n, self.photographs.source(n))]
        if missing:
            raise InputError(
                f"{len(missing)} images are not encoded yet: {some(missing)}. Run --step encode, "
                "or the same command with --stop-after pairs instead of --step, first."
            )

    def _match_task(self, todo: Sequence[Pair]) -> MatchTask:
        options = self.options
        anchored = self.linker.detector_free and options.tracks == "anchored"
        needed = sorted({name for pair in todo for name in pair}) if anchored else []
        return MatchTask(
            loader=self.loader,
            photographs=self.photographs,
            stored=Stored(self.detected.path),
            tracks=options.tracks,
            anchored=options.anchored,
            quantized=options.quantized,
            points=self._points(needed),
            threads=self.threads,
            batch_size=self.batch,
            cache_gb=options.cache_gb,
        )

    def _points(self, names: Sequence[str]) -> list[ImagePoints]:
        """What the linker is to know of images."""
        found = []
        for name in names:
            arrays, record = self.detected.get(name)[0], self.records[name]
            masks = self.photographs.masks
            found.append(
                ImagePoints(
                    name=name,
                    size=record.size,
                    keypoints=arrays["keypoints"],
                    scores=arrays["scores"],
                    mask=None if masks is None else masks.load(record),
                )
            )
        return found

    # --------------------------------------------------------------------------------- rotations

    def _read_rotations(self) -> None:
        """Take over what an earlier run found of images that are stored rotated."""
        self.decided = False
        entry = self.folder.steps.get("rotations", {})
        facts = entry.get("facts", {})
        if self.options.rotations == "none" or facts.get("settings") != digest(self.match_settings):
            return
        self.decided = entry.get("key") == self._rotations_key()
        for name, (turn, sha) in facts["images"].items():
            if name in self.records and self.records[name].sha256 == sha:
                self.photographs.turns[name] = turn

    def _rotations_key(self) -> str:
        return digest([self.match_settings, sorted(r.sha256 for r in self.records.values())])

    def _rotate(self) -> list[Step] | None:
        """Look for images that are stored rotated; with new ones, another pass is made."""
        # Which way up an image fits is judged with the detector's matches, whatever the matcher.
        turns = self.photographs.turns
        wanted = self.options.rotations == "auto" and not self.detector.info.rotation_invariant
        if wanted and not self.decided and self.rounds < _ROUNDS:
            self.rounds += 1
            found = self._find_rotations()
            for name, turn in found.items():
                turns[name] = (turns.get(name, 0) + turn) % 4
            self.decided = not found
            with self.folder.making("rotations", self._rotations_key()) as made:
                made.facts = {
                    "settings": digest(self.match_settings),
                    "images": {n: [t, self.records[n].sha256] for n, t in sorted(turns.items())},
                }
                made.whole = self.decided
            if found:
                again = [Step("encode", self._encode), Step("match", self._match)]
                if self.plan.needs_descriptors:  # similarity was judged by the unturned ones
                    again.insert(1, Step("pairs", self._choose_pairs))
                return [*again, Step("rotations", self._rotate)]
        if turns:
            listed = some([f"{n} by {90 * t}" for n, t in sorted(turns.items())], 8)
            self.folder.notes.append(
                f"{len(turns)} images are stored turned without EXIF saying so and were "
                f"matched upright (degrees clockwise): {listed}. Poses and "
                "keypoints are those of the stored files."
            )
            logger.info("%s", self.folder.notes[-1])
        return None

    def _find_rotations(self) -> dict[str, int]:
        matcher = self.detector
        bound = matcher.info.min_confidence_sum.get(self.options.quality)
        sums = {
            pair: float(self.linker.confidences(self.raw.get(pair_name(pair))[0]).sum(dtype=float))
            for pair in self.selection.pairs
        }
        groups = rotations.weak_groups(
            self.names, sums, {name: len(k) for name, k in self.keypoints.items()}, bound
        )
        stored = Stored(self.detected.path)

        def confidence(name: str, turn: int, others: Sequence[str]) -> float:
            encoding = matcher.encode(self.photographs.read(name, matcher.image_options, turn))
            found = matcher.match_batch([(encoding, stored(other)) for other in others])
            return sum(float(matches.scores.sum()) for matches in found)

        found: dict[str, int] = {}
        with self._bar(len(groups), "Rotate", "groups") as bar:
            for group in groups:
                turn = rotations.best_rotation(group, confidence, bound)
                found.update(dict.fromkeys(group.members, turn) if turn else {})
                bar.update()
        return found

    # -------------------------------------------------------------------------------------- link

    def _link(self) -> None:
        """Link the raw matches of all pairs into tracks: keypoints and matches of every image."""
        pairs = self.selection.pairs
        source = digest([[pair_name(p), self.photographs.pair_source(p)] for p in pairs])
        names = [pair_name(p) for p in pairs]
        reused = all(self.features.has(n, source) for n in self.names) and all(
            self.matches.has(n, source) for n in names
        )
        if not reused:
            self.linker.prepare(self._points(self.names))
            with self._bar(len(pairs), "Link", "pairs") as bar:
                tracks = self.linker.link(
                    self.names, pairs, lambda p: self.raw.get(pair_name(p))[0], bar.update
                )
            for name in self.names:
                arrays = {
                    "keypoints": tracks.keypoints[name],
                    "image_size": np.array(self.records[name].size, dtype=np.int64),
                }
                self.features.put(name, arrays, source)
            nothing = np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
            for pair, name in zip(pairs, names, strict=True):
                rows = tracks.matches.get(pair, nothing[0])
                scores = tracks.scores.get(pair, nothing[1])
                count = len(tracks.keypoints[pair[0]])
                self.matches.put(name, matches0_arrays(rows, scores, count), source)
        attributes = {"matcher": self.matcher.info.name, "tracks": self.options.tracks}
        # Linking is quick, and every other list of pairs gives other tracks: none are kept.
        self.features.finalize(self.names, attributes, keep=False)
        self.matches.finalize(names, attributes, keep=False)
        self._read_keypoints(self.features)
        logger.info(
            "Linked into %.0f keypoints an image (%s tracks)",
            np.mean([len(k) for k in self.keypoints.values()]),
            self.options.tracks,
        )

    # ------------------------------------------------------------------------------------ verify

    def _verify_options(self) -> VerifyOptions:
        """The verification's numbers, with the matcher's own bound where the user set none."""
        verify = self.options.verify
        if verify.min_confidence_sum is None:
            own = self.matcher.info.min_confidence_sum.get(self.options.quality)
            verify = dataclasses.replace(verify, min_confidence_sum=own)
        return verify

    def _solver_threads(self) -> int:
        return 1 if self.options.deterministic else engine.usable_cores()

    def _match_source(self, pair: Pair) -> str:
        """Hash of what the matches in matches.h5 are made from."""
        return self.matches.source(pair_name(pair)) or ""

    def _verify(self) -> None:
        """Verify each pair, and write COLMAP's database of what passed."""
        pairs = self.selection.pairs
        if self.part is not None:
            self._require_matched(pairs)
        verification = colmap.Verification(
            cameras=self.cameras,
            options=self._verify_options(),
            seed=self.options.seed,
            poses=self._poses_if("fixed") or {},
            scale=self._scale(),
        )
        settings = [self.matches.stamp, verification.settings()]
        keys = {
            pair: digest([settings, self._match_source(pair), verification.pair_facts(*pair)])
            for pair in pairs
        }
        cameras = [dataclasses.asdict(spec) for spec in self.cameras]
        self.database_key = digest([list(keys.values()), cameras, self._poses_key()])
        path = self.output / "database.db"
        if self.part is None and self.folder.facts("verify", self.database_key) is not None:
            self.verified = colmap.read_verification(path, pairs)
            logger.info("Database reused: %s", path)
            self._tell_doubtful()
            return
        self._verify_pairs(verification, keys)
        if self.part is not None:
            return
        prior = self._poses_if("prior")
        with self.folder.making("verify", self.database_key) as made:
            self.verified = colmap.write_database(
                made.path / "database.db",
                cameras=self.cameras,
                names=self.names,
                keypoints=self.keypoints.__getitem__,
                pairs=(
                    (
                        *pair,
                        rows_from_matches0(self.matches.get(pair_name(pair))[0]["matches0"]),
                        self._geometry(keys[pair], pair),
                    )
                    for pair in pairs
                ),
                priors={n: -r.T @ t for n, (r, t) in prior.items()} if prior else None,
                prior_stddev=self._prior_stddev(),
            )
        self._judge_poses()
        logger.info(
            "Verified %d of %d pairs", sum(v.inliers > 0 for v in self.verified), len(pairs)
        )
        self._tell_doubtful()

    def _verify_pairs(self, verification: colmap.Verification, keys: Mapping[Pair, str]) -> None:
        pairs = self.folder.share(list(keys))
        todo = [pair for pair in pairs if keys[pair] not in self.geometries]
        task = VerifyTask(
            verification=verification,
            features=self.features.path,
            matches=self.matches.path,
            keys={name: self.pair_key(name) for name in self.names},
            threads=1 if self.where.devices else self._solver_threads(),
        )
        with self._bar(len(pairs), "Verify", "pairs", len(pairs) - len(todo)) as bar:

            def done(pair: Pair, arrays: dict[str, np.ndarray]) -> None:
                self.geometries.put(keys[pair], arrays)
                bar.update()

            spread(task, todo, self.where, done, chunk=64)

    def _geometry(self, key: str, pair: Pair) -> dict[str, np.ndarray]:
        found = self.geometries.get(key)
        if found is None:
            raise OutputError(
                f"{self.geometries.path} lost the pair {pair[0]} {pair[1]}. Repeat the command: it "
                "is verified again."
            )
        return found

    def _require_matched(self, pairs: Sequence[Pair]) -> None:
        photographs = self.photographs
        missing = [
            pair_name(p)
            for p in pairs
            if not self.raw.has(pair_name(p), photographs.pair_source(p))
        ]
        if missing or not self.matches.path.exists() or not self.features.path.exists():
            raise InputError(
                f"--step verify: {len(missing)} of {len(pairs)} pairs are not matched yet. Run "
                "--step match, and then the same command with --stop-after "
                f"{'link' if self.linker.detector_free else 'match'} instead of --step."
            )

    def _tell_doubtful(self) -> None:
        doubtful = sum(v.doubtful for v in self.verified)
        if doubtful:
            self.folder.note(
                f"{doubtful} of {len(self.verified)} pairs had enough inliers but too little "
                "confidence and were left out, as pairs of unrelated places: a sum below "
                f"{self._verify_options().min_confidence_sum:g} (--verify.min-confidence-sum)."
            )

    def _confidence_meaning(self) -> str:
        """What the confidence of a match is, for the report."""
        if self.imported is not None:
            said = "Confidences are those of the imported file, 1 where it has none."
        elif self.linker.detector_free:
            said = f"Confidences are those of the {self.options.tracks} tracks' readings."
        else:
            said = f"Confidences are those that {self.matcher.info.name} gives its matches."
        if self._poses_if("fixed") is not None:
            said += " Pairs whose poses are known are judged by these alone."
        return said

    def _judge_poses(self) -> None:
        """Warn when hardly a match agrees with fixed poses."""
        known = self._poses_if("fixed")
        if known is None:
            return
        pairs = [v for v in self.verified if v.name0 in known and v.name1 in known]
        matches, inliers = sum(v.matches for v in pairs), sum(v.inliers for v in pairs)
        if matches and inliers < 0.1 * matches:
            self.folder.note(
                f"Only {inliers / matches:.1%} of the matches agree with the known poses. Are they "
                "those of these images (order of names), in the convention of their format, and do "
                "the intrinsics fit?"
            )

    # --------------------------------------------------------------------------------------- map

    def _map(self) -> list[Step] | None:
        """Models of the verified pairs, as COLMAP's mappers leave them."""
        self.map_key = digest(
            {
                "database": self.database_key,
                "map": dataclasses.asdict(self.options.map),
                "mapper": colmap.resolve_mapper(self.options.mapper, len(self.names)),
                "refine_intrinsics": self.options.cameras.refine_intrinsics,
                "threads": 1 if self.options.deterministic else "many",
                "poses": self._poses_key(),
            }
        )
        facts = self.folder.facts("map", self.map_key)
        if facts is None:
            if "cameras" in self.folder.steps:  # parted in the database by another mapping
                self.folder.steps.pop("cameras")
                self.folder.steps.pop("verify")
                return [Step("verify", self._verify), Step("map", self._map)]
            try:
                facts = self._mapped()
            except MappingError as error:
                self.failure = error
                return None
        self.map_notes = facts["notes"]
        parted = [
            colmap.CameraSpec(**{**spec, "params": tuple(spec["params"])})
            for spec in facts["cameras"]
        ]
        if parted == self.cameras:
            return None
        self.cameras = parted
        return [Step("verify", self._write_cameras)]

    def _mapped(self) -> dict[str, Any]:
        if not any(pair.inliers for pair in self.verified):
            raise self._nothing_matched()
        with (
            self.folder.making("map", self.map_key) as made,
            self._bar(len(self.names), "Map", "images") as bar,
        ):

            def registered(model: int, count: int) -> None:
                bar.set_postfix_str(f"model {model}", refresh=False)
                bar.n = count
                bar.refresh()

            # A copy: cameras are parted in it while mapping tries what explains the images.
            database = self.folder.hidden("mapping.db")
            shutil.copyfile(self.output / "database.db", database)
            job = dataclasses.replace(self._job(), database=database, progress=registered)
            if self._poses_if("fixed", "refine") is not None:
                mapped = colmap.triangulate_known(job)
                cameras, models, notes = self.cameras, mapped.models, mapped.notes
            else:
                grouped = colmap.map_scene(job, split=self.options.cameras.camera_mode == "auto")
                cameras, models, notes = list(grouped.cameras), grouped.models, grouped.notes
            colmap.write_models(models, made.path / HIDDEN / "mapped")
            database.unlink()
            made.facts = {"notes": notes, "cameras": [dataclasses.asdict(c) for c in cameras]}
        return made.facts

    def _write_cameras(self) -> None:
        """The database with the cameras that mapping found it to have."""
        key = digest([self.map_key, [dataclasses.asdict(spec) for spec in self.cameras]])
        if self.folder.facts("cameras", key) is None:
            with self.folder.making("cameras", key) as made:
                colmap.copy_with_cameras(
                    self.output / "database.db", made.path / "database.db", self.cameras
                )

    def _job(self) -> MapJob:
        return colmap.MapJob(
            database=self.output / "database.db",
            cameras=self.cameras,
            options=self.options.map,
            mapper="incremental" if self._poses_if("prior") else self.options.mapper,
            refine_intrinsics=self.options.cameras.refine_intrinsics,
            poses=self._poses_if("fixed", "refine", "prior"),
            pose_use=self.options.poses,
            seed=self.options.seed,
            threads=1 if self.options.deterministic else -1,
            log_dir=self.folder.hidden("logs"),
            # COLMAP takes one bound for all images: sizes that differ meet in the middle.
            stored_px=float(np.exp(-np.mean(np.log(list(self._scale().values()))))),
        )

    def _scale(self) -> dict[str, float]:
        """Pixels that keypoints were found at for a stored one, at most 1."""
        options = self.detector.image_options
        return {
            name: min(1.0, max(image_module.network_size(*r.upright_size, options)) / max(r.size))
            for name, r in self.records.items()
        }

    def _mapper_name(self) -> str:
        if self.known is not None:
            return f"known poses, {self.options.poses}"
        return colmap.resolve_mapper(self.options.mapper, len(self.names))

    def _nothing_matched(self) -> MappingError:
        found = sum(pair.matches for pair in self.verified)
        return MappingError(
            f"Nothing matched: no pair of images passed the verification ({len(self.verified)} "
            f"tried, {found} matches in all). Are these images of one scene, and are the weights "
            f"of {self.matcher.info.name} the published ones? Features, matches and the report are "
            "kept." + "".join(f" {name}: {why}." for name, why in list(self._masked().items())[:5])
        )

    def _masked(self) -> dict[str, str]:
        """Images of which their masks leave nothing, and the sentence that says so."""
        masks = self.photographs.masks
        empty = [name for name in self.names if not len(self.keypoints[name])]
        said = {name: masks.nothing_left(self.records[name]) for name in empty if masks}
        return {name: why for name, why in said.items() if why}

    # ------------------------------------------------------------------------------------ refine

    def _refine(self) -> None:
        """The models as they are handed over: refined, checked, aligned, coloured."""
        if self.failure is not None:
            return
        options = self.options
        self.model_key = digest(
            {
                "map": self.map_key,
                "refine": dataclasses.asdict(options.refine) if options.refine_keypoints else None,
                "warps": dataclasses.asdict(options.warps) if options.refine_warps else None,
            }
        )
        facts = self.folder.facts("refine", self.model_key)
        if facts is not None:
            logger.info("Model reused: %s", self.output / "sparse")
        else:
            try:
                facts = self._refined()
            except MappingError as error:
                self.failure = error
                return
            self._drop_stale()
        self.left_model, self.intrinsics = facts["left_model"], facts["intrinsics"]
        self.folder.notes += [*self.map_notes, *facts["notes"]]
        self.models = [self.output / "sparse" / str(i) for i in range(len(self.intrinsics))]

    def _refined(self) -> dict[str, Any]:
        job = self._job()
        mapped = self.output / HIDDEN / "mapped"
        count = len(list(mapped.iterdir()))
        notes: list[str] = []
        with self.folder.making("refine", self.model_key) as made:
            improved = [self._improve(job, mapped / str(i), i, notes, made) for i in range(count)]
            models = [model for model, _ in improved]
            seen = [set(colmap.poses_of(model)) for model in models]
            reasons: dict[str, str] = {}
            if job.poses is None:  # known poses carry a model that would not stand alone
                models, reasons = self._checked(job, models, notes)
            # Models may have been split: a part has the cameras of the whole.
            intrinsics = [
                next(
                    rows
                    for names, (_, rows) in zip(seen, improved, strict=True)
                    if names >= set(colmap.poses_of(model))
                )
                for model in models
            ]
            known = self._poses_if("refine", "prior")
            for model in models:
                if known is not None:
                    colmap.align(model, known)
                colmap.extract_colours(
                    model, lambda n: image_module.read_rgb(self.records[n], upright=False)
                )
            colmap.write_models(models, made.path / "sparse")
            made.facts = {"notes": notes, "left_model": reasons, "intrinsics": intrinsics}
        return made.facts

    def _improve(
        self, job: MapJob, path: Path, index: int, notes: list[str], made: Made
    ) -> tuple[Any, dict[str, dict[str, Any]]]:
        """What follows mapping: warps read again, patches compared, intrinsics settled.

        Returns:
            The model, and what is known of its cameras by their ids.
        """
        with colmap.colmap_log(job.log_dir):
            model = colmap.read_model(path)
            fixed = job.fixed | colmap.hold_undetermined(model, job)
            before = {camera["id"]: camera["params"] for camera in colmap.cameras_of(model)}
            refined = None
            try:
                if self.options.refine_warps:
                    sentence = self._refine_by_warps(model, fixed)
                    notes.append(f"The model was {sentence}.")
                    logger.info("Model %d: %s", index, sentence)
                if self.options.refine_keypoints:
                    refined = self._refine_by_patches(model, fixed)
                    notes.append(f"The model was {refined.sentence}.")
                    logger.info("Model %d: %s", index, refined.sentence)
            except (RuntimeError, MemoryError) as error:
                if not engine.is_out_of_memory(error):
                    raise
                made.whole = False
                notes.append(
                    f"Memory ran out while model {index} was refined ({error}): it is as it was "
                    "mapped. The same command tries the refinement again."
                )
                logger.warning("%s", notes[-1])
                model, refined = colmap.read_model(path), None
                fixed = job.fixed | colmap.hold_undetermined(model, job)
            said, found = colmap.settle(model, job, before, refined.robust_px if refined else None)
            rows = {} if self._held() else colmap.describe_intrinsics(model, job, found)
            # Afterwards: what patches did not confirm says little about intrinsics.
            if refined is not None and refined.original is not None:
                said.append(colmap.give_back(model, refined, job.threads))
        for note in said:
            logger.info("Model %d: %s", index, note)
            notes.append(f"Model {index}: {note}")
        return model, {str(camera): row for camera, row in rows.items()}

    def _checked(
        self, job: MapJob, models: Sequence[Any], notes: list[str]
    ) -> tuple[list[Any], dict[str, str]]:
        """What is left of models, and why images left them (see ``colmap.check_models``)."""
        checked = colmap.check_models(models, min_model_size=job.options.min_model_size)
        for note in checked.notes:
            logger.warning("%s", note)
        notes += checked.notes
        if not checked.models:
            raise MappingError(
                " ".join(checked.notes)
                or "No model came out: what COLMAP built has hardly a point (see the images in "
                "the report). Is there parallax between the photographs (a camera that only turns "
                "has none), and enough overlap?"
            )
        return checked.models, checked.reasons

    def _drop_stale(self) -> None:
        """Take away what was made of an earlier model and is not made again."""
        stale = [
            name
            for name in self.folder.steps
            if (
                name.startswith("export ")
                and name.removeprefix("export ") not in self.options.export
            )
            or (name == "dense" and not self.options.dense)
        ]
        if stale:
            self.folder.drop(*stale)
            logger.info("Removed what was made of the model before: %s", ", ".join(stale))

    def _held(self) -> set[str]:
        """Images whose poses must not move."""
        return set(self._poses_if("fixed") or ())

    def _refine_by_warps(self, model: Any, fixed: set[int]) -> str:
        matcher = self.matcher

        def read(name: str) -> Any:
            return self.photographs.read(name, matcher.image_options)

        registered = {model.image(i).name for i in model.reg_image_ids()}
        pairs = [p for p in self.selection.pairs if registered.issuperset(p)]
        budget = memory_budget(matcher.device, self.options.cache_gb)
        first = matcher.encode(read(pairs[0][0])) if pairs else None
        size = max(1, encoding_bytes(first))
        order = order_pairs(pairs, max(2, budget.total // size))
        rounds = self.options.warps.rounds
        with (
            EncodingPool(
                read,
                matcher.encode,
                order * rounds,
                budget,
                matcher.device,
            ) as pool,
            self._bar(rounds * len(order), "Reread", "pairs") as bar,
        ):
            if first is not None:
                pool.put(pairs[0][0], first)
            position = itertools.count()

            def warp(a: str, b: str) -> Any:
                here = next(position)
                encodings = pool.acquire([(a, b)], here)
                try:
                    return matcher.warp_batch(encodings)[0]
                finally:
                    pool.release([(a, b)])

            sentence = colmap.refine_by_warps(
                model,
                warp,
                order,
                options=self.options.warps,
                fixed=fixed,
                threads=1 if self.options.deterministic else -1,
                progress=bar.update,
                held=self._held(),
            )
            self.dense_encodings += len(pool.encoded)
        return sentence

    def _refine_by_patches(self, model: Any, fixed: set[int]) -> Refined:
        import cv2

        def gray(name: str) -> np.ndarray:
            rgb = image_module.read_rgb(self.records[name], upright=False)
            return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.float32)

        total = 2 * self.options.refine.rounds * model.num_reg_images()
        with self._bar(total, "Refine", "views") as bar:
            refined = colmap.refine_tracks(
                model,
                gray,
                options=self.options.refine,
                fixed=fixed,
                threads=1 if self.options.deterministic else -1,
                progress=bar.update,
                held=self._held(),
                scale=self._scale(),
            )
            bar.total = bar.n
            bar.refresh()
        return refined

    # ------------------------------------------------------------------------- export and report

    def _export(self) -> None:
        """The models in other formats, and what is dense. A format that fails leaves no old one."""
        if self.failure is not None:
            return
        files = self.folder.steps["refine"]["files"]
        model_key = digest([self.model_key, [self.folder.files[name] for name in files]])
        wanted: list[tuple[str, Callable[[Path], list[str]]]] = [
            (f"export {kind}", functools.partial(self._export_to, kind))
            for kind in self.options.export
        ]
        if self.options.dense:
            wanted.append(("dense", self._export_dense))
        for name, write in wanted:
            facts = self.folder.facts(name, model_key)
            try:
                if facts is None:
                    with self.folder.making(name, model_key, large=True) as made:
                        notes = [
                            s.replace(f"{made.path}", f"{self.output}") for s in write(made.path)
                        ]
                        made.facts = {"notes": notes}
                    facts = made.facts
            except GimError as error:  # the report and what else is wanted come first
                self.failure = error
                self.folder.drop(name)
                continue
            for sentence in dict.fromkeys(facts["notes"]):
                self.folder.note(sentence)

    def _export_to(self, kind: str, folder: Path) -> list[str]:
        notes: list[str] = []
        for index, path in enumerate(self.models):
            target = folder / "export" / str(index)
            notes += export_model(
                colmap.read_model(path), target, formats=(kind,), images=self.root,
                place=self.output / "export" / str(index), progress=self.show,
            )  # fmt: skip
        return notes

    def _export_dense(self, folder: Path) -> list[str]:
        return colmap.run_dense(
            self.root,
            colmap.read_model(self.models[0]),
            folder / "dense",
            log_dir=self.folder.hidden("logs"),
            progress=self.show,
        )

    def _report(self) -> None:
        loaded = [colmap.read_model(path) for path in self.models]
        if self.failure is not None:
            self.folder.notes.append(str(self.failure))
            if not loaded and "refine" in self.folder.steps:
                self.folder.note("sparse/ still holds the model of the run before.")
        for note in self.folder.notes:
            logger.debug("note: %s", note)
        report = build_report(
            image_set=self.image_set,
            keypoints={name: len(k) for name, k in self.keypoints.items()},
            selection=self.selection,
            verified=self.verified,
            models=loaded,
            paths=[str(path.relative_to(self.output)) for path in self.models],
            left_model=self.left_model,
            notes=list(dict.fromkeys(self.folder.notes)),
            confidence=confidence_sums(
                self.verified, self._verify_options().min_confidence_sum, self._confidence_meaning()
            ),
        )
        masked = self._masked()
        for row in report["images"]:
            if row["name"] in self.photographs.turns:
                row["rotated_degrees"] = 90 * self.photographs.turns[row["name"]]
            if row["name"] in masked:
                row["reason"] = masked[row["name"]]
        for rows, described in zip(self.intrinsics, report["models"], strict=False):
            for camera in described["cameras"]:
                camera.update(rows.get(str(camera["id"]), {}))
        report["settings"] = to_mapping(
            {
                "images": str(self.root),
                **dataclasses.asdict(self.options),
                "pair": dataclasses.asdict(self.pair_options),
                "mapper_used": self._mapper_name(),
                "matcher_settings": dataclasses.asdict(self.matcher.options),
                "matcher_licence": self.matcher.info.licence,
                "weights_sha256": dict(self.matcher.weights_hashes),
                "device": str(self.matcher.device),
                "workers": self.threads,
            }
        )
        report["versions"] = versions()
        report["counts"] = {
            "images_encoded_now": len(self.encoded),
            "dense_encodings_now": self.dense_encodings,
            "pairs_matched_now": len(self.matched),
        }
        report["timings"] = dict(self.folder.timings)
        try:
            write_report(
                report,
                self.output,
                images=lambda name: image_module.read_rgb(
                    self.records[name], max_size=960, upright=False
                ),
                scene=scene_view(loaded[0]) if loaded else None,
                pair_matches=self._pair_matches,
            )
        except OSError as error:  # the model is worth more than its report
            logger.warning("The report could not be written: %s", error)
        self.report = report

    def _pair_matches(self, a: str, b: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates of a pair's matches in both images, and whether each is an inlier."""
        rows = rows_from_matches0(self.matches.get(pair_name((a, b)))[0]["matches0"])
        good = colmap.inlier_matches(self.output / "database.db", [(a, b)])[0]
        one = np.array([1 << 32, 1], dtype=np.uint64)
        inlier = np.isin(rows.astype(np.uint64) @ one, good.astype(np.uint64) @ one)
        return self.keypoints[a][rows[:, 0]], self.keypoints[b][rows[:, 1]], inlier

    def _tell_kept(self) -> None:
        """Say how much is kept for later runs, or remove what this one did not use."""
        stores = self._stores()
        if self.options.prune:
            removed = sum(store.prune() for store in stores)
            logger.info("Removed %d entries that this run did not use", removed)
        unused = sum(store.unused() for store in stores)
        caches = [*(store.cache_file for store in stores), self.geometries.path]
        size = sum(path.stat().st_size for path in caches if path.exists())
        logger.info(
            "Kept for later runs: %.0f MB (*.cache)%s",
            size / 1e6,
            f", {unused} entries of other settings or images (--prune removes them)"
            if unused
            else "",
        )


def _file_stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
