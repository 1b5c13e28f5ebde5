"""Lists of pairs run by shards and workers, and runs that are killed: the same as one run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from zeb_oracle import calibration, pose, register, run_and_kill

from gim_hloc.cli.zeb import main
from gim_hloc.errors import InputError, OutputError
from gim_hloc.evaluation import pair_lists
from gim_hloc.evaluation.pair_lists import PairOptions, PairReport
from gim_hloc.evaluation.zeb import run

NAME = "pair_workers_oracle"
SIZE = (64, 48)
IMAGES = 6  # 15 pairs

# Matches a pair in 50 ms and writes every second one, so that there is time to kill it between.
_SLOW = """
import functools, sys
sys.path.insert(0, sys.argv[1])
from zeb_oracle import register
from gim_hloc.evaluation import pair_lists
register(sys.argv[2], delay=0.05)
pair_lists.RunOptions = functools.partial(pair_lists.RunOptions, part_pairs=2)
pair_lists.evaluate(sys.argv[3], sys.argv[4], pair_lists.PairOptions(matchers=(sys.argv[2],)))
"""


@pytest.fixture(autouse=True)
def oracle() -> None:
    register(NAME)


@pytest.fixture
def pair_list(tmp_path: Path) -> Path:
    """A list of SuperGlue's format with images beside it."""
    folder = tmp_path / "data"
    folder.mkdir()
    K = calibration(SIZE)
    lines = []
    for i in range(IMAGES):
        Image.new("RGB", SIZE, (20 * i, 9, 9)).save(folder / f"{i}.png")
        for j in range(i + 1, IMAGES):
            numbers = [*K.ravel(), *K.ravel(), *(pose(j) @ np.linalg.inv(pose(i))).ravel()]
            lines.append(f"{i}.png {j}.png 0 0 {' '.join(repr(float(n)) for n in numbers)}")
    path = folder / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without processes, so that they know the oracle."""

    def work(source: run.Source, output: str, jobs: list[run.RunOptions]) -> list[Any]:
        return [run._run_job(source, output, job) for job in jobs]

    monkeypatch.setitem(run._MAPS, "processes", work)


def judged(path: Path, output: Path, **options: Any) -> PairReport:
    return pair_lists.evaluate(
        path, output, PairOptions(**{"matchers": (NAME,), "samples": 20, **options})
    )


def written(output: Path) -> dict[str, bytes]:
    """Dumps and results, without the seconds that a run took."""
    paths = [*output.glob("dump/*/*"), *output.glob("results/*/*")]
    return {str(p.relative_to(output)): p.read_bytes() for p in paths if p.suffix != ".json"}


def test_shards_make_the_whole_list(pair_list: Path, tmp_path: Path) -> None:
    whole = judged(pair_list, tmp_path / "whole")
    first = judged(pair_list, tmp_path / "parts", shard=(0, 2))
    assert (first.run.matched, first.rows, first.files) == (7, [], [])
    assert not first.complete
    assert not (tmp_path / "parts" / "results").exists()
    second = judged(pair_list, tmp_path / "parts", shard=(1, 2))
    assert second.run.matched == 8
    assert second.complete
    assert second.rows == whole.rows
    assert whole.rows[0].pairs == 15
    assert written(tmp_path / "parts") == written(tmp_path / "whole")
    assert len(written(tmp_path / "whole")) == 4
    with pytest.raises(OutputError, match="resume"):
        judged(pair_list, tmp_path / "parts", resume=False)


@pytest.mark.parametrize("lost", ["0.png", "5.png"])
def test_the_last_shard_counts_what_another_could_not_read(
    pair_list: Path, tmp_path: Path, lost: str
) -> None:
    image = (pair_list.parent / lost).read_bytes()
    (pair_list.parent / lost).unlink()
    whole = judged(pair_list, tmp_path / "whole")
    assert (whole.rows[0].failures, whole.exit_code) == (5, 1)
    reports = [judged(pair_list, tmp_path / "parts", shard=(i, 2)) for i in range(2)]
    assert reports[1].rows == whole.rows
    assert written(tmp_path / "parts") == written(tmp_path / "whole")
    # An image that is there again is matched, and nothing of its failure remains.
    (pair_list.parent / lost).write_bytes(image)
    again = judged(pair_list, tmp_path / "parts")
    assert (again.run.matched, again.rows[0].failures, again.exit_code) == (5, 0, 0)
    assert not list((tmp_path / "parts").glob("predictions/*/*/failed/*"))


@pytest.mark.usefixtures("in_line")
def test_workers_give_what_one_run_gives(
    pair_list: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pair_list.parent / "5.png").unlink()
    lines = pair_list.read_text().splitlines()
    pair_list.write_text("\n".join(["0.png 1.png 0 0 1 2", *lines[1:]]))
    one = judged(pair_list, tmp_path / "one", protocols=("gim",))
    monkeypatch.chdir(pair_list.parent)  # workers know no working directory
    many = judged(Path("list.txt"), tmp_path / "many", devices=("cpu", "cpu", "cpu"))
    assert many.rows == one.rows
    assert many.rows[0].failures == 6
    assert many.run.matched == one.run.matched == 9
    assert {str(p) for p in many.run.problems} == {str(p) for p in one.run.problems}
    assert written(tmp_path / "many") == written(tmp_path / "one")


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"]])
def test_each_problem_is_told_once(
    pair_list: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    devices: list[str],
) -> None:
    def work(source: run.Source, output: str, jobs: list[run.RunOptions]) -> list[Any]:
        logging.disable(logging.CRITICAL)  # nobody hears processes
        try:
            return [run._run_job(source, output, job) for job in jobs]
        finally:
            logging.disable(logging.NOTSET)

    monkeypatch.setitem(run._MAPS, "processes", work)
    (pair_list.parent / "5.png").unlink()
    lines = pair_list.read_text().splitlines()
    pair_list.write_text("\n".join(["0.png 1.png 0 0 1 2", *lines[1:]]))
    command = ["pairs", str(pair_list), "--matchers", NAME, "--out", str(tmp_path / "out")]
    assert main([*command, "--devices", *devices]) == 1
    error = capsys.readouterr().err
    assert error.count("6 tokens instead of 38") == 1
    assert error.count("5.png does not exist") + error.count("5.png cannot be read") == 5


def test_a_lost_worker_leaves_no_results(
    pair_list: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(source: run.Source, output: str, jobs: list[run.RunOptions]) -> list[Any]:
        return [run._run_job(source, output, jobs[0]), run._Died("SIGKILL")]

    monkeypatch.setitem(run._MAPS, "processes", work)
    report = judged(pair_list, tmp_path / "out", devices=("cpu", "cpu"))
    assert (report.rows, report.files, report.exit_code) == ([], [], 1)
    assert "Worker 2 of 2 on cpu died (SIGKILL)" in report.run.lost[0]
    again = judged(pair_list, tmp_path / "out")
    assert (again.run.matched, again.rows[0].pairs, again.exit_code) == (8, 15, 0)


def test_killed_and_resumed_gives_the_same(pair_list: Path, tmp_path: Path) -> None:
    judged(pair_list, tmp_path / "whole")
    out = tmp_path / "killed"
    files = "predictions/*/*/*.npz"
    run_and_kill(_SLOW, NAME, str(pair_list), str(out), out=out, files=files)
    assert not written(out)
    report = judged(pair_list, out)
    assert 0 < report.run.matched < 15  # neither all nor none were done before
    assert written(out) == written(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_on_the_command_line(
    pair_list: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((256, 192)).save(pair_list.parent / f"{i}.png")
    command = ["pairs", str(pair_list), "--matchers", "sift", "--k-size", "64x48", "--devices"]
    assert main([*command, "cpu", "cpu", "--out", str(tmp_path / "two")]) == 0
    assert "15 matched" in capsys.readouterr().out
    assert main([*command, "cpu", "--out", str(tmp_path / "one")]) == 0
    assert written(tmp_path / "two") == written(tmp_path / "one")


def test_what_a_shard_says(
    pair_list: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pairs", str(pair_list), "--matchers", NAME, "--out", str(tmp_path / "out")]
    assert main([*command, "--shard", "0/2"]) == 0
    out = capsys.readouterr().out
    assert f"{NAME} (gim): 7 of 15 pairs; results are written when all are judged" in out
    assert "AUC" not in out
    assert main([*command, "--shard", "1/2"]) == 0
    assert "AUC@5°" in capsys.readouterr().out
    assert main([*command, "--shard", "2/2"]) == 2
    assert "count from 0" in capsys.readouterr().err
    assert main([*command, "--shard", "one"]) == 2
    with pytest.raises(InputError, match="No device"):
        judged(pair_list, tmp_path / "none", devices=(), backend="ray")
