"""The Slurm example: its jobs, run in their order, leave what one run leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gim_hloc.evaluation.benchmarks.parallel import same_file

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "examples" / "slurm" / "reconstruct.sbatch"

# Runs a job, or all jobs of an array, before it tells its number. --dependency must be the last.
STUB = r"""
sbatch() {
    local array=0-0 dependency= wrap=
    while [ $# -gt 0 ]; do
        case $1 in
            --array=*) array=${1#*=} ;;
            --dependency=*) dependency=${1#*=} ;;
            --wrap) shift; wrap=$1 ;;
        esac
        shift
    done
    local number=$(($(wc -l < "$SUBMITTED") + 1))
    [ "$dependency" = "$([ "$number" = 1 ] || echo "afterok:$((number - 1))")" ] || return 1
    local first=${array%-*} final=${array#*-} task
    for task in $(seq "$first" "$final"); do
        SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=$((final - first + 1)) \
            sh -c "$wrap" >&2 || return 1
    done
    echo "$wrap" >> "$SUBMITTED"
    echo "$number"
}
export -f sbatch
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt" or shutil.which("bash") is None, reason="needs bash")
def test_slurm_jobs_leave_what_one_run_leaves(tmp_path: Path) -> None:
    images = tmp_path / "six photographs"
    images.mkdir()
    for photograph in sorted((REPOSITORY / "examples/room/images").glob("*.jpg"))[:6]:
        shutil.copyfile(photograph, images / photograph.name)
    options = ["--matcher", "sift", "--max-size", "480", "--no-refine-keypoints"]
    programs = Path(sys.executable).parent
    submitted = tmp_path / "submitted"
    submitted.touch()
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "JOBS": "2",
        "SUBMITTED": str(submitted),
    }

    def go(*command: str | Path) -> None:
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    go("bash", "-c", f'{STUB} bash "$@"', "bash", SCRIPT, images, "jobs", *options)
    go(programs / "gim-reconstruct", images, "one", *options, "--quiet")
    steps = [line.split("--quiet")[1].split() for line in submitted.read_text().splitlines()]
    assert [words[:2] for words in steps] == [
        ["--step", "encode"],
        ["--stop-after", "pairs"],
        ["--step", "match"],
        ["--stop-after", "rotations"],
        ["--step", "verify"],
        [],
    ]
    jobs, one = tmp_path / "jobs", tmp_path / "one"
    for name in ("features.h5", "matches.h5", "database.db", "pairs.txt"):
        assert same_file(jobs / name, one / name), name
    assert (jobs / "sparse" / "0" / "images.bin").is_file()
    log = (jobs / "log.txt").read_text(encoding="utf-8")
    assert "Encoded 0 images (6 reused)" in log
    assert "Matched 0 pairs (15 reused)" in log
