"""The benchmark's measuring and judging, with stand-ins for both programs."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from gim_hloc.evaluation import sfm
from gim_hloc.evaluation.benchmarks import _hloc_driver, measure, vs_hloc

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")


def write_model(folder: Path, *, shift: float = 0.0) -> Path:
    """Write a COLMAP text model of four cameras, the last of them shifted."""
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text("1 PINHOLE 100 80 90 90 50 40\n")
    (folder / "points3D.txt").write_text("")
    generator = np.random.default_rng(0)
    lines = []
    for number in range(1, 5):
        rotation = Rotation.random(random_state=number)
        centre = generator.normal(size=3) + (shift if number == 4 else 0.0)
        x, y, z, w = rotation.as_quat()
        values = [w, x, y, z, *-rotation.apply(centre)]
        lines += [f"{number} {' '.join(map(repr, map(float, values)))} 1 {number}.jpg", ""]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    return folder


class TestMeasure:
    def test_time_and_output(self, tmp_path: Path) -> None:
        log = tmp_path / "logs" / "run.log"
        usage = measure.measured_run(
            [sys.executable, "-c", "import time; print('hello'); time.sleep(0.3)"], log=log
        )
        assert usage.wall_s >= 0.3
        assert usage.cpu_s < usage.wall_s
        assert log.read_text() == "hello\n"

    def test_memory_of_the_largest_process(self, tmp_path: Path) -> None:
        code = "x = bytearray({} << 20); x[::4096] = b'1' * len(x[::4096])"
        small, large = (
            measure.measured_run(
                [sys.executable, "-c", code.format(size)], log=tmp_path / "log"
            ).peak_rss_mib
            for size in (1, 201)
        )
        assert large - small == pytest.approx(200, abs=20)

    @linux
    def test_memory_of_all_processes_together(self, tmp_path: Path) -> None:
        worker = "import time; x = bytearray(b'1') * (100 << 20); time.sleep(1.5)"
        code = textwrap.dedent(
            f"""
            import subprocess, sys
            workers = [subprocess.Popen([sys.executable, "-c", {worker!r}]) for _ in range(3)]
            [worker.wait() for worker in workers]
            """
        )
        usage = measure.measured_run(
            [sys.executable, "-c", code], log=tmp_path / "log", interval_s=0.05
        )
        assert 300 < usage.peak_tree_mib < 450
        assert usage.peak_rss_mib < 200

    def test_a_failing_program_is_quoted(self, tmp_path: Path) -> None:
        code = "import sys; print('what went wrong'); sys.exit(3)"
        with pytest.raises(measure.BenchmarkError, match=r"code 3(.|\n)*what went wrong"):
            measure.measured_run([sys.executable, "-c", code], log=tmp_path / "log")
        with pytest.raises(measure.BenchmarkError, match="cannot start"):
            measure.measured_run([tmp_path / "nothing"], log=tmp_path / "log")

    @linux
    def test_our_own_memory_is_not_counted(self, tmp_path: Path) -> None:
        ballast = np.ones(40 << 20)  # 320 MiB
        usage = measure.measured_run([sys.executable, "-c", ""], log=tmp_path / "log")
        assert ballast[0] == 1
        assert usage.peak_rss_mib < 60

    def test_machine_and_versions(self, tmp_path: Path) -> None:
        machine = measure.machine()
        assert machine["cores"] >= 1
        assert machine["cpu"]
        json.dumps(machine)
        assert measure.versions(["numpy"])["numpy"] == np.__version__
        assert measure.versions(["no-such-package"])["no-such-package"] == "not installed"
        assert measure.commit(tmp_path) == "unknown"


class TestDriver:
    def test_stopwatch_adds_up_and_keeps_results(self) -> None:
        clock = _hloc_driver.Stopwatch()
        double = clock.wrap(lambda x: 2 * x, "map")
        assert [double(1), double(2)] == [2, 4]
        with pytest.raises(ZeroDivisionError), clock.stage("match"):
            raise ZeroDivisionError
        assert set(clock.seconds) == {"map", "match"}

    def test_intrinsics(self) -> None:
        assert _hloc_driver.image_options(None) is None
        assert _hloc_driver.image_options("PINHOLE,900,901,50,40") == {
            "camera_model": "PINHOLE",
            "camera_params": "900,901,50,40",
        }

    def test_stages_are_ours(self) -> None:
        assert set(_hloc_driver.RECONSTRUCTION_STAGES.values()) <= set(vs_hloc.STAGES)


STAND_IN = """
import json, pathlib, shutil, sys
{find_output}
output.mkdir()
shutil.copytree({model!r}, output / {place!r})
(output / {result!r}).write_text(json.dumps(
    dict(timings=dict(encode={seconds}), versions=dict(torch="0"), arguments=sys.argv)))
