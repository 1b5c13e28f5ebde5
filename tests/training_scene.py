"""Image pairs of a synthetic scene whose depth, poses and correspondences are exact.

A tilted textured wall with a disc in front of it. Colour is a function of the place in space (a sum
of waves of 5 to 60 px, none shorter than what pixels can show), so that both views of a point agree
up to rounding. Network and original pixels are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gim_hloc.training.batch import PairSample

_DISTANCE = 2.0  # from the cameras to the wall


@dataclass
class Scene:
    """The wall z = 2 + slope . (x, y), a disc in front of it, and waves that colour space.

    Attributes:
        slope: (2,).
        disc: centre (3,) of the disc, which faces the first camera.
        radius: of the disc.
        waves: (3, N, 3) wave vectors per colour, radian per unit.
        phases: (3, N).
        amplitudes: (N,).
    """

    slope: torch.Tensor
    disc: torch.Tensor
    radius: float
    waves: torch.Tensor
    phases: torch.Tensor
    amplitudes: torch.Tensor

    def cast(self, origin: torch.Tensor, rays: torch.Tensor) -> torch.Tensor:
        """Length factors (N,) at which rays (N, 3) from a point (3,) hit something."""
        normal = torch.cat([-self.slope, torch.ones(1).double()])
        wall = (_DISTANCE - origin @ normal) / (rays @ normal)
        near = (self.disc[2] - origin[2]) / rays[:, 2]
        offset = (origin + near[:, None] * rays - self.disc)[:, :2].norm(dim=1)
        return torch.where(offset < self.radius, near, wall)

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """(N, 3) in [0.05, 0.95] of points (N, 3)."""
        angle = torch.einsum("nd,cwd->ncw", points, self.waves) + self.phases
        return 0.5 + 0.45 * torch.tanh(1.5 * (angle.sin() * self.amplitudes).sum(-1))


def _scene(generator: torch.Generator, focal: float) -> Scene:
    def uniform(*size: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(*size, generator=generator, dtype=torch.float64)

    pixels = 5 * 12 ** uniform(48)  # wavelengths on the image, log-uniform
    direction = torch.randn(3, 48, 3, generator=generator, dtype=torch.float64)
    direction /= direction.norm(dim=-1, keepdim=True)
    amplitudes = (pixels / 20).clamp(max=1) ** 0.5
    return Scene(
        slope=uniform(2, low=-0.3, high=0.3),
        disc=torch.cat([uniform(2, low=-0.35, high=0.35), uniform(1, low=1.3, high=1.45)]),
        radius=0.22,
        waves=direction * (2 * torch.pi * focal / _DISTANCE / pixels)[None, :, None],
        phases=uniform(3, 48, high=2 * torch.pi),
        amplitudes=amplitudes / amplitudes.square().sum().sqrt() * 2**0.5,
    )


def _rotation(vector: torch.Tensor) -> torch.Tensor:
    x, y, z = vector.tolist()
    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(skew)


def _pixels(width: int, height: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2).double()


@dataclass
class _View:
    """A camera, x_camera = R x + t."""

    K: torch.Tensor
    R: torch.Tensor
    t: torch.Tensor

    def depth(self, scene: Scene, xy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Depths (N,) and places (N, 3) of what lies at pixels (N, 2)."""
        homogeneous = torch.cat([xy, torch.ones(len(xy), 1).double()], 1)
        rays = homogeneous @ torch.linalg.inv(self.K).T @ self.R  # of length 1 along the axis
        origin = -self.R.T @ self.t
        depth = scene.cast(origin, rays)
        return depth, origin + depth[:, None] * rays

    def project(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (N, 2) and depths (N,) of places (N, 3)."""
        camera = points @ self.R.T + self.t
        image = camera @ self.K.T
        return image[:, :2] / image[:, 2:], camera[:, 2]


def make_pairs(
    count: int, box: tuple[int, int], *, labels: bool = False, seed: int = 0
) -> list[PairSample]:
    """Pairs with a motion of 10 to 40 px at a width of 128, four fifths of them in common view.

    Args:
        count: number of pairs, each of a scene of its own.
        box: (width, height) of the images in pixels.
        labels: give up to 400 labels per pair instead of depth, as videos do. The pictures are the
            same as without, so that matches can be judged by the depth of those.
        seed: of everything.
    """
    width, height = box
    focal = float(width)
    K = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    samples = []
    for number in range(count):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        scene = _scene(generator, focal)
        turn = torch.rand(3, generator=generator, dtype=torch.float64) * 2 - 1
        angle = 2 * torch.pi * torch.rand(1, generator=generator, dtype=torch.float64)
        step = 0.2 + 0.15 * torch.rand(1, generator=generator, dtype=torch.float64)
        views = [
            _View(K.double(), torch.eye(3).double(), torch.zeros(3).double()),
            _View(
                K.double(),
                _rotation(turn * torch.tensor([0.05, 0.05, 0.2])),
                torch.cat([step * angle.cos(), step * angle.sin(), 0.4 * turn[:1]]),
            ),
        ]
        pixels = _pixels(width, height)
        depths, images, places = [], [], []
        for view in views:
            depth, points = view.depth(scene, pixels)
            depths.append(depth.float().view(height, width))
            images.append(scene.colour(points).float().T.reshape(3, height, width))
            places.append(points)
        sample = PairSample(
            image0=images[0],
            image1=images[1],
            valid0=torch.ones(height, width, dtype=torch.bool),
            valid1=torch.ones(height, width, dtype=torch.bool),
            to_original0=torch.eye(3).double(),
            to_original1=torch.eye(3).double(),
            size0=(width, height),
            size1=(width, height),
            dataset="synthetic",
            names=(f"{seed}/{number}/0.png", f"{seed}/{number}/1.png"),
        )
        if labels:
            there, expected = views[1].project(places[0])
            limit = torch.tensor([width - 1.0, height - 1.0])
            inside = ((there >= 0) & (there <= limit)).all(1)
            visible = inside & ((views[1].depth(scene, there)[0] / expected - 1).abs() < 1e-6)
            rows = torch.cat([pixels, there], 1)[visible].float()
            sample.labels = rows[torch.randperm(len(rows), generator=generator)[:400]]
        else:
            sample.depth0, sample.depth1 = depths
            sample.K0 = sample.K1 = K.double()
            sample.T_0to1 = torch.eye(4).double()
            sample.T_0to1[:3, :3], sample.T_0to1[:3, 3] = views[1].R, views[1].t
        samples.append(sample)
    return samples


def overfit_set(box: tuple[int, int] = (128, 96)) -> list[PairSample]:
    """The eight pairs that every model must be able to learn by heart."""
    return make_pairs(8, box)


def true_positions(sample: PairSample, xy: torch.Tensor) -> torch.Tensor:
    """Where points (N, 2) of image 0 lie in image 1, (N, 2) px float64, occluded or not.

    Interpolates inverse depth, which is exact on planes: everywhere but across the disc's edge.
    """
    assert sample.depth0 is not None
    height, width = sample.depth0.shape
    xy = xy.double()
    low = xy.floor().clamp(min=0)
    low = torch.minimum(low, torch.tensor([width - 2.0, height - 2.0], dtype=torch.float64))
    fx, fy = (xy - low).unbind(1)
    x, y = low.long().unbind(1)
    inverse = 1 / sample.depth0.double()
    upper = (1 - fx) * inverse[y, x] + fx * inverse[y, x + 1]
    lower = (1 - fx) * inverse[y + 1, x] + fx * inverse[y + 1, x + 1]
    depth = 1 / ((1 - fy) * upper + fy * lower)
    homogeneous = torch.cat([xy, torch.ones(len(xy), 1).double()], 1)
    points = depth[:, None] * (homogeneous @ torch.linalg.inv(sample.K0).T)
    image = (points @ sample.T_0to1[:3, :3].T + sample.T_0to1[:3, 3]) @ sample.K1.T
    return image[:, :2] / image[:, 2:]


def share_within(
    sample: PairSample, xy0: torch.Tensor, xy1: torch.Tensor, px: float = 3.0
) -> float:
    """Share of matches (M, 2), (M, 2) whose place in image 1 is right to ``px`` pixels."""
    if not len(xy0):
        return 0.0
    error = (true_positions(sample, xy0) - xy1.double()).norm(dim=1)
    return float((error < px).double().mean())
