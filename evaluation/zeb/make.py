"""Make a set in ZEB's format from a COLMAP model: pairs by overlap, pinhole images, labels.

What comes out is a folder like those of ZEB (`gim_hloc.evaluation.zeb.datasets`) with a
``set.json``, which ``gim-zeb data``, ``run``, ``check`` and ``table`` take beside the twelve. A
label has the mean overlap of both directions (`gim_hloc.evaluation.zeb.overlap`) twice, as ZEB's.
"""

from __future__ import annotations

import json
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np

from gim_hloc import colmap
from gim_hloc.colmap import CameraSpec, MapView
from gim_hloc.errors import InputError, OutputError, some
from gim_hloc.evaluation.options import SEPARATOR, MakeOptions
from gim_hloc.evaluation.pair_set import CELL, check_calibration
from gim_hloc.evaluation.zeb.datasets import DESCRIPTION, read_description
from gim_hloc.evaluation.zeb.overlap import Cameras, assumed_clouds, observed_clouds, overlaps
from gim_hloc.evaluation.zeb.sets import ZebSet
from gim_hloc.files import write_atomic
from gim_hloc.geometry.pose import relative_pose
from gim_hloc.images import SUFFIXES, map_in_threads, read_rgb, scan

logger = logging.getLogger(__name__)

_BINS = 10
_LONGEST = 80  # bytes of an image's name in files; two of them make a label's name


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
    reasons = [f"{name} {problems[name]}" for name in sorted(problems)]
    for reason in reasons:
        logger.warning("%s", reason)
    names = sorted(views.keys() - problems.keys())
    if len(names) < 2:
        raise InputError(
            f"{images} has {len(names)} of the {len(views)} images of {model} in a usable state; a "
            f"pair needs two. {some(reasons)}."
        )
    used_views = [views[name] for name in names]
    frames = {_key(view.camera): _frame(view.camera, options.max_size) for view in used_views}
    shown = [frames[_key(view.camera)] for view in used_views]
    cameras = Cameras(
        K=np.stack([frame.K for frame in shown]),
        size=np.array([frame.size for frame in shown], dtype=np.float64),
        rotation=np.stack([view.pose[0] for view in used_views]),
        translation=np.stack([view.pose[1] for view in used_views]),
    )
    ids, positions = colmap.point_positions(reconstruction)
    if len(ids):
        own = [np.unique(view.points[view.points >= 0]) for view in used_views]
        clouds = observed_clouds(cameras, [np.searchsorted(ids, rows) for rows in own], positions)
    else:
        clouds = assumed_clouds(cameras, options.depth, str(model))
    overlap = overlaps(cameras, clouds, progress=progress)
    chosen, bins = _draw(overlap, cameras, options, names)

    stems = file_stems(names)
    scene = f"{options.scene_name}{SEPARATOR}"
    used = sorted({i for pair in chosen for i in pair})
    folder.mkdir(parents=True, exist_ok=True)

    def write(i: int) -> None:
        target = folder / f"{scene}{stems[names[i]]}.png"
        write_atomic(target, _render(images / names[i], shown[i]))

    workers = min(4, os.cpu_count() or 1)
    map_in_threads(write, used, workers=workers, title="Write images", progress=progress)
    for i, j in chosen:
        pair = stems[names[i]], stems[names[j]]
        label = _label(*pair, overlap[i, j], cameras, i, j)
        write_atomic(folder / f"{scene}{SEPARATOR.join(pair)}.txt", label)
    # Last: only with it the folder is a set, so that one that was cut off is none.
    described.setdefault("scenes", {})[options.scene_name] = {
        "pairs": len(chosen),
        "overlap": "points" if len(ids) else "assumed depths",
        "options": {k: v for k, v in asdict(options).items() if k != "add"},
        "images": {stems[names[i]]: names[i] for i in used},
    }
    text = json.dumps(described, indent=1, ensure_ascii=False)
    write_atomic(folder / DESCRIPTION, text + "\n")
    return MadeSet(
        folder=folder,
        zeb_set=read_description(folder),
        scene=options.scene_name,
        pairs=len(chosen),
        images=len(used),
        from_points=len(ids) > 0,
        bins=bins,
        problems=tuple(reasons),
    )


def _require_new(folder: Path, options: MakeOptions) -> dict[str, Any]:
    """The description of the set that a scene is added to, or of a new one."""
    described: dict[str, Any] = {
        "name": options.name, "separator": SEPARATOR, "strip_suffix": False
    }  # fmt: skip
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


def file_stems(names: Iterable[str]) -> dict[str, str]:
    """What stands for each image in file names, labels and identifiers.

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
    """What is wrong with images of the model, by name."""
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
    found = scan(root, min_size=CELL, names=there, upright=False, progress=progress)
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Frame:
    """How images of one camera are stored in the set."""

    K: np.ndarray  # (3, 3), hloc's frame
    size: tuple[int, int]  # (width, height) px
    places: np.ndarray | None  # (H, W, 2) where pixels lie in the source, before any reduction


def _key(camera: CameraSpec) -> tuple[Any, ...]:
    return camera.model, camera.width, camera.height, camera.params


def _frame(camera: CameraSpec, max_size: int | None) -> _Frame:
    """Without distortion, and reduced to a long side."""
    target, places = colmap.pinhole(camera)
    width, height = target.width, target.height
    scale = 1.0 if max_size is None else min(1.0, max_size / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    fx, fy, cx, cy = target.params
    x, y = size[0] / width, size[1] / height
    # COLMAP's origin is the corner of the first pixel, here it is its centre.
    K = np.array([[fx * x, 0.0, cx * x - 0.5], [0.0, fy * y, cy * y - 0.5], [0.0, 0.0, 1.0]])
    return _Frame(K=K, size=size, places=places)


def _render(source: Path, frame: _Frame) -> bytes:
    """The image as the frame shows it, as the bytes of a PNG file."""
    pixels = colmap.resample(read_rgb(source, upright=False), frame.places)
    if (pixels.shape[1], pixels.shape[0]) != frame.size:
        pixels = cv2.resize(pixels, frame.size, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    if not done:
        raise OutputError(f"{source} cannot be written as PNG.")
    return bytes(data)


def _label(name0: str, name1: str, overlap: float, cameras: Cameras, i: int, j: int) -> str:
    rotation, translation = relative_pose(
        cameras.rotation[i], cameras.translation[i], cameras.rotation[j], cameras.translation[j]
    )
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, translation
    check_calibration(cameras.K[i], cameras.K[j], pose)
    share = round(float(overlap), 4)
    numbers = [share, share, *cameras.K[i].ravel(), *cameras.K[j].ravel(), *pose.ravel()]
    return " ".join([name0, name1, *(repr(float(number)) for number in numbers)]) + "\n"


def _draw(
    overlap: np.ndarray, cameras: Cameras, options: MakeOptions, names: Sequence[str]
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
    for number in range(_BINS):
        found = np.flatnonzero(possible & (tenth == number))
        if not len(found):
            continue
        taken = found
        if 0 < options.pairs_per_bin < len(found):
            taken = generator.permutation(found)[: options.pairs_per_bin]
        chosen += [(int(rows[k]), int(columns[k])) for k in taken]
        low, high = number / _BINS, (number + 1) / _BINS
        bins.append(Bin(low=low, high=high, found=len(found), taken=len(taken)))
    return sorted(chosen), tuple(bins)
