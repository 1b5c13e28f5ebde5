"""The report of a run: ``report.html`` for people, ``report.json`` with the same numbers.

The page is one file that loads nothing: styles, scripts, pictures and plotly are inside it, and its
content security policy forbids the browser every request.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from gim_hloc.files import write_atomic
from gim_hloc.pipelines._report_html import ADVICE, UNUSABLE, plural, render_page

logger = logging.getLogger(__name__)

ImageReader = Callable[[str], np.ndarray]
PairMatches = Callable[[str, str], tuple[np.ndarray, np.ndarray, np.ndarray]]

_REQUIRED = ("images", "pairs", "models", "settings", "timings")
_REQUIRED_IN_RECORDS = {
    "images": ("name", "status"),
    "pairs": ("name0", "name1", "matches", "inliers"),
}
# Position of (fx, fy, cx, cy) in the parameters of COLMAP's camera models.
_ONE_FOCAL = (0, 0, 1, 2)
_TWO_FOCALS = (0, 1, 2, 3)
_FISHEYE = ("FISHEYE", "FOV", "EUCM", "DIVISION")


@dataclasses.dataclass(frozen=True)
class CameraView:
    """A registered camera as the 3D view draws it."""

    name: str  # image name, shown on hover
    center: np.ndarray  # (3,) position in world units
    rotation: np.ndarray  # (3, 3) world to camera (x right, y down, z forward)
    focal_px: float  # gives the opening of the drawn pyramid
    width: int  # stored pixels
    height: int  # stored pixels


@dataclasses.dataclass(frozen=True)
class SceneView:
    """Points and cameras of one model, in COLMAP's world frame (arbitrary origin and scale)."""

    points_xyz: np.ndarray  # (M, 3) float
    points_rgb: np.ndarray  # (M, 3) uint8
    cameras: list[CameraView]


def write_report(
    report: Mapping[str, Any],
    output: Path,
    *,
    images: ImageReader | None = None,
    scene: SceneView | None = None,
    pair_matches: PairMatches | None = None,
) -> tuple[Path, Path]:
    """Writes ``report.html`` and ``report.json`` into a folder, each atomically.

    The JSON file goes first, so that the numbers are safe whatever happens to the page. A part of
    the page that cannot be drawn (a photograph that no longer opens, a damaged match file) is left
    out with a warning in the log.

    Args:
        report: The numbers of the run. ``images``, ``pairs``, ``models``, ``settings`` and
            ``timings`` must be there; totals in ``summary`` that are missing are derived.
        output: Folder of the run; made when it does not exist.
        images: Reads an image by name as RGB uint8, ``(H, W, 3)``, in stored pixels (EXIF
            orientation not applied). Without it the page has no thumbnails.
        scene: Points and cameras of the largest model; without it there is no 3D view.
        pair_matches: Reads the matches of a pair: ``xy0`` and ``xy1`` of shape ``(M, 2)`` in stored
            pixels (integer = pixel centre) and ``inlier`` of shape ``(M,)``, bool.

    Returns:
        Paths of the HTML and the JSON file.

    Raises:
        ValueError: The report lacks a part; the message names it. Nothing is written then.
        OSError: The folder cannot be written.
    """
    full = complete_report(report)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    html_path, json_path = output / "report.html", output / "report.json"
    write_atomic(json_path, _json_text(full))
    page = render_page(full, images=images, scene=scene, pair_matches=pair_matches)
    write_atomic(html_path, page)
    logger.debug("wrote %s (%.1f MB)", html_path, html_path.stat().st_size / 1e6)
    return html_path, json_path


