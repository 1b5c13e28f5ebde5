"""ZEB runs that are killed, spread over workers, or repeat the reference's slip."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from zeb_oracle import calibration, pose, project, register, run_and_kill, write_set

from gim_hloc.errors import GimError, InputError
from gim_hloc.evaluation import synthetic_dense
from gim_hloc.evaluation.zeb import protocol, run
from gim_hloc.evaluation.zeb.dumps import Dump, read_dump
from gim_hloc.evaluation.zeb.protocol import Protocol
from gim_hloc.evaluation.zeb.run import RunOptions, RunReport

MINI = Path(__file__).parents[2] / "shared" / "data" / "zeb-mini"
SPARSE, DENSE = "zeb_oracle_sparse", "zeb_oracle_dense"
IMAGES = 6  # 15 pairs

# Matches a pair in 50 ms, so that there is time to kill it between parts.
_SLOW = """
import sys
sys.path.insert(0, sys.argv[1])
from zeb_oracle import register
from gim_hloc.evaluation.zeb import run
register(sys.argv[2], delay=0.05)
options = run.RunOptions(matchers=(sys.argv[2],), version="v", part_pairs=2)
run.run(sys.argv[3], sys.argv[4], options)
"""


_TWO_WORKERS = """
import sys
from gim_hloc.evaluation.zeb import run
if __name__ == "__main__":
    options = run.RunOptions(matchers=("root_sift",), version="v")
    run.run_workers(sys.argv[1], sys.argv[2], options, ["cpu", "cpu"])
"""


@pytest.fixture(autouse=True)
def oracles() -> None:
    register(SPARSE)
    register(DENSE, kind="dense")


@pytest.fixture
def gl3d(tmp_path: Path) -> Path:
    write_set(tmp_path / "data", "gl3d", separator="_", suffix=".jpg", size=(64, 48), images=IMAGES)
    return tmp_path / "data"


def only_dump(report: RunReport) -> Dump:
    (result,) = report.results
    assert result.dump is not None
    return read_dump(result.dump)


# -------------------------------------------------------------------------------------- killed runs


def test_a_run_killed_by_the_system_resumes_to_the_same_dump(gl3d: Path, tmp_path: Path) -> None:
    options = RunOptions(matchers=(SPARSE,), version="v", part_pairs=2)
    whole = run.run(gl3d, tmp_path / "whole", options).results[0].dump
    assert whole is not None
    out = tmp_path / "killed"
    files = "predictions/*/gl3d/*.npz"
    run_and_kill(_SLOW, SPARSE, str(gl3d), str(out), out=out, files=files)
    assert not list(out.glob("dump/*/*"))
    report = run.run(gl3d, out, replace(options))
    assert 0 < report.matched < 15  # neither all nor none were done before
    again = report.results[0].dump
    assert again is not None
    assert again.read_bytes() == whole.read_bytes()


def test_a_worker_that_dies_is_named_and_the_others_finish(gl3d: Path, tmp_path: Path) -> None:
    # Blank images: what is matched is nothing, but it is matched.
    options = RunOptions(matchers=("root_sift",), version="v")
    killed: list[int] = []

    def kill_one() -> None:
        while not killed:
            children = multiprocessing.active_children()
            if len(children) == 2 and children[0].pid is not None:
                first = min(child.pid or 0 for child in children)
                os.kill(first, signal.SIGKILL)  # while it still starts
                killed.append(first)
            time.sleep(0.001)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    out = tmp_path / "out"
    report = run.run_workers(gl3d, out, options, ["cpu", "cpu"])
    thread.join()
    (message,) = report.lost
    assert "on cpu died (SIGKILL" in message
    assert "resumed" in message
    assert report.exit_code == 1
    (result,) = report.results
    assert result.dump is None
    assert result.evaluated == report.matched
    assert report.matched in (7, 8)
    again = run.run_workers(gl3d, out, replace(options), ["cpu"])
    assert again.exit_code == 0
    assert again.matched == 15 - report.matched
    assert len(only_dump(again)) == 15


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_caller_that_is_killed(gl3d: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", _TWO_WORKERS, str(gl3d), str(out)])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers: list[str] = []
    try:
        end = time.monotonic() + 120
        while len(workers) < 3:  # two and the tracker of multiprocessing
            assert process.poll() is None
            assert time.monotonic() < end
            workers = children.read_text().split()
            time.sleep(0.005)
    finally:
        process.kill()  # while the workers still start
    process.wait()
    end = time.monotonic() + 120
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)
    # Left alone they would have gone on to make their folders and match.
    assert not out.exists()


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------ workers


@pytest.fixture
def in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without processes, so that they know the oracle."""

    def work(source: run.Source, output: str, jobs: list[RunOptions]) -> list[Any]:
        return [run._run_job(source, output, job) for job in jobs]

    monkeypatch.setitem(run._MAPS, "processes", work)


