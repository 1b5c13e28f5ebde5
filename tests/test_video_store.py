"""Labels on disk: what is kept is read, whatever was killed, damaged or full in between."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gim_hloc.cache import Cache
from gim_hloc.errors import InputError, OutputError
from gim_hloc.training.video import store
from gim_hloc.training.video.folder import VideoFolder, VideoInfo, find_videos
from gim_hloc.training.video.store import LabelStore, LabelWriter, StoreInfo


def make_info(**changes: Any) -> StoreInfo:
    values: dict[str, Any] = {
        "video": "v",
        "labeller": "sift",
        "zoom": False,
        "steps": (10, 20),
        "size": (64, 48),
        "fps": 29.97,
        "gap": 10,
        "settings": {"fit": [0.5, 0.999999], "nested": {"a": (1, 2)}},
    }
    return StoreInfo(**{**values, **changes})


def labels_of(i: int, j: int, n: int = 3) -> np.ndarray:
    return np.random.default_rng((i, j)).uniform(0, 60, (n, 4)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels" / "sift.h5"


def content(path: Path) -> dict[tuple[int, int], bytes]:
    with LabelStore(path) as read:
        return {(i, j): read.read(i, j).tobytes() for i, j in read.pairs().tolist()}


def fill(path: Path, pairs: int = 3, **changes: Any) -> None:
    with LabelWriter(path, make_info(**changes)) as writer:
        for k in range(pairs):
            writer.put(k, k + 10, labels_of(k, k + 10, 100))
        writer.fail(pairs, pairs + 10, "7 matches")
        writer.write()


def expected(pairs: int = 3) -> dict[tuple[int, int], bytes]:
    return {(k, k + 10): labels_of(k, k + 10, 100).tobytes() for k in range(pairs)}


def write_as_0_1(path: Path, info: StoreInfo, pairs: int = 3) -> None:
    """The h5 file that gim-hloc 0.1 wrote: without checksums and without a cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", libver="latest") as file:
        for k in range(pairs):
            file.create_dataset(f"{k}_{k + 10}", data=labels_of(k, k + 10, 100))
        index = file.create_group("index")
        index["pairs"] = np.array([(k, k + 10) for k in range(pairs)], np.int64)
        index["counts"] = np.full(pairs, 100, np.int64)
        index["failed"] = np.array([(pairs, pairs + 10)], np.int64)
        index.create_dataset("reasons", data=["7 matches"], dtype=h5py.string_dtype())
        for name, value in vars(info).items():
            file.attrs[name] = info.to_json() if name == "settings" else value


def test_round_trip(path: Path) -> None:
    with LabelWriter(path, make_info()) as writer:
        writer.put(10, 20, labels_of(10, 20))
        writer.put(0, 10, labels_of(0, 10, 5))
        writer.fail(0, 20, "7 matches\nof µ")
        assert writer.read(0, 10).tobytes() == labels_of(0, 10, 5).tobytes()
        assert not path.exists()
        writer.write()
    with LabelStore(path) as read:
        assert read.pairs().tolist() == [[0, 10], [10, 20]]
        assert read.pairs().dtype == np.int64
        assert read.counts().tolist() == [5, 3]
        assert read.failures() == [(0, 20, "7 matches\nof µ")]
        assert read.read(10, 20).dtype == np.float32
        np.testing.assert_array_equal(read.read(10, 20), labels_of(10, 20))
        assert read.info.steps == (10, 20)
        assert read.info.size == (64, 48)
        with pytest.raises(InputError, match="7 matches"):
            read.read(0, 20)
        with pytest.raises(InputError, match="never tried"):
            read.read(5, 6)
    assert sorted(p.name for p in path.parent.iterdir()) == ["sift.cache", "sift.h5"]
    with h5py.File(path) as file:
        assert sorted(file) == ["0_10", "10_20", "index"]
        assert file.attrs["labeller"] == "sift"
        np.testing.assert_array_equal(file["10_20"][()], labels_of(10, 20))


_ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "fail", "write", "retry", "whole"]),
        st.integers(0, 4),
        st.sampled_from([(0, 1), (0, 2), (1, 2)]),
    ),
    max_size=15,
)


