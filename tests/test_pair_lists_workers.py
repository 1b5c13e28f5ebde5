"""Lists of pairs run by shards and workers, and runs that are killed: the same as one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from zeb_oracle import SIZE, K, numbers, register, relative, run_and_kill

from gim_hloc.cli.zeb import main
from gim_hloc.errors import InputError
from gim_hloc.evaluation import pair_lists
from gim_hloc.evaluation.options import PairOptions
from gim_hloc.evaluation.pair_lists import PairReport

NAME = "pair_workers_oracle"
IMAGES = 6  # 15 pairs


def slow_run(pair_list: Path, out: Path) -> None:
    """A pair takes 50 ms, so that there is time to kill it between."""
    register(NAME, delay=0.05)
    pair_lists.evaluate(pair_list, out, PairOptions(matchers=(NAME,)))


@pytest.fixture(autouse=True)
def oracle() -> None:
    register(NAME)


@pytest.fixture
def pair_list(tmp_path: Path) -> Path:
    """A list of SuperGlue's format with images beside it."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i in range(IMAGES):
        Image.new("RGB", SIZE, (20 * i, 9, 9)).save(folder / f"{i}.png")
        for j in range(i + 1, IMAGES):
            lines.append(f"{i}.png {j}.png 0 0 {numbers(K, K, relative(i, j))}")
    path = folder / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


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
    parts = tmp_path / "parts"
    for shard, matched in (("0/2", 7), ("1/2", 8)):
        report = judged(pair_list, parts, shard=shard)
        assert (report.run.matched, report.rows, report.files) == (matched, [], [])
        assert not report.complete
        assert not (parts / "results").exists()
    report = judged(pair_list, parts)
    assert report.run.matched == 0
    assert report.complete
    assert report.rows == whole.rows
    assert whole.rows[0].pairs == 15
    assert written(parts) == written(tmp_path / "whole")
    assert len(written(tmp_path / "whole")) == 4


def test_an_image_that_is_there_again_is_matched(pair_list: Path, tmp_path: Path) -> None:
    image = (pair_list.parent / "5.png").read_bytes()
    (pair_list.parent / "5.png").unlink()
    whole = judged(pair_list, tmp_path / "out")
    assert (whole.rows[0].failures, whole.exit_code) == (5, 1)
    (pair_list.parent / "5.png").write_bytes(image)
    again = judged(pair_list, tmp_path / "out")
    assert (again.run.matched, again.rows[0].failures, again.exit_code) == (5, 0, 0)


def test_processes_give_what_one_run_gives(
    pair_list: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    generator = np.random.default_rng(0)
    for i in range(IMAGES - 1):
        pixels = generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((256, 192)).save(pair_list.parent / f"{i}.png")
    (pair_list.parent / "5.png").unlink()
    lines = pair_list.read_text().splitlines()
    pair_list.write_text("\n".join(["0.png 1.png 0 0 1 2", *lines[1:]]))
    monkeypatch.chdir(pair_list.parent)  # workers know no working directory
    command = ["pairs", "list.txt", "--matchers", "sift", "--k-size", "64x48", "--out"]
    for name, more in (("two", ["--devices", "cpu", "cpu"]), ("one", ["--device", "cpu"])):
        assert main([*command, str(tmp_path / name), *more]) == 1
        told = capsys.readouterr()
        assert "9 pairs matched" in told.out
        # Each problem once, whoever met it.
        assert told.err.count("6 tokens instead of 38") == 1
        assert told.err.count("5.png does not exist") + told.err.count("5.png cannot be read") == 5
    assert written(tmp_path / "two") == written(tmp_path / "one")


def test_killed_and_resumed_gives_the_same(pair_list: Path, tmp_path: Path) -> None:
    judged(pair_list, tmp_path / "whole")
    out = tmp_path / "killed"
    run_and_kill(slow_run, pair_list, out, out=out)
    assert not written(out)
    report = judged(pair_list, out)
    assert 0 < report.run.matched < 15  # neither all nor none were done before
    assert written(out) == written(tmp_path / "whole")


def test_what_a_shard_says(
    pair_list: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pairs", str(pair_list), "--matchers", NAME, "--out", str(tmp_path / "out")]
    assert main([*command, "--shard", "0/2"]) == 0
    out = capsys.readouterr().out
    assert f"{NAME} (gim): 7 of 15 pairs; the same command without --shard writes" in out
    assert "AUC" not in out
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "8 pairs matched" in out
    assert "AUC@5°" in out
    for wrong in ("2/2", "one"):
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--shard", wrong])
        assert "with i from 0 to N - 1" in capsys.readouterr().err
    with pytest.raises(InputError, match="give --workers N"):
        judged(pair_list, tmp_path / "none", engine="ray")
