"""Whole runs of matchers without keypoints: a dense and a semi-dense one that know the scene."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import camera_errors

import gim_hloc
from gim_hloc import colmap, matchers
from gim_hloc.cli.reconstruct import main
from gim_hloc.errors import InputError
from gim_hloc.evaluation.benchmarks import scene as synthetic_dense
from gim_hloc.evaluation.benchmarks.scene import (
    SceneOptions,
    SyntheticDense,
    make_scene,
    write_scene,
)
from gim_hloc.matchers import choose_detector
from gim_hloc.pipelines.reconstruct import ReconstructResult
from gim_hloc.tracks.anchored import AnchoredOptions
from gim_hloc.types import Matches

synthetic_dense.register()
pytestmark = pytest.mark.usefixtures("no_charts", "rays_cast_once")
SEMIDENSE = "synthetic_semidense"


class SyntheticSemidense(SyntheticDense):
    """The same warps, given as matches on a grid of 8 pixels like LoFTR's."""

    def match(self, a: Any, b: Any) -> Matches:
        width, height = a.size
        grid = np.stack(np.meshgrid(np.arange(4, width, 8), np.arange(4, height, 8)), -1)
        xy = torch.from_numpy(grid.reshape(-1, 2).astype(np.float32))
        reading = self.warp(a, b).read(xy)
        good = (reading.certainty > 0.5) & (reading.cycle_px < 2)
        return Matches(
            keypoints0=xy[good],
            keypoints1=reading.xy_px[good],
            scores=reading.certainty[good],
        )

    def match_batch(self, pairs: Any) -> list[Matches]:
        return [self.match(a, b) for a, b in pairs]


def _semidense(**options: Any) -> SyntheticSemidense:
    dense = synthetic_dense.synthetic_dense(**options)
    found = SyntheticSemidense(options=dense.options, device=dense.device, scene=dense.scene)
    found.info = matchers.describe(SEMIDENSE)
    return found


if SEMIDENSE not in matchers.names():
    info = synthetic_dense.INFO
    matchers.register(
        SEMIDENSE,
        _semidense,
        type(info)(
            **{**vars(info), "name": SEMIDENSE, "kind": "semidense"},
        ),
    )


VIEWS, WIDTH, HEIGHT = 6, 320, 240


@pytest.fixture(scope="module")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    write_scene(make_scene(SceneOptions(views=VIEWS, size=(WIDTH, HEIGHT))), folder)
    return folder


def numbers(folder: Path, *more: str, noise_px: float = 0.25) -> tuple[str, ...]:
    """Options of the synthetic matchers."""
    return (f"scene={folder / 'scene.json'}", "size=[120, 160]", f"noise_px={noise_px}", *more)


def run(folder: Path, output: Path, **options: Any) -> ReconstructResult:
    settings: dict[str, Any] = {
        "matcher": "synthetic_dense",
        "quality": "fast",
        "anchors": "sift",
        "rescue": "none",
        "pairs": "exhaustive",
        "camera_mode": "single",
        "intrinsics": f"SIMPLE_PINHOLE,{1400 * WIDTH / 1600},{WIDTH / 2},{HEIGHT / 2}",
        "deterministic": True,
        "refine_keypoints": False,
        "max_keypoints": 600,
        "anchored": AnchoredOptions(grid_px=20),
        "matcher_options": numbers(folder),
        **options,
    }
    return gim_hloc.reconstruct(folder / "images", output, progress=False, **settings)


@pytest.fixture(scope="module")
def encodings() -> Iterator[list[str]]:
    """Names of the images that a synthetic matcher encodes."""
    seen: list[str] = []
    plain = SyntheticDense.encode

    def encode(self: SyntheticDense, image: Any) -> Any:
        seen.append(image.name)
        return plain(self, image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SyntheticDense, "encode", encode)
        yield seen


@pytest.fixture(scope="module")
def whole(
    scene_folder: Path, tmp_path_factory: pytest.TempPathFactory, encodings: list[str]
) -> ReconstructResult:
    """A run that tests go on from in copies of its folder."""
    encodings.clear()
    result = run(scene_folder, tmp_path_factory.mktemp("whole") / "out")
    assert Counter(encodings) == Counter(path.name for path in (scene_folder / "images").iterdir())
    return result