@pytest.mark.usefixtures("in_line")
def test_workers_give_what_one_run_gives(gl3d: Path, tmp_path: Path) -> None:
    options = RunOptions(matchers=(SPARSE,), version="v")
    (gl3d / "zeb" / "gl3d" / "a_5.png").unlink()
    (gl3d / "zeb" / "gl3d" / "a_0_1.txt").write_text("0.jpg 1.jpg 0.5 0.5 1 2")
    one = run.run(gl3d, tmp_path / "one", options)
    many = run.run_workers(gl3d, tmp_path / "many", options, ["cpu", "cpu", "cpu"])
    assert only_dump(many).records == only_dump(one).records
    assert {str(p) for p in many.problems} == {str(p) for p in one.problems}
    assert len(many.problems) == len(one.problems) == 6
    assert many.matched == one.matched == 9
    assert many.results[0].failures == 6
    assert many.keys == one.keys
    assert 0 <= many.outside_of(SPARSE) <= 1
    assert many.seconds["total"] > 0


@pytest.mark.usefixtures("in_line")
def test_a_shard_is_split_over_workers(gl3d: Path, tmp_path: Path) -> None:
    options = RunOptions(matchers=(SPARSE,), version="v")
    out = tmp_path / "out"
    first = run.run_workers(gl3d, out, replace(options, shard=(0, 2)), ["cpu", "cpu"])
    assert first.matched == 7
    assert first.results[0].dump is None
    second = run.run_workers(gl3d, out, replace(options, shard=(1, 2)), ["cpu", "cpu"])
    assert second.matched == 8
    assert len(only_dump(second)) == 15


@pytest.mark.parametrize("lost", ["a_0.png", "a_5.png"])
def test_the_last_shard_counts_what_another_could_not_read(
    gl3d: Path, tmp_path: Path, lost: str
) -> None:
    (gl3d / "zeb" / "gl3d" / lost).unlink()
    options = RunOptions(matchers=(SPARSE,), version="v")
    whole = run.run(gl3d, tmp_path / "whole", options)
    shards = [run.run(gl3d, tmp_path / "parts", replace(options, shard=(i, 2))) for i in range(2)]
    assert shards[0].results[0].dump is None
    assert only_dump(shards[1]).records == only_dump(whole).records
    assert shards[1].results[0].failures == 5


