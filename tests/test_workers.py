"""The pool of workers, with tasks whose results are known and whose workers die on command."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worker_tasks import Powers

from gim_hloc.errors import GimError, InputError, OutputError, WeightsError
from gim_hloc.workers import Where, parse_shard, run, shard

PROCESSES = Where(devices=("cpu", "cpu"))
pytestmark = pytest.mark.usefixtures("spawned_workers")
RAY = Where(engine="ray", workers=2, device="cpu")
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray (gim-hloc[ray]) is not installed"
)
ENGINES = [
    pytest.param(Where(), id="here"),
    pytest.param(PROCESSES, id="processes"),
    pytest.param(RAY, id="ray", marks=needs_ray),
]
DYING = [ENGINES[1], ENGINES[2]]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """Ray of this module, if a test starts it, finds the tasks and ends with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def results(task: Powers, where: Where, count: int = 12, chunk: int = 3) -> dict[int, int]:
    found: dict[int, int] = {}

    def done(item: int, result: Any) -> None:
        assert item not in found
        assert result.shape == (3,)
        found[item] = int(result[0])
        task.taken(item)

    run(task, range(count), where, done, chunk=chunk)
    return found


@pytest.mark.parametrize("where", ENGINES)
def test_every_engine_gives_every_result_once_and_what_workers_log(
    where: Where, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gim_hloc")
    task = Powers(tmp_path / "notes")

    assert results(task, where) == {i: i**2 for i in range(12)}
    work = [line for line in task.noted() if line != "open"]
    assert sorted(map(int, work)) == list(range(12))
    opened = [record for record in caplog.record_tuples if record[0] == "gim_hloc.powers"]
    assert opened
    assert all(level == logging.INFO and "opened on" in text for _, level, text in opened)


@pytest.mark.parametrize("where", DYING)
def test_a_dead_workers_items_go_to_another_and_none_is_done_twice(
    where: Where, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = Powers(tmp_path / "notes", dies_once_at=(4,))

    assert results(task, where) == {i: i**2 for i in range(12)}
    assert task.noted().count("3") == 1  # yielded before the death, in the same chunk
    assert task.noted().count("open") >= 2
    assert "died" in caplog.text


@pytest.mark.parametrize("where", DYING)
def test_items_that_kill_every_worker_are_named_and_the_rest_is_kept(
    where: Where, tmp_path: Path
) -> None:
    task, found = Powers(tmp_path / "n", dies_at=(4,)), set()

    def done(item: int, result: Any) -> None:
        found.add(item)
        task.taken(item)

    with pytest.raises(OutputError, match=r"2 workers died on 4, 5, .* memory") as e:
        run(task, range(6), where, done, chunk=3)

    assert 3 in found
    assert "kept" in str(e.value)


def test_the_signal_that_killed_a_worker_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="SIGKILL, perhaps out of memory"):
        results(Powers(tmp_path / "notes", dies_at=(0,)), Where(devices=("cpu",)), count=1)


@pytest.mark.parametrize("where", ENGINES)
def test_an_error_meant_for_users_comes_back_as_it_is(where: Where, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such weights"):
        results(
            Powers(tmp_path / "notes", raises_at=5, error=WeightsError("no such weights")), where
        )


@pytest.mark.parametrize("where", DYING)
def test_another_error_is_named_and_its_traceback_logged(
    where: Where, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "gim_hloc")
    task = Powers(tmp_path / "notes", raises_at=5, error=ZeroDivisionError("by nought"))

    with pytest.raises(GimError, match="ZeroDivisionError: by nought"):
        results(task, where)

    assert "in work" in caplog.text  # the function's line of the traceback


@pytest.mark.parametrize("where", DYING)
def test_items_are_taken_as_workers_become_free(where: Where, tmp_path: Path) -> None:
    taken, ahead, count = 0, [], 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(40):
            taken += 1
            yield item

    def done(item: int, result: Any) -> None:
        nonlocal count
        count += 1
        ahead.append(taken - count)

    run(Powers(tmp_path / "notes"), items(), where, done, chunk=2)

    assert count == 40
    assert max(ahead) <= 2 * 2 * 2  # workers, chunks of each, items of a chunk


@pytest.mark.parametrize("where", ENGINES)
def test_no_items_start_no_worker(where: Where, tmp_path: Path) -> None:
    assert results(Powers(tmp_path / "notes"), where, count=0) == {}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_caller(number: signal.Signals, tmp_path: Path) -> None:
    program = (
        "import signal\nfrom pathlib import Path\nfrom gim_hloc.workers import Where, run\n"
        "from worker_tasks import Sleeper\nif __name__ == '__main__':\n"
        # Which is ignored where pytest runs in the background of a shell.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"    run(Sleeper(Path({str(tmp_path)!r})), [1, 2], Where(devices=('cpu', 'cpu')), print)\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    caller = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while len(found := [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()]) < 2:
        assert caller.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(caller.pid, number)  # as a terminal does
    else:
        caller.send_signal(number)
    _, text = caller.communicate(timeout=30)

    while any(_alive(worker) for worker in found):
        time.sleep(0.05)
    assert text.decode().count("Traceback") == (1 if number == signal.SIGINT else 0)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_where_refuses_what_ray_cannot_do() -> None:
    with pytest.raises(InputError, match="--workers N and no --devices"):
        Where(engine="ray")
    with pytest.raises(InputError, match="--workers N and no --devices"):
        Where(engine="ray", workers=2, devices=("cpu",))


def test_ray_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(InputError, match=r'pip install "gim-hloc\[ray\]"'):
        results(Powers(tmp_path / "notes"), RAY)


@needs_ray
def test_a_cluster_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    def init(**options: Any) -> None:
        assert options["address"] == "auto"
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(InputError, match=r"does not answer .*10\.0\.0\.1:6379"):
        results(Powers(tmp_path / "notes"), RAY)


@needs_ray
def test_more_workers_than_ray_has_room_for_are_refused(tmp_path: Path) -> None:
    results(Powers(tmp_path / "notes"), RAY, count=2)  # Ray has begun, for two workers

    with pytest.raises(InputError, match="3 workers want a CPU each, Ray has 2"):
        results(Powers(tmp_path / "notes"), Where(engine="ray", workers=3, device="cpu"))


@given(st.lists(st.integers()), st.integers(1, 9))
def test_shards_are_all_items_in_their_order_and_of_one_size(items: list[int], count: int) -> None:
    parts = [shard(items, index, count) for index in range(count)]

    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_parse_shard() -> None:
    assert parse_shard("0/1") == (0, 1)
    assert parse_shard("3/4") == (3, 4)


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "1/2/3", "a/b", "", "0/0", "1/-2"])
def test_parse_shard_names_what_is_none(text: str) -> None:
    with pytest.raises(InputError, match=r"give i/N"):
        parse_shard(text)
