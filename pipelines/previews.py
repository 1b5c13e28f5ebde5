"""What was made of a model, to look at: depth maps, the fused cloud, positions in metres.

The report of a run holds these sections; ``gim-densify`` and ``gim-export --to geo``, which come
after it, write them as pages of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gim_hloc import draw, page
from gim_hloc.colmap import dense
from gim_hloc.colmap.target import read_ply
from gim_hloc.files import write_atomic
from gim_hloc.images import read_rgb
from gim_hloc.pipelines import _report_figures as figures
from gim_hloc.pipelines._report_figures import SceneView

DENSE_PAGE, METRES_PAGE = "dense.html", "geo.html"

_VIEWS = 6  # of a dense model
_SIDE = 320  # px, long side of each of the three pictures of a view


def dense_views(workspace: Path) -> Iterator[tuple[list[str], str, str]]:
    """Some views, evenly spread: photograph, depth, the cloud as its camera sees it; name; facts.

    Args:
        workspace: COLMAP's, with depth maps and ``dense.ply``.
    """
    cameras = dense.pinholes(workspace, _SIDE)
    there = [name for name in cameras if dense.depth_path(workspace, name).is_file()]
    xyz, rgb = read_ply(workspace / "dense.ply")
    for row in np.unique(np.linspace(0, len(there) - 1, min(_VIEWS, len(there))).round()):
        name = there[int(row)]
        camera, depth = cameras[name], dense.read_depth(workspace, name)
        size = camera.width, camera.height
        photograph = read_rgb(workspace / "images" / name, max_size=_SIDE, upright=False)
        cloud = np.full((camera.height, camera.width, 3), draw.UNKNOWN, np.uint8)
        draw.draw_cloud(cloud, *camera.project(xyz), rgb)
        pictures = [draw.resize(photograph, size), draw.resize(draw.depths(depth), size), cloud]
        known = depth[depth > 0]
        ends = np.quantile(known, (0.02, 0.98)) if len(known) else (np.nan, np.nan)
        facts = (
            f"depth in {len(known) / depth.size:.0%} of the pixels, {ends[0]:.3g} to {ends[1]:.3g}"
        )
        yield [draw.data_url(picture) for picture in pictures], name, facts


def dense_facts(steps: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the steps of a dense model left in run.yaml, for the report; None: there is none."""
    if "dense cloud" not in steps:
        return None
    return {
        "points": steps["dense cloud"]["facts"]["points"],
        "views": sum(name.endswith("geometric.bin") for name in steps["dense depth"]["files"]) // 2,
        "given": steps["dense depth"]["facts"]["given"],
    }


def metres_rows(described: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Name, distance and its parts of what was measured, m, farthest first; and what was not used.

    Args:
        described: of ``colmap.Metres.described``.
    """
    wrong = described.get("wrong", ())
    rows = []
    for name, parts in described.get("residuals_m", {}).items():
        known = [part for part in parts if part is not None]
        used = "not used" if name in wrong else "used"
        rows.append((name, used, float(np.linalg.norm(known)), *parts))
    return sorted(rows, key=lambda row: (row[1], -row[2]))


def in_metres(described: Mapping[str, Any], scene: SceneView) -> dict[str, np.ndarray]:
    """Where the cameras of a model in units of its own stand, m."""
    scale, rotation = described["scale"], np.array(described["rotation"])
    shift = np.array(described["translation"])
    return {c.name: scale * rotation @ c.center + shift for c in scene.cameras}


def write_dense_page(workspace: Path, target: Path, facts: Mapping[str, Any]) -> None:
    """Write the page of a dense model that is in ``workspace`` into a folder."""
    _write(target / DENSE_PAGE, dense=facts, dense_views=list(dense_views(workspace)))


def write_metres_page(
    target: Path, described: Mapping[str, Any], centres: Mapping[str, np.ndarray]
) -> None:
    """Write the page of a model in metres into a folder.

    Args:
        target: folder.
        described: of ``colmap.Metres.described``.
        centres: of the cameras, in metres.
    """
    chart = page.chart(figures.plan_in_metres(described, centres), "metres")
    _write(
        target / METRES_PAGE,
        charts={"metres": chart},
        metres=described,
        metres_rows=metres_rows(described),
    )


def _write(path: Path, **values: Any) -> None:
    empty: dict[str, Any] = {"dense": None, "dense_views": [], "metres": None, "metres_rows": []}
    write_atomic(path, page.render("preview.html.j2", **{**empty, **values}))
