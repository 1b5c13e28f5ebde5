"""Lays out ``report.html``: every section is a function from the numbers to HTML."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gim_hloc.pipelines._report_assets import SCRIPT, STYLE
from gim_hloc.pipelines._report_pictures import (
    MAX_GRAPH_IMAGES,
    Thumbnails,
    choose_pairs,
    pack_graph,
    pack_scene,
)

if TYPE_CHECKING:
    from gim_hloc.pipelines.report import ImageReader, PairMatches, SceneView

logger = logging.getLogger(__name__)

_MAX_MISSING_THUMBNAILS = 48
_NONE = "&ndash;"  # a number that is not known
# Inline code and data only: a page under this policy cannot reach any network.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " img-src data: blob:; base-uri 'none'; form-action 'none'"
)


#: Statuses of files that never reached the matcher.
UNUSABLE = ("unreadable", "empty", "tiny", "duplicate")


@dataclass(frozen=True)
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

_STATUS_WORDS = {"registered": "registered"} | {
    status: advice.short for status, advice in ADVICE.items()
}

_STAGES = {
    "scan": "Scan images",
    "import": "Import features",
    "encode": "Encode images",
    "pairs": "Choose pairs",
    "match": "Match pairs",
    "link": "Link tracks",
    "verify": "Verify pairs",
    "map": "Map",
    "refine": "Refine keypoints",
    "reread": "Read warps again",
    "export": "Export",
    "dense": "Dense model",
}


def render_page(
    full: dict[str, Any],
    *,
    images: ImageReader | None,
    scene: SceneView | None,
    pair_matches: PairMatches | None,
) -> str:
    """Builds the whole page.

    Args:
        full: A report as ``complete_report`` returns it.
        images: As in ``write_report``.
        scene: As in ``write_report``.
        pair_matches: As in ``write_report``.

    Returns:
        The text of the HTML file.
    """
    thumbnails = Thumbnails(images)
    data: dict[str, Any] = {}

    def charts_data(key: str, build: Callable[[], Any]) -> bool:
        value = _guarded(key, build)
        if value:
            data[key] = value
        return bool(value)

    charts_data("tracks", lambda: _track_bars(full.get("track_lengths") or {}))
    charts_data("errors", lambda: _error_bars(full.get("reprojection_errors") or {}))
    charts_data(
        "graph",
        lambda: pack_graph(
            [image["name"] for image in full["images"] if image["status"] not in UNUSABLE],
            full["pairs"],
        ),
    )
    if scene is not None:
        charts_data("scene", lambda: pack_scene(scene))

    builders: list[tuple[str, str, str, Callable[[], str]]] = [
        ("missing", "Missing", "Missing images", lambda: _missing(full, thumbnails)),
        ("scene", "3D view", "Points and cameras", lambda: _scene(full, data.get("scene"))),
        ("quality", "Tracks", "Tracks and errors", lambda: _quality(data)),
        ("graph", "Match graph", "Match graph", lambda: _graph(full, data)),
        (
            "pairs",
            "Pairs",
            "Best and weakest pairs",
            lambda: _pairs(full, thumbnails, pair_matches),
        ),
        ("images", "Images", "Images", lambda: _images(full)),
        ("models", "Cameras", "Models and cameras", lambda: _models(full)),
        ("time", "Time", "Time", lambda: _timings(full)),
        ("settings", "Settings", "Settings", lambda: _settings(full)),
    ]
    sections, links = [], []
    for key, link, title, build in builders:
        body = _guarded(key, build)
        if not body:
            continue
        links.append(f'<a href="#{key}">{link}</a>')
        sections.append(f'<section id="{key}"><h2>{title}</h2>{body}</section>')

    plotly = _plotly() if data else ""
    summary = full["summary"]
    title = f"{summary['registered']} / {summary['images']} images registered"
    return "".join(
        (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{_esc(title)} · gim-hloc</title><style>{STYLE}</style></head><body><main>",
            _header(full),
            f'<nav aria-label="Sections">{"".join(links)}</nav>',
            *sections,
            _footer(full),
            "</main>",
            '<script type="application/json" id="report-data">',
            _script_json(data),
            "</script>\n",
            f"<script>{plotly}</script>\n" if plotly else "",
            f"<script>{SCRIPT}</script></body></html>\n",
        )
    )


def _guarded(part: str, build: Callable[[], Any]) -> Any:
    """Builds a part of the page; a part that fails must not cost the others."""
    try:
        return build()
    except Exception:
        logger.warning("the report lacks its part %r", part, exc_info=True)
        return None


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        logger.warning("plotly is not installed: the report has no charts")
        return ""
    return get_plotlyjs()


def _script_json(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---------------------------------------------------------------------------------- numbers


def plural(count: int, noun: str) -> str:
    """Returns ``1 image``, ``2 images``, ``1,024 images``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _esc(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _number(value: Any, digits: int = 0) -> str:
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return _NONE if value is None else _esc(value)
    return f"{value:,.{digits}f}"


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, (int, float)):
        return _NONE
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


