"""How good is a reconstruction: a model against a COLMAP model taken as the truth.

Two views of the same poses, because each hides something:

* after one similarity that lays the model's camera centres on the true ones: rotation error of each
  image in degrees and centre error in the truth's unit. Also in percent of two sizes of the scene,
  so that scenes and papers can be compared:

  - ``radius``: the mean distance of the true camera centres from their mean (the largest such
    distance would give smaller, kinder percentages);
  - ``extent``: the largest distance between any two true camera centres.

* without any alignment: the relative poses of all pairs of true images. The error of a pair is the
  larger of rotation angle and translation direction angle (with its sign: 0 to 180 degrees); its
  AUC punishes missing images, because their pairs count as failures.

Rotation and centre errors are of the registered images only: read them together with the
registered share. The rotation error after alignment holds the error of the alignment itself, which
is large where the centres lie near a line; ``pair_rotation``, of relative rotations, does not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from gim_hloc import colmap
from gim_hloc.errors import InputError
from gim_hloc.files import json_value
from gim_hloc.geometry.pose import (
    align_cameras,
    auc,
    camera_centres,
    relative_pose_errors,
    rotation_error_deg,
)

Cameras = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Image name -> (R (3, 3), t (3,)), world to camera."""

AUC_THRESHOLDS = (0.5, 1.0, 3.0, 5.0)
"""Degrees."""


@dataclass(frozen=True)
class Spread:
    """Three numbers of one distribution; NaN where it is empty."""

    median: float
    mean: float
    max: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        """Summarise values (N,)."""
        if len(values) == 0:
            return cls(math.nan, math.nan, math.nan)
        return cls(float(np.median(values)), float(np.mean(values)), float(np.max(values)))

    def times(self, factor: float) -> Spread:
        """The spread of the values times ``factor``."""
        return Spread(self.median * factor, self.mean * factor, self.max * factor)


