"""What came out of a run: the numbers of the report, the view of the scene, the last lines."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gim_hloc import __version__, colmap, draw
from gim_hloc.pipelines.report import CameraView, SceneView

if TYPE_CHECKING:
    from gim_hloc.colmap import PairVerification
    from gim_hloc.images import ImageSet
    from gim_hloc.pairs.select import Selection
    from gim_hloc.pipelines.reconstruct import ReconstructResult


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"gim_hloc": __version__, "python": platform.python_version()}
    for name in ("torch", "kornia", "pycolmap", "numpy", "h5py", "opencv-python-headless"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def scene_view(model: Any) -> Any:
    """Points and cameras of a model for the report's 3D view."""
    xyz, rgb, _, _ = colmap.points(model)
    cameras = []
    sizes = {c["id"]: (c["width"], c["height"]) for c in colmap.cameras_of(model)}
    for name, image in sorted(colmap.image_statistics(model).items()):
        width, height = sizes[image.camera_id]
        cameras.append(
            CameraView(
                name=name,
                center=-image.rotation.T @ image.translation,
                rotation=image.rotation,
                focal_px=image.focal_px,
                width=width,
                height=height,
            )
        )
    return SceneView(points_xyz=xyz, points_rgb=rgb, cameras=cameras)


PLAN_SIZE = (640, 480)  # (width, height) of the picture of a model, pixels


def plan_view(model: Any) -> np.ndarray:
    """Points and, in red, cameras of a model from above: against the cameras' mean upright."""
    view = scene_view(model)
    count = len(view.points_xyz)
    xyz = np.concatenate([view.points_xyz, [camera.center for camera in view.cameras]])
    places = plan_places(xyz, np.array([camera.rotation for camera in view.cameras]), count)
    picture = np.full((*PLAN_SIZE[::-1], 3), 255, np.uint8)
    draw.draw_points(picture, places[:count], view.points_rgb, radius=1)
    draw.draw_points(picture, places[count:], draw.OUTLIER, radius=4, square=True)
    return picture


def plan_places(xyz: np.ndarray, rotations: np.ndarray, count: int) -> np.ndarray:
    """(N, 2) places in the picture of ``plan_view``.

    Args:
        xyz: (N, 3) points, then cameras. All cameras are inside, and points but for stray ones.
        rotations: (C, 3, 3) of the cameras, world to camera: their second rows point down.
        count: of the points.
    """
    down = rotations[:, 1].mean(axis=0)
    across, ahead = np.linalg.svd(down[None])[2][1:]
    if np.linalg.det([across, ahead, down]) < 0:  # else seen from below
        ahead = -ahead
    flat = (xyz - np.median(xyz, axis=0)) @ np.stack([across, ahead]).T
    low, high = np.quantile(flat, (0.01, 0.99), axis=0)
    low, high = np.minimum(low, flat[count:].min(0)), np.maximum(high, flat[count:].max(0))
    scale = 0.8 * min(np.array(PLAN_SIZE) / np.maximum(high - low, 1e-9))
    places: np.ndarray = (flat - (low + high) / 2) * scale + np.array(PLAN_SIZE) / 2
    return places


def build_report(
    *,
    image_set: ImageSet,
    keypoints: Mapping[str, int],
    selection: Selection,
    verified: Sequence[PairVerification],
    models: Sequence[Any],
    paths: Sequence[str],
    left_model: Mapping[str, str],
    notes: Sequence[str],
    confidence: Mapping[str, Any] | None = None,
    mapped: Any = None,
    pose_errors: Sequence[Mapping[str, Mapping[str, Any]]] = (),
) -> dict[str, Any]:
    """Numbers of a run: what happened to each image and pair, and why.

    Args:
        image_set: all files that were found.
        keypoints: keypoints of each usable image.
        selection: the pairs and why.
        verified: what verification left of each pair.
        models: ``pycolmap.Reconstruction`` objects, largest first.
        paths: where they are, relative to the output.
        left_model: why images left the model they were in.
        notes: sentences for the user.
        confidence: of ``confidence_sums``.
        mapped: the largest model before it was refined.
        pose_errors: of the images of each model.
    """
    of_image: dict[str, dict[str, int]] = {
        record.name: {
            "pairs": 0,
            "matches": 0,
            "verified_pairs": 0,
            "doubtful_pairs": 0,
            "inliers": 0,
        }
        for record in image_set.images
    }
    for pair in verified:
        for name in (pair.name0, pair.name1):
            entry = of_image[name]
            entry["pairs"] += 1
            entry["matches"] += pair.matches
            entry["verified_pairs"] += pair.inliers > 0
            entry["doubtful_pairs"] += pair.doubtful
            entry["inliers"] += pair.inliers
    model_of: dict[str, int] = {}
    details: dict[str, Any] = {}
    for index, model in enumerate(models):
        for name, image in colmap.image_statistics(model).items():
            if name not in model_of:
                model_of[name] = index
                details[name] = image

    rows: list[dict[str, Any]] = []
    for record in image_set.images:
        counts = of_image[record.name]
        row: dict[str, Any] = {
            "name": record.name,
            "width": record.width,
            "height": record.height,
            "keypoints": keypoints.get(record.name, 0),
            **counts,
            "model": model_of.get(record.name),
        }
        row["status"], row["reason"] = _status(row, bool(models), left_model.get(record.name))
        known = details.get(record.name)
        if known is not None:
            row.update(
                camera_id=known.camera_id,
                points=known.points,
                mean_reprojection_error_px=known.mean_reprojection_error_px,
                focal_px=known.focal_px,
            )
            for errors in pose_errors:
                if (error := errors.get(record.name)) is not None:
                    row["rotation_stderr_deg"] = error["rotation_deg"]
                    row["direction_stderr_deg"] = error["direction_deg"]
                    row["stderr_relative_to"] = error["neighbour"]
        rows.append(row)
    rows += [
        {"name": r.name, "status": r.reason, "reason": r.detail, "model": None}
        for r in image_set.rejected
    ]
    rows.sort(key=lambda row: str(row["name"]))

    tracks: dict[str, int] = {}
    if models:
        _, _, lengths, _ = colmap.points(models[0])
        values, counts_of = np.unique(lengths, return_counts=True)
        tracks = {str(int(v)): int(c) for v, c in zip(values, counts_of, strict=True)}
    before = None
    if mapped is not None:
        own = [image.errors_px for image in colmap.image_statistics(mapped).values()]
        before = {**colmap.statistics(mapped), "reprojection_errors": _error_histogram(own)}
    errors_px = [details[name].errors_px for name, index in model_of.items() if index == 0]
    described = []
    for model, path in zip(models, paths, strict=True):
        statistics = colmap.statistics(model)
        described.append({"path": path, **statistics, "cameras": colmap.cameras_of(model)})
    return {
        "gim_hloc": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "images": rows,
        "pairs": [
            {
                "name0": v.name0,
                "name1": v.name1,
                "matches": v.matches,
                "inliers": v.inliers,
                "confidence_sum": v.confidence,
            }
            for v in verified
        ],
        "confidence_sums": confidence,
        "models": described,
        "track_lengths": tracks,
        "reprojection_errors": _error_histogram(errors_px),
        "before_refinement": before,
        "pair_selection": {
            "mode": selection.mode,
            "why": selection.why,
            "counts": selection.counts,
        },
        "notes": list(notes),
    }


