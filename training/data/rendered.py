"""Rendered scenes with exact depth: furnished with boxes, papered with noise or photographs.

A scene is a room whose walls, floor and ceiling, and the boxes and boards in it, are flat textured
patches. The depth of a flat patch has a closed form, so that truth is exact; a pixel is textured
from the two nearest levels of a pyramid, so that far floors do not flicker. Views of a pair differ
in exposure, colour of the light and noise.

Everything follows from the numbers of the options and the index of a pair, not from any file.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.images import SUFFIXES, read_rgb
from gim_hloc.options import Count, options
from gim_hloc.training.data.augment import RawPair
from gim_hloc.training.data.source import PairSource, SourceOptions

_TEXTURE = 512  # px, side of a texture
_TEXTURES = 48  # made up where no photographs are given
_PHOTOGRAPHS = 64  # used at most: 1 MB each, in every process
_COARSE = 24  # px, width of the images that overlap is measured on
_AGREEMENT = 0.05  # relative difference of depth of points that both views see


@options
class RenderedOptions(SourceOptions):
    """Which rooms, and how they are seen."""

    scenes: Count = 1000  # different rooms
    pairs_per_scene: Count = 20  # views are new for each pair
    size: tuple[int, int] = (640, 480)  # (width, height) of the images, px
    fov_deg: tuple[float, float] = (50.0, 85.0)  # range of the horizontal angle of view
    overlap: tuple[float, float] = (0.15, 0.8)  # of a pair, in both directions
    boxes: tuple[int, int] = (4, 9)  # range of the number of boxes in a room
    boards: tuple[int, int] = (2, 5)  # range of the number of tilted boards
    roll_deg: float = 10.0  # largest roll of a camera
    noise: float = 0.01  # standard deviation of the noise of a pixel, of white
    textures: Path | None = None  # folder of photographs to paper with; None: noise
    seed: int = 0  # of all rooms and views; validation should use another one

    AUGMENT: ClassVar[Mapping[str, Any]] = {"photometric": "dark"}

    def __post_init__(self) -> None:
        if min(self.size) < 16:
            raise InputError(f"size is {self.size}, it must be at least 16 x 16.")
        if not 0 <= self.overlap[0] < self.overlap[1] <= 1:
            raise InputError(f"overlap is {self.overlap}; give a range within 0 and 1.")
        for name in ("boxes", "boards"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise InputError(f"{name} is ({low}, {high}); give a range of numbers.")


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera, hloc's frame (integer = centre of a pixel).

    Attributes:
        size: (width, height) in pixels.
        K: (3, 3).
        world_to_camera: (4, 4).
    """

    size: tuple[int, int]
    K: np.ndarray
    world_to_camera: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        """(3,) centre of projection in the world."""
        result: np.ndarray = -self.world_to_camera[:3, :3].T @ self.world_to_camera[:3, 3]
        return result

    def reduced(self, width: int) -> Camera:
        """The same view on fewer pixels."""
        size = (width, max(1, round(self.size[1] * width / self.size[0])))
        K = self.K.copy()
        for axis in (0, 1):
            factor = size[axis] / self.size[axis]
            K[axis] *= factor
            K[axis, 2] += (factor - 1) / 2
        return Camera(size=size, K=K, world_to_camera=self.world_to_camera)


@dataclass(kw_only=True)
class Room:
    """Flat patches: points ``origin + s * side0 + t * side1`` with s, t in [0, 1].

    Attributes:
        origin: (P, 3) one corner, metres; z is up.
        side0, side1: (P, 3) to the two neighbouring corners, at right angles.
        texture: (P,) index of a texture.
        texel: (P,) texture pixels per metre.
        offset: (P, 2) of the patch's corner in the texture, texture pixels.
        shade: (P, 3) factor of the colours.
        extent: (3,) of the room, which begins at the origin.
    """

    origin: np.ndarray
    side0: np.ndarray
    side1: np.ndarray
    texture: np.ndarray
    texel: np.ndarray
    offset: np.ndarray
    shade: np.ndarray
    extent: np.ndarray


