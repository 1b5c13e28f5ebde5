"""Poses of images in an existing model.

queries -> encode (once each) -> pairs with the map's images -> match -> points of the map that a
query sees -> pose (LO-RANSAC, refined). What the map's run left is reused: keypoints, descriptors
and settings; nothing of the map is computed again, and it is not changed. Matchers without
keypoints are read at the map's own: a warp says where each keypoint that has a 3D point lies in the
query.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np

from gim_hloc import colmap, engine, matchers
from gim_hloc import images as image_module
from gim_hloc.clock import Stopwatch, timed
from gim_hloc.errors import InputError, MappingError
from gim_hloc.files import as_path, write_atomic
from gim_hloc.images import ImageRecord, ImageSet
from gim_hloc.keywords import LocalizeKeywords
from gim_hloc.masks import MaskFolder
from gim_hloc.matchers.common import parse_matcher_options
from gim_hloc.options import CameraOptions, StepName, given, replace, to_mapping
from gim_hloc.pair_viewer import MAX_PAIRS, Ends
from gim_hloc.pairs.files import read_pairs, write_pairs
from gim_hloc.pairs.retrieval import Lazy, Rows, aggregate, codebook, retrieval
from gim_hloc.pickles import read_npz
from gim_hloc.pipelines.localize_report import write_page
from gim_hloc.pipelines.maps import (
    MapFeatures,
    SceneMap,
    open_map,
    same_features,
    shared_camera,
)
from gim_hloc.pipelines.matching import (
    EncodeTask,
    Entry,
    MatchTask,
    Photographs,
    pair_name,
    spread,
    take_parts,
    tell_kept,
)
from gim_hloc.pipelines.methods import CASCADES, detection_options
from gim_hloc.pipelines.options import LocalizeOptions
from gim_hloc.pipelines.outcome import versions
from gim_hloc.pipelines.run import (
    MODEL_FILES,
    Part,
    RunFolder,
    Step,
    keep_scan,
    part_of,
    progress_bar,
    refuse_other_images,
    scanned,
)
from gim_hloc.store import H5Store, digest, pair_keys, read_encoding, rows_from_matches0
from gim_hloc.tracks.anchored import PairReading
from gim_hloc.tracks.linker import ImagePoints, Linker, linker_for
from gim_hloc.types import ImageData, ImageOptions, Matcher, Quality, SparseEncoding

if TYPE_CHECKING:
    from gim_hloc.colmap import CameraSpec, Located, MapView
    from gim_hloc.images import ImageLike

logger = logging.getLogger(__name__)

Pair = tuple[str, str]  # (query, image of the map)
Focal = Literal["known", "refine", "estimate"]
_FOCAL: dict[str, Focal] = {"exif": "refine", "estimated": "estimate"}  # else known

FORMAT = 1  # raised when the meaning of stored arrays changes

_COVISIBLE_SEEDS = 5
_SHARED_QUERIES = 50  # that a shared focal length is found with, those with most inliers
_TURN_REFERENCES = 4  # images of the map that a query is turned against
_TURN_LEAST = 30  # a turn with a smaller sum of confidences is none, if the matcher has no bound
_SHOWN_REFERENCES = 3  # images of the map that the report shows with a query
_HOW = {
    "given": "given",
    "map": "of the map",
    "exif": "EXIF, focal length refined",
    "estimated": "estimated",
    "shared": "estimated together",
}


@dataclass(kw_only=True)
class QueryResult:
    """What became of a query.

    Attributes:
        name: path relative to the folder of queries.
        pose: (R (3, 3), t (3,)), world to camera in the map's world, or None.
        status: localized, or why not in a word.
        reason: why not, in a sentence.
        correspondences: keypoints of the query that were matched to a point of the map.
        inliers: those that agree with the pose.
        error_px: mean reprojection error of the inliers.
        camera: intrinsics, after refinement.
        intrinsics: given, map, exif, estimated or shared (with other queries).
        references: images of the map and the inliers from each, most first.
        matches: matches with images of the map, 3D point or not.
    """

    name: str
    pose: tuple[np.ndarray, np.ndarray] | None = None
    status: str = "not_localized"
    reason: str = ""
    correspondences: int = 0
    inliers: int = 0
    error_px: float | None = None
    camera: CameraSpec | None = None
    intrinsics: str = ""
    references: list[tuple[str, int]] = field(default_factory=list)
    matches: int = 0

    @property
    def localized(self) -> bool:
        """Whether there is a pose."""
        return self.pose is not None

    @property
    def center(self) -> np.ndarray | None:
        """(3,) position in the map's world."""
        return None if self.pose is None else -self.pose[0].T @ self.pose[1]


@dataclass(kw_only=True, repr=False)
class LocalizeResult:
    """What a localisation left.

    Attributes:
        output: folder of the run.
        queries: by name.
        model: folder of the COLMAP model of map and queries, or None when none was localised.
        report: the content of report.json.
    """

    output: Path
    queries: dict[str, QueryResult]
    model: Path | None
    report: dict[str, Any]

    @property
    def localized(self) -> int:
        """Queries with a pose."""
        return sum(q.localized for q in self.queries.values())

    def __repr__(self) -> str:
        return f"LocalizeResult({self.output}: {self.localized} of {len(self.queries)} localised)"


def localize(
    scene: Path | str,
    queries: Path | str,
    output: Path | str,
    options: LocalizeOptions | None = None,
    *,
    progress: bool = True,
    **overrides: Unpack[LocalizeKeywords],
) -> LocalizeResult:
    """Localise images in an existing model.

    Args:
        scene: output folder of ``gim-reconstruct``, or a COLMAP model (then ``features``).
        queries: folder of images, searched recursively.
        output: folder of the results; what an earlier run with the same settings left is reused.
        options: all settings; ``None`` takes the defaults.
        progress: whether to draw progress bars.
        **overrides: single fields of ``LocalizeOptions``.

    Returns:
        Poses, and what became of each query.

    Raises:
        InputError: unusable map, queries or options.
        MappingError: no query could be localised; the report says why for each.
    """
    queries, output = as_path(queries, "queries"), as_path(output, "output")
    if not queries.is_dir():
        raise InputError(f"There is no folder of queries {queries}.")
    loaded = _LoadedMap(scene, given(LocalizeOptions, options, overrides))
    with contextlib.closing(loaded):
        return _Localization(loaded, loaded.options, queries, output, progress).run()


def quaternion(rotation: np.ndarray) -> tuple[float, float, float, float]:
    """Unit quaternion w, x, y, z of a rotation matrix, w >= 0."""
    from scipy.spatial.transform import Rotation

    x, y, z, w = Rotation.from_matrix(rotation).as_quat()
    sign = -1.0 if w < 0 else 1.0
    return sign * w, sign * x, sign * y, sign * z


def format_poses(results: Sequence[QueryResult]) -> str:
    """Lines ``name qw qx qy qz tx ty tz`` as hloc writes them, of the queries with a pose."""
    lines = []
    for result in results:
        if result.pose is not None:
            values = (*quaternion(result.pose[0]), *result.pose[1])
            lines.append(" ".join([result.name, *(repr(float(v)) for v in values)]))
    return "".join(f"{line}\n" for line in lines)