@dataclass(frozen=True, kw_only=True)
class ImageScore:
    """Errors of one true image; NaN where the model lacks it or cannot be aligned."""

    name: str  # in the truth
    registered: bool
    rotation_deg: float
    centre: float  # in the truth's unit
    centre_xyz: tuple[float, ...]  # estimated centre in the true world
    true_centre_xyz: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SfmScores:
    """All numbers of one model. Angles in degrees, AUC and percentages in 0 to 100."""

    model: str  # what was judged
    total: int  # images of the truth
    registered: int  # of them in the model
    extra: int  # images of the model that the truth does not have; they are not judged
    rotation: Spread  # degrees after the alignment
    centre: Spread  # truth's unit after the alignment
    radius: float  # truth's unit, see the module
    extent: float  # truth's unit, see the module
    auc: dict[float, float]  # threshold in degrees -> percent
    pair_rotation: Spread  # degrees, relative rotations of pairs of registered images, unaligned
    pair_direction: Spread  # degrees, directions of relative translation of the same pairs
    points: int
    observations: int
    track_length: float  # mean images per point; NaN without points
    reprojection_px: float  # mean over points of their observations' mean; NaN without points
    images: tuple[ImageScore, ...]  # in the truth's name order
    pair_errors: tuple[float, ...]  # degrees, one per pair of true images, infinite for failures

    @property
    def registered_percent(self) -> float:
        """Share of the true images that the model has."""
        return 100.0 * self.registered / self.total

    @property
    def centre_radius_percent(self) -> Spread:
        """Centre errors in percent of the scene radius."""
        return self.centre.times(_percent_of(self.radius))

    @property
    def centre_extent_percent(self) -> Spread:
        """Centre errors in percent of the extent of the camera centres."""
        return self.centre.times(_percent_of(self.extent))

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold; numbers that do not exist are null."""
        return json_value(
            {
                "model": self.model,
                **{name: metric.value(self) for name, metric in METRICS.items()},
                "total": self.total,
                "extra": self.extra,
                "radius": self.radius,
                "extent": self.extent,
                "observations": self.observations,
                "images": [vars(image) for image in self.images],
            }
        )


@dataclass(frozen=True)
class Metric:
    """One number of `SfmScores` under the name that tables and bounds call it by."""

    value: Callable[[SfmScores], float]
    unit: str
    higher_is_better: bool

    def meets(self, value: float, bound: float) -> bool:
        """Whether a value keeps a bound; a number that does not exist never does."""
        return value >= bound if self.higher_is_better else value <= bound


def _auc_metric(threshold: float) -> Metric:
    return Metric(lambda scores: scores.auc[threshold], "%", True)


METRICS: dict[str, Metric] = {
    "registered": Metric(attrgetter("registered"), "images", True),
    "registered_percent": Metric(attrgetter("registered_percent"), "%", True),
    **{f"auc@{threshold:g}": _auc_metric(threshold) for threshold in AUC_THRESHOLDS},
    **{
        f"{name}_{statistic}": Metric(attrgetter(f"{field}.{statistic}"), unit, False)
        for name, field, unit in (
            ("pair_rotation", "pair_rotation", "deg"),
            ("pair_direction", "pair_direction", "deg"),
            ("rotation", "rotation", "deg"),
            ("centre", "centre", "truth unit"),
            ("centre_radius", "centre_radius_percent", "% of radius"),
            ("centre_extent", "centre_extent_percent", "% of extent"),
        )
        for statistic in ("median", "mean", "max")
    },
    "points": Metric(attrgetter("points"), "", True),
    "track_length": Metric(attrgetter("track_length"), "images", True),
    "reprojection": Metric(attrgetter("reprojection_px"), "px", False),
}
"""Every number that can be printed and bounded, by name."""

ALIASES = {"centre": "centre_radius_mean", "rotation": "rotation_mean"}
"""Short names in bounds."""


def evaluate(
    model: Path | str | Cameras,
    truth: Path | str | Cameras,
    *,
    name: str | None = None,
    robust: bool = False,
) -> SfmScores:
    """Judge a model against the truth.

    Images are paired by name, else by name without suffix, else by the file's own name without
    folder and suffix; the two latter only where they are unique on both sides.

    Args:
        model: folder of a COLMAP model (binary or text), or its cameras.
        truth: the same of the truth. It needs no points.
        name: what to call the model; its path by default.
        robust: align with a fit that ignores cameras which are plainly wrong. Their own errors then
            show in full instead of being shared with the good ones.

    Raises:
        InputError: a folder holds no model, the truth has fewer than two images, or no image of the
            model is one of the truth.
    """
    cameras = read_cameras(model)
    true_cameras = read_cameras(truth)
    label = name or (str(model) if isinstance(model, (str, Path)) else "cameras")
    if len(true_cameras) < 2:
        raise InputError(
            f"the truth has {len(true_cameras)} image(s): errors need two or more; truth: {truth}"
        )
    partners = match_names(sorted(cameras), sorted(true_cameras))
    if cameras and not partners:
        raise InputError(
            f"no image of {label} is in the truth: the model has names like "
            f"'{min(cameras)}', the truth like '{min(true_cameras)}'; is it another scene?"
        )

    names = sorted(true_cameras)
    true_rotations, true_translations = _stack(true_cameras, names)
    found = np.array([image in partners for image in names])
    rotations = np.full((len(names), 3, 3), np.nan)
    translations = np.full((len(names), 3), np.nan)
    if found.any():
        chosen = [partners[image] for image in names if image in partners]
        rotations[found], translations[found] = _stack(cameras, chosen)

    true_centres = camera_centres(true_rotations, true_translations)
    aligned = np.full((len(names), 3), np.nan)
    rotation_errors = np.full(len(names), np.nan)
    if found.sum() >= 2:
        centres = camera_centres(rotations[found], translations[found])
        similarity = align_cameras(
            rotations[found], centres, true_rotations[found], true_centres[found], robust=robust
        )
        aligned[found] = similarity(centres)
        turned = rotations[found] @ similarity.rotation.T
        rotation_errors[found] = rotation_error_deg(turned, true_rotations[found])
    centre_errors = np.linalg.norm(aligned - true_centres, axis=1)

    _, pair_rotation, pair_direction = relative_pose_errors(
        rotations, translations, true_rotations, true_translations
    )
    pair_errors = np.maximum(pair_rotation, pair_direction)
    areas = auc(pair_errors, AUC_THRESHOLDS)
    statistics = {} if isinstance(model, Mapping) else colmap.model_statistics(model)
    points = int(statistics.get("points", 0))
    judged = np.isfinite(centre_errors)
    return SfmScores(
        model=label,
        total=len(names),
        registered=len(partners),
        extra=len(cameras) - len(partners),
        rotation=Spread.of(rotation_errors[judged]),
        centre=Spread.of(centre_errors[judged]),
        radius=float(np.linalg.norm(true_centres - true_centres.mean(0), axis=1).mean()),
        extent=float(np.linalg.norm(true_centres[:, None] - true_centres[None], axis=2).max()),
        pair_rotation=Spread.of(pair_rotation[np.isfinite(pair_rotation)]),
        pair_direction=Spread.of(pair_direction[np.isfinite(pair_direction)]),
        auc={t: 100.0 * area for t, area in zip(AUC_THRESHOLDS, areas, strict=True)},
        points=points,
        observations=int(statistics.get("observations", 0)),
        track_length=float(statistics["mean_track_length"]) if points else math.nan,
        reprojection_px=float(statistics["mean_reprojection_error_px"]) if points else math.nan,
        images=tuple(
            ImageScore(
                name=image,
                registered=bool(found[index]),
                rotation_deg=float(rotation_errors[index]),
                centre=float(centre_errors[index]),
                centre_xyz=tuple(aligned[index].tolist()),
                true_centre_xyz=tuple(true_centres[index].tolist()),
            )
            for index, image in enumerate(names)
        ),
        pair_errors=tuple(pair_errors.tolist()),
    )


def match_names(names: Sequence[str], true_names: Sequence[str]) -> dict[str, str]:
    """True name -> name in the model, for images of the truth that the model has.

    Suffixes and folders are looked past only where that leaves no choice, on both sides.
    """
    partners = {name: name for name in true_names if name in set(names)}
    for key in (_without_suffix, _stem):
        rest = _unique(key, set(names) - set(partners.values()))
        true_rest = _unique(key, set(true_names) - set(partners))
        partners.update({true_rest[k]: rest[k] for k in true_rest.keys() & rest.keys()})
    return partners


def find_model(path: Path | str) -> tuple[Path, list[Path]]:
    """The model to judge in a folder (of a run: ``sparse/0``), and the other ones beside it.

    Raises:
        InputError: there is no model.
    """
    model = colmap.find_model(path)
    others = []
    if model != Path(path) and model.name.isdigit():
        numbered = [p for p in model.parent.iterdir() if p.name.isdigit() and p != model]
        others = sorted(numbered, key=lambda p: int(p.name))
    return model, others


def read_cameras(source: Path | str | Cameras) -> Cameras:
    """The poses of a model given as folder; cameras pass through."""
    if isinstance(source, Mapping):
        return source
    return colmap.model_cameras(source)


def parse_bounds(text: str) -> dict[str, float]:
    """Read bounds like ``auc@1=90,centre=0.06``; what is better high is a minimum.

    ``centre`` is short for ``centre_radius_mean`` and ``rotation`` for ``rotation_mean``.

    Raises:
        InputError: a name is not in `METRICS`, or a value is no number.
    """
    bounds = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (part.strip() for part in item.partition("="))
        name = ALIASES.get(name, name)
        if name not in METRICS:
            raise InputError(f"unknown bound '{name}': known are {', '.join(METRICS)}")
        try:
            bounds[name] = float(value)
        except ValueError:
            raise InputError(f"bound '{item}' needs a number: write '{name}=1.5'") from None
    return bounds


def missed_bounds(scores: SfmScores, bounds: Mapping[str, float]) -> list[str]:
    """One sentence for each bound that the scores miss."""
    missed = []
    for name, bound in bounds.items():
        metric = METRICS[name]
        value = metric.value(scores)
        if not metric.meets(value, bound):
            relation = "at least" if metric.higher_is_better else "at most"
            missed.append(
                f"{scores.model}: {name} is {value:.6g} {metric.unit}, "
                f"asked for {relation} {bound:g}"
            )
    return missed


def plot(scores: Sequence[SfmScores], output: Path) -> None:
    """Write a picture: cumulative pair errors of all models, and their cameras from above.

    "Above" is the plane of the two main directions of the true camera centres.

    Args:
        scores: of models of one truth.
        output: file to write; its suffix chooses the format (png, pdf, svg).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    curves, top = figure.subplots(1, 2)
    truth = np.array([image.true_centre_xyz for image in scores[0].images])
    _, _, axes = np.linalg.svd(truth - truth.mean(0), full_matrices=False)
    plane = axes[:2].T
    lowest = 1e-2  # degrees; the axis is logarithmic because models differ by factors
    top.plot(*(truth @ plane).T, "k+", markersize=11, label="truth")
    for one in scores:
        errors = np.sort(np.maximum(one.pair_errors, lowest))
        share = 100 * np.arange(1, len(errors) + 1) / len(errors)
        curves.step(errors, share, where="post", label=f"{one.model} (AUC@1° {one.auc[1.0]:.1f})")
        centres = np.array([image.centre_xyz for image in one.images])
        (marks,) = top.plot(*(centres @ plane).T, ".", label=one.model)
        for a, b in zip(centres @ plane, truth @ plane, strict=True):
            top.plot(*np.stack([a, b]).T, "-", color=marks.get_color(), linewidth=0.8)
    curves.set(
        xscale="log",
        xlim=(lowest, 2 * max(AUC_THRESHOLDS)),
        ylim=(0, 101),
        xlabel="relative pose error [deg]",
        ylabel="pairs below [%]",
    )
    top.set(xlabel="first main direction [truth unit]", ylabel="second main direction")
    top.set_aspect("equal", adjustable="datalim")
    for panel in (curves, top):
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


def _without_suffix(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _unique(key: Callable[[str], str], names: set[str]) -> dict[str, str]:
    counts = Counter(map(key, names))
    return {key(name): name for name in names if counts[key(name)] == 1}


def _stack(cameras: Cameras, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    rotations = np.array([cameras[name][0] for name in names], dtype=np.float64)
    translations = np.array([cameras[name][1] for name in names], dtype=np.float64)
    return rotations.reshape(-1, 3, 3), translations.reshape(-1, 3)


def _percent_of(size: float) -> float:
    return 100.0 / size if size > 0 else math.nan
