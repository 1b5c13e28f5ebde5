"""Render the example room: photographs with exact poses, intrinsics and depth.

The room is built from textured patches, lit once (soft shadows and obscurance are baked, so a point
has the same colour from everywhere), and ray cast with Open3D. Run
``python examples/render_room.py OUT``, or use ``build_scene``, ``camera_path`` and ``render_view``
for any number of views.

Frames: the world is right-handed, in metres, z up, floor at z = 0. Cameras are COLMAP's (x right,
y down, z forward); the centre of the top-left pixel is (0.5, 0.5).
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from room_geometry import Patch, Vec, furnish_room
from room_textures import Array, Colour, finish

log = logging.getLogger("render_room")

DEPTH_UNIT = 0.001  # metres per step of the 16-bit depth files
JPEG_QUALITY = 92
FOCAL_35MM = 28  # focal length of the camera in 35 mm terms, as EXIF states it
GAMMA = 2.2

_TO_LINEAR = ((np.arange(256) / 255.0) ** GAMMA).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A room ready to be rendered; made by ``build_scene``.

    Attributes:
        raycaster: ``open3d.t.geometry.RaycastingScene`` that holds all triangles.
        triangle_patch: index of the patch of each triangle, (T,).
        corner_attributes: texture (u, v) and light (s, t) coordinates of corners, (T, 3, 4).
        patch_texture: texture index of each patch, (P,).
        patch_texel: metres per texel of each patch, (P,).
        patch_glow: light given off by each patch, (P,).
        texels: all mip levels of all textures, sRGB uint8, (N, 3).
        levels: offset, width and height of each mip level of each texture, (textures, levels, 3).
        light: baked linear light, float32 (M, 3).
        light_maps: offset, width and height of each patch's light map, (P, 3).
    """

    raycaster: Any
    triangle_patch: Array
    corner_attributes: Array
    patch_texture: Array
    patch_texel: Array
    patch_glow: Array
    texels: Array
    levels: Array
    light: Array
    light_maps: Array


def _tensor(values: Array) -> Any:
    """Hand an array to Open3D, which is imported only when something is rendered."""
    import open3d as o3d

    return o3d.core.Tensor.from_numpy(np.ascontiguousarray(values))