def complete_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a report, makes it plain JSON and adds the totals and verdicts it lacks.

    Args:
        report: As for ``write_report``; left unchanged.

    Returns:
        A deep copy of plain Python values. Non-finite numbers are ``None``. What the caller gave is
        kept; added are missing entries of ``summary`` and the list ``verdicts`` of
        ``{"level": "good" | "warn" | "bad", "text": …}``.

    Raises:
        ValueError: A required key is missing or of the wrong kind; the message names it.
    """
    _check(report)
    full = _plain(report)
    full.setdefault("notes", [])
    full.setdefault("versions", {})
    full["summary"] = _summary(full)
    full["verdicts"] = _verdicts(full)
    return full


def _check(report: Mapping[str, Any]) -> None:
    missing = [key for key in _REQUIRED if key not in report]
    if missing:
        raise ValueError(f"the report lacks {', '.join(map(repr, missing))}")
    for key in ("images", "pairs", "models"):
        if isinstance(report[key], (str, Mapping)) or not isinstance(report[key], Sequence):
            kind = type(report[key]).__name__
            raise ValueError(f"report[{key!r}] must be a list of records, not {kind}")
    for key, fields in _REQUIRED_IN_RECORDS.items():
        for position, record in enumerate(report[key]):
            lacking = [field for field in fields if field not in record]
            if lacking:
                names = ", ".join(map(repr, lacking))
                raise ValueError(f"report[{key!r}][{position}] lacks {names}")


def _plain(value: Any) -> Any:
    """Turns a value into what strict JSON holds."""
    if value is None or (isinstance(value, (bool, int)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, PurePath):
        return value.as_posix()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=repr)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


def _summary(full: dict[str, Any]) -> dict[str, Any]:
    images, pairs, models = full["images"], full["pairs"], full["models"]
    statuses = Counter(image["status"] for image in images)
    largest = models[0] if models else {}
    seconds = [value for value in full["timings"].values() if isinstance(value, (int, float))]
    derived: dict[str, Any] = {
        "images": len(images),
        "usable": len(images) - sum(statuses[status] for status in UNUSABLE),
        "registered": statuses["registered"],
        "models": len(models),
        "points": largest.get("points", 0),
        "observations": largest.get("observations", 0),
        "mean_track_length": largest.get("mean_track_length"),
        "mean_reprojection_error_px": largest.get("mean_reprojection_error_px"),
        "pairs": len(pairs),
        "pairs_matched": sum(1 for pair in pairs if pair["matches"]),
        "pairs_verified": sum(1 for pair in pairs if pair["inliers"]),
        "seconds": sum(seconds),
        "two_view_track_share": _two_view_share(full.get("track_lengths") or {}),
        "missing": {
            status: count for status, count in statuses.most_common() if status != "registered"
        },
    }
    return {**derived, **(full.get("summary") or {})}


def _two_view_share(track_lengths: dict[str, int]) -> float | None:
    total = sum(track_lengths.values())
    return track_lengths.get("2", 0) / total if total else None


def _verdicts(full: dict[str, Any]) -> list[dict[str, str]]:
    """Sentences on the outcome, worst first; one green sentence when nothing is wrong."""
    summary = full["summary"]
    found: list[tuple[str, str]] = []
    listed, registered = summary["images"], summary["registered"]
    if not summary["models"] or not registered:
        found.append(("bad", "No model was built. The reasons are listed per image below."))
    elif registered < listed:
        missing = listed - registered
        harmless = summary["missing"].get("duplicate", 0) == missing
        level = "bad" if registered < listed / 2 else "good" if harmless else "warn"
        known = [status for status in ADVICE if status in summary["missing"]]
        parts = [f"{summary['missing'][status]} {ADVICE[status].short}" for status in known]
        reasons = f" ({', '.join(parts)})" if parts else ""
        verb = "is" if missing == 1 else "are"
        found.append((level, f"{plural(missing, 'image')} {verb} missing{reasons}: see why below."))
    if summary["models"] and summary["models"] > 1:
        sizes = ", ".join(str(model.get("images", "?")) for model in full["models"])
        found.append(
            (
                "warn",
                f"The images fell into {summary['models']} models that share no scale"
                f"{f' ({sizes} images)' if full['models'] else ''}. Images that link the parts, or"
                " more pairs between them, can join them.",
            )
        )
    share = summary["two_view_track_share"]
    if share is not None and share > 0.5:
        found.append(("warn", _two_view_sentence(full, share)))
    found.extend(("warn", sentence) for sentence in _implausible_cameras(full["models"]))
    if not any(level != "good" for level, _ in found):
        if registered == listed:
            everything = "Both images are" if listed == 2 else f"All {listed:,} images are"
            found.insert(0, ("good", f"{everything} registered in one model."))
        else:
            found.insert(0, ("good", "Every image that is not a copy is registered in one model."))
    order = {"bad": 0, "warn": 1, "good": 2}
    found.sort(key=lambda item: order[item[0]])
    return [{"level": level, "text": text} for level, text in found]


def _two_view_sentence(full: dict[str, Any], share: float) -> str:
    registered = max(1, full["summary"]["registered"])
    neighbours = 2 * full["summary"]["pairs_verified"] / registered
    start = f"{share:.0%} of the points are seen by two images only, which leaves poses loose. "
    if registered < 3:
        return start + "With two images there is no third view; add images of the same place."
    if neighbours < min(4.0, registered - 1.0):
        return start + (
            f"Cause: an image has only {neighbours:.1f} verified partners on average, so points"
            " cannot be followed further. Choose more pairs, or take images with more overlap."
        )
    return start + (
        f"There are enough pairs ({neighbours:.1f} verified partners per image), so the cause is"
        " that the matcher hits a different spot in each pair and tracks do not link: typical for"
        " dense matches used without shared keypoints. Use a keypoint matcher or link the tracks."
    )


def _implausible_cameras(models: list[dict[str, Any]]) -> list[str]:
    """Sentences on refined intrinsics that a real lens hardly has."""
    sentences = []
    for index, model in enumerate(models):
        focals: dict[tuple[int, int], list[float]] = {}
        for camera in model.get("cameras") or []:
            lens = _lens(camera)
            if lens is None:
                continue
            fx, fy, cx, cy, width, height = lens
            where = f"Camera {camera.get('id', '?')} of model {index}"
            fisheye = any(word in str(camera.get("model", "")).upper() for word in _FISHEYE)
            field = math.degrees(2 * math.atan2(max(width, height), 2 * fx)) if fx > 0 else 180.0
            if fx <= 0 or (not fisheye and field > 130) or field < 4:
                sentences.append(
                    f"{where} has an implausible focal length: {fx:,.0f} px for {width} by {height}"
                    f" pixels, a field of view of {field:.0f}°. Give the intrinsics if you know"
                    " them, or share one camera between the images."
                )
            elif abs(fx - fy) > 0.1 * max(fx, fy):
                sentences.append(
                    f"{where} has implausible intrinsics: its two focal lengths differ by more"
                    f" than 10 % ({fx:,.0f} and {fy:,.0f} px)."
                )
            elif abs(cx - width / 2) > 0.2 * width or abs(cy - height / 2) > 0.2 * height:
                sentences.append(
                    f"{where} has an implausible principal point: ({cx:,.0f}, {cy:,.0f}) px in an"
                    f" image of {width} by {height}."
                )
            focals.setdefault((width, height), []).append(fx)
        for (width, height), values in focals.items():
            low, high = min(values), max(values)
            if len(values) > 1 and low > 0 and high > 1.3 * low:
                sentences.append(
                    f"The {len(values)} cameras of {width} by {height} pixels in model {index} have"
                    f" focal lengths from {low:,.0f} to {high:,.0f} px. If one lens at one zoom"
                    " took the images, share one camera."
                )
    if len(sentences) > 4:
        rest = len(sentences) - 3
        sentences = [*sentences[:3], f"{rest} more cameras have implausible intrinsics."]
    return sentences


def _lens(camera: dict[str, Any]) -> tuple[float, float, float, float, int, int] | None:
    params = camera.get("params") or []
    name = str(camera.get("model", "")).upper()
    one = name.startswith(("SIMPLE_", "RADIAL")) or name == "EQUIRECTANGULAR"
    places = _ONE_FOCAL if one else _TWO_FOCALS
    width, height = camera.get("width"), camera.get("height")
    if len(params) <= places[-1] or not width or not height or None in params[: places[-1] + 1]:
        return None
    fx, fy, cx, cy = (float(params[place]) for place in places)
    return fx, fy, cx, cy, int(width), int(height)


def _json_text(full: dict[str, Any]) -> str:
    """Strict JSON, a record a line: readable, easy to compare, and compact with 100,000 pairs."""
    text = _json_lines(full, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # file names that are not valid Unicode (Linux keeps any bytes)
        text = _json_lines(full, ensure_ascii=True)
    return text


def _json_lines(full: dict[str, Any], *, ensure_ascii: bool) -> str:
    def dump(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False, indent=indent)

    entries = []
    for key, value in full.items():
        if isinstance(value, list) and value:
            inner = ",\n    ".join(dump(item) for item in value)
            body = f"[\n    {inner}\n  ]"
        else:
            body = dump(value, indent=2).replace("\n", "\n  ")
        entries.append(f"  {dump(key)}: {body}")
    return "{\n" + ",\n".join(entries) + "\n}\n"
