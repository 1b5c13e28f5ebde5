"""Sources read the layouts they document, and mixing shows what the recipe says."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
import torch
from synthetic import write_cameras
from torch.utils.data import DataLoader

from gim_hloc.errors import InputError
from gim_hloc.training.batch import PairBatch, PairSample, collate
from gim_hloc.training.data import build_source, rendered, source_options
from gim_hloc.training.data.depth_maps import read_depth
from gim_hloc.training.data.mixture import MixtureDataset, init_worker
from gim_hloc.training.data.pictures import show_batch
from gim_hloc.training.data.posed import scale_intrinsics
from gim_hloc.training.data.sampler import BalancedSampler, FixedSampler
from gim_hloc.training.data.source import PairSource, choose_by_overlap, overlap_edges
from gim_hloc.training.data.truth import pixel_grid, warp_points
from gim_hloc.training.loader import EpochLoader, PairData

SIZE = (160, 120)
BOX = [160, 120]
VIEWS = 6


@dataclasses.dataclass
class View:
    image: np.ndarray
    depth: np.ndarray
    K: np.ndarray
    pose: np.ndarray  # world to camera


@pytest.fixture(scope="module")
def views() -> list[View]:
    """Six views of one room, the camera moving sideways."""
    options = rendered.RenderedOptions(size=SIZE)
    room = rendered.make_room(np.random.default_rng(0), options, 8)
    textures = [
        rendered.pyramid(rendered.make_texture(np.random.default_rng(k), 128)) for k in range(8)
    ]
    centre = room.extent * [0.3, 0.2, 0.5]
    made = []
    for k in range(VIEWS):
        at = centre + np.array([0.15 * k, 0.02 * k, 0.01 * k])
        camera = rendered.look(at, at + np.array([0.1, 1.0, -0.1]), 0.01 * k, SIZE, np.deg2rad(70))
        image, depth = rendered.render_view(room, camera, textures)
        made.append(View(image, depth, camera.K, camera.world_to_camera))
    return made


def write_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[:, :, ::-1])


def write_h5(path: Path, depth: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["depth"] = depth


def write_millimetres(path: Path, depth: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.rint(depth * 1000).astype(np.uint16))


def photometric_error(batch: PairBatch, truth: str = "depth", exposure: bool = False) -> float:
    """Mean difference of colour of corresponding points: small only if all frames are right."""
    width, height = batch.box
    if truth == "depth":
        xy = pixel_grid(height, width, 1)[None].expand(len(batch), -1, -1)
        other, valid = warp_points(batch, xy, source=0)
    else:
        xy, other = batch.labels[..., :2], batch.labels[..., 2:]
        valid = torch.arange(xy.shape[1])[None] < batch.label_count[:, None]
    assert valid.sum() > 200

    def read(image: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        grid = (points + 0.5) * 2 / torch.tensor([width, height]) - 1
        return torch.nn.functional.grid_sample(image, grid[:, None], align_corners=False)[:, :, 0]

    seen0, seen1 = read(batch.image0, xy), read(batch.image1, other)
    if exposure:  # brought to the same one
        for k in range(len(batch)):
            for channel in range(3):
                a, b = seen0[k, channel], seen1[k, channel]
                b *= a[valid[k]].median() / b[valid[k]].median()
    error = (seen0 - seen1).abs().mean(1)
    return float(error[valid].median())


# ------------------------------------------------------------------------------------- MegaDepth


def write_megadepth(root: Path, views: list[View], scene: str = "0007", *, newer: bool) -> None:
    paths = [f"Undistorted_SfM/{scene}/images/{k}.jpg" for k in range(VIEWS)]
    depths = [f"phoenix/{scene}/depths/{k}.h5" for k in range(VIEWS)]
    intrinsics = []
    for k, view in enumerate(views):
        write_image(root / paths[k], view.image)
        write_h5(root / depths[k], view.depth)
        K = view.K.copy()
        K[:2, 2] += 0.5  # as COLMAP has it
        intrinsics.append(K)

    def objects(items: list[Any]) -> np.ndarray:
        array = np.empty(len(items), dtype=object)
        for k, item in enumerate(items):
            array[k] = item
        return array

    content: dict[str, Any] = {
        "image_paths": objects([*paths, None]),
        "depth_paths": objects([*depths, None]),
        "intrinsics": objects([*intrinsics, None]),
        "poses": objects([*(view.pose for view in views), None]),
    }
    matrix = np.zeros((VIEWS + 1, VIEWS + 1))
    for i in range(VIEWS):
        for j in range(VIEWS):
            matrix[i, j] = 0.65 - 0.1 * abs(i - j) + (0.02 if i < j else 0.0)
    matrix[0, 6] = matrix[6, 0] = 0.5  # with an image that was left out
    folder = root / ("scene_info" if newer else "output")
    folder.mkdir(parents=True, exist_ok=True)
    if newer:
        pairs = [
            ((i, j), float(matrix[i, j]), np.zeros((3, 2)))
            for i in range(VIEWS)
            for j in range(i + 1, VIEWS)
        ]
        for k in range(2):
            part = {**content, "pair_infos": objects(pairs[k::2])}
            np.savez(folder / f"{scene}_0.{1 + 2 * k}_0.{3 + 2 * k}.npz", **part)
    else:
        np.savez(folder / f"{scene}.npz", overlap_matrix=matrix, **content)


@pytest.mark.parametrize("newer", [False, True])
def test_megadepth(tmp_path: Path, views: list[View], newer: bool) -> None:
    write_megadepth(tmp_path, views, newer=newer)
    source = build_source({"type": "megadepth", "root": str(tmp_path), "box": BOX})
    assert source.scene_lengths().tolist() == [15]  # all pairs of six images, none of the seventh
    assert source.augment.photometric == "dark"
    assert source.augment.keep_scale == 0.5
    plain = build_source(
        {
            "type": "megadepth",
            "root": tmp_path,
            "box": BOX,
            "split": "validation",
            "scenes": ["0007"],
            "overlap": [0.3, 0.7],
        }
    )
    names = {plain.load(k).names for k in range(len(plain))}
    gaps = Counter(abs(int(Path(a).stem) - int(Path(b).stem)) for a, b in names)
    # Overlaps 0.57, 0.47, 0.37 (0.55, 0.45, 0.35 the other way): gaps of up to three images.
    assert gaps == {1: 5, 2: 4, 3: 3}
    batch = collate([plain[k, 0] for k in range(len(plain))])
    assert batch.has_depth.all()
    assert photometric_error(batch) < 0.02
    shifted = build_source(
        {
            "type": "megadepth", "root": tmp_path, "box": BOX, "split": "validation",
            "scenes": ["0007"], "corner_origin": False,
        }
    )  # fmt: skip
    assert shifted.load(0).K0[0, 2] == pytest.approx(plain.load(0).K0[0, 2] + 0.5)


def test_files_of_the_file_system_are_no_scenes(tmp_path: Path, views: list[View]) -> None:
    write_megadepth(tmp_path, views, newer=False)
    for path in [*tmp_path.rglob("*.npz"), *tmp_path.rglob("*.h5")]:
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
    source = build_source({"type": "megadepth", "root": tmp_path, "box": BOX})
    assert source.scene_lengths().tolist() == [15]


def test_megadepth_bins_need_both_overlaps(tmp_path: Path, views: list[View]) -> None:
    write_megadepth(tmp_path, views, newer=False)
    spec = {"type": "megadepth", "root": tmp_path, "box": BOX, "overlap": [0.16, 0.56]}
    # Bins from 0.16 in steps of 0.1: the overlaps of gaps 1 to 4 fall on both sides of an edge.
    with pytest.raises(InputError, match="No pair of 0007"):
        build_source(spec)
    chosen = choose_by_overlap(
        np.array([0.57, 0.47, 0.37, 0.27, 0.17, 0.16]),
        np.array([0.55, 0.45, 0.35, 0.25, 0.165, 0.16]),
        overlap_edges(0.16, 0.56),
        100,
    )
    assert chosen.tolist() == [4]


def test_megadepth_says_what_is_missing(tmp_path: Path, views: list[View]) -> None:
    with pytest.raises(InputError, match="scene_info"):
        build_source({"type": "megadepth", "root": tmp_path})
    write_megadepth(tmp_path, views, "0022", newer=False)
    with pytest.raises(InputError, match="any scene to train on"):
        build_source({"type": "megadepth", "root": tmp_path})  # 0022 is held out
    validation = {"type": "megadepth", "root": tmp_path, "split": "validation"}
    assert len(build_source(validation)) == 15
    assert len(build_source({**validation, "drawn": 4})) == 4
    with pytest.raises(InputError, match="0099"):
        build_source({**validation, "scenes": ["0099"]})
    np.savez(tmp_path / "output" / "0005.npz", poses=np.zeros(3))
    with pytest.raises(InputError, match=r"0005\.npz is no scene file"):
        build_source({**validation, "scenes": ["0005"]})


# --------------------------------------------------------------------------------------- ScanNet


def write_scannet(root: Path, views: list[View]) -> None:
    scan = root / "scans" / "scene0003_01"
    for k, view in enumerate(views):
        frame = 10 * k
        # Colour is larger than depth, as in the data set.
        write_image(scan / "color" / f"{frame}.jpg", cv2.resize(view.image, (1296, 968)))
        depth = cv2.resize(view.depth, (640, 480), interpolation=cv2.INTER_LINEAR)
        write_millimetres(scan / "depth" / f"{frame}.png", depth)
        (scan / "pose").mkdir(exist_ok=True)
        pose = np.linalg.inv(view.pose)
        if k == 5:
            pose[:] = -np.inf  # tracking was lost
        np.savetxt(scan / "pose" / f"{frame}.txt", pose)
    K = scale_intrinsics(views[0].K, SIZE, (640, 480))
    np.savez(root / "intrinsics.npz", scene0003_01=K)
    rows = [(3, 1, 10 * i, 10 * j, 0.6 - 0.08 * (j - i)) for i in range(6) for j in range(i + 1, 6)]
    rows += [(3, 1, 5, 10, 0.5), (3, 1, 0, 10, 0.9)]  # not exported, and too much overlap
    table = np.array(rows)
    folder = root / "train_scene_info" / "npz"
    folder.mkdir(parents=True)
    np.savez(folder / "scene0003.npz", name=table[:, :4].astype(np.int64), score=table[:, 4])


def test_scannet(tmp_path: Path, views: list[View]) -> None:
    write_scannet(tmp_path, views)
    spec = {"type": "scannet", "root": tmp_path, "box": [640, 480]}
    source = build_source(spec)
    assert source.scene_lengths().tolist() == [15]
    assert source.augment.photometric == "none"
    plain = build_source({**spec, "split": "validation", "failures": tmp_path / "failures.jsonl"})
    raw = plain.load(10)
    assert raw.image0.shape == (480, 640, 3)
    assert raw.names == ("scene0003_01/0", "scene0003_01/10")  # first of the last bin
    np.testing.assert_allclose(raw.T_0to1, views[1].pose @ np.linalg.inv(views[0].pose), atol=1e-6)
    batch = collate([plain[10, 0]])
    assert photometric_error(batch) < 0.03
    # A pair with a lost pose is replaced, the reason is kept.
    lost = next(k for k in range(15) if "50" in plain.describe(k).split())
    sample = plain[lost, 0]
    assert "50" not in [name.split("/")[1] for name in sample.names]
    assert "pose of frame 50 is not known" in plain.failures[0][1]
    lines = (tmp_path / "failures.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["pair"] == plain.failures[0][0]


# ------------------------------------------------------------------------------- RGB-D and COLMAP


def write_rgbd(scene: Path, views: list[View], depth: Callable[[Path, np.ndarray], None]) -> None:
    for k, view in enumerate(views):
        write_image(scene / "color" / f"{k}.png", view.image)
        (scene / "depth").mkdir(parents=True, exist_ok=True)
        depth(scene / "depth" / f"{k}", view.depth)
        (scene / "pose").mkdir(exist_ok=True)
        np.savetxt(scene / "pose" / f"{k}.txt", np.linalg.inv(view.pose))
    K = np.eye(4)
    K[:3, :3] = views[0].K
    np.savetxt(scene / "intrinsics.txt", K)


def colmap_map(path: Path, depth: np.ndarray) -> None:
    header = f"{depth.shape[1]}&{depth.shape[0]}&1&".encode()
    path.write_bytes(header + depth.astype("<f4").tobytes())


DEPTHS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "png": lambda path, depth: write_millimetres(path.with_suffix(".png"), depth),
    "npy": lambda path, depth: np.save(path.with_suffix(".npy"), depth),
    "h5": lambda path, depth: write_h5(path.with_suffix(".h5"), depth),
    "bin": lambda path, depth: colmap_map(path.with_suffix(".bin"), depth),
}


@pytest.mark.parametrize("kind", list(DEPTHS))
def test_rgbd_folders(tmp_path: Path, views: list[View], kind: str) -> None:
    write_rgbd(tmp_path / "a", views, DEPTHS[kind])
    write_rgbd(tmp_path / "b", views[:3], DEPTHS[kind])
    (tmp_path / "b" / "pose" / "1.txt").unlink()
    spec = {"type": "rgbd", "root": tmp_path, "box": BOX, "overlap": [0.05, 1.0]}
    source = build_source({**spec, "split": "validation"})
    assert source.scene_lengths().tolist()[0] > 8
    assert source.scene_lengths().tolist()[1] == 1  # 0 and 2
    batch = collate([source[k, 0] for k in range(4)])
    assert photometric_error(batch) < 0.02
    assert batch.depth0[0, 60, 80] == pytest.approx(float(views[0].depth[60, 80]), abs=1e-3)
    train = build_source({**spec, "augment": {"photometric": "none"}})
    batch = collate([train[k, 3] for k in range(4)])
    assert photometric_error(batch) < 0.05
    alone = build_source({**spec, "root": tmp_path / "a", "stride": 3})
    assert len(alone) == 1


def test_rgbd_overlap_is_that_of_the_views(tmp_path: Path, views: list[View]) -> None:
    from gim_hloc.training.data.posed import View as PosedView
    from gim_hloc.training.data.posed import view_overlaps

    write_rgbd(tmp_path, views, DEPTHS["npy"])
    posed = [
        PosedView(
            name=str(k), image=tmp_path / "color" / f"{k}.png",
            depth=tmp_path / "depth" / f"{k}.npy", K=view.K, world_to_camera=view.pose,
        )
        for k, view in enumerate(views)
    ]  # fmt: skip
    overlap = view_overlaps(posed, 1.0)
    width, height = SIZE
    grid = pixel_grid(height, width, 2).double().numpy()
    for i, j in ((0, 1), (0, 3), (5, 0), (2, 4)):
        a, b = views[i], views[j]
        z = a.depth[grid[:, 1].astype(int), grid[:, 0].astype(int)]
        xy = grid.astype(int)
        rays = np.c_[xy, np.ones(len(xy))] @ np.linalg.inv(a.K).T * z[:, None]
        move = b.pose @ np.linalg.inv(a.pose)
        moved = rays @ move[:3, :3].T + move[:3, 3]
        place = np.rint((moved @ b.K.T)[:, :2] / moved[:, 2:]).astype(int)
        inside = ((place >= 0) & (place < SIZE)).all(1) & (moved[:, 2] > 0)
        there = b.depth[place[inside, 1], place[inside, 0]]
        share = (np.abs(there - moved[inside, 2]) < 0.05 * there).sum() / len(xy)
        assert overlap[i, j] == pytest.approx(share, abs=0.06)
    assert (np.diag(overlap) == 0).all()


def test_damaged_files_of_posed_images_cost_their_pairs_only(
    tmp_path: Path, views: list[View], caplog: pytest.LogCaptureFixture
) -> None:
    write_rgbd(tmp_path, views, DEPTHS["npy"])
    spec = {"type": "rgbd", "root": tmp_path, "box": BOX, "overlap": [0.05, 1.0]}
    every = sorted(path.name for path in (tmp_path / "color").iterdir())
    before = build_source(spec)
    (tmp_path / "color" / every[0]).write_bytes(b"no image")
    after = build_source(spec)
    assert 0 < len(after) < len(before)
    assert f"{every[0]} cannot be read" in caplog.text
    for name in every:
        (tmp_path / "color" / name).write_bytes(b"")
    with pytest.raises(InputError, match="No two of the"):
        build_source(spec)


def test_rgbd_says_what_is_missing(tmp_path: Path, views: list[View]) -> None:
    with pytest.raises(InputError, match="color/"):
        build_source({"type": "rgbd", "root": tmp_path})
    write_rgbd(tmp_path, views, DEPTHS["npy"])
    with pytest.raises(InputError, match=r"overlap between 0\.95 and 1\.0"):
        build_source({"type": "rgbd", "root": tmp_path, "overlap": [0.95, 1.0]})
    (tmp_path / "intrinsics.txt").write_text("1 2 3")
    with pytest.raises(InputError, match=r"intrinsics\.txt holds 1 x 3"):
        build_source({"type": "rgbd", "root": tmp_path})
    (tmp_path / "intrinsics.txt").unlink()
    with pytest.raises(InputError, match="has no intrinsics"):
        build_source({"type": "rgbd", "root": tmp_path})


def test_the_examples_room_is_a_source(room: Path) -> None:
    spec = {"type": "colmap", "root": room, "box": [640, 480], "overlap": [0.4, 0.9]}
    source = build_source({**spec, "split": "validation"})
    assert len(source) > 15
    batch = collate([source[0, 0], source[12, 0]])
    assert photometric_error(batch) < 0.03


def test_colmap_workspaces(tmp_path: Path, views: list[View]) -> None:
    # The middle of an image is size / 2 from the corner of its first pixel.
    camera = f"SIMPLE_PINHOLE,{float(views[0].K[0, 0])!r},{SIZE[0] / 2},{SIZE[1] / 2}"
    poses = {f"view{k}.png": (v.pose[:3, :3], v.pose[:3, 3]) for k, v in enumerate(views)}
    write_cameras(poses, tmp_path / "sparse", camera, SIZE)
    (tmp_path / "stereo" / "depth_maps").mkdir(parents=True)
    for k, view in enumerate(views):
        write_image(tmp_path / "images" / f"view{k}.png", view.image)
        if k != 2:
            kind = "geometric" if k else "photometric"
            colmap_map(tmp_path / "stereo" / "depth_maps" / f"view{k}.png.{kind}.bin", view.depth)
    spec = {
        "type": "colmap", "root": tmp_path, "box": BOX, "overlap": [0.0, 1.0],
        "split": "validation",
    }  # fmt: skip
    source = build_source(spec)
    assert len(source) == 10  # of five images with depth
    np.testing.assert_allclose(source.load(0).K0, views[0].K, atol=1e-9)
    assert photometric_error(collate([source[k, 0] for k in range(4)])) < 0.02
    radial = camera.replace("SIMPLE_PINHOLE", "SIMPLE_RADIAL") + ",0.1"
    write_cameras(poses, tmp_path / "sparse", radial, SIZE)
    with pytest.raises(InputError, match="undistort"):
        build_source(spec)


def test_depth_smaller_than_its_image(tmp_path: Path, views: list[View]) -> None:
    write_rgbd(tmp_path, views, DEPTHS["npy"])
    for k in range(VIEWS):
        image = cv2.resize(views[k].image, (400, 300), interpolation=cv2.INTER_CUBIC)
        write_image(tmp_path / "color" / f"{k}.png", image)
    K = scale_intrinsics(views[0].K, SIZE, (400, 300))
    np.savetxt(tmp_path / "intrinsics.txt", K)
    source = build_source(
        {"type": "rgbd", "root": tmp_path, "box": BOX, "split": "validation", "overlap": [0.1, 1]}
    )
    raw = source.load(0)
    assert raw.image0.shape == (120, 160, 3)
    np.testing.assert_allclose(raw.K0, views[0].K, atol=1e-9)
    assert photometric_error(collate([source[0, 0]])) < 0.03


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.bin", b"3&2&1&" + b"\0" * 20),
        ("b.bin", b"text"),
        ("c.h5", b"text"),
        ("d.npy", b"text"),
        ("e.png", b"text"),
        ("f.tif", b""),
    ],
)
def test_damaged_depth(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        read_depth(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        read_depth(tmp_path / "none.npy")


# ---------------------------------------------------------------------------------------- videos


def write_video(root: Path, views: list[View], video: str = "abc") -> np.ndarray:
    """Labels of a propagated video whose frames 0, 10, ... are the views; the labels of 0 -> 20."""
    from gim_hloc.training.video.propagated import PropagatedWriter, StartRecord, VideoFacts

    labels = true_labels(views[0], views[2])
    root.mkdir(parents=True, exist_ok=True)
    facts = VideoFacts(video=video, size=SIZE, fps=30.0, gap=10)
    writer = PropagatedWriter(root / f"{video}.h5", {}, facts)
    made = {
        "joined": len(labels), "count": len(labels), "hops": 2, "ended": "end of video",
    }  # fmt: skip
    records = [
        StartRecord(start=0, target=50, reached=(0, 20), **made),
        StartRecord(start=10, target=50, reached=(10, 30), **{**made, "count": 20}),
    ]
    writer.put(records[0], labels)
    writer.put(records[1], labels[:20])
    writer.finish(records)
    writer.close()
    return labels


def true_labels(a: View, b: View) -> np.ndarray:
    """(n, 4) float32 pixels of a and where they are seen in b, hidden ones left out."""
    width, height = SIZE
    xy = pixel_grid(height, width, 4).double().numpy()
    z = a.depth[xy[:, 1].astype(int), xy[:, 0].astype(int)]
    xy = np.floor(xy)
    rays = np.c_[xy, np.ones(len(xy))] @ np.linalg.inv(a.K).T * z[:, None]
    move = b.pose @ np.linalg.inv(a.pose)
    moved = rays @ move[:3, :3].T + move[:3, 3]
    place = (moved @ b.K.T)[:, :2] / moved[:, 2:]
    inside = ((place > 0) & (place < np.array(SIZE) - 1)).all(1)
    cell = np.rint(place[inside]).astype(int)
    inside[inside] = np.abs(b.depth[cell[:, 1], cell[:, 0]] - moved[inside, 2]) < 0.1
    labels: np.ndarray = np.c_[xy, place][inside].astype(np.float32)
    return labels


def write_frames(folder: Path, views: list[View], size: tuple[int, int] = SIZE) -> None:
    info = {
        "id": folder.name, "source": "x", "digest": "x", "size": list(size), "fps": 30.0,
        "frames": 60, "duration": 2.0, "image_format": "png", "quality": 95, "max_size": None,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "video.json").write_text(json.dumps(info))
    for k, view in enumerate(views):
        image = view.image if size == SIZE else cv2.resize(view.image, size)
        write_image(folder / "frames" / f"{10 * k:08d}.png", image)


def test_videos(tmp_path: Path, views: list[View]) -> None:
    labels = write_video(tmp_path, views)
    write_frames(tmp_path / "abc", views)
    spec = {"type": "video", "labels": tmp_path, "box": BOX}
    source = build_source(spec)
    assert source.scene_lengths().tolist() == [2]
    assert (source.augment.zoom0, source.augment.zoom1) == ((0.6, 1.0), (1.0, 1.4))
    plain = build_source({**spec, "split": "validation"})
    raw = plain.load(0)
    assert raw.names == ("abc/0", "abc/20")
    np.testing.assert_array_equal(raw.image1, views[2].image)
    np.testing.assert_allclose(raw.labels, labels, atol=1e-6)
    batch = collate([plain[0, 0]])
    assert batch.has_labels.all()
    assert not batch.has_depth.any()
    assert photometric_error(batch, "labels") < 0.02
    gray = {**spec, "augment": {"photometric": "none"}}
    batch = collate([build_source(gray)[0, seed] for seed in range(6)])
    assert photometric_error(batch, "labels") < 0.05
    assert (batch.label_count >= 64).all()


def test_a_pair_with_too_few_labels_is_replaced(tmp_path: Path, views: list[View]) -> None:
    write_video(tmp_path, views)
    write_frames(tmp_path / "abc", views)
    source = build_source(
        {"type": "video", "labels": tmp_path / "abc.h5", "box": BOX, "failures": tmp_path / "f"}
    )
    sample = source[1, 5]  # it has 20 labels
    assert sample.names == ("abc/0", "abc/20")
    assert source.failures
    assert source.failures[0][0] == "video abc 10 - 50"
    assert "64 are needed" in source.failures[0][1]
    assert json.loads((tmp_path / "f").read_text().splitlines()[0])["source"] == "video"
    again = source[1, 5]
    assert sample.labels is not None
    assert again.labels is not None
    assert torch.equal(sample.labels, again.labels)


def test_labels_of_larger_frames(tmp_path: Path, views: list[View]) -> None:
    labels = write_video(tmp_path, views)
    write_frames(tmp_path / "abc", views, (80, 60))
    raw = build_source({"type": "video", "labels": tmp_path, "box": BOX}).load(0)
    np.testing.assert_allclose(raw.labels, (labels + 0.5) / 2 - 0.5, atol=1e-5)


def test_frames_of_the_video_itself(tmp_path: Path, views: list[View]) -> None:
    av = pytest.importorskip("av")
    write_video(tmp_path, views)
    with av.open(str(tmp_path / "abc.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for k in range(60):
            frame = av.VideoFrame.from_ndarray(views[min(k // 10, 5)].image, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    source = build_source({"type": "video", "labels": tmp_path, "box": BOX})
    for _ in range(2):
        raw = source.load(0)
        for image, view in ((raw.image0, views[0]), (raw.image1, views[2])):
            assert np.abs(image.astype(int) - view.image).mean() < 12
        assert np.abs(raw.image1.astype(int) - views[0].image).mean() > 25
        source = pickle.loads(pickle.dumps(source))


def test_videos_say_what_is_missing(tmp_path: Path, views: list[View]) -> None:
    spec = {"type": "video", "labels": tmp_path / "none", "box": BOX}
    with pytest.raises(InputError, match="does not exist"):
        build_source(spec)
    spec["labels"] = tmp_path
    with pytest.raises(InputError, match="gim-video propagate"):
        build_source(spec)
    write_video(tmp_path, views)
    with pytest.raises(InputError, match="frames of video abc"):
        build_source(spec)
    write_frames(tmp_path / "abc", views)
    with pytest.raises(InputError, match="xyz"):
        build_source({**spec, "videos": ["abc", "xyz"]})
    (tmp_path / "list.txt").write_text("abc\n")
    assert len(build_source({**spec, "video_list": str(tmp_path / "list.txt")})) == 2


# ------------------------------------------------------------------- labels of GIM's own pipeline


def write_zeromatch(root: Path, views: list[View]) -> np.ndarray:
    """One video: views[0] and views[2] are its frames 0 and 20, asked for as 0 and 50."""
    labels = true_labels(views[0], views[2])
    rounds = "SIFT GIM_LOFTR GIM_GLUE GIM_DKM 10 20 40 F T FM 32 PM 512"
    folder = root / "propagate" / rounds / "abc"
    folder.mkdir(parents=True)
    rows = np.concatenate([[[0, 20, 0, 20]], labels]).astype(np.float32)
    np.save(folder / "0_50.npy", rows)
    np.save(folder / "10_50.npy", rows)  # its first row is what counts
    np.save(folder / "20_50.npy", rows)
    (folder / "bad_pairs.txt").write_text("20 50\n3")
    frames = root / "image_1080p" / "abc"
    frames.mkdir(parents=True)
    for k in (0, 2):  # as OpenCV writes an RGB array: red and blue exchanged
        write_image(frames / f"{10 * k}.png", views[k].image[:, :, ::-1])
    return labels


def test_labels_of_gims_own_pipeline(tmp_path: Path, views: list[View]) -> None:
    labels = write_zeromatch(tmp_path, views)
    spec = {"type": "zeromatch", "root": tmp_path, "box": BOX}
    source = build_source(spec)
    assert source.scene_lengths().tolist() == [2]  # one of three is bad
    assert source.describe(1) == "zeromatch abc 10 - 50"
    for k in range(2):
        raw = source.load(k)
        assert raw.names == ("abc/0", "abc/20")
        np.testing.assert_array_equal(raw.image0, views[0].image)
        np.testing.assert_array_equal(raw.image1, views[2].image)
        np.testing.assert_allclose(raw.labels, labels, atol=1e-4)
    batch = collate([build_source({**spec, "split": "validation"})[0, 0]])
    assert batch.has_labels.all()
    assert photometric_error(batch, "labels") < 0.02
    raw = build_source({**spec, "exchanged": False}).load(0)
    np.testing.assert_array_equal(raw.image0, views[0].image[:, :, ::-1])


def test_frames_of_gims_videos(tmp_path: Path) -> None:
    """29.97 frames a second: frame i is the first from i / 29 s on."""
    pytest.importorskip("av")
    from fractions import Fraction

    from video_files import HEIGHT, WIDTH, numbered, read_number, write_video

    labels = tmp_path / "labels" / "abc"
    labels.mkdir(parents=True)
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, (WIDTH - 1, HEIGHT - 1, WIDTH - 1, HEIGHT - 1), (80, 4))
    np.save(labels / "10_60.npy", np.concatenate([[[10, 58, 10, 58]], xy]).astype(np.float32))
    (tmp_path / "video_1080p").mkdir()
    write_video(
        tmp_path / "video_1080p" / "abc.mp4",
        [numbered(n) for n in range(70)],
        rate=Fraction(30000, 1001),
    )
    spec = {"type": "zeromatch", "root": tmp_path, "labels": tmp_path / "labels", "box": BOX}
    source = pickle.loads(pickle.dumps(build_source(spec)))
    raw = source.load(0)
    # 10 / 29 s is 10.33 frames, 58 / 29 s is 59.94 frames.
    assert [read_number(image) for image in (raw.image0, raw.image1)] == [11, 60]
    np.save(labels / "10_60.npy", np.concatenate([[[10, 99, 10, 99]], xy]).astype(np.float32))
    with pytest.raises(InputError, match="ends before frame 99"):
        source.load(0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([[{}]], dtype=object), "cannot be read"),
        (np.zeros((5, 3)), "rows of four"),
        (np.array([[0, 20, 0, 20.0]]), "rows of four"),
        (np.array([[0, 20, 0, 30], [1, 2, 3, 4.0]]), "two frames"),
        (np.array([[20, 0, 20, 0], [1, 2, 3, 4.0]]), "two frames"),
        (np.array([[0, 20, 0, 20], [1, 2, np.nan, 4.0]]), "no numbers"),
        (np.array([[0, 20, 0, 20], [1, 2, 1e5, 4.0]]), "another size"),
    ],
)
def test_odd_files_of_labels_are_refused(
    rows: np.ndarray, message: str, tmp_path: Path, views: list[View]
) -> None:
    write_zeromatch(tmp_path, views)
    source = build_source({"type": "zeromatch", "root": tmp_path, "box": BOX})
    (file,) = tmp_path.glob("propagate/*/abc/0_50.npy")
    np.save(file, rows, allow_pickle=True)
    with pytest.raises(InputError, match=message):
        source.load(0)


def test_folders_of_labels_say_what_is_missing(tmp_path: Path, views: list[View]) -> None:
    spec = {"type": "zeromatch", "root": tmp_path, "box": BOX}
    with pytest.raises(InputError, match="holds no labels"):
        build_source(spec)
    write_zeromatch(tmp_path, views)
    with pytest.raises(InputError, match="xyz"):
        build_source({**spec, "videos": ["xyz"]})
    with pytest.raises(InputError, match="frames of video abc"):
        build_source({**spec, "frames": tmp_path / "none"})
    (tmp_path / "propagate" / "other").mkdir()
    with pytest.raises(InputError, match="several sets"):
        build_source(spec)


# ----------------------------------------------------------------------- rendered and single images


def test_rendered_rooms() -> None:
    spec = {"type": "rendered", "box": BOX, "size": [160, 120], "scenes": 5, "pairs_per_scene": 2}
    source = build_source({**spec, "split": "validation"})
    assert source.scene_lengths().tolist() == [2] * 5
    batch = collate([source[k, 0] for k in range(4)])
    assert photometric_error(batch, exposure=True) < 0.04
    still = build_source({**spec, "split": "validation"})
    assert torch.equal(collate([still[3, 9]]).image1[0], batch.image1[3])
    _, valid = warp_points(
        batch, pixel_grid(120, 160, 4)[None].expand(4, -1, -1), source=0, lookup="nearest"
    )
    shares = valid.float().mean(1)
    assert (shares > 0.08).all()
    assert (shares < 0.95).all()


def test_rendered_rooms_with_photographs(tmp_path: Path, views: list[View]) -> None:
    write_image(tmp_path / "photo.png", views[0].image)
    spec = {"type": "rendered", "box": BOX, "size": [160, 120], "textures": str(tmp_path)}
    assert build_source(spec)[0, 0].image0.shape == (3, 120, 160)
    (tmp_path / "photo.png").unlink()
    with pytest.raises(InputError, match="does not exist"):
        build_source({**spec, "textures": str(tmp_path / "none")})


@pytest.mark.parametrize("truth", ["depth", "labels"])
def test_single_images(tmp_path: Path, views: list[View], truth: str) -> None:
    for k in range(3):
        smooth = cv2.GaussianBlur(views[k].image, (0, 0), 1.5)
        write_image(tmp_path / "sub" / f"{k}.png", smooth)
    source = build_source(
        {
            "type": "homography", "root": tmp_path, "box": BOX, "truth": truth,
            "augment": {"photometric": "none"},
        }
    )  # fmt: skip
    assert source.scene_lengths().tolist() == [3]
    batch = collate([source[k, seed] for k in range(3) for seed in range(2)])
    assert (batch.has_depth if truth == "depth" else batch.has_labels).all()
    assert photometric_error(batch, truth) < 0.02
    assert (batch.to_original0 - batch.to_original1).abs().amax((1, 2)).min() > 1


# ------------------------------------------------------------------------------- description, key


class TestDescriptions:
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (
                {},
                "megadepth, scannet, video, zeromatch, rgbd, colmap, rendered, homography",
            ),
            ({"type": "coco"}, "coco"),
            ({"type": "rendered", "scnes": 3}, r"'scnes'. Did you mean 'scenes'"),
            (
                {"type": "rendered", "augment": {"zoom": 1}},
                r"'augment.zoom'. Did you mean 'augment.zoom",
            ),
            ({"type": "rendered", "augment": {"box": 1}}, "augment has no 'box'"),
            ({"type": "megadepth"}, "root is missing"),
            ({"type": "rendered", "box": 640}, "list"),
            ({"type": "rendered", "box": [640, 480, 3]}, "2 entries"),
            ({"type": "rendered", "scenes": "many"}, "whole number"),
            ({"type": "rendered", "scenes": True}, "whole number"),
            ({"type": "rendered", "split": "test"}, "validation"),
            ({"type": "rendered", "augment": [1]}, "mapping"),
            ({"type": "rendered", "overlap": [0.9, 0.1]}, "range"),
        ],
    )
    def test_what_is_refused(self, spec: dict, message: str) -> None:
        with pytest.raises(InputError, match=message):
            source_options(spec).augmentation()

    def test_yaml_types_become_ours(self) -> None:
        options = source_options(
            {
                "type": "video", "labels": "a/b", "box": [320, 240], "videos": ["x"],
                "augment": {"zoom0": [0.5, 1], "max_labels": 2048},
            }
        )  # fmt: skip
        assert options.labels == Path("a/b")  # type: ignore[attr-defined]
        assert options.videos == ("x",)  # type: ignore[attr-defined]
        augment = options.augmentation()
        assert augment.box == (320, 240)
        assert augment.zoom0 == (0.5, 1)
        assert augment.zoom1 == (1.0, 1.4)
        assert augment.max_labels == 2048


class Numbered(PairSource):
    """Pairs that say who they are."""

    def __init__(self, name: str, lengths: list[int], broken: tuple[int, ...] = ()) -> None:
        options = source_options({"type": "rendered", "box": [64, 64]})
        super().__init__(name, options.augmentation())
        self.lengths = np.array(lengths)
        self.broken = broken

    def scene_lengths(self) -> np.ndarray:
        return self.lengths

    def load(self, index: int) -> Any:
        from gim_hloc.training.data.augment import RawPair

        if index in self.broken:
            raise InputError("broken file")
        image = np.random.default_rng(index).integers(0, 255, (64, 64, 3)).astype(np.uint8)
        return RawPair(image0=image, image1=image, names=(str(index), str(index)))


def test_keys(caplog: pytest.LogCaptureFixture) -> None:
    source = Numbered("n", [10], broken=(3, 4))
    assert torch.equal(source[2, 7].image1, source[2, 7].image1)
    assert not torch.equal(source[2, 7].image1, source[2, 8].image1)
    assert torch.equal(source[2].image1, source[2, 0].image1)
    assert source[3, 1].names[0] not in ("3", "4")
    assert "replaced by another pair: broken file" in caplog.text
    with pytest.raises(IndexError, match="no 10"):
        source[10, 0]
    hopeless = Numbered("h", [2], broken=(0, 1))
    with pytest.raises(InputError, match=r"of h in a row cannot be used; the last: broken file"):
        hopeless[0, 0]


# ---------------------------------------------------------------------------------- without a truth


def turned(view: View) -> View:
    return dataclasses.replace(view, pose=np.linalg.inv(view.pose))


def metres(view: View) -> View:
    return dataclasses.replace(view, depth=view.depth / 1000)


def in_opengl(view: View) -> View:
    return dataclasses.replace(view, pose=np.diag([1.0, -1, -1, 1]) @ view.pose)


def enlarged(view: View) -> View:
    return dataclasses.replace(view, K=view.K * [[2], [2], [1]])


FAULTS = {
    "zero": lambda v: dataclasses.replace(v, depth=v.depth * 0),
    "nan": lambda v: dataclasses.replace(v, depth=v.depth * np.float32("nan")),
    "black": lambda v: dataclasses.replace(v, image=v.image * 0),
    "unit": metres,
    "size": enlarged,
}
REASONS = {
    "zero": "the depth map of .* is empty",
    "nan": "the depth map of .* is empty",
    "black": "shows a single colour",
    "unit": "depth and poses carry no place of one image to the other and back",
    "size": "the principal point .* lies outside of its 160 x 120 pixels",
}


def megadepth(root: Path, views: list[View]) -> dict[str, Any]:
    write_megadepth(root, views, newer=False)
    failures = root / "unusable_pairs.jsonl"
    return {"type": "megadepth", "root": str(root), "box": BOX, "failures": str(failures)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_source_without_a_true_match_stops(tmp_path: Path, views: list[View], fault: str) -> None:
    spec = megadepth(tmp_path, [FAULTS[fault](view) for view in views])
    message = rf"31 pairs of megadepth in a row .*{REASONS[fault]}\. Likely causes: .*unit.*K of"
    with pytest.raises(InputError, match=message):
        build_source(spec).look()
    noted = [json.loads(line) for line in Path(spec["failures"]).read_text().splitlines()]
    assert len(noted) == 31
    assert {row["source"] for row in noted} == {"megadepth"}
    validation = build_source({**spec, "split": "validation", "scenes": ["0007"]})
    assert validation[0, 0].names == validation.load(0).names  # judged by its pose


@pytest.mark.parametrize("fault", FAULTS)
def test_a_pair_without_a_true_match_is_replaced(
    tmp_path: Path, views: list[View], fault: str
) -> None:
    spec = megadepth(tmp_path, [FAULTS[fault](views[0]), *views[1:]])
    source = build_source(spec)
    bad = {k for k in range(15) if "/0.jpg" in source.describe(k)}
    assert len(bad) == 5
    for k in range(15):
        first, again = source[k, 4], build_source(spec)[k, 4]
        assert torch.equal(first.image1, again.image1)
        assert not any(name.endswith("/0.jpg") for name in first.names)
        assert (first.names == source.load(k).names) == (k not in bad)
    noted = [json.loads(line) for line in Path(spec["failures"]).read_text().splitlines()]
    assert {row["pair"] for row in noted} == {source.describe(k) for k in bad}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_bad_source_of_a_mixture_is_named_without_a_traceback(
    tmp_path: Path, views: list[View], workers: int
) -> None:
    bad = megadepth(tmp_path, [metres(view) for view in views])
    good = {"type": "rendered", "scenes": 2, "pairs_per_scene": 2, "size": SIZE, "box": BOX}
    mixture = MixtureDataset([build_source(good), build_source({**bad, "name": "depths in m"})])
    data = PairData(train=mixture, keys=lambda *_: [(0, 0, 5), (0, 1, 5), (1, 0, 5), (0, 2, 5)])
    loader = EpochLoader(
        data, batch_size=1, seed=0, rank=0, world=1, workers=workers, prefetch=1, pin=False
    )
    batches = loader.epoch(0)
    assert [next(batches).dataset, next(batches).dataset] == [("rendered",), ("rendered",)]
    with pytest.raises(InputError) as caught:
        next(batches)
    assert str(caught.value).startswith("31 pairs of depths in m in a row cannot be used; the last")
    with pytest.raises(InputError, match="of depths in m in a row"):  # from there again, as resumed
        next(loader.epoch(0, start=2))


@pytest.mark.parametrize(
    ("change", "said"), [(lambda v: v, False), (turned, True), (in_opengl, True)]
)
def test_images_that_differ_where_truth_is_the_same_are_said(
    tmp_path: Path,
    views: list[View],
    caplog: pytest.LogCaptureFixture,
    change: Callable[[View], View],
    said: bool,
) -> None:
    build_source(megadepth(tmp_path, [change(view) for view in views])).look()
    assert ("look different (correlation" in caplog.text) == said
    assert ("poses the other way round" in caplog.text) == said


# --------------------------------------------------------------------------------------- sampling


class TestBalancedSampler:
    def test_small_sources_are_shown_whole_and_again(self) -> None:
        sampler = BalancedSampler([np.array([5, 5])], [24])
        counts = Counter(index for _, index, _ in sampler)
        assert set(counts) == set(range(10))
        assert sum(counts.values()) == 24
        assert len({seed for _, _, seed in sampler}) == 24

    def test_large_sources_are_thinned_by_scene(self) -> None:
        lengths = np.array([10000, 100])
        sampler = BalancedSampler([lengths], [1000])
        drawn = [index for _, index, _ in sampler]
        assert len(set(drawn)) == 1000
        small = sum(index >= 10000 for index in drawn)
        # Weights 1 / n^0.75: sums 10000^0.25 = 10 and 100^0.25 = 3.16, less as the small runs out.
        assert 90 <= small <= 100
        even = sum(
            index >= 10000 for _, index, _ in BalancedSampler([np.array([10000, 10000])], [2000])
        )
        assert 900 < even < 1100

    def test_sources_take_turns(self) -> None:
        lengths = [np.array([7]), np.array([30]), np.array([3])]
        plan = BalancedSampler(lengths, [12, 12, 12]).plan()
        for k in range(0, 36, 3):
            assert sorted(plan[k : k + 3, 0].tolist()) == [0, 1, 2]
        uneven = BalancedSampler(lengths[:2], [6, 12]).plan()[:, 0]
        for k in range(0, 18, 3):
            assert sorted(uneven[k : k + 3].tolist()) == [0, 1, 1]

    @pytest.mark.parametrize("world", [2, 3, 6])
    def test_any_number_of_processes_sees_the_same_samples(self, world: int) -> None:
        lengths = [np.array([40, 9]), np.array([5])]
        whole = BalancedSampler(lengths, [24, 24])
        whole.set_epoch(2)
        parts = []
        for rank in range(world):
            sampler = BalancedSampler(lengths, [24, 24], rank=rank, world=world)
            sampler.set_epoch(2)
            assert len(sampler) == 48 // world
            parts += list(sampler)
        assert sorted(parts) == sorted(whole)

    def test_epochs(self) -> None:
        lengths = [np.array([100])]

        def epoch(number: int, **more: Any) -> list[Any]:
            sampler = BalancedSampler(lengths, [20], **more)
            sampler.set_epoch(number)
            return list(sampler)

        assert epoch(1) == epoch(1)
        assert epoch(0) != epoch(1)
        assert {i for _, i, _ in epoch(0)} != {i for _, i, _ in epoch(1)}
        assert epoch(0, seed=5) != epoch(0)
        same = [epoch(k, resample=False) for k in range(2)]
        assert [i for _, i, _ in same[0]] == [i for _, i, _ in same[1]]
        assert [s for _, _, s in same[0]] != [s for _, _, s in same[1]]  # augmented anew

    def test_going_on_in_the_middle(self) -> None:
        sampler = BalancedSampler([np.array([50]), np.array([9])], [12, 12], rank=1, world=2)
        sampler.set_epoch(3)
        everything = list(sampler)
        state = sampler.state_dict(consumed=5)
        fresh = BalancedSampler([np.array([50]), np.array([9])], [12, 12], rank=1, world=2)
        fresh.load_state_dict(json.loads(json.dumps(state)))
        assert len(fresh) == 7
        assert list(fresh) == everything[5:]
        assert fresh.state_dict(consumed=2) == {"epoch": 3, "start": 7}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([np.array([5])], [1, 2]), "one for each"),
            (([np.array([0])], [2]), "no pairs"),
            (([np.array([5])], [0]), "positive"),
        ],
    )
    def test_what_does_not_fit(self, arguments: tuple, message: str) -> None:
        with pytest.raises(InputError, match=message):
            BalancedSampler(*arguments)
        with pytest.raises(InputError, match="multiple of 4, such as 8"):
            BalancedSampler([np.array([5])], [7], world=4)
        with pytest.raises(InputError, match="Rank 2"):
            BalancedSampler([np.array([5])], [4], rank=2, world=2)


def test_the_validation_list_is_fixed() -> None:
    sampler = FixedSampler([5, 5000], 1000)
    keys = list(sampler)
    assert len(keys) == 1005
    assert keys == list(FixedSampler([5, 5000], 1000))
    assert [index for source, index, _ in keys if source == 0] == list(range(5))
    parts = [list(FixedSampler([5, 5000], 1000, rank=r, world=2)) for r in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(keys)


def test_choosing_by_overlap() -> None:
    draw = np.random.default_rng(0).uniform(0, 1, (2, 5000))
    edges = overlap_edges(0.01, 0.7)
    assert edges == [0.01, 0.11, 0.21, 0.31, 0.41, 0.51, 0.61, 0.7]
    chosen = choose_by_overlap(*draw, edges, 70)
    assert len(chosen) == 70
    bins = [np.digitize(draw[k, chosen], edges) for k in range(2)]
    assert (bins[0] == bins[1]).all()
    assert (np.bincount(bins[0])[1:] == 10).all()
    assert np.array_equal(chosen, choose_by_overlap(*draw, edges, 70))
    everything = choose_by_overlap(*draw, [0.0, 1.0], 10**6)
    assert np.array_equal(everything, np.arange(5000))


# ----------------------------------------------------------------------------------------- loading


def loaded(mixture: MixtureDataset, keys: list[Any], workers: int, context: str | None) -> Any:
    loader = DataLoader(
        mixture,
        batch_size=2,
        sampler=keys,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=init_worker,
        multiprocessing_context=context if workers else None,
    )
    return list(loader)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(tmp_path: Path, views: list[View], context: str) -> None:
    write_video(tmp_path, views)
    write_frames(tmp_path / "abc", views)
    write_megadepth(tmp_path / "md", views, newer=False)
    sources = [
        build_source({"type": "video", "labels": tmp_path, "box": BOX}),
        build_source({"type": "megadepth", "root": tmp_path / "md", "box": BOX}),
    ]
    mixture = MixtureDataset(sources)
    assert len(mixture) == 17
    mixture[0, 0, 0]  # files are open when workers are forked
    keys = list(BalancedSampler(mixture.scene_lengths(), [4, 4]))
    alone = loaded(mixture, keys, 0, None)
    for a, b in zip(alone, loaded(mixture, keys, 2, context), strict=True):
        assert a.names == b.names
        for name in ("image0", "image1", "labels", "depth1", "to_original1", "T_0to1"):
            assert torch.equal(getattr(a, name), getattr(b, name))
    assert {name for batch in alone for name in batch.dataset} == {"video", "megadepth"}


def test_a_mixture_has_one_box() -> None:
    small = build_source({"type": "rendered", "box": [64, 64]})
    large = build_source({"type": "rendered", "box": [128, 64]})
    with pytest.raises(InputError, match="different boxes"):
        MixtureDataset([small, large])
    with pytest.raises(InputError, match="no source"):
        MixtureDataset([])


def test_pictures(tmp_path: Path, views: list[View]) -> None:
    labels = write_video(tmp_path, views)
    write_frames(tmp_path / "abc", views)
    plain: PairSample = build_source(
        {"type": "video", "labels": tmp_path, "box": BOX, "split": "validation"}
    )[0, 0]
    write_megadepth(tmp_path / "md", views, newer=False)
    deep = build_source({"type": "megadepth", "root": tmp_path / "md", "box": BOX})[0, 0]
    batch = collate([plain, deep])
    picture = show_batch(batch, points=10)
    bare = show_batch(batch, points=10, samples=1, lines=False)
    assert picture.shape[1] == bare.shape[1] == 324
    assert picture.shape[0] > bare.shape[0] > 120  # two rows, one row, each with its text
    # With a single label, its two ends have its colour.
    chosen = labels[0]
    batch.labels[0, 0] = torch.tensor(chosen)
    batch.label_count[0] = 1
    one = show_batch(batch, samples=1, lines=False)
    x0, y0, x1, y1 = np.rint(chosen).astype(int)
    assert (one[y0, x0] == one[y1, x1 + 164]).all()
    assert one[y0, x0].max() == 255
