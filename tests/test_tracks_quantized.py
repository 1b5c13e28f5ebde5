"""hloc's aggregation, vectorised: the same numbers as the real hloc on the same matches.

The real one runs in its own environment where ``GIM_HLOC_HLOC_CHECKOUT``,
``GIM_HLOC_HLOC_PYTHON`` and ``GIM_HLOC_WITH_HLOC`` say where it is; ``data/quantized_golden.npz``
holds what it gave for ``golden_scene``, so that everybody else is held to its numbers too. Run this
file as a script with these variables set to write the golden file anew.
"""

from __future__ import annotations

import os
import subprocess
from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial import KDTree

from gim_hloc.errors import InputError
from gim_hloc.tracks.base import Pair, Tracks
from gim_hloc.tracks.quantized import QuantizedOptions, quantize

GOLDEN = Path(__file__).parent / "data" / "quantized_golden.npz"
SHARED = Path(__file__).parents[2] / "shared"
Raw = dict[Pair, tuple[np.ndarray, np.ndarray, np.ndarray]]
SETTINGS = {
    "8:2": QuantizedOptions(),
    "1:1": QuantizedOptions(max_error=1, cell_size=1),
    "4:4": QuantizedOptions(max_error=4, cell_size=4),
    "2.5:2": QuantizedOptions(max_error=2, cell_size=2.5),
    "3:2.5": QuantizedOptions(max_error=2.5, cell_size=3),
    "2:0.5": QuantizedOptions(max_error=0.5, cell_size=2),  # bins of side 0: places themselves
}


def limited(setting: str, limit: int | None) -> QuantizedOptions:
    values = SETTINGS[setting]
    return QuantizedOptions(
        max_error=values.max_error, cell_size=values.cell_size, max_keypoints=limit
    )


def scene(seed: int, *, lattice: bool, count: int = 60) -> Raw:
    """Matches of five images; ``lattice``: many equal places, halves and scores."""
    rng = np.random.default_rng(seed)
    names = ["a.jpg", "b.jpg", "c/d.jpg", "e.jpg", "f.jpg"]
    raw = {}
    for i, j in ((0, 1), (0, 2), (1, 2), (2, 3), (0, 3), (3, 4)):
        size = 0 if (i, j) == (3, 4) else count + 5 * j  # f.jpg matches nothing
        xy = rng.uniform(0, 40, (2, size, 2))
        scores = rng.uniform(0.05, 1, size)
        if lattice:
            xy = np.round(xy * 2) / 2
            scores = np.round(scores * 4) / 4
        raw[names[i], names[j]] = (
            xy[0].astype(np.float32),
            xy[1].astype(np.float32),
            scores.astype(np.float32),
        )
    return raw


# Which of equally good keypoints falls victim to the limit is up to numpy's sort, which differs
# between processors: the golden numbers leave that out.
GROUPS = [(False, 0), (False, 10000), (False, 25), (True, 0), (True, 10000)]
"""(many equal places and scores or none, keypoints an image at most or 0 for all)."""


def golden_scene(lattice: bool) -> Raw:
    return scene(7 + lattice, lattice=lattice, count=40)


def reference(raw: Raw, options: QuantizedOptions) -> Tracks:
    """hloc's algorithm in plain words, one match after the other."""
    counts: dict[str, int] = defaultdict(int)
    for pair in raw:
        for name in pair:
            counts[name] += 1
    cells: dict[str, dict] = defaultdict(dict)  # name -> cell -> number
    bins: dict[str, list] = defaultdict(list)  # name -> number -> {bin: score}
    side, fine = max(options.cell_size, options.max_error), int(options.max_error)

    def place(xy: np.ndarray, pitch: float) -> tuple:
        return tuple(xy if pitch <= 0 else np.round(np.round((xy + 0.5) / pitch) * pitch - 0.5, 2))

    rows: dict[tuple[Pair, int], list] = defaultdict(list)
    order = sorted(raw, key=lambda pair: (min(counts[pair[0]], counts[pair[1]]), pair))
    for pair in order:
        for end in (0, 1):
            name = pair[end]
            for xy, score in zip(raw[pair][end], raw[pair][2], strict=True):
                cell = place(xy, side)
                if cell not in cells[name]:
                    cells[name][cell] = len(cells[name])
                    bins[name].append({})
                number = cells[name][cell]
                rows[pair, end].append(number)
                own = bins[name][number]
                own[place(xy, fine)] = own.get(place(xy, fine), np.float32(0)) + score
    keypoints, values = {}, {}
    for name in {n for pair in raw for n in pair}:
        best = [max(own.items(), key=lambda item: item[1]) for own in bins[name]]
        xy = np.array([b[0] for b in best], np.float32).reshape(-1, 2)
        worth = np.array([b[1] for b in best], np.float32)
        if options.max_keypoints:
            kept = np.argsort(worth)[::-1][: options.max_keypoints]
            xy, worth = xy[kept], worth[kept]
        keypoints[name], values[name] = xy, worth
    matches, scores = {}, {}
    for pair in raw:
        ends = [np.array(rows[pair, end], np.int64) for end in (0, 1)]
        if options.max_keypoints:
            for end in (0, 1):
                if len(keypoints[pair[end]]) and len(raw[pair][end]):
                    distance, found = KDTree(keypoints[pair[end]]).query(raw[pair][end])
                    ends[end] = np.where(distance <= options.max_error, found, -1)
        best: list[dict] = [{}, {}]
        # Equal scores: the order in which numpy's sort leaves equal ids.
        valid = np.flatnonzero((ends[0] >= 0) & (ends[1] >= 0)) if len(ends[0]) else []
        ids = [ends[0][valid], ends[1][valid]]
        own = raw[pair][2][valid]
        for end in (0, 1):
            for k in np.argsort(ids[end]):
                if ids[end][k] not in best[end] or own[k] > own[best[end][ids[end][k]]]:
                    best[end][ids[end][k]] = k
        both = sorted(set(best[0].values()) & set(best[1].values()), key=lambda k: ids[0][k])
        matches[pair] = np.array([(ids[0][k], ids[1][k]) for k in both], np.int64).reshape(-1, 2)
        scores[pair] = np.array([own[k] for k in both], np.float32)
    return Tracks(keypoints=keypoints, matches=matches, scores=scores, keypoint_scores=values)