# --------------------------------------------------------------------------------- sections


def _header(full: dict[str, Any]) -> str:
    summary = full["summary"]
    level = full["verdicts"][0]["level"] if full["verdicts"] else "good"
    meta = [f"gim-hloc {_esc(full['gim_hloc'])}"] if full.get("gim_hloc") else ["gim-hloc"]
    if full.get("created"):
        meta.append(_esc(str(full["created"]).replace("T", " ", 1)))
    command = f"<pre class=command>{_esc(full['command'])}</pre>" if full.get("command") else ""
    share = summary["registered"] / summary["images"] if summary["images"] else 0.0
    verdicts = "".join(
        f'<li class="{_esc(verdict["level"])}">{_esc(verdict["text"])}</li>'
        for verdict in full["verdicts"]
    )
    notes = "".join(f"<li class=note>{_esc(note)}</li>" for note in full["notes"])
    tiles = [
        _tile("3D points", _number(summary["points"]), _observations(summary)),
        _tile("Track length", _number(summary["mean_track_length"], 2), _two_views(summary)),
        _tile(
            "Reprojection error", _number(summary["mean_reprojection_error_px"], 2), "mean", "px"
        ),
        _tile(
            "Verified pairs",
            _number(summary["pairs_verified"]),
            f"of {_number(summary['pairs'])} tried",
        ),
        _tile("Models", _number(summary["models"]), _model_sizes(full["models"])),
        _tile("Time", _duration(summary["seconds"]), _slowest(full["timings"])),
    ]
    return (
        f'<header><p class=eyebrow>{" · ".join(meta)}</p><h1 class="{level}">'
        f"<strong>{summary['registered']:,} <span>/</span> {summary['images']:,}</strong>"
        f" images registered</h1>"
        f'<div class="share {level}" role=presentation><i style="width:{100 * share:.1f}%"></i>'
        f"</div><ul class=verdicts>{verdicts}{notes}</ul>"
        f"<div class=tiles>{''.join(tiles)}</div>{command}</header>"
    )


def _tile(label: str, value: str, detail: str = "", unit: str = "") -> str:
    unit = f"<small>{unit}</small>" if unit and value != _NONE else ""
    return f"<div class=tile><h3>{label}</h3><b>{value}{unit}</b><p>{detail}</p></div>"


def _observations(summary: dict[str, Any]) -> str:
    return f"{_number(summary['observations'])} observations" if summary["observations"] else ""


def _two_views(summary: dict[str, Any]) -> str:
    share = summary["two_view_track_share"]
    return "mean, in images" if share is None else f"{share:.0%} seen by two images only"


def _model_sizes(models: list[dict[str, Any]]) -> str:
    if not models:
        return "nothing was mapped"
    sizes = [_number(model.get("images")) for model in models[:4]]
    return f"{' + '.join(sizes)}{' + …' if len(models) > 4 else ''} images"


def _slowest(timings: dict[str, Any]) -> str:
    known = {key: value for key, value in timings.items() if isinstance(value, (int, float))}
    if not known or not sum(known.values()):
        return ""
    stage = max(known, key=lambda key: known[key])
    return f"{known[stage] / sum(known.values()):.0%} in “{_esc(_STAGES.get(stage, stage))}”"


