"""A synthetic scene with exact poses, observations and matches. No images are involved."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from gim_hloc.images import Exif, ImageRecord
from gim_hloc.poses import Pose

WIDTH, HEIGHT, FOCAL = 800, 600, 700.0
INTRINSICS = f"PINHOLE,{FOCAL},{FOCAL},{WIDTH / 2},{HEIGHT / 2}"


@dataclass
class Scene:
    """Cameras around a cloud of points.

    Attributes:
        names: image names, sorted.
        poses: name -> (R, t), world to camera.
        keypoints: name -> (N, 2) float32 in hloc's frame (integer = pixel centre).
        points: name -> (N,) index of the 3D point of each keypoint.
    """

    names: list[str] = field(default_factory=list)
    poses: dict[str, Pose] = field(default_factory=dict)
    keypoints: dict[str, np.ndarray] = field(default_factory=dict)
    points: dict[str, np.ndarray] = field(default_factory=dict)

    def see(
        self,
        name: str,
        pose: Pose,
        xyz: np.ndarray,
        *,
        focal: float = FOCAL,
        size: tuple[int, int] = (WIDTH, HEIGHT),
        noise_px: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> None:
        """Add an image of points (N, 3), with noise and in any order if there is a generator."""
        camera = xyz @ pose[0].T + pose[1]
        with np.errstate(divide="ignore", invalid="ignore"):
            xy_colmap = camera[:, :2] / camera[:, 2:] * focal + np.array(size) / 2
        if rng is not None and noise_px:
            xy_colmap += rng.normal(0, noise_px, xy_colmap.shape)
        inside = (camera[:, 2] > 0.1) & (xy_colmap > 0).all(1) & (xy_colmap < size).all(1)
        rows = np.flatnonzero(inside)
        rows = rows if rng is None else rng.permutation(rows)
        self.names.append(name)
        self.poses[name] = pose
        self.keypoints[name] = (xy_colmap[rows] - 0.5).astype(np.float32)
        self.points[name] = rows

    def beside(self, other: Scene, first_point: int = 10_000) -> Scene:
        """Both scenes as one; the points of the other are counted from ``first_point``."""
        points = {name: rows + first_point for name, rows in other.points.items()}
        return Scene(
            names=self.names + other.names,
            poses=self.poses | other.poses,
            keypoints=self.keypoints | other.keypoints,
            points=self.points | points,
        )

    def matches(self, a: str, b: str) -> np.ndarray:
        """True matches (M, 2) of two images."""
        _, rows_a, rows_b = np.intersect1d(
            self.points[a], self.points[b], assume_unique=True, return_indices=True
        )
        return np.stack([rows_a, rows_b], axis=1).astype(np.uint32)

    def all_matches(self) -> list[tuple[str, str, np.ndarray]]:
        """True matches of all pairs."""
        return [
            (a, b, self.matches(a, b))
            for i, a in enumerate(self.names)
            for b in self.names[i + 1 :]
        ]

    def pairs(self) -> list[tuple[str, str]]:
        """All pairs."""
        return [(a, b) for a, b, _ in self.all_matches()]

    def records(self, **exif: object) -> list[ImageRecord]:
        """Records as the image scan would give them."""
        return [record(name, **exif) for name in self.names]


def record(
    name: str, width: int = WIDTH, height: int = HEIGHT, *, video: str | None = None, **exif: object
) -> ImageRecord:
    """An image record without a file."""
    return ImageRecord(
        name=name,
        path=Path(name),
        width=width,
        height=height,
        sha256=name,
        video=video,
        exif=Exif(**exif),  # type: ignore[arg-type]
    )


def make_scene(
    *,
    images: int = 8,
    points: int = 400,
    noise_px: float = 0.0,
    arc_deg: float = 90.0,
    seed: int = 0,
    names: list[str] | None = None,
) -> Scene:
    """Cameras on an arc of radius 6 looking at a cloud of points around the origin."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(-1.5, 1.5, (points, 3))
    names = names or [f"image {i:02d} é.jpg" for i in range(images)]
    scene = Scene()
    for i, name in enumerate(names):
        angle = np.deg2rad(arc_deg) * i / max(1, len(names) - 1)
        centre = np.array([6 * np.sin(angle), 0.4 * np.cos(3 * angle), -6 * np.cos(angle)])
        forward = -centre / np.linalg.norm(centre)
        right = np.cross([0.0, 1.0, 0.0], forward)
        right /= np.linalg.norm(right)
        rotation = np.stack([right, np.cross(forward, right), forward])
        scene.see(name, (rotation, -rotation @ centre), xyz, noise_px=noise_px, rng=rng)
    return scene


