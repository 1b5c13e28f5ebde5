"""The report of a run: ``report.html`` for people, ``report.json`` with the same numbers.

The page is one file that loads nothing: styles, scripts, pictures and plotly are inside it, and its
content security policy forbids the browser every request.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gim_hloc import draw, page
from gim_hloc.files import json_value, write_atomic
from gim_hloc.page import plural
from gim_hloc.pair_viewer import Ends, Pair, embed
from gim_hloc.pipelines import _report_figures as figures
from gim_hloc.pipelines import previews
from gim_hloc.pipelines._report_figures import CameraView, SceneView

if TYPE_CHECKING:
    from markupsafe import Markup
    from plotly.graph_objects import Figure

__all__ = ["CameraView", "SceneView", "complete_report", "write_report"]

logger = logging.getLogger(__name__)

ImageReader = Callable[[str], np.ndarray]
MaskReader = Callable[[str], np.ndarray | None]
PairMatches = Callable[[Sequence[Pair]], Iterable[Ends]]
T = TypeVar("T")

# Position of (fx, fy, cx, cy) in the parameters of COLMAP's camera models.
_ONE_FOCAL = (0, 0, 1, 2)
_TWO_FOCALS = (0, 1, 2, 3)
_FISHEYE = ("FISHEYE", "FOV", "EUCM", "DIVISION")
_MAX_MISSING_PICTURES = 48
_MAX_MASKS = 8
_PAIR_SIZE = (640, 480)  # pixels within which a pair is drawn
_MAX_LINES = {"inlier": 100, "outlier": 60}

#: Statuses of files that never reached the matcher.
UNUSABLE = ("unreadable", "empty", "tiny", "mirrored", "duplicate", "no_pose")


@dataclasses.dataclass(frozen=True)
class Advice:
    """What a status means and what to do about it."""

    short: str  # after a count, inside a sentence
    title: str
    todo: str


#: Why an image is not in the model, in the order of the stages of a run.
ADVICE = {
    "unreadable": Advice(
        "unreadable",
        "Unreadable file",
        "The file could not be decoded. Open it in an image viewer, export it again or delete it.",
    ),
    "empty": Advice("empty", "Empty file", "The file has 0 bytes. Copy it again from its source."),
    "tiny": Advice(
        "too small",
        "Too small",
        "The image is too small to match. Use the original instead of a thumbnail.",
    ),
    "mirrored": Advice(
        "mirrored",
        "Mirrored by EXIF",
        "Its EXIF orientation mirrors it, which COLMAP does not undo. Write the pixels upright"
        " and without that tag.",
    ),
    "no_pose": Advice(
        "without a known pose",
        "No known pose",
        "The given poses do not name it (--missing-poses leave-out). Give its pose, or let the"
        " mapper register it (--missing-poses register).",
    ),
    "duplicate": Advice(
        "duplicate",
        "Copy of another image",
        "Nothing to do: the file is byte for byte the same as one that was used.",
    ),
    "no_features": Advice(
        "without keypoints",
        "No keypoints",
        "Nothing to hold on to was found. Look for blur, a black or blank picture, or a mask that"
        " covers everything (black = ignored).",
    ),
    "no_pairs": Advice(
        "without pairs",
        "In no pair",
        "Pair selection joined it to no other image. Raise the number of neighbours, use exhaustive"
        " pairs, or name its pairs in a file.",
    ),
    "no_matches": Advice(
        "without matches",
        "No matches",
        "Its pairs were tried and nothing matched. Does it show the same place? If so, try a higher"
        " quality or another matcher, or give it pairs with closer views.",
    ),
    "no_verified_matches": Advice(
        "without verified matches",
        "No verified matches",
        "Matches were found, but they fit no single camera motion: too few of them, moving things,"
        " or look-alike structure. Add views in between, mask moving things, try a higher quality.",
    ),
    "not_registered": Advice(
        "not registered",
        "Verified, but not registered",
        "It has verified matches, but too few of them reach points of the model to fix its pose."
        " Add views in between or more pairs; it may also be part of another model.",
    ),
}

_STAGES = {
    "frames": "Pick frames",
    "scan": "Scan images",
    "import": "Import features",
    "encode": "Encode images",
    "pairs": "Choose pairs",
    "match": "Match pairs",
    "rotations": "Find rotated images",
    "link": "Link tracks",
    "cascade": "Match doubtful pairs again",
    "verify": "Verify pairs",
    "map": "Map",
    "rescue": "Look for lost images",
    "refine": "Refine keypoints",
    "reread": "Read warps again",
    "export": "Export",
    "dense": "Dense model",
}

# Of the table of images: key, heading, digits.
_COLUMNS = (
    ("model", "Model", 0),
    ("keypoints", "Keypoints", 0),
    ("pairs", "Pairs", 0),
    ("verified_pairs", "Verified", 0),
    ("inliers", "Inliers", 0),
    ("points", "Points", 0),
    ("mean_reprojection_error_px", "Error (px)", 2),
    ("rotation_stderr_deg", "\N{PLUS-MINUS SIGN} rotation (°)", 3),
    ("direction_stderr_deg", "\N{PLUS-MINUS SIGN} direction (°)", 3),
    ("focal_px", "Focal (px)", 0),
    ("camera_id", "Camera", 0),
)


def write_report(
    report: dict[str, Any],
    output: Path,
    *,
    images: ImageReader | None = None,
    scene: SceneView | None = None,
    pair_matches: PairMatches | None = None,
    masks: MaskReader | None = None,
    dense: Path | None = None,
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json`` into a folder, each atomically.

    The JSON file goes first, so that the numbers are safe whatever happens to the page. A part of
    the page that cannot be drawn (a photograph that no longer opens, a damaged match file) is left
    out with a warning in the log.

    Args:
        report: of ``complete_report``.
        output: folder of the run; made when it does not exist.
        images: reads an image by name as RGB uint8, ``(H, W, 3)``, EXIF orientation not applied.
        scene: points and cameras of the largest model; without it there is no 3D view.
        pair_matches: reads the matches of pairs.
        masks: reads the mask of an image, (H, W) bool, False where it is ignored, or None.
        dense: workspace of the dense model that ``report["dense"]`` is about.

    Returns:
        Paths of the HTML and the JSON file.

    Raises:
        OSError: the folder cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    html_path, json_path = output / "report.html", output / "report.json"
    write_atomic(json_path, _json_text(report))
    pictures = _Pictures(report, images, pair_matches, masks)
    write_atomic(html_path, _render(report, pictures, scene, dense))
    return html_path, json_path


def complete_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report as plain JSON values, with the totals and verdicts that it lacks.

    Args:
        report: with ``images``, ``pairs``, ``models``, ``settings`` and ``timings``; unchanged.

    Returns:
        A deep copy; non-finite numbers are ``None``. Added are missing entries of ``summary`` and
        the list ``verdicts`` of ``{"level": "good" | "warn" | "bad", "text": …}``.
    """
    full = {"notes": [], "versions": {}, **json_value(report)}
    full["summary"] = _summary(full)
    full["verdicts"] = _verdicts(full)
    return full