@settings(max_examples=12, deadline=None)
@given(_ACTIONS)
def test_any_history_reads_as_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int, tuple[int, int]]]
) -> None:
    """Runs in turn on the whole and on shards; files written and removed in between."""
    path = tmp_path_factory.mktemp("history") / "x.h5"
    done: dict[tuple[int, int], bytes] = {}
    failed: dict[tuple[int, int], str] = {}
    for number, (action, key, shard) in enumerate(actions):
        pair = (key, key + 10)
        with LabelWriter(path, make_info(), shard=shard) as writer:
            if action == "put" and pair not in done:
                writer.put(*pair, labels_of(*pair, number + 1))
                done[pair] = labels_of(*pair, number + 1).tobytes()
                failed.pop(pair, None)
            elif action == "fail" and pair not in done and pair not in failed:
                writer.fail(*pair, f"reason {number}")
                failed[pair] = f"reason {number}"
            elif action == "write" and shard == (0, 1):
                writer.write()
        if action == "whole":
            LabelWriter(path, make_info()).close()
            path.unlink(missing_ok=True)
    with LabelWriter(path, make_info()) as writer:
        writer.write()
    assert content(path) == done
    with LabelStore(path) as read:
        assert {(i, j): text for i, j, text in read.failures()} == failed
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.cache", "x.h5"]


def test_labels_win_over_failures(path: Path) -> None:
    """A pair that failed on one shard and was labelled by the next run has labels."""
    with LabelWriter(path, make_info(), shard=(0, 2)) as writer:
        writer.fail(0, 10, "error: no answer")
    with LabelWriter(path, make_info(), shard=(1, 2)) as writer:
        writer.put(0, 10, labels_of(0, 10))
    with LabelWriter(path, make_info()) as writer:
        assert writer.failures == {}
        assert writer.counts == {(0, 10): 3}


_KILLED = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_video_store import labels_of, make_info
from gim_hloc.training.video.store import LabelWriter
from pathlib import Path
with LabelWriter(Path(sys.argv[1]), make_info()) as writer:
    for k in range(100_000):
        writer.put(k, k + 10, labels_of(k, k + 10, 100))
        print(k, flush=True)
