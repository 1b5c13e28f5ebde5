"""Charts of the report, and which pairs it shows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from PIL import Image

from gim_hloc import page

MAX_POINTS = 60_000
MAX_GRAPH_IMAGES = 1500
_MAX_LABELS = 40  # images whose names stand beside the match graph
_LONGEST_BAR = 20  # track length; longer ones are one bar
_ACCENT, _WARN, _NONE = "#1f918c", "#c98a1b", "#d9836c"  # on light and on dark paper
_GREY, _BAD = "#8a939b", "#d2493f"
_FEW_TO_MANY = ("#bfe0db", "#1f918c", "#0a4a55")


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


# ------------------------------------------------------------------------------------------- bars


def track_lengths(counts: dict[str, int]) -> go.Figure | None:
    """Bars of how many images see a point; None where there are no points."""
    lengths = {int(key): count for key, count in counts.items() if count}
    if not lengths:
        return None
    bars = {str(n): lengths.get(n, 0) for n in range(2, min(max(lengths), _LONGEST_BAR) + 1)}
    longer = sum(count for n, count in lengths.items() if n > _LONGEST_BAR)
    if longer:
        bars[f"{_LONGEST_BAR + 1}+"] = longer
    heights = np.array(list(bars.values()))
    colours = [_ACCENT] * len(bars)
    if heights[0] > heights.sum() / 2:  # of points seen by two images only
        colours[0] = _WARN
    bar = go.Bar(
        x=list(bars),
        y=heights,
        marker_color=colours,
        customdata=100 * heights / heights.sum(),
        hovertemplate="seen by %{x} images: %{y:,} points (%{customdata:.1f} %)<extra></extra>",
    )
    return _bars(bar, "images that see a point", "points", xaxis_type="category")


def reprojection_errors(errors: dict[str, Any], before: dict[str, Any]) -> go.Figure | None:
    """Histogram of reprojection errors and, as a line, of those before refinement, if any."""
    counts = np.array(errors.get("counts") or [0])
    if not counts.any():
        return None
    edges = np.array(errors["edges"])
    bar = go.Bar(
        x=(edges[1:] + edges[:-1]) / 2,
        y=counts,
        width=np.diff(edges),
        marker_color=_ACCENT,
        customdata=[f"{a:.4g} to {b:.4g}" for a, b in itertools.pairwise(edges)],
        hovertemplate="%{customdata} px: %{y:,} observations<extra></extra>",
    )
    figure = _bars(bar, "reprojection error (px)", "observations")
    if before:
        middles = (np.array(before["edges"])[1:] + np.array(before["edges"])[:-1]) / 2
        line = go.Scatter(
            x=middles,
            y=before["counts"],
            mode="lines",
            line={"color": _WARN, "width": 2, "shape": "hvh"},
            name="as mapped",
            hovertemplate="as mapped: %{y:,} observations<extra></extra>",
        )
        figure.add_trace(line)
        figure.update_layout(showlegend=False)
    return figure


def _bars(bar: go.Bar, x: str, y: str, **layout: Any) -> go.Figure:
    figure = go.Figure(bar)
    figure.update_layout(
        height=300,
        bargap=0.15,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        dragmode=False,
        **layout,
    )
    figure.update_xaxes(title_text=x, showgrid=False, fixedrange=True)
    figure.update_yaxes(title_text=y, tickformat="~s", fixedrange=True)
    return figure


# ----------------------------------------------------------------------------------- pairs, graph


def choose_pairs(
    pairs: list[dict[str, Any]], count: int = 6
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Chooses the pairs worth a picture.

    Args:
        pairs: Records with ``name0``, ``name1``, ``matches`` and ``inliers``.
        count: Pairs per list.

    Returns:
        The best pairs (most inliers) and the worst: verified pairs with the lowest share of
        inliers first, for they take part in the model, then pairs whose matches all failed, those
        with most matches first. The best are from the better half of the verified pairs, no pair is
        in both lists, and an image comes up at most twice in a list as long as others are left.
    """
    verified = [pair for pair in pairs if pair["inliers"]]
    failed = [pair for pair in pairs if pair["matches"] and not pair["inliers"]]
    verified.sort(key=lambda pair: -pair["inliers"])
    best = _varied(verified[: (len(verified) + 1) // 2], count)
    shown = {(pair["name0"], pair["name1"]) for pair in best}
    rest = [pair for pair in verified if (pair["name0"], pair["name1"]) not in shown]
    rest.sort(key=lambda pair: pair["inliers"] / max(1, pair["matches"] or 0))
    failed.sort(key=lambda pair: -pair["matches"])
    return best, _varied([*rest, *failed], count)


def _varied(ranked: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    chosen: list[int] = []
    uses: dict[str, int] = {}
    for index, pair in enumerate(ranked):
        if len(chosen) == count:
            break
        names = (pair["name0"], pair["name1"])
        if all(uses.get(name, 0) < 2 for name in names):
            chosen.append(index)
            for name in names:
                uses[name] = uses.get(name, 0) + 1
    taken = set(chosen)
    chosen += [index for index in range(len(ranked)) if index not in taken][: count - len(chosen)]
    return [ranked[index] for index in sorted(chosen)]


def match_graph(names: list[str], pairs: list[dict[str, Any]]) -> go.Figure | None:
    """Inliers of each pair as a matrix; None for fewer than two images or too many."""
    n = len(names)
    if not 2 <= n <= MAX_GRAPH_IMAGES or not pairs:
        return None
    row = {name: position for position, name in enumerate(names)}
    tried = [
        (row[pair["name0"]], row[pair["name1"]], pair["inliers"], pair["matches"] or 0)
        for pair in pairs
        if pair["name0"] in row and pair["name1"] in row
    ]
    i, j, inliers, matches = np.array(tried, np.int64).reshape(-1, 4).T
    small = matches.max(initial=0) < 2**16
    counts = np.zeros((n, n, 2), np.uint16 if small else np.uint32)
    level = np.full((n, n), np.nan)  # of colour; NaN: not tried
    for a, b in ((i, j), (j, i)):
        counts[a, b] = np.stack([inliers, matches], axis=1)
        level[a, b] = np.log10(1 + inliers) + 0.1 * (inliers > 0)  # one stands apart from none
    most = int(inliers.max(initial=1))
    top = np.log10(1 + most) + 0.1
    ticks = [k * 10**power for power in range(7) for k in (1, 3) if k * 10**power <= most]
    low = 0.1 / top
    shown = [page.plain(name) for name in names]
    matrix = go.Heatmap(
        z=level.astype(np.float32),
        x=shown,
        y=shown,
        customdata=counts,
        zmin=0,
        zmax=top,
        xgap=int(n <= 60),
        ygap=int(n <= 60),
        hoverongaps=False,
        hovertemplate="%{y}<br>%{x}<br>%{customdata[0]:,} inliers of %{customdata[1]:,} matches"
        "<extra></extra>",
        colorscale=[
            *([0, _NONE], [low, _NONE], [low, _FEW_TO_MANY[0]]),
            *([0.6, _FEW_TO_MANY[1]], [1, _FEW_TO_MANY[2]]),
        ],
        colorbar={
            "title": {"text": "inliers", "side": "right"},
            "thickness": 12,
            "outlinewidth": 0,
            "tickvals": [low / 2, *(np.log10(1 + np.array(ticks)) + 0.1)],
            "ticktext": ["none", *(f"{tick:,}" for tick in ticks)],
        },
    )
    figure = go.Figure(matrix)
    figure.update_layout(margin={"l": 10, "r": 10, "t": 10, "b": 10}, dragmode="zoom")
    axis = {
        "type": "category",
        "showgrid": False,
        "showticklabels": n <= _MAX_LABELS,
        "tickvals": shown,
        "ticktext": [page.plain(name if len(name) <= 16 else f"…{name[-15:]}") for name in names],
    }
    figure.update_xaxes(**axis, tickangle=-60, constrain="domain")
    figure.update_yaxes(**axis, autorange="reversed", scaleanchor="x", constrain="domain")
    return figure


# ------------------------------------------------------------------------------------------ scene


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedScene:
    """What is drawn of a scene, turned so that the photographer's up is z, its middle at 0."""

    points: np.ndarray  # (M, 3)
    colours: np.ndarray  # (M, 3) uint8
    names: list[str]  # of the cameras
    centers: np.ndarray  # (N, 3)
    frusta: np.ndarray  # (N * 12, 3), pyramids as one line, a row of NaN after each
    ranges: np.ndarray  # (3, 2) of the axes
    centre: list[float]  # of the first view, in plotly's units
    eye: list[float]
    total: int  # points before sampling
    far: int  # points outside the view


def pack_scene(scene: SceneView) -> PackedScene | None:
    """Points, at most ``MAX_POINTS``, and cameras for the 3D view; None where there is nothing."""
    xyz = np.asarray(scene.points_xyz, np.float64).reshape(-1, 3)
    rgb = np.asarray(scene.points_rgb, np.uint8).reshape(-1, 3)
    total = len(xyz)
    keep = np.isfinite(xyz).all(1)
    xyz, rgb = xyz[keep], rgb[keep]
    cameras = [
        camera
        for camera in scene.cameras
        if np.isfinite(camera.center).all() and np.isfinite(camera.rotation).all()
    ]
    if not len(xyz) and not cameras:
        return None
    centers = np.array([camera.center for camera in cameras], np.float64).reshape(-1, 3)
    rotations = np.array([camera.rotation for camera in cameras], np.float64).reshape(-1, 3, 3)

    turn, direction = _upright(rotations, centers)
    xyz, centers = xyz @ turn.T, centers @ turn.T
    rotations = rotations @ turn.T

    low, high = _robust_box(xyz, centers)
    inside = ((xyz >= low) & (xyz <= high)).all(1)
    far = int((~inside).sum())
    xyz, rgb = xyz[inside], rgb[inside]
    if len(xyz) > MAX_POINTS:
        rows = np.sort(np.random.default_rng(0).choice(len(xyz), MAX_POINTS, replace=False))
        xyz, rgb = xyz[rows], rgb[rows]

    middle = (low + high) / 2
    centre, eye = _first_view(xyz, centers, low, high, direction)
    frusta = _frusta(cameras, centers, rotations, float(np.linalg.norm(high - low)))
    return PackedScene(
        points=(xyz - middle).astype(np.float32),
        colours=rgb,
        names=[camera.name for camera in cameras],
        centers=(centers - middle).astype(np.float32),
        frusta=(frusta - middle).astype(np.float32),
        ranges=np.stack([low - middle, high - middle], 1),
        centre=centre,
        eye=eye,
        total=total,
        far=far,
    )


def scene_figure(scene: PackedScene) -> go.Figure:
    """Points and cameras to turn and zoom; the legend hides and shows them."""
    size = 2.0 if len(scene.points) < 5000 else 1.5 if len(scene.points) < 20_000 else 1.0

    def trace(xyz: np.ndarray, **values: Any) -> go.Scatter3d:
        x, y, z = np.ascontiguousarray(xyz.T)
        return go.Scatter3d(x=x, y=y, z=z, **values)

    points = trace(
        scene.points,
        name="Points",
        mode="markers",
        hoverinfo="skip",
        marker={"size": size, **_palette(scene.colours)},
    )
    strokes = scene.frusta.astype(object)
    strokes[np.isnan(scene.frusta)] = None  # ends a line, which NaN does not
    frusta = trace(
        strokes,
        name="Cameras",
        legendgroup="cameras",
        mode="lines",
        hoverinfo="skip",
        line={"color": _ACCENT, "width": 2.5},
    )
    centers = trace(
        scene.centers,
        legendgroup="cameras",
        showlegend=False,
        mode="markers",
        text=[page.plain(name) for name in scene.names],
        hovertemplate="%{text}<extra></extra>",
        marker={"size": 2.5, "color": _ACCENT},
    )
    axes = {
        f"{axis}axis": {"visible": False, "range": limits, "autorange": False, "showspikes": False}
        for axis, limits in zip("xyz", scene.ranges.tolist(), strict=True)
    }
    camera = {
        "up": {"x": 0, "y": 0, "z": 1},
        "center": dict(zip("xyz", scene.centre, strict=True)),
        "eye": dict(zip("xyz", scene.eye, strict=True)),
    }
    figure = go.Figure([points, frusta, centers])
    figure.update_layout(
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        scene={**axes, "aspectmode": "data", "dragmode": "turntable", "camera": camera},
        legend={"x": 0, "y": 1, "itemsizing": "constant", "bgcolor": "rgba(0,0,0,0)"},
        updatemenus=[
            {
                **{"type": "buttons", "direction": "left", "x": 1, "xanchor": "right", "y": 0},
                "yanchor": "bottom",
                "buttons": [
                    {"label": label, "method": method, "args": args}
                    for label, method, args in (
                        ("Larger points", "restyle", [{"marker.size": 2.5 * size}, [0]]),
                        ("Smaller", "restyle", [{"marker.size": size}, [0]]),
                        ("Reset view", "relayout", [{"scene.camera": camera}]),
                    )
                ],
            }
        ],
    )
    return figure


def _palette(colours: np.ndarray) -> dict[str, Any]:
    """Colours (M, 3) as rows of a table of 256: a byte a point, where plotly checks every name."""
    if not len(colours):
        return {}
    image = Image.fromarray(colours[None]).quantize(256)
    table = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    scale = [[k / 255, f"#{bytes(table[min(k, len(table) - 1)]).hex()}"] for k in range(256)]
    return {"color": np.asarray(image)[0], "colorscale": scale, "cmin": 0, "cmax": 255}


def _upright(rotations: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Returns the rotation that makes the mean camera up z, and where to look from (unit cube)."""
    if not len(rotations):
        return np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]), [0.9, -1.3, 0.7]
    ups = -rotations[:, 1]
    up = ups.mean(0)
    alike = ups @ up > 0.5 * np.linalg.norm(up)
    if alike.sum() > len(ups) / 2:  # a few images held sideways must not tilt the scene
        up = ups[alike].mean(0)
    if np.linalg.norm(up) < 0.2:  # cameras in all rolls: the normal of the path, else COLMAP's -y
        hint, up = up, np.array([0.0, -1.0, 0.0])
        if len(centers) >= 3:
            normal = np.linalg.svd(centers - centers.mean(0))[2][2]
            up = normal if normal @ hint >= 0 else -normal
    up /= np.linalg.norm(up)
    forward = rotations[:, 2].mean(0)
    forward -= up * (forward @ up)
    common = float(np.linalg.norm(forward))  # 1: all look the same way, 0: around or inwards
    if common < 1e-3:
        forward = np.eye(3)[np.argmin(np.abs(up))]
        forward = forward - up * (forward @ up)
    forward /= np.linalg.norm(forward)
    turn = np.stack([np.cross(forward, up), forward, up])
    # Over the shoulder of cameras that look one way; from above when they look around.
    eye = [0.35, -1.1, 0.35] if common > 0.4 else [0.75, -1.0, 0.75]
    return turn, eye


def _first_view(
    xyz: np.ndarray,
    centers: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    direction: list[float],
) -> tuple[list[float], list[float]]:
    """Returns what to look at and from where, so that cameras and most points are in the picture.

    In plotly's units: axes in true proportion are scaled so that the geometric mean of their
    ranges is 1, and the box is centred at 0.
    """
    spread = np.maximum(high - low, 1e-9)
    unit = float(np.exp(np.log(spread).mean()))
    parts = [centers[((centers >= low) & (centers <= high)).all(1)]] if len(centers) else []
    if len(xyz):
        parts.append(np.percentile(xyz, [5, 95], axis=0))
    content = (np.concatenate(parts) - (low + high) / 2) / unit
    first, last = content.min(0), content.max(0)
    centre = (first + last) / 2
    away = np.asarray(direction) / np.linalg.norm(direction)
    distance = max(0.3, 1.15 * float(np.linalg.norm(last - first)))
    return centre.tolist(), (centre + away * distance).tolist()


def _robust_box(xyz: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the view that a few far points or one lost camera do not blow up."""
    corners = []
    if len(xyz):
        first, last = np.percentile(xyz, [2, 98], axis=0)
        margin = 0.15 * (last - first) + 0.02 * np.linalg.norm(last - first)
        corners += [first - margin, last + margin]
    if len(centers):
        middle = np.median(centers, axis=0)
        distance = np.linalg.norm(centers - middle, axis=1)
        reach = 8 * np.median(distance) if len(centers) > 2 else distance.max()
        if len(corners):
            reach = max(reach, float(np.linalg.norm(corners[1] - corners[0])))
        near = centers[distance <= reach]
        corners += [near.min(0), near.max(0)]
    low, high = np.min(corners, axis=0), np.max(corners, axis=0)
    pad = max(1e-6, 0.04 * float(np.linalg.norm(high - low)))
    return low - pad, high + pad


def _frusta(
    cameras: list[CameraView], centers: np.ndarray, rotations: np.ndarray, diagonal: float
) -> np.ndarray:
    """Corners ``(N * 12, 3)`` of viewing pyramids, each a line that ends with NaN."""
    size = 0.035 * diagonal
    if len(centers) > 1:
        sample = centers[np.linspace(0, len(centers) - 1, min(len(centers), 500)).astype(int)]
        gaps = np.linalg.norm(sample[:, None] - sample[None], axis=2)
        np.fill_diagonal(gaps, np.inf)
        # Neighbouring pyramids should not grow into one another.
        size = float(np.clip(0.7 * np.median(gaps.min(1)), 0.012 * diagonal, size))
    frusta = np.full((len(cameras), 12, 3), np.nan)
    for row, camera in enumerate(cameras):
        focal = camera.focal_px if camera.focal_px and camera.focal_px > 0 else camera.width
        half = np.array([camera.width, camera.height]) / (2 * max(1e-9, float(focal)))
        half *= min(1.0, 1.2 / max(1e-9, float(half.max())))  # a fisheye's would be a flat sheet
        x, y = half
        corners = np.array([[-x, -y, 1], [x, -y, 1], [x, y, 1], [-x, y, 1]]) * size
        a, b, c, d = corners @ rotations[row] + centers[row]
        apex = centers[row]
        # One stroke over the eight edges; three are drawn twice.
        frusta[row, :11] = [apex, a, b, apex, c, d, apex, a, d, c, b]
    return frusta.reshape(-1, 3)


# ----------------------------------------------------------------------------------------- metres


def plan_in_metres(described: Mapping[str, Any], centres: Mapping[str, np.ndarray]) -> go.Figure:
    """Cameras from above, and how far they are from what was measured.

    Args:
        described: of ``colmap.Metres.described``.
        centres: of the cameras, in its metres.
    """
    cameras = np.array(list(centres.values())).reshape(-1, 3)
    axes = [0, 1]
    if described["by"] == "known poses":  # in axes of their own: from where they spread most
        axes = sorted(np.argsort(-np.ptp(cameras, axis=0))[:2].tolist())
    residuals, marked = described.get("residuals_m", {}), described.get("places_m")
    wrong = described.get("wrong", ())
    figure = go.Figure()

    def show(places: np.ndarray, names: Sequence[str], title: str, **marker: Any) -> None:
        figure.add_scatter(
            x=places[:, 0],
            y=places[:, 1],
            text=[page.plain(name) for name in names],
            name=title,
            mode="markers",
            marker=marker,
            hovertemplate="%{text}<br>%{x:.2f}, %{y:.2f} m<extra></extra>",
        )

    show(cameras[:, axes], list(centres), "cameras", color=_ACCENT, size=7)
    shown = cameras[:, axes]
    kinds = (("measured", False, _GREY), ("measured, not used", True, _BAD))
    for title, are_wrong, colour in kinds:
        names = [n for n in residuals if (n in wrong) == are_wrong]
        if not names:
            continue
        off = np.array([[residuals[n][axis] for axis in axes] for n in names])
        if marked is None:
            found = np.array([centres[n] for n in names])[:, axes]
            places = found + off
        else:
            places = np.array([marked[n] for n in names])[:, axes]
            found = places - off
        ends = np.stack([found, places, np.full_like(found, np.nan)], axis=1).reshape(-1, 2)
        strokes = ends.astype(object)
        strokes[np.isnan(ends)] = None
        figure.add_scatter(
            x=strokes[:, 0],
            y=strokes[:, 1],
            mode="lines",
            line={"color": colour, "width": 1.5},
            hoverinfo="skip",
            showlegend=False,
        )
        symbol = "circle-open" if marked is None else "triangle-up-open"
        show(places, names, title, color=colour, size=8, symbol=symbol)
        if are_wrong:
            figure.add_scatter(
                x=found[:, 0],
                y=found[:, 1],
                text=[page.plain(name) for name in names],
                mode="text",
                textposition="bottom center",
                hoverinfo="skip",
                showlegend=False,
            )
        else:
            shown = np.concatenate([shown, places])
    # What is far off leads out of the picture instead of shrinking it.
    low, high = shown.min(0), shown.max(0)
    margin = 0.15 * max(high - low)
    east = described["crs"] != "local"
    titles = ["east (m)", "north (m)"] if east else [f"{'xyz'[axis]} (m)" for axis in axes]
    figure.update_xaxes(title_text=titles[0], range=[low[0] - margin, high[0] + margin])
    figure.update_yaxes(
        title_text=titles[1], range=[low[1] - margin, high[1] + margin], scaleanchor="x"
    )
    figure.update_layout(
        height=460,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        dragmode="pan",
    )
    return figure