def _error_histogram(errors_px: Sequence[np.ndarray]) -> dict[str, Any]:
    edges = np.linspace(0, 4, 41)
    counts, _ = np.histogram(np.clip(np.concatenate([[], *errors_px]), 0, 4 - 1e-9), edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def confidence_sums(
    verified: Sequence[PairVerification], bound: float | None, meaning: str
) -> dict[str, Any] | None:
    """How the sums of the inliers' confidences spread over verified and dropped pairs.

    Args:
        verified: what verification left of each pair.
        bound: below which a pair was dropped, or None.
        meaning: what a match's confidence is.

    Returns:
        None where no pair has confidences.
    """
    kinds: dict[str, list[float]] = {"verified": [], "dropped": []}
    for pair in verified:
        if pair.confidence is not None and pair.matches:
            kinds["verified" if pair.inliers else "dropped"].append(pair.confidence)
    if not any(kinds.values()):
        return None
    advice = (
        "A bound can be set from one folder with photographs of two places: pairs across the two "
        'show in "pairs" of report.json how far unrelated images reach; '
        "--verify.min-confidence-sum a third above that keeps them out."
    )
    return {
        "meaning": meaning,
        "bound": bound,
        "doubtful_pairs": sum(v.doubtful for v in verified),
        "quantiles": list(QUANTILES),
        **{
            kind: {"pairs": len(sums), "values": np.quantile(sums, QUANTILES).round(1).tolist()}
            if sums
            else {"pairs": 0, "values": []}
            for kind, sums in kinds.items()
        },
        "advice": None if bound else advice,
    }


def _status(row: Mapping[str, Any], mapped: bool, left_model: str | None) -> tuple[str, str]:
    """Status of a usable image, and a sentence when it is not registered in the largest model."""
    if row["model"] == 0:
        return "registered", ""
    if row["model"] is not None:
        return "registered", f"in another model (sparse/{row['model']}), not joined to the largest"
    if row["keypoints"] == 0:
        return "no_features", "no keypoints: blank, dark, blurred or masked as a whole"
    if row["pairs"] == 0:
        return "no_pairs", "in no chosen pair"
    if row["matches"] == 0:
        return "no_matches", f"no match in any of its {row['pairs']} pairs"
    if row["verified_pairs"] == 0:
        doubt = " with enough confidence (--verify.min-confidence-sum)"
        return (
            "no_verified_matches",
            f"{row['matches']} matches in {row['pairs']} pairs, none geometrically consistent"
            + (doubt if row["doubtful_pairs"] else ""),
        )
    if left_model:
        return "not_registered", left_model
    what = "COLMAP could not place it" if mapped else "COLMAP built no model"
    return (
        "not_registered",
        f"{what}: {row['inliers']} inliers in {row['verified_pairs']} verified pairs",
    )


def summary_text(result: ReconstructResult) -> str:
    """The last lines of a run, for the terminal."""
    if not result.report:
        return f"Stopped as asked. What is finished is kept in {result.output}."
    summary = result.report["summary"]
    lines = [
        f"{summary['registered']} of {summary['images']} images registered, "
        f"{summary['points']} points, "
        f"{summary['mean_track_length'] or 0:.1f} views a point, "
        f"reprojection error {summary['mean_reprojection_error_px'] or math.nan:.2f} px, "
        f"{summary['seconds']:.0f} s"
    ]
    if summary["models"] > 1:
        sizes = ", ".join(str(m["images"]) for m in result.report["models"])
        lines.append(f"{summary['models']} separate models with {sizes} images")
    missing = [r for r in result.report["images"] if r["status"] != "registered"]
    for row in missing[:10]:
        lines.append(f"  missing: {row['name']} ({row['status']}: {row['reason']})")
    if len(missing) > 10:
        lines.append(f"  ... and {len(missing) - 10} more, see the report")
    lines.append(f"Model:  {result.models[0]}")
    lines.append(f"Report: {result.output / 'report.html'}")
    return "\n".join(lines)