"""


def test_what_was_kept_survives_sigkill(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(200)]
    process.send_signal(signal.SIGKILL)
    told = [int(line) for line in [*lines, *process.stdout] if line.endswith("\n")]
    process.wait()
    assert len(told) >= 200
    with LabelWriter(path, make_info()) as writer:
        for k in told:
            assert writer.read(k, k + 10).tobytes() == labels_of(k, k + 10, 100).tobytes()


def test_other_settings_do_not_mix_and_come_back(path: Path) -> None:
    fill(path)
    before = path.read_bytes()
    with LabelWriter(path, make_info(settings={"fit": 1})) as writer:
        assert writer.counts == {}
        writer.put(0, 10, labels_of(0, 10, 7))
    assert path.read_bytes() == before  # stands until the others are complete
    # Which pairs are asked for does not decide labels.
    with LabelWriter(path, make_info(steps=(40,), gap=5)) as writer:
        assert len(writer.counts) == 3
    with LabelWriter(path, make_info(settings={"fit": 1})) as writer:
        writer.write()
    assert content(path) == {(0, 10): labels_of(0, 10, 7).tobytes()}
    with LabelWriter(path, make_info()) as writer:
        assert len(writer.counts) == 3
        writer.write()
    assert content(path) == expected()
    with LabelWriter(path, make_info(), overwrite=True) as writer:
        assert writer.counts == {}
    assert content(path) == expected()
    with LabelWriter(path, make_info(settings={"fit": 1})) as writer:
        assert list(writer.counts) == [(0, 10)]


def interrupted(function: Callable[..., None], after: int) -> Callable[..., None]:
    """The same until it was called so often."""
    calls = itertools.count()

    def called(*arguments: object) -> None:
        if next(calls) == after:
            raise KeyboardInterrupt
        function(*arguments)

    return called


def test_labels_of_0_1_are_read_and_taken_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_as_0_1(path, make_info())
    assert content(path) == expected()
    with LabelWriter(path, make_info()) as writer:
        assert writer.failures == {(3, 13): "7 matches"}
        writer.put(4, 14, labels_of(4, 14, 100))
        writer.write()
    assert content(path) == {**expected(), (4, 14): labels_of(4, 14, 100).tobytes()}
    # A kill while they are taken over loses none.
    path.with_suffix(".cache").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "put", interrupted(Cache.put, 2))
        with pytest.raises(KeyboardInterrupt):
            LabelWriter(path, make_info())
    # Of other settings they are kept for when these come back.
    write_as_0_1(path, make_info())
    with LabelWriter(path, make_info(zoom=True)) as writer:
        assert writer.counts == {}
        writer.write()
    with LabelWriter(path, make_info()) as writer:
        assert len(writer.counts) == 3


def test_unfinished_labels_of_0_1_are_refused(path: Path) -> None:
    parts = path.with_name("sift.h5.parts")
    parts.mkdir(parents=True)
    with pytest.raises(OutputError, match=r"sift\.h5\.parts.*0\.1.*delete"):
        LabelWriter(path, make_info())
    assert parts.is_dir()


@pytest.mark.parametrize("keeps", ["cache", "nothing"])
def test_every_flipped_byte_is_noticed_and_heals(path: Path, keeps: str) -> None:
    """No damage passes for labels: the file is written again, or its pairs are made again."""
    fill(path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(25):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        if keeps == "nothing":
            path.with_suffix(".cache").unlink(missing_ok=True)
        with LabelWriter(path, make_info()) as writer:
            for k in range(3):
                if (k, k + 10) not in writer.counts:
                    writer.put(k, k + 10, labels_of(k, k + 10, 100))
            writer.fail(3, 13, "7 matches")
            writer.write()
        assert content(path) == expected()


@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_entry_of_the_cache_is_read_or_made_again(path: Path, finished: bool) -> None:
    fill(path)
    place = path.with_suffix(".cache")
    whole = bytearray(place.read_bytes())
    at = whole.find(labels_of(1, 11, 100).tobytes()[:64])
    whole[at + 5] ^= 4
    place.write_bytes(whole)
    if not finished:
        path.unlink()
    with LabelWriter(path, make_info()) as writer:
        assert ((1, 11) in writer.counts) == finished
        assert {(0, 10), (2, 12)} <= set(writer.counts)
        if finished:
            np.testing.assert_array_equal(writer.read(1, 11), labels_of(1, 11, 100))


def test_a_full_disk_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path)
    before = path.read_bytes()
    with LabelWriter(path, make_info()) as writer:
        writer.put(5, 15, labels_of(5, 15))

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OutputError, match="No space left"):
                writer.write()

        # What ends cut off without an error is told by reading it back.
        def cut(place: Path) -> LabelStore:
            if place != path:
                os.truncate(place, place.stat().st_size // 2)
            return LabelStore(place)

        with monkeypatch.context() as patch:
            patch.setattr(store, "LabelStore", cut)
            with pytest.raises(OutputError, match="read back"):
                writer.write()
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["sift.cache", "sift.h5"]


@pytest.mark.parametrize("damage", [b"", b"\x89HDF\r\n\x1a\n" + b"x" * 90])
def test_damaged_file_is_named(path: Path, damage: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(damage)
    with pytest.raises(InputError, match=r"sift\.h5 is damaged.*gim-video label"):
        LabelStore(path)


def test_what_the_system_refuses_is_no_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path)
    before = path.read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with LabelWriter(path, make_info()) as writer:
        monkeypatch.setattr(h5py, "File", refuse)
        with pytest.raises(OutputError, match=r"sift\.h5 cannot be read.*Input/output"):
            writer.write()
    assert path.read_bytes() == before


def test_nothing_there(path: Path) -> None:
    with pytest.raises(InputError, match="label the video first"):
        LabelStore(path)


@pytest.mark.parametrize("bad", [np.zeros((0, 4)), np.zeros((3, 3)), np.zeros(4)])
def test_only_labels_are_written(path: Path, bad: np.ndarray) -> None:
    with (
        LabelWriter(path, make_info()) as writer,
        pytest.raises(ValueError, match=r"\(n, 4\)"),
    ):
        writer.put(0, 10, bad)


def test_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = VideoFolder(tmp_path / "v")
    info = VideoInfo(
        id="v",
        source="v.mp4",
        digest="abc",
        size=(64, 48),
        fps=29.97,
        frames=100,
        duration=3.3,
        image_format="png",
        quality=95,
        max_size=None,
    )
    with pytest.raises(InputError, match="no labelled video"):
        find_videos(tmp_path)
    (folder.root / "frames").mkdir(parents=True)
    with pytest.raises(OutputError, match="holds frames that gim-video did not make"):
        folder.write_info(info)
    (folder.root / "frames").rmdir()
    folder.write_info(info)
    folder.write_info(info)
    assert folder.info == info
    assert folder.frame_path(120) == tmp_path / "v" / "frames" / "00000120.png"
    assert [f.id for f in find_videos(tmp_path)] == ["v"]
    assert [f.id for f in find_videos(tmp_path / "v")] == ["v"]
    with pytest.raises(OutputError, match="digest"):
        folder.write_info(VideoInfo(**{**vars(info), "digest": "other"}))
    with pytest.raises(InputError, match="no finished labels"):
        folder.stores()
    for name, zoom in (("sift", False), ("sift", True), ("gim_dkm", False)):
        fill(folder.label_path(name, zoom), labeller=name, zoom=zoom)
    LabelWriter(folder.label_path("gim_dkm", True), make_info(zoom=True)).close()
    found = [(s.info.labeller, s.info.zoom) for s in folder.stores()]
    assert found == [("gim_dkm", False), ("sift", True), ("sift", False)]
    assert "gim_dkm-zoom is not finished" in caplog.text
    assert len(folder.stores(["sift"])) == 2
    (folder.root / "video.json").write_text("{}")
    with pytest.raises(InputError, match="not the folder"):
        _ = folder.info