def _missing(full: dict[str, Any], thumbnails: Thumbnails) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for image in full["images"]:
        if image["status"] != "registered":
            groups.setdefault(image["status"], []).append(image)
    order = {status: position for position, status in enumerate(ADVICE)}
    left = _MAX_MISSING_THUMBNAILS
    parts = []
    for status in sorted(groups, key=lambda key: order.get(key, len(order))):
        members = groups[status]
        advice = ADVICE.get(status, Advice(status, status.replace("_", " ").capitalize(), ""))
        cards = []
        for image in members:
            url = thumbnails.data_url(image["name"]) if left > 0 and status != "empty" else None
            left -= url is not None
            cards.append(_missing_card(image, url))
        shown, hidden = cards[:24], cards[24:]
        more = ""
        if hidden:
            more = (
                f"<details><summary>{len(hidden):,} more</summary>"
                f"<ul class=cards>{''.join(hidden)}</ul></details>"
            )
        parts.append(
            f"<div class=group><h3>{_esc(advice.title)} <span>{len(members):,}</span></h3>"
            f"<p>{_esc(advice.todo)}</p><ul class=cards>{''.join(shown)}</ul>{more}</div>"
        )
    return "".join(parts)


def _missing_card(image: dict[str, Any], url: str | None) -> str:
    picture = f'<img src="{url}" alt="">' if url else '<span class=blank aria-hidden="true"></span>'
    facts = [_esc(image["reason"])] if image.get("reason") else []
    counts = [
        plural(image[key], noun)
        for key, noun in (
            ("keypoints", "keypoint"),
            ("pairs", "pair"),
            ("verified_pairs", "verified pair"),
            ("inliers", "inlier"),
        )
        if isinstance(image.get(key), int)
    ]
    if counts and image["status"] not in UNUSABLE:
        facts.append(" · ".join(counts))
    return (
        f"<li>{picture}<div><b>{_esc(image['name'])}</b>"
        f"{''.join(f'<p>{fact}</p>' for fact in facts)}</div></li>"
    )


def _scene(full: dict[str, Any], packed: dict[str, Any] | None) -> str:
    if not packed:
        return ""
    shown = f"{packed['shown']:,} of {packed['total']:,} points"
    if packed["shown"] == packed["total"]:
        shown = plural(packed["total"], "point")
    lie = "lies" if packed["far"] == 1 else "lie"
    far = f"; {plural(packed['far'], 'far point')} {lie} outside the view" if packed["far"] else ""
    of_model = " of the largest model" if (full["summary"]["models"] or 0) > 1 else ""
    cameras = plural(len(packed["cameras"]["names"]), "camera")
    size = 2.0 if packed["shown"] < 5000 else 1.5 if packed["shown"] < 20_000 else 1.0
    return (
        "<div class=controls><label>Point size <input type=range id=point-size min=0.5 max=6"
        f" step=0.5 value={size}></label>"
        "<label><input type=checkbox id=show-points checked> Points</label>"
        "<label><input type=checkbox id=show-cameras checked> Cameras</label>"
        "<button type=button id=reset-view>Reset view</button></div>"
        '<div class="chart scene" id=chart-scene></div>'
        f"<p class=caption>{shown} and {cameras}{of_model}{far}. Drag to turn, scroll or pinch to"
        " zoom, right-drag to move; point at a camera for its name.</p>"
    )


def _quality(data: dict[str, Any]) -> str:
    charts = []
    if "tracks" in data:
        charts.append(
            "<figure><figcaption><h3>Track lengths</h3>How many images see a point. Longer tracks"
            " tie more poses together.</figcaption><div class=chart id=chart-tracks></div></figure>"
        )
    if "errors" in data:
        charts.append(
            "<figure><figcaption><h3>Reprojection errors</h3>Distance between a keypoint and its 3D"
            " point seen by the camera.</figcaption><div class=chart id=chart-errors></div>"
            "</figure>"
        )
    return f"<div class=twin>{''.join(charts)}</div>" if charts else ""


