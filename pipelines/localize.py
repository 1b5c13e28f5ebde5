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
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from gim_hloc import colmap, engine, matchers
from gim_hloc import images as image_module
from gim_hloc.errors import GimError, InputError, MappingError
from gim_hloc.files import write_atomic
from gim_hloc.masks import MaskFolder
from gim_hloc.matchers.base import Encoding, Matches, Quality, SparseEncoding
from gim_hloc.matchers.common import parse_matcher_options
from gim_hloc.options import CameraOptions, replace, to_mapping
from gim_hloc.pairs.files import read_pairs, write_pairs
from gim_hloc.pairs.retrieval import Lazy, Rows, aggregate, codebook, retrieval
from gim_hloc.pickles import read_npz
from gim_hloc.pipelines import linking
from gim_hloc.pipelines.maps import (
    MapFeatures,
    SceneMap,
    open_map,
    same_features,
    shared_camera,
)
from gim_hloc.pipelines.options import LocalizeOptions
from gim_hloc.pipelines.outcome import versions
from gim_hloc.store import (
    H5Store,
    OutputLock,
    digest,
    encoding_from_arrays,
    encoding_to_arrays,
    matches_to_arrays,
    pair_keys,
    refuse_foreign,
    rows_from_matches0,
)
from gim_hloc.tracks.anchored import AnchoredOptions, Anchors, read_matches, read_pair

if TYPE_CHECKING:
    from gim_hloc.colmap import CameraSpec, Located
    from gim_hloc.images import ImageRecord

logger = logging.getLogger(__name__)

Pair = tuple[str, str]  # (query, image of the map)
Focal = Literal["known", "refine", "estimate"]
_FOCAL: dict[str, Focal] = {"exif": "refine", "estimated": "estimate"}  # else known

FORMAT = 1  # raised when the meaning of stored arrays changes

_COVISIBLE_SEEDS = 5
_SHARED_QUERIES = 50  # that a shared focal length is found with, those with most inliers
_TURN_REFERENCES = 4  # images of the map that a query is turned against
_TURN_LEAST = 30  # a turn with a smaller sum of confidences is none, if the matcher has no bound
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


@dataclass(kw_only=True)
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


