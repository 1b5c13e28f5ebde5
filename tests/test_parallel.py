"""Workers change no result: every way of spreading a reconstruction gives the same files."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

import forked
import pytest

from gim_hloc.cli import merge, reconstruct
from gim_hloc.evaluation.benchmarks import parallel
from gim_hloc.evaluation.benchmarks.parallel import Comparison, ParallelOptions

ROOM = Path(__file__).resolve().parents[1] / "examples" / "room" / "images"
WITH_RAY = ("ray", "killed") if importlib.util.find_spec("ray") else ()
COMMANDS = {"gim-reconstruct": reconstruct.main, "gim-merge": merge.main}


def run(command: Sequence[str]) -> None:
    program, *arguments = command
    assert forked.codes(COMMANDS[Path(program).name], arguments) == [0]


@pytest.mark.slow
def test_all_ways_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_run", run)  # forked: fifteen programs of four seconds' imports
    images = tmp_path / "images"
    images.mkdir()
    for photograph in sorted(ROOM.glob("*.jpg"))[:5]:
        shutil.copyfile(photograph, images / photograph.name)
    options = ParallelOptions(
        images=images,
        matcher="sift",
        max_size=640,
        ways=("one", "devices", "shards", *WITH_RAY),
    )
    rows = list(Comparison(options, tmp_path).rows())
    assert len(rows) == len(options.ways)
    assert [row.line() for row in rows if not all(row.same.values())] == []
    if not WITH_RAY:
        pytest.skip("Ray (gim-hloc[ray]) is not installed; the other ways agree")