def format_table(results: Sequence[QueryResult]) -> str:
    """One line a query for people: inliers, error, intrinsics, references, or why it failed."""
    rows = [
        ["query", "inliers", "points", "error px", "focal px", "intrinsics", "images of the map"]
    ]
    for r in results:
        if r.localized and r.camera is not None:
            listed = ", ".join(f"{name} ({count})" for name, count in r.references[:3])
            more = len([1 for _, count in r.references[3:] if count])
            rows.append(
                [
                    r.name,
                    str(r.inliers),
                    str(r.correspondences),
                    f"{r.error_px:.2f}",
                    f"{r.camera.params[0]:.1f}",
                    _HOW[r.intrinsics],
                    listed + (f" and {more} more" if more else ""),
                ]
            )
        else:
            rows.append([r.name, "-", str(r.correspondences), "", "", "", f"failed: {r.reason}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if 1 <= column <= 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class BothPhotographs:
    """Queries, by the names that they have in pairs, and images of the map."""

    names: Mapping[str, str]
    queries: Photographs
    scene: Photographs

    def read(self, name: str, options: ImageOptions) -> ImageData:
        """See ``Photographs``."""
        if name not in self.names:
            return self.scene.read(name, options)
        return dataclasses.replace(self.queries.read(self.names[name], options), name=name)


@dataclass(frozen=True)
class BothEncodings:
    """Encodings of queries, by the names that they have in pairs, and of images of the map."""

    names: Mapping[str, str]
    queries: Path
    scene: MapFeatures | None

    def __call__(self, name: str) -> SparseEncoding:
        """Read one back."""
        if name in self.names:
            return read_encoding(self.queries, self.names[name])
        if self.scene is None:
            raise InputError(f"The map has no features of {name}.")
        return self.scene.encoding(name)


@dataclass(kw_only=True)
class _Seen:
    """Points of the map seen in a query.

    Attributes:
        xy_px: (N, 2) keypoints of the query, all of them or those that were read.
        row: (K,) keypoint of each correspondence.
        point: (K,) its 3D point.
        votes: (V, 2) correspondence and index of an image of the map it comes from.
        matches: matches in all, 3D point or not.
    """

    xy_px: np.ndarray
    row: np.ndarray
    point: np.ndarray
    votes: np.ndarray
    matches: int


class _LoadedMap:
    """A map with its matcher, and what queries share of it."""

    def __init__(self, scene: Path | str, options: LocalizeOptions) -> None:
        self.folder, self.options = as_path(scene, "scene"), options
        self.notes: list[str] = []
        self.timings: dict[str, float] = {}
        self.vlad: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # codebook and the map's vectors
        self.sources: dict[str, str] = {}  # of the map's images
        self.records: dict[str, ImageRecord] = {}  # of those that were asked for
        with timed(self.timings, "map"):
            self.map: SceneMap = open_map(
                self.folder, features=options.features, images=options.images
            )
        self._load_matchers()

    def close(self) -> None:
        """Close the map's files."""
        if self.map_features is not None:
            self.map_features.close()

    def _load_matchers(self) -> None:
        options, made = self.options, self.map.options
        theirs = made.get("matcher")
        if made.get("features"):  # its keypoints came from a file
            theirs = None
        cascade = CASCADES.get(theirs or "")
        if cascade is not None:  # queries are matched with the map's first keypoints
            theirs = options.matcher or cascade[1]
        if theirs is not None and options.matcher is None:
            matchers.refuse_code(theirs, f"The map {self.folder}", "--matcher")
        name = options.matcher or theirs
        if name is None:
            raise InputError(
                f"{self.folder} does not say which matcher made its keypoints: give --matcher "
                "(and --features, if they are in another file)."
            )
        quality: Quality = options.quality or made.get("quality") or "base"
        self.quality = quality
        same = name == theirs
        overrides: dict[str, Any] = {}
        if same:
            overrides.update(parse_matcher_options(made.get("matcher_options") or ()))
            if made.get("max_size") is not None:
                overrides["max_size"] = made["max_size"]
        overrides.update(parse_matcher_options(options.matcher_options))
        free = not matchers.describe(name).has_keypoints
        keypoints = made.get("max_keypoints")
        if same and not free and keypoints is not None:
            overrides.setdefault("max_keypoints", keypoints)
        self.where = options.where
        device = self.where.devices[0] if self.where.devices else options.device
        if cascade is not None and name == cascade[1]:
            first = matchers.Loader(cascade[0], quality, overrides)
            overrides = detection_options(first.load(device))
        self.loader = matchers.Loader(name, quality, overrides)
        self.matcher: Matcher[Any] = self.loader.load(device)
        self.linker: Linker = linker_for(self.matcher)
        self.detector: Matcher[SparseEncoding] | None = None if free else self.matcher
        self.detector_loader = None if free else self.loader
        if free and self.map.images is None:
            raise InputError(
                f"{name} has no keypoints and needs the map's images, whose folder is not "
                "known: give --images."
            )
        self.map_features: MapFeatures | None = None
        needs_features = (
            not free
            or options.pairs in ("retrieval", "covisibility")
            or (options.pairs == "auto" and len(self.map.views) > options.neighbours)
        )
        if needs_features:
            self._open_features(device, made)
        self.threads = options.threads or engine.default_workers(
            self.matcher.device, bool(self.where.devices)
        )
        self.batch = options.batch_size or (16 if self.matcher.device.type != "cpu" else 1)

    def _open_features(self, device: str, made: Mapping[str, Any]) -> None:
        """The map's keypoints and descriptors, and the matcher that makes such of queries."""
        if self.map.features is None:
            raise InputError(
                f"{self.folder} has no features.h5: give the map's keypoints and descriptors "
                "as --features."
            )
        self.map_features = MapFeatures(self.map.features, self.map.views)
        width = self.map_features.descriptors(next(iter(self.map.views))).shape[1]
        if self.detector is None:  # only to find similar images
            name = self.options.anchors or self._described_by()
            count = made.get("max_keypoints")
            self.detector_loader = matchers.Loader(
                name, self.quality, {} if count is None else {"max_keypoints": count}
            )
            self.detector = self.detector_loader.load(device)
            if not self.detector.info.has_keypoints:
                raise InputError(
                    f"{name} has no keypoints; --anchors is the matcher of those in "
                    f"{self.map.features}."
                )
        differing = same_features(self.map.features, self.detector.encode_settings())
        if "matcher" in differing:
            raise InputError(
                f"The keypoints in {self.map.features} are not those of "
                f"{self.detector.info.name}: choose the map's matcher, or give --features."
            )
        self.detector.info.check_descriptors(width, str(self.map.features))
        if differing:
            self.notes.append(
                f"The map's keypoints were made with other settings than those of the queries: "
                f"{', '.join(differing)} differ."
            )

    def _described_by(self) -> str:
        """Name of the matcher that made the keypoints and descriptors of the map's images."""
        made = self.map.options
        theirs = made.get("matcher") or "auto"
        if (self.folder / "anchors.h5").is_file():  # which runs of dense matchers leave
            theirs = made.get("anchors") or "auto"
        name = CASCADES.get(theirs, (theirs,))[0]
        matchers.refuse_code(name, f"The map {self.folder}", "--anchors")
        return matchers.choose_detector(name)


class Localizer(_LoadedMap):
    """A map and its matcher, which stay loaded from one image to the next, in this process.

    Args:
        scene: output folder of ``gim-reconstruct``, or a COLMAP model (then ``features``).
        options: all settings; ``None`` takes the defaults.
        **overrides: single fields of ``LocalizeOptions``.

    Raises:
        InputError: unusable map or options.
        WeightsError: the matcher's weights are missing.
    """

    def __init__(
        self,
        scene: Path | str,
        options: LocalizeOptions | None = None,
        **overrides: Unpack[LocalizeKeywords],
    ) -> None:
        options = given(LocalizeOptions, options, overrides)
        for name in ("step", "shard", "start", "stop_after", "overwrite", "prune"):
            if getattr(options, name):
                raise InputError(
                    f"{name} is for runs with an output folder, which a Localizer has not: use "
                    "gim_hloc.localize."
                )
        # One image is done before other processes have started.
        device = options.devices[0] if options.devices else options.device
        alone = {"device": device, "devices": (), "engine": "local", "workers": 0}
        super().__init__(scene, replace(options, alone))

    def localize(self, image: ImageLike, camera: Any = None) -> QueryResult:
        """Localise an image, as ``gim-localize`` does.

        Args:
            image: a path, an array (H, W[, 1 or 3]) or tensor (1 or 3, H, W) that is uint8 or
                floating point in [0, 1], or a PIL image.
            camera: its intrinsics: "PINHOLE,fx,fy,cx,cy", a ``pycolmap.Camera``, or None where
                they are those of the options, the map's or are estimated.

        Raises:
            InputError: the image or the camera cannot be used.
        """
        values: dict[str, Any] = {"stop_after": "rotations"}
        if camera is not None:
            values["intrinsics"] = _intrinsics(camera)
        options = replace(self.options, values)
        record = image_module.one(image, "query", min_size=options.min_image_size)
        size = tuple(getattr(camera, name, 0) for name in ("width", "height"))
        if size not in ((0, 0), record.size):
            raise InputError(
                f"{record.name} has {record.width} x {record.height} pixels, the camera "
                f"{size[0]} x {size[1]}: give the one of the image as it is stored."
            )
        root = record.path.parent
        with tempfile.TemporaryDirectory(prefix="gim-hloc-") as output:
            run = _Localization(self, options, root, Path(output, "out"), False, record)
            run.run()
        return run.results[record.name]


class _Localization:
    """One run: see the module. Of all queries in a folder, or of a single one."""

    def __init__(
        self,
        scene: _LoadedMap,
        options: LocalizeOptions,
        queries: Path,
        output: Path,
        progress: bool,
        single: ImageRecord | None = None,
    ) -> None:
        self.scene, self.map_folder, self.root, self.output = scene, scene.folder, queries, output
        self.map, self.map_features = scene.map, scene.map_features
        self.matcher, self.linker, self.detector = scene.matcher, scene.linker, scene.detector
        self.options, self.single = options, single
        self.show = progress
        self.part = part_of(options.step, options.shard)
        self.encoded: set[str] = set()
        self.matched: set[Pair] = set()
        self.located: set[str] = set()
        self.tried: dict[
            str, list[Any]
        ] = {}  # query -> quarter turns that were found, and its hash
        self.model: Path | None = None
        self.report: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------- order

    def run(self) -> LocalizeResult:
        watch = Stopwatch()
        self._check_folders()
        self._scan()
        self.guessed, self.sharing = self._cameras()
        self.mode = self._mode()
        logger.info(
            "%d queries, map of %d images and %d points, matcher %s on %s, pairs %s",
            len(self.names),
            len(self.references),
            self.map.model.num_points3D(),
            self.matcher.info.name,
            self.matcher.device,
            self.mode,
        )
        self.folder.about = {
            "queries": str(self.root.resolve()),
            "map": str(self.map_folder.resolve()),
            "options": to_mapping(self.options),
        }
        with self.folder:
            if self.part is None and self.single is None:
                keep_scan(self.folder, self.image_set)
            self._open_stores()
            try:
                if self.part is not None:
                    self._do_part(self.part)
                    return LocalizeResult(output=self.output, queries={}, model=None, report={})
                options = self.options
                self.folder.go(self.steps(), again=options.start, until=options.stop_after)
                if options.stop_after is None:
                    stores = (self.features, self.matches, self.poses)
                    tell_kept([store.kept() for store in stores], prune=options.prune)
            finally:
                for store in (self.features, self.matches, self.poses):
                    store.close()
        if self.report:
            self.report["summary"]["seconds"] = watch.seconds
        if self.report and self.model is None:
            raise MappingError(
                f"None of the {len(self.names)} queries could be localised; "
                f"{self.output / 'report.txt'} says why for each (first: {self.rows[0].reason})."
            )
        rows = {row.name: row for row in self.rows} if self.report else {}
        return LocalizeResult(
            output=self.output, queries=rows, model=self.model, report=self.report
        )

    def steps(self) -> list[Step]:
        """The order of the work."""
        return [
            Step("encode", self._encode),
            Step("pairs", self._choose_pairs),
            Step("match", self._match),
            Step("locate", self._locate),
            Step("rotations", self._rotate),  # another pass where queries lie on their sides
            Step("model", self._write_model),
            Step("report", self._report),
        ]

    def _do_part(self, part: Part) -> None:
        """Do one part of one step, whose results a later run without --step takes."""
        if part.step == "encode":
            self._encode()
            return
        self._choose_pairs()
        self._match()

    # ----------------------------------------------------------------------------------- helpers

    def _check_folders(self) -> None:
        if self.options.step == "verify":
            raise InputError("--step verify: queries are located, not verified; encode or match.")
        for folder, what in ((self.map_folder, "map"), (self.root, "folder of queries")):
            if self.output.resolve() == folder.resolve():
                raise InputError(f"The output folder must not be the {what} ({folder}).")
        self.folder = RunFolder(
            self.output,
            "localize",
            makes=[f"sparse/{name}" for name in MODEL_FILES],
            writes=[
                *("pairs.txt", "poses.txt", "report.txt", "report.json", "report.html"),
                "cameras.json",
                *("features.h5", "matches.h5", "poses.h5", "retrieval.npz"),
                *("features.cache", "matches.cache", "poses.cache"),
            ],
            overwrite=self.options.overwrite,
            part=self.part,
        )

    def _scan(self) -> None:
        options = self.options
        self.folder.notes += self.scene.notes
        self.folder.timings.update(self.scene.timings)
        with timed(self.folder.timings, "scan"):
            if self.single is not None:
                self.image_set = ImageSet(root=self.root, images=(self.single,))
            else:
                self.image_set = image_module.scan(
                    self.root,
                    min_size=options.min_image_size,
                    exclude=[self.output, *([options.masks] if options.masks else [])],
                    known=scanned(self.output),
                    progress=self.show,
                )
            image_module.require_usable(self.image_set, 1)
        for rejected in self.image_set.rejected:
            logger.warning("Left out: %s (%s: %s)", rejected.name, rejected.reason, rejected.detail)
        refuse_other_images(self.image_set, self.output, overwrite=options.overwrite)
        self.records = {record.name: record for record in self.image_set.images}
        self.names = list(self.records)
        self.references = sorted(self.map.views)
        masks = None
        if options.masks is not None:
            masks = MaskFolder(options.masks, erode_px=options.mask_erode, image_root=self.root)
            for warning in masks.check(self.names):
                self.folder.note(warning)
        self.photographs = Photographs(self.records, masks)
        # A query and an image of the map may have the same name and be different images.
        self.alias = {n: f"query/{n}" if n in self.map.views else n for n in self.names}

    def _bar(self, total: int, title: str, unit: str, done: int = 0) -> Any:
        return progress_bar(total, title, unit, done=done, show=self.show)

    # ---------------------------------------------------------------------------------- cameras

    def _cameras(self) -> tuple[dict[str, tuple[CameraSpec, str]], list[list[str]]]:
        """Intrinsics of every query and where they are from, and the queries that share them."""
        options = self.options
        colmap.camera_param_count(options.camera_model)  # an unknown name is an error
        records = list(self.records.values())
        guessed, notes = colmap.assign_cameras(
            records,
            CameraOptions(
                camera_mode=options.camera_mode,
                camera_model=options.camera_model,
                intrinsics=options.intrinsics,
            ),
        )
        for note in notes:
            self.folder.note(note)
        found: dict[str, tuple[CameraSpec, str]] = {}
        for spec in guessed:
            for name in spec.names:
                found[name] = self._camera(name, spec)
        groups = [[n for n in spec.names if found[n][1] in _FOCAL] for spec in guessed]
        return found, [group for group in groups if len(group) > 1]

    def _camera(self, name: str, spec: CameraSpec) -> tuple[CameraSpec, str]:
        options = self.options
        if spec.given:
            return spec, "given"
        shared = shared_camera(self.map, self.records[name])
        if shared is not None and options.camera in ("auto", "map"):
            return shared, "map"
        if options.camera == "map":
            raise InputError(
                f"--camera map: {name} is {spec.width}x{spec.height}, and the map has no "
                "camera, or several, of that size. Give --intrinsics, or leave --camera auto."
            )
        if spec.prior and options.camera in ("auto", "exif"):
            return spec, "exif"
        return spec, "estimated"

    # ----------------------------------------------------------------------------------- stores

    def _open_stores(self) -> None:
        options = self.options
        base: dict[str, Any] = {"format": FORMAT}
        if self.photographs.masks is not None:
            base["mask_erode"] = options.mask_erode
        encode = {} if self.detector is None else self.detector.encode_settings()
        feature_settings = base | {f"encode.{k}": v for k, v in encode.items()}
        match_settings = feature_settings | self.linker.settings()
        keys = pair_keys(sorted({*self.names, *self.references}))
        self.pair_key = lambda name: "/".join(keys[n] for n in name.split("\t"))
        pose_settings = {
            "match": digest(match_settings),
            "map": self.map.stamp,
            **{
                name: getattr(options, name)
                for name in (
                    "cluster", "max_error", "min_inliers", "min_inlier_ratio", "confidence",
                    "max_trials", "max_spread", "seed",
                )
            },
        }  # fmt: skip
        self.features = self._store("features.h5", "encode", feature_settings)
        self.matches = self._store("matches.h5", "match", match_settings)
        self.poses = self._store("poses.h5", "locate", pose_settings)
        if self.part is None:
            take_parts(self.folder, {"features": self.features, "matches": self.matches})
        self._read_rotations()

    def _store(self, name: str, step: StepName, settings: dict[str, Any]) -> H5Store:
        again = self.options.overwrite or self.options.again(step)
        return H5Store(
            self.output / name,
            settings,
            key_of=self.pair_key if step == "match" else None,
            overwrite=again and self.part is None,
            cache_file=self.folder.cache_file(name),
        )

    def _map_source(self, name: str) -> str:
        """Hash of what matches with an image of the map rest on."""
        if name in self.scene.sources:
            return self.scene.sources[name]
        view = self.map.views[name]
        parts: list[Any] = [self.map.sources.get(name)]
        if self.linker.detector_free or parts[0] is None:
            parts += [view.xy_px.tobytes().hex(), view.points.tobytes().hex()]
        if parts[0] is None and self.map.features is not None:
            status = self.map.features.stat()
            parts += [status.st_size, status.st_mtime_ns]
        self.scene.sources[name] = digest(parts)
        return self.scene.sources[name]

    def _pair_source(self, pair: Pair) -> str:
        return digest([self.photographs.source(pair[0]), self._map_source(pair[1])])

    # ----------------------------------------------------------------------------------- encode

    def _encode(self) -> None:
        if self.detector is None or self.scene.detector_loader is None:
            return
        photographs, store = self.photographs, self.features
        names = self.folder.share(self.names)
        todo = [n for n in names if not store.has(n, photographs.source(n))]
        with self._bar(len(names), "Encode", "queries", len(names) - len(todo)) as bar:

            def done(name: str, entry: Entry) -> None:
                store.put(name, entry[0], photographs.source(name), **entry[1])
                self.encoded.add(name)
                bar.update()

            task = EncodeTask(self.scene.detector_loader, photographs, self.scene.threads)
            spread(task, todo, self.scene.where, done, chunk=4)
        if self.part is None:
            store.finalize(self.names, {"matcher": self.detector.info.name})

    # ------------------------------------------------------------------------------------ pairs

    def _mode(self) -> str:
        pairs = self.options.pairs
        if pairs == "auto":
            few = len(self.references) <= max(20, self.options.neighbours)
            return "exhaustive" if few else "retrieval"
        if pairs in ("exhaustive", "retrieval", "covisibility") or Path(pairs).is_file():
            return pairs
        raise InputError(
            f"--pairs {pairs}: known are auto, exhaustive, retrieval, covisibility, and the path "
            "of a list that exists."
        )

    def _choose_pairs(self) -> None:
        if self.part is not None:
            path = self.output / "pairs.txt"
            if not path.is_file():
                raise InputError(
                    "--step match works on pairs that are not chosen yet: run the same command "
                    "with --stop-after pairs instead of --step first."
                )
            self.pairs = read_pairs(path, [*self.names, *self.references], directed=True)
            return
        if self.mode == "exhaustive":
            pairs = [(q, m) for q in self.names for m in self.references]
        elif self.mode in ("retrieval", "covisibility"):
            pairs = self._similar()
        else:
            known = [*self.names, *self.references]
            left_out = [r.name for r in self.image_set.rejected]
            listed = read_pairs(Path(self.mode), known, skip=left_out, directed=True)
            pairs = [(a, b) for a, b in listed if a in self.records and b in self.map.views]
            if not pairs:
                raise InputError(f"{self.mode} pairs no query with an image of the map.")
        if self.part is None:
            write_pairs(self.output / "pairs.txt", pairs)
        self.pairs = pairs

    def _similar(self) -> list[Pair]:
        options = self.options
        features = self.map_features
        if features is None:
            raise InputError("Similar images are found by descriptors; the map has none.")
        names = self.references
        stamp = digest([FORMAT, options.seed, [[n, self._map_source(n)] for n in names]])
        stored = self.output / "retrieval.npz"
        centres, rows = self.scene.vlad.get(stamp) or _stored_vlad(stored, stamp)
        local = Lazy(names, features.descriptors)
        if centres is None or rows is None:
            centres = codebook(Rows(names, local), seed=options.seed)
            rows = aggregate(Rows(names, local), centres)
            np.savez(stored, stamp=np.array(stamp), centres=centres, rows=rows)
        self.scene.vlad[stamp] = centres, rows
        k = options.neighbours
        if self.mode == "covisibility":
            k = min(_COVISIBLE_SEEDS, k)
        tagged = [f"q/{name}" for name in self.names]
        query_local = Lazy(tagged, lambda name: self._query_descriptors(name.removeprefix("q/")))
        pairs = retrieval(
            tagged,
            aggregate(Rows(tagged, query_local), centres),
            k=k,
            min_score=options.min_score,
            local=query_local,
            database=(names, rows),
            database_local=local,
        )
        found = [(a.removeprefix("q/"), b) for a, b in pairs]
        return self._covisible(found) if self.mode == "covisibility" else found

    def _query_descriptors(self, name: str) -> np.ndarray:
        return self.features.get(name)[0]["descriptors"].T

    def _covisible(self, seeds: Sequence[Pair]) -> list[Pair]:
        """Fill up with the images that share most points with the seeds."""
        from scipy import sparse

        names = self.references
        index = {name: i for i, name in enumerate(names)}
        seen = [np.unique(self.map.views[n].points[self.map.views[n].points >= 0]) for n in names]
        image = np.repeat(np.arange(len(names)), [len(ids) for ids in seen])
        _, column = np.unique(np.concatenate(seen), return_inverse=True)
        sees = sparse.csr_matrix((np.ones(len(image), np.int64), (image, column)))
        result: list[Pair] = []
        for query in self.names:
            own = [index[b] for a, b in seeds if a == query]
            if not own:
                continue
            shared = np.asarray((sees[own] @ sees.T).sum(0)).ravel()
            shared[own] = np.iinfo(np.int64).max
            order = np.argsort(-shared, kind="stable")[: self.options.neighbours]
            result += [(query, names[i]) for i in sorted(order) if shared[i] > 0]
        return result

    # ------------------------------------------------------------------------------------ match

    def _match(self) -> None:
        pairs = self.folder.share(self.pairs)
        todo = [p for p in pairs if not self.matches.has(pair_name(p), self._pair_source(p))]
        task = self._match_task(todo)
        query_of = {alias: name for name, alias in self.alias.items()}
        with self._bar(len(pairs), "Match", "pairs", len(pairs) - len(todo)) as bar:

            def done(named: Pair, arrays: dict[str, np.ndarray]) -> None:
                pair = query_of[named[0]], named[1]
                self.matches.put(pair_name(pair), arrays, self._pair_source(pair))
                self.matched.add(pair)
                bar.update()

            spread(task, [(self.alias[a], b) for a, b in todo], self.scene.where, done, chunk=16)
        if self.part is not None:
            return
        self.folder.notes += task.report.notes
        self.matches.finalize([pair_name(p) for p in pairs], {"matcher": self.matcher.info.name})
        logger.info("Matched %d pairs (%d reused)", len(todo), len(pairs) - len(todo))

    def _match_task(self, todo: Sequence[Pair]) -> MatchTask:
        """Of queries and images of the map."""
        free = self.linker.detector_free
        names = {alias: name for name, alias in self.alias.items()}
        needed = sorted({b for _, b in todo}) if free else []
        nothing = np.zeros((0, 2), np.float32)
        points = [
            ImagePoints(
                name=self.alias[name], size=self.records[name].size, keypoints=nothing, fixed=True
            )
            for name in (sorted({a for a, _ in todo}) if free else [])
        ]
        for name in needed:
            view = self.map.views[name]
            points.append(
                ImagePoints(
                    name=name,
                    size=(view.camera.width, view.camera.height),
                    keypoints=view.xy_px[_posed(view)].astype(np.float32),
                    fixed=True,
                )
            )
        return MatchTask(
            loader=self.scene.loader,
            photographs=BothPhotographs(names, self.photographs, self._map_photographs(needed)),
            stored=BothEncodings(names, self.features.path, self.map_features),
            points=points,
            threads=self.scene.threads,
            batch_size=self.scene.batch,
            cache_gb=self.options.cache_gb,
        )

    def _map_photographs(self, needed: Sequence[str]) -> Photographs:
        """Images of the map; ``InputError`` for one that is not the map's any more."""
        if not needed:
            return Photographs({})
        root = self.map.images
        if root is None:
            raise InputError("The folder of the map's images is not known: give --images.")
        found = self.scene.records
        missing = [name for name in needed if name not in found]
        found |= {r.name: r for r in image_module.scan(root, min_size=1, names=missing).images}
        for name in missing:
            view = self.map.views[name]
            if name not in found:
                # A twin of another image is none of scan's images, and still one of the map's.
                single = image_module.scan(root, min_size=1, names=[name])
                if not single.images:
                    raise InputError(f"The map's image {root / str(single.rejected[0])}.")
                found[name] = single.images[0]
            if found[name].size != (view.camera.width, view.camera.height):
                raise InputError(
                    f"{root / name} is {found[name].width}x{found[name].height} but "
                    f"{view.camera.width}x{view.camera.height} in the map."
                )
        return Photographs({n: found[n] for n in needed}, turns=dict(self.map.turns))

    # --------------------------------------------------------------------------------- rotations

    def _read_rotations(self) -> None:
        """What an earlier run found; queries that it tried in vain are not tried again."""
        facts = self.folder.steps.get("rotations", {}).get("facts", {})
        if self.options.rotations == "none" or facts.get("settings") != self.matches.stamp:
            return
        for name, (turn, sha) in facts["images"].items():
            if name in self.records and self.records[name].sha256 == sha:
                self.tried[name] = [turn, sha]
                if turn:
                    self.photographs.turns[name] = turn

    def _rotate(self) -> list[Step] | None:
        """Look for failed queries that are stored rotated; with some, another pass is made."""
        failed = ("no_matches", "no_points", "no_pose", "few_inliers")
        todo = [
            name
            for name, result in self.results.items()
            if result.status in failed and name not in self.tried
        ]
        if self.options.rotations == "none" or self.linker.detector_free or not todo:
            return None
        if self.matcher.info.rotation_invariant:
            return None
        with self._bar(len(todo), "Rotate", "queries") as bar:
            for name in todo:
                turn = self._best_rotation(name, [b for a, b in self.pairs if a == name])
                if turn:
                    self.photographs.turns[name] = turn
                self.tried[name] = [turn, self.records[name].sha256]
                bar.update()
        with self.folder.making("rotations", self.matches.stamp) as made:
            made.facts = {"settings": self.matches.stamp, "images": self.tried}
        turns = self.photographs.turns
        found = [name for name in todo if name in turns]
        if not found:
            return None
        self.folder.note(
            f"{len(found)} queries are stored turned without EXIF saying so and were matched "
            f"upright (first: {found[0]} by {90 * turns[found[0]]} degrees clockwise). "
            "Poses are those of the stored files."
        )
        names = ("encode", "pairs", "match", "locate", "rotations")
        return [step for step in self.steps() if step.name in names]

    def _best_rotation(self, name: str, references: Sequence[str]) -> int:
        """Quarter turns that bring far more confidence than the query has as it is; 0 for none."""
        sums = {
            r: float(self.linker.confidences(self.matches.get(f"{name}\t{r}")[0]).sum(dtype=float))
            for r in references
        }
        chosen = sorted(references, key=lambda r: -sums[r])[:_TURN_REFERENCES]
        # A wrong turn is found out by the pose, so one good pair is enough to try.
        least = self.matcher.info.min_confidence_sum.get(self.scene.quality, _TURN_LEAST)
        best, most = 0, max(least, 2 * sum(sums[r] for r in chosen))
        stored = BothEncodings({}, self.features.path, self.map_features)
        for turn in (1, 2, 3):
            shown = self.photographs.read(name, self.matcher.image_options, turn)
            encoding = self.matcher.encode(shown)
            found = self.matcher.match_batch([(encoding, stored(r)) for r in chosen])
            total = sum(float(matches.scores.sum()) for matches in found)
            if total > most:
                best, most = turn, total
        return best

    # ----------------------------------------------------------------------------------- locate

    def _locate(self) -> None:
        of_query: dict[str, list[str]] = {name: [] for name in self.names}
        for query, reference in self.pairs:
            of_query[query].append(reference)
        self.points, self.positions = self.map.points
        self.cameras = dict(self.guessed)
        if self.sharing:
            with timed(self.folder.timings, "cameras"):
                self._share_cameras(of_query)
        self.results: dict[str, QueryResult] = {}
        with self._bar(len(self.names), "Locate", "queries") as bar:
            for name in self.names:
                source = self._pose_source(name, of_query[name])
                if not self.poses.has(name, source):
                    arrays, attributes = self._locate_one(name, of_query[name])
                    self.poses.put(name, arrays, source, **attributes)
                    self.located.add(name)
                self.results[name] = self._result(name, of_query[name])
                logger.debug("%s: %s", name, self.results[name].reason or "localized")
                bar.update()
        self.poses.finalize(self.names, {"map": str(self.map_folder)})

    def _pose_source(self, name: str, references: Sequence[str]) -> str:
        camera, how = self.cameras[name]
        return digest(
            [
                self.photographs.source(name),
                [[r, self._pair_source((name, r))] for r in references],
                [camera.model, camera.width, camera.height, camera.params, how],
            ]
        )

    def _share_cameras(self, of_query: Mapping[str, Sequence[str]]) -> None:
        """One focal length for the queries of each group, found with those that have a pose.

        They are localised one by one first. What is found is kept in a file of the output.
        """
        path = self.output / "cameras.json"
        kept: dict[str, list[float]] = {}
        with contextlib.suppress(OSError, ValueError):
            stored = json.loads(path.read_text(encoding="utf-8"))
            kept = stored if isinstance(stored, dict) else {}
        used: dict[str, list[float]] = {}
        for group in self.sharing:
            sources = [self._pose_source(name, of_query[name]) for name in group]
            key = digest([self.poses.stamp, sources])
            if key not in kept or self.options.overwrite:
                params = self._shared_params(group, of_query)
                kept[key] = [] if params is None else list(params)
            used[key] = kept[key]
            if used[key]:
                camera = self.guessed[group[0]][0]
                shared = dataclasses.replace(camera, params=tuple(used[key]), names=[])
                self.cameras.update((name, (shared, "shared")) for name in group)
        write_atomic(path, json.dumps(used, indent=1) + "\n")

    def _shared_params(
        self, group: Sequence[str], of_query: Mapping[str, Sequence[str]]
    ) -> tuple[float, ...] | None:
        """Parameters of the camera of some queries; None when none of them has a pose."""
        found: list[tuple[Located, np.ndarray, np.ndarray]] = []
        for name in group:
            seen = self._seen(name, of_query[name])
            best, rows = self._pose(name, of_query[name], seen)
            if best is None:
                continue
            inliers = int(best.inliers.sum())
            if self._why_not(seen, of_query[name], True, inliers)[0]:
                continue
            rows = rows[best.inliers]
            found.append((best, seen.xy_px[seen.row[rows]], self._xyz(seen.point[rows])))
        if not found:
            return None
        found.sort(key=lambda item: -len(item[1]))
        camera = self.guessed[group[0]][0]
        # The middle one by focal length; models may have two of them.
        middle = sorted((item[0].params for item in found), key=lambda p: p[0])[len(found) // 2]
        camera = dataclasses.replace(camera, params=middle)
        return colmap.shared_focal(
            [(xy, xyz, located.pose) for located, xy, xyz in found[:_SHARED_QUERIES]], camera
        )

    def _xyz(self, points: np.ndarray) -> np.ndarray:
        """Positions (N, 3) of points of the map."""
        return self.positions[np.searchsorted(self.points, points)]

    def _locate_one(
        self, name: str, references: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Localise a query; arrays and attributes for the store."""
        seen = self._seen(name, references)
        arrays: dict[str, np.ndarray] = {"keypoints": seen.xy_px.astype(np.float32)}
        attributes: dict[str, Any] = {
            "intrinsics": self.cameras[name][1],
            "matches": seen.matches,
            "correspondences": len(seen.row),
            "reason": "",
            "status": "localized",
        }
        best, best_rows = self._pose(name, references, seen)
        inliers = int(best.inliers.sum()) if best is not None else 0
        attributes["inliers"] = inliers
        status, reason = self._why_not(seen, references, best is not None, inliers)
        masks = self.photographs.masks
        nothing = masks.nothing_left(self.records[name]) if status and masks else None
        reason = nothing or reason
        if best is None or reason:
            attributes.update(status=status, reason=reason)
            return arrays, attributes
        good = best_rows[best.inliers]
        arrays["row"], arrays["point"] = _one_to_one(seen, good)
        arrays["rotation"], arrays["translation"] = best.pose
        arrays["params"] = np.array(best.params)
        votes = seen.votes[np.isin(seen.votes[:, 0], good), 1]
        arrays["votes"] = np.bincount(votes, minlength=len(references))
        attributes["error_px"] = best.error_px
        return arrays, attributes

    def _pose(
        self, name: str, references: Sequence[str], seen: _Seen
    ) -> tuple[Located | None, np.ndarray]:
        """The best pose of a query, and the correspondences (K,) that it was sought in."""
        camera, how = self.cameras[name]
        xyz = self._xyz(seen.point)
        best, best_rows = None, np.zeros(0, np.int64)
        for group in self._groups(references) if self.options.cluster else [None]:
            chosen = np.arange(len(seen.row))
            if group is not None:
                chosen = np.unique(seen.votes[np.isin(seen.votes[:, 1], group), 0])
            found = colmap.locate(
                seen.xy_px[seen.row[chosen]],
                xyz[chosen],
                camera,
                max_error=self.options.max_error,
                focal=_FOCAL.get(how, "known"),
                confidence=self.options.confidence,
                max_trials=self.options.max_trials,
                seed=self.options.seed,
            )
            if found is not None and (best is None or found.inliers.sum() > best.inliers.sum()):
                best, best_rows = found, chosen
        return best, best_rows

    def _why_not(
        self, seen: _Seen, references: Sequence[str], posed: bool, inliers: int
    ) -> tuple[str, str]:
        """Status and sentence of a query that has no trustworthy pose; empty when it has."""
        enough = inliers >= self.options.min_inliers
        if posed and enough and inliers >= self.options.min_inlier_ratio * len(seen.row):
            return "", ""
        if not self.linker.detector_free and not len(seen.xy_px):
            return "no_features", "no keypoints: blank, dark, blurred or masked as a whole"
        if not references:
            return "no_pairs", "paired with no image of the map"
        if not seen.matches:
            return "no_matches", f"no match with any of {len(references)} images of the map"
        if not len(seen.row):
            return "no_points", f"{seen.matches} matches, none with a 3D point of the map"
        if not posed:
            return "no_pose", f"no pose agrees with the {len(seen.row)} points it was matched to"
        asked = f"{self.options.min_inlier_ratio:.0%}" if enough else str(self.options.min_inliers)
        return (
            "few_inliers",
            f"{inliers} of {len(seen.row)} points agree with the best pose; {asked} are asked for",
        )

    def _groups(self, references: Sequence[str]) -> list[np.ndarray]:
        """Indices of references that are connected by shared points, largest group first."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        seen = [self.map.views[n].points for n in references]
        seen = [np.unique(p[p >= 0]) for p in seen]
        image = np.repeat(np.arange(len(seen)), [len(p) for p in seen])
        point = np.concatenate(seen) if seen else np.zeros(0, np.int64)
        _, column = np.unique(point, return_inverse=True)
        size = len(seen) + int(column.max(initial=-1)) + 1
        graph = coo_matrix((np.ones(len(image)), (image, column + len(seen))), (size, size))
        _, label = connected_components(graph, directed=False)
        label = label[: len(seen)]
        groups = [np.flatnonzero(label == value) for value in np.unique(label)]
        return sorted(groups, key=lambda g: -len(g))

    def _seen(self, name: str, references: Sequence[str]) -> _Seen:
        return (
            self._seen_readings(name, references)
            if self.linker.detector_free
            else self._seen_rows(name, references)
        )

    def _seen_rows(self, name: str, references: Sequence[str]) -> _Seen:
        """Keypoints of a query and the points that their matches have."""
        xy_px = self.features.get(name)[0]["keypoints"]
        pieces = [np.zeros((0, 3), np.int64)]
        matches = 0
        for index, reference in enumerate(references):
            rows = rows_from_matches0(self.matches.get(f"{name}\t{reference}")[0]["matches0"])
            matches += len(rows)
            points = self.map.views[reference].points
            rows = rows.astype(np.int64)
            rows = rows[rows[:, 1] < len(points)]
            point = points[rows[:, 1]]
            good = point >= 0
            pieces.append(
                np.stack([rows[good, 0], point[good], np.full(good.sum(), index)], axis=1)
            )
        table = np.concatenate(pieces)
        unique, which = np.unique(table[:, :2], axis=0, return_inverse=True)
        return _Seen(
            xy_px=xy_px,
            row=unique[:, 0],
            point=unique[:, 1],
            votes=np.unique(np.stack([which.ravel(), table[:, 2]], axis=1), axis=0),
            matches=matches,
        )

    def _seen_readings(self, name: str, references: Sequence[str]) -> _Seen:
        """Points of the map, each at the mean of what the readings from all images say."""
        unit = max(1.0, max(self.records[name].size) / 1600)
        parts: list[tuple[np.ndarray, ...]] = []
        for index, reference in enumerate(references):
            view = self.map.views[reference]
            reading = PairReading.from_arrays(self.matches.get(f"{name}\t{reference}")[0])
            anchor, xy, certainty = reading.direction(1)
            point = view.points[_posed(view)[anchor]]
            parts.append((point, xy, certainty, np.full(len(point), index)))
        if not parts:
            nothing = np.zeros(0, np.int64)
            return _Seen(
                xy_px=np.zeros((0, 2)), row=nothing, point=nothing,
                votes=np.zeros((0, 2), np.int64), matches=0,
            )  # fmt: skip
        point, xy, score, image = (np.concatenate(column) for column in zip(*parts, strict=True))
        ids, which = np.unique(point, return_inverse=True)
        merged, used = merge_readings(which, xy, score, self.options.max_spread * unit, len(ids))
        return _Seen(
            xy_px=merged,
            row=np.arange(len(ids)),
            point=ids,
            votes=np.unique(np.stack([which[used], image[used]], axis=1), axis=0),
            matches=len(point),
        )

    def _result(self, name: str, references: Sequence[str]) -> QueryResult:
        arrays, attributes = self.poses.get(name)
        camera, how = self.cameras[name]
        result = QueryResult(
            name=name,
            status=str(attributes["status"]),
            reason=str(attributes["reason"]),
            correspondences=int(attributes["correspondences"]),
            inliers=int(attributes["inliers"]),
            intrinsics=how,
            matches=int(attributes["matches"]),
        )
        if "rotation" in arrays:
            result.pose = (np.array(arrays["rotation"]), np.array(arrays["translation"]))
            result.error_px = float(attributes["error_px"])
            params = tuple(float(p) for p in arrays["params"])
            result.camera = dataclasses.replace(camera, params=params, names=[name])
            votes = arrays["votes"]
            order = np.argsort(-votes, kind="stable")
            result.references = [(references[i], int(votes[i])) for i in order if votes[i]]
        return result

    # ----------------------------------------------------------------------------------- output

    def _write_model(self) -> None:
        """Map and localised queries as one COLMAP model."""
        good = [r for r in self.results.values() if r.localized]
        self.model_names: dict[str, str] = {}
        if not good:  # what an earlier run found stays
            return
        model = colmap.read_model(self.map.model_folder)
        taken = {image.name for image in model.images.values()}
        new = []
        for result in good:
            if result.pose is None or result.camera is None:
                continue
            name = result.name
            while name in taken:
                name = f"query/{name}"
            taken.add(name)
            self.model_names[result.name] = name
            arrays = self.poses.get(result.name)[0]
            points = np.full(len(arrays["keypoints"]), -1, np.int64)
            points[arrays["row"]] = arrays["point"]
            new.append(
                colmap.NewImage(
                    name=name,
                    camera=result.camera,
                    pose=result.pose,
                    xy_px=arrays["keypoints"].astype(np.float64),
                    points=points,
                )
            )
        renamed = [n for n, other in self.model_names.items() if n != other]
        if renamed:
            self.folder.note(
                f"{len(renamed)} queries have names of the map's images; in sparse/ they are "
                f"called query/... (first: {renamed[0]})."
            )
        colmap.add_images(model, new)
        with self.folder.making("model", "") as made:
            colmap.write_model(model, made.path / "sparse")
        self.model = self.output / "sparse"

    def _report(self) -> None:
        if self.model is None and (self.output / "sparse").exists():
            self.folder.note("poses.txt and sparse/ are still those of the run before.")
        results = [self.results[name] for name in self.names]
        results += [
            QueryResult(name=r.name, status=r.reason, reason=f"{r.reason}: {r.detail}")
            for r in self.image_set.rejected
        ]
        results.sort(key=lambda r: r.name)
        self.rows = results
        turns = self.photographs.turns
        good = [r for r in results if r.localized]
        rows = []
        for r in results:
            row: dict[str, Any] = {
                "name": r.name,
                "status": r.status,
                "reason": r.reason,
                "matches": r.matches,
                "correspondences": r.correspondences,
                "inliers": r.inliers,
                "reprojection_error_px": r.error_px,
                "intrinsics": r.intrinsics,
                **({"rotated_degrees": 90 * turns[r.name]} if r.name in turns else {}),
                "references": [{"name": n, "inliers": count} for n, count in r.references],
            }
            if r.pose is not None and r.camera is not None:
                row["qvec_wxyz"] = list(quaternion(r.pose[0]))
                row["tvec"] = [float(v) for v in r.pose[1]]
                row["center"] = [float(v) for v in r.pose[0].T @ -r.pose[1]]
                row["camera"] = {
                    "model": r.camera.model,
                    "width": r.camera.width,
                    "height": r.camera.height,
                    "params": list(r.camera.params),
                }
                row["model_name"] = self.model_names[r.name]
            rows.append(row)
        median = float(np.median([r.inliers for r in good])) if good else 0.0
        report = {
            "summary": {
                "queries": len(results),
                "localized": len(good),
                "median_inliers": median,
            },
            "map": str(self.map_folder),
            "model": None if self.model is None else "sparse",
            "pairs": self.mode,
            "queries": rows,
            "notes": list(dict.fromkeys(self.folder.notes)),
            "counts": {
                "queries_encoded_now": len(self.encoded),
                "pairs_matched_now": len(self.matched),
                "queries_located_now": len(self.located),
            },
            "settings": {
                "queries": str(self.root),
                **to_mapping(self.options),
                "matcher_used": self.matcher.info.name,
                "matcher_settings": to_mapping(self.matcher.options),
                "weights_sha256": dict(self.matcher.weights_hashes),
                "device": str(self.matcher.device),
            },
            "versions": versions(),
            "timings": dict(self.folder.timings),
        }
        text = json.dumps(report, indent=1, ensure_ascii=False)
        write_atomic(self.output / "report.json", text + "\n")
        write_atomic(self.output / "report.txt", format_table(results))
        if self.model is not None or not (self.output / "poses.txt").exists():
            write_atomic(self.output / "poses.txt", format_poses(results))
        self.report = report
        try:
            self._write_page(report)
        except Exception as error:  # poses are worth more than their report
            logger.warning("report.html could not be written: %s", error)
            logger.debug("", exc_info=True)

    def _write_page(self, report: Mapping[str, Any]) -> None:
        """Queries and images of the map may have the same names: on the page they never do."""
        places = {f"{name} (map)": name for name in self.references}
        sizes = {name: record.size for name, record in self.records.items()}
        for place, name in places.items():
            camera = self.map.views[name].camera
            sizes[place] = camera.width, camera.height
        of_query: dict[str, list[str]] = {name: [] for name in self.names}
        for query, reference in self.pairs:
            of_query[query].append(reference)

        def best(result: QueryResult) -> list[str]:
            if result.localized:
                return [name for name, _ in result.references[:_SHOWN_REFERENCES]]
            listed = of_query[result.name]
            counts = {name: len(self._ends(result.name, name)[2]) for name in listed}
            return sorted(listed, key=lambda name: -counts[name])[:_SHOWN_REFERENCES]

        lost_first = sorted(self.results.values(), key=lambda result: result.localized)
        pairs = [(r.name, f"{name} (map)") for r in lost_first[:MAX_PAIRS] for name in best(r)]

        def picture(name: str) -> np.ndarray | None:
            file: ImageRecord | Path | None = self.records.get(name)
            if file is None:
                file = self.map.images and self.map.images / places[name]
            if file is None:
                return None
            try:
                return image_module.read_rgb(file, max_size=640, upright=False)
            except InputError:
                return None

        def ends(pairs: Sequence[Pair]) -> Iterator[Ends]:
            return (self._ends(query, places[place]) for query, place in pairs)

        write_page(report, self.output, pairs, sizes, picture, ends)

    def _ends(self, name: str, reference: str) -> Ends:
        """Matches of a query with an image of the map, and which of them its pose rests on."""
        view, posed = self.map.views[reference], self.poses.get(name)[0]
        stored = self.matches.get(f"{name}\t{reference}")[0]
        points = posed.get("point", np.zeros(0, np.int64))
        if self.linker.detector_free:
            anchor, xy, _ = PairReading.from_arrays(stored).direction(1)
            rows = _posed(view)[anchor]
            return xy, view.xy_px[rows], np.isin(view.points[rows], points)
        pairs = rows_from_matches0(stored["matches0"]).astype(np.int64)
        pairs = pairs[pairs[:, 1] < len(view.points)]
        keypoints = self.features.get(name)[0]["keypoints"]
        point_of = np.full(len(keypoints), -2, np.int64)  # no point, nor that of no keypoint
        point_of[posed.get("row", points)] = points
        inlier = point_of[pairs[:, 0]] == view.points[pairs[:, 1]]
        return keypoints[pairs[:, 0]], view.xy_px[pairs[:, 1]], inlier


def merge_readings(
    which: np.ndarray, xy: np.ndarray, score: np.ndarray, spread: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """One place for each point from several readings.

    Readings farther than ``spread`` from the median of their point are passed over; a point whose
    readings all are (two that disagree) takes the most certain one.

    Args:
        which: (R,) point of each reading.
        xy: (R, 2) px.
        score: (R,) certainty, the weight of a reading.
        spread: px.
        count: points.

    Returns:
        (count, 2) places, and (R,) bool readings that were used.
    """
    xy = np.asarray(xy, dtype=np.float64)
    score = np.asarray(score, dtype=np.float64)
    sizes = np.bincount(which, minlength=count)
    start = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    median = np.zeros((count, 2))
    for axis in (0, 1):
        ordered = xy[np.lexsort((xy[:, axis], which)), axis]
        median[:, axis] = (ordered[start + (sizes - 1) // 2] + ordered[start + sizes // 2]) / 2
    used = np.linalg.norm(xy - median[which], axis=1) <= spread
    lost = np.bincount(which[used], minlength=count) == 0
    if lost.any():
        best = np.lexsort((-score, which))[start]
        used[best[lost]] = True
    weight = np.where(used, np.maximum(score, 1e-3), 0.0)
    total = np.bincount(which, weight, minlength=count)
    places = np.stack(
        [np.bincount(which, weight * xy[:, axis], minlength=count) / total for axis in (0, 1)], 1
    )
    return places, used


def _one_to_one(seen: _Seen, good: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inlier correspondences with each keypoint and each point once, by most votes."""
    votes = np.bincount(seen.votes[:, 0], minlength=len(seen.row))[good]
    order = good[np.argsort(-votes, kind="stable")]
    _, first = np.unique(seen.row[order], return_index=True)
    order = order[np.sort(first)]
    _, first = np.unique(seen.point[order], return_index=True)
    order = np.sort(order[first])
    return seen.row[order], seen.point[order]


def _posed(view: MapView) -> np.ndarray:
    """Rows of the keypoints of an image of the map that have a 3D point."""
    return np.flatnonzero(view.points >= 0)


def _intrinsics(camera: Any) -> str | None:
    """What --intrinsics says of a camera: its text, or those of an object of COLMAP's."""
    if camera is None or isinstance(camera, str):
        return camera
    try:
        return ",".join([camera.model_name, *(repr(float(value)) for value in camera.params)])
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            f'camera is {camera!r}; it must be "PINHOLE,fx,fy,cx,cy" or a pycolmap.Camera.'
        ) from None


def _stored_vlad(path: Path, stamp: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    try:
        stored = read_npz(path)
    except InputError:  # not there yet, or damaged: it is made again
        return None, None
    if str(stored.get("stamp")) != stamp:
        return None, None
    return stored.get("centres"), stored.get("rows")


def summary_text(result: LocalizeResult) -> str:
    """The last lines of a run, for the terminal."""
    if not result.report:
        return f"Stopped as asked. What is finished is kept in {result.output}."
    summary = result.report["summary"]
    good = [q for q in result.queries.values() if q.localized]
    errors = [q.error_px for q in good if q.error_px is not None]
    return "\n".join(
        [
            format_table(list(result.queries.values())).rstrip(),
            f"{summary['localized']} of {summary['queries']} queries localised, "
            f"{summary['median_inliers']:.0f} inliers (median), "
            f"reprojection error {np.median(errors):.2f} px, {summary['seconds']:.0f} s",
            f"Poses:  {result.output / 'poses.txt'}",
            f"Model:  {result.model}",
        ]
    )


__all__ = [
    "LocalizeOptions",
    "LocalizeResult",
    "Localizer",
    "QueryResult",
    "format_poses",
    "format_table",
    "localize",
    "merge_readings",
    "quaternion",
    "summary_text",
]
