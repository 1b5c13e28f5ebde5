"""The Slurm example: its jobs, run in their order, leave what one run leaves."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Listener
from pathlib import Path

import forked
import pytest

from gim_hloc.cli import reconstruct
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

# ``gim-reconstruct`` as jobs call it: asks the test to fork it, as ten times its imports take long.
PROGRAM = """#!{python} -S
import sys
from multiprocessing.connection import Client
with Client({address!r}) as connection:
    connection.send(sys.argv[1:])
    sys.exit(connection.recv())
"""


@contextlib.contextmanager
def program(folder: Path) -> Iterator[Path]:
    def serve() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                with listener.accept() as connection:
                    (code,) = forked.codes(reconstruct.main, connection.recv())
                    connection.send(code)

    with Listener() as listener:
        path = folder / "gim-reconstruct"
        path.write_text(PROGRAM.format(python=sys.executable, address=listener.address))
        path.chmod(0o755)
        threading.Thread(target=serve, daemon=True).start()
        yield path


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt" or shutil.which("bash") is None, reason="needs bash")
def test_slurm_jobs_leave_what_one_run_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "six photographs"
    images.mkdir()
    for photograph in sorted((REPOSITORY / "examples/room/images").glob("*.jpg"))[:6]:
        shutil.copyfile(photograph, images / photograph.name)
    options = ["--matcher", "sift", "--max-size", "480", "--no-refine-keypoints"]
    submitted = tmp_path / "submitted"
    submitted.touch()
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "JOBS": "2",
        "SUBMITTED": str(submitted),
    }

    def go(*command: str | Path) -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    with program(tmp_path) as gim_reconstruct:
        go("bash", "-c", f'{STUB} bash "$@"', "bash", SCRIPT, images, "jobs", *options)
        go(gim_reconstruct, images, "one", *options, "--quiet")
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