def assert_same(expected: Tracks, found: Tracks, *, half: bool = False) -> None:
    for name, xy in expected.keypoints.items():
        np.testing.assert_array_equal(found.keypoints[name], xy)
        np.testing.assert_array_equal(found.keypoint_scores[name], expected.keypoint_scores[name])
    for pair, rows in expected.matches.items():
        np.testing.assert_array_equal(found.matches[pair], rows)
        own = found.scores[pair].astype(np.float16) if half else found.scores[pair]
        np.testing.assert_array_equal(own, expected.scores[pair])


def names_of(raw: Raw) -> list[str]:
    return sorted({name for pair in raw for name in pair})


@pytest.mark.parametrize("lattice", [False, True])
@pytest.mark.parametrize("limit", [None, 10000, 25])
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_is_the_algorithm_in_plain_words(setting: str, limit: int | None, lattice: bool) -> None:
    options = limited(setting, limit)
    raw = scene(3, lattice=lattice)
    assert_same(reference(raw, options), quantize(names_of(raw), raw, options))


@st.composite
def raws(draw: st.DrawFn) -> Raw:
    names = ["a", "b", "c"]
    raw = {}
    for i, j in draw(st.sets(st.sampled_from([(0, 1), (0, 2), (1, 2)]), min_size=1)):
        count = draw(st.integers(0, 12))
        # Quarters meet bins, cells, their borders (half to even) and each other.
        quarters = hnp.arrays(np.int64, (2, count, 2), elements=st.integers(-8, 60))
        xy = draw(quarters).astype(np.float32) / 4
        scores = draw(hnp.arrays(np.int64, count, elements=st.integers(1, 4)))
        raw[names[i], names[j]] = (xy[0], xy[1], scores.astype(np.float32) / 4)
    return raw


@settings(max_examples=150, deadline=None)
@given(raw=raws(), setting=st.sampled_from(list(SETTINGS)), limit=st.sampled_from([None, 4, 999]))
def test_ties_borders_and_nothing(raw: Raw, setting: str, limit: int | None) -> None:
    options = limited(setting, limit)
    assert_same(reference(raw, options), quantize(names_of(raw), raw, options))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([30.0, 400.0, 3e5]))
