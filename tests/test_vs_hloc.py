"""Measuring and judging of the benchmarks that run programs, with stand-ins for these."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from synthetic import write_cameras

from gim_hloc.evaluation.benchmarks import _hloc_driver, measure, vs_hloc, vs_peers


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")
def test_time_and_memory_of_all_processes(tmp_path: Path) -> None:
    child = "import time; x = bytearray(b'1') * (60 << 20); time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('so')"
    usage = measure.measured_run([sys.executable, "-c", code], log=tmp_path / "logs" / "log")
    assert usage.wall_s >= 1
    assert 0 < usage.cpu_s < usage.wall_s
    assert 60 < usage.peak_mib < 120
    assert (tmp_path / "logs" / "log").read_text() == "so\n"


def test_a_failing_program_is_quoted(tmp_path: Path) -> None:
    code = "import sys; print('what went wrong'); sys.exit(3)"
    with pytest.raises(measure.BenchmarkError, match=r"code 3(.|\n)*what went wrong"):
        measure.measured_run([sys.executable, "-c", code], log=tmp_path / "log")
    with pytest.raises(measure.BenchmarkError, match="cannot start"):
        measure.measured_run([tmp_path / "nothing"], log=tmp_path / "log")


def test_machine_and_versions(tmp_path: Path) -> None:
    assert measure.machine()["cores"] >= 1
    json.dumps(measure.machine())
    assert measure.versions(["numpy"])["numpy"] == np.__version__
    assert measure.versions(["no-such-package"])["no-such-package"] == "not installed"
    assert measure.commit(tmp_path) == "unknown"


STAND_IN = """
import json, pathlib, shutil, sys, time
output, truth, place, times, seconds = sys.argv[1:]
time.sleep(float(seconds))
shutil.copytree(truth, pathlib.Path(output) / place)
(pathlib.Path(output) / times).write_text(json.dumps(dict(timings=dict(encode=float(seconds)))))
"""


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line with stand-ins: both are right, and ours takes a fraction of the time."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"not read by a stand-in")
    poses = sfm_poses()
    for name in ("truth", "ours"):
        write_cameras(poses, tmp_path / name)
    programs = {}
    for program, model, seconds in (("hloc", "truth", 0.6), ("ours", "ours", 0.05)):
        _, place, times = vs_hloc.PROGRAMS[program]

        def command(
            _: object, folder: Path, rest: tuple = (tmp_path / model, place, times, seconds)
        ) -> list[str]:
            return [sys.executable, "-S", "-c", STAND_IN, str(folder), *map(str, rest)]

        programs[program] = (command, place, times)
    monkeypatch.setattr(vs_hloc, "PROGRAMS", programs)
    monkeypatch.setattr(vs_hloc, "warm_up", lambda _: None)
    paths = ("--hloc", "--with-hloc", "--images")
    return [
        *(word for flag in paths for word in (flag, str(tmp_path / "images"))),
        *("--hloc-python", sys.executable, "--truth", str(tmp_path / "truth")),
        *("--json", str(tmp_path / "result.json"), "--rounds", "1"),
    ]


def sfm_poses() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {f"{i}.jpg": (np.eye(3), np.array([i, i**2, 0.0])) for i in range(4)}


def test_the_comparison_and_its_exit_codes(
    tmp_path: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vs_hloc, "MAX_MEMORY_RATIO", 1e9)  # stand-ins are too short to be sampled
    code = vs_hloc.main([*arguments, "--rounds", "2"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    for word in ("machine", "commit", "| wall time [s]", "|   encode [s] | 0.6 | 0.05 |", "auc@1"):
        assert word in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["missed"] == []
    assert [len(runs) for runs in result["runs"].values()] == [2, 2]
    assert result["runs"]["hloc"][0]["auc@1"] == pytest.approx(100)

    worse = sfm_poses()
    worse["3.jpg"][1][:] += 0.1
    write_cameras(worse, tmp_path / "ours")
    assert vs_hloc.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "missed: auc@1" in printed
    assert "missed: centre_radius_mean" in printed
    assert "missed: wall time" not in printed

    (tmp_path / "ours" / "images.txt").unlink()
    assert vs_hloc.main(arguments) == 2
    assert vs_hloc.main([*arguments, "--hloc", str(tmp_path / "gone")]) == 2
    assert "gone does not exist" in capsys.readouterr().err


def test_each_bound() -> None:
    theirs = {"wall time [s]": 10.0, "peak memory [MiB]": 100.0}
    theirs |= dict.fromkeys(vs_hloc.POSES, 90.0)
    better = theirs | {"wall time [s]": 6.6, "auc@1": 89.6, "rotation_mean": 94.0}
    assert vs_hloc.missed_bounds(theirs, better) == []
    for name, value in (
        *(("wall time [s]", 6.8), ("peak memory [MiB]", 101.0), ("registered", 89.0)),
        *(("auc@1", 89.4), ("rotation_mean", 95.0), ("centre_radius_mean", float("nan"))),
    ):
        (missed,) = vs_hloc.missed_bounds(theirs, better | {name: value})
        assert missed.startswith(name)
    runs = [{"a": value} for value in (1.0, 2.0, 30.0)]
    assert vs_hloc.medians(runs) == {"a": 2.0}


def test_both_are_asked_for_the_same() -> None:
    options = vs_hloc.BenchmarkOptions(
        hloc=Path("c"), with_hloc=Path("t"), hloc_python=Path("p"), images=Path("i"),
        truth=Path("t"), intrinsics="PINHOLE,90,90,50,40", our_args="--device cpu",
    )  # fmt: skip
    hloc = list(map(str, vs_hloc.hloc_command(options, Path("out"))))
    ours = list(map(str, vs_hloc.our_command(options, Path("out"))))
    driver = _hloc_driver.parse_arguments(hloc[4:])
    assert (driver.keypoints, driver.detection_threshold) == (2048, 0.2)
    assert (driver.camera_mode, driver.half, driver.pairs) == ("SINGLE", False, None)
    assert ours[ours.index("--max-keypoints") + 1] == "2048"
    assert ours[-2:] == ["--device", "cpu"]
    assert _hloc_driver.image_options(driver.intrinsics) == {
        "camera_model": "PINHOLE", "camera_params": "90,90,50,40",
    }  # fmt: skip
    assert _hloc_driver.image_options(None) is None
    clock = _hloc_driver.Stopwatch()
    double = clock.wrap(lambda x: 2 * x, "map")
    assert [double(1), double(2)] == [2, 4]
    assert set(clock.seconds) == {"map"}


def test_peers_are_judged_by_the_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = tmp_path / "scene"
    (scene / "images").mkdir(parents=True)
    for shade, name in enumerate(sfm_poses()):
        cv2.imwrite(str(scene / "images" / name), np.full((90, 120, 3), 60 * shade, np.uint8))
    worse = sfm_poses()
    worse["3.jpg"][1][:] += 0.1
    write_cameras(sfm_poses(), scene / "gt")
    write_cameras(worse, tmp_path / "worse")
    copy = (
        "import shutil, sys; out = sys.argv[2]; shutil.copytree(sys.argv[1], out + '/sparse'); "
        f"shutil.copytree({str(tmp_path / 'worse')!r}, out + '/.run/mapped')"  # not its result
    )
    base = f"{sys.executable} -S -c {shlex.quote(copy)}"
    result = tmp_path / "result.json"
    peers = (f"right={base} {scene}/gt {{out}}", f"wrong={base} {tmp_path}/worse {{out}}")
    arguments = [
        str(scene),
        "--no-sift",
        "--runs",
        "--intrinsics",
        "guessed",
        "--json",
        str(result),
    ]
    assert vs_peers.main([*arguments, "--peers", *peers]) == 0
    assert "| scene | right | 4 of 4 | 100.00 | 100.00 |" in capsys.readouterr().out
    right, wrong = json.loads(result.read_text())["rows"]
    assert right["auc@1"] == pytest.approx(100)
    assert wrong["auc@1"] < 90
    assert wrong["registered"] == 4
    for bad in (["--peers", "nothing"], ["--runs", "cascade"]):
        assert vs_peers.main([str(scene), *bad]) == 2