def localize(
    map: Path | str,
    queries: Path | str,
    output: Path | str,
    options: LocalizeOptions | None = None,
    *,
    progress: bool = True,
    **overrides: Any,
) -> LocalizeResult:
    """Localise images in an existing model.

    Args:
        map: output folder of ``gim-reconstruct``, or a COLMAP model (then ``features``).
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
    options = replace(options or LocalizeOptions(), overrides)
    return _Localization(Path(map), Path(queries), Path(output), options, progress).run()


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


class _Localization:
    """One run: see the module."""

    def __init__(
        self, map: Path, queries: Path, output: Path, options: LocalizeOptions, progress: bool
    ) -> None:
        self.map_folder, self.root, self.output = map, queries, output
        self.options = options
        self.progress = progress
        self.timings: dict[str, float] = {}
        self.notes: list[str] = []
        self._encoded: set[str] = set()
        self._matched: set[Pair] = set()
        self._located: set[str] = set()
        self.turns: dict[str, int] = {}  # query -> quarter turns clockwise to show it upright

    # ------------------------------------------------------------------------------------ order

    def run(self) -> LocalizeResult:
        options = self.options
        watch = engine.Stopwatch()
        self._check_folders()
        with self._timed("map"):
            self.map: SceneMap = open_map(
                self.map_folder, features=options.features, images=options.images
            )
        with self._timed("scan"):
            self.image_set = image_module.scan(
                self.root,
                min_size=options.min_image_size,
                exclude=[self.output, *([options.masks] if options.masks else [])],
                progress=self.progress,
            )
            image_module.require_usable(self.image_set, 1)
        self.records = {record.name: record for record in self.image_set.images}
        self.names = list(self.records)
        self.references = sorted(self.map.views)
        for rejected in self.image_set.rejected:
            logger.warning("Left out: %s (%s: %s)", rejected.name, rejected.reason, rejected.detail)
        self.masks = self._masks()
        self.guessed, self.sharing = self._cameras()
        self._load_matchers()
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
        with OutputLock(self.output), self._log_file():
            return self._locked_run(watch)

    def _locked_run(self, watch: engine.Stopwatch) -> LocalizeResult:
        self._open_stores()
        self._read_turns()
        try:
            self._encode()
            with self._timed("pairs"):
                pairs = self._pairs()
            self._match(pairs)
            results = self._locate(pairs)
            if self._turn_failed(results, pairs):
                self._encode()
                with self._timed("pairs"):
                    pairs = self._pairs()
                self._match(pairs)
                results = self._locate(pairs)
        finally:
            for store in (self.features, self.matches, self.results):
                store.close()
            if self.map_features is not None:
                self.map_features.close()
        model = self._write_model(results)
        ordered = [results[name] for name in self.names]
        ordered += [
            QueryResult(name=r.name, status=r.reason, reason=f"{r.reason}: {r.detail}")
            for r in self.image_set.rejected
        ]
        ordered.sort(key=lambda r: r.name)
        report = self._report(ordered, model, watch)
        if model is None:
            raise MappingError(
                f"None of the {len(self.names)} queries could be localised; "
                f"{self.output / 'report.txt'} says why for each (first: {ordered[0].reason})."
            )
        return LocalizeResult(
            output=self.output, queries={r.name: r for r in ordered}, model=model, report=report
        )

    # ---------------------------------------------------------------------------------- helpers

    def _check_folders(self) -> None:
        if not self.root.is_dir():
            raise InputError(f"There is no folder of queries {self.root}.")
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"{self.output} is a file; give a folder for the output.")
        for folder, what in ((self.map_folder, "map"), (self.root, "folder of queries")):
            if self.output.resolve() == folder.resolve():
                raise InputError(f"The output folder must not be the {what} ({folder}).")
        refuse_foreign(self.output, other="run.yaml")

    def _masks(self) -> MaskFolder | None:
        if self.options.masks is None:
            return None

        masks = MaskFolder(
            self.options.masks, erode_px=self.options.mask_erode, image_root=self.root
        )
        for warning in masks.check(self.names):
            self._note(warning)
        return masks

    def _note(self, sentence: str) -> None:
        logger.warning("%s", sentence)
        self.notes.append(sentence)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        watch = engine.Stopwatch()
        try:
            yield
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + watch.seconds

    @contextlib.contextmanager
    def _log_file(self) -> Iterator[None]:
        handler = logging.FileHandler(self.output / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        package = logging.getLogger("gim_hloc")
        level = package.level
        package.addHandler(handler)
        package.setLevel(logging.DEBUG)
        logger.debug("run started: %s", " ".join(sys.argv))
        try:
            yield
        except GimError as error:
            logger.debug("run stopped: %s", error)
            raise
        finally:
            package.removeHandler(handler)
            package.setLevel(level)
            handler.close()

    def _bar(self, total: int, title: str, unit: str, done: int = 0) -> Any:
        return tqdm(
            total=total,
            initial=done,
            desc=f"{title:<8}",
            unit=f" {unit}",
            disable=not self.progress,
            dynamic_ncols=True,
        )

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
            logger.warning("%s", note)
        self.notes += notes
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

    # --------------------------------------------------------------------------------- matchers

    def _load_matchers(self) -> None:
        options, made = self.options, self.map.options
        theirs = made.get("matcher")
        if made.get("features"):  # its keypoints came from a file
            theirs = None
        name = options.matcher or theirs
        if name is None:
            raise InputError(
                f"{self.map_folder} does not say which matcher made its keypoints: give --matcher "
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
        self.linked = matchers.describe(name).kind != "sparse"
        keypoints = made.get("max_keypoints")
        if same and not self.linked and keypoints is not None:
            overrides.setdefault("max_keypoints", keypoints)
        self.matcher: Any = matchers.load(name, quality=quality, device=options.device, **overrides)
        self.describer: Any = self.matcher
        if self.linked:
            self.describer = None
            if self.map.images is None:
                raise InputError(
                    f"{name} has no keypoints and needs the map's images, whose folder is not "
                    "known: give --images."
                )
        self.map_features: MapFeatures | None = None
        needs_features = (
            not self.linked
            or options.pairs in ("retrieval", "covisibility")
            or (options.pairs == "auto" and len(self.references) > options.neighbours)
        )
        if needs_features:
            self._open_features(name, quality, made)
        self.anchored = AnchoredOptions()
        self.workers = options.workers or engine.default_workers(self.matcher.device, False)
        self.batch = options.batch_size or (16 if self.matcher.device.type != "cpu" else 1)

    def _open_features(self, name: str, quality: Quality, made: Mapping[str, Any]) -> None:
        """The map's keypoints and descriptors, and the matcher that makes such of queries."""
        if self.map.features is None:
            raise InputError(
                f"{self.map_folder} has no features.h5: give the map's keypoints and descriptors "
                "as --features."
            )
        self.map_features = MapFeatures(self.map.features, self.map.views)
        width = self.map_features.descriptors(next(iter(self.map.views))).shape[1]
        if self.linked:  # only to find similar images
            describer = linking.choose_describer(made.get("anchors") or "auto")
            theirs = made.get("matcher")
            if theirs is not None and matchers.describe(theirs).kind == "sparse":
                describer = theirs
            overrides: dict[str, Any] = {}
            if made.get("max_keypoints") is not None:
                overrides["max_keypoints"] = made["max_keypoints"]
            self.describer = matchers.load(
                describer, quality=quality, device=self.options.device, **overrides
            )
        differing = same_features(self.map.features, self.describer.encode_settings())
        if "matcher" in differing:
            raise InputError(
                f"The keypoints in {self.map.features} are not those of "
                f"{self.describer.info.name}: choose the map's matcher, or give --features."
            )
        self.describer.info.check_descriptors(width, str(self.map.features))
        if differing:
            self._note(
                f"The map's keypoints were made with other settings than those of the queries: "
                f"{', '.join(differing)} differ."
            )

    # ----------------------------------------------------------------------------------- stores

    def _open_stores(self) -> None:
        options = self.options
        base: dict[str, Any] = {"format": FORMAT}
        if self.masks is not None:
            base["mask_erode"] = options.mask_erode
        encode = {} if self.describer is None else self.describer.encode_settings()
        feature_settings = base | {f"encode.{k}": v for k, v in encode.items()}
        match_settings = feature_settings | {
            f"match.{k}": v for k, v in self.matcher.match_settings().items()
        }
        if self.linked:
            match_settings |= {f"warp.{k}": v for k, v in self.matcher.encode_settings().items()}
            match_settings |= {
                f"tracks.{k}": v for k, v in dataclasses.asdict(self.anchored).items()
            }
        keys = pair_keys(sorted({*self.names, *self.references}))
        overwrite = options.overwrite
        self.features = H5Store(self.output / "features.h5", feature_settings, overwrite=overwrite)
        self.matches = H5Store(
            self.output / "matches.h5",
            match_settings,
            key_of=lambda name: "/".join(keys[n] for n in name.split("\t")),
            overwrite=overwrite,
        )
        self.pose_settings = {
            "match": digest(match_settings),
            "map": self.map.stamp(),
            **{
                name: getattr(options, name)
                for name in (
                    "cluster", "max_error", "min_inliers", "min_inlier_ratio", "confidence",
                    "max_trials", "max_spread", "seed",
                )
            },
        }  # fmt: skip
        self.results = H5Store(self.output / "poses.h5", self.pose_settings, overwrite=overwrite)

    def _source(self, name: str) -> str:
        mask = self.masks.sha(name) if self.masks else None
        turn = self.turns.get(name, 0)
        return digest([self.records[name].sha256, mask, *([turn] if turn else [])])

    def _map_source(self, name: str) -> str:
        """Hash of what matches with an image of the map rest on."""
        view = self.map.views[name]
        parts: list[Any] = [self.map.sources.get(name)]
        if self.linked or parts[0] is None:
            parts += [view.xy_px.tobytes().hex(), view.points.tobytes().hex()]
        if parts[0] is None and self.map.features is not None:
            status = self.map.features.stat()
            parts += [status.st_size, status.st_mtime_ns]
        return digest(parts)

    def _pair_source(self, pair: Pair) -> str:
        if pair[1] not in self._map_sources:
            self._map_sources[pair[1]] = self._map_source(pair[1])
        return digest([self._source(pair[0]), self._map_sources[pair[1]]])

    # ----------------------------------------------------------------------------------- encode

    def _read_query(self, name: str, wanted: Any, turn: int | None = None) -> Any:
        record = self.records[name]
        mask = self.masks.load(record) if self.masks is not None else None
        shown = image_module.turned(record, self.turns.get(name, 0) if turn is None else turn)
        return image_module.load(shown, wanted.image_options, mask=mask)

    def _encode(self) -> None:
        self._map_sources: dict[str, str] = {}
        if self.describer is None:
            return
        todo = [n for n in self.names if not self.features.has(n, self._source(n))]
        with (
            self._timed("encode"),
            self._bar(len(self.names), "Encode", "queries", len(self.names) - len(todo)) as bar,
        ):

            def done(name: str, encoding: Encoding) -> None:
                if not isinstance(encoding, SparseEncoding):
                    raise InputError(f"{self.describer.info.name} has no keypoints.")
                arrays, attributes = encoding_to_arrays(encoding)
                self.features.put(name, arrays, self._source(name), **attributes)
                self._encoded.add(name)
                bar.update()

            engine.encode_images(
                self.describer,
                todo,
                lambda name: self._read_query(name, self.describer),
                done,
                workers=self.workers,
            )
            self.features.finalize(self.names, {"matcher": self.describer.info.name})

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

    def _pairs(self) -> list[Pair]:
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
        write_pairs(self.output / "pairs.txt", pairs)
        return pairs

    def _similar(self) -> list[Pair]:
        options = self.options
        features = self.map_features
        if features is None:
            raise InputError("Similar images are found by descriptors; the map has none.")
        names = self.references
        stamp = digest([FORMAT, options.seed, [[n, self._map_source(n)] for n in names]])
        stored = self.output / "retrieval.npz"
        centres, rows = _stored_vlad(stored, stamp)
        local = Lazy(names, features.descriptors)
        if centres is None or rows is None:
            centres = codebook(Rows(names, local), seed=options.seed)
            rows = aggregate(Rows(names, local), centres)
            np.savez(stored, stamp=np.array(stamp), centres=centres, rows=rows)
        k = options.neighbours
        if self.mode == "covisibility":
            k = min(_COVISIBLE_SEEDS, k)
        # A query and an image of the map may have the same name and be different images.
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

    def _match(self, pairs: Sequence[Pair]) -> None:
        todo = [p for p in pairs if not self.matches.has("\t".join(p), self._pair_source(p))]
        with (
            self._timed("match"),
            self._bar(len(pairs), "Match", "pairs", len(pairs) - len(todo)) as bar,
        ):

            def put(pair: Pair, arrays: Mapping[str, np.ndarray]) -> None:
                self.matches.put("\t".join(pair), arrays, self._pair_source(pair))
                self._matched.add(pair)
                bar.update()

            # Queries and images of the map are told apart by a mark: names may be the same.
            marked = [(f"q{a}", f"m{b}") for a, b in todo]
            if self.linked and marked:
                self._match_readings(marked, put)
            elif marked:
                cache = engine.EncodingCache(self._encoding)

                def done(pair: Pair, matches: Matches) -> None:
                    arrays = matches_to_arrays(matches, len(cache.get(pair[0])))  # type: ignore[arg-type]
                    put((pair[0][1:], pair[1][1:]), arrays)

                engine.match_pairs(
                    self.matcher,
                    marked,
                    cache.get,
                    done,
                    workers=self.workers,
                    batch_size=self.batch,
                )
            self.matches.finalize(
                ["\t".join(p) for p in pairs], {"matcher": self.matcher.info.name}
            )
        logger.info("Matched %d pairs (%d reused)", len(self._matched), len(pairs) - len(todo))

    def _encoding(self, marked: str) -> SparseEncoding:
        name = marked[1:]
        if marked[0] == "q":
            return encoding_from_arrays(name, *self.features.get(name))
        if self.map_features is None:
            raise InputError(f"The map has no features of {name}.")
        return self.map_features.encoding(name)

    def _match_readings(self, marked: Sequence[Pair], put: Any) -> None:
        """Read warps, or semi-dense matches, at the map's keypoints that have a 3D point."""
        root = self.map.images
        if root is None:
            raise InputError("The folder of the map's images is not known: give --images.")
        needed = sorted({b[1:] for _, b in marked})
        found = image_module.scan(root, min_size=1, names=needed)
        originals = {record.name: record for record in found.images}
        for name in needed:
            view = self.map.views[name]
            if name not in originals:
                # A twin of another image is none of scan's images, and still one of the map's.
                single = image_module.scan(root, min_size=1, names=[name])
                if not single.images:
                    raise InputError(f"The map's image {root / str(single.rejected[0])}.")
                originals[name] = single.images[0]
            if originals[name].size != (view.camera.width, view.camera.height):
                raise InputError(
                    f"{root / name} is {originals[name].width}x{originals[name].height} but "
                    f"{view.camera.width}x{view.camera.height} in the map."
                )
        anchors = {name: self._map_anchors(name) for name in needed}

        def read(key: str) -> Any:
            if key[0] == "q":
                return self._read_query(key[1:], self.matcher)
            record = image_module.turned(originals[key[1:]], self.map.turns.get(key[1:], 0))
            return image_module.load(record, self.matcher.image_options)

        def work(encodings: list[tuple[Any, Any]]) -> list[dict[str, np.ndarray]]:
            dense = self.matcher.info.kind == "dense"
            call = self.matcher.warp_batch if dense else self.matcher.match_batch
            results = []
            for answer, (a, b) in zip(call(encodings), encodings, strict=True):
                own, none = anchors[b.name][0], _no_anchors(self.records[a.name])
                if dense:
                    reading = read_pair(answer, none, own, self.anchored)
                else:
                    reading = read_matches(
                        answer.keypoints0.numpy(),
                        answer.keypoints1.numpy(),
                        answer.scores.numpy(),
                        none,
                        own,
                        self.anchored,
                    )
                index, xy, certainty = reading.direction(1)
                rows = anchors[b.name][1][index].astype(np.int64)
                results.append({"rows1": rows, "keypoints0": xy, "scores": certainty})
            return results

        report = engine.match_scheduled(
            self.matcher,
            marked,
            read,
            work,
            lambda pair, arrays: put((pair[0][1:], pair[1][1:]), arrays),
            cache_gb=self.options.cache_gb,
            batch_size=self.batch,
            workers=self.workers if self.matcher.info.kind == "semidense" else 1,
        )
        self.notes += report.notes

    def _map_anchors(self, name: str) -> tuple[Anchors, np.ndarray]:
        """Keypoints of an image of the map that have a 3D point, and their rows."""
        view = self.map.views[name]
        rows = np.flatnonzero(view.points >= 0)
        anchors = Anchors(
            xy_px=view.xy_px[rows].astype(np.float32),
            tier=np.ones(len(rows), np.uint8),
            size=(view.camera.width, view.camera.height),
        )
        return anchors, rows

    # ------------------------------------------------------------------------------------ turns

    def _turns_file(self) -> Path:
        return self.output / "turns.json"

    def _read_turns(self) -> None:
        """Turns that an earlier run found; queries it tried in vain are not tried again."""
        self._tried: dict[str, dict[str, Any]] = {}
        if self.options.rotations == "none" or self.options.overwrite:
            return
        try:
            stored = json.loads(self._turns_file().read_text(encoding="utf-8"))
            if stored["settings"] == self.matches.stamp:
                self._tried = {
                    name: {"sha256": str(e["sha256"]), "quarter_turns": int(e["quarter_turns"])}
                    for name, e in stored["images"].items()
                    if name in self.records and e["sha256"] == self.records[name].sha256
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._tried = {}
        self.turns = {n: e["quarter_turns"] for n, e in self._tried.items() if e["quarter_turns"]}

    def _turn_failed(self, results: Mapping[str, QueryResult], pairs: Sequence[Pair]) -> bool:
        """Look for failed queries that are stored turned; True when there are any."""
        failed = ("no_matches", "no_points", "no_pose", "few_inliers")
        todo = [
            name
            for name, result in results.items()
            if result.status in failed and name not in self._tried
        ]
        if self.options.rotations == "none" or self.linked or not todo:
            return False
        if self.matcher.info.rotation_invariant:
            return False
        with self._timed("match"), self._bar(len(todo), "Turn", "queries") as bar:
            for name in todo:
                turn = self._best_turn(name, [b for a, b in pairs if a == name])
                if turn:
                    self.turns[name] = turn
                self._tried[name] = {
                    "sha256": self.records[name].sha256, "quarter_turns": turn,
                }  # fmt: skip
                bar.update()
        content = {"settings": self.matches.stamp, "images": self._tried}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_atomic(self._turns_file(), text + "\n")
        found = [name for name in todo if name in self.turns]
        if found:
            self._note(
                f"{len(found)} queries are stored turned without EXIF saying so and were matched "
                f"upright (first: {found[0]} by {90 * self.turns[found[0]]} degrees clockwise). "
                "Poses are those of the stored files."
            )
        return bool(found)

    def _best_turn(self, name: str, references: Sequence[str]) -> int:
        """Quarter turns that bring far more confidence than the query has as it is; 0 for none."""
        sums = {r: linking.confidence(self.matches.get(f"{name}\t{r}")[0]) for r in references}
        chosen = sorted(references, key=lambda r: -sums[r])[:_TURN_REFERENCES]
        # A wrong turn is found out by the pose, so one good pair is enough to try.
        least = self.matcher.info.min_confidence_sum.get(self.quality, _TURN_LEAST)
        best, most = 0, max(least, 2 * sum(sums[r] for r in chosen))
        for turn in (1, 2, 3):
            encoding = self.matcher.encode(self._read_query(name, self.matcher, turn))
            total = sum(
                float(self.matcher.match(encoding, self._encoding(f"m{r}")).scores.sum())
                for r in chosen
            )
            if total > most:
                best, most = turn, total
        return best

    # ----------------------------------------------------------------------------------- locate

    def _locate(self, pairs: Sequence[Pair]) -> dict[str, QueryResult]:
        of_query: dict[str, list[str]] = {name: [] for name in self.names}
        for query, reference in pairs:
            of_query[query].append(reference)
        self.points, self.positions = self._points()
        self.cameras = dict(self.guessed)
        if self.sharing:
            with self._timed("cameras"):
                self._share_cameras(of_query)
        results: dict[str, QueryResult] = {}
        self.observed: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        with self._timed("locate"), self._bar(len(self.names), "Locate", "queries") as bar:
            for name in self.names:
                source = self._pose_source(name, of_query[name])
                if not self.results.has(name, source):
                    arrays, attributes = self._locate_one(name, of_query[name])
                    self.results.put(name, arrays, source, **attributes)
                    self._located.add(name)
                results[name] = self._result(name, of_query[name])
                logger.debug("%s: %s", name, results[name].reason or "localized")
                bar.update()
            self.results.finalize(self.names, {"map": str(self.map_folder)})
        return results

    def _pose_source(self, name: str, references: Sequence[str]) -> str:
        camera, how = self.cameras[name]
        return digest(
            [
                self._source(name),
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
            key = digest([self.results.stamp, sources])
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

    def _points(self) -> tuple[np.ndarray, np.ndarray]:
        return colmap.point_positions(self.map.model)

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
        nothing = self.masks.nothing_left(self.records[name]) if status and self.masks else None
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
        if not self.linked and not len(seen.xy_px):
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
            if self.linked
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
            arrays = self.matches.get(f"{name}\t{reference}")[0]
            point = self.map.views[reference].points[arrays["rows1"]]
            parts.append(
                (point, arrays["keypoints0"], arrays["scores"], np.full(len(point), index))
            )
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
        arrays, attributes = self.results.get(name)
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

    def _write_model(self, results: Mapping[str, QueryResult]) -> Path | None:
        """Map and localised queries as one COLMAP model."""
        good = [r for r in results.values() if r.localized]
        folder = self.output / "sparse"
        if not good:
            return None
        model = colmap.read_model(self.map.model_folder)
        taken = {image.name for image in model.images.values()}
        new = []
        self.model_names: dict[str, str] = {}
        for result in good:
            if result.pose is None or result.camera is None:
                continue
            name = result.name
            while name in taken:
                name = f"query/{name}"
            taken.add(name)
            self.model_names[result.name] = name
            arrays = self._arrays(result.name)
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
            self._note(
                f"{len(renamed)} queries have names of the map's images; in sparse/ they are "
                f"called query/... (first: {renamed[0]})."
            )
        colmap.add_images(model, new)
        colmap.write_model(model, folder)
        return folder

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        import h5py

        with h5py.File(self.results.path, "r") as file:
            return {k: v[()] for k, v in file[name].items()}

    def _report(
        self, results: Sequence[QueryResult], model: Path | None, watch: engine.Stopwatch
    ) -> dict[str, Any]:
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
                **({"turned_degrees": 90 * self.turns[r.name]} if r.name in self.turns else {}),
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
                "seconds": watch.seconds,
            },
            "map": str(self.map_folder),
            "model": None if model is None else str(model.relative_to(self.output)),
            "pairs": self.mode,
            "queries": rows,
            "notes": list(dict.fromkeys(self.notes)),
            "counts": {
                "queries_encoded_now": len(self._encoded),
                "pairs_matched_now": len(self._matched),
                "queries_located_now": len(self._located),
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
            "timings": dict(self.timings),
        }
        text = json.dumps(report, indent=1, ensure_ascii=False)
        write_atomic(self.output / "report.json", text + "\n")
        write_atomic(self.output / "report.txt", format_table(results))
        write_atomic(self.output / "poses.txt", format_poses(results))
        return report


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


def _no_anchors(record: ImageRecord) -> Anchors:
    return Anchors(xy_px=np.zeros((0, 2), np.float32), tier=np.zeros(0, np.uint8), size=record.size)


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
    "QueryResult",
    "format_poses",
    "format_table",
    "localize",
    "merge_readings",
    "quaternion",
    "summary_text",
]