def _json_text(full: dict[str, Any]) -> str:
    """Strict JSON, a record a line: readable, easy to compare, and compact with 100,000 pairs."""

    def dump(value: Any, indent: int | None = None) -> str:
        # File names that are no valid Unicode: ``write_atomic`` escapes them as JSON does.
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)

    entries = []
    for key, value in full.items():
        if isinstance(value, list) and value:
            body = "[\n    " + ",\n    ".join(map(dump, value)) + "\n  ]"
        else:
            body = dump(value, indent=2).replace("\n", "\n  ")
        entries.append(f"  {dump(key)}: {body}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


# ---------------------------------------------------------------------------------------- numbers


def _summary(full: dict[str, Any]) -> dict[str, Any]:
    images, pairs, models = full["images"], full["pairs"], full["models"]
    statuses = Counter(image["status"] for image in images)
    largest = models[0] if models else {}
    derived: dict[str, Any] = {
        "images": len(images),
        "usable": len(images) - sum(statuses[status] for status in UNUSABLE),
        "registered": sum(image.get("model") == 0 for image in images),
        "models": len(models),
        "points": largest.get("points", 0),
        "observations": largest.get("observations", 0),
        "mean_track_length": largest.get("mean_track_length"),
        "mean_reprojection_error_px": largest.get("mean_reprojection_error_px"),
        "pairs": len(pairs),
        "pairs_matched": sum(1 for pair in pairs if pair["matches"]),
        "pairs_verified": sum(1 for pair in pairs if pair["inliers"]),
        "seconds": sum(full["timings"].values()),
        "seconds_of_all_runs": sum(full["timings"].values()),
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
    missing = sum(summary["missing"].values())
    if not summary["models"] or not registered:
        found.append(("bad", "No model was built. The reasons are listed per image below."))
    elif missing:
        counts = summary["missing"]
        harmless = counts.get("duplicate", 0) == missing
        level = "bad" if registered < listed / 2 else "good" if harmless else "warn"
        parts = [f"{counts[s]} {advice.short}" for s, advice in _advice(counts.keys()).items()]
        reasons = f" ({', '.join(parts)})"
        verb = "is" if missing == 1 else "are"
        found.append((level, f"{plural(missing, 'image')} {verb} missing{reasons}: see why below."))
    if summary["models"] and summary["models"] > 1:
        sizes = ", ".join(str(model.get("images", "?")) for model in full["models"])
        found.append(
            (
                "bad" if registered < listed / 2 else "warn",
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


# ------------------------------------------------------------------------------------------- page


def _guarded(part: str, build: Callable[[], T]) -> T | None:
    """Build a part of the page; one that fails must not cost the others."""
    try:
        return build()
    except Exception:
        logger.warning("the report lacks its part %r", part, exc_info=True)
        return None


class _Pictures:
    """Thumbnails and drawn pairs; every image is read once and kept small."""

    def __init__(
        self,
        full: dict[str, Any],
        read: ImageReader | None,
        matches: PairMatches | None,
        masks: MaskReader | None,
    ) -> None:
        self._full, self._read, self._matches, self._masks = full, read, matches, masks
        self._sizes = {row["name"]: (row.get("width"), row.get("height")) for row in full["images"]}
        self._small: dict[str, tuple[np.ndarray, tuple[int, int]] | None] = {}
        self._best, self._worst = figures.choose_pairs(full["pairs"])

    def _open(self, name: str) -> tuple[np.ndarray, tuple[int, int]] | None:
        """An image within the size of a pair, and the (width, height) of its file."""
        if name not in self._small:
            self._small[name] = None
            try:
                if self._read is not None:
                    picture = draw.fit(self._read(name), *_PAIR_SIZE)
                    self._small[name] = picture, self._sizes[name]
            except Exception as error:
                logger.debug("no thumbnail of %r in the report: %s", name, error)
        return self._small[name]

    def thumbnail(self, name: str) -> str:
        """Address of an image within 200 pixels; empty if it does not open."""
        known = self._open(name)
        return draw.data_url(draw.fit(known[0], 200, 200)) if known else ""

    def pairs(self) -> Iterator[tuple[str, str, list[tuple[str, str, list[str]]]]]:
        """Title, explanation and figures of the best and of the weakest pairs."""
        weakest = "Verified with the lowest share of inliers; then pairs whose matches all failed."
        for title, text, chosen in (
            ("Best", "Most inliers.", self._best),
            ("Weakest", weakest, self._worst),
        ):
            known = [p for p in chosen if self._open(p["name0"]) and self._open(p["name1"])]
            if self._matches is not None and known:
                all_ends = self._matches([(p["name0"], p["name1"]) for p in known])
                shown = [self._figure(p, e) for p, e in zip(known, all_ends, strict=True)]
                yield title, text, shown

    def _figure(self, pair: dict[str, Any], ends: Ends) -> tuple[str, str, list[str]]:
        names = pair["name0"], pair["name1"]
        picture = draw_pair([one for name in names if (one := self._open(name))], *ends)
        share = pair["inliers"] / pair["matches"] if pair["matches"] else 0.0
        text = f"{pair['inliers']:,} inliers of {pair['matches']:,} matches ({share:.1%})"
        return draw.data_url(picture), "", [" \N{EM DASH} ".join(names), text]

    def all_pairs(self, names: Sequence[str]) -> dict[str, Any] | None:
        """What the page shows on a click: pairs of lost images first, in each the weakest."""
        if self._matches is None or not self._full["pairs"]:
            return None
        lost = {row["name"] for row in self._full["images"] if row.get("model") != 0}

        def interest(pair: dict[str, Any]) -> tuple[bool, bool, int, int]:
            whole = lost.isdisjoint((pair["name0"], pair["name1"]))
            return whole, not pair["inliers"], pair["inliers"], -pair["matches"]

        pairs = sorted(self._full["pairs"], key=interest)
        return embed(names, pairs, self._sizes, self._picture, self._matches)

    def masked(self, names: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
        """Figures of some images, evenly spread, with what their masks ignore."""
        if self._masks is None or not names:
            return
        count = min(_MAX_MASKS, len(names))
        for k in np.linspace(0, len(names) - 1, count).round().astype(int):
            mask, picture = self._masks(names[k]), self._picture(names[k])
            if mask is not None and picture is not None:
                text = f"{1 - mask.mean():.0%} ignored"
                yield draw.data_url(draw.shade(picture, mask)), "", [names[k], text]

    def _picture(self, name: str) -> np.ndarray | None:
        known = self._open(name)
        return known[0] if known else None


def draw_pair(
    images: Sequence[tuple[np.ndarray, tuple[int, int]]],
    xy0: np.ndarray,
    xy1: np.ndarray,
    inlier: np.ndarray,
) -> np.ndarray:
    """Two images at one height with some of their matches, inliers green above rejected ones red.

    Args:
        images: picture and (width, height) of each image in the pixels of its points.
        xy0: (M, 2).
        xy1: (M, 2).
        inlier: (M,) bool.
    """
    aspects = [size[0] / size[1] for _, size in images]
    height = min(_PAIR_SIZE[1], (_PAIR_SIZE[0] - draw.GAP) / sum(aspects))
    pictures = [
        draw.resize(picture, (max(1, round(height * aspect)), max(1, round(height))))
        for (picture, _), aspect in zip(images, aspects, strict=True)
    ]
    known = np.isfinite(xy0).all(1) & np.isfinite(xy1).all(1)
    rng = np.random.default_rng(0)
    rows = []
    for kind, chosen in (("outlier", ~inlier), ("inlier", inlier)):
        of_kind = np.flatnonzero(chosen & known)
        rows.append(rng.permutation(of_kind)[: _MAX_LINES[kind]])
    shown = np.concatenate(rows)
    ends = [
        draw.scale_points(xy[shown], size, picture)
        for xy, (_, size), picture in zip((xy0, xy1), images, pictures, strict=True)
    ]
    colours = np.where(inlier[shown, None], draw.INLIER, draw.OUTLIER)
    return draw.draw_matches(pictures, ends, colours, lines=len(shown), radius=2)


def _render(
    full: dict[str, Any], pictures: _Pictures, scene: SceneView | None, dense: Path | None
) -> str:
    summary = full["summary"]
    usable = [image["name"] for image in full["images"] if image["status"] not in UNUSABLE]
    before = full.get("before_refinement")
    metres = next(iter(full.get("metres") or []), None)
    packed = _guarded("scene", lambda: figures.pack_scene(scene) if scene else None)
    charts = {
        "tracks": lambda: figures.track_lengths(full.get("track_lengths") or {}),
        "errors": lambda: figures.reprojection_errors(
            full.get("reprojection_errors") or {}, (before or {}).get("reprojection_errors") or {}
        ),
        "graph": lambda: figures.match_graph(usable, full["pairs"]),
        "scene": lambda: figures.scene_figure(packed) if packed else None,
        "metres": lambda: (
            figures.plan_in_metres(metres, previews.in_metres(metres, scene))
            if metres and scene
            else None
        ),
    }
    timings = {stage: full["timings"][stage] for stage in sorted(full["timings"], key=_stage_order)}
    resumed = summary["seconds_of_all_runs"] > summary["seconds"]
    # Pairs that an earlier run matched cost this one nothing.
    matched = full.get("counts", {}).get("pairs_matched_now", summary["pairs"])
    return page.render(
        "report.html.j2",
        charts={
            name: _guarded(name, functools.partial(_chart, name, build))
            for name, build in charts.items()
        },
        full=full,
        summary=summary,
        missing=_guarded("missing images", lambda: list(_missing(full, pictures))) or [],
        pair_figures=_guarded("pairs", lambda: list(pictures.pairs())) or [],
        masked=_guarded("masks", lambda: list(pictures.masked(usable))) or [],
        pair_data=_guarded("all pairs", lambda: pictures.all_pairs(usable)),
        packed=packed,
        dense=full.get("dense"),
        dense_views=_guarded("dense", lambda: list(previews.dense_views(dense)) if dense else []),
        metres=metres,
        metres_rows=previews.metres_rows(metres) if metres else [],
        max_graph_images=figures.MAX_GRAPH_IMAGES,
        status_words={status: advice.short for status, advice in ADVICE.items()},
        columns=[
            c for c in _COLUMNS if any(image.get(c[0]) is not None for image in full["images"])
        ],
        timings=[
            (_STAGES.get(stage, stage.capitalize()), seconds) for stage, seconds in timings.items()
        ],
        pairs_per_second=matched / timings["match"] if timings.get("match") and not resumed else 0,
        resumed=resumed,
        settings=dict(_flatten(full["settings"])),
    )


def _chart(name: str, build: Callable[[], Figure | None]) -> Markup | None:
    figure = build()
    return page.chart(figure, name) if figure is not None else None


def _stage_order(stage: str) -> int:
    return list(_STAGES).index(stage) if stage in _STAGES else len(_STAGES)


def _missing(
    full: dict[str, Any], pictures: _Pictures
) -> Iterator[tuple[Advice, list[tuple[str, str, list[str]]]]]:
    """Advice and (picture, name, facts) of the images that are not registered, by status."""
    left = _MAX_MISSING_PICTURES
    missing = [image for image in full["images"] if image["status"] != "registered"]
    for status, advice in _advice({image["status"] for image in missing}).items():
        cards = []
        for image in missing:
            if image["status"] != status:
                continue
            picture = pictures.thumbnail(image["name"]) if left > 0 and status != "empty" else ""
            left -= bool(picture)
            counts = [
                plural(image[key], noun)
                for key, noun in (
                    ("keypoints", "keypoint"),
                    ("pairs", "pair"),
                    ("verified_pairs", "verified pair"),
                    ("inliers", "inlier"),
                )
                if image.get(key) is not None and status not in UNUSABLE
            ]
            facts = [fact for fact in (image.get("reason"), " · ".join(counts)) if fact]
            cards.append((picture, image["name"], facts))
        yield advice, cards


def _advice(statuses: Set[str]) -> dict[str, Advice]:
    """Advice on statuses in their order; those that it knows nothing of come last, with none."""
    new = sorted(statuses - ADVICE.keys())
    known = {status: advice for status, advice in ADVICE.items() if status in statuses}
    words = {status: status.replace("_", " ") for status in new}
    return known | {status: Advice(w, w.capitalize(), "") for status, w in words.items()}


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as names with dots and values as text."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
