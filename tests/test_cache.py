"""The cache: no kill, damage or other process gives a wrong entry or takes a right one."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gim_hloc import cache
from gim_hloc.cache import Cache
from gim_hloc.errors import LockedError, OutputError


@pytest.fixture(params=["log", "alone"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With write-ahead logging, and as on file systems that cannot have it."""
    if request.param == "alone":
        monkeypatch.setattr(cache, "_with_log", lambda path: None)
    return request.param


def arrays(number: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(number)
    return {
        "keypoints": generator.random((50 + number, 2), dtype=np.float32),
        "descriptors": generator.random((20, 8)).astype(np.float16),
        "size": np.array([640, 480]),
        "nothing": np.zeros((0, 2)),
        "name": np.array("Größe.jpg"),
    }


def same(a: dict[str, np.ndarray] | None, b: dict[str, np.ndarray]) -> bool:
    return (
        a is not None
        and list(a) == list(b)
        and all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in b)
    )


def filled(path: Path, count: int) -> list[str]:
    keys = [cache.key("entry", number) for number in range(count)]
    with Cache(path) as made:
        for number, key in enumerate(keys):
            made.put(key, arrays(number))
    return keys


def test_entries_come_back(tmp_path: Path, mode: str) -> None:
    keys = filled(tmp_path / "deep" / "a.db", 5)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.db"]
    with Cache(tmp_path / "deep" / "a.db") as read:
        assert read.keys() == keys
        assert len(read) == 5
        assert keys[0] in read
        assert "other" not in read
        assert read.get("other") is None
        for number, key in enumerate(keys):
            found = read.get(key)
            assert found is not None
            assert same(found, arrays(number))
            found["keypoints"][:] = 0  # the caller's own
        read.put(keys[2], arrays(77))
        assert same(read.get(keys[2]), arrays(77))
        with pytest.raises(TypeError):
            read.put("objects", {"x": np.array([None])})


def test_keys_depend_on_all_that_they_are_made_of() -> None:
    settings = {"size": 1024, "names": ["a", "b"]}
    assert cache.key("match", settings) == cache.key("match", dict(reversed(settings.items())))
    others = [{**settings, "size": 1025}, {**settings, "names": ["b", "a"]}]
    assert len({cache.key("match", each) for each in (settings, *others)}) == 3


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from gim_hloc import cache
from test_cache import arrays
if sys.argv[3] == "alone":
    cache._with_log = lambda path: None
made = cache.Cache(Path(sys.argv[2]))
for number in range(len(made), 10**6):
    made.put(cache.key("entry", number), arrays(number % 40))
    print(number, flush=True)
