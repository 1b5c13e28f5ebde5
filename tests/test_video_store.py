"""Stores of labels: what is written is read, whatever was killed in between."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gim_hloc.errors import InputError, OutputError
from gim_hloc.training.video.folder import VideoFolder, VideoInfo, find_videos
from gim_hloc.training.video.store import LabelStore, StoreInfo, begin_anew


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


def content(store: LabelStore) -> dict[tuple[int, int], bytes]:
    return {(i, j): store.read(i, j).tobytes() for i, j in store.pairs().tolist()}


def test_round_trip(path: Path) -> None:
    with LabelStore.open(path, "a", info=make_info()) as store:
        store.write(10, 20, labels_of(10, 20))
        store.write(0, 10, labels_of(0, 10, 5))
        store.fail(0, 20, "7 matches\nof µ")
        assert store.read(0, 10).tobytes() == labels_of(0, 10, 5).tobytes()
    for merged in (False, True):
        with LabelStore.open(path) as store:
            assert store.pairs().tolist() == [[0, 10], [10, 20]]
            assert store.pairs().dtype == np.int64
            assert store.counts().tolist() == [5, 3]
            assert store.failures() == [(0, 20, "7 matches\nof µ")]
            assert store.read(10, 20).dtype == np.float32
            np.testing.assert_array_equal(store.read(10, 20), labels_of(10, 20))
            assert store.attrs["steps"] == (10, 20)
            assert store.attrs["size"] == (64, 48)
            assert store.unmerged == (not merged)
            with pytest.raises(InputError, match="7 matches"):
                store.read(0, 20)
            with pytest.raises(InputError, match="never tried"):
                store.read(5, 6)
            with pytest.raises(OutputError, match="reading only"):
                store.write(1, 2, labels_of(1, 2))
            if not merged:
                store.merge()
    assert [p.name for p in path.parent.iterdir()] == ["sift.h5"]
    with h5py.File(path) as file:
        assert sorted(file) == ["0_10", "10_20", "index"]
        assert file.attrs["labeller"] == "sift"
        np.testing.assert_array_equal(file["10_20"][()], labels_of(10, 20))


def test_threads_read_what_they_ask_for(path: Path) -> None:
    pairs = [(k, k + 10) for k in range(40)]
    with LabelStore.open(path, "a", info=make_info()) as store:
        for i, j in pairs:
            store.write(i, j, labels_of(i, j, 500 + i))
    for merged in (False, True):
        with LabelStore.open(path) as store, ThreadPoolExecutor(8) as pool:
            for (i, j), labels in zip(
                pairs * 10, pool.map(lambda p: store.read(*p), pairs * 10), strict=True
            ):
                np.testing.assert_array_equal(labels, labels_of(i, j, 500 + i))
        if not merged:
            LabelStore.open(path).merge()


def test_torn_part_loses_its_last_record_only(path: Path) -> None:
    with LabelStore.open(path, "a", info=make_info()) as store:
        for k in range(3):
            store.write(k, k + 10, labels_of(k, k + 10))
        store.fail(3, 13, "because")
    (part,) = path.parent.glob("*.parts/*.part")
    whole = part.read_bytes()
    record = 32 + 48  # header and three labels
    last = 32 + len("because")
    starts = [len(whole) - last - 3 * record + k * record for k in range(4)]
    for length in range(starts[0], len(whole) + 1):
        part.write_bytes(whole[:length])
        with LabelStore.open(path) as store:
            complete = sum(start + record <= length for start in starts[:3])
            assert len(store.pairs()) == complete
            assert len(store.failures()) == (length == len(whole))
        assert part.stat().st_size == length  # a reader changes nothing
    part.write_bytes(whole[: starts[2] + 20])
    with LabelStore.open(path, "a", info=make_info()) as store:
        store.write(2, 12, labels_of(2, 12))
        store.write(4, 14, labels_of(4, 14))
    with LabelStore.open(path) as store:
        assert store.pairs()[:, 0].tolist() == [0, 1, 2, 4]
        np.testing.assert_array_equal(store.read(4, 14), labels_of(4, 14))


def test_a_flipped_bit_is_noticed(path: Path) -> None:
    with LabelStore.open(path, "a", info=make_info()) as store:
        store.write(0, 10, labels_of(0, 10))
        store.write(1, 11, labels_of(1, 11))
    (part,) = path.parent.glob("*.parts/*.part")
    whole = bytearray(part.read_bytes())
    whole[-1] ^= 4
    part.write_bytes(whole)
    with LabelStore.open(path) as store:
        assert store.pairs().tolist() == [[0, 10]]


def test_torn_first_record(path: Path) -> None:
    """Killed before the attributes were complete: nothing is lost, nothing is taken for labels."""
    LabelStore.open(path, "a", info=make_info(), part="x").close()
    (part,) = path.parent.glob("*.parts/*.part")
    part.write_bytes(part.read_bytes()[:-3])
    with pytest.raises(InputError, match="no labels"):
        LabelStore.open(path)
    with LabelStore.open(path, "a", info=make_info(), part="x") as store:
        store.write(0, 10, labels_of(0, 10))
    assert len(LabelStore.open(path).pairs()) == 1


_ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "fail", "merge", "reopen", "tear"]),
        st.integers(0, 4),
        st.sampled_from(["a", "b", "c"]),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(_ACTIONS)
def test_any_history_reads_as_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int, str]]
) -> None:
    """Writers in turn under several names, merges in between, tails torn by kills."""
    path = tmp_path_factory.mktemp("history") / "x.h5"
    done: dict[tuple[int, int], bytes] = {}
    failed: dict[tuple[int, int], str] = {}
    for number, (action, key, part) in enumerate(actions):
        pair = (key, key + 10)
        if action in ("write", "fail"):
            with LabelStore.open(path, "a", info=make_info(), part=part) as store:
                if action == "write" and pair not in done:
                    store.write(*pair, labels_of(*pair, number + 1))
                    done[pair] = labels_of(*pair, number + 1).tobytes()
                    failed.pop(pair, None)
                elif action == "fail" and pair not in done and pair not in failed:
                    store.fail(*pair, f"reason {number}")
                    failed[pair] = f"reason {number}"
        elif action == "merge" and (done or failed):
            LabelStore.open(path).merge()
        elif action == "tear":
            for file in path.parent.glob("*.parts/*.part"):
                with open(file, "ab") as stream:
                    stream.write(b"GLP1\x00\x01torn")
    if not done and not failed:
        return
    with LabelStore.open(path) as store:
        assert content(store) == done
        assert {(i, j): text for i, j, text in store.failures()} == failed


def test_labels_win_over_failures(path: Path) -> None:
    with LabelStore.open(path, "a", info=make_info(), part="a") as store:
        store.write(0, 10, labels_of(0, 10))
    with LabelStore.open(path, "a", info=make_info(), part="b") as store:
        assert store.forget_failures() == 0
        store.fail(0, 10, "no")
        assert store.failure(0, 10) is None
    assert LabelStore.open(path).failures() == []


def test_other_settings_are_refused(path: Path) -> None:
    with LabelStore.open(path, "a", info=make_info()) as store:
        store.write(0, 10, labels_of(0, 10))
    # Which pairs are asked for does not decide labels.
    LabelStore.open(path, "a", info=make_info(steps=(10,), gap=5), part="b").close()
    for change in ({"size": (10, 10)}, {"settings": {"fit": 1}}, {"labeller": "x"}, {"zoom": True}):
        for part in ("0", "c"):
            with pytest.raises(OutputError, match="other settings"):
                LabelStore.open(path, "a", info=make_info(**change), part=part)
    LabelStore.open(path).merge()
    with pytest.raises(OutputError, match=r"other settings \(fit, nested\)"):
        LabelStore.open(path, "a", info=make_info(settings={"fit": 1}))
    begin_anew(path)
    LabelStore.open(path, "a", info=make_info(settings={"fit": 1})).close()


def test_interrupted_merge_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LabelStore.open(path, "a", info=make_info()) as store:
        store.write(0, 10, labels_of(0, 10))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match="No space left"):
            LabelStore.open(path).merge()
    assert [p.name for p in path.parent.iterdir()] == ["sift.h5.parts"]
    # Killed between the rename and the removal of parts: both say the same.
    copy = path.parent / "copy"
    shutil.copytree(path.parent / "sift.h5.parts", copy)
    LabelStore.open(path).merge()
    shutil.copytree(copy, path.parent / "sift.h5.parts")
    with LabelStore.open(path) as store:
        assert content(store) == {(0, 10): labels_of(0, 10).tobytes()}


@pytest.mark.parametrize("damage", [b"", b"\x89HDF\r\n\x1a\n" + b"x" * 90])
def test_damaged_file_is_named(path: Path, damage: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(damage)
    with pytest.raises(OutputError, match=r"sift\.h5 is damaged"):
        LabelStore.open(path)


def test_nothing_there(path: Path) -> None:
    with pytest.raises(InputError, match="label the video first"):
        LabelStore.open(path)
    with pytest.raises(InputError, match="to begin it"):
        LabelStore.open(path, "a")


@pytest.mark.parametrize("bad", [np.zeros((0, 4)), np.zeros((3, 3)), np.zeros(4)])
def test_only_labels_are_written(path: Path, bad: np.ndarray) -> None:
    store = LabelStore.open(path, "a", info=make_info())
    with pytest.raises(ValueError, match=r"\(n, 4\)"):
        store.write(0, 10, bad)


def test_folders(tmp_path: Path) -> None:
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
    folder.write_info(info)
    folder.write_info(info)
    assert folder.info == info
    assert folder.frame_path(120) == tmp_path / "v" / "frames" / "00000120.png"
    assert [f.id for f in find_videos(tmp_path)] == ["v"]
    assert [f.id for f in find_videos(tmp_path / "v")] == ["v"]
    with pytest.raises(OutputError, match="digest"):
        folder.write_info(VideoInfo(**{**vars(info), "digest": "other"}))
    with pytest.raises(InputError, match="no labels"):
        folder.stores()
    for name, zoom in (("sift", False), ("sift", True), ("gim_dkm", False)):
        LabelStore.open(
            folder.label_path(name, zoom), "a", info=make_info(labeller=name, zoom=zoom)
        ).close()
    LabelStore.open(folder.label_path("sift", False)).merge()
    found = [(s.info.labeller, s.info.zoom) for s in folder.stores()]
    assert found == [("gim_dkm", False), ("sift", True), ("sift", False)]
    assert len(folder.stores(["sift"])) == 2
    (folder.root / "video.json").write_text("{}")
    with pytest.raises(InputError, match="not the folder"):
        _ = folder.info