def _mip_levels(images: Sequence[Array], count: int = 8) -> tuple[Array, Array]:
    """Pack textures and their halvings (averaged in linear light) into one array."""
    chunks: list[Array] = []
    table = np.zeros((len(images), count, 3), np.int64)
    offset = 0
    for k, image in enumerate(images):
        level: Array = image
        for m in range(count):
            if m and min(level.shape[:2]) > 1:
                height, width = (max(1, s // 2) for s in level.shape[:2])
                linear = cv2.resize(
                    _TO_LINEAR[level], (width, height), interpolation=cv2.INTER_AREA
                )
                level = finish(255.0 * linear ** (1 / GAMMA))
            elif m:
                table[k, m] = table[k, m - 1]
                continue
            table[k, m] = offset, level.shape[1], level.shape[0]
            chunks.append(level.reshape(-1, 3))
            offset += level.shape[0] * level.shape[1]
    return np.concatenate(chunks), table


def _triangulate(patches: Sequence[Patch]) -> tuple[Array, Array, Array, Array]:
    """Vertices (V, 3), triangles (T, 3), their patches (T,) and corner attributes (T, 3, 4)."""
    vertices, triangles, owners, attributes = [], [], [], []
    start = 0
    for k, patch in enumerate(patches):
        rows, columns = patch.points.shape[:2]
        index = np.arange(rows * columns).reshape(rows, columns)
        a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
        faces = np.concatenate(
            [np.stack([a, d, c], -1).reshape(-1, 3), np.stack([a, c, b], -1).reshape(-1, 3)]
        )
        st = np.stack(np.meshgrid(np.linspace(0, 1, columns), np.linspace(0, 1, rows)), axis=-1)
        attribute = np.concatenate([patch.uv, st], axis=-1).reshape(-1, 4)
        vertices.append(patch.points.reshape(-1, 3))
        triangles.append(faces + start)
        owners.append(np.full(len(faces), k))
        attributes.append(attribute[faces])
        start += rows * columns
    stacked = (
        np.concatenate(vertices),
        np.concatenate(triangles),
        np.concatenate(owners),
        np.concatenate(attributes),
    )
    return (
        stacked[0].astype(np.float32),
        stacked[1].astype(np.uint32),
        stacked[2],
        stacked[3].astype(np.float32),
    )


# Area lights: centre, two half edges whose cross product points into the room, linear colour.
_LIGHTS: tuple[tuple[Vec, Vec, Vec, Colour], ...] = (
    ((0.5, -0.4, 2.60), (0.0, 0.9, 0.0), (1.1, 0.0, 0.0), (5.2, 4.8, 4.2)),
    ((-3.05, 0.35, 1.60), (0.0, 0.9, 0.0), (0.0, 0.0, 0.6), (3.4, 3.9, 4.6)),
)


def _bake(
    raycaster: Any, patches: Sequence[Patch], rng: np.random.Generator
) -> tuple[Array, Array]:
    """Light maps: soft shadows of two area lights and obscurance of a diffuse surrounding.

    Returns:
        Linear light (M, 3) and the table of offset, width, height per patch (P, 3).
    """
    samples, spacing = 24, 0.08
    table = np.zeros((len(patches), 3), np.int64)
    places, normals = [], []
    offset = 0
    for k, patch in enumerate(patches):
        p = patch.points
        wide = np.linalg.norm(np.diff(p, axis=1), axis=-1).sum(axis=1).max()
        high = np.linalg.norm(np.diff(p, axis=0), axis=-1).sum(axis=0).max()
        width, height = (int(np.clip(math.ceil(x / spacing) + 1, 2, 128)) for x in (wide, high))
        s = np.linspace(0, 1, width) * 0.96 + 0.02
        t = np.linspace(0, 1, height) * 0.96 + 0.02
        place, normal = _surface(p, s, t)
        places.append(place.reshape(-1, 3))
        normals.append(normal.reshape(-1, 3))
        table[k] = offset, width, height
        offset += width * height
    points, n = np.concatenate(places), np.concatenate(normals)
    origin = points + 2e-3 * n
    count = len(points)
    tangent = np.cross(n, np.where(np.abs(n[:, 2:]) < 0.9, (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)))
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    bitangent = np.cross(n, tangent)
    total = np.zeros((count, 3))
    spin = rng.random(count) * 2 * math.pi
    sky = np.zeros(count)
    for i in range(
        samples
    ):  # cosine-weighted spiral over the hemisphere, turned differently at each point
        radius, angle = math.sqrt((i + 0.5) / samples), 2.399963 * i + spin
        side = radius * (np.cos(angle)[:, None] * tangent + np.sin(angle)[:, None] * bitangent)
        rays = np.concatenate([origin, side + math.sqrt(1 - radius**2) * n], axis=1).astype(
            np.float32
        )
        hit = raycaster.cast_rays(_tensor(rays))["t_hit"].numpy()
        sky += np.minimum(hit / 1.6, 1.0) ** 0.8 / samples
    total += sky[:, None] * (0.50, 0.48, 0.45)
    for centre, half0, half1, colour in _LIGHTS:
        facing = np.cross(half0, half1) / np.linalg.norm(np.cross(half0, half1))
        for i in range(16):
            jitter = rng.random((count, 2)) / 4 + np.array([i % 4, i // 4]) / 4
            target = (
                np.asarray(centre)
                + np.outer(2 * jitter[:, 0] - 1, half0)
                + np.outer(2 * jitter[:, 1] - 1, half1)
            )
            toward = target - origin
            far = np.linalg.norm(toward, axis=1)
            cosine = np.maximum(np.einsum("ij,ij->i", toward, n) / far, 0)
            emit = np.maximum(-(toward @ facing) / far, 0)
            rays = np.concatenate([origin, toward], axis=1).astype(np.float32)
            free = ~raycaster.test_occlusions(_tensor(rays), 0.0, 0.98).numpy()
            total += (free * cosine * emit / np.maximum(far, 0.5) ** 2 / 16)[:, None] * colour
    light = total.astype(np.float32)
    for first, width, height in table:  # average out the sampling noise
        view = light[first : first + width * height].reshape(height, width, 3)
        if min(width, height) > 2:
            view[:] = cv2.GaussianBlur(view, (0, 0), 0.8, borderType=cv2.BORDER_REPLICATE)
    return light, table


def _surface(points: Array, s: Array, t: Array) -> tuple[Array, Array]:
    """Points and unit normals of a patch's grid at parameters ``s`` (columns) and ``t`` (rows)."""
    rows, columns = points.shape[:2]
    x, y = s * (columns - 1), t * (rows - 1)
    i, j = np.minimum(x.astype(int), columns - 2), np.minimum(y.astype(int), rows - 2)
    fx, fy = (x - i)[None, :, None], (y - j)[:, None, None]
    p00, p01 = points[j][:, i], points[j][:, i + 1]
    p10, p11 = points[j + 1][:, i], points[j + 1][:, i + 1]
    place = (p00 * (1 - fx) + p01 * fx) * (1 - fy) + (p10 * (1 - fx) + p11 * fx) * fy
    normal = np.cross(
        (p10 - p00) * (1 - fx) + (p11 - p01) * fx, (p01 - p00) * (1 - fy) + (p11 - p10) * fy
    )
    return place, normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)


def build_scene(seed: int = 0) -> Scene:
    """Furnish, texture and light the room.

    Args:
        seed: decides all texture details, the books and the leaves; the furniture stays in place.

    Returns:
        The scene for ``render_view``.

    Raises:
        FileNotFoundError: if a wheel with the photographs is not installed.
    """
    builder = furnish_room(np.random.default_rng(seed))
    patches = builder.patches
    vertices, triangles, owner, attributes = _triangulate(patches)
    import open3d as o3d

    raycaster = o3d.t.geometry.RaycastingScene()
    raycaster.add_triangles(_tensor(vertices), _tensor(triangles))
    texels, levels = _mip_levels(builder.textures)
    light, light_maps = _bake(raycaster, patches, np.random.default_rng((seed, 1)))
    texel = []
    for patch in patches:
        du, dv = np.diff(patch.uv, axis=1)[:-1], np.diff(patch.uv, axis=0)[:, :-1]
        share = float(np.abs(du[..., 0] * dv[..., 1] - du[..., 1] * dv[..., 0]).sum())
        height, width = builder.textures[patch.texture].shape[:2]
        texel.append(math.sqrt(patch.area / max(share * width * height, 1e-6)))
    return Scene(
        raycaster=raycaster,
        triangle_patch=owner,
        corner_attributes=attributes,
        patch_texture=np.array([patch.texture for patch in patches]),
        patch_texel=np.array(texel, np.float32),
        patch_glow=np.array([patch.glow for patch in patches], np.float32),
        texels=texels,
        levels=levels,
        light=light,
        light_maps=light_maps,
    )


def intrinsics(width: int = 800, height: int = 600) -> Array:
    """Calibration matrix of the camera, COLMAP's corner origin, in pixels.

    The focal length is what EXIF's 35 mm figure means: 43.27 mm is the diagonal of the image.
    """
    focal = FOCAL_35MM / math.hypot(36.0, 24.0) * math.hypot(width, height)
    return np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])


def look_at(centre: Vec, target: Vec, roll: float = 0.0) -> Array:
    """World-to-camera matrix (3, 4) of a camera at ``centre`` that sees ``target`` in its middle.

    Args:
        centre: position in metres.
        target: point to look at.
        roll: turn about the viewing axis in radians.
    """
    c = np.asarray(centre, dtype=float)
    forward = np.asarray(target, dtype=float) - c
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    turned = (
        math.cos(roll) * right + math.sin(roll) * down,
        math.cos(roll) * down - math.sin(roll) * right,
    )
    rotation = np.stack([*turned, forward])
    return np.concatenate([rotation, -(rotation @ c)[:, None]], axis=1)


def camera_path(views: int) -> list[Array]:
    """World-to-camera matrices (3, 4) of a closed walk around the room, looking inwards.

    Args:
        views: number of views, spread evenly; more views give a denser sampling of the same walk.
    """
    poses = []
    for k in range(views):
        a = 2 * math.pi * k / views - 2.0
        radius = 1 + 0.05 * math.sin(3 * a + 0.4)
        centre = (
            2.42 * radius * math.cos(a),
            1.86 * radius * math.sin(a),
            1.46 + 0.16 * math.sin(2 * a + 1.0),
        )
        target = (
            0.15 - 0.55 * math.cos(a),
            0.05 - 0.4 * math.sin(a),
            0.98 + 0.10 * math.cos(3 * a),
        )
        poses.append(look_at(centre, target, roll=math.radians(1.8) * math.sin(2 * a)))
    return poses


def _rays(k: Array, world_to_camera: Array, x: Array, y: Array) -> Array:
    """Rays (h, w, 6) through image points; their length is one metre along the optical axis."""
    rotation, translation = world_to_camera[:, :3], world_to_camera[:, 3]
    u, v = np.meshgrid((x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1])
    direction = np.stack([u, v, np.ones_like(u)], axis=-1) @ rotation
    origin = np.broadcast_to(-rotation.T @ translation, direction.shape)
    return np.concatenate([origin, direction], axis=-1).astype(np.float32)


def render_depth(
    scene: Scene, k: Array, world_to_camera: Array, *, width: int, height: int
) -> Array:
    """Depth along the optical axis through the centres of the pixels.

    Args:
        scene: what ``build_scene`` returned.
        k: calibration matrix (3, 3), corner origin, pixels.
        world_to_camera: pose (3, 4) or (4, 4).
        width: columns.
        height: rows.

    Returns:
        Depth in metres, float32 (height, width); infinite where nothing is hit.
    """
    rays = _rays(k, world_to_camera[:3], np.arange(width) + 0.5, np.arange(height) + 0.5)
    depth: Array = scene.raycaster.cast_rays(_tensor(rays))["t_hit"].numpy()
    return depth


def _bilinear(table: Array, values: Array, x: Array, y: Array) -> Array:
    """Interpolate in packed images; ``table`` (R, 3) is offset, width, height; x, y in [0, 1]."""
    offset, width, height = table[:, 0], table[:, 1], table[:, 2]
    px = np.clip(x * width - 0.5, 0, width - 1).astype(np.float32)
    py = np.clip(y * height - 0.5, 0, height - 1).astype(np.float32)
    i, j = px.astype(np.int64), py.astype(np.int64)
    fx, fy = (px - i)[:, None], (py - j)[:, None]
    right, below = np.minimum(i + 1, width - 1), np.minimum(j + 1, height - 1)
    row0, row1 = offset + j * width, offset + below * width

    def fetch(index: Array) -> Array:
        found = values[index]
        return _TO_LINEAR[found] if found.dtype == np.uint8 else found

    upper = fetch(row0 + i) * (1 - fx) + fetch(row0 + right) * fx
    lower = fetch(row1 + i) * (1 - fx) + fetch(row1 + right) * fx
    result: Array = upper * (1 - fy) + lower * fy
    return result


def _shade(scene: Scene, rays: Array, focal: float) -> Array:
    """Linear colour (R, 3) seen along rays; ``focal`` is in samples and sets the texture level."""
    hit = scene.raycaster.cast_rays(_tensor(rays))
    triangle = hit["primitive_ids"].numpy().astype(np.int64)
    depth = hit["t_hit"].numpy()
    seen = np.isfinite(depth)
    colour = np.zeros((len(rays), 3), np.float32)
    triangle, depth, bary = triangle[seen], depth[seen], hit["primitive_uvs"].numpy()[seen]
    normal, direction = hit["primitive_normals"].numpy()[seen], rays[seen, 3:]
    corner = scene.corner_attributes[triangle]
    b1, b2 = bary[:, :1], bary[:, 1:]
    u, v, s, t = (corner[:, 0] * (1 - b1 - b2) + corner[:, 1] * b1 + corner[:, 2] * b2).T
    patch = scene.triangle_patch[triangle]
    cosine = np.abs(np.einsum("ij,ij->i", normal, direction)) / np.linalg.norm(direction, axis=1)
    footprint = depth / focal / np.sqrt(np.maximum(cosine, 0.06))
    last = scene.levels.shape[1] - 1
    level = np.clip(np.log2(footprint / scene.patch_texel[patch]), 0, last - 1e-3).astype(
        np.float32
    )
    low = level.astype(np.int64)
    weight = (level - low)[:, None]
    texture = scene.patch_texture[patch]
    albedo = _bilinear(scene.levels[texture, low], scene.texels, u, v) * (1 - weight)
    albedo += _bilinear(scene.levels[texture, low + 1], scene.texels, u, v) * weight
    # Light maps have samples on the borders of the patch, textures at the centres of their texels.
    maps = scene.light_maps[patch]
    on_border = [(a * (n - 1) + 0.5) / n for a, n in ((s, maps[:, 1]), (t, maps[:, 2]))]
    light = _bilinear(maps, scene.light, *on_border)
    colour[seen] = albedo * (light + scene.patch_glow[patch][:, None])
    return colour


def render_view(
    scene: Scene,
    k: Array,
    world_to_camera: Array,
    *,
    width: int = 800,
    height: int = 600,
    supersample: int = 2,
    noise: float = 1.0,
    seed: int | Sequence[int] = 0,
) -> tuple[Array, Array]:
    """Render one photograph and its depth.

    Args:
        scene: what ``build_scene`` returned.
        k: calibration matrix (3, 3), corner origin, pixels.
        world_to_camera: pose (3, 4) or (4, 4).
        width: columns.
        height: rows.
        supersample: rays per pixel along each axis.
        noise: standard deviation of the sensor noise in grey levels at mid-grey.
        seed: seed of the sensor noise.

    Returns:
        Photograph, uint8 (height, width, 3) in sRGB, and depth in metres through the centres of the
        pixels, float32 (height, width).
    """
    pose = np.asarray(world_to_camera, dtype=float)[:3]
    total = np.zeros((height * width, 3), np.float32)
    focal = float(k[0, 0]) * supersample
    for i in range(supersample):
        for j in range(supersample):
            x = np.arange(width) + (i + 0.5) / supersample
            y = np.arange(height) + (j + 0.5) / supersample
            total += np.minimum(_shade(scene, _rays(k, pose, x, y).reshape(-1, 6), focal), 1.5)
    linear = np.clip(total / supersample**2, 0, None)
    mapped = linear * (1 + linear / 2.6) / (1 + linear)  # soft shoulder in the highlights
    rng = np.random.default_rng(seed)
    image = 255.0 * mapped.reshape(height, width, 3) ** (1 / GAMMA)
    image += (
        noise * np.sqrt(0.3 + image / 180.0) * rng.standard_normal(image.shape, dtype=np.float32)
    )
    return finish(image), render_depth(scene, k, pose, width=width, height=height)


def quaternion(rotation: Array) -> Array:
    """Unit quaternion (w, x, y, z) with w >= 0 of a rotation matrix (3, 3)."""
    # Bar-Itzhack: the dominant eigenvector of this symmetric matrix, stable for any angle.
    r = rotation
    m = np.array(
        [
            [r[0, 0] - r[1, 1] - r[2, 2], 0, 0, 0],
            [r[1, 0] + r[0, 1], r[1, 1] - r[0, 0] - r[2, 2], 0, 0],
            [r[2, 0] + r[0, 2], r[2, 1] + r[1, 2], r[2, 2] - r[0, 0] - r[1, 1], 0],
            [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], np.trace(r)],
        ]
    )
    _, vectors = np.linalg.eigh(m / 3.0)  # reads the lower triangle
    q = vectors[[3, 0, 1, 2], -1]
    return q if q[0] >= 0 else -q