"""


def test_kills_take_nothing_acknowledged(tmp_path: Path, mode: str) -> None:
    path, here = tmp_path / "a.db", str(Path(__file__).parent)
    said = 0
    for wanted in (5, 100):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, here, str(path), mode], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            said = int(line)
            if said >= wanted:
                process.send_signal(signal.SIGKILL)
                break
        said = max([said, *map(int, process.stdout.read().split()[:-1])])
        process.wait()
        with Cache(path) as read:
            assert len(read) >= said + 1
            for number in range(said + 1):
                assert same(read.get(cache.key("entry", number)), arrays(number % 40))


def test_flipped_bytes_never_give_a_wrong_entry(
    tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = filled(tmp_path / "whole.db", 30)
    whole = (tmp_path / "whole.db").read_bytes()
    generator = np.random.default_rng(1)
    places = [*range(0, 100, 12), *generator.integers(100, len(whole), 12)]
    kept = 0
    for place in places:
        path = tmp_path / "a.db"
        data = bytearray(whole)
        data[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(data)
        with Cache(path) as read:
            for number, key in enumerate(keys):
                found = read.get(key)
                assert found is None or same(found, arrays(number))
                kept += found is not None
                read.put(key, arrays(number))
            assert all(same(read.get(key), arrays(n)) for n, key in enumerate(keys))
        assert {left.name for left in tmp_path.glob("a.db*")} <= {"a.db", "a.db.damaged"}
    assert kept > 0.95 * len(places) * len(keys)
    assert "computed again" in caplog.text


def test_entries_outside_the_damage_are_kept(tmp_path: Path, mode: str) -> None:
    """Pages full of nonsense in the middle, a file that is cut, a file of something else."""
    keys = filled(tmp_path / "whole.db", 60)
    whole = (tmp_path / "whole.db").read_bytes()
    middle = len(whole) // 2
    nonsense = whole[:middle] + b"\xa5" * 9000 + whole[middle + 9000 :]
    for data, least in ((nonsense, 30), (whole[: middle + 7], 15), (b"some text\n" * 99, 0)):
        (tmp_path / "a.db").write_bytes(data)
        with Cache(tmp_path / "a.db") as read:
            found = [read.get(key) for key in keys]
            assert sum(each is not None for each in found) >= least
            for number, key in enumerate(keys):
                assert found[number] is None or same(found[number], arrays(number))
                read.put(key, arrays(number))
        assert (tmp_path / "a.db.damaged").read_bytes()[100:] == data[100:]
        with Cache(tmp_path / "a.db") as read:
            assert all(same(read.get(key), arrays(number)) for number, key in enumerate(keys))


def test_files_of_workers_are_merged(tmp_path: Path, mode: str) -> None:
    first, second = tmp_path / "a.db", tmp_path / "b.db"
    with Cache(first) as made:
        for number in range(6):
            made.put(str(number), arrays(number))
    with Cache(second) as made:
        for number in range(4, 9):
            made.put(str(number), arrays(number))
    with Cache(first) as read:
        assert read.merge(second) == 3
        assert read.merge(second) == 0
        assert sorted(read.keys()) == [str(number) for number in range(9)]
        assert all(same(read.get(str(number)), arrays(number)) for number in range(9))


def test_prune(tmp_path: Path, mode: str) -> None:
    keys = filled(tmp_path / "a.db", 40)
    size = (tmp_path / "a.db").stat().st_size
    with Cache(tmp_path / "a.db") as read:
        assert read.prune({keys[3], "other"}) == 39
        assert read.keys() == [keys[3]]
        assert same(read.get(keys[3]), arrays(3))
    assert (tmp_path / "a.db").stat().st_size < size / 4


def test_a_full_disk_takes_nothing(tmp_path: Path, mode: str) -> None:
    keys = filled(tmp_path / "a.db", 5)
    with Cache(tmp_path / "a.db") as read:
        pages = read._database.execute("PRAGMA page_count").fetchone()[0]
        read._database.execute(f"PRAGMA max_page_count={pages + 3}")
        large = {"x": np.zeros(10_000)}
        with pytest.raises(OutputError, match=r"a\.db cannot be used \(database or disk is full"):
            read.put("large", large)
        read.put("small", {"x": np.zeros(2)})
        assert "large" not in read
        assert all(same(read.get(key), arrays(number)) for number, key in enumerate(keys))
    assert not list(tmp_path.glob("*.damaged"))


def test_a_file_that_grows_too_large_for_the_file_system(tmp_path: Path, mode: str) -> None:
    code = WRITER.replace(
        "for number",
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (90000, 90000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nfor number",
        1,
    )
    here = str(Path(__file__).parent)
    process = subprocess.run(
        [sys.executable, "-B", "-c", code, here, str(tmp_path / "a.db"), mode],
        capture_output=True,
        text=True,
    )
    assert "OutputError" in process.stderr
    said = [int(line) for line in process.stdout.split()]
    assert len(said) > 3
    with Cache(tmp_path / "a.db") as read:
        assert all(same(read.get(cache.key("entry", n)), arrays(n % 40)) for n in said)
    assert not list(tmp_path.glob("*.damaged"))


def test_what_another_process_holds_is_said(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_WAIT_SECONDS", 0.1)
    path = tmp_path / "a.db"
    keys = filled(path, 3)
    if mode == "alone":
        with Cache(path), pytest.raises(LockedError, match=r"holds .*a\.db"):
            Cache(path)
    else:
        with Cache(path) as read:
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LockedError, match=r"holds .*a\.db"):
                read.put("more", arrays(1))
            assert same(read.get(keys[1]), arrays(1))
            other.close()
            read.put("more", arrays(1))
    with Cache(path) as read:
        assert same(read.get(keys[2]), arrays(2))


def test_what_is_no_cache_is_left_alone(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE cameras (camera_id INTEGER)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"a\.db is no cache"):
        Cache(path)
    assert path.read_bytes()[100:] == before[100:]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder cannot be used"):
        Cache(tmp_path / "folder")
    assert os.listdir(tmp_path / "folder") == []


def test_an_entry_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LARGEST", 2000)
    with Cache(tmp_path / "a.db") as made:
        made.put("small", {"x": np.zeros(50)})
        with pytest.raises(OutputError, match=r"entry large has 9,\d+ bytes"):
            made.put("large", {"x": np.zeros(1200)})
