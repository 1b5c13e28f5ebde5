"""Exact scenes and a synthetic dense matcher: what tracks are tested and measured with.

A scene is a bumpy surface (a sum of sines) with boxes standing on it, seen by pinhole cameras; any
ray can be cast to machine precision, so true warps, true depth and true poses are known. The
matcher is a ``DenseMatcher`` like DKM and RoMa and goes through the same code: ``encode`` casts the
rays of the warp's grid, ``warp_batch`` carries them into the other image and spoils the result with
what real networks do: smooth noise, outlier blocks, guesses in occluded places with low certainty.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gim_hloc.errors import InputError
from gim_hloc.files import write_atomic
from gim_hloc.geometry.seeds import pair_seed
from gim_hloc.geometry.warp import Warp, cell_centres, inverse, read_grid, transform
from gim_hloc.matchers import common, registry
from gim_hloc.matchers.dense import DenseEncoding, DenseMatcher, DenseOptions
from gim_hloc.types import ImageData, ImageOptions, MatcherInfo, Quality

NAME = "synthetic_dense"
_TOLERANCE = 0.01  # relative depth: what lies farther behind the visible surface is occluded


# --------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """Numbers of a scene. Lengths are metres."""

    views: int = 24  # cameras
    size: tuple[int, int] = (1600, 1200)  # (width, height) of an image, px
    focal: float = 1400.0  # px
    distance: float = 3.5  # of the cameras from the middle of the scene
    spread_deg: float = 50.0  # largest azimuth of a camera, to both sides
    bumps: float = 0.12  # amplitude of the largest wave of the surface
    boxes: int = 5  # boxes standing on it
    seed: int = 0

    def __post_init__(self) -> None:
        if self.views < 2:
            raise InputError(f"views is {self.views}; a scene has at least 2.")


@dataclass(kw_only=True)
class View:
    """One pinhole camera with square pixels.

    Attributes:
        rotation: (3, 3) world to camera.
        translation: (3,).
    """

    name: str
    width: int
    height: int
    focal: float
    rotation: np.ndarray
    translation: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        """(3,) centre of projection in the world."""
        centre: np.ndarray = -self.rotation.T @ self.translation
        return centre

    @property
    def principal(self) -> np.ndarray:
        """(2,) principal point, stored pixels, hloc's frame."""
        return np.array([(self.width - 1) / 2, (self.height - 1) / 2])

    def rays(self, xy_px: np.ndarray) -> np.ndarray:
        """Unit directions (N, 3) in the world of pixels (N, 2), hloc's frame."""
        local = np.c_[(xy_px - self.principal) / self.focal, np.ones(len(xy_px))]
        rays: np.ndarray = local @ self.rotation
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        return rays

    def project(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (N, 2), hloc's frame, and depths (N,) of points (N, 3)."""
        local = xyz @ self.rotation.T + self.translation
        depth = local[:, 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            xy = local[:, :2] / depth[:, None] * self.focal + self.principal
        return xy, depth


@dataclass(kw_only=True)
class Scene:
    """A surface z = sum of sines, boxes, and cameras.

    Attributes:
        waves: (K, 4) amplitude, wave numbers in x and y (1/m), phase.
        boxes: (B, 6) centre x, y, half lengths along both sides, top z, turn about z (radians).
            Their feet lie below the surface.
        views: cameras by name.
        seed: of the texture.
    """

    waves: np.ndarray
    boxes: np.ndarray
    views: dict[str, View]
    seed: int = 0
    path: Path | None = field(default=None, repr=False)

    @property
    def names(self) -> list[str]:
        """Names of the images, sorted."""
        return sorted(self.views)

    @property
    def poses(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """True poses: name -> (R, t), world to camera."""
        return {name: (view.rotation, view.translation) for name, view in self.views.items()}

    # The surface -------------------------------------------------------------------------------

    def height(self, xy: np.ndarray) -> np.ndarray:
        """Z of the surface at (N, 2)."""
        height: np.ndarray = np.sin(self._phases(xy)) @ self.waves[:, 0]
        return height

    def slope(self, xy: np.ndarray) -> np.ndarray:
        """Gradient (N, 2) of ``height``."""
        slope: np.ndarray = np.cos(self._phases(xy)) @ (self.waves[:, :1] * self.waves[:, 1:3])
        return slope

    def _phases(self, xy: np.ndarray) -> np.ndarray:
        phases: np.ndarray = xy @ self.waves[:, 1:3].T + self.waves[:, 3]
        return phases

    def cast(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Distances (N,) along unit rays (N, 3) to what they hit first; infinite for nothing."""
        distance = self._cast_surface(origin, rays)
        for box in self.boxes:
            distance = np.minimum(distance, _cast_box(box, origin, rays))
        return distance

    def _cast_surface(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        steepest = float(np.abs(self.waves[:, 0] * np.hypot(*self.waves[:, 1:3].T)).sum())
        top = float(np.abs(self.waves[:, 0]).sum())
        # The height above the surface falls at most this fast along the ray, so that the steps of
        # height / rate never jump over the first hit.
        rate = -rays[:, 2] + steepest * np.hypot(rays[:, 0], rays[:, 1])
        result = np.full(len(rays), np.inf)
        active = np.flatnonzero(rays[:, 2] < -1e-3)
        t = np.maximum((top - origin[2]) / rays[active, 2], 0)
        for step in range(200):
            if not len(active):
                break
            at = origin + t[:, None] * rays[active]
            above = at[:, 2] - self.height(at[:, :2])
            if step >= 6:  # near the hit Newton's steps finish at once
                falling = (
                    (self.slope(at[:, :2]) * rays[active, :2]).sum(1) - rays[active, 2]
                ).clip(1e-3)
                # Not where the ray grazes the surface: it may pass and hit farther on.
                near = (above < 0.02) & (falling > 0.3 * rate[active])
                t = t + np.where(near, above / falling, above / rate[active])
            else:
                t = t + above / rate[active]
            done = np.abs(above) < 1e-8
            result[active[done]] = t[done]
            active, t = active[~done], t[~done]
        return result

    def distance(self, xyz: np.ndarray) -> np.ndarray:
        """Distances (N,) of points to the nearest surface (of the bumpy one to first order)."""
        slope = self.slope(xyz[:, :2])
        result = np.abs(xyz[:, 2] - self.height(xyz[:, :2])) / np.sqrt(1 + (slope**2).sum(1))
        for x, y, a, b, top, turn in self.boxes:
            c, s = np.cos(turn), np.sin(turn)
            local = (xyz[:, :2] - [x, y]) @ np.array([[c, -s], [s, c]])
            over = np.c_[np.abs(local) - [a, b], xyz[:, 2] - top]
            outside = np.linalg.norm(over.clip(0), axis=1)
            result = np.minimum(result, np.abs(outside + np.minimum(over.max(1), 0)))
        return result

    def points(self, view: View, xy_px: np.ndarray) -> np.ndarray:
        """What pixels (N, 2) of a view show: (N, 3), NaN for the sky."""
        rays = view.rays(np.asarray(xy_px, dtype=np.float64))
        distance = self.cast(view.centre, rays)
        distance[~np.isfinite(distance)] = np.nan
        return view.centre + distance[:, None] * rays

    def visible(self, view: View, xyz: np.ndarray) -> np.ndarray:
        """Whether points (N, 3) of the surface lie in the image and nothing hides them."""
        xy, depth = view.project(xyz)
        inside = (xy >= -0.5).all(1) & (xy <= [view.width - 0.5, view.height - 0.5]).all(1)
        inside &= depth > 0
        rays = xyz[inside] - view.centre
        length = np.linalg.norm(rays, axis=1)
        hit = self.cast(view.centre, rays / length[:, None])
        inside[inside] = hit > length * (1 - 1e-4)
        return inside

    def true_position(self, a: str, b: str, xy_px: np.ndarray) -> np.ndarray:
        """Where what pixels (N, 2) of ``a`` show lies in ``b``; NaN where it is not seen there."""
        xyz = self.points(self.views[a], xy_px)
        xy, _ = self.views[b].project(xyz)
        known = np.isfinite(xyz).all(1)
        seen = np.zeros(len(xyz), dtype=bool)
        seen[known] = self.visible(self.views[b], xyz[known])
        xy[~seen] = np.nan
        return xy

    def pairs(self, count: int | None = None) -> list[tuple[str, str]]:
        """The ``count`` pairs of the most similar viewing directions, sorted; None: all."""
        names = self.names
        axes = np.array([self.views[name].rotation[2] for name in names])
        rows, columns = np.triu_indices(len(names), 1)
        order = np.lexsort((columns, rows, -np.round((axes @ axes.T)[rows, columns], 9)))[:count]
        return sorted((names[rows[k]], names[columns[k]]) for k in order)

    # Files -------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "waves": self.waves.tolist(),
            "boxes": self.boxes.tolist(),
            "seed": self.seed,
            "views": {
                name: {
                    "size": [view.width, view.height],
                    "focal": view.focal,
                    "rotation": view.rotation.tolist(),
                    "translation": view.translation.tolist(),
                }
                for name, view in sorted(self.views.items())
            },
        }

    def save(self, path: Path) -> None:
        """Write ``scene.json``."""
        write_atomic(path, json.dumps(self.as_dict(), indent=1) + "\n")

    def write_truth(self, folder: Path) -> None:
        """Write cameras and poses as a COLMAP text model without points."""
        folder.mkdir(parents=True, exist_ok=True)
        cameras, images = [], []
        for index, name in enumerate(self.names, 1):
            view = self.views[name]
            principal = view.principal + 0.5  # COLMAP's origin is the corner of the first pixel
            cameras.append(
                f"{index} SIMPLE_PINHOLE {view.width} {view.height} {float(view.focal)!r} "
                f"{float(principal[0])!r} {float(principal[1])!r}"
            )
            pose = " ".join(
                repr(float(v)) for v in (*_quaternion(view.rotation), *view.translation)
            )
            images += [f"{index} {pose} {index} {name}", ""]
        (folder / "cameras.txt").write_text("\n".join(cameras) + "\n")
        (folder / "images.txt").write_text("\n".join(images) + "\n")
        (folder / "points3D.txt").write_text("")


def load_scene(path: Path | str) -> Scene:
    """Read a scene.

    Raises:
        InputError: the file is missing or no scene.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text())
        return Scene(
            waves=np.array(data["waves"]).reshape(-1, 4),
            boxes=np.array(data["boxes"]).reshape(-1, 6),
            views={
                name: View(
                    name=name,
                    width=int(view["size"][0]),
                    height=int(view["size"][1]),
                    focal=float(view["focal"]),
                    rotation=np.array(view["rotation"]),
                    translation=np.array(view["translation"]),
                )
                for name, view in data["views"].items()
            },
            seed=int(data["seed"]),
            path=path,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a scene of {NAME} ({error}); write_scene makes one."
        ) from error


def make_scene(options: SceneOptions = SceneOptions()) -> Scene:
    """Make the scene of some options: the same one every time."""
    rng = np.random.default_rng(pair_seed(options.seed, "scene"))
    waves = []
    for index in range(8):
        length = 2.5 * 0.75**index
        angle = rng.uniform(0, 2 * np.pi)
        k = 2 * np.pi / length
        amplitude = options.bumps * (length / 2.5) ** 1.5 * rng.uniform(0.6, 1.0)
        waves.append([amplitude, k * np.cos(angle), k * np.sin(angle), rng.uniform(0, 2 * np.pi)])
    boxes = []
    for index in range(options.boxes):
        # On a ring, so that they hide parts of the surface and of each other but not all of it.
        angle = 2 * np.pi * (index + rng.uniform(-0.3, 0.3)) / options.boxes
        radius = rng.uniform(0.5, 1.3)
        boxes.append(
            [
                radius * np.cos(angle),
                radius * np.sin(angle),
                *rng.uniform(0.12, 0.3, 2),
                rng.uniform(0.3, 0.6),
                rng.uniform(0, np.pi),
            ]
        )
    # Rows of cameras on a dome.
    rows = max(1, round((options.views / 1.5) ** 0.5))
    places = [
        (row, column, len(range(row, options.views, rows)))
        for row in range(rows)
        for column in range(len(range(row, options.views, rows)))
    ]
    views = {}
    for index, (row, column, columns) in enumerate(places):
        azimuth = np.deg2rad(options.spread_deg) * (2 * column / max(1, columns - 1) - 1)
        tilt = np.deg2rad(20 + 35 * row / max(1, rows - 1)) if rows > 1 else np.deg2rad(35)
        azimuth, tilt = azimuth + rng.normal(0, 0.03), tilt + rng.normal(0, 0.03)
        distance = options.distance * rng.uniform(0.92, 1.08)
        centre = distance * np.array(
            [np.sin(azimuth) * np.sin(tilt + 0.25), -np.cos(azimuth) * np.sin(tilt), np.cos(tilt)]
        )
        target = np.r_[rng.normal(0, 0.1, 2), 0.0]
        forward = (target - centre) / np.linalg.norm(target - centre)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        roll = rng.normal(0, 0.05)
        down = np.cross(forward, right)
        right, down = (
            np.cos(roll) * right + np.sin(roll) * down,
            np.cos(roll) * down - np.sin(roll) * right,
        )
        rotation = np.stack([right, down, forward])
        name = f"view_{index:03d}.png"
        views[name] = View(
            name=name,
            width=options.size[0],
            height=options.size[1],
            focal=options.focal * options.size[0] / 1600,
            rotation=rotation,
            translation=-rotation @ centre,
        )
    return Scene(
        waves=np.array(waves),
        boxes=np.array(boxes).reshape(-1, 6),
        views=views,
        seed=options.seed,
    )


def _cast_box(box: np.ndarray, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    x, y, a, b, top, turn = box
    c, s = np.cos(turn), np.sin(turn)
    turned = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    start = turned @ (origin - [x, y, 0])
    along = rays @ turned.T
    low, high = np.array([-a, -b, -2.0]), np.array([a, b, top])
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (low - start) / along, (high - start) / along
    enter = np.nanmax(np.minimum(first, second), axis=1)
    leave = np.nanmin(np.maximum(first, second), axis=1)
    return np.where((enter < leave) & (enter > 0), enter, np.inf)


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    """(w, x, y, z) of a rotation."""
    from scipy.spatial.transform import Rotation

    x, y, z, w = Rotation.from_matrix(rotation).as_quat()
    return np.array([w, x, y, z])


# ------------------------------------------------------------------------------------- pictures


@functools.lru_cache(maxsize=2)
def _texture(seed: int, size: int = 2048) -> np.ndarray:
    """(size, size, 3) float32 in [0, 255], periodic: noise of all scales with blobs and edges."""
    import cv2

    rng = np.random.default_rng(pair_seed(seed, "texture"))
    picture = np.zeros((size, size, 3), np.float32)
    cells = 8
    while cells <= size // 2:  # finer grain would only shimmer from view to view
        grid = rng.normal(0, 1, (cells, cells, 3 if cells < 64 else 1)).astype(np.float32)
        pad = np.pad(grid, ((2, 2), (2, 2), (0, 0)), mode="wrap")
        scale = size // cells
        layer = cv2.resize(pad, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        layer = layer.reshape(*layer.shape[:2], -1)[2 * scale : -2 * scale, 2 * scale : -2 * scale]
        picture += (np.sign(layer) if cells == 64 else layer) * 14
        cells *= 2
    for _ in range(size * 2):
        centre = rng.integers(0, size, 2).tolist()
        colour = rng.uniform(-80, 80, 3).tolist()
        side = int(rng.integers(3, 14))
        patch = picture[centre[1] : centre[1] + side, centre[0] : centre[0] + side]
        patch += np.float32(colour)
    return np.clip(picture + 128, 0, 255)


def render(scene: Scene, view: View) -> np.ndarray:
    """(H, W, 3) uint8 picture: the texture lies on the surface, so features are repeatable."""
    import cv2

    columns, rows = np.meshgrid(np.arange(view.width), np.arange(view.height))
    xyz = scene.points(view, np.c_[columns.ravel(), rows.ravel()])
    known = np.isfinite(xyz).all(1)
    xyz[~known] = 0
    texture = _texture(scene.seed)
    # One texel is about as large as a pixel in the middle of the scene. Box sides and tops get
    # pieces of the texture of their own through the slant of the second coordinate.
    texel = float(np.mean([np.linalg.norm(v.centre) / v.focal for v in scene.views.values()]))
    size = texture.shape[0]
    lifted = xyz[:, 2] - scene.height(xyz[:, :2])
    u = (xyz[:, 0] + 0.73 * lifted) / texel
    v = (xyz[:, 1] - 0.61 * lifted) / texel
    u, v = ((w % size).astype(np.float32).reshape(view.height, view.width) for w in (u, v))
    picture = cv2.remap(texture, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    picture[~known.reshape(view.height, view.width)] = 0
    return np.asarray(np.clip(np.round(picture), 0, 255), dtype=np.uint8)


def write_scene(scene: Scene, folder: Path) -> None:
    """Write ``images/``, ``scene.json`` and ``truth/`` (a COLMAP model without points)."""
    import cv2

    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name in scene.names:
        cv2.imwrite(str(images / name), render(scene, scene.views[name])[..., ::-1])
    scene.save(folder / "scene.json")
    scene.write_truth(folder / "truth")


def simulated_keypoints(
    scene: Scene,
    *,
    number: int = 2048,
    repeatability: float = 0.6,
    noise_px: float = 0.5,
    clutter: float = 0.2,
    seed: int = 0,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Keypoints as a detector would find them.

    Points of the surface are detected in each view that sees them with a chance of
    ``repeatability`` of their own, displaced by noise.

    Args:
        scene: the scene.
        number: about as many keypoints an image, clutter included.
        repeatability: chance of a visible point to be detected.
        noise_px: standard deviation of a position in each axis.
        clutter: share of the keypoints that no other view has.
        seed: of all chances.

    Returns:
        name -> (N, 2) float32 stored pixels, hloc's frame, and scores (N,) float32.
    """
    rng = np.random.default_rng(pair_seed(seed, "keypoints"))
    views = [scene.views[name] for name in scene.names]
    # Points spread evenly over the pictures: pixels of all views, cast.
    wanted = round(number * (1 - clutter) / repeatability)
    pool = []
    for view in views:
        pool.append(scene.points(view, rng.uniform(0, [view.width, view.height], (wanted, 2))))
    xyz = np.concatenate(pool)
    xyz = xyz[np.isfinite(xyz).all(1)]
    seen = np.stack([scene.visible(view, xyz) for view in views])
    # Of everything any view sees, a share that leaves ``wanted`` in the average view.
    keep = rng.permutation(len(xyz))[
        : max(1, round(wanted * len(xyz) / max(1, seen.sum(1).mean())))
    ]
    keypoints = {}
    for view, visible in zip(views, seen[:, keep], strict=True):
        own = np.random.default_rng(pair_seed(seed, "keypoints", view.name))
        found = keep[visible][own.random(int(visible.sum())) < repeatability]
        xy, _ = view.project(xyz[found])
        xy = xy + own.normal(0, noise_px, xy.shape)
        extra = own.uniform(0, [view.width - 1, view.height - 1], (round(number * clutter), 2))
        xy = np.concatenate([xy, extra])
        xy = xy[(xy >= 0).all(1) & (xy <= [view.width - 1, view.height - 1]).all(1)]
        order = own.permutation(len(xy))
        keypoints[view.name] = (
            xy[order].astype(np.float32),
            own.uniform(0.2, 1.0, len(xy)).astype(np.float32),
        )
    return keypoints


# -------------------------------------------------------------------------------------- matcher


@dataclass(frozen=True, kw_only=True)
class SyntheticOptions(DenseOptions):
    """Numbers of the synthetic matcher. Pixels are those of the stored images."""

    scene: str = ""  # scene.json, see ``write_scene``
    size: tuple[int, int] = (576, 768)
    upsample_size: tuple[int, int] | None = None
    noise_px: float = 0.5  # standard deviation of a target in each axis, each direction on its own
    noise_length_px: float = 40.0  # over which the noise stays alike
    outlier_share: float = 0.05  # of the blocks of each direction that point elsewhere
    outlier_block_px: float = 64.0  # side of such a block
    outlier_shift_px: float = 120.0  # largest shift of a block; the smallest is a tenth
    occluded_certainty: float = 0.03  # highest where the target is hidden; the guess is its place
    noise_seed: int = 0  # of everything that spoils the warp; the names of the pair enter too


class SyntheticDense(DenseMatcher):
    """A dense matcher that knows the scene. See the module."""

    encode_fields = (*DenseMatcher.encode_fields, "scene")

    def __init__(self, *, options: SyntheticOptions, device: torch.device, scene: Scene) -> None:
        """Match views of ``scene``; use ``registry.load`` or ``for_scene``."""
        text = json.dumps(scene.as_dict(), sort_keys=True).encode()
        super().__init__(
            info=INFO,
            options=options,
            image_options=ImageOptions(max_size=options.max_size),
            device=device,
            weights_hashes={"scene.json": hashlib.sha256(text).hexdigest()},
        )
        self.scene = scene

    @classmethod
    def for_scene(
        cls, scene: Scene, *, device: str | torch.device = "cpu", **overrides: Any
    ) -> SyntheticDense:
        """A matcher for a scene that need not be on disk."""
        return cls(
            options=SyntheticOptions(**overrides),
            device=common.resolve_device(device),
            scene=scene,
        )

    def blank_image(self, name: str) -> ImageData:
        """Image data of a view without its picture, which the matcher does not look at."""
        view = self.scene.views[name]
        return ImageData(
            image=torch.zeros(1, view.height, view.width),
            name=name,
            size=(view.width, view.height),
            to_original=np.array([[1.0, 0, 0], [0, 1.0, 0]]),
        )

    def encode(self, image: ImageData) -> DenseEncoding:
        """Cast the rays of the warp's grid."""
        if image.name not in self.scene.views:
            raise InputError(
                f"{image.name} is not a view of the scene {self.scene.path or ''}; its views: "
                f"{', '.join(self.scene.names[:4])}, …"
            )
        padded, frame, valid = self.place(image)
        view = self.scene.views[image.name]
        xy = transform(frame, cell_centres(*self.grid_size).reshape(-1, 2)).double().numpy()
        xyz = self.scene.points(view, xy)
        _, depth = view.project(xyz)
        known = torch.from_numpy(np.isfinite(depth)).view(self.grid_size).to(self.device)
        return DenseEncoding(
            name=image.name,
            size=image.size,
            network_size=image.network_size,
            to_original=image.to_original,
            frame=frame,
            valid=valid & known,
            black=self.black_cells(padded),
            features={
                "xyz": torch.from_numpy(np.nan_to_num(xyz)).to(self.device),
                "depth": torch.from_numpy(np.nan_to_num(depth))
                .view(self.grid_size)
                .to(self.device),
            },
        )

    def warp_batch(self, pairs: Sequence[tuple[DenseEncoding, DenseEncoding]]) -> list[Warp]:
        """True warps of the pairs, spoilt."""
        warps = []
        for a, b in pairs:
            flows, certainties = [], []
            for here, there in ((a, b), (b, a)):
                flow, visible = self._true(here, there)
                certainty = torch.where(
                    visible,
                    0.7 + 0.3 * self._field("certainty", here, there, 1)[..., 0].sigmoid(),
                    self.options.occluded_certainty
                    * self._field("hidden", here, there, 1)[..., 0].sigmoid(),
                )
                noise = self.options.noise_px * self._field("noise", here, there, 2)
                noise += self._outliers(here, there)
                flows.append(flow + noise @ self._px_to_uv(there))
                certainties.append(certainty)
            warps.append(
                self.finish(a, b, torch.stack(flows).float(), torch.stack(certainties).float())
            )
        return warps

    def _true(self, a: DenseEncoding, b: DenseEncoding) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised targets (H, W, 2), float64, and whether they are visible (H, W)."""
        view = self.scene.views[b.name]
        rotation = torch.from_numpy(view.rotation).to(self.device)
        local = a.features["xyz"] @ rotation.T + torch.from_numpy(view.translation).to(self.device)
        depth = local[:, 2].clamp_min(1e-6)
        principal = torch.from_numpy(view.principal).to(self.device)
        xy = local[:, :2] / depth[:, None] * view.focal + principal
        m = torch.from_numpy(inverse(b.frame)).to(self.device)
        uv = xy @ m[:, :2].T + m[:, 2]
        shown = read_grid(b.features["depth"][..., None], uv.clamp(-1, 1), mode="nearest")[:, 0]
        visible = (local[:, 2] > 1e-6) & (depth <= shown * (1 + _TOLERANCE))
        uv = torch.where((local[:, 2] > 1e-6)[:, None], uv, uv.new_tensor(2.0))
        return uv.clamp(-4, 4).view(*self.grid_size, 2), visible.view(self.grid_size)

    def _px_to_uv(self, encoding: DenseEncoding) -> torch.Tensor:
        """(2, 2): a displacement in stored pixels times it is one in normalised coordinates."""
        return torch.from_numpy(inverse(encoding.frame)[:, :2].T.copy()).to(self.device)

    def _generator(self, what: str, *names: str) -> torch.Generator:
        seed = pair_seed(self.options.noise_seed, what, *names)
        return torch.Generator().manual_seed(seed)

    def _cell_px(self, encoding: DenseEncoding) -> tuple[float, float]:
        """Stored pixels that a cell of the grid is high and wide."""
        linear = np.abs(encoding.frame[:, :2]).max(0)  # a quarter turn swaps the axes
        return 2 * linear[1] / self.grid_size[0], 2 * linear[0] / self.grid_size[1]

    def _field(self, what: str, a: DenseEncoding, b: DenseEncoding, channels: int) -> torch.Tensor:
        """Smooth Gaussian noise (H, W, channels) of variance 1, float64."""
        length = self.options.noise_length_px
        weights = []
        for cells, pitch in zip(self.grid_size, self._cell_px(a), strict=True):
            nodes = int(np.ceil(cells * pitch / (length / 2))) + 6
            at = torch.arange(cells, dtype=torch.float64)[:, None] * pitch / (length / 2) + 2.5
            kernel = (-((at - torch.arange(nodes)) ** 2) / (2 * 2.0)).exp()
            # Rows of norm 1 make every value of the product a standard Gaussian.
            weights.append(kernel / kernel.norm(dim=1, keepdim=True))
        white = torch.randn(
            channels,
            len(weights[0][0]),
            len(weights[1][0]),
            generator=self._generator(what, a.name, b.name),
            dtype=torch.float64,
        )
        return (weights[0] @ white @ weights[1].T).permute(1, 2, 0).to(self.device)

    def _blocks(self, a: DenseEncoding, side_px: float) -> tuple[torch.Tensor, int]:
        """Index of the block that each cell lies in (H, W), and the number of blocks."""
        down, right = (
            (torch.arange(n) * pitch / side_px).long()
            for n, pitch in zip(self.grid_size, self._cell_px(a), strict=True)
        )
        columns = int(right[-1]) + 1
        return down[:, None] * columns + right, (int(down[-1]) + 1) * columns

    def _shifts(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count, 2) shifts in px: nothing for most blocks, a random vector for the outliers."""
        chosen = torch.rand(count, generator=generator) < self.options.outlier_share
        angle = 2 * torch.pi * torch.rand(count, generator=generator)
        radius = self.options.outlier_shift_px * (
            0.1 + 0.9 * torch.rand(count, generator=generator)
        )
        shift = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
        return (shift * chosen[:, None]).double()

    def _outliers(self, a: DenseEncoding, b: DenseEncoding) -> torch.Tensor:
        block, count = self._blocks(a, self.options.outlier_block_px)
        generator = self._generator("outliers", a.name, b.name)
        shifts = self._shifts(count, generator)
        return shifts[block].to(self.device)


INFO = MatcherInfo(
    name=NAME,
    kind="dense",
    checkpoint=(),
    licence="MIT",
    commercial=True,
    colour="rgb",
    summary="knows the scene: for tests and benchmarks of tracks, not for photographs",
)

PRESETS: dict[Quality, dict[str, Any]] = {
    "fast": {"size": (432, 576)},
    "base": {},
    "precise": {"upsample_size": (864, 1152)},
}


def synthetic_dense(*, quality: Quality, device: str, **overrides: Any) -> SyntheticDense:
    """Factory for the registry. The option ``scene`` names the scene's file."""
    if "scene" in overrides:
        overrides["scene"] = str(overrides["scene"])
    options = common.resolve_options(
        SyntheticOptions, quality=quality, presets=PRESETS, overrides=overrides, matcher=NAME
    )
    if not options.scene:
        raise InputError(f"{NAME} needs its scene: --matcher-options scene=FOLDER/scene.json")
    return SyntheticDense(
        options=options, device=common.resolve_device(device), scene=load_scene(options.scene)
    )


def register() -> None:
    """Make the matcher known as ``synthetic_dense``; calling it again changes nothing."""
    if NAME not in registry.names():
        registry.register(NAME, "gim_hloc.evaluation.benchmarks.scene:synthetic_dense", INFO)