def test_float_places(seed: int, spread: float) -> None:
    """Also places so far apart that no table holds them."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 150))
    raw: Raw = {
        pair: (
            rng.uniform(-spread, spread, (count, 2)).astype(np.float32),
            rng.uniform(0, 30, (count, 2)).astype(np.float32),
            rng.random(count, np.float32),
        )
        for pair in (("a", "b"), ("a", "c"))
    }
    for limit in (None, 20):
        options = QuantizedOptions(max_keypoints=limit)
        assert_same(reference(raw, options), quantize(names_of(raw), raw, options))


def test_what_comes_out_fits_together() -> None:
    raw = scene(0, lattice=False)
    tracks = quantize([*names_of(raw), "alone.jpg"], raw, QuantizedOptions(max_keypoints=30))
    assert len(tracks.keypoints["alone.jpg"]) == len(tracks.keypoints["f.jpg"]) == 0
    assert tracks.keypoints["alone.jpg"].shape == tracks.keypoints["f.jpg"].shape == (0, 2)
    assert len(tracks.matches["e.jpg", "f.jpg"]) == 0
    for (a, b), rows in tracks.matches.items():
        assert len(np.unique(rows[:, 0])) == len(np.unique(rows[:, 1])) == len(rows)
        for name, column in ((a, 0), (b, 1)):
            assert len(tracks.keypoints[name]) <= 30
            if len(rows):
                assert rows[:, column].max() < len(tracks.keypoints[name])
    # The lattice that this costs accuracy by: odd halves.
    assert set(np.unique(np.concatenate(list(tracks.keypoints.values())) % 2)) == {1.5}


def test_refuses_matches_that_do_not_fit() -> None:
    xy = np.zeros((3, 2), np.float32)
    with pytest.raises(InputError, match=r"a and b have 3 and 3 ends and 2 scores"):
        quantize(["a", "b"], {("a", "b"): (xy, xy, np.ones(2, np.float32))}, QuantizedOptions())
    for wrong in ({"max_error": 0}, {"cell_size": -1}, {"max_keypoints": 0}):
        with pytest.raises(InputError):
            QuantizedOptions(**wrong)


def run_hloc(raw: Raw, limit: int, folder: Path) -> dict[str, Tracks]:
    """What the real hloc makes of some matches, by setting."""
    folder.mkdir(parents=True)
    with h5py.File(folder / "raw.h5", "w") as file:
        for (a, b), arrays in raw.items():
            for name, array in zip(("keypoints0", "keypoints1", "scores"), arrays, strict=True):
                file[f"{a}/{b}/{name}"] = array
    (folder / "pairs.txt").write_text("\n".join(f"{a} {b}" for a, b in raw))
    tool = os.environ.get("GIM_HLOC_WITH_HLOC", SHARED / "tools" / "with_hloc.py")
    command = [os.environ["GIM_HLOC_HLOC_PYTHON"], tool, os.environ["GIM_HLOC_HLOC_CHECKOUT"]]
    command += [Path(__file__).with_name("hloc_tracks_driver.py")]
    command += [folder / "raw.h5", folder / "pairs.txt", folder / "hloc", str(limit), *SETTINGS]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        setting: read_hloc(folder / "hloc" / setting.replace(":", "-"), raw) for setting in SETTINGS
    }


def read_hloc(folder: Path, raw: Raw) -> Tracks:
    keypoints, values, matches, scores = {}, {}, {}, {}
    with h5py.File(folder / "features.h5") as file:
        for name in names_of(raw):
            group = file.get(name, {"keypoints": np.zeros((0, 2)), "score": np.zeros(0)})
            keypoints[name] = group["keypoints"][:].reshape(-1, 2).astype(np.float32)
            values[name] = group["score"][:].astype(np.float32)
    with h5py.File(folder / "matches.h5") as file:
        for a, b in raw:
            matches0 = file[f"{a}/{b}/matches0"][:]
            rows = np.flatnonzero(matches0 >= 0)
            matches[a, b] = np.stack([rows, matches0[rows]], 1).astype(np.int64)
            scores[a, b] = file[f"{a}/{b}/matching_scores0"][:][rows].astype(np.float32)
    return Tracks(keypoints=keypoints, matches=matches, scores=scores, keypoint_scores=values)


@pytest.mark.hloc
@pytest.mark.slow
@pytest.mark.parametrize(("lattice", "limit"), [*GROUPS, (True, 25)])
def test_same_as_the_real_hloc(lattice: bool, limit: int, tmp_path: Path) -> None:
    if not {"GIM_HLOC_HLOC_CHECKOUT", "GIM_HLOC_HLOC_PYTHON"} <= set(os.environ):
        pytest.skip("set GIM_HLOC_HLOC_CHECKOUT and GIM_HLOC_HLOC_PYTHON to run the real hloc")
    for seed in (0, 1):
        raw = scene(seed, lattice=lattice, count=400)
        theirs = run_hloc(raw, limit, tmp_path / str(seed))
        for setting, expected in theirs.items():
            found = quantize(names_of(raw), raw, limited(setting, limit or None))
            assert_same(expected, found, half=True)


def flattened(tracks: Tracks, raw: Raw) -> tuple[np.ndarray, np.ndarray]:
    """All keypoints with scores, then all matches with scores (K, 3), and the number of each."""
    blocks = [np.c_[tracks.keypoints[n], tracks.keypoint_scores[n]] for n in names_of(raw)]
    blocks += [np.c_[tracks.matches[p], tracks.scores[p].astype(np.float16)] for p in raw]
    return np.concatenate(blocks).astype(np.float32), np.array([len(b) for b in blocks], np.int16)


def test_same_as_hlocs_golden_numbers() -> None:
    with np.load(GOLDEN) as golden:
        stored = {key: golden[key] for key in golden.files}
    for lattice, limit in GROUPS:
        raw = golden_scene(lattice)
        for setting in SETTINGS:
            case = f"{lattice} {limit} {setting}"
            found = quantize(names_of(raw), raw, limited(setting, limit or None))
            values, counts = flattened(found, raw)
            np.testing.assert_array_equal(stored.pop(f"{case} counts"), counts, err_msg=case)
            np.testing.assert_array_equal(stored.pop(case), values, err_msg=case)
    assert not stored


def write_golden(folder: Path) -> None:
    """Write ``GOLDEN`` with the real hloc."""
    arrays = {}
    for lattice, limit in GROUPS:
        raw = golden_scene(lattice)
        for setting, tracks in run_hloc(raw, limit, folder / f"{lattice}{limit}").items():
            case = f"{lattice} {limit} {setting}"
            arrays[case], arrays[f"{case} counts"] = flattened(tracks, raw)
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        write_golden(Path(temporary))