def test_errors_of_all_workers_are_the_error(
    gl3d: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RunOptions(matchers=(SPARSE,), version="v")

    def stopped(source: run.Source, output: str, jobs: list[RunOptions]) -> list[Any]:
        return [run._Stopped(InputError("no weights")), run._Died("SIGSEGV")]

    monkeypatch.setitem(run._MAPS, "processes", stopped)
    with pytest.raises(InputError, match="no weights"):
        run.run_workers(gl3d, tmp_path / "out", options, ["cpu", "cpu"])
    monkeypatch.setitem(run._MAPS, "processes", lambda *_: [run._Died("SIGSEGV")])
    with pytest.raises(GimError, match=r"Worker 1 of 1 on cpu died \(SIGSEGV\)"):
        run.run_workers(gl3d, tmp_path / "out", options, ["cpu"])


def test_ray(gl3d: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The part of Ray that is used: tasks that start when they are fetched; one of them is lost.
    class RayError(Exception):
        pass

    class Task:
        def __init__(self, function: Any) -> None:
            self.function = function

        def options(self, **options: Any) -> Task:
            asked.append(options["num_gpus"])
            return self

        def remote(self, *arguments: Any) -> Any:
            return lambda: self.function(*arguments)

    def get(task: Any) -> Any:
        taken.append(task)
        if len(taken) == 2:
            raise RayError("The worker died unexpectedly.")
        return task()

    asked: list[int] = []
    taken: list[Any] = []
    fake = types.ModuleType("ray")
    fake.init = lambda **_: None  # type: ignore[attr-defined]
    fake.remote, fake.get = Task, get  # type: ignore[attr-defined]
    fake.exceptions = types.SimpleNamespace(RayError=RayError)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", fake)
    options = RunOptions(matchers=(SPARSE,), version="v")
    out = tmp_path / "out"
    report = run.run_workers(gl3d, out, options, ["cpu"] * 3, backend="ray")
    assert asked == [0, 0, 0]
    (message,) = report.lost
    assert "Worker 2 of 3 on cpu died (RayError: The worker died unexpectedly.)" in message
    assert (report.matched, report.exit_code) == (10, 1)
    taken.append(None)
    again = run.run_workers(gl3d, out, replace(options), ["cpu"], backend="ray")
    assert len(only_dump(again)) == 15

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="pip install"):
        run.run_workers(gl3d, tmp_path / "other", options, ["cpu"], backend="ray")


# ---------------------------------------------------------------------------------- the padded slip

KITTI_SIZE = (620, 188)  # padded to 1240x384


@pytest.fixture
def kitti(tmp_path: Path) -> Path:
    write_set(tmp_path / "data", "kitti", separator="-", suffix=".png", size=KITTI_SIZE, images=3)
    return tmp_path / "data"


SLIP = (Protocol(), Protocol(padded_slip=True))


def test_the_slip_moves_a_dense_matchers_points_as_the_reference_does(
    kitti: Path, tmp_path: Path
) -> None:
    options = RunOptions(matchers=(DENSE,), version="v", protocols=SLIP)
    report = run.run(kitti, tmp_path / "out", options)
    correct, slipped = (read_dump(result.dump) for result in report.results if result.dump)
    assert correct.pose_errors.max() < 0.1
    K = calibration(KITTI_SIZE)
    for record in slipped.records:
        i, j = (int(name[0]) for name in record.identifier.split("#")[1:])
        # The share of the padded frame, times the original size: corner to corner.
        moved = [
            (project(k, KITTI_SIZE).astype(np.float32) + 0.5) / [1240, 384] * KITTI_SIZE - 0.5
            for k in (i, j)
        ]
        truth = pose(j) @ np.linalg.inv(pose(i))
        distance = protocol.epipolar_distance(*moved, K, K, truth)
        assert record.correct_before == int((distance < protocol.CORRECT).sum())
    assert slipped.pose_errors.min() > 1
    # Predictions know no protocol: there are those of one run only.
    assert len(list((tmp_path / "out" / "predictions").iterdir())) == 1


def test_the_slip_leaves_sparse_matchers_alone(kitti: Path, tmp_path: Path) -> None:
    options = RunOptions(matchers=(SPARSE,), version="v", protocols=SLIP)
    report = run.run(kitti, tmp_path / "out", options)
    correct, slipped = (read_dump(result.dump) for result in report.results if result.dump)
    assert correct.records == slipped.records
    assert {result.protocol for result in report.results} == {"gim", "gim-slip"}


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
    options = RunOptions(matchers=(synthetic_dense.NAME,), version="v", protocols=SLIP)
    report = run.run(tmp_path / "data", tmp_path / "out", options)
    assert not report.problems
    correct, slipped = (read_dump(result.dump).records[0] for result in report.results)
    assert correct.precision_before > 0.99
    assert correct.pose_error < 1
    assert slipped.precision_before < correct.precision_before
    (prediction,) = run.find_predictions(tmp_path / "out", synthetic_dense.NAME, "KITTI").values()
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
    options = RunOptions(
        matchers=("root_sift",), sets=("KITTI",), version="v", limit=2, protocols=SLIP
    )
    report = run.run(MINI, tmp_path, options)
    correct, slipped = (read_dump(result.dump) for result in report.results if result.dump)
    assert correct.records == slipped.records
    assert len(correct) == 2
