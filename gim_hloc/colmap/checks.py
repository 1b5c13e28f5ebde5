"""Is a finished model one? What hardly hangs together is split, what has no depth is no model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycolmap
import scipy  # its packages are loaded when they are used

from gim_hloc.colmap.cameras import project

# Points an image needs to count as placed: two places glued left images with 4 and 8, while 15
# inliers are what the relaxed mapping registers on.
MIN_POINTS = 10
# The best connected images on the two sides of a wrong joint shared 1 to 24 points, neighbours in
# right models 39 and more. Sparse but right models have little everywhere, hence the second bound:
# a joint is wrong where the images on either side share so many times more.
WEAK_JOINT, INNER_RATIO = 30, 3.0


@dataclass(kw_only=True)
class Checked:
    """Models that are left, largest first, what was done, and why images left: name -> reason."""

    models: list[Any]
    notes: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def check_models(models: Sequence[Any], *, min_model_size: int = 3, turns: bool = True) -> Checked:
    """Split models at weak joints; leave out images with hardly a point and models without depth.

    Args:
        models: ``pycolmap.Reconstruction`` objects; changed.
        min_model_size: parts that are split off with fewer images are left out.
        turns: whether a model of a camera that only turned is left out.
    """
    checked = Checked(models=[])
    for model in models:
        _drop_unsupported(model, checked)
        parts = split_at_weak_joints(model, checked.notes)
        for index, part in enumerate(parts):
            _drop_unsupported(part, checked)
            names = {part.image(i).name for i in part.reg_image_ids()}
            if len(names) < (min_model_size if index else 2):
                reason = "nothing but a few points joined it to a model, and it makes none itself"
                checked.reasons |= dict.fromkeys(names - checked.reasons.keys(), reason)
            elif turns and only_turns(part):
                reason = "the camera only turned: its images explain no depth"
                checked.reasons |= dict.fromkeys(names, reason)
                checked.notes.append(
                    f"A model of {len(names)} images is left out: one rotation for each image "
                    "explains its matches as well as the model does, so the camera only turned and "
                    "all depth was made up. Move the camera between photographs, or give known "
                    "poses (--model)."
                )
            else:
                checked.models.append(part)
    checked.models.sort(key=lambda m: (-m.num_reg_images(), -m.num_points3D()))
    placed = {m.image(i).name for m in checked.models for i in m.reg_image_ids()}
    checked.reasons = {n: why for n, why in checked.reasons.items() if n not in placed}
    return checked


def _drop_unsupported(model: Any, checked: Checked) -> None:
    """Take images with too few points out, until none is left; images of a rig together."""
    while frames := [
        f for f, points in points_of_frames(model).items() if len(points) < MIN_POINTS
    ]:
        lost = [i for i in model.reg_image_ids() if model.image(i).frame_id in frames]
        for image_id in lost:
            image = model.image(image_id)
            seen = image.num_points3D
            checked.reasons[image.name] = (
                f"placed, but only {seen} points of the model support it ({MIN_POINTS} are needed)"
            )
        deregister(model, frames)


def points_of_frames(model: Any) -> dict[int, set[int]]:
    """Points that the images of each registered frame (a single image, or a rig's) see."""
    seen: dict[int, set[int]] = {}
    for image_id, points in _points_seen(model).items():
        seen.setdefault(int(model.image(image_id).frame_id), set()).update(points)
    return dict(sorted(seen.items()))


def _points_seen(model: Any) -> dict[int, set[int]]:
    """Points that each registered image sees."""
    return {
        i: {p.point3D_id for p in model.image(i).get_observation_points2D()}
        for i in sorted(model.reg_image_ids())
    }


def deregister(model: Any, frame_ids: Sequence[int]) -> None:
    """Take frames out of a model, with their images and what these observe."""
    manager = pycolmap.ObservationManager(model)
    for frame_id in frame_ids:
        manager.deregister_frame(frame_id)
    model.tear_down()  # COLMAP's covariances stumble over images without a pose


def num_supported(model: Any) -> int:
    """Registered images that see enough points."""
    return sum(len(points) >= MIN_POINTS for points in _points_seen(model).values())


def shared_points(model: Any) -> tuple[list[int], np.ndarray]:
    """Ids of the registered images, and (N, N) the number of points that two of them share."""
    return _shared(_points_seen(model))


def _shared(seen: Mapping[int, set[int]]) -> tuple[list[int], np.ndarray]:
    ids = list(seen)
    points = sorted(set().union(*seen.values()))
    column = {point: k for k, point in enumerate(points)}
    rows = np.repeat(np.arange(len(ids)), [len(seen[i]) for i in ids])
    columns = [column[p] for i in ids for p in seen[i]]
    sees = scipy.sparse.csr_matrix(
        (np.ones(len(rows)), (rows, columns)), shape=(len(ids), len(points))
    )
    shared = (sees @ sees.T).toarray()
    np.fill_diagonal(shared, 0)
    return ids, shared


def split_at_weak_joints(model: Any, notes: list[str]) -> list[Any]:
    """Parts of a model that few points join, against what the images of each part share.

    The joint is the weakest edge of the maximum spanning tree of shared points. An image alone on
    its side is no place of its own, and stays.
    """
    if model.num_reg_frames() < 4:
        return [model]
    ids, shared = _shared(points_of_frames(model))
    with np.errstate(divide="ignore"):
        tree = -scipy.sparse.csgraph.minimum_spanning_tree(
            scipy.sparse.coo_matrix(np.where(shared > 0, -shared, 0))
        ).tocoo()
    edges = sorted(zip(tree.data.tolist(), tree.row.tolist(), tree.col.tolist(), strict=True))
    for joint, side in _cuts(edges, len(ids)):
        if joint >= WEAK_JOINT:
            break
        inner = [[value for value, a, b in edges if s[a] and s[b]] for s in (side, ~side)]
        if not all(inner) or min(map(np.median, inner)) < INNER_RATIO * joint:
            continue
        parts = []
        for out in (side, ~side):
            part = copy.deepcopy(model)
            deregister(part, [i for i, leaves in zip(ids, out, strict=True) if leaves])
            parts.append(part)
        sizes = sorted((part.num_reg_images() for part in parts), reverse=True)
        notes.append(
            f"A model was split into {sizes[0]} and {sizes[1]} images that only {joint:.0f} points "
            "joined: they are hardly one place. Photographs that link them would join them."
        )
        return [p for part in parts for p in split_at_weak_joints(part, notes)]
    return [model]


def _cuts(
    edges: Sequence[tuple[float, int, int]], count: int
) -> Iterator[tuple[float, np.ndarray]]:
    """Points of each joint of a forest, weakest first, and (count,) bool: one side of it."""

    def parts(kept: Sequence[tuple[float, int, int]]) -> np.ndarray:
        rows, columns = np.array([e[1:] for e in kept], dtype=np.int64).reshape(-1, 2).T
        graph = scipy.sparse.coo_matrix((np.ones(len(kept)), (rows, columns)), shape=(count, count))
        return np.asarray(scipy.sparse.csgraph.connected_components(graph, directed=False)[1])

    label = parts(edges)
    if label.max():
        yield from ((0.0, label == k) for k in range(label.max() + 1))
    for joint, a, b in edges:
        label = parts([e for e in edges if e[1:] != (a, b)])
        yield joint, label == label[a]


# ------------------------------------------------------------------------- a camera that only turns

# Focal lengths that are tried, in units of the longer side. Beyond the last one a turn cannot be
# told from a flight over flat ground: both just shift the picture.
_FOCALS = (0.4, 0.6, 0.8, 1.0, 1.3, 1.7, 2.3, 3.0, 4.0)
_WINDOW = 24  # images that are judged at a time
_TURN_RATIO, _TURN_FLOOR_PX = 1.5, 0.1  # residual of rotations against the model's; px it may have


@dataclass
class _Observations:
    """Observations of some images: what rotations have to explain."""

    image: np.ndarray  # (M,) index of the image
    track: np.ndarray  # (M,) index of the point
    xy: np.ndarray  # (M, 2) pixels from the principal point
    camera: np.ndarray  # (M,) index of the camera
    model_px: np.ndarray  # (M,) residuals of the model


def only_turns(model: Any) -> bool:
    """Whether one rotation for each image explains the observations as well as the model does.

    Judged in overlapping windows of neighbours; a panorama within a set of images is no matter.
    """
    ids, shared = shared_points(model)
    first = int(np.argmax(shared.sum(1)))
    order = scipy.sparse.csgraph.breadth_first_order(
        scipy.sparse.csr_matrix(shared), first, directed=False
    )[0]
    starts = range(0, max(1, len(order) - _WINDOW // 2), _WINDOW // 2)
    return all(
        _window_turns(model, [ids[k] for k in order[start : start + _WINDOW]]) for start in starts
    )


def _window_turns(model: Any, ids: Sequence[int]) -> bool:
    seen = _observations(model, ids)
    cameras = sorted({model.image(i).camera_id for i in ids})
    count, points = len(ids), int(seen.track.max(initial=-1)) + 1
    if len(seen.image) < 2 * MIN_POINTS:
        return False
    ours = _sigma(seen.model_px, 3 * points + 6 * count + len(cameras))
    bound = max(_TURN_RATIO * ours, _TURN_FLOOR_PX)
    unknowns = 2 * points + 3 * count + 2 * len(cameras)
    side = [max(model.camera(c).width, model.camera(c).height) for c in cameras]
    known = [_known_focal(model.camera(c)) for c in cameras]
    starts = []
    for relative in _FOCALS:
        focal = np.array(
            [k if k else relative * s for k, s in zip(known, side, strict=True)], dtype=float
        )
        turns = _chain(seen, count, focal)
        if turns is not None:
            residual = _residual(seen, turns, focal, np.zeros(len(cameras)))
            starts.append((float(np.median(residual)), turns, focal))
    if not starts:
        return False
    rough, turns, focal = min(starts, key=lambda s: s[0])
    if rough > 20 * bound + 0.01 * max(side):  # nowhere near
        return False
    low = np.array([0.9 * k if k else 0.3 * s for k, s in zip(known, side, strict=True)])
    high = np.array([1.1 * k if k else _FOCALS[-1] * s for k, s in zip(known, side, strict=True)])
    residual = _polish(seen, turns, focal, low, high)
    return _sigma(residual, unknowns) <= bound


def _known_focal(camera: Any) -> float | None:
    return float(camera.mean_focal_length()) if camera.has_prior_focal_length else None


def _sigma(residual_px: np.ndarray, unknowns: int) -> float:
    """Robust standard deviation of a coordinate, px, freed from what the unknowns took."""
    freedom = max(2 * len(residual_px) - unknowns, 1)
    return float(np.median(residual_px) / 1.1774 * np.sqrt(2 * len(residual_px) / freedom))


def _observations(model: Any, ids: Sequence[int], most: int = 300) -> _Observations:
    """Observations of the points that most of these images see, ``most`` points at most."""
    views: dict[int, list[tuple[int, Any]]] = {}
    for index, image_id in enumerate(ids):
        for point in model.image(image_id).points2D:
            if point.has_point3D():
                views.setdefault(point.point3D_id, []).append((index, point.xy))
    rng = np.random.default_rng(0)
    tracks = [key for key, of_point in sorted(views.items()) if len(of_point) > 1]
    if len(tracks) > most:
        tracks = [tracks[k] for k in rng.permutation(len(tracks))[:most]]
    track = np.array([k for k, t in enumerate(tracks) for _ in views[t]], dtype=np.int64)
    image = np.array([i for t in tracks for i, _ in views[t]], dtype=np.int64)
    xy = np.array([xy for t in tracks for _, xy in views[t]]).reshape(-1, 2)
    xyz = np.array([model.points3D[t].xyz for t in tracks]).reshape(-1, 3)
    numbers = {c: k for k, c in enumerate(sorted({model.image(i).camera_id for i in ids}))}
    camera = np.zeros(len(image), dtype=np.int64)
    residual = np.zeros(len(image))
    centred = np.zeros_like(xy)
    for index, image_id in enumerate(ids):
        mine = np.flatnonzero(image == index)
        one = model.image(image_id)
        lens = model.camera(one.camera_id)
        pose = np.asarray(one.cam_from_world().matrix())
        if len(mine):
            there = project(lens, xyz[track[mine]] @ pose[:, :3].T + pose[:, 3])
            residual[mine] = np.nan_to_num(np.linalg.norm(there - xy[mine], axis=1), nan=1e3)
        camera[mine] = numbers[one.camera_id]
        centred[mine] = xy[mine] - [lens.principal_point_x, lens.principal_point_y]
    return _Observations(image=image, track=track, xy=centred, camera=camera, model_px=residual)


def _rays(seen: _Observations, focal: np.ndarray, bend: np.ndarray) -> np.ndarray:
    """Unit rays (M, 3) for a focal length and a radial (division) term of each camera."""
    plane = seen.xy / focal[seen.camera, None]
    plane = plane / (1 + bend[seen.camera, None] * (plane**2).sum(1, keepdims=True))
    rays = np.column_stack([plane, np.ones(len(plane))])
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)


def _residual(
    seen: _Observations, turns: np.ndarray, focal: np.ndarray, bend: np.ndarray
) -> np.ndarray:
    """Distances (M,) px between the observations and the mean direction of their track."""
    return np.linalg.norm(_offsets(seen, turns, focal, bend), axis=1)


def _offsets(
    seen: _Observations, turns: np.ndarray, focal: np.ndarray, bend: np.ndarray
) -> np.ndarray:
    """The same as vectors (M, 3) across the ray, in pixels at the image centre's scale."""
    world = np.einsum("mji,mj->mi", turns[seen.image], _rays(seen, focal, bend))
    mean = np.stack([np.bincount(seen.track, world[:, k]) for k in range(3)], 1)
    mean = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    # A pixel off the centre spans a smaller angle: cos^2 of its own along the radius.
    cosine = 1 / np.sqrt(1 + (seen.xy**2).sum(1) / focal[seen.camera] ** 2)
    return (world - mean[seen.track]) * (focal[seen.camera] / cosine**1.5)[:, None]


def _chain(seen: _Observations, count: int, focal: np.ndarray) -> np.ndarray | None:
    """Rotations (count, 3, 3), world to camera, chained from image to image by common points."""
    rays = _rays(seen, focal, np.zeros(len(focal)))
    mine = [dict(zip(*v, strict=True)) for v in _by_image(seen, count)]
    turns = np.zeros((count, 3, 3))
    turns[0] = np.eye(3)
    done, world = {0}, {track: rays[row] for track, row in mine[0].items()}
    while len(done) < count:
        best = max(set(range(count)) - done, key=lambda k: len(mine[k].keys() & world.keys()))
        common = sorted(mine[best].keys() & world.keys())
        if len(common) < 3:
            return None
        here, there = rays[[mine[best][t] for t in common]], np.array([world[t] for t in common])
        for _ in range(3):  # the median of the residuals tells who is an outlier
            u, _, vt = np.linalg.svd(here.T @ there)
            turns[best] = u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt
            error = np.linalg.norm(here - there @ turns[best].T, axis=1)
            good = error <= 2.5 * np.median(error) + 1e-9
            here, there = here[good], there[good]
        for track, row in mine[best].items():
            world.setdefault(track, rays[row] @ turns[best])
        done.add(best)
    return turns


def _by_image(seen: _Observations, count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Tracks and rows of the observations of each image."""
    for index in range(count):
        rows = np.flatnonzero(seen.image == index)
        yield seen.track[rows].tolist(), rows.tolist()


def _polish(
    seen: _Observations, turns: np.ndarray, focal: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Residuals (M,) px of the best rotations and lenses near the given ones.

    Gauss-Newton with reweighting; the directions of the tracks are eliminated as means.
    """
    count, cameras = len(turns), len(focal)
    rows = np.arange(len(seen.track))
    per_track = np.bincount(seen.track)[:, None, None]
    lens = np.concatenate([np.log(np.clip(focal, low, high)), np.zeros(cameras)])
    bounds = np.concatenate(
        [np.log(low), np.full(cameras, -0.5), np.log(high), np.full(cameras, 0.5)]
    )

    def offsets(turns: np.ndarray, lens: np.ndarray) -> np.ndarray:
        return _offsets(seen, turns, np.exp(lens[:cameras]), lens[cameras:])

    for _ in range(15):
        here = offsets(turns, lens)
        rays = _rays(seen, np.exp(lens[:cameras]), lens[cameras:])
        # A small turn a of an image moves its rays in the world by T^t (ray x a).
        moved = np.einsum("mji,mjk->mik", turns[seen.image], _cross(rays))
        jacobian = np.zeros((len(rows), 3, 3 * count + 2 * cameras))
        for axis in range(3):
            jacobian[rows, :, 3 * seen.image + axis] = moved[:, :, axis]
        mean = np.zeros((len(per_track), *jacobian.shape[1:]))
        np.add.at(mean, seen.track, jacobian)
        jacobian -= (mean / per_track)[seen.track]
        jacobian *= np.exp(lens)[seen.camera][:, None, None]
        for k in range(2 * cameras):
            step = np.zeros(2 * cameras)
            step[k] = 1e-4
            jacobian[:, :, 3 * count + k] = (offsets(turns, lens + step) - here) / 1e-4
        residual = np.linalg.norm(here, axis=1)
        weight = 1 / np.maximum(1.0, residual / max(2 * np.median(residual), 1e-9))
        flat = jacobian.reshape(-1, jacobian.shape[2])
        weighted = flat * np.repeat(weight, 3)[:, None]
        normal = weighted.T @ flat
        normal[np.diag_indices_from(normal)] *= 1 + 1e-4
        normal[np.diag_indices_from(normal)] += 1e-6  # the turn of all images together
        change = np.linalg.solve(normal, -weighted.T @ here.ravel())
        turns = (
            scipy.spatial.transform.Rotation.from_rotvec(
                change[: 3 * count].reshape(-1, 3)
            ).as_matrix()
            @ turns
        )
        lens = np.clip(lens + change[3 * count :], *np.split(bounds, 2))
    return np.linalg.norm(offsets(turns, lens), axis=1)


def _cross(rays: np.ndarray) -> np.ndarray:
    """(M, 3, 3) matrices that multiply by the cross product with each ray."""
    x, y, z = rays.T
    zero = np.zeros_like(x)
    return np.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).reshape(-1, 3, 3)