@pytest.fixture
def copied(whole: ReconstructResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.output, tmp_path / "out"))


@pytest.mark.parametrize("matcher", ["synthetic_dense", SEMIDENSE])
def test_anchored_run_gives_true_poses(
    matcher: str, scene_folder: Path, tmp_path: Path, whole: ReconstructResult
) -> None:
    result = whole
    if matcher == SEMIDENSE:
        result = run(scene_folder, tmp_path / "out", matcher=matcher)
    output = result.output
    scene = synthetic_dense.load_scene(scene_folder / "scene.json")
    assert result.registered == len(scene.names)
    rotation, centre = camera_errors(colmap.model_cameras(output), scene.poses)
    assert rotation < 0.15
    assert centre < 2e-3
    statistics = colmap.model_statistics(result.models[0])
    assert statistics["mean_track_length"] > 3
    for name in ("anchors.h5", "raw_matches.h5", "features.h5", "matches.h5", "report.html"):
        assert (output / name).is_file(), name
    # hloc's layout, so that any hloc script can join here
    with h5py.File(output / "features.h5") as file:
        keypoints = file[scene.names[0]]["keypoints"][()]
        assert keypoints.dtype == np.float32
        assert (keypoints != np.round(keypoints)).any(), "never rounded"
    with h5py.File(output / "matches.h5") as file:
        matches0 = file[scene.names[0]][scene.names[1]]["matches0"][()]
        assert len(matches0) == len(keypoints)
        assert (matches0 > -1).sum() > 100


def test_the_same_command_again_computes_nothing(
    scene_folder: Path, whole: ReconstructResult, copied: Path, encodings: list[str]
) -> None:
    encodings.clear()
    second = run(scene_folder, copied)
    assert encodings == []
    assert second.report["summary"]["points"] == whole.report["summary"]["points"]
    # Other numbers of the matcher: its pairs are matched again, the anchors stay.
    third = run(scene_folder, copied, matcher_options=numbers(scene_folder, noise_px=0.5))
    assert len(encodings) == VIEWS
    assert third.report["counts"]["images_encoded_now"] == 0
    assert third.report["counts"]["dense_encodings_now"] == VIEWS


def test_little_memory_gives_the_same_model(
    scene_folder: Path, tmp_path: Path, whole: ReconstructResult, encodings: list[str]
) -> None:
    encodings.clear()
    second = run(scene_folder, tmp_path / "b", cache_gb=0.002)
    assert len(encodings) > VIEWS
    files = (whole.output / "features.h5", tmp_path / "b/features.h5")
    with h5py.File(files[0]) as a, h5py.File(files[1]) as b:
        assert sorted(a) == sorted(b)
        for name in a:
            assert np.array_equal(a[name]["keypoints"][()], b[name]["keypoints"][()])
    assert second.report["summary"]["points"] == whole.report["summary"]["points"]


def test_quantized_tracks_through_the_pipeline(scene_folder: Path, tmp_path: Path) -> None:
    options = numbers(scene_folder, "num_matches=1500")
    result = run(scene_folder, tmp_path / "out", tracks="quantized", matcher_options=options)
    assert result.registered == VIEWS
    with h5py.File(tmp_path / "out/features.h5") as file:
        keypoints = file["/"][next(iter(file))]["keypoints"][()]
    # hloc's lattice of int(max_error) = 2 px
    assert np.allclose((keypoints + 0.5) % 2, 0)


