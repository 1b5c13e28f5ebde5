"""Make a set in ZEB's format from a COLMAP model: pairs by overlap, pinhole images, labels.

What comes out is a folder like those of ZEB (`gim_hloc.evaluation.zeb.datasets`) with a
``set.json``, which ``gim-zeb data``, ``run``, ``check`` and ``table`` take beside the twelve.

**Overlap.** Where the model has points: the share of an image that another one sees. The image is
cut into 16x16 cells; of each cell that has points, the share of those that fall inside the other
image, are not behind what is seen there and are not looked at from more than 80 degrees away; the
mean over the cells. So places full of points do not count for more than others, and tracks that the
model's matcher broke count as seen. Without points the same, of a grid of pixels at assumed depths:
a guess. The label has the mean of both directions twice, as ZEB's published labels have.
"""

from __future__ import annotations

import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from gim_hloc import colmap
from gim_hloc.colmap import pinhole, point_positions
from gim_hloc.errors import InputError, OutputError
from gim_hloc.evaluation.options import SEPARATOR, MakeOptions
from gim_hloc.evaluation.pair_set import check_calibration
from gim_hloc.evaluation.zeb.datasets import DESCRIPTION, read_description
from gim_hloc.evaluation.zeb.sets import ZebSet
from gim_hloc.files import write_atomic
from gim_hloc.geometry.pose import relative_pose
from gim_hloc.images import SUFFIXES, read_rgb, scan

if TYPE_CHECKING:
    from gim_hloc.colmap import CameraSpec, MapView

logger = logging.getLogger(__name__)

