"""From an image folder to a COLMAP model: the order of the steps, their files, and resuming.

scan -> encode (once per image) -> pairs -> match (per pair) -> database and verification -> map ->
export -> report. Every step leaves complete files only; each is reused when what it was made from
has not changed, so that the same command continues where an earlier one stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from tqdm import tqdm

from gim_hloc import __version__, colmap, engine, matchers
from gim_hloc import images as image_module
from gim_hloc import poses as pose_module
from gim_hloc.errors import GimError, InputError, MappingError, some
from gim_hloc.export import export_model
from gim_hloc.files import write_atomic
from gim_hloc.masks import MaskFolder
from gim_hloc.matchers.base import Encoding, Matcher, Matches, SparseEncoding
from gim_hloc.matchers.common import parse_matcher_options
from gim_hloc.options import CameraOptions, PoseUse, VerifyOptions, replace, to_mapping
from gim_hloc.pairs.files import read_pairs, write_pairs
from gim_hloc.pairs.retrieval import Lazy
from gim_hloc.pairs.select import plan, select
from gim_hloc.pipelines import linking, turns
from gim_hloc.pipelines.extension import Extension, gather
from gim_hloc.pipelines.imported import ImportedMatcher
from gim_hloc.pipelines.options import ReconstructOptions
from gim_hloc.pipelines.outcome import build_report, confidence_sums, scene_view, versions
from gim_hloc.pipelines.report import write_report
from gim_hloc.poses import radius
from gim_hloc.schedule import EncodingPool, encoding_bytes, memory_budget, order_pairs
from gim_hloc.store import (
    H5Store,
    OutputLock,
    cache_path,
    digest,
    encoding_from_arrays,
    encoding_to_arrays,
    matches_to_arrays,
    pair_keys,
    refuse_foreign,
    remove_cache,
    rows_from_matches0,
    scored_rows,
)

if TYPE_CHECKING:
    from gim_hloc.colmap import CameraSpec, MapJob, PairVerification, Refined
    from gim_hloc.images import ImageSet
    from gim_hloc.pairs.select import Selection
    from gim_hloc.poses import KnownPoses

logger = logging.getLogger(__name__)

Pair = tuple[str, str]

# Raised when the meaning of a stored array changes, so that older files are not reused.
FORMAT = 1


@dataclass(kw_only=True)
class ReconstructResult:
    """What a reconstruction left.

    Attributes:
        output: folder of the run.
        models: folders of COLMAP models, largest first; empty for a dry run.
        report: the content of report.json.
        estimate: what was printed before the long work.
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
        WeightsError: the matcher's weights are missing.
        LockedError: another run holds the folder.
        MappingError: no model came out; features, matches, database and report are kept.
    """
    options = with_overrides(options or ReconstructOptions(), overrides)
    return _Run(Path(images), Path(output), options, progress=progress).run()


def with_overrides(options: ReconstructOptions, overrides: Mapping[str, Any]) -> ReconstructOptions:
    """Replace single fields, those of the camera options included; unknown ones are errors."""
    names = {f.name for f in dataclasses.fields(CameraOptions)}
    own = {name: value for name, value in overrides.items() if name not in names}
    camera = {name: value for name, value in overrides.items() if name in names}
    options = replace(options, own)
    return replace(options, {"cameras": replace(options.cameras, camera)})


class _Run:
    """One reconstruction: its inputs, its files and what it has learnt so far."""

    def __init__(
        self, images: Path, output: Path, options: ReconstructOptions, *, progress: bool
    ) -> None:
        self.root = images
        self.output = output
        self.options = options
        self.progress = progress
        self.timings: dict[str, float] = {}
        self.notes: list[str] = []
        self.stages: dict[str, str] = {}
        self._file_hashes: dict[str, str] = {}
        self.turns: dict[str, int] = {}  # image -> quarter turns clockwise to show it upright
        self._map_notes: list[str] = []  # kept, so that a reused model tells them again
        self._left_model: dict[str, str] = {}  # image -> why it left a model; kept likewise
        self._intrinsics: list[dict[int, dict[str, Any]]] = []  # of each model's cameras; likewise
        self._turns_decided = False
        self._turn_rounds = 0
        self._encoded: set[str] = set()  # in this run, not reused
        self.features: H5Store
        self.matches: H5Store
        self.known: KnownPoses | None = None
        self.base: Extension | None = None  # the run whose model is extended
        self.added: list[str] = []  # images that are new to it
        self.pair_options_model = options.pair.model
        self._estimated: dict[str, Any] = {}  # by the first pair of a matcher without keypoints
        self._dense_encodings = 0  # images encoded by a matcher without keypoints, in this run
        self._matched: set[Pair] = set()

    # ------------------------------------------------------------------------------------ order

    def run(self) -> ReconstructResult:
        watch = engine.Stopwatch()
        self._check_folders()
        self._check_options()
        if self.options.extend is not None:
            self.base = Extension(self.options.extend)
            self.options = self.base.options(self.options)
        options = self.options
        with self._timed("scan"):
            self.image_set: ImageSet = image_module.scan(
                self.root,
                min_size=options.min_image_size,
                exclude=[
                    self.output,
                    *(folder for folder in (options.masks, options.extend) if folder is not None),
                ],
                progress=self.progress,
            )
            if self.base is not None:
                image_module.require_usable(self.image_set, 1)
                self.image_set, self.added = self.base.images(self.image_set)
            image_module.require_usable(self.image_set)
        self._take_images()
        for rejected in self.image_set.rejected:
            logger.warning("Left out: %s (%s: %s)", rejected.name, rejected.reason, rejected.detail)
        self._read_poses()
        self.masks = self._masks()

        # Everything that can be wrong with the options is found before the long work.
        self.cameras, camera_notes = self._assign_cameras()
        self.notes += camera_notes
        self.pair_options = dataclasses.replace(
            options.pair,
            mode=options.pairs if options.pairs != "auto" else options.pair.mode,
            seed=options.seed,
            model=self.pair_options_model,
        )
        self.plan = plan(self.pair_options, self.names)
        self.matcher: Matcher = (
            ImportedMatcher(options.features, options.matches)
            if options.features is not None and options.matches is not None
            else matchers.load(
                options.matcher,
                quality=options.quality,
                device=options.device,
                **self._matcher_overrides(),
            )
        )
        self.imported = isinstance(self.matcher, ImportedMatcher)
        # Matchers without keypoints of their own are read at those of another one.
        self.linked = self.matcher.info.kind != "sparse"
        self.describer: Matcher = self._load_describer() if self.linked else self.matcher
        logger.info(
            "%d images, %d camera%s, matcher %s (%s) on %s",
            len(self.names),
            len(self.cameras),
            "" if len(self.cameras) == 1 else "s",
            self.matcher.info.name,
            options.quality,
            self.matcher.device,
        )
        if options.refine_warps and self.matcher.info.kind != "dense":
            raise InputError(
                f"--refine-warps needs a dense matcher; {self.matcher.info.name} has no warps."
            )
        logger.info("Pairs: %s (%s)", self.plan.mode, self.plan.why)
        self._prepare_keys()
        if self.base is not None:
            stored = self.base.map.sources
            changed = [n for n in stored if n in self.records and not self._is_source(n, stored[n])]
            if changed:
                raise InputError(
                    f"{len(changed)} images of the map (or their masks) have changed since it was "
                    f"made: {some(changed)}. Reconstruct anew."
                )
        if options.dry_run and self.imported:
            raise InputError("--dry-run estimates matching, and --features leaves none to be done.")
        if options.dry_run:
            estimate = self._estimate_dry() if self.linked else self._estimate(store=False)
            return ReconstructResult(output=self.output, estimate=estimate)
        with OutputLock(self.output), self._log_file(), self._seeded():
            return self._locked_run(watch)

    def _locked_run(self, watch: engine.Stopwatch) -> ReconstructResult:
        if self.options.overwrite:
            self._clear()
        if self.base is not None:
            self.base.seed(self.output, linked=self.linked)
            if self.base.map.images != self.root:
                self.root = self.output / "images"
                gather(list(self.records.values()), self.root)
        self.state = self._read_state()
        self.turns = self._read_turns()
        self._open_stores()
        try:
            self._tell_changes()
            # Without keypoints the first pair serves as the estimate, in _match_linked.
            estimate = {} if self.linked or self.imported else self._estimate(store=True)
            selection = self._import() if self.imported else self._encode_and_match()
            verified = self._database(selection.pairs)
            self._pairs = selection.pairs
            failure, models = self._map(verified)
            report = self._report(selection, verified, models, watch, failure)
        finally:
            for store in self._stores():
                store.close()
        return ReconstructResult(
            output=self.output, models=models, report=report, estimate=estimate or self._estimated
        )

    def _encode_and_match(self) -> Selection:
        self._encode()
        selection = self._select_pairs()
        self._match(selection.pairs)
        while self._turn_images(selection.pairs):
            self._encode()
            if self.plan.needs_descriptors:  # similarity was judged by the unturned ones
                selection = self._select_pairs()
            self._match(selection.pairs)
        self._tell_turns()
        if self.linked:
            self._link(selection.pairs)
        return selection

    # ------------------------------------------------------------------ known poses, hloc's files

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
        if options.extend is not None and (options.model is not None or given):
            raise InputError("--extend goes without --model, --features and --matches.")
        if options.poses != "fixed" and options.model is None and options.extend is None:
            raise InputError(f"--poses {options.poses} needs known poses: --model POSES.")
        if options.poses == "prior":
            if options.extend is not None:
                raise InputError("--extend keeps the poses (--poses fixed) or moves them (refine).")
            if options.mapper not in ("incremental", "auto"):
                raise InputError("--poses prior works with COLMAP's incremental mapper only.")

    def _take_images(self) -> None:
        self.records = {record.name: record for record in self.image_set.images}
        self.names = list(self.records)

    def _read_poses(self) -> None:
        """Read known poses and say which images have none."""
        if self.base is not None:
            self.known = self.base.poses(
                list(self.records.values()), intrinsics=self.options.cameras.intrinsics
            )
            logger.info("%d new images for a model of %d", len(self.added), len(self.known.poses))
            self.pair_options_model = self.pair_options_model or self.base.map.model_folder
            return
        path = self.options.model
        if path is None:
            return
        self.known = pose_module.read_poses(
            path, self.names, {name: record.size for name, record in self.records.items()}
        )
        self.notes += self.known.notes
        logger.info("Known poses: %d of %d images", len(self.known.poses), len(self.names))
        for note in self.known.notes:
            logger.info("%s", note)
        missing = [name for name in self.names if name not in self.known.poses]
        if missing and self.options.missing_poses == "leave-out":
            self._leave_out(missing, f"no pose in {path}")
        elif missing and self.options.poses != "prior":
            self._note(
                f"{len(missing)} images have no pose in {path} and are registered by the mapper "
                f"afterwards: {some(missing)}."
            )
        elif missing:
            self._note(f"{len(missing)} images have no pose in {path}: {some(missing)}.")
        if len(self.known.poses) < 2:
            raise InputError(f"{path} has a pose of one image only; two are needed.")
        if not pose_module.radius(self.known.centres().values()) > 0:
            raise InputError(f"{path}: all cameras are in one place; nothing can be triangulated.")
        if (
            self.pair_options_model is None
            and path.is_dir()
            and not (path / "transforms.json").is_file()
        ):
            self.pair_options_model = path

    def _note(self, sentence: str) -> None:
        logger.warning("%s", sentence)
        self.notes.append(sentence)

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
        self._note(f"{len(names)} images are left out ({detail}): {some(names)}.")
        image_module.require_usable(self.image_set)
        self._take_images()

    def _poses_if(self, *uses: PoseUse) -> dict[str, Any] | None:
        """Known poses when they are used in one of these ways."""
        if self.known is None or self.options.poses not in uses:
            return None
        return {name: pose for name, pose in self.known.poses.items() if name in self.records}

    def _poses_key(self) -> Any:
        """What stands for the known poses in the keys of stages."""
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

    def _import(self) -> Selection:
        """Take keypoints and matches over from hloc's files."""
        matcher = self.matcher
        if not isinstance(matcher, ImportedMatcher):
            raise TypeError("only for imported files")
        selection = self._select_pairs()
        with self._timed("import"), self._bar(len(selection.pairs), "Import", "pairs") as bar:
            notes = matcher.take_over(
                self.records, selection.pairs, self.features, self.matches, bar.update
            )
        for note in notes:
            self._note(note)
        self.keypoints = {name: self.features.get(name)[0]["keypoints"] for name in self.names}
        logger.info(
            "Imported %.0f keypoints an image, %d pairs",
            np.mean([len(k) for k in self.keypoints.values()]),
            len(selection.pairs),
        )
        return selection

    # ---------------------------------------------------------------------------------- helpers

    def _check_folders(self) -> None:
        if not self.root.is_dir():
            raise InputError(f"There is no image folder {self.root}.")
        output, root = self.output.resolve(), self.root.resolve()
        if output == root:
            raise InputError(f"The output folder must not be the image folder ({self.root}).")
        if self.options.extend is not None and output == self.options.extend.resolve():
            raise InputError(
                f"--extend {self.options.extend} is not changed: give another folder for OUTPUT."
            )
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"{self.output} is a file; give a folder for the output.")
        refuse_foreign(self.output, other="poses.h5")

    def _matcher_overrides(self) -> dict[str, Any]:
        overrides = parse_matcher_options(self.options.matcher_options)
        for name in ("max_size", "max_keypoints"):
            value = getattr(self.options, name)
            if value is not None:
                overrides[name] = value
        if matchers.describe(self.options.matcher).kind != "sparse":
            overrides.pop("max_keypoints", None)  # of the anchors, see _load_describer
        return overrides

    def _load_describer(self) -> Matcher:
        name = linking.choose_describer(self.options.anchors)
        overrides: dict[str, Any] = {}
        if self.options.max_keypoints is not None:
            overrides["max_keypoints"] = self.options.max_keypoints
        describer = matchers.load(
            name, quality=self.options.quality, device=self.options.device, **overrides
        )
        if describer.info.kind != "sparse":
            raise InputError(f"{name} has no keypoints; choose a sparse matcher for the anchors.")
        if self.options.anchors == "auto" and name != "aliked_lightglue":
            self.notes.append(f"The weights of aliked_lightglue are missing: anchors are {name}'s.")
        return describer

    def _open_stores(self) -> None:
        # What an extension starts from was put there after the old content was removed.
        overwrite = self.options.overwrite and self.base is None
        self.features = H5Store(
            self.output / "features.h5", self.feature_settings, overwrite=overwrite
        )
        self.matches = H5Store(
            self.output / "matches.h5",
            self.match_settings,
            key_of=self.match_keys,
            overwrite=overwrite,
        )
        self.described, self.readings = self.features, self.matches
        if self.linked:
            self.described = H5Store(
                self.output / "anchors.h5", self.anchor_settings, overwrite=overwrite
            )
            self.readings = H5Store(
                self.output / "readings.h5",
                self.reading_settings,
                key_of=self.match_keys,
                overwrite=overwrite,
            )

    def _stores(self) -> list[H5Store]:
        return list(dict.fromkeys((self.features, self.matches, self.described, self.readings)))

    def _assign_cameras(self) -> tuple[list[CameraSpec], list[str]]:
        colmap.camera_param_count(self.options.cameras.camera_model)  # an unknown name is an error
        known = None
        if self.known is not None and (
            self.options.cameras.intrinsics is None or self.base is not None
        ):
            known = self.known.cameras
        cameras, notes = colmap.assign_cameras(
            list(self.records.values()), self.options.cameras, known
        )
        guessed = [spec for spec in cameras if not spec.given]
        if self.known is not None and guessed and self.options.poses == "fixed":
            notes.append(
                "The poses are known but not the intrinsics, which are guessed"
                + (" from EXIF" if all(spec.prior for spec in guessed) else "")
                + f" for {sum(len(spec.names) for spec in guessed)} images and not refined with "
                "fixed poses: give --intrinsics, or --poses refine."
            )
        for note in notes:
            logger.warning("%s", note)
        return cameras, notes

    def _masks(self) -> MaskFolder | None:
        if self.options.masks is None:
            return None

        masks = MaskFolder(
            self.options.masks, erode_px=self.options.mask_erode, image_root=self.root
        )
        for warning in masks.check(self.names):
            logger.warning("%s", warning)
            self.notes.append(warning)
        return masks

    def _prepare_keys(self) -> None:
        """Settings and sources that decide what of an earlier run is reused."""
        matcher: Any = self.matcher
        describer: Any = self.describer
        self.feature_settings: dict[str, Any] = {
            "format": FORMAT,
            **{f"encode.{k}": v for k, v in describer.encode_settings().items()},
        }
        if self.masks is not None:
            self.feature_settings["mask_erode"] = self.options.mask_erode
        self.match_settings: dict[str, Any] = {
            **self.feature_settings,
            **{f"match.{k}": v for k, v in matcher.match_settings().items()},
        }
        if self.linked:
            tracks = dataclasses.asdict(
                self.options.anchored
                if self.options.tracks == "anchored"
                else self.options.quantized
            )
            self.anchor_settings = self.feature_settings
            self.reading_settings = {
                **self.match_settings,
                **{f"warp.{k}": v for k, v in matcher.encode_settings().items()},
                "tracks": self.options.tracks,
                **{f"tracks.{k}": v for k, v in tracks.items()},
            }
            self.feature_settings = self.match_settings = self.reading_settings
        keys = pair_keys(self.names)
        escaped = [name for name in self.names if keys[name] != name.replace("/", "-")]
        if escaped:
            self.notes.append(
                "hloc's key of a pair writes / as -, which makes some of your names collide; "
                f"those pairs are stored under escaped keys that hloc cannot read ({escaped[0]})."
            )
        self.match_keys = lambda name: "/".join(keys[n] for n in name.split("\t"))
        self.workers = self.options.workers or engine.default_workers(
            self.matcher.device, self.options.deterministic
        )
        self.batch = self.options.batch_size or (16 if self.matcher.device.type != "cpu" else 1)

    def _source(self, name: str) -> str:
        """Hash of what an image's features are made from: file, mask and turn."""
        if name not in self._file_hashes:
            mask = self.masks.sha(name) if self.masks else None
            self._file_hashes[name] = digest([self.records[name].sha256, mask])
        turn = self.turns.get(name, 0)
        return f"{self._file_hashes[name]}/{90 * turn}" if turn else self._file_hashes[name]

    def _is_source(self, name: str, stored: str) -> bool:
        """Whether features that an earlier run stored are of this image, turned or not."""
        return stored.split("/")[0] == self._source(name).split("/")[0]

    def _clear(self) -> None:
        """Remove what an earlier run wrote, and nothing else."""
        for name in ("sparse", "sparse.tmp", "export", "dense", "logs"):
            shutil.rmtree(self.output / name, ignore_errors=True)
        for name in (
            "run.yaml", "pairs.txt", "features.h5", "matches.h5", "anchors.h5", "readings.h5",
            "database.db", "report.html", "report.json", "turns.json",
        ):  # fmt: skip
            (self.output / name).unlink(missing_ok=True)
            if name.endswith(".h5"):
                remove_cache(cache_path(self.output / name))

    def _read_state(self) -> dict[str, Any]:
        path = self.output / "run.yaml"
        try:
            state = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
            return state if isinstance(state, dict) else {}
        except (OSError, yaml.YAMLError):
            logger.warning("%s cannot be read; mapping is done again.", path)
            return {}

    def _write_state(self) -> None:
        state = {
            "gim_hloc": __version__,
            "images": str(self.root.resolve()),
            "options": to_mapping(self.options),
            "matcher": to_mapping(self.matcher.options),
            "weights": dict(self.matcher.weights_hashes),
            "versions": versions(),
            "stages": {**self.state.get("stages", {}), **self.stages},
            "timings": {k: round(v, 3) for k, v in self.timings.items()},
            "map_notes": self._map_notes,
            "left_model": self._left_model,
            "intrinsics": self._intrinsics,
        }
        write_atomic(self.output / "run.yaml", yaml.safe_dump(state, sort_keys=False))

    def _stage_done(self, stage: str, key: str) -> bool:
        return bool(self.state.get("stages", {}).get(stage) == key)

    def _tell_changes(self) -> None:
        for store, what in ((self.described, "Features"), (self.readings, "Matches")):
            if store.changed_settings:
                logger.info(
                    "%s of the earlier run are not reused: %s changed.",
                    what,
                    ", ".join(store.changed_settings),
                )

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        watch = engine.Stopwatch()
        try:
            yield
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + watch.seconds

    @contextlib.contextmanager
    def _log_file(self) -> Iterator[None]:
        """Append everything, single pairs included, to OUTPUT/log.txt."""
        # Emptied here, not in ``_clear``: by then it is open, and would be written to unseen.
        mode = "w" if self.options.overwrite else "a"
        handler = logging.FileHandler(self.output / "log.txt", mode, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        package = logging.getLogger("gim_hloc")
        level = package.level
        package.addHandler(handler)
        package.setLevel(logging.DEBUG)
        logger.debug("run started: process %d, %s", os.getpid(), " ".join(sys.argv))
        try:
            yield
        except GimError as error:
            logger.debug("run stopped: %s", error)
            raise
        finally:
            package.removeHandler(handler)
            package.setLevel(level)
            handler.close()

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

    def _bar(self, total: int | None, title: str, unit: str, done: int = 0) -> Any:
        return tqdm(
            total=total,
            initial=done,
            desc=f"{title:<8}",
            unit=f" {unit}",
            disable=not self.progress,
            dynamic_ncols=True,
            leave=True,
        )

    # ----------------------------------------------------------------------------------- encode

    def _read_image(self, name: str, turn: int | None = None, *, dense: bool = False) -> Any:
        record = self.records[name]
        mask = self.masks.load(record) if self.masks is not None else None
        shown = image_module.turned(record, self.turns.get(name, 0) if turn is None else turn)
        wanted = self.matcher if dense else self.describer
        return image_module.load(shown, wanted.image_options, mask=mask)

    def _put_encoding(self, name: str, encoding: Encoding) -> None:
        if not isinstance(encoding, SparseEncoding):
            raise InputError(f"The encodings of {self.describer.info.name} hold no keypoints.")
        arrays, attributes = encoding_to_arrays(encoding)
        self.described.put(name, arrays, self._source(name), **attributes)
        self._encoded.add(name)
        logger.debug("encoded %s: %d keypoints", name, len(encoding))

    def _get_encoding(self, name: str) -> SparseEncoding:
        arrays, attributes = self.described.get(name)
        return encoding_from_arrays(name, arrays, attributes)

    def _encode(self) -> None:
        todo = [n for n in self.names if not self.described.has(n, self._source(n))]
        with (
            self._timed("encode"),
            self._bar(len(self.names), "Encode", "images", len(self.names) - len(todo)) as bar,
        ):

            def done(name: str, encoding: Encoding) -> None:
                self._put_encoding(name, encoding)
                bar.update()

            engine.encode_images(self.describer, todo, self._read_image, done, workers=self.workers)
            self.described.finalize(self.names, {"matcher": self.describer.info.name})
        self.keypoints = {name: self.described.get(name)[0]["keypoints"] for name in self.names}
        total = sum(len(k) for k in self.keypoints.values())
        logger.info(
            "Encoded %d images (%d reused), %.0f keypoints an image",
            len(self._encoded),
            len(self.names) - len(self._encoded),
            total / len(self.names),
        )

    # ------------------------------------------------------------------------------------ pairs

    def _select_pairs(self) -> Selection:
        def local_descriptors() -> Lazy:
            return Lazy(self.names, lambda name: self.described.get(name)[0]["descriptors"].T)

        with self._timed("pairs"):
            selection = select(
                self.pair_options,
                self.names,
                local_descriptors=local_descriptors,
                gps={name: record.exif.gps for name, record in self.records.items()},
                load_image=self._read_image,
                left_out=[rejected.name for rejected in self.image_set.rejected],
            )
            if self.base is not None:
                selection = dataclasses.replace(
                    selection, pairs=self._extended_pairs(selection.pairs)
                )
            write_pairs(self.output / "pairs.txt", selection.pairs)
        self.notes += selection.notes
        return selection

    def _extended_pairs(self, chosen: Sequence[Pair]) -> list[Pair]:
        """The map's pairs, and of the chosen ones those with a new image."""
        old: list[Pair] = []
        if self.base is not None and (self.base.folder / "pairs.txt").is_file():
            left_out = [rejected.name for rejected in self.image_set.rejected]
            old = read_pairs(self.base.folder / "pairs.txt", self.names, skip=left_out)
        added = set(self.added)
        return sorted({*old, *(p for p in chosen if p[0] in added or p[1] in added)})

    # ------------------------------------------------------------------------------------ match

    def _pair_source(self, pair: Pair) -> str:
        return digest([self._source(pair[0]), self._source(pair[1])])

    def _put_matches(self, pair: Pair, matches: Matches) -> None:
        arrays = matches_to_arrays(matches, len(self._cache.get(pair[0])))  # type: ignore[arg-type]
        self.matches.put(_pair_name(pair), arrays, self._pair_source(pair))
        self._matched.add(pair)
        logger.debug("matched %s | %s: %d matches", *pair, len(matches))

    def _match(self, pairs: Sequence[Pair]) -> None:
        todo = [p for p in pairs if not self.readings.has(_pair_name(p), self._pair_source(p))]
        logger.debug("to match: %d of %d pairs", len(todo), len(pairs))
        self._cache = engine.EncodingCache(self._get_encoding)
        with (
            self._timed("match"),
            self._bar(len(pairs), "Match", "pairs", len(pairs) - len(todo)) as bar,
        ):
            if self.linked:
                self._match_linked(todo, bar.update)
                todo = []

            def done(pair: Pair, matches: Matches) -> None:
                self._put_matches(pair, matches)
                bar.update()

            engine.match_pairs(
                self.matcher,
                todo,
                self._cache.get,
                done,
                workers=self.workers,
                batch_size=self.batch,
            )
            self.readings.finalize(
                [_pair_name(p) for p in pairs], {"matcher": self.matcher.info.name}
            )
        logger.info(
            "Matched %d pairs (%d reused) in %.1f s",
            len(self._matched.intersection(pairs)),
            len(set(pairs) - self._matched),
            self.timings["match"],
        )

    # -------------------------------------------------------------------------------------- link

    def _anchors_of(self, names: Sequence[str]) -> dict[str, Any]:
        found = {}
        for name in names:
            arrays, _ = self.described.get(name)
            record = self.records[name]
            found[name] = linking.make_anchors(
                record.size,
                arrays["keypoints"],
                arrays["scores"],
                self.masks.load(record) if self.masks is not None else None,
                self.options.anchored,
            )
        return found

    def _match_linked(self, todo: Sequence[Pair], update: Any) -> None:
        """Match pairs of a matcher without keypoints and read the result at the anchors."""
        if not todo:
            return
        anchors = {}
        if self.options.tracks == "anchored":
            anchors = self._anchors_of(sorted({name for pair in todo for name in pair}))
        read = linking.reader(self.matcher, self.options.tracks, anchors, self.options.anchored)
        seconds: list[float] = []  # of pairs
        watch = engine.Stopwatch()

        def work(encodings: list[tuple[Any, Any]]) -> list[dict[str, np.ndarray]]:
            start = watch.seconds
            found = read(encodings)
            seconds.append((watch.seconds - start) / len(encodings))
            return found

        def done(pair: Pair, arrays: dict[str, np.ndarray]) -> None:
            if not self._matched:
                first = max(0.0, watch.seconds - seconds[0]) / 2
                self._estimated = self._estimate_linked(len(todo), seconds[0], first)
            self.readings.put(_pair_name(pair), arrays, self._pair_source(pair))
            self._matched.add(pair)
            logger.debug("matched %s | %s: %d matches", *pair, linking.count(arrays))
            update()

        report = engine.match_scheduled(
            self.matcher,
            todo,
            lambda name: self._read_image(name, dense=True),
            work,
            done,
            cache_gb=self.options.cache_gb,
            batch_size=self.batch,
            workers=self.workers if self.matcher.info.kind == "semidense" else 1,
        )
        self.notes += report.notes
        self._dense_encodings += len(report.encoded)
        logger.info(
            "Encoded %d images %d times for %d pairs (%d encodings fit in memory)",
            len(set(report.encoded)),
            len(report.encoded),
            len(todo),
            report.capacity,
        )

    def _link(self, pairs: Sequence[Pair]) -> None:
        """Link the readings of all pairs into tracks: keypoints and matches of every image."""
        source = digest([[_pair_name(p), self._pair_source(p)] for p in pairs])
        names = [_pair_name(p) for p in pairs]
        reused = all(self.features.has(n, source) for n in self.names) and all(
            self.matches.has(n, source) for n in names
        )
        with self._timed("link"):
            if not reused:
                with self._bar(len(pairs), "Link", "pairs") as bar:
                    tracks = linking.link(
                        self.names,
                        lambda: self._anchors_of(self.names),
                        pairs,
                        lambda pair: self.readings.get(_pair_name(pair))[0],
                        self.options.tracks,
                        anchored=self.options.anchored,
                        quantized=self.options.quantized,
                        progress=bar.update,
                    )
                for name in self.names:
                    arrays = {
                        "keypoints": tracks.keypoints[name],
                        "image_size": np.array(self.records[name].size, dtype=np.int64),
                    }
                    self.features.put(name, arrays, source)
                for pair, name in zip(pairs, names, strict=True):
                    arrays = linking.matches_arrays(tracks, pair)
                    self.matches.put(name, arrays, source)
            attributes = {"matcher": self.matcher.info.name, "tracks": self.options.tracks}
            # Linking is quick, and every other list of pairs gives other tracks: none are kept.
            self.features.finalize(self.names, attributes, keep=False)
            self.matches.finalize(names, attributes, keep=False)
        self.keypoints = {name: self.features.get(name)[0]["keypoints"] for name in self.names}
        logger.info(
            "Linked into %.0f keypoints an image (%s tracks)",
            np.mean([len(k) for k in self.keypoints.values()]),
            self.options.tracks,
        )

    # ------------------------------------------------------------------------------------ turns

    def _turns_key(self) -> str:
        """What a decision about turns rests on; with the same, it is not made again."""
        return digest([self.match_settings, sorted(r.sha256 for r in self.records.values())])

    def _read_turns(self) -> dict[str, int]:
        path = self.output / "turns.json"
        if self.options.rotations == "none":
            return {}
        try:
            stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if stored.get("settings") != digest(self.match_settings):
                return {}
            self._turns_decided = stored["key"] == self._turns_key()
            hashes = stored["images"]
            return {
                name: int(entry["quarter_turns"])
                for name, entry in hashes.items()
                if name in self.records and entry["sha256"] == self.records[name].sha256
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            logger.warning("%s cannot be read; turns are looked for again.", path)
            return {}

    def _write_turns(self, *, decided: bool) -> None:
        content = {
            "settings": digest(self.match_settings),
            "key": self._turns_key() if decided else None,
            "images": {
                name: {"quarter_turns": turn, "sha256": self.records[name].sha256}
                for name, turn in sorted(self.turns.items())
            },
        }
        write_atomic(self.output / "turns.json", json.dumps(content, indent=1, ensure_ascii=False))

    def _turn_images(self, pairs: Sequence[Pair]) -> bool:
        """Look for images that are stored turned (see ``turns``); True when there are new ones."""
        # Which way up an image fits is judged with the describer's matches, whatever the matcher.
        if self.options.rotations == "none" or self.describer.info.rotation_invariant:
            return False
        if self._turns_decided or self._turn_rounds >= 3:
            return False
        self._turn_rounds += 1
        with self._timed("match"):
            found = self._find_turns(pairs)
        for name, turn in found.items():
            self.turns[name] = (self.turns.get(name, 0) + turn) % 4
        self._turns_decided = not found
        self._write_turns(decided=not found)
        return bool(found)

    def _find_turns(self, pairs: Sequence[Pair]) -> dict[str, int]:
        matcher = self.describer
        bound = matcher.info.min_confidence_sum.get(self.options.quality)
        sums = {pair: linking.confidence(self.readings.get(_pair_name(pair))[0]) for pair in pairs}
        groups = turns.weak_groups(
            self.names, sums, {name: len(k) for name, k in self.keypoints.items()}, bound
        )

        def confidence(name: str, turn: int, others: Sequence[str]) -> float:
            shown = self._read_image(name, (self.turns.get(name, 0) + turn) % 4)
            encoding = matcher.encode(shown)
            return sum(
                float(matcher.match(encoding, self._cache.get(o)).scores.sum()) for o in others
            )

        found: dict[str, int] = {}
        with self._bar(len(groups), "Turn", "groups") as bar:
            for group in groups:
                turn = turns.best_turn(group, confidence, bound)
                found.update(dict.fromkeys(group.members, turn) if turn else {})
                bar.update()
        return found

    def _tell_turns(self) -> None:
        if self.turns:
            listed = some([f"{n} by {90 * t}" for n, t in sorted(self.turns.items())], 8)
            self.notes.append(
                f"{len(self.turns)} images are stored turned without EXIF saying so and were "
                f"matched upright (degrees clockwise): {listed}. Poses and "
                "keypoints are those of the stored files."
            )
            logger.info("%s", self.notes[-1])

    # --------------------------------------------------------------------------------- estimate

    def _estimate(self, *, store: bool) -> dict[str, Any]:
        """Time a few images and pairs and tell what the whole will take, before it is begun.

        What is computed for it is kept (``store``), so that the estimate costs nothing.
        """
        import torch

        count = len(self.names)
        pairs, exact = self._expected_pairs(count)
        stored = [n for n in self.names if self.features.has(n, self._source(n))] if store else []
        known = set(stored)
        sample = [n for n in self.names if n not in known][: max(3, 2 * self.workers)]
        encodings: dict[str, Encoding] = {}

        def keep(name: str, encoding: Encoding) -> None:
            encodings[name] = encoding
            if store:
                self._put_encoding(name, encoding)

        encode_watch = engine.Stopwatch()
        engine.encode_images(self.matcher, sample, self._read_image, keep, workers=self.workers)
        encode_seconds = encode_watch.seconds
        self.timings["encode"] = encode_seconds

        self._cache = engine.EncodingCache(self._get_encoding if store else encodings.__getitem__)
        near = (stored + sample)[-(max(3, 2 * self.workers)) :]
        trial = [(a, b) if a < b else (b, a) for a, b in itertools.combinations(near, 2)]
        if store:
            trial = [p for p in trial if not self.matches.has(_pair_name(p), self._pair_source(p))]
        planned = self._known_pairs()
        if planned is not None:  # pairs outside the list would be matched for nothing
            trial = [p for p in trial if p in planned]
        elif store and not exact:
            untried = set(trial)
            trial = [p for p in itertools.pairwise(near) if p in untried]
        if self.base is not None:  # the map's own pairs are settled
            trial = [p for p in trial if p[0] in self.added or p[1] in self.added]
        trial = trial[: 2 * self.workers * max(1, self.batch)]
        found: list[int] = []

        def count_matches(pair: Pair, matches: Matches) -> None:
            found.append(len(matches))
            if store:
                self._put_matches(pair, matches)

        match_watch = engine.Stopwatch()
        if trial:
            engine.match_pairs(
                self.matcher,
                trial,
                self._cache.get,
                count_matches,
                workers=self.workers,
                batch_size=self.batch,
            )
        match_seconds = match_watch.seconds
        self.timings["match"] = match_seconds

        per_image = encode_seconds / len(sample) if sample else 0.0
        per_pair = match_seconds / len(trial) if trial else 0.0
        left_images = count - len(stored) - len(sample)
        left_pairs = max(0, pairs - (self.matches.count() if store else len(trial)))
        size = sum(
            value.numel() * value.element_size()
            for e in encodings.values()
            for value in vars(e).values()
            if isinstance(value, torch.Tensor)
        )
        keypoints = [len(e) for e in encodings.values() if isinstance(e, SparseEncoding)]
        disk = _estimate_disk(
            count, pairs, size / max(1, len(encodings)), float(np.mean(keypoints or [0]))
        )
        seconds = per_image * left_images + per_pair * left_pairs
        estimate = {
            "images": count,
            "pairs": pairs,
            "pairs_exact": exact,
            "seconds_per_image": per_image,
            "seconds_per_pair": per_pair,
            "seconds": seconds,
            "disk_bytes": disk,
        }
        if store and exact and not sample and not left_pairs:
            logger.info("All %d images and %d pairs are there already.", count, pairs)
            return estimate
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
        free = shutil.disk_usage(_existing_parent(self.output)).free
        if disk > free:
            raise InputError(
                f"{self.output} needs about {disk / 1e9:.1f} GB but only {free / 1e9:.1f} GB are "
                "free there. Choose another folder, fewer keypoints or fewer pairs."
            )
        return estimate

    def _estimate_linked(self, pairs: int, per_pair: float, per_image: float) -> dict[str, Any]:
        """Tell what a matcher without keypoints will take, from its first pair."""
        seconds = per_pair * pairs + per_image * len(self.names)
        estimate = {
            "images": len(self.names),
            "pairs": pairs,
            "pairs_exact": not self.plan.needs_descriptors,
            "seconds_per_image": per_image,
            "seconds_per_pair": per_pair,
            "seconds": seconds,
        }
        logger.info(
            "Estimate: %d pairs; encoding %.1f s an image, matching %.1f s a pair, about %s until "
            "mapping",
            pairs,
            per_image,
            per_pair,
            _duration(seconds),
        )
        return estimate

    def _estimate_dry(self) -> dict[str, Any]:
        """Time two encodings and one pair of a matcher without keypoints."""
        watch = engine.Stopwatch()
        matcher = self.matcher
        a, b = (matcher.encode(self._read_image(n, dense=True)) for n in self.names[:2])
        per_image = watch.seconds / 2
        watch = engine.Stopwatch()
        matcher.match(a, b)
        pairs, _ = self._expected_pairs(len(self.names))
        return self._estimate_linked(pairs, watch.seconds, per_image)

    def _known_pairs(self) -> set[Pair] | None:
        """The pair list when it can be had without features."""
        if self.plan.needs_descriptors or self.plan.mode == "exhaustive":
            return None

        if not hasattr(self, "_pairs_known"):
            level = logging.getLogger("gim_hloc.pairs").level
            logging.getLogger("gim_hloc.pairs").setLevel(logging.ERROR)
            try:
                self._pairs_known = set(
                    select(
                        self.pair_options,
                        self.names,
                        gps={n: r.exif.gps for n, r in self.records.items()},
                        load_image=self._read_image,
                        left_out=[r.name for r in self.image_set.rejected],
                    ).pairs
                )
            finally:
                logging.getLogger("gim_hloc.pairs").setLevel(level)
        return self._pairs_known

    def _expected_pairs(self, count: int) -> tuple[int, bool]:
        """Number of pairs, and whether it is exact rather than an upper bound."""
        every = count * (count - 1) // 2
        if self.plan.mode == "exhaustive":
            return every, True
        known = self._known_pairs()
        if known is not None:
            return len(known), True
        bound = count * self.plan.neighbours
        if "sequential" in self.plan.components:
            steps = self.pair_options.window * (2 if self.pair_options.quadratic else 1)
            bound += count * steps
        return min(every, bound), False

    # --------------------------------------------------------------------------------- database

    def _verify_options(self) -> VerifyOptions:
        """The verification's numbers, with the matcher's own bound where the user set none."""
        verify = self.options.verify
        if verify.min_confidence_sum is None:
            own = self.matcher.info.min_confidence_sum.get(self.options.quality)
            verify = dataclasses.replace(verify, min_confidence_sum=own)
        return verify

    def _threads(self) -> int:
        return 1 if self.options.deterministic else engine.usable_cores()

    def _database(self, pairs: Sequence[Pair]) -> list[PairVerification]:
        path = self.output / "database.db"
        verify = self._verify_options()
        key = digest(
            {
                "matches": self.matches.stamp,
                "pairs": digest([[_pair_name(p), self._pair_source(p)] for p in pairs]),
                "cameras": [dataclasses.asdict(spec) for spec in self.cameras],
                "verify": dataclasses.asdict(verify),
                "seed": self.options.seed,
                "pycolmap": colmap.version(),
                "poses": self._poses_key(),
                "scale": self._scale(),
            }
        )
        self.stages["database"] = key
        prior = self._poses_if("prior")
        with self._timed("verify"):
            if self._stage_done("database", key) and colmap.database_ok(path, self.names, pairs):
                verified = colmap.read_verification(path, pairs)
                self.cameras = colmap.read_cameras(path, self.cameras)
                logger.info("Database reused: %s", path)
                self._tell_doubtful(verified)
                return verified

            def scored() -> Iterator[tuple[str, str, np.ndarray, np.ndarray | None]]:
                for a, b in pairs:
                    yield a, b, *scored_rows(self.matches.get(_pair_name((a, b)))[0])

            with self._bar(len(pairs), "Verify", "pairs") as bar:
                verified = colmap.build_database(
                    path,
                    cameras=self.cameras,
                    names=self.names,
                    keypoints=self.keypoints.__getitem__,
                    matches=scored(),
                    verify=verify,
                    seed=self.options.seed,
                    threads=self._threads(),
                    progress=bar.update,
                    poses=self._poses_if("fixed"),
                    priors={n: -r.T @ t for n, (r, t) in prior.items()} if prior else None,
                    prior_stddev=self._prior_stddev(),
                    scale=self._scale(),
                )
        self._judge_poses(verified)
        self.state.setdefault("stages", {}).pop("sparse", None)
        self._write_state()
        good = sum(v.inliers > 0 for v in verified)
        logger.info("Verified %d of %d pairs", good, len(pairs))
        self._tell_doubtful(verified)
        return verified

    def _tell_doubtful(self, verified: Sequence[PairVerification]) -> None:
        doubtful = sum(v.doubtful for v in verified)
        if doubtful:
            self._note(
                f"{doubtful} of {len(verified)} pairs had enough inliers but too little confidence "
                "and were left out, as pairs of unrelated places: a sum below "
                f"{self._verify_options().min_confidence_sum:g} (--verify.min-confidence-sum)."
            )

    def _confidence_meaning(self) -> str:
        """What the confidence of a match is, for the report."""
        if self.imported:
            said = "Confidences are those of the imported file, 1 where it has none."
        elif self.linked:
            said = f"Confidences are those of the {self.options.tracks} tracks' readings."
        else:
            said = f"Confidences are those that {self.matcher.info.name} gives its matches."
        if self._poses_if("fixed") is not None:
            said += " Pairs whose poses are known are judged by these alone."
        return said

    def _judge_poses(self, verified: Sequence[PairVerification]) -> None:
        """Warn when hardly a match agrees with fixed poses."""
        known = self._poses_if("fixed")
        if known is None:
            return
        pairs = [v for v in verified if v.name0 in known and v.name1 in known]
        matches, inliers = sum(v.matches for v in pairs), sum(v.inliers for v in pairs)
        if matches and inliers < 0.1 * matches:
            self._note(
                f"Only {inliers / matches:.1%} of the matches agree with the known poses. Are they "
                "those of these images (order of names), in the convention of their format, and do "
                "the intrinsics fit?"
            )

    # -------------------------------------------------------------------------------------- map

    def _map(self, verified: Sequence[PairVerification]) -> tuple[MappingError | None, list[Path]]:
        """Models of the verified pairs: mapped, improved, aligned, coloured and written."""
        self.mapper = self._mapper_name()
        self.stages["sparse"] = self._map_key()
        sparse = self.output / "sparse"
        if self._stage_done("sparse", self.stages["sparse"]) and (sparse / "0").is_dir():
            return None, self._reused_models(sparse)
        job = self._map_job()
        try:
            models = self._build(job, verified)
            job = dataclasses.replace(job, cameras=self.cameras)  # parted by zoom
            improved = self._improve(job, models)
            models = self._check(job, models)
            # Models may have been split: a part has the cameras of the whole.
            self._intrinsics = [
                next(rows for names, rows in improved if names >= set(colmap.poses_of(model)))
                for model in models
            ]
        except MappingError as error:
            shutil.rmtree(sparse, ignore_errors=True)
            self.stages.pop("sparse")
            return error, []
        with self._timed("map"):
            self._align(models)
            self._colour(models)
            paths = colmap.write_models(models, sparse)
        self.notes += self._map_notes
        return None, paths

    def _map_key(self) -> str:
        """What a stored model is reused for."""
        return digest(
            {
                "database": self.stages["database"],
                "map": dataclasses.asdict(self.options.map),
                "mapper": colmap.resolve_mapper(self.options.mapper, len(self.names)),
                "refine_intrinsics": self.options.cameras.refine_intrinsics,
                "refine": dataclasses.asdict(self.options.refine)
                if self.options.refine_keypoints
                else None,
                "warps": dataclasses.asdict(self.options.warps) if self._reads_again() else None,
                "threads": 1 if self.options.deterministic else "many",
                "poses": self._poses_key(),
            }
        )

    def _reused_models(self, sparse: Path) -> list[Path]:
        self._map_notes = list(self.state.get("map_notes", []))
        self._left_model = dict(self.state.get("left_model", {}))
        self._intrinsics = list(self.state.get("intrinsics", []))
        self.notes += self._map_notes
        logger.info("Model reused: %s", sparse)
        return sorted((p for p in sparse.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))

    def _map_job(self) -> MapJob:
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
            log_dir=self.output / "logs",
            # COLMAP takes one bound for all images: sizes that differ meet in the middle.
            stored_px=float(np.exp(-np.mean(np.log(list(self._scale().values()))))),
        )

    def _scale(self) -> dict[str, float]:
        """Pixels that keypoints were found at for a stored one, at most 1."""
        options = self.describer.image_options
        return {
            name: min(1.0, max(image_module.network_size(*r.upright_size, options)) / max(r.size))
            for name, r in self.records.items()
        }

    def _build(self, job: MapJob, verified: Sequence[PairVerification]) -> list[Any]:
        """COLMAP's models, largest first."""
        if not any(pair.inliers for pair in verified):
            raise self._nothing_matched(verified)
        with self._timed("map"), self._bar(len(self.names), "Map", "images") as bar:

            def registered(model: int, count: int) -> None:
                bar.set_postfix_str(f"model {model}", refresh=False)
                bar.n = count
                bar.refresh()

            job = dataclasses.replace(job, progress=registered)
            known = self._poses_if("fixed", "refine") is not None
            if known:
                mapped = colmap.triangulate_known(job)
                self._map_notes += mapped.notes
                return mapped.models
            grouped = colmap.map_scene(job, split=self.options.cameras.camera_mode == "auto")
        self.cameras = list(grouped.cameras)
        self._map_notes += grouped.notes
        return grouped.models

    def _improve(
        self, job: MapJob, models: Sequence[Any]
    ) -> list[tuple[set[str], dict[int, dict[str, Any]]]]:
        """What follows mapping: warps read again, patches compared, intrinsics settled.

        Returns:
            Images of each model, and what is known of its cameras by their ids.
        """
        improved: list[tuple[set[str], dict[int, dict[str, Any]]]] = []
        for index, model in enumerate(models):
            with colmap.colmap_log(job.log_dir):
                fixed = job.fixed | colmap.hold_undetermined(model, job)
                before = {camera["id"]: camera["params"] for camera in colmap.cameras_of(model)}
                if self._reads_again():
                    with self._timed("reread"):
                        sentence = self._refine_by_warps(model, fixed)
                    self._map_notes.append(f"The model was {sentence}.")
                    logger.info("Model %d: %s", index, sentence)
                refined = None
                if self.options.refine_keypoints:
                    with self._timed("refine"):
                        refined = self._refine_by_patches(model, fixed)
                    self._map_notes.append(f"The model was {refined.sentence}.")
                    logger.info("Model %d: %s", index, refined.sentence)
                with self._timed("map"):
                    robust_px = refined.robust_px if refined else None
                    notes, found = colmap.settle(model, job, before, robust_px)
                    rows = {} if self._held() else colmap.describe_intrinsics(model, job, found)
                    improved.append((set(colmap.poses_of(model)), rows))
                    # Afterwards: what patches did not confirm says little about intrinsics.
                    if refined is not None and refined.original is not None:
                        notes.append(colmap.give_back(model, refined, job.threads))
                for note in notes:
                    logger.info("Model %d: %s", index, note)
                    self._map_notes.append(f"Model {index}: {note}")
        return improved

    def _check(self, job: MapJob, models: Sequence[Any]) -> list[Any]:
        """What is left of models that known poses do not carry (see ``colmap.check_models``)."""
        if job.poses is not None:
            return list(models)
        with self._timed("check"):
            checked = colmap.check_models(models, min_model_size=job.options.min_model_size)
        for note in checked.notes:
            logger.warning("%s", note)
        self._map_notes += checked.notes
        self._left_model = checked.reasons
        if not checked.models:
            raise MappingError(
                " ".join(checked.notes)
                or "No model came out: what COLMAP built has hardly a point (see the images in "
                "the report). Is there parallax between the photographs (a camera that only turns "
                "has none), and enough overlap?"
            )
        return checked.models

    def _align(self, models: Sequence[Any]) -> None:
        """Put models that could move back into the world of the known poses."""
        known = self._poses_if("refine", "prior")
        if known is not None:
            for model in models:
                colmap.align(model, known)

    def _colour(self, models: Sequence[Any]) -> None:
        for model in models:
            colmap.extract_colours(
                model, lambda name: image_module.read_rgb(self.records[name], upright=False)
            )

    def _mapper_name(self) -> str:
        if self.known is not None:
            return f"known poses, {self.options.poses}"
        return colmap.resolve_mapper(self.options.mapper, len(self.names))

    def _held(self) -> set[str]:
        """Images whose poses must not move."""
        return set(self._poses_if("fixed") or ())

    def _nothing_matched(self, verified: Sequence[PairVerification]) -> MappingError:
        found = sum(pair.matches for pair in verified)
        return MappingError(
            f"Nothing matched: no pair of images passed the verification ({len(verified)} tried, "
            f"{found} matches in all). Are these images of one scene, and are the weights of "
            f"{self.matcher.info.name} the published ones? Features, matches and the report are "
            "kept." + "".join(f" {name}: {why}." for name, why in list(self._masked().items())[:5])
        )

    def _masked(self) -> dict[str, str]:
        """Images of which their masks leave nothing, and the sentence that says so."""
        empty = [name for name in self.names if not len(self.keypoints[name])]
        said = {name: self.masks.nothing_left(self.records[name]) for name in empty if self.masks}
        return {name: why for name, why in said.items() if why}

    def _reads_again(self) -> bool:
        return self.options.refine_warps and self.matcher.info.kind == "dense"

    def _refine_by_warps(self, model: Any, fixed: set[int]) -> str:
        matcher: Any = self.matcher
        registered = {model.image(i).name for i in model.reg_image_ids()}
        pairs = [p for p in self._pairs if registered.issuperset(p)]
        budget = memory_budget(matcher.device, self.options.cache_gb)
        first = matcher.encode(self._read_image(pairs[0][0], dense=True)) if pairs else None
        size = max(1, encoding_bytes(first))
        order = order_pairs(pairs, max(2, budget.total // size))
        rounds = self.options.warps.rounds
        with (
            EncodingPool(
                lambda name: self._read_image(name, dense=True),
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
                    return matcher.warp(*encodings[0])
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
            self._dense_encodings += len(pool.encoded)
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

    # ----------------------------------------------------------------------------------- report

    def _export(self, models: Sequence[Any]) -> None:
        """Other formats of the models, and what is dense.

        Raises:
            InputError: an image is missing, cannot be read or is not the model's.
            OutputError: an image cannot be written.
        """
        said: list[str] = []
        with self._timed("export"):
            for index, model in enumerate(models):
                said += export_model(
                    model,
                    self.output / "export" / str(index),
                    formats=self.options.export,
                    images=self.root,
                    progress=self.progress,
                )
        if self.options.dense and models:
            with self._timed("dense"):
                said += colmap.run_dense(
                    self.root,
                    models[0],
                    self.output / "dense",
                    log_dir=self.output / "logs",
                    progress=self.progress,
                )
        for sentence in dict.fromkeys(said):
            self._note(sentence)

    def _report(
        self,
        selection: Selection,
        verified: Sequence[PairVerification],
        models: Sequence[Path],
        watch: engine.Stopwatch,
        failure: GimError | None,
    ) -> dict[str, Any]:
        loaded = [colmap.read_model(path) for path in models]
        try:
            self._export(loaded)
        except GimError as error:  # the report and the state of the run come first
            failure = error
        if failure is not None:
            self.notes.append(str(failure))
        for note in self.notes:
            logger.debug("note: %s", note)
        report = build_report(
            image_set=self.image_set,
            keypoints={name: len(k) for name, k in self.keypoints.items()},
            selection=selection,
            verified=verified,
            models=loaded,
            paths=[str(path.relative_to(self.output)) for path in models],
            left_model=self._left_model,
            notes=list(dict.fromkeys(self.notes)),
            confidence=confidence_sums(
                verified, self._verify_options().min_confidence_sum, self._confidence_meaning()
            ),
        )
        masked = self._masked()
        for row in report["images"]:
            if row["name"] in self.turns:
                row["turned_degrees"] = 90 * self.turns[row["name"]]
            if row["name"] in masked:
                row["reason"] = masked[row["name"]]
        for rows, described in zip(self._intrinsics, report["models"], strict=False):
            for camera in described["cameras"]:
                camera.update(rows.get(camera["id"], {}))
        report["settings"] = to_mapping(
            {
                "images": str(self.root),
                **dataclasses.asdict(self.options),
                "pair": dataclasses.asdict(self.pair_options),
                "mapper_used": self.mapper,
                "matcher_settings": dataclasses.asdict(self.matcher.options),
                "matcher_licence": self.matcher.info.licence,
                "weights_sha256": dict(self.matcher.weights_hashes),
                "device": str(self.matcher.device),
                "workers": self.workers,
            }
        )
        report["versions"] = versions()
        report["counts"] = {
            "images_encoded_now": len(self._encoded),
            "dense_encodings_now": self._dense_encodings,
            "pairs_matched_now": len(self._matched),
        }
        report["summary"]["seconds"] = watch.seconds
        report["timings"] = dict(self.timings)
        with self._timed("report"):
            inlier_rows: dict[Pair, np.ndarray] = {}

            def pair_matches(a: str, b: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
                rows = rows_from_matches0(self.matches.get(_pair_name((a, b)))[0]["matches0"])
                if (a, b) not in inlier_rows:
                    found = colmap.inlier_matches(self.output / "database.db", [(a, b)])
                    inlier_rows[(a, b)] = found[0]
                good = set(map(tuple, inlier_rows[(a, b)].tolist()))
                inlier = np.array([tuple(row) in good for row in rows.tolist()], dtype=bool)
                return (
                    self.keypoints[a][rows[:, 0]],
                    self.keypoints[b][rows[:, 1]],
                    inlier,
                )

            try:
                write_report(
                    report,
                    self.output,
                    images=lambda name: image_module.read_rgb(
                        self.records[name], max_size=960, upright=False
                    ),
                    scene=scene_view(loaded[0]) if loaded else None,
                    pair_matches=pair_matches,
                )
            except Exception as error:  # the model is worth more than its report
                logger.warning("The report could not be written: %s", error)
                logger.debug("report", exc_info=True)
        report["timings"] = dict(self.timings)
        self._write_state()
        if failure is not None:
            raise failure
        return report


def _pair_name(pair: Pair) -> str:
    return f"{pair[0]}\t{pair[1]}"  # the scan refuses names with tabs


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _existing_parent(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def _estimate_disk(images: int, pairs: int, feature_bytes: float, keypoints: float) -> float:
    """Bytes of features.h5, matches.h5 (6 bytes a keypoint of the first image) and database.db."""
    features = images * feature_bytes
    matches = pairs * (6 * keypoints + 2000)
    # Keypoints again, and at most a third of them matched (8 bytes, raw and verified).
    database = images * keypoints * 8 + pairs * keypoints * 16 / 3
    # The cache keeps the same beside the h5 files.
    return 2 * (features + matches) + database