def _track_bars(track_lengths: dict[str, int]) -> dict[str, Any] | None:
    lengths = {int(key): int(count) for key, count in track_lengths.items() if count}
    if not lengths:
        return None
    last = max(lengths)
    cut = 20
    labels = [str(length) for length in range(2, min(last, cut) + 1)]
    counts = [lengths.get(length, 0) for length in range(2, min(last, cut) + 1)]
    if last > cut:
        labels.append(f"{cut + 1}+")
        counts.append(sum(count for length, count in lengths.items() if length > cut))
    return {"labels": labels, "counts": counts}


def _error_bars(errors: dict[str, Any]) -> dict[str, Any] | None:
    edges, counts = errors.get("edges") or [], errors.get("counts") or []
    if len(edges) != len(counts) + 1 or not sum(counts):
        return None
    if None in edges:  # an open last bin has no width to draw
        edges, counts = edges[: edges.index(None)], counts[: edges.index(None) - 1]
    return {"edges": edges, "counts": counts} if counts else None


def _graph(full: dict[str, Any], data: dict[str, Any]) -> str:
    summary = full["summary"]
    selection = full.get("pair_selection") or {}
    words = []
    if selection.get("mode"):
        words.append(f"Pairs chosen by <b>{_esc(selection['mode'])}</b>")
        counts = selection.get("counts")
        if isinstance(counts, dict) and counts:
            parts = ", ".join(f"{_esc(key)} {_number(value)}" for key, value in counts.items())
            words.append(f" ({parts})")
        words.append(f": {_esc(selection['why'])}. " if selection.get("why") else ". ")
    words.append(
        f"Of {plural(summary['pairs'], 'pair')}, {_number(summary['pairs_matched'])} have matches"
        f" and {_number(summary['pairs_verified'])} are verified."
    )
    text = f"<p>{''.join(words).replace('.. ', '. ')}</p>{_confidences(full)}"
    if "graph" in data:
        return (
            f"{text}<div class=chart id=chart-graph></div>"
            "<p class=caption>Inliers of each pair, rows and columns in the order of the image"
            " table. Empty cells were not tried. Several dark blocks that nothing joins are the"
            " reason for several models.</p>"
        )
    if len(full["images"]) > MAX_GRAPH_IMAGES:
        text += f"<p class=caption>The matrix is drawn for up to {MAX_GRAPH_IMAGES:,} images.</p>"
    return text if full["pairs"] else ""


