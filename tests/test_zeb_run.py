"""ZEB runs with a matcher that knows the answer: protocols, caches, resuming, bad inputs."""

from __future__ import annotations

import importlib.util
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from zeb_oracle import POINTS, SIZE, K, Oracle, fresh, project, relative, write_set

from gim_hloc import weights
from gim_hloc.errors import InputError, LockedError, OutputError, WeightsError
from gim_hloc.evaluation import protocol
from gim_hloc.evaluation import run as runs
from gim_hloc.evaluation.dumps import Dump, read_dump
from gim_hloc.evaluation.options import RunOptions
from gim_hloc.evaluation.predictions import find_predictions
from gim_hloc.evaluation.protocol import Protocol
from gim_hloc.evaluation.zeb import datasets, run
from gim_hloc.lock import FolderLock

MINI = Path(__file__).parents[2] / "shared" / "data" / "zeb-mini"
NAME = "zeb_oracle"
IMAGES = 6


@pytest.fixture(autouse=True)
def oracle(monkeypatch: pytest.MonkeyPatch) -> type[Oracle]:
    return fresh(monkeypatch, NAME)


@pytest.fixture
def zeb(tmp_path: Path) -> Path:
    """Two scenes of one set, all pairs of six images each: 30 pairs."""
    return write_set(tmp_path / "data", "gl3d", images=IMAGES, scenes="ab")


OPTIONS = RunOptions(matchers=(NAME,), version="v")


def only_dump(report: runs.RunReport) -> Dump:
    (result,) = report.results
    assert result.dump is not None
    return read_dump(result.dump)


# ----------------------------------------------------------------------------------------- protocol


def test_exact_matches_give_the_exact_pose() -> None:
    truth = relative(0, 2)
    record = protocol.evaluate_pair(
        project(0), project(2), K, K, truth, Protocol(), identifier="s#0#2", covisible=(0.5, 0.25)
    )
    assert record.rotation_error < 1e-4
    assert record.translation_error < 1e-3
    assert record.translation_distance < 1e-4
    assert (record.precision_before, record.correct_before) == (1.0, 200)
    assert record.precision_after == 1.0
    assert record.correct_after > 190
    assert (record.covisible0, record.covisible1) == (0.5, 0.25)