def make_room(rng: np.random.Generator, options: RenderedOptions, textures: int) -> Room:
    """Draw a room.

    Args:
        rng: source of everything random.
        options: number of boxes and boards.
        textures: how many there are to choose from.
    """
    extent = np.array([rng.uniform(4, 8), rng.uniform(4, 8), rng.uniform(2.4, 3.5)])
    x, y, z = np.diag(extent)
    zero = np.zeros(3)
    patches = [(zero, x, y), (z, x, y), (zero, x, z), (y, x, z), (zero, y, z), (x, y, z)]
    for _ in range(int(rng.integers(options.boxes[0], options.boxes[1] + 1))):
        side = rng.uniform(0.3, 1.3, 2)
        height = rng.uniform(0.3, 0.7 * extent[2])
        angle = rng.uniform(0, np.pi)
        a = np.array([np.cos(angle), np.sin(angle), 0]) * side[0]
        b = np.array([-np.sin(angle), np.cos(angle), 0]) * side[1]
        c = np.array([0, 0, height])
        foot = np.append(rng.uniform(0.1, 0.9, 2) * extent[:2], 0) - (a + b) / 2
        patches += [(foot + c, a, b), (foot, a, c), (foot + b, a, c), (foot, b, c)]
        patches.append((foot + a, b, c))
    for _ in range(int(rng.integers(options.boards[0], options.boards[1] + 1))):
        frame = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        a, b = frame[0] * rng.uniform(0.4, 1.2), frame[1] * rng.uniform(0.4, 1.2)
        middle = rng.uniform(0.15, 0.85, 3) * extent
        patches.append((middle - (a + b) / 2, a, b))
    count = len(patches)
    origin, side0, side1 = (np.array(column, np.float64) for column in zip(*patches, strict=True))
    # A texture continues mirrored and repeats from twice its side on: no patch is that large, and
    # patches share textures only when there are no more.
    longest = np.maximum(np.linalg.norm(side0, axis=1), np.linalg.norm(side1, axis=1))
    order = np.concatenate([rng.permutation(textures) for _ in range(-(-count // textures))])
    return Room(
        origin=origin,
        side0=side0,
        side1=side1,
        texture=order[:count],
        texel=np.minimum(rng.uniform(120, 350, count), 2 * _TEXTURE / longest),
        offset=rng.uniform(0, _TEXTURE, (count, 2)),
        shade=rng.uniform(0.55, 1.0, (count, 1)) * rng.uniform(0.85, 1.0, (count, 3)),
        extent=extent,
    )


def cast(room: Room, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """What each pixel's centre sees.

    Returns:
        (h, w) float64 depth along the optical axis, infinite where nothing is hit, and (h, w) int
        index of the patch, -1 for none.
    """
    width, height = camera.size
    columns, rows = np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64)[:, None]
    nearest = np.full((height, width), 1e-9)  # largest 1 / depth so far
    owner = np.full((height, width), -1)
    for k, to_patch in enumerate(_patch_maps(room, camera)):
        window = _window(room, k, camera)
        if to_patch is None or window is None:
            continue
        top, bottom, left, right = window
        x, y = columns[left:right], rows[top:bottom]
        s, t, inverse = (row[0] * x + (row[1] * y + row[2]) for row in to_patch)
        best, whose = nearest[top:bottom, left:right], owner[top:bottom, left:right]
        hit = (inverse > best) & (s >= 0) & (s <= inverse) & (t >= 0) & (t <= inverse)
        np.copyto(best, inverse, where=hit)
        np.copyto(whose, k, where=hit)
    with np.errstate(divide="ignore"):
        depth = np.where(owner >= 0, 1 / nearest, np.inf)
    return depth, owner


def _patch_maps(room: Room, camera: Camera) -> list[np.ndarray | None]:
    """Of each patch: (3, 3) pixel -> (s, t, 1) / depth; None for one that is seen edge on."""
    rotation, translation = camera.world_to_camera[:3, :3], camera.world_to_camera[:3, 3]
    maps: list[np.ndarray | None] = []
    for origin, side0, side1 in zip(room.origin, room.side0, room.side1, strict=True):
        # M (s, t, 1) is a point in the camera, which is depth * K^-1 (x, y, 1).
        M = np.stack([rotation @ side0, rotation @ side1, rotation @ origin + translation], 1)
        edge_on = abs(np.linalg.det(M)) < 1e-9
        maps.append(None if edge_on else np.linalg.inv(camera.K @ M))
    return maps


def _window(room: Room, patch: int, camera: Camera) -> tuple[int, int, int, int] | None:
    """Rows and columns (top, bottom, left, right) that a patch may cover; None for none."""
    width, height = camera.size
    origin, a, b = room.origin[patch], room.side0[patch], room.side1[patch]
    corners = np.stack([origin, origin + a, origin + b, origin + a + b])
    local = corners @ camera.world_to_camera[:3, :3].T + camera.world_to_camera[:3, 3]
    if (local[:, 2] <= 0).all():
        return None
    if (local[:, 2] < 0.05).any():  # it reaches behind the camera
        return 0, height, 0, width
    xy = (local @ camera.K.T)[:, :2] / local[:, 2:]
    left, top = np.clip(np.floor(xy.min(0)).astype(int), 0, [width, height])
    right, bottom = np.clip(np.ceil(xy.max(0)).astype(int) + 1, 0, [width, height])
    if left >= right or top >= bottom:
        return None
    return int(top), int(bottom), int(left), int(right)


def render_view(
    room: Room,
    camera: Camera,
    pyramids: Sequence[Sequence[np.ndarray]],
    *,
    rng: np.random.Generator | None = None,
    noise: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """An image and its depth.

    Args:
        room: what is seen.
        camera: from where.
        pyramids: of each texture, (side, side, 3) uint8 levels, halved each time.
        rng: source of exposure, colour of the light and noise; None: none of them.
        noise: standard deviation of a pixel's noise, of white.

    Returns:
        (h, w, 3) uint8 RGB and (h, w) float32 depth, 0 where nothing is seen.
    """
    import cv2

    depth, owner = cast(room, camera)
    height, width = depth.shape
    image = np.zeros((height, width, 3), np.float32)
    focal = camera.K[0, 0]
    columns, rows = np.arange(width), np.arange(height)[:, None]
    maps = _patch_maps(room, camera)
    for k in np.unique(owner[owner >= 0]):
        inside_rows = np.flatnonzero((owner == k).any(1))
        inside_columns = np.flatnonzero((owner == k).any(0))
        view = (
            slice(inside_rows[0], inside_rows[-1] + 1),
            slice(inside_columns[0], inside_columns[-1] + 1),
        )
        mine = owner[view] == k
        to_patch = maps[k]
        assert to_patch is not None  # it is seen
        x, y = columns[view[1]], rows[view[0]]
        z = np.where(mine, depth[view], 0.0)
        # Metres along both sides.
        s, t = (
            (row[0] * x + (row[1] * y + row[2])) * (z * np.linalg.norm(side))
            for row, side in zip(to_patch[:2], (room.side0[k], room.side1[k]), strict=True)
        )
        normal = np.cross(room.side0[k], room.side1[k])
        away = abs((room.origin[k] - camera.centre) @ normal) / np.linalg.norm(normal)
        # Texture pixels per image pixel: grown by distance, and along one side by the slant, of
        # which half (in logarithm) is smoothed.
        slant = np.sqrt(np.clip(z / max(away, 1e-3), 1, 16))
        level = np.log2(np.maximum(room.texel[k] * z / focal * slant, 1.0))
        pyramid = pyramids[room.texture[k]]
        level = np.clip(level, 0, len(pyramid) - 1)
        first, last = int(level[mine].min()), int(np.ceil(level[mine].max()))
        colour = np.zeros((*mine.shape, 3), np.float32)
        for step in range(first, last + 1):
            weight = np.clip(1 - np.abs(level - step), 0, 1) * mine
            # Tiles are mirrored, so that any texture continues without a seam.
            u, v = (
                ((length * room.texel[k] + offset) / 2**step - 0.5).astype(np.float32)
                for length, offset in zip((s, t), room.offset[k], strict=True)
            )
            sampled = cv2.remap(
                pyramid[step], u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
            )
            colour += sampled * weight[..., None].astype(np.float32)
        image[view] += colour * room.shade[k].astype(np.float32)
    if rng is not None:
        light = rng.uniform(0.75, 1.2) * rng.uniform(0.93, 1.07, 3)
        image = image * light.astype(np.float32)
        if noise > 0:
            image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(255 * noise)
    known = np.where(np.isfinite(depth), depth, 0).astype(np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), known


def look(
    centre: np.ndarray, target: np.ndarray, roll: float, size: tuple[int, int], fov: float
) -> Camera:
    """A camera that looks from one point to another; angles in radians."""
    forward = (target - centre) / np.linalg.norm(target - centre)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    cosine, sine = np.cos(roll), np.sin(roll)
    right, down = cosine * right + sine * down, cosine * down - sine * right
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, down, forward])
    pose[:3, 3] = -pose[:3, :3] @ centre
    focal = size[0] / 2 / np.tan(fov / 2)
    K = np.array([[focal, 0, (size[0] - 1) / 2], [0, focal, (size[1] - 1) / 2], [0, 0, 1]])
    return Camera(size=size, K=K, world_to_camera=pose)


def overlap_of(room: Room, camera0: Camera, camera1: Camera) -> tuple[float, float]:
    """Share of each view that the other one sees unhidden, on coarse images."""
    small = [camera.reduced(_COARSE) for camera in (camera0, camera1)]
    depths = [cast(room, camera)[0] for camera in small]
    shares = []
    for i, j in ((0, 1), (1, 0)):
        width, height = small[i].size
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        z = depths[i].reshape(-1)
        usable = np.isfinite(z)
        rays = (
            np.stack([x.ravel(), y.ravel(), np.ones(x.size)], 1)[usable]
            @ np.linalg.inv(small[i].K).T
        )
        move = small[j].world_to_camera @ np.linalg.inv(small[i].world_to_camera)
        moved = rays * z[usable, None] @ move[:3, :3].T + move[:3, 3]
        moved = moved[moved[:, 2] > 0.05]
        xy = np.rint((moved @ small[j].K.T)[:, :2] / moved[:, 2:]).astype(int)
        inside = ((xy >= 0) & (xy < small[j].size)).all(1)
        there = depths[j][xy[inside, 1], xy[inside, 0]]
        near = np.abs(there - moved[inside, 2]) < 2 * _AGREEMENT * moved[inside, 2]
        shares.append(float(near.sum()) / z.size)
    return shares[0], shares[1]


def draw_cameras(
    room: Room, rng: np.random.Generator, options: RenderedOptions
) -> tuple[Camera, Camera]:
    """Two views of a room that overlap as the options ask, or as nearly as chance allows."""

    def draw(near: Camera | None) -> Camera:
        margin = 0.3
        for _ in range(50):
            if near is None:
                centre = rng.uniform(margin, room.extent - margin)
                direction = rng.standard_normal(3) * [1, 1, 0.35]
            else:
                reach = rng.uniform(0.2, 2.0)
                centre = near.centre + rng.standard_normal(3) * [reach, reach, reach / 3]
                centre = np.clip(centre, margin, room.extent - margin)
                depth = rng.uniform(1.5, 4)
                aim = near.centre + depth * near.world_to_camera[2, :3]
                direction = aim + rng.standard_normal(3) * 0.5 - centre
            direction[2] = np.clip(direction[2], -1.2, 1.2) * 0.8
            if np.linalg.norm(direction[:2]) < 1e-2:
                continue
            roll = np.deg2rad(rng.uniform(-options.roll_deg, options.roll_deg))
            fov = np.deg2rad(rng.uniform(*options.fov_deg))
            camera = look(centre, centre + direction, roll, options.size, fov)
            seen = cast(room, camera.reduced(_COARSE))[0]
            # Not inside a box, and not with a wall before the lens.
            if np.isfinite(seen).mean() > 0.99 and np.quantile(seen, 0.05) > 0.4:
                break
        return camera

    best: tuple[float, Camera, Camera] | None = None
    low, high = options.overlap
    for _ in range(8):
        first = draw(None)
        for _ in range(6):
            second = draw(first)
            shares = overlap_of(room, first, second)
            off = max(max(low - share, share - high, 0.0) for share in shares)
            if best is None or off < best[0]:
                best = (off, first, second)
            if off == 0.0:
                return first, second
    assert best is not None  # there was at least one draw
    return best[1], best[2]


# ----------------------------------------------------------------------------------------- textures


def make_texture(rng: np.random.Generator, side: int = _TEXTURE) -> np.ndarray:
    """Coloured noise of several scales with edges, (side, side, 3) uint8."""
    import cv2

    def octaves(roughness: float) -> np.ndarray:
        total = np.zeros((side, side), np.float32)
        cells, strength = 4, 1.0
        while cells <= side:
            grid = rng.standard_normal((cells, cells), dtype=np.float32)
            total += strength * cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)
            cells, strength = cells * 2, strength * roughness
        return total

    base = octaves(rng.uniform(0.55, 0.8))
    number = int(rng.integers(3, 7))
    colours = rng.uniform(30, 225, (number, 1)) + rng.uniform(-35, 35, (number, 3))
    # Bands of the noise get colours of their own: regions with corners, as things have.
    limits = np.quantile(base[::4, ::4], np.arange(1, number) / number)
    image = colours.astype(np.float32)[np.digitize(base, limits)]
    image = np.clip(image + 18 * octaves(0.85)[..., None], 0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(10, 40))):
        centre = tuple(int(v) for v in rng.integers(0, side, 2))
        colour = tuple(float(v) for v in rng.uniform(0, 255, 3))
        reach = int(rng.integers(side // 60, side // 14))
        if rng.random() < 0.5:
            cv2.circle(image, centre, reach, colour, -1, cv2.LINE_AA)
        else:
            angle = rng.uniform(0, 90)
            corners = cv2.boxPoints((centre, (2.0 * reach, float(reach)), angle))
            cv2.fillPoly(image, [corners.astype(np.int32)], colour)
    return image


def pyramid(texture: np.ndarray) -> list[np.ndarray]:
    """Levels of a texture (side, side, 3) uint8, each half of the one before, down to 4 pixels."""
    import cv2

    levels = [texture]
    while min(levels[-1].shape[:2]) >= 8:
        last = levels[-1]
        size = (last.shape[1] // 2, last.shape[0] // 2)
        levels.append(np.asarray(cv2.resize(last, size, interpolation=cv2.INTER_AREA)))
    return levels


@functools.lru_cache(maxsize=4)
def _texture_pool(seed: int, folder: Path | None) -> tuple[tuple[np.ndarray, ...], ...]:
    """Pyramids of all textures; made once per process."""
    if folder is None:
        made = (make_texture(np.random.default_rng([seed, k])) for k in range(_TEXTURES))
        return tuple(tuple(pyramid(texture)) for texture in made)
    import cv2

    paths = sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"{folder} holds no photographs for textures.")
    pools = []
    for path in paths[:_PHOTOGRAPHS]:
        photo = read_rgb(path, max_size=2 * _TEXTURE)
        side = min(photo.shape[:2])
        square = photo[:side, :side]
        if side != _TEXTURE:
            how = cv2.INTER_AREA if side > _TEXTURE else cv2.INTER_LINEAR
            square = cv2.resize(square, (_TEXTURE, _TEXTURE), interpolation=how)
        pools.append(tuple(pyramid(square)))
    return tuple(pools)


# ------------------------------------------------------------------------------------------- source


class Rendered(PairSource):
    """Pairs of views of rooms; each room is a scene.

    Raises:
        InputError: a folder of textures without photographs.
    """

    def __init__(self, options: RenderedOptions) -> None:
        super().__init__(options.name or "rendered", options.augmentation(), options.failures)
        self._options = options
        self._lengths = np.full(options.scenes, options.pairs_per_scene, dtype=np.int64)
        folder = None if options.textures is None else Path(options.textures)
        if folder is not None and not folder.is_dir():
            raise InputError(f"The folder of textures {folder} does not exist.")
        self._textures = folder

    def scene_lengths(self) -> np.ndarray:
        """Pairs of each room."""
        return self._lengths

    def load(self, index: int) -> RawPair:
        """Render a pair."""
        options = self._options
        pyramids = _texture_pool(options.seed, self._textures)
        scene = index // options.pairs_per_scene
        room = make_room(np.random.default_rng([options.seed, scene]), options, len(pyramids))
        rng = np.random.default_rng([options.seed, scene, index])
        cameras = draw_cameras(room, rng, options)
        (image0, depth0), (image1, depth1) = (
            render_view(room, camera, pyramids, rng=rng, noise=options.noise) for camera in cameras
        )
        poses = [camera.world_to_camera for camera in cameras]
        return RawPair(
            image0=image0,
            image1=image1,
            names=(f"room{scene:06d}/{index}a", f"room{scene:06d}/{index}b"),
            depth0=depth0,
            depth1=depth1,
            K0=cameras[0].K,
            K1=cameras[1].K,
            T_0to1=poses[1] @ np.linalg.inv(poses[0]),
        )
