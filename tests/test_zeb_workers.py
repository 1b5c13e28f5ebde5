"""ZEB runs that are killed, spread over workers, or repeat the reference's slip."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from zeb_oracle import POINTS, calibration, project, register, relative, run_and_kill, write_set

from gim_hloc.evaluation import protocol
from gim_hloc.evaluation.benchmarks import scene as synthetic_dense
from gim_hloc.evaluation.dumps import Dump, read_dump
from gim_hloc.evaluation.options import RunOptions
from gim_hloc.evaluation.predictions import find_predictions
from gim_hloc.evaluation.run import RunReport
from gim_hloc.evaluation.zeb import datasets, run

MINI = Path(__file__).parents[2] / "shared" / "data" / "zeb-mini"
SPARSE, DENSE = "zeb_oracle_sparse", "zeb_oracle_dense"
IMAGES = 6  # 15 pairs


def slow_run(data: Path, out: Path) -> None:
    """A pair takes 50 ms, so that there is time to kill it between pairs."""
    register(SPARSE, delay=0.05)
    run.run(data, out, RunOptions(matchers=(SPARSE,), version="v"))


@pytest.fixture(autouse=True)
def oracles() -> None:
    register(SPARSE)
    register(DENSE, kind="dense")


@pytest.fixture
def gl3d(tmp_path: Path) -> Path:
    return write_set(tmp_path / "data", "gl3d", images=IMAGES)


def only_dump(report: RunReport) -> Dump:
    (result,) = report.results
    assert result.dump is not None
    return read_dump(result.dump)


# -------------------------------------------------------------------------------------- killed runs


def test_a_run_killed_by_the_system_resumes_to_the_same_dump(gl3d: Path, tmp_path: Path) -> None:
    options = RunOptions(matchers=(SPARSE,), version="v")
    whole = run.run(gl3d, tmp_path / "whole", options).results[0].dump
    assert whole is not None
    out = tmp_path / "killed"
    run_and_kill(slow_run, gl3d, out, out=out)
    assert not list(out.glob("dump/*/*"))
    report = run.run(gl3d, out, options)
    assert 0 < report.matched < 15  # neither all nor none were done before
    again = report.results[0].dump
    assert again is not None
    assert again.read_bytes() == whole.read_bytes()


# ------------------------------------------------------------------------------------------ workers


@pytest.fixture
def pictures(gl3d: Path) -> Path:
    """The set with something to see for a matcher that processes know."""
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((256, 192)).save(gl3d / "zeb" / "gl3d" / f"a_{i}.png")
    return gl3d


@pytest.mark.parametrize(
    "where",
    [
        {"devices": ("cpu", "cpu")},
        pytest.param(
            {"engine": "ray", "workers": 2, "device": "cpu"},
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
                ),
            ],
        ),
    ],
    ids=["processes", "ray"],
)
def test_workers_give_what_one_run_gives(pictures: Path, tmp_path: Path, where: Any) -> None:
    options = RunOptions(matchers=("root_sift",), version="v", device="cpu")
    (pictures / "zeb" / "gl3d" / "a_5.png").unlink()
    (pictures / "zeb" / "gl3d" / "a_0_1.txt").write_text("0.jpg 1.jpg 0.5 0.5 1 2")
    one = run.run(pictures, tmp_path / "one", options)
    many = run.run(pictures, tmp_path / "many", replace(options, **where))
    assert only_dump(many).records == only_dump(one).records
    assert {str(p) for p in many.problems} == {str(p) for p in one.problems}
    assert len(many.problems) == len(one.problems) == 6
    assert many.matched == one.matched == 9
    texts = [dump.read_bytes() for dump in sorted(tmp_path.glob("*/dump/*/*"))]
    assert texts[0] == texts[1]
    kept = [result.results[0].predictions.read() for result in (one, many)]
    assert kept[0].keys() == kept[1].keys()
    for name, prediction in kept[0].items():
        assert len(prediction.scores) > 0
        np.testing.assert_array_equal(prediction.points0, kept[1][name].points0)
        np.testing.assert_array_equal(prediction.points1, kept[1][name].points1)


def test_a_shard_is_split_over_workers(pictures: Path, tmp_path: Path) -> None:
    options = RunOptions(matchers=("root_sift",), version="v", device="cpu")
    out = tmp_path / "out"
    first = run.run(pictures, out, replace(options, shard="0/2", devices=("cpu", "cpu")))
    assert (first.matched, first.results[0].dump) == (7, None)
    second = run.run(pictures, out, options)
    assert second.matched == 8
    assert len(only_dump(second)) == 15


def test_shards_count_what_they_could_not_read(gl3d: Path, tmp_path: Path) -> None:
    (gl3d / "zeb" / "gl3d" / "a_5.png").unlink()
    options = RunOptions(matchers=(SPARSE,), version="v")
    whole = run.run(gl3d, tmp_path / "whole", options)
    out = tmp_path / "parts"
    parts = [run.run(gl3d, out, replace(options, shard=f"{i}/2")) for i in range(2)]
    assert [part.results[0].failures for part in parts] == [1, 4]
    report = run.run(gl3d, out, options)
    assert only_dump(report).records == only_dump(whole).records
    assert report.results[0].failures == 5


# ---------------------------------------------------------------------------------- the padded slip

KITTI_SIZE = (620, 188)  # padded to 1240x384


@pytest.fixture
def kitti(tmp_path: Path) -> Path:
    return write_set(
        tmp_path / "data", "kitti", separator="-", suffix=".png", size=KITTI_SIZE, images=3
    )


def with_and_without(folder: Path, out: Path, options: RunOptions) -> list[Dump]:
    return [
        only_dump(run.run(folder, out, replace(options, padded_slip=slip)))
        for slip in (False, True)
    ]


def test_the_slip_moves_a_dense_matchers_points_as_the_reference_does(
    kitti: Path, tmp_path: Path
) -> None:
    options = RunOptions(matchers=(DENSE,), version="v")
    correct, slipped = with_and_without(kitti, tmp_path / "out", options)
    assert correct.pose_errors.max() < 0.1
    K = calibration(KITTI_SIZE)
    for record in slipped.records:
        i, j = (int(name[0]) for name in record.identifier.split("#")[1:])
        # The share of the padded frame, times the original size: corner to corner.
        moved = [
            (project(k, POINTS, KITTI_SIZE).astype(np.float32) + 0.5) / [1240, 384] * KITTI_SIZE
            - 0.5
            for k in (i, j)
        ]
        truth = relative(i, j)
        distance = protocol.epipolar_distance(*moved, K, K, truth)
        assert record.correct_before == int((distance < protocol.CORRECT).sum())
    assert slipped.pose_errors.min() > 1
    # Predictions know no protocol: there are those of one run only.
    assert len(list((tmp_path / "out" / "predictions").glob("*.db"))) == 1


def test_the_slip_leaves_sparse_matchers_alone(kitti: Path, tmp_path: Path) -> None:
    options = RunOptions(matchers=(SPARSE,), version="v")
    correct, slipped = with_and_without(kitti, tmp_path / "out", options)
    assert correct.records == slipped.records
    assert {path.name for path in (tmp_path / "out" / "dump").iterdir()} == {"gim", "gim-slip"}


def test_the_slip_through_a_whole_dense_matcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # True warps of a known scene through encode, warp and sampling, on images padded as KITTI's.
    scene = synthetic_dense.make_scene(
        synthetic_dense.SceneOptions(views=4, size=(620, 200), boxes=0)
    )
    views = [scene.views[name] for name in (scene.names[0], scene.names[2])]
    scene.views = {}
    for i, view in enumerate(views):
        view.name = f"a-{i}.png"
        scene.views[view.name] = view
    scene.save(tmp_path / "scene.json")
    folder = tmp_path / "data" / "zeb" / "kitti"
    folder.mkdir(parents=True)
    truth = np.eye(4)
    truth[:3, :3] = views[1].rotation @ views[0].rotation.T
    truth[:3, 3] = views[1].translation - truth[:3, :3] @ views[0].translation
    focal, centre = views[0].focal, views[0].principal
    K = np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]])
    for i in range(2):
        Image.new("RGB", (620, 200), (90, 90, 90)).save(folder / f"a-{i}.png")
    numbers = " ".join(repr(float(v)) for v in [0.5, 0.5, *K.ravel(), *K.ravel(), *truth.ravel()])
    (folder / "a-0-1.txt").write_text(f"0.png 1.png {numbers}")

    synthetic_dense.register()
    spoilt = {"noise_px": 0.0, "outlier_share": 0.0}
    # A coarse grid: casting its rays takes most of the time.
    chosen = {"scene": str(tmp_path / "scene.json"), "num_matches": 500, **spoilt}
    chosen |= {"size": (96, 128), "pad": False}
    monkeypatch.setattr(run, "reference_options", lambda name: chosen)
    options = RunOptions(matchers=(synthetic_dense.NAME,), version="v")
    dumps = with_and_without(tmp_path / "data", tmp_path / "out", options)
    correct, slipped = (dump.records[0] for dump in dumps)
    assert correct.precision_before > 0.99
    assert correct.pose_error < 1
    assert slipped.precision_before < correct.precision_before
    root = datasets.find_root(tmp_path / "data")
    keys = run.ZebPairs.read(root, datasets.find_set("KITTI")).keys()
    found = find_predictions(tmp_path / "out", synthetic_dense.NAME, keys)
    (prediction,) = found.read().values()
    # What was matched is right; only the protocol spoils it.
    true = scene.true_position("a-0.png", "a-1.png", prediction.points0.astype(np.float64))
    off = np.linalg.norm(true - prediction.points1, axis=1)
    assert np.nanmedian(off) < 0.5
    moved = [
        (points + 0.5) * [620 / 1240, 200 / 384] - 0.5
        for points in (prediction.points0.astype(float), prediction.points1.astype(float))
    ]
    distance = protocol.epipolar_distance(*moved, K, K, truth)
    assert slipped.correct_before == int((distance < protocol.CORRECT).sum())


@pytest.mark.skipif(not MINI.is_dir(), reason="needs ../shared/data/zeb-mini")
def test_the_slip_leaves_root_sift_on_real_images_alone(tmp_path: Path) -> None:
    options = RunOptions(matchers=("root_sift",), sets=("KITTI",), version="v", limit=2)
    correct, slipped = with_and_without(MINI, tmp_path, options)
    assert correct.records == slipped.records
    assert len(correct) == 2