def make_rig_scene(moments: int = 6, *, seed: int = 0) -> tuple[Scene, list[dict[str, object]]]:
    """Two cameras side by side, 0.5 apart and 8 degrees off, and COLMAP's configuration of them."""
    left = make_scene(
        images=moments, points=500, seed=seed, names=[f"left/{n}.jpg" for n in range(moments)]
    )
    turn = Rotation.from_euler("y", 8, degrees=True).as_matrix()
    shift = np.array([-0.5, 0.02, 0.01])
    xyz = np.random.default_rng(seed).uniform(-1.5, 1.5, (500, 3))  # those of ``make_scene``
    for n in range(moments):
        rotation, translation = left.poses[f"left/{n}.jpg"]
        left.see(f"right/{n}.jpg", (turn @ rotation, turn @ translation + shift), xyz)
    x, y, z, w = Rotation.from_matrix(turn).as_quat()
    cameras: list[dict[str, object]] = [
        {"image_prefix": "left/", "ref_sensor": True},
        {
            "image_prefix": "right/",
            "cam_from_rig_rotation": [w, x, y, z],
            "cam_from_rig_translation": shift.tolist(),
        },
    ]
    return left, [{"cameras": cameras}]


def camera_errors(model: Mapping[str, Pose], truth: Mapping[str, Pose]) -> tuple[float, float]:
    """Largest relative rotation error in degrees, and centre error after Sim3 (share of extent)."""
    names = sorted(set(model) & set(truth))
    worst = 0.0
    for a, b in itertools.pairwise(names):
        found = model[b][0] @ model[a][0].T
        true = truth[b][0] @ truth[a][0].T
        cosine = (np.trace(found.T @ true) - 1) / 2
        worst = max(worst, float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))))
    x = np.array([-model[n][0].T @ model[n][1] for n in names])
    y = np.array([-truth[n][0].T @ truth[n][1] for n in names])
    x0, y0 = x - x.mean(0), y - y.mean(0)
    u, s, vt = np.linalg.svd(y0.T @ x0)
    d = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    scale = (s * np.diag(d)).sum() / (x0**2).sum()
    residual = y0 - scale * x0 @ (u @ d @ vt).T
    return worst, float(np.linalg.norm(residual, axis=1).max() / np.ptp(y, axis=0).max())


def write_cameras(
    poses: Mapping[str, Pose],
    folder: Path,
    intrinsics: str = INTRINSICS,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Path:
    """A COLMAP text model of one camera without points, written without COLMAP."""
    folder.mkdir(parents=True, exist_ok=True)
    model, *params = intrinsics.split(",")
    camera = f"1 {model} {size[0]} {size[1]} {' '.join(params)}\n"
    lines = []
    for index, (name, (rotation, translation)) in enumerate(sorted(poses.items()), 1):
        x, y, z, w = Rotation.from_matrix(rotation).as_quat()
        pose = " ".join(repr(float(value)) for value in (w, x, y, z, *translation))
        lines += [f"{index} {pose} 1 {name}", ""]
    (folder / "cameras.txt").write_text(camera)
    (folder / "images.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "points3D.txt").write_text("")
    return folder