def test_errors_are_angles_against_the_truth() -> None:
    # The truth is turned by 3 degrees about z: rotation is off by exactly that.
    truth = relative(0, 2)
    angle = math.radians(3)
    turn = np.eye(4)
    turn[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    record = protocol.evaluate_pair(
        project(0), project(2), K, K, turn @ truth, Protocol(), identifier="s#0#2"
    )
    assert record.rotation_error == pytest.approx(3, abs=1e-3)
    directions = truth[:3, 3], turn[:3, :3] @ truth[:3, 3]
    length = float(np.linalg.norm(directions[0]))
    between = math.degrees(math.acos(directions[0] @ directions[1] / length**2))
    assert record.translation_error == pytest.approx(between, abs=1e-2)
    assert record.translation_distance == pytest.approx(
        np.linalg.norm(directions[0] - directions[1]), abs=1e-3
    )


def test_outliers_are_counted() -> None:
    points1 = project(2).copy()
    points1[:50] = np.random.default_rng(1).uniform([0, 0], SIZE, (50, 2))
    record = protocol.evaluate_pair(
        project(0), points1, K, K, relative(0, 2), Protocol(), identifier="s#0#2"
    )
    assert 150 <= record.correct_before < 165
    assert record.precision_before == record.correct_before / 200
    assert record.precision_after > 0.97
    assert record.pose_error < 1


def test_epipolar_distance_by_hand() -> None:
    # Pure motion along x, identity K: lines are rows, the distance is 2 (y1 - y0)^2.
    motion = np.eye(4)
    motion[0, 3] = 1
    points0, points1 = np.array([[0.1, 0.2], [0.3, 0.4]]), np.array([[0.0, 0.2], [0.3, 0.5]])
    distance = protocol.epipolar_distance(points0, points1, np.eye(3), np.eye(3), motion)
    np.testing.assert_allclose(distance, [0, 2 * 0.1**2], atol=1e-15)


@pytest.mark.parametrize("count", [0, 4])
def test_too_few_matches_fail(count: int) -> None:
    record = protocol.evaluate_pair(
        project(0)[:count], project(2)[:count], K, K, relative(0, 2), Protocol(), identifier="a#b#c"
    )
    assert record.failed
    assert record.translation_distance == math.inf
    assert record.correct_before == count
    assert (record.precision_after, record.correct_after) == (0.0, 0)


@pytest.mark.parametrize("count", [5, 30])
def test_degenerate_matches_do_not_stop_the_run(count: int) -> None:
    points = np.full((count, 2), 7.0)
    record = protocol.evaluate_pair(
        points, points, K, K, relative(0, 2), Protocol(), identifier="a#b#c"
    )
    assert record.pose_error > 5


def test_far_points_do_not_count_as_the_reference_has_it() -> None:
    # All points are 100 and more baselines away: no pose by OpenCV's limit of 50, one without it.
    points = POINTS * [20, 20, 1] + [0, 0, 150]
    truth = np.eye(4)
    truth[0, 3] = 1.0
    views = []
    for matrix in (np.eye(4), truth):
        pixels = (points @ matrix[:3, :3].T + matrix[:3, 3]) @ (K * [[100], [100], [1]]).T
        views.append(pixels[:, :2] / pixels[:, 2:])
    calibration = K * [[100], [100], [1]]
    judge = [
        protocol.evaluate_pair(*views, calibration, calibration, truth, p, identifier="a#b#c")
        for p in (Protocol(), Protocol(max_depth=1e9))
    ]
    assert judge[0].failed
    assert judge[0].correct_before == 200
    assert judge[0].correct_after == 0
    assert not judge[1].failed
    assert judge[1].correct_after > 190


def test_slip_is_the_references_scaling() -> None:
    kitti = datasets.find_set("KITTI")
    # The right end of a 1226 px image lies at 1226 / 1240 of the padded frame.
    end = np.array([[1225.5, 369.5]])
    slipped = run.slip(end, (1226, 370), kitti) + 0.5
    np.testing.assert_allclose(slipped, [[1226 * 1226 / 1240, 370 * 370 / 384]])
    gl3d = datasets.find_set("GL3D")
    np.testing.assert_array_equal(run.slip(end, (1226, 370), gl3d), end)


def test_protocol_names_tell_what_differs() -> None:
    assert Protocol().name == "gim"
    assert Protocol(padded_slip=True, threshold=1.0).name == "gim-1px-slip"
    with pytest.raises(InputError, match="usac"):
        Protocol.make("usac")
    with pytest.raises(InputError, match="positive threshold"):
        Protocol(threshold=0)


def test_poselib_is_asked_for(monkeypatch: pytest.MonkeyPatch, zeb: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install poselib"):
        Protocol.make("poselib")
    with pytest.raises(InputError, match="pip install poselib"):
        run.run(zeb, tmp_path / "out", replace(OPTIONS, protocols=("poselib",)))


def test_poselib_finds_the_pose() -> None:
    pytest.importorskip("poselib", reason="PoseLib is not installed")
    assert Protocol.make("poselib").name == "poselib-1px"
    # Matches are exact and the image is small: by a pixel, many of the wrong ones would pass.
    chosen = Protocol.make("poselib", threshold=0.05)
    assert chosen.name == "poselib-0.05px"
    points1 = project(2).copy()
    points1[:60] = np.random.default_rng(1).uniform([0, 0], SIZE, (60, 2))
    record = protocol.evaluate_pair(
        project(0), points1, K, K, relative(0, 2), chosen, identifier="s#0#2"
    )
    assert record.pose_error < 0.5
    assert record.precision_after > 0.9
    none = protocol.evaluate_pair(
        project(0)[:4], points1[:4], K, K, relative(0, 2), chosen, identifier="s#0#2"
    )
    assert none.failed


# ---------------------------------------------------------------------------------------------- run


def test_complete_run(zeb: Path, tmp_path: Path, oracle: type[Oracle]) -> None:
    report = run.run(zeb, tmp_path / "out", OPTIONS)
    dump = only_dump(report)
    assert dump.path == tmp_path / "out/dump/gim" / f"[T] {NAME}            GL3D v.txt"
    assert len(dump) == 30
    assert list(dump.identifiers) == sorted(dump.identifiers)
    assert float(dump.pose_errors.max()) < 0.1
    assert report.exit_code == 0
    assert report.matched == 30
    assert sorted(oracle.encoded) == sorted(f"{s}_{i}.png" for s in "ab" for i in range(IMAGES))
    assert report.seconds.keys() == {"total", "match", "judge"}


@pytest.mark.parametrize("stop", [1, 11])
def test_interrupted_and_resumed(
    zeb: Path, tmp_path: Path, oracle: type[Oracle], monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = only_dump(run.run(zeb, tmp_path / "whole", OPTIONS))
    oracle.matched.clear()
    monkeypatch.setattr(Oracle, "stop_after", stop)
    with pytest.raises(KeyboardInterrupt):
        run.run(zeb, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out/dump").exists()
    monkeypatch.setattr(Oracle, "stop_after", None)
    report = run.run(zeb, tmp_path / "out", OPTIONS)  # the same again
    assert report.matched == 30 - stop
    assert len(oracle.matched) == 30  # none twice
    dump = only_dump(report)
    assert dump.path is not None
    assert whole.path is not None
    assert dump.path.read_bytes() == whole.path.read_bytes()


def test_killed_between_prediction_and_evaluation(
    zeb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before = only_dump(run.run(zeb, tmp_path / "whole", OPTIONS))
    judge, judged = protocol.evaluate_pair, []

    def stops(*arguments: Any, **more: Any) -> Any:
        judged.append(more["identifier"])
        if len(judged) == 5:
            raise KeyboardInterrupt
        return judge(*arguments, **more)

    monkeypatch.setattr(protocol, "evaluate_pair", stops)
    with pytest.raises(KeyboardInterrupt):
        run.run(zeb, out, OPTIONS)
    assert not list(out.glob("dump/*/*"))
    report = run.run(zeb, out, OPTIONS)
    assert report.matched == 0
    assert len(judged) < 30 + 5  # some of the verdicts were kept
    assert only_dump(report).records == before.records


def test_another_protocol_uses_the_same_predictions(
    zeb: Path, tmp_path: Path, oracle: type[Oracle]
) -> None:
    pytest.importorskip("poselib")
    out = tmp_path / "out"
    run.run(zeb, out, OPTIONS)
    report = run.run(zeb, out, replace(OPTIONS, protocols=("gim", "poselib")))
    assert report.matched == 0
    assert [result.protocol for result in report.results] == ["gim", "poselib-1px"]
    assert len(list((out / "dump").glob("*/*.txt"))) == 2
    assert len(oracle.matched) == 30


def test_shards_make_one_dump(zeb: Path, tmp_path: Path, oracle: type[Oracle]) -> None:
    whole = only_dump(run.run(zeb, tmp_path / "whole", OPTIONS))
    oracle.matched.clear()
    out = tmp_path / "out"
    reports = [run.run(zeb, out, replace(OPTIONS, shard=f"{i}/4")) for i in (2, 0, 3)]
    assert [report.matched for report in reports] == [7, 7, 8]
    again = run.run(zeb, out, replace(OPTIONS, shard="2/4"))
    assert (again.matched, again.results[0].evaluated, again.results[0].dump) == (0, 7, None)
    # What no shard did is done by the run that puts them together.
    report = run.run(zeb, out, OPTIONS)
    assert report.matched == 8
    assert len(oracle.matched) == len(set(oracle.matched)) == 30
    assert only_dump(report).records == whole.records
    assert not list(out.rglob("*shard*"))
    # And a shard that comes late has nothing to do.
    assert run.run(zeb, out, replace(OPTIONS, shard="1/4")).matched == 0


def test_limit_is_a_sample_with_a_name_of_its_own(zeb: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = only_dump(run.run(zeb, out, replace(OPTIONS, limit=7)))
    assert few.version == "v-limit7-seed0"
    assert len(few) == 7
    other = only_dump(run.run(zeb, out, replace(OPTIONS, limit=7, seed=1)))
    assert other.identifiers != few.identifiers
    report = run.run(zeb, out, replace(OPTIONS))
    assert len(only_dump(report)) == 30
    assert report.matched == 30 - len({*few.identifiers, *other.identifiers})
    # And the other way round: parts of the whole run hold pairs that a sample leaves out.
    again = only_dump(run.run(zeb, out, replace(OPTIONS, limit=5)))
    assert len(again) == 5


def test_threads_for_ransac_and_batches_change_nothing(
    zeb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps = []
    for threads, batch in ((1, 1), (3, 3)):
        monkeypatch.setattr(runs.workers, "usable_cores", lambda count=threads: count)
        options = replace(OPTIONS, batch_size=batch)
        dumps.append(only_dump(run.run(zeb, tmp_path / str(batch), options)))
    assert dumps[0].records == dumps[1].records


def pair_set(zeb: Path) -> run.ZebPairs:
    return run.ZebPairs.read(datasets.find_root(zeb), datasets.find_set("GL3D"))


def test_predictions_are_found_for_pictures(zeb: Path, tmp_path: Path) -> None:
    run.run(zeb, tmp_path / "out", OPTIONS)
    keys = pair_set(zeb).keys()
    found = find_predictions(tmp_path / "out", NAME, keys).read(["a#0#3", "a#1#7"])
    assert list(found) == ["a#0#3"]
    prediction = found["a#0#3"]
    np.testing.assert_allclose(prediction.points1, project(3), atol=1e-4)
    assert prediction.size0 == SIZE
    with pytest.raises(InputError, match="nobody"):
        find_predictions(tmp_path / "out", "nobody", keys)


# --------------------------------------------------------------------------------------- bad inputs


def test_a_device_that_failed_stops_the_run(
    zeb: Path, tmp_path: Path, oracle: type[Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise all pairs after it would count as ones that cannot be matched."""
    monkeypatch.setattr(Oracle, "poison", "b_5.png")
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(Oracle, "error", error)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.run(zeb, tmp_path / "out", OPTIONS)
    monkeypatch.setattr(Oracle, "poison", "")
    again = run.run(zeb, tmp_path / "out", replace(OPTIONS))
    assert again.results[0].failures == 0


def test_bad_inputs_fail_by_name_and_the_rest_goes_on(
    zeb: Path, tmp_path: Path, oracle: type[Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = zeb / "zeb" / "gl3d"
    (folder / "a_1.png").unlink()  # five pairs
    (folder / "a_2.png").write_bytes(b"no image")  # four more
    few = folder / "b_0_1.txt"
    few.write_text("0.jpg 1.jpg 0.5 0.5 1 2")
    nan = folder / "b_0_2.txt"
    nan.write_text(nan.read_text().rsplit(" ", 5)[0] + " nan 0 0 0 1")
    singular = folder / "b_0_3.txt"
    tokens = singular.read_text().split()
    singular.write_text(" ".join([*tokens[:4], *["0"] * 9, *tokens[13:]]))
    monkeypatch.setattr(Oracle, "poison", "b_5.png")  # five
    report = run.run(zeb, tmp_path / "out", OPTIONS)
    assert report.exit_code == 1
    dump = only_dump(report)
    assert len(dump) == 30
    assert dump.failures == report.results[0].failures == 17
    assert float(np.sort(dump.pose_errors)[: 30 - 17].max()) < 0.1
    messages = {problem.identifier: str(problem) for problem in report.problems}
    assert len(messages) == 17
    assert "b_0_1.txt: the line has 6 tokens" in messages["b#0#1"]
    assert "pose is not finite" in messages["b#0#2"]
    assert "K0 is singular" in messages["b#0#3"]
    assert "a_1.png cannot be read" in messages["a#0#1"]
    assert "a_2.png cannot be read" in messages["a#2#4"]
    assert "ValueError: poisoned" in messages["b#4#5"]
    assert next(r for r in dump.records if r.identifier == "b#0#1").covisible0 == 0.5

    # What can be mended is tried again.
    for i in (1, 2):
        Image.new("RGB", SIZE, (i, 9, 9)).save(folder / f"a_{i}.png")
    monkeypatch.setattr(Oracle, "poison", "")
    oracle.matched.clear()
    again = run.run(zeb, tmp_path / "out", replace(OPTIONS))
    assert len(again.problems) == 3
    assert len(oracle.matched) == 14
    assert only_dump(again).failures == 3


def test_damage_heals(
    zeb: Path, tmp_path: Path, oracle: type[Oracle], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    before = only_dump(run.run(zeb, out, OPTIONS))
    [path] = out.glob("predictions/*.db")
    content = bytearray(path.read_bytes())
    pair = pair_set(zeb).keys()["b#1#4"]
    prediction = find_predictions(out, NAME, {"": pair}).read()[""]
    place = content.index(prediction.points1.tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    oracle.matched.clear()
    report = run.run(zeb, out, OPTIONS)
    assert "damaged" in caplog.text
    [(_, image1)] = oracle.matched  # the first pair with these points
    assert image1.endswith("_4.png")
    assert only_dump(report).records == before.records


def test_another_version_of_the_estimator_judges_anew(
    zeb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run.run(zeb, out, OPTIONS)
    judged: list[str] = []
    judge = protocol.evaluate_pair

    def counts(*arguments: Any, **more: Any) -> Any:
        judged.append(more["identifier"])
        return judge(*arguments, **more)

    monkeypatch.setattr(protocol, "evaluate_pair", counts)
    assert run.run(zeb, out, OPTIONS).matched == 0
    assert not judged
    monkeypatch.setattr(runs, "estimator_version", lambda estimator: "opencv 1.0")
    assert run.run(zeb, out, OPTIONS).matched == 0
    assert len(judged) == 30


def test_predictions_of_0_1_are_refused_by_one_line(zeb: Path, tmp_path: Path) -> None:
    old = tmp_path / "out" / "predictions" / f"{NAME}-01234567" / "gl3d" / "0123.npz"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"")
    with pytest.raises(OutputError, match=r"of an older gim-hloc.*choose another --out"):
        run.run(zeb, tmp_path / "out", OPTIONS)
    with pytest.raises(OutputError, match="of an older gim-hloc"):
        find_predictions(tmp_path / "out", NAME, {})
    assert old.exists()


def test_a_second_run_in_the_folder_is_refused(zeb: Path, tmp_path: Path) -> None:
    with FolderLock(tmp_path / "out"):
        for shard in (None, "0/2"):
            with pytest.raises(LockedError, match="Another run is working in"):
                run.run(zeb, tmp_path / "out", replace(OPTIONS, shard=shard))
    with FolderLock(tmp_path / "out", "shard-1-of-2"):
        with pytest.raises(LockedError):
            run.run(zeb, tmp_path / "out", OPTIONS)
        assert run.run(zeb, tmp_path / "out", replace(OPTIONS, shard="0/2")).matched == 15


def test_wrong_names_stop_before_work(zeb: Path, tmp_path: Path, oracle: type[Oracle]) -> None:
    with pytest.raises(InputError, match="zeb_orakel"):
        run.run(zeb, tmp_path / "out", replace(OPTIONS, matchers=(NAME, "zeb_orakel")))
    with pytest.raises(InputError, match="KITTI is not unpacked"):
        run.run(zeb, tmp_path / "out", replace(OPTIONS, sets=("GL3D", "KITTI")))
    with pytest.raises(InputError, match="seed is -1"):
        replace(OPTIONS, seed=-1)
    with pytest.raises(InputError, match="--shard is '4/4'"):
        replace(OPTIONS, shard="4/4")
    with pytest.raises(InputError, match="No matcher"):
        replace(OPTIONS, matchers=())
    with pytest.raises(InputError, match="no folder of a ZEB set"):
        run.run(tmp_path, tmp_path / "out", OPTIONS)
    assert not oracle.encoded


def test_missing_weights_stop_before_work(
    zeb: Path, tmp_path: Path, oracle: type[Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    def locate(name: str, **_: object) -> Path:
        raise WeightsError(f"no {name}")

    monkeypatch.setattr(weights, "locate", locate)
    # The first of them needs none and would run for hours.
    several = replace(OPTIONS, matchers=(NAME, "gim_dkm"))
    with pytest.raises(WeightsError, match="no gim_dkm_100h"):
        run.run(zeb, tmp_path / "out", several)
    assert not oracle.encoded
    assert not list(tmp_path.glob("out/predictions/*"))


def test_what_is_named_twice_runs_once(zeb: Path, tmp_path: Path) -> None:
    twice = replace(OPTIONS, matchers=(NAME, NAME), sets=("GL3D", "gl3"), protocols=("gim", "gim"))
    report = run.run(zeb, tmp_path / "out", twice)
    assert len(report.results) == 1


def test_the_references_options_are_options_of_the_matchers() -> None:
    from gim_hloc.matchers.dkm import DKMOptions
    from gim_hloc.matchers.lightglue import SparseOptions
    from gim_hloc.matchers.loftr import LoFTROptions
    from gim_hloc.matchers.roma import RoMaOptions

    kinds = {
        "gim_dkm": DKMOptions, "gim_roma": RoMaOptions, "gim_loftr": LoFTROptions,
        "gim_lightglue": SparseOptions,
    }  # fmt: skip
    for name, kind in kinds.items():
        assert run.reference_options(name)
        kind(**run.reference_options(name))  # raises on a field or value that is none
    assert run.reference_options("gim_dkm")["size"] == (660, 880)
    assert not run.reference_options("sift")


# -------------------------------------------------------------------------------------- real images


@pytest.mark.skipif(not MINI.is_dir(), reason="needs ../shared/data/zeb-mini")
def test_root_sift_agrees_with_the_reference(tmp_path: Path) -> None:
    report = run.run(
        MINI, tmp_path, RunOptions(matchers=("root_sift",), sets=("RobotcarSeason",), version="v")
    )
    mine = only_dump(report)
    path = next((MINI / "reference-root_sift").glob("*RobotcarSeason*"))
    reference = read_dump(path)
    assert mine.identifiers == reference.identifiers
    for a, b in zip(mine.records, reference.records, strict=True):
        assert (a.covisible0, a.covisible1) == (b.covisible0, b.covisible1)
        # No RANSAC in these: the same matches, judged alike.
        assert abs(a.correct_before - b.correct_before) <= 1
        assert a.precision_before == pytest.approx(b.precision_before, abs=0.01)
        # RANSAC draws differently, on few matches very differently.
        if b.correct_before > 100:
            assert a.correct_after == pytest.approx(b.correct_after, rel=0.05)
            assert abs(a.pose_error - b.pose_error) < 2


def test_results_follow_the_content_of_images(
    zeb: Path, tmp_path: Path, oracle: type[Oracle]
) -> None:
    """Pairs of two folders may have the same names, as those of a miniature and the whole."""
    run.run(zeb, tmp_path / "out", OPTIONS)
    oracle.matched.clear()
    shutil.copytree(zeb, tmp_path / "other")
    assert run.run(tmp_path / "other", tmp_path / "out", OPTIONS).matched == 0
    Image.new("RGB", SIZE, (1, 2, 3)).save(tmp_path / "other/zeb/gl3d/a_2.png")
    assert run.run(tmp_path / "other", tmp_path / "out", OPTIONS).matched == 5
    assert {name for pair in oracle.matched for name in pair} == {f"a_{i}.png" for i in range(6)}
    assert run.run(zeb, tmp_path / "out", OPTIONS).matched == 0
