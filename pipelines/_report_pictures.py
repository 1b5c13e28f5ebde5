"""Pictures and packed arrays of the report: thumbnails, drawn pairs, 3D scene, match graph."""

from __future__ import annotations

import base64
import io
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from gim_hloc.pipelines.report import ImageReader, PairMatches, SceneView

logger = logging.getLogger(__name__)

PAIR_WIDTH = 480  # pixels of a drawn pair
_GAP = 4  # pixels between the two images of a pair
_MAX_PAIR_HEIGHT = 360
_SUPERSAMPLING = 2  # PIL's lines are not anti-aliased; drawn larger, they are after reducing
_MAX_INLIER_LINES = 100
_MAX_OUTLIER_LINES = 60
_INLIER = (38, 222, 129, 150)
_OUTLIER = (255, 64, 64, 130)

MAX_POINTS = 60_000
MAX_GRAPH_IMAGES = 1500


class Thumbnails:
    """Reads images by name, each once, and keeps small copies only."""

    def __init__(self, read: ImageReader | None) -> None:
        self._read = read
        self._small: dict[str, tuple[Image.Image, tuple[int, int]] | None] = {}

    def data_url(self, name: str, size: int = 200) -> str | None:
        """Returns an image within ``size`` pixels as a JPEG data URL; None if it does not open."""
        entry = self._open(name)
        if entry is None:
            return None
        picture = entry[0].copy()
        picture.thumbnail((size, size), Image.Resampling.LANCZOS)
        return _jpeg_url(picture)

    def pair_url(self, name0: str, name1: str, pair_matches: PairMatches) -> str | None:
        """Returns two images side by side with their matches, inliers green, outliers red.

        Args:
            name0: Left image.
            name1: Right image.
            pair_matches: As in ``write_report``.

        Returns:
            A JPEG data URL of at most ``PAIR_WIDTH`` pixels width; None if an image or the matches
            cannot be read.
        """
        entry0, entry1 = self._open(name0), self._open(name1)
        if entry0 is None or entry1 is None:
            return None
        try:
            xy0, xy1, inlier = (np.asarray(part) for part in pair_matches(name0, name1))
            return _jpeg_url(_draw_pair(entry0, entry1, xy0, xy1, inlier.astype(bool)))
        except Exception as error:
            logger.warning("no picture of the pair %r, %r in the report: %s", name0, name1, error)
            return None

    def _open(self, name: str) -> tuple[Image.Image, tuple[int, int]] | None:
        if self._read is None:
            return None
        if name not in self._small:
            try:
                pixels = np.ascontiguousarray(self._read(name))
                picture = Image.fromarray(pixels).convert("RGB")
                full_size = picture.size
                side = PAIR_WIDTH * _SUPERSAMPLING
                picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
                self._small[name] = (picture, full_size)
            except Exception as error:
                logger.debug("no thumbnail of %r in the report: %s", name, error)
                self._small[name] = None
        return self._small[name]