def _confidences(full: dict[str, Any]) -> str:
    sums = full.get("confidence_sums")
    if not sums:
        return ""
    head = "".join(f"<th scope=col class=n>{_quantile(q)}" for q in sums["quantiles"])
    rows = "".join(
        f"<tr><td>{kind} ({_number(sums[kind]['pairs'])})"
        + "".join(f"<td class=n>{_number(value, 1)}" for value in sums[kind]["values"])
        + "</tr>"
        for kind in ("verified", "dropped")
        if sums[kind]["pairs"]
    )
    bound = f"at least {sums['bound']:g}" if sums["bound"] else "not bounded"
    return (
        f"<p>Sum of the inliers' confidences of a pair, {bound}. {_esc(sums['meaning'])} "
        f"{_esc(sums['advice'] or '')}</p><div class=scroll><table>"
        f"<thead><tr><th scope=col>Pairs{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _quantile(share: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(share, f"{share:.0%}")


def _pairs(full: dict[str, Any], thumbnails: Thumbnails, pair_matches: PairMatches | None) -> str:
    if pair_matches is None:
        return ""
    best, worst = choose_pairs(full["pairs"])
    parts = []
    for title, text, chosen in (
        ("Best", "Most inliers.", best),
        (
            "Weakest",
            "Verified with the lowest share of inliers; then pairs none of whose matches held.",
            worst,
        ),
    ):
        figures = []
        for pair in chosen:
            url = thumbnails.pair_url(pair["name0"], pair["name1"], pair_matches)
            if url is None:
                continue
            share = pair["inliers"] / pair["matches"] if pair["matches"] else 0.0
            figures.append(
                f'<figure><img src="{url}" alt="Matches drawn as lines"><figcaption>'
                f"<span class=names>{_esc(pair['name0'])} — {_esc(pair['name1'])}</span>"
                f"<b>{_number(pair['inliers'])}</b> inliers of {_number(pair['matches'])} matches"
                f" ({share:.1%})</figcaption></figure>"
            )
        if figures:
            parts.append(
                f"<h3>{title}</h3><p>{text}</p><div class=gallery>{''.join(figures)}</div>"
            )
    if not parts:
        return ""
    return (
        '<p class=legend><i class="line inlier"></i> inlier <i class="line outlier"></i> rejected'
        f" by verification</p>{''.join(parts)}"
    )


_COLUMNS: tuple[tuple[str, str, int | None], ...] = (
    # key, heading, digits (None: text)
    ("name", "Image", None),
    ("status", "Status", None),
    ("model", "Model", 0),
    ("size", "Pixels", None),
    ("keypoints", "Keypoints", 0),
    ("pairs", "Pairs", 0),
    ("verified_pairs", "Verified", 0),
    ("inliers", "Inliers", 0),
    ("points", "Points", 0),
    ("mean_reprojection_error_px", "Error (px)", 2),
    ("focal_px", "Focal (px)", 0),
    ("camera_id", "Camera", 0),
)


def _images(full: dict[str, Any]) -> str:
    images = full["images"]
    if not images:
        return ""
    used = [
        column
        for column in _COLUMNS
        if column[0] in ("name", "status")
        or any(
            image.get("width" if column[0] == "size" else column[0]) is not None for image in images
        )
    ]
    head = "".join(
        f"<th scope=col{'' if digits is None else ' class=n'}><button type=button>{title}</button>"
        for _, title, digits in used
    )
    rows = "".join(_image_row(image, used) for image in images)
    statuses = sorted({image["status"] for image in images}, key=lambda s: (s != "registered", s))
    options = "".join(
        f'<option value="{_esc(status)}">{_esc(_STATUS_WORDS.get(status, status))}</option>'
        for status in statuses
    )
    controls = (
        "<div class=controls><input type=search id=filter-name placeholder='Filter by name'"
        " aria-label='Filter by name'><select id=filter-status aria-label='Filter by status'>"
        f"<option value=''>all statuses</option>{options}</select>"
        f"<span id=filter-count aria-live=polite>{plural(len(images), 'image')}</span></div>"
    )
    return (
        f"{controls}<div class=scroll><table id=image-table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _image_row(image: dict[str, Any], columns: Iterable[tuple[str, str, int | None]]) -> str:
    cells = []
    for key, _, digits in columns:
        value = image.get(key)
        if key == "status":
            level = "good" if value == "registered" else "bad"
            word = _esc(_STATUS_WORDS.get(image["status"], value))
            hint = f' title="{_esc(image["reason"])}"' if image.get("reason") else ""
            cells.append(
                f'<td data-v="{_esc(value)}"{hint}><span class="dot {level}"></span>{word}'
            )
        elif key == "size":
            width, height = image.get("width"), image.get("height")
            if isinstance(width, int) and isinstance(height, int):
                cells.append(f"<td data-v={width * height}>{width} &times; {height}")
            else:
                cells.append(f'<td data-v="">{_NONE}')
        elif digits is None:
            cells.append(f"<th scope=row>{_esc(value)}")
        else:
            number = value if isinstance(value, (int, float)) else ""
            cells.append(f'<td class=n data-v="{number}">{_number(value, digits)}')
    return f"<tr>{''.join(cells)}"


def _models(full: dict[str, Any]) -> str:
    parts = []
    for index, model in enumerate(full["models"]):
        facts = [
            plural(model[key], noun)
            for key, noun in (
                ("images", "image"),
                ("points", "point"),
                ("observations", "observation"),
            )
            if isinstance(model.get(key), int)
        ]
        if isinstance(model.get("mean_track_length"), (int, float)):
            facts.append(f"mean track {model['mean_track_length']:.2f}")
        if isinstance(model.get("mean_reprojection_error_px"), (int, float)):
            facts.append(f"mean error {model['mean_reprojection_error_px']:.2f} px")
        path = f" <code>{_esc(model['path'])}</code>" if model.get("path") else ""
        cameras = model.get("cameras") or []
        rows = "".join(_camera_row(camera) for camera in cameras)
        table = (
            "<div class=scroll><table><thead><tr><th scope=col class=n>Camera<th scope=col>Model"
            "<th scope=col>Pixels<th scope=col class=n>Images<th scope=col>From"
            "<th scope=col>Refined<th scope=col>Standard error"
            f"<th scope=col>Parameters</tr></thead><tbody>{rows}</tbody></table></div>"
            if rows
            else ""
        )
        if len(cameras) > 20:
            table = f"<details><summary>{len(cameras):,} cameras</summary>{table}</details>"
        parts.append(f"<h3>Model {index}{path}</h3><p>{' · '.join(facts)}</p>{table}")
    return "".join(parts)


def _camera_row(camera: dict[str, Any]) -> str:
    params = ", ".join(
        _esc(f"{value:.6g}" if isinstance(value, (int, float)) else value)
        for value in camera.get("params") or []
    )
    refined = _NONE
    if camera.get("refined") is not None:
        refined = "yes" if camera["refined"] else "held"
    if camera.get("principal_point_refined"):
        refined += ", principal point too"
    error = _NONE
    if camera.get("focal_stderr_px") is not None:
        error = (
            f"focal length {camera['focal_stderr_px']:.2g} px, "
            f"principal point {camera['principal_point_stderr_px']:.2g} px"
        )
    return (
        f"<tr><td class=n>{_esc(camera.get('id', '?'))}<td>{_esc(camera.get('model', '?'))}"
        f"<td>{_esc(camera.get('width', '?'))} &times; {_esc(camera.get('height', '?'))}"
        f"<td class=n>{_number(camera.get('images'))}"
        f"<td>{_esc(camera['source']) if 'source' in camera else _NONE}<td>{refined}<td>{error}"
        f"<td><code>{params}</code>"
    )


def _timings(full: dict[str, Any]) -> str:
    known = {k: v for k, v in full["timings"].items() if isinstance(v, (int, float))}
    known = {k: known[k] for k in sorted(known, key=lambda k: [*_STAGES, k].index(k))}
    total, longest = sum(known.values()), max(known.values(), default=0.0)
    if not longest:
        return ""
    rows = "".join(
        f"<tr><th scope=row>{_esc(_STAGES.get(stage, stage))}"
        f'<td class=bar><i style="width:{100 * value / longest:.1f}%"></i>'
        f"<td class=n>{_duration(value)}<td class=n>{value / total:.0%}"
        for stage, value in known.items()
    )
    # Pairs that an earlier run matched cost this one nothing.
    matched = full.get("counts", {}).get("pairs_matched_now", full["summary"]["pairs"])
    speed = ""
    if matched and known.get("match"):
        speed = f"<p class=caption>{matched / known['match']:,.1f} pairs matched per second.</p>"
    return f"<table class=timings><tbody>{rows}</tbody></table>{speed}"


def _settings(full: dict[str, Any]) -> str:
    parts = []
    if full["settings"]:
        rows = "".join(
            f"<tr><th scope=row><code>{_esc(key)}</code><td><code>{_esc(value)}</code>"
            for key, value in _flatten(full["settings"])
        )
        parts.append(
            "<details><summary>Options of this run</summary><div class=scroll>"
            f"<table><tbody>{rows}</tbody></table></div></details>"
        )
    if full["versions"]:
        rows = "".join(
            f"<tr><th scope=row>{_esc(key)}<td>{_esc(value)}"
            for key, value in full["versions"].items()
        )
        parts.append(
            f"<details><summary>Versions</summary><table><tbody>{rows}</tbody></table></details>"
        )
    return "".join(parts)


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, str):
        yield prefix, value
    else:
        yield prefix, json.dumps(value, ensure_ascii=False)


def _footer(full: dict[str, Any]) -> str:
    version = f" {_esc(full['gim_hloc'])}" if full.get("gim_hloc") else ""
    return (
        f"<footer>Written by gim-hloc{version}. The same numbers are in <code>report.json</code>."
        " <noscript>The charts need JavaScript.</noscript></footer>"
    )