def write_truth(
    folder: Path, names: Sequence[str], poses: Sequence[Array], k: Array, size: tuple[int, int]
) -> None:
    """Write a COLMAP text model with one PINHOLE camera, the poses, and no points.

    Args:
        folder: where ``cameras.txt``, ``images.txt`` and ``points3D.txt`` go.
        names: file names of the images.
        poses: world-to-camera matrices (3, 4).
        k: calibration matrix.
        size: width and height.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = " ".join(repr(float(x)) for x in (k[0, 0], k[1, 1], k[0, 2], k[1, 2]))
    head = "# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n"
    (folder / "cameras.txt").write_text(f"{head}1 PINHOLE {size[0]} {size[1]} {numbers}\n")
    lines = [
        "# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME",
        "# POINTS2D[] as (X, Y, POINT3D_ID)",
    ]
    for index, (name, pose) in enumerate(zip(names, poses, strict=True), start=1):
        values = " ".join(repr(float(x)) for x in (*quaternion(pose[:, :3]), *pose[:, 3]))
        lines += [f"{index} {values} 1 {name}", ""]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    (folder / "points3D.txt").write_text("# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[]\n")


def save_photo(path: Path, image: Array, quality: int = JPEG_QUALITY) -> None:
    """Save a JPEG with the EXIF entries a real camera would give: maker, model and focal length."""
    exif = Image.Exif()
    exif[271], exif[272] = "gim-hloc", "rendered room"  # Make, Model
    details = exif.get_ifd(0x8769)
    details[37386] = float(
        FOCAL_35MM
    )  # FocalLength in mm, of a sensor with the diagonal of 36 x 24 mm
    details[41989] = FOCAL_35MM  # FocalLengthIn35mmFilm
    Image.fromarray(image).save(
        path, quality=quality, subsampling="4:2:0", optimize=True, exif=exif
    )


def save_depth(path: Path, depth: Array) -> None:
    """Save depth in metres as 16-bit PNG in steps of ``DEPTH_UNIT``; 0 means no surface."""
    steps = np.round(np.where(np.isfinite(depth), depth, 0.0) / DEPTH_UNIT)
    Image.fromarray(np.clip(steps, 0, 65535).astype(np.uint16)).save(path, optimize=True)


def render_room(
    out: Path,
    *,
    views: int = 20,
    width: int = 800,
    height: int = 600,
    seed: int = 0,
    supersample: int = 2,
) -> None:
    """Render the whole example into ``out``: ``images/``, ``depth/`` and ``gt/``.

    Args:
        out: folder to write.
        views: number of photographs.
        width: columns of a photograph.
        height: rows of a photograph.
        seed: seed of textures and noise.
        supersample: rays per pixel along each axis.
    """
    scene = build_scene(seed)
    k = intrinsics(width, height)
    poses = camera_path(views)
    names = [f"room_{index:03d}.jpg" for index in range(1, views + 1)]
    for folder in ("images", "depth"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    write_truth(out / "gt", names, poses, k, (width, height))
    for index, (name, pose) in enumerate(zip(names, poses, strict=True)):
        rgb, depth = render_view(
            scene, k, pose, width=width, height=height, supersample=supersample, seed=(seed, index)
        )
        save_photo(out / "images" / name, rgb)
        save_depth(out / "depth" / Path(name).with_suffix(".png"), depth)
        log.info("%s (%d of %d)", name, index + 1, views)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(
        description="Render the example room with exact poses, intrinsics and depth."
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--views", type=int, default=20, help="number of photographs (default 20)")
    parser.add_argument(
        "--width", type=int, default=800, help="columns of a photograph (default 800)"
    )
    parser.add_argument(
        "--height", type=int, default=600, help="rows of a photograph (default 600)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of textures and noise (default 0)"
    )
    parser.add_argument(
        "--supersample", type=int, default=2, help="rays per pixel and axis (default 2)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    render_room(**vars(options))


if __name__ == "__main__":
    main()