with open({order!r}, "a") as file:
    file.write({tool!r} + "\\n")
"""


class TestBenchmark:
    @pytest.fixture
    def truth(self, tmp_path: Path) -> Path:
        return write_model(tmp_path / "truth")

    @pytest.fixture
    def arguments(self, tmp_path: Path, truth: Path) -> list[str]:
        """A command line with stand-ins: both are right, and no measured bound can be missed."""
        images = tmp_path / "images"
        images.mkdir()
        (images / "1.jpg").write_bytes(b"not read by a stand-in")
        (tmp_path / "checkout").mkdir()
        self.stand_in(tmp_path, "hloc", truth, 0.02)
        self.stand_in(tmp_path, "ours", truth, 0.01)
        return [
            *("--hloc", str(tmp_path / "checkout"), "--with-hloc", str(tmp_path / "hloc.py")),
            *("--hloc-python", sys.executable, "--images", str(images), "--truth", str(truth)),
            *("--our-command", f"'{sys.executable}' '{tmp_path / 'ours.py'}'"),
            *("--json", str(tmp_path / "result.json"), "--output", str(tmp_path / "runs")),
            *("--max-time-ratio", "1e9", "--max-memory-ratio", "1e9"),
            "--no-warm-up",
        ]

    @staticmethod
    def stand_in(folder: Path, tool: str, model: Path, seconds: float) -> None:
        hloc = tool == "hloc"
        where = "sys.argv[sys.argv.index('--output') + 1]" if hloc else "sys.argv[2]"
        (folder / f"{tool}.py").write_text(
            STAND_IN.format(
                find_output=f"output = pathlib.Path({where})",
                seconds=seconds,
                model=str(model),
                place="sfm" if hloc else "sparse/0",
                result="timings.json" if hloc else "report.json",
                order=str(folder / "order.txt"),
                tool=tool,
            )
        )

    def test_alternates_and_writes_all_numbers(
        self, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = vs_hloc.main([*arguments, "--rounds", "2", "--intrinsics", "PINHOLE,90,90,50,40"])
        printed = capsys.readouterr().out
        assert code == 0, printed
        assert (tmp_path / "order.txt").read_text().split() == ["hloc", "ours"] * 2
        for word in ("cpu", "cores", "commit", "wall time", "encode", "auc@1"):
            assert word in printed
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["missed"] == []
        assert result["wall_ratio"] > 0
        assert [run["tool"] for run in result["runs"]] == ["hloc", "ours"] * 2
        assert result["hloc"]["pose"]["auc@1"] == pytest.approx(100)
        assert result["hloc"]["timings"]["encode"] == 0.02
        assert result["hloc"]["timings"]["start and end"] > 0

        hloc = json.loads((tmp_path / "runs/hloc-0/timings.json").read_text())["arguments"]
        ours = json.loads((tmp_path / "runs/ours-0/report.json").read_text())["arguments"]
        assert hloc[1] == str(tmp_path / "checkout")
        assert Path(hloc[2]) == vs_hloc.DRIVER
        for command in (hloc, ours):
            assert command[command.index("--intrinsics") + 1] == "PINHOLE,90,90,50,40"
        assert ours[ours.index("--max-keypoints") + 1] == "2048"
        assert hloc[hloc.index("--keypoints") + 1] == "2048"
        driver = _hloc_driver.parse_arguments(hloc[3:])
        assert (driver.keypoints, driver.detection_threshold) == (2048, 0.2)
        assert (driver.camera_mode, driver.half, driver.pairs) == ("SINGLE", False, None)

    def test_worse_poses_are_exit_code_1(
        self, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.stand_in(tmp_path, "ours", write_model(tmp_path / "worse", shift=0.1), 0.01)
        assert vs_hloc.main([*arguments, "--rounds", "1"]) == 1
        printed = capsys.readouterr().out
        assert "missed: auc@1" in printed
        assert "missed: centre_radius_mean" in printed
        assert "missed: wall time" not in printed

    @pytest.mark.parametrize(
        ("bound", "words"), [("time", "missed: wall time"), ("memory", "missed: peak memory")]
    )
    def test_missed_measures_are_exit_code_1(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str], bound: str, words: str
    ) -> None:
        code = vs_hloc.main([*arguments, "--rounds", "1", f"--max-{bound}-ratio", "1e-9"])
        assert code == 1
        assert words in capsys.readouterr().out

    def test_a_failure_is_exit_code_2(
        self, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "ours.py").write_text("raise SystemExit('no weights')")
        assert vs_hloc.main([*arguments, "--rounds", "1"]) == 2
        assert "no weights" in capsys.readouterr().err

    def test_used_folders_and_missing_paths_are_refused(
        self, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert vs_hloc.main([*arguments, "--hloc", str(tmp_path / "gone")]) == 2
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "old").touch()
        assert vs_hloc.main(arguments) == 2
        printed = capsys.readouterr().err
        assert "gone does not exist" in printed
        assert "not empty" in printed


class TestComparison:
    OPTIONS = vs_hloc.BenchmarkOptions(
        hloc=Path(), with_hloc=Path(), hloc_python=Path(), images=Path(), truth=Path()
    )

    @staticmethod
    def run(tool: vs_hloc.Tool, number: int, **usage: float) -> vs_hloc.Run:
        cameras = {f"{i}": (np.eye(3), np.array([i, i**2, 0.0])) for i in range(4)}  # on a parabola
        values = {"wall_s": 10.0, "cpu_s": 10.0, "peak_rss_mib": 100.0, "peak_tree_mib": 100.0}
        return vs_hloc.Run(
            tool=tool,
            round=number,
            usage=measure.Usage(**{**values, **usage}),
            timings={"encode": usage.get("wall_s", 10.0)},
            scores=sfm.evaluate(cameras, cameras),
            versions={},
        )

    def test_medians_of_the_rounds_are_compared(self) -> None:
        walls = {"hloc": (10.0, 12.0, 100.0), "ours": (6.0, 3.0, 9.0)}
        runs = [
            self.run(tool, i, wall_s=wall)
            for tool, times in walls.items()
            for i, wall in enumerate(times)
        ]
        theirs, ours, missed = vs_hloc.compare(runs, self.OPTIONS)
        assert (theirs.usage.wall_s, ours.usage.wall_s) == (12, 6)
        assert theirs.timings == {"encode": 12}
        assert not [line for line in missed if "wall time" in line]
        assert "0.500" in vs_hloc.table(theirs, ours)

    @pytest.mark.parametrize(
        ("usage", "words"),
        [
            ({"wall_s": 6.8}, "wall time"),
            ({"peak_tree_mib": 101.0}, "all processes"),
            ({"peak_rss_mib": 101.0}, "largest process"),
        ],
    )
    def test_each_bound(self, usage: dict[str, float], words: str) -> None:
        runs = [self.run("hloc", 0), self.run("ours", 0, **{"wall_s": 6.6, **usage})]
        missed = vs_hloc.compare(runs, self.OPTIONS)[2]
        assert [line for line in missed if words in line]
        assert len([line for line in missed if line.startswith(("wall", "peak"))]) == 1

    def test_pose_tolerances(self) -> None:
        limit = vs_hloc.pose_limit
        assert limit("auc@1", 90.0, self.OPTIONS) == pytest.approx(89.5)
        assert limit("registered", 11, self.OPTIONS) == 11
        assert limit("centre_radius_mean", 0.1, self.OPTIONS) == pytest.approx(0.105)

    def test_ratio_of_nothing_says_nothing(self) -> None:
        assert math.isnan(vs_hloc.ratio(1.0, 0.0))

    def test_options_have_the_issues_bounds(self) -> None:
        fields = {field.name: field.default for field in dataclasses.fields(self.OPTIONS)}
        assert (fields["max_time_ratio"], fields["max_memory_ratio"]) == (0.67, 1.0)
        assert (fields["keypoints"], fields["pairs"]) == (2048, "exhaustive")