def test_masked_pixels_get_neither_anchors_nor_targets(scene_folder: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    names = sorted(path.name for path in (scene_folder / "images").iterdir())
    keep = np.full((HEIGHT, WIDTH), 255, np.uint8)
    keep[:, WIDTH // 2 :] = 0
    for name in names:
        Image.fromarray(keep).save(masks / f"{name}.png")
    result = run(scene_folder, tmp_path / "out", masks=masks, mask_erode=0)
    assert result.registered >= VIEWS - 2
    with h5py.File(tmp_path / "out/features.h5") as file:
        for name in names:
            keypoints = file[name]["keypoints"][()]
            assert len(keypoints) > 100
            # One cell of the warp's grid is two pixels wide.
            assert keypoints[:, 0].max() < WIDTH // 2 + 2


def test_anchors_default_to_what_works_here(
    scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gim_hloc import weights
    from gim_hloc.errors import WeightsError

    def missing(*_: Any, **__: Any) -> None:
        raise WeightsError("not here")

    monkeypatch.setattr(weights, "locate", missing)
    assert choose_detector("auto") == "sift"
    assert choose_detector("disk_lightglue") == "disk_lightglue"
    few = tmp_path / "images"
    few.mkdir()
    for path in sorted((scene_folder / "images").iterdir())[:3]:
        shutil.copy(path, few)
    result = run(tmp_path, tmp_path / "out", anchors="auto", matcher_options=numbers(scene_folder))
    assert any("anchors are sift's" in note for note in result.report["notes"])


def test_dense_anchors_are_refused(scene_folder: Path, tmp_path: Path, capsys: Any) -> None:
    code = main(
        [
            str(scene_folder / "images"), str(tmp_path / "out"),
            "--matcher", "synthetic_dense", "--anchors", "synthetic_dense",
            "--matcher-options", f"scene={scene_folder / 'scene.json'}",
        ]
    )  # fmt: skip
    assert code == 2
    error = capsys.readouterr().err
    assert "scene" in error or "no keypoints" in error
    assert "Traceback" not in error


def test_dry_run_estimates_and_writes_nothing(scene_folder: Path, tmp_path: Path) -> None:
    result = run(scene_folder, tmp_path / "out", dry_run=True)
    assert result.estimate["pairs"] == VIEWS * (VIEWS - 1) // 2
    assert result.estimate["seconds_per_pair"] > 0
    assert not (tmp_path / "out").exists()


def test_warps_read_again_lengthen_tracks(
    scene_folder: Path, whole: ReconstructResult, copied: Path
) -> None:
    before = colmap.model_statistics(whole.models[0])
    again = run(scene_folder, copied, refine_warps=True)
    after = colmap.model_statistics(again.models[0])
    assert after["mean_track_length"] > before["mean_track_length"]
    assert again.report["counts"]["pairs_matched_now"] == 0  # matching itself was reused
    assert again.report["counts"]["dense_encodings_now"] == VIEWS
    scene = synthetic_dense.load_scene(scene_folder / "scene.json")
    rotation, centre = camera_errors(colmap.model_cameras(copied), scene.poses)
    assert rotation < 0.15
    assert centre < 2e-3
    assert any("refined by the warps" in note for note in again.report["notes"])


def test_reading_warps_again_needs_warps(scene_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dense matcher"):
        run(scene_folder, tmp_path / "out", refine_warps=True, matcher="sift", matcher_options=())


def test_gim_dkm_without_its_weights_says_what_to_fetch(
    scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from gim_hloc import downloads

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GIM_HLOC_WEIGHTS", str(tmp_path))

    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("no network in tests")

    monkeypatch.setattr(downloads, "_open", unreachable)
    code = main([str(scene_folder / "images"), str(tmp_path / "out"), "--matcher", "gim_dkm"])
    error = capsys.readouterr().err
    assert code == 2
    assert "gim_dkm_100h.ckpt" in error
    assert "gim-weights download" in error
    assert "https://" in error
    assert "GIM_HLOC_WEIGHTS" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_made_up_weights_run_to_an_honest_end(
    scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from made_up import write_small_checkpoint

    file = "gim_dkm_100h.ckpt"
    write_small_checkpoint(file, tmp_path / "weights" / file)
    monkeypatch.setenv("GIM_HLOC_WEIGHTS", str(tmp_path / "weights"))
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((scene_folder / "images").iterdir())[:3]:
        Image.open(path).resize((320, 240)).save(images / path.name)
    code = main(
        [
            str(images), str(tmp_path / "out"), "--matcher", "gim_dkm", "--anchors", "sift",
            "--matcher-options", "size=[128, 160]", "upsample_size=null", "--rescue", "none",
        ]
    )  # fmt: skip
    assert code == 4
    assert "Nothing matched: no pair of images passed the verification (3 tried" in (
        capsys.readouterr().err
    )
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["summary"]["registered"] == 0
    assert report["summary"]["pairs_verified"] == 0
    assert report["counts"]["dense_encodings_now"] == 3