_BINS = 10
_CELLS = 16  # of an image, in x and in y, over which the overlap is averaged
_DEPTH_CELLS = 32  # of the coarse depth map that tells what is hidden
_HIDDEN = 1.1  # a point is hidden if it is this many times as far as all that is seen around it
_FACING = float(np.cos(np.radians(80.0)))
_POINTS = (64, 1024)  # fewest and most points of an image that are projected into the others
_PROJECTIONS = 4e8  # at most, about, before fewer points are taken
_DEPTH_STEPS = 5
_LONGEST = 80  # bytes of an image's name in files; two of them make a label's name
_SMALLEST = 8  # px of a side
_NAMED = 5  # names in a message


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Pairs of one tenth of overlap."""

    low: float
    high: float
    found: int  # pairs of the model
    taken: int  # of them


@dataclass(frozen=True, kw_only=True)
class MadeSet:
    """What `make_set` wrote."""

    folder: Path
    zeb_set: ZebSet  # all scenes of it
    scene: str
    pairs: int  # of this scene
    images: int
    from_points: bool  # else overlaps are guessed from the poses
    bins: tuple[Bin, ...]
    problems: tuple[str, ...]  # images that could not be used, one sentence each


def make_set(
    model: str | os.PathLike[str],
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: MakeOptions,
    *,
    progress: bool = False,
) -> MadeSet:
    """Make a set from a COLMAP model and its images.

    Images are written as PNG, without distortion (ZEB knows K only), reduced if asked for; of those
    without distortion that are not reduced, the pixels stay as they are. EXIF orientation is not
    applied, as COLMAP does not apply it.

    Args:
        model: folder of a COLMAP model (text or binary) or of a run of ``gim-reconstruct``. Its
            points may be missing.
        images: folder that the model's image names are relative to.
        output: the set becomes ``output/zeb/<name>``.
        options: which pairs.
        progress: show bars.

    Returns:
        What was written. Images that are missing, unreadable or of another size than their camera
        are left out and named in ``problems``.

    Raises:
        InputError: no model, fewer than two usable images, a model without points whose cameras do
            not look at one place, or no pair in the range of overlaps.
        OutputError: the set or the scene exists already.
    """
    images = Path(images)
    folder = Path(output) / "zeb" / options.name.lower()
    described = _require_new(folder, options)
    reconstruction = colmap.read_model(Path(model))
    views = colmap.map_views(reconstruction)
    if len(views) < 2:
        raise InputError(
            f"{model} has {len(views)} registered image{'s' * (len(views) != 1)}; a pair needs two."
        )
    problems = _unusable(images, views, progress)
    for name, reason in problems.items():
        logger.warning("%s %s", name, reason)
    names = sorted(views.keys() - problems.keys())
    if len(names) < 2:
        listed = "; ".join(f"{name} {problems[name]}" for name in sorted(problems)[:_NAMED])
        raise InputError(
            f"{images} has {len(names)} of the {len(views)} images of {model} in a usable state; a "
            f"pair needs two. {listed}."
        )
    frames = _Frames([views[name].camera for name in names], options.max_size)
    cameras = _Cameras(
        K=np.stack([frames[views[name].camera].K for name in names]),
        size=np.array([frames[views[name].camera].size for name in names], dtype=np.float64),
        rotation=np.stack([views[name].pose[0] for name in names]),
        translation=np.stack([views[name].pose[1] for name in names]),
    )
    clouds = _model_clouds(reconstruction, [views[name] for name in names], cameras)
    from_points = clouds is not None
    if clouds is None:
        clouds = _assumed_clouds(cameras, options.depth, str(model))
    overlap = overlaps(cameras, clouds, progress=progress)
    chosen, bins = _draw(overlap, cameras, options, names)

    stems = file_stems(names)
    used = sorted({int(i) for pair in chosen for i in pair})
    folder.mkdir(parents=True, exist_ok=True)
    _write_images(
        [(images / names[i], views[names[i]].camera, _image(folder, options, stems[names[i]]))
         for i in used],
        frames,
        progress,
    )  # fmt: skip
    for i, j in chosen:
        label = _label(stems[names[i]], stems[names[j]], overlap[i, j], cameras, i, j)
        write_atomic(
            folder / f"{options.scene_name}-{stems[names[i]]}-{stems[names[j]]}.txt", label
        )
    scene = {
        "pairs": len(chosen),
        "overlap": "points" if from_points else "assumed depths",
        "options": {k: v for k, v in asdict(options).items() if k != "add"},
        "images": {stems[names[i]]: names[i] for i in used},
    }
    # Last: only with it the folder is a set, so that one that was cut off is none.
    _write_description(folder, options, described, scene)
    return MadeSet(
        folder=folder,
        zeb_set=read_description(folder),
        scene=options.scene_name,
        pairs=len(chosen),
        images=len(used),
        from_points=from_points,
        bins=bins,
        problems=tuple(f"{name} {reason}" for name, reason in problems.items()),
    )


# ------------------------------------------------------------------------------------ files on disk


def _require_new(folder: Path, options: MakeOptions) -> dict[str, Any]:
    """Return the description of the set that a scene is added to; empty for a new set."""
    described: dict[str, Any] = {}
    if (folder / DESCRIPTION).is_file():
        read_description(folder)  # says what is wrong with it
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if not options.add:
            raise OutputError(
                f"{folder} is a set already: choose another name or folder, or add a scene to it "
                "(--add)."
            )
        if options.scene_name in described.get("scenes", {}):
            raise OutputError(
                f"{folder} has a scene {options.scene_name} already: give the new one another name "
                "(--scene)."
            )
        if described.get("separator", SEPARATOR) != SEPARATOR or described.get("strip_suffix"):
            raise OutputError(f"{folder} names its files by other rules: make a set of its own.")
    elif options.add:
        raise OutputError(f"{folder} is no set that a scene could be added to.")
    stale = sorted(folder.glob(f"{options.scene_name}{SEPARATOR}*"))
    if stale:
        raise OutputError(
            f"{folder} holds {len(stale)} files of a scene {options.scene_name} that was not "
            f"finished, such as {stale[0].name}: delete them."
        )
    return described


def _write_description(
    folder: Path, options: MakeOptions, described: dict[str, Any], scene: dict[str, Any]
) -> None:
    scenes = {**described.get("scenes", {}), options.scene_name: scene}
    base = described or {"name": options.name, "separator": SEPARATOR, "strip_suffix": False}
    text = json.dumps({**base, "scenes": scenes}, indent=1, ensure_ascii=False)
    write_atomic(folder / DESCRIPTION, text + "\n")


def file_stems(names: Iterable[str]) -> dict[str, str]:
    """Return what stands for each image in file names, labels and identifiers.

    The name without suffix; of other characters than letters, digits, ``_`` and ``.``, runs become
    ``_``, so that there is neither a folder, a blank nor ZEB's separator. Long names lose their
    front. What then is the same for two images (case apart: some file systems do not tell it) gets
    a number.
    """
    stems: dict[str, str] = {}
    taken: set[str] = set()
    for name in sorted(names):
        pure = PurePosixPath(name)
        bare = str(pure.with_suffix("")) if pure.suffix.lower() in SUFFIXES else name
        stem = re.sub(r"[^\w.]+", "_", unicodedata.normalize("NFC", bare))
        while len(stem.encode()) > _LONGEST:
            stem = stem[1:]
        candidate, number = stem, 2
        while candidate.casefold() in taken:
            candidate, number = f"{stem}_{number}", number + 1
        taken.add(candidate.casefold())
        stems[name] = candidate
    return stems


def _unusable(root: Path, views: Mapping[str, MapView], progress: bool) -> dict[str, str]:
    """Return what is wrong with images of the model, by name."""
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"The image folder {root} {problem}.")
    problems: dict[str, str] = {}
    there = []
    for name in sorted(views):
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name:
            problems[name] = f"is no path relative to {root}"
        elif not (root / name).is_file():
            problems[name] = f"is not in {root}"
        else:
            there.append(name)
    found = scan(root, min_size=_SMALLEST, names=there, upright=False, progress=progress)
    for rejected in found.rejected:
        problems[rejected.name] = f"cannot be used: {rejected.reason} ({rejected.detail})"
    for record in found:
        camera = views[record.name].camera
        if record.size != (camera.width, camera.height):
            problems[record.name] = (
                f"is {record.width}x{record.height}, its camera {camera.width}x{camera.height}: "
                "give the images that the model was made of"
            )
    return problems


def _image(folder: Path, options: MakeOptions, stem: str) -> Path:
    return folder / f"{options.scene_name}{SEPARATOR}{stem}.png"


def _write_images(
    jobs: Sequence[tuple[Path, CameraSpec, Path]], frames: _Frames, progress: bool
) -> None:
    from tqdm import tqdm

    def write(job: tuple[Path, CameraSpec, Path]) -> None:
        source, camera, target = job
        write_atomic(target, _render(source, frames[camera]))

    # Neighbours share cameras, hence the maps that undistort; several at a time are few.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        bar = tqdm(
            pool.map(write, jobs),
            total=len(jobs),
            desc="Write images",
            unit="image",
            disable=not progress,
        )
        for _ in bar:
            pass


def _render(source: Path, frame: _Frame) -> bytes:
    """The image as the frame shows it, as the bytes of a PNG file."""
    import cv2

    pixels = cv2.cvtColor(read_rgb(source, upright=False), cv2.COLOR_RGB2BGR)
    if frame.places is not None:
        x, y = frame.places[..., 0], frame.places[..., 1]
        pixels = cv2.remap(pixels, x, y, cv2.INTER_LINEAR)
    if (pixels.shape[1], pixels.shape[0]) != frame.size:
        pixels = cv2.resize(pixels, frame.size, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".png", pixels)
    if not done:
        raise OutputError(f"{source} cannot be written as PNG.")
    return bytes(data)


def _label(name0: str, name1: str, overlap: float, cameras: _Cameras, i: int, j: int) -> str:
    rotation, translation = relative_pose(
        cameras.rotation[i], cameras.translation[i], cameras.rotation[j], cameras.translation[j]
    )
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, translation
    check_calibration(cameras.K[i], cameras.K[j], pose)
    share = round(float(overlap), 4)
    numbers = [share, share, *cameras.K[i].ravel(), *cameras.K[j].ravel(), *pose.ravel()]
    return " ".join([name0, name1, *(repr(float(number)) for number in numbers)]) + "\n"


# ------------------------------------------------------------------------------------------ cameras


@dataclass(frozen=True, kw_only=True, eq=False)
class _Frame:
    """How images of one camera are stored in the set."""

    K: np.ndarray  # (3, 3), hloc's frame
    size: tuple[int, int]  # (width, height) px
    places: np.ndarray | None  # (H, W, 2) where pixels lie in the source, before any reduction


class _Frames:
    """The frames of cameras; images share cameras, and the maps are large."""

    def __init__(self, cameras: Iterable[CameraSpec], max_size: int | None) -> None:
        self._max_size = max_size
        self._held: dict[tuple[Any, ...], _Frame] = {}
        for camera in cameras:
            self[camera]  # before threads ask

    def __getitem__(self, camera: CameraSpec) -> _Frame:
        key = (camera.model, camera.width, camera.height, camera.params)
        if key not in self._held:
            self._held[key] = self._make(camera)
        return self._held[key]

    def _make(self, camera: CameraSpec) -> _Frame:
        target, places = pinhole(camera)
        width, height = target.width, target.height
        scale = 1.0 if self._max_size is None else min(1.0, self._max_size / max(width, height))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        fx, fy, cx, cy = target.params
        x, y = size[0] / width, size[1] / height
        # COLMAP's origin is the corner of the first pixel, here it is its centre.
        K = np.array([[fx * x, 0.0, cx * x - 0.5], [0.0, fy * y, cy * y - 0.5], [0.0, 0.0, 1.0]])
        return _Frame(K=K, size=size, places=places)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cameras:
    """N pinhole cameras."""

    K: np.ndarray  # (N, 3, 3)
    size: np.ndarray  # (N, 2) width, height
    rotation: np.ndarray  # (N, 3, 3) world to camera
    translation: np.ndarray  # (N, 3)

    def __len__(self) -> int:
        return len(self.K)

    @property
    def centres(self) -> np.ndarray:
        """(N, 3) in the world."""
        return -np.einsum("nji,nj->ni", self.rotation, self.translation)

    def project(self, points: np.ndarray, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (n, M, 2) and depths (n, M) of points (M, 3) in some of the cameras."""
        local = np.einsum("nij,mj->nmi", self.rotation[rows], points)
        local += self.translation[rows, None]
        depth = local[..., 2]
        K = self.K[rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            xy = local[..., :2] / depth[..., None]
        xy = xy * K[:, None, [0, 1], [0, 1]] + K[:, None, :2, 2]
        return xy, depth

    def inside(self, xy: np.ndarray, depth: np.ndarray, rows: slice) -> np.ndarray:
        """Which of these pixels lie in the images and before the cameras."""
        with np.errstate(invalid="ignore"):
            within = (xy >= -0.5).all(-1) & (xy <= self.size[rows, None] - 0.5).all(-1)
        return within & (depth > 0)


# ------------------------------------------------------------------------------------------ overlap


@dataclass(frozen=True, kw_only=True, eq=False)
class _Clouds:
    """What each image shows.

    Attributes:
        points: per image (M, 3) in the world.
        weights: per image (M,), of sum 1; empty where the image shows nothing.
        ids: per image (M,) rows of ``seen``; None for assumed points.
        seen: (N, P) sparse matrix, which image has which point as an observation; or None.
        farthest: (N, D, D) largest depth seen in and around a cell of the image, 0 for none; None:
            nothing is known to hide anything.
    """

    points: Sequence[np.ndarray]
    weights: Sequence[np.ndarray]
    ids: Sequence[np.ndarray] | None = None
    seen: Any = None
    farthest: np.ndarray | None = None


def overlaps(cameras: _Cameras, clouds: _Clouds, *, progress: bool = False) -> np.ndarray:
    """Return the overlap (N, N) of all pairs, the mean of both directions."""
    from tqdm import tqdm

    count = len(cameras)
    result = np.zeros((count, count))
    centres = cameras.centres
    step = max(1, (1 << 20) // _POINTS[1])
    for i in tqdm(range(count), desc="Overlaps", unit="image", disable=not progress):
        points, weights = clouds.points[i], clouds.weights[i]
        if not len(points):
            continue
        rays = points - centres[i]
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        for first in range(0, count, step):
            rows = slice(first, min(first + step, count))
            xy, depth = cameras.project(points, rows)
            visible = cameras.inside(xy, depth, rows)
            others = points - centres[rows, None]
            cosine = np.einsum("nmi,mi->nm", others, rays)
            visible &= cosine > _FACING * np.linalg.norm(others, axis=-1)
            if clouds.farthest is not None:
                visible &= ~_hidden(clouds.farthest[rows], cameras.size[rows], xy, depth, visible)
            if clouds.seen is not None and clouds.ids is not None:
                visible |= clouds.seen[rows][:, clouds.ids[i]].toarray()
            result[i, rows] = visible @ weights
    return (result + result.T) / 2


def _hidden(
    farthest: np.ndarray, size: np.ndarray, xy: np.ndarray, depth: np.ndarray, asked: np.ndarray
) -> np.ndarray:
    """Which of the points asked for lie well behind everything seen around them."""
    cells = np.where(asked[..., None], xy + 0.5, 0.0) / size[:, None] * _DEPTH_CELLS
    column, row = np.clip(cells.astype(int), 0, _DEPTH_CELLS - 1).transpose(2, 0, 1)
    limit = farthest[np.arange(len(farthest))[:, None], row, column]
    hidden: np.ndarray = (limit > 0) & (depth > _HIDDEN * limit)
    return hidden


def _model_clouds(model: Any, views: Sequence[MapView], cameras: _Cameras) -> _Clouds | None:
    """The points that each image observes; None if the model has none."""
    from scipy.sparse import csc_matrix

    all_ids, positions = point_positions(model)
    if not len(all_ids):
        return None
    count = len(cameras)
    most = int(np.clip(_PROJECTIONS / count**2, *_POINTS))
    points, weights, ids = [], [], []
    farthest = np.zeros((count, _DEPTH_CELLS, _DEPTH_CELLS))
    columns, lengths = [], []
    for i, view in enumerate(views):
        own = np.unique(view.points[view.points >= 0])
        known = np.searchsorted(all_ids, own)
        columns.append(known)
        lengths.append(len(known))
        xy, depth = (values[0] for values in cameras.project(positions[known], slice(i, i + 1)))
        # Undistortion cuts the frame: some observations lie outside of it.
        kept = cameras.inside(xy[None], depth[None], slice(i, i + 1))[0]
        known, xy, depth = known[kept], xy[kept], depth[kept]
        relative = (xy + 0.5) / cameras.size[i]
        cells = np.clip((relative * _DEPTH_CELLS).astype(int), 0, _DEPTH_CELLS - 1)
        np.maximum.at(farthest[i], (cells[:, 1], cells[:, 0]), depth)
        if len(known) > most:
            chosen = np.linspace(0, len(known) - 1, most).astype(int)
            known, relative = known[chosen], relative[chosen]
        cells = np.clip((relative * _CELLS).astype(int), 0, _CELLS - 1)
        _, inverse, numbers = np.unique(
            cells[:, 1] * _CELLS + cells[:, 0], return_inverse=True, return_counts=True
        )
        weight = 1.0 / numbers[inverse.ravel()] if len(known) else np.zeros(0)
        points.append(positions[known])
        weights.append(weight / max(len(numbers), 1))
        ids.append(known)
    blind = sum(not len(own) for own in points)
    if blind:
        logger.warning("%d images see no point of the model and are in no pair.", blind)
    rows = np.repeat(np.arange(count), lengths)
    seen = csc_matrix(
        (np.ones(len(rows), dtype=bool), (rows, np.concatenate(columns))),
        shape=(count, len(all_ids)),
    )
    return _Clouds(points=points, weights=weights, ids=ids, seen=seen, farthest=_spread(farthest))


def _spread(cells: np.ndarray) -> np.ndarray:
    """The largest value of each cell and its eight neighbours, (N, D, D)."""
    padded = np.pad(cells, ((0, 0), (1, 1), (1, 1)))
    size = cells.shape[1]
    shifted = [padded[:, y : y + size, x : x + size] for y in range(3) for x in range(3)]
    largest: np.ndarray = np.maximum.reduce(shifted)
    return largest


def _assumed_clouds(cameras: _Cameras, depth: tuple[float, float] | None, model: str) -> _Clouds:
    """A grid of pixels of each image at depths where something may be."""
    if depth is not None:
        ranges = np.tile(np.array(depth, dtype=np.float64), (len(cameras), 1))
    else:
        ranges = _looked_at(cameras, model)[:, None] * np.array([0.7, 1.4])
    fractions = (np.arange(_CELLS) + 0.5) / _CELLS
    grid = np.stack(np.meshgrid(fractions, fractions), axis=-1).reshape(-1, 2)
    points = []
    for i in range(len(cameras)):
        K = cameras.K[i]
        xy = (grid * cameras.size[i] - 0.5 - K[:2, 2]) / K[[0, 1], [0, 1]]
        rays = np.column_stack([xy, np.ones(len(xy))])
        steps = np.geomspace(float(ranges[i, 0]), float(ranges[i, 1]), _DEPTH_STEPS)
        local = (rays[None] * steps[:, None, None]).reshape(-1, 3)
        points.append((local - cameras.translation[i]) @ cameras.rotation[i])
    weight = np.full(len(points[0]), 1 / len(points[0]))
    return _Clouds(points=points, weights=[weight] * len(points))


def _looked_at(cameras: _Cameras, model: str) -> np.ndarray:
    """Depth (N,) of the place nearest to all optical axes.

    Raises:
        InputError: fewer than half of the cameras have it in their image.
    """
    axes, centres = cameras.rotation[:, 2], cameras.centres
    across = np.eye(3) - axes[:, :, None] * axes[:, None]
    place = np.linalg.lstsq(across.sum(0), np.einsum("nij,nj->i", across, centres), rcond=None)[0]
    xy, depth = cameras.project(place[None], slice(None))
    good = cameras.inside(xy, depth, slice(None))[:, 0]
    if good.sum() < len(cameras) / 2:
        raise InputError(
            f"{model} has no points, and its cameras do not look at one place that would tell how "
            "far the scene is. Give the scene's depths (--depth NEAR FAR, in the model's unit), or "
            "triangulate points first: gim-reconstruct IMAGES OUTPUT --poses MODEL."
        )
    return np.where(good, depth[:, 0], np.median(depth[good, 0]))


# ---------------------------------------------------------------------------------------- selection


def _draw(
    overlap: np.ndarray, cameras: _Cameras, options: MakeOptions, names: Sequence[str]
) -> tuple[list[tuple[int, int]], tuple[Bin, ...]]:
    """Pairs of each tenth of overlap, sorted; images in the order of their names.

    Raises:
        InputError: there is no pair in the range.
    """
    rows, columns = np.triu_indices(len(cameras), 1)
    share = overlap[rows, columns]
    # Without a baseline there is no direction to judge.
    baseline = np.linalg.norm(cameras.centres[rows] - cameras.centres[columns], axis=1)
    moved = baseline > 1e-6 * float(np.median(baseline))
    possible = moved & (share >= options.min_overlap) & (share <= options.max_overlap) & (share > 0)
    if not moved.all():
        logger.warning("%d pairs of images were taken from one place.", int((~moved).sum()))
    if not possible.any():
        best = int(np.argmax(np.where(moved, share, -1)))
        pair = f"{names[rows[best]]} and {names[columns[best]]} with {share[best]:.3f}"
        raise InputError(
            f"None of the {len(rows)} pairs has an overlap from {options.min_overlap:g} to "
            f"{options.max_overlap:g}; the largest is that of {pair}."
        )
    # A hair up: 0.3 * 10 is 3, 0.7 * 10 is not 7.
    tenth = np.clip((share * _BINS + 1e-9).astype(int), 0, _BINS - 1)
    generator = np.random.default_rng(options.seed)
    chosen: list[tuple[int, int]] = []
    bins = []
    found = Counter(tenth[possible].tolist())
    for number in range(_BINS):
        if not found[number]:
            continue
        members = np.flatnonzero(possible & (tenth == number))
        if 0 < options.pairs_per_bin < len(members):
            members = np.sort(generator.permutation(members)[: options.pairs_per_bin])
        chosen += [(int(rows[k]), int(columns[k])) for k in members]
        bins.append(
            Bin(
                low=number / _BINS,
                high=(number + 1) / _BINS,
                found=found[number],
                taken=len(members),
            )
        )
    return sorted(chosen), tuple(bins)