def _draw_pair(
    entry0: tuple[Image.Image, tuple[int, int]],
    entry1: tuple[Image.Image, tuple[int, int]],
    xy0: np.ndarray,
    xy1: np.ndarray,
    inlier: np.ndarray,
) -> Image.Image:
    (picture0, size0), (picture1, size1) = entry0, entry1
    # One height for both, so that the pair fills the width.
    aspect = size0[0] / size0[1] + size1[0] / size1[1]
    height = min(_MAX_PAIR_HEIGHT, (PAIR_WIDTH - _GAP) / aspect)
    tall = max(1, round(height * _SUPERSAMPLING))
    scale0, scale1 = tall / size0[1], tall / size1[1]
    left = picture0.resize((max(1, round(size0[0] * scale0)), tall), Image.Resampling.LANCZOS)
    right = picture1.resize((max(1, round(size1[0] * scale1)), tall), Image.Resampling.LANCZOS)
    offset = left.width + _GAP * _SUPERSAMPLING
    canvas = Image.new("RGB", (offset + right.width, tall), (128, 128, 128))
    canvas.paste(left, (0, 0))
    canvas.paste(right, (offset, 0))

    draw = ImageDraw.Draw(canvas, "RGBA")
    rng = np.random.default_rng(0)
    # Integer = pixel centre on both sides of the scaling.
    ends0 = (xy0.reshape(-1, 2) + 0.5) * scale0 - 0.5
    ends1 = (xy1.reshape(-1, 2) + 0.5) * scale1 - 0.5 + (offset, 0)
    for chosen, colour, width, limit in (
        (~inlier, _OUTLIER, 1, _MAX_OUTLIER_LINES),
        (inlier, _INLIER, _SUPERSAMPLING, _MAX_INLIER_LINES),
    ):
        rows = np.flatnonzero(chosen & np.isfinite(ends0).all(1) & np.isfinite(ends1).all(1))
        if len(rows) > limit:
            rows = np.sort(rng.choice(rows, limit, replace=False))
        for (x0, y0), (x1, y1) in zip(ends0[rows].tolist(), ends1[rows].tolist(), strict=True):
            draw.line((x0, y0, x1, y1), fill=colour, width=width)
            for x, y in ((x0, y0), (x1, y1)):
                draw.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=(*colour[:3], 230))
    final = (
        max(1, canvas.width // _SUPERSAMPLING),
        max(1, canvas.height // _SUPERSAMPLING),
    )
    return canvas.resize(final, Image.Resampling.LANCZOS)


def _jpeg_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


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


def pack_graph(names: list[str], pairs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Packs the match graph as the upper triangle of two matrices.

    Args:
        names: Image names, in the order of rows and columns.
        pairs: Records with ``name0``, ``name1``, ``matches`` and ``inliers``.

    Returns:
        ``names`` and the base64 triangles ``matches`` and ``inliers``, row by row, little-endian of
        ``bits`` bits; 0 stands for a pair that was not chosen, k + 1 for a count of k. None when
        there is nothing to draw or there are more than ``MAX_GRAPH_IMAGES`` images.
    """
    n = len(names)
    if not 2 <= n <= MAX_GRAPH_IMAGES or not pairs:
        return None
    index = {name: position for position, name in enumerate(names)}
    triangles = {key: np.zeros(n * (n - 1) // 2, np.uint32) for key in ("matches", "inliers")}
    for pair in pairs:
        i, j = sorted((index.get(pair["name0"], -1), index.get(pair["name1"], -1)))
        if i < 0 or i == j:
            continue
        place = i * (2 * n - i - 1) // 2 + (j - i - 1)
        for key, triangle in triangles.items():
            triangle[place] = 1 + (pair[key] or 0)
    bits = 16 if max(triangle.max() for triangle in triangles.values()) < 2**16 else 32
    packed = {key: _base64(value.astype(f"<u{bits // 8}")) for key, value in triangles.items()}
    return {"names": names, "bits": bits, **packed}


def pack_scene(scene: SceneView) -> dict[str, Any] | None:
    """Packs points and cameras for the 3D view, turned so that the photographer's up is z.

    Args:
        scene: Points and cameras in the (arbitrary) world frame.

    Returns:
        ``points`` (base64 float32 xyz) and ``colours`` (base64 uint8 rgb) of at most ``MAX_POINTS``
        points, ``cameras`` with ``names``, ``centers`` and ``frusta`` (base64 float32; pyramids of
        12 corners whose last is NaN, to be joined by one line), ``ranges`` of the axes, ``centre``
        and ``eye`` of the first view, and counts ``shown``, ``total``, ``far``. None when there is
        nothing to draw.
    """
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
    return {
        "points": _base64((xyz - middle).astype("<f4")),
        "colours": _base64(rgb),
        "cameras": {
            "names": [camera.name for camera in cameras],
            "centers": _base64((centers - middle).astype("<f4")),
            "frusta": _base64((frusta - middle).astype("<f4")),
        },
        "ranges": np.stack([low - middle, high - middle], 1).tolist(),
        "centre": centre,
        "eye": eye,
        "shown": len(xyz),
        "total": total,
        "far": far,
    }


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
    cameras: list[Any], centers: np.ndarray, rotations: np.ndarray, diagonal: float
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


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
