"""Propagation: the labels of the description in plain Python, exact truth, files that survive."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from slow_propagation import MadeUpVideo, SlowPropagation, as_rows, made_up_video

from gim_hloc.errors import InputError, LockedError
from gim_hloc.lock import FolderLock
from gim_hloc.training.video import propagation
from gim_hloc.training.video.options import PropagationOptions
from gim_hloc.training.video.propagated import PropagatedStore
from gim_hloc.training.video.propagation import (
    Propagator,
    find_starts,
    propagate,
    propagate_video,
    rounds_by_step,
)
from gim_hloc.training.video.store import LabelStore, LabelWriter, StoreInfo
from gim_hloc.workers import Where

Pair = tuple[int, int]

STEPS = (10, 20, 40)
SIZE = (64, 48)
SMALL = PropagationOptions(start_labels_above=3, min_joined=12, min_final=8)


def random_labels(
    seed: int, *, frames: int = 24, rounds: int = 2, gaps: float = 0.1, complete: bool = False
) -> dict[Pair, list[np.ndarray]]:
    """Labels as nasty as they come: shared pixels, halves, weak pairs, missing pairs and rounds.

    Points wander over few pixels, so that many rows fall on the same one and joins lose many.
    """
    generator = np.random.default_rng(seed)
    points = 60
    start = generator.uniform((0, 0), (SIZE[0] - 1, SIZE[1] - 1), (points, 2))
    drift = generator.normal(0, 0.25, (frames, points, 2)).cumsum(axis=0)
    tracks = np.clip(start + drift, 0, (SIZE[0] - 1, SIZE[1] - 1))
    labels: dict[Pair, list[np.ndarray]] = {}
    for step in STEPS:
        for k in range(frames - step // 10):
            pair = (10 * k, 10 * k + step)
            weak = generator.random() < gaps
            arrays = []
            for _ in range(rounds):
                if not complete and generator.random() < gaps / 2:
                    arrays.append(np.empty((0, 4), np.float32))
                    continue
                count = int(generator.integers(1, 10) if weak else generator.integers(20, 45))
                chosen = generator.permutation(points)[:count]
                rows = np.concatenate(
                    [tracks[k, chosen], tracks[k + step // 10, chosen]], axis=1
                ) + generator.normal(0, 0.2, (count, 4))
                rows = np.clip(rows, 0, (SIZE[0] - 1, SIZE[1] - 1) * 2)
                # Many halves: rounding them away from even would join other rows.
                rows = np.where(generator.random(rows.shape) < 0.3, np.floor(rows) + 0.5, rows)
                arrays.append(np.minimum(rows, (SIZE[0] - 1, SIZE[1] - 1) * 2).astype(np.float32))
            if complete or generator.random() >= gaps / 2:
                labels[pair] = arrays
    return labels


def slow(faults: bool = False) -> SlowPropagation:
    return SlowPropagation(
        width=SIZE[0],
        steps=STEPS,
        filter_matches=SMALL.start_labels_above,
        linked_matches=SMALL.min_joined,
        final_matches=SMALL.min_final,
        faults=faults,
    )


def tables(labels: dict[Pair, list[np.ndarray]], rounds: int) -> dict[int, list[dict[Pair, int]]]:
    return {
        step: [
            {p: len(arrays[k]) for p, arrays in labels.items() if p[1] - p[0] == step}
            for k in range(rounds)
        ]
        for step in STEPS
    }


# --------------------------------------------------------------------- against plain Python


def test_chains_are_those_of_the_description() -> None:
    """Every pair of frames of 25 random label sets, starts or not: rows, order and reach."""
    outcomes = set()
    for seed in range(25):
        labels = random_labels(seed, gaps=(0.0, 0.1, 0.3)[seed % 3])
        rows = as_rows(labels)
        propagator = Propagator(labels, steps=STEPS, size=SIZE, options=SMALL)
        for a in range(0, 230, 30):
            for b in (a + 40, a + 70, 230):
                if b > 230:
                    continue
                for level in (3, 2, 1):
                    chain = propagator._chain(a, b, level)
                    found = slow().propagate(rows, a, b, STEPS[:level])
                    if found is None:
                        assert chain is None
                        outcomes.add("nothing")
                        continue
                    assert chain is not None
                    assert (chain.start, chain.end) == found[1:]
                    np.testing.assert_array_equal(chain.rows, np.array(found[0], np.float32))
                    late, short = chain.start > a, chain.end < b
                    outcomes.add("late" if late else "short" if short else "whole")
                    if short and (chain.end - chain.start) % STEPS[level - 1]:
                        outcomes.add("shortened")
    assert outcomes == {"nothing", "late", "short", "whole", "shortened"}


@pytest.mark.parametrize(("gaps", "final"), [(0.0, 8), (0.05, 22), (0.12, 8)])
def test_labels_are_those_of_the_description(gaps: float, final: int) -> None:
    """Starts, fit and failures included."""
    options = dataclasses.replace(SMALL, min_final=final)
    described = dataclasses.replace(slow(), final_matches=final)
    made = failed = 0
    for seed in range(12):
        labels = random_labels(100 + seed, gaps=gaps)
        rows = as_rows(labels)
        starts = described.starts(tables(labels, 2))
        results = list(propagate(labels, steps=STEPS, size=SIZE, options=options))
        assert [(r.record.start, r.record.target) for r in results] == starts
        for result, pair in zip(results, starts, strict=True):
            found = described.run(rows, *pair)
            if found is None:
                assert result.labels is None
                assert result.record.failure
                failed += 1
                continue
            assert result.labels is not None
            assert result.record.reached == found[1:]
            assert result.record.count == len(found[0])
            np.testing.assert_array_equal(result.labels, found[0])
            made += 1
    assert made > 5
    assert failed > 5 or final == 8


def test_without_gaps_the_reference_is_the_same() -> None:
    """What is done otherwise concerns segments without labels alone."""
    for seed in range(8):
        labels = random_labels(200 + seed, gaps=0.0, complete=True)
        rows = as_rows(labels)
        for a in (0, 50, 110):
            first = slow(faults=True).chain(rows, a, 230)
            assert first == slow().chain(rows, a, 230)


def test_a_chain_that_begins_late_says_so() -> None:
    """The reference gives its first frame as the one asked for: labels of another frame."""
    labels = random_labels(3, gaps=0.0, complete=True)
    for pair in list(labels):
        if pair[0] < 40:
            del labels[pair]
    rows = as_rows(labels)
    propagator = Propagator(labels, steps=STEPS, size=SIZE, options=SMALL)
    chain = propagator._chain(0, 120, 3)
    assert chain is not None
    assert chain.start == 40
    wrong = slow(faults=True).propagate(rows, 0, 120, STEPS)
    assert wrong is not None
    assert wrong[1] == 0
    # As part of a longer chain it does not reach both ends, so it must not be used.
    assert propagator._whole(0, 80, 3) is None


def test_a_gap_ends_the_chain() -> None:
    """Points of frame 40 are not joined with points of frame 80, even where they share pixels."""
    still = np.random.default_rng(0).uniform(0, 40, (50, 2)).astype(np.float32)
    rows = np.concatenate([still, still], axis=1)
    labels = {(a, a + 40): [rows] for a in (0, 80, 120)}
    chain = Propagator(labels, steps=STEPS, size=SIZE, options=SMALL)._chain(0, 160, 3)
    assert chain is not None
    assert (chain.start, chain.end) == (0, 40)
    assert chain.ended == "no labels between 40 and 80"
    wrong = slow(faults=True).propagate(as_rows(labels), 0, 160, STEPS)
    assert wrong is not None
    assert wrong[2] == 160


def test_many_labels_a_pair() -> None:
    """With the constants of the code."""
    video = made_up_video(frames=30, labels=2500, rounds=3, seed=1)
    starts = find_starts(video.counts(), PropagationOptions())[::6]
    assert len(starts) >= 4
    rows = as_rows(video.labels)
    described = SlowPropagation(width=video.size[0], steps=video.steps)
    propagator = Propagator(
        video.labels, steps=video.steps, size=video.size, options=PropagationOptions()
    )
    distances = []
    for start in starts:
        result, expected = propagator.run(*start), described.run(rows, *start)
        assert expected is not None
        assert result.record.reached == expected[1:]
        np.testing.assert_array_equal(result.labels, expected[0])
        distances.append(result.record.distance)
    assert np.median(distances) >= 80


# -------------------------------------------------------------------------------------- joining


def join(left: list[list[float]], right: list[list[float]], **options: object) -> list[list[float]]:
    joiner = propagation._Joiner(SIZE, PropagationOptions(**options))  # type: ignore[arg-type]
    segments = [joiner.segment(np.array(rows, np.float32)) for rows in (left, right)]
    link = joiner(propagation._Link(segments[0], None, segments[0], None), segments[1])
    again = joiner(propagation._Link(segments[0], None, segments[0], None), segments[1])
    rows = link.rows()
    np.testing.assert_array_equal(rows, again.rows())  # the table is clean again
    np.testing.assert_array_equal(rows[:, :2], link.segment().points0)
    assert (joiner._table == -1).all()
    return rows.tolist()


def test_the_last_row_of_a_pixel_wins_on_both_sides() -> None:
    left = [[1, 1, 10.4, 10], [2, 2, 9.6, 10.3], [3, 3, 20, 20]]
    right = [[10, 10, 5, 5], [20, 20, 7, 7], [10.2, 9.8, 6, 6]]
    assert join(left, right) == [[2, 2, 6, 6], [3, 3, 7, 7]]


def test_halves_round_to_even() -> None:
    left = [[1, 1, 10.5, 10], [2, 2, 11.5, 10]]  # pixels 10 and 12
    right = [[10, 10, 5, 5], [11, 10, 6, 6], [12, 10, 7, 7]]
    assert join(left, right) == [[1, 1, 5, 5], [2, 2, 7, 7]]


def test_a_pixel_beyond_the_right_border_is_not_the_first_of_the_next_row() -> None:
    left = [[1, 1, SIZE[0], 3]]
    assert join(left, [[0, 4, 5, 5]]) == []
    assert join(left, [[SIZE[0], 3, 5, 5]]) == [[1, 1, 5, 5]]


def test_points_far_outside_never_join() -> None:
    for x in (-50.0, 500.0, 3e9):
        assert join([[1, 1, x, 3]], [[x, 3, 5, 5]]) == []


def test_joining_by_distance() -> None:
    generator = np.random.default_rng(5)
    left = generator.uniform(5, 40, (300, 4)).astype(np.float32)
    right = generator.uniform(5, 40, (200, 4)).astype(np.float32)
    rows = join(left.tolist(), right.tolist(), join="distance", join_distance=1.0)
    apart = np.linalg.norm(
        left[:, None, 2:].astype(np.float64) - right[None, :, :2].astype(np.float64), axis=2
    )
    expected = {}
    for i, nearest in enumerate(apart.argmin(axis=1)):
        closer = apart[i, nearest] < 1 and all(
            apart[i, nearest] <= apart[k, nearest]
            for k in range(len(left))
            if apart[k].argmin() == nearest
        )
        if closer:
            expected[i] = int(nearest)
    assert 50 < len(expected) < 200
    assert rows == [[*left[i, :2].tolist(), *right[j, 2:].tolist()] for i, j in expected.items()]


def test_a_distance_of_exactly_the_limit_does_not_join() -> None:
    right = [[11, 10, 5, 5]]
    assert join([[1, 1, 10, 10]], right, join="distance") == []
    assert join([[1, 1, 10.25, 10]], right, join="distance") == [[1, 1, 5, 5]]


# ---------------------------------------------------------------------------------------- starts


def full_counts(frames: int, rounds: int = 2, count: int = 100) -> dict[int, list[dict[Pair, int]]]:
    return {
        step: [
            {(a, a + step): count for a in range(0, 10 * frames - step, 10)} for _ in range(rounds)
        ]
        for step in STEPS
    }


def test_starts_of_a_complete_video() -> None:
    starts = find_starts(full_counts(20), PropagationOptions())
    # The last largest pair is (150, 190); the start before it that one more step fits behind: 110.
    assert starts == [(a, 190) for a in range(0, 120, 10)]


def test_what_takes_a_start_away() -> None:
    options = PropagationOptions()
    whole = {a for a, _ in find_starts(full_counts(20), options)}

    def without(step: int, pair: Pair, count: int = 0) -> set[int]:
        counts = full_counts(20)
        counts[step][1][pair] = count
        return whole - {a for a, _ in find_starts(counts, options)}

    assert without(40, (60, 100)) == {60, 20}
    assert without(40, (60, 100), 32) == {60, 20}
    assert without(40, (60, 100), 33) == set()
    assert without(20, (60, 80)) == {60, 40}
    assert without(20, (60, 80), 1) == set()
    assert without(10, (60, 70)) == {60, 50, 40, 30}


def test_fewer_rounds_may_be_asked_for() -> None:
    counts = full_counts(20, rounds=3)
    counts[20][1].clear()
    counts[10][2].clear()
    assert find_starts(counts, PropagationOptions()) == []
    assert len(find_starts(counts, PropagationOptions(require="2"))) == 12
    assert len(find_starts(counts, PropagationOptions(require="any"))) == 12
    with pytest.raises(InputError, match="there are 3 labelling rounds"):
        find_starts(counts, PropagationOptions(require="4"))


def test_the_target_is_within_reach() -> None:
    starts = find_starts(full_counts(40), PropagationOptions(reach=3))
    assert starts[0] == (0, 120)
    assert starts[-1] == (310, 390)


def test_options_are_checked() -> None:
    for bad in ({"join": "pixels"}, {"min_joined": 0}, {"require": "most"}, {"require": "0"}):
        with pytest.raises(InputError, match=next(iter(bad))):
            PropagationOptions(**bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="multiples of the smallest"):
        propagation.check_steps((10, 25))
    told = PropagationOptions(preset="paper", min_final=10).settings()
    assert (told["min_joined"], told["join"], told["min_final"]) == (1024, "distance", 10)
    told = PropagationOptions(preset="paper", join="pixel", min_joined=9).settings()
    assert (told["min_joined"], told["join"]) == (9, "pixel")


# ----------------------------------------------------------------------------------- exact truth


@pytest.mark.parametrize("join", ["pixel", "distance"])
def test_labels_lie_within_a_pixel_of_the_truth(join: str) -> None:
    """Points carried over up to 25 hops of the largest step are still where they truly are.

    Labels are without noise: all that a chain adds is the distance of two labels of one pixel.
    """
    video = made_up_video(frames=40, labels=1500, rounds=2, seed=2, size=(960, 540), noise_px=0.0)
    options = PropagationOptions(join=join, min_joined=150)  # type: ignore[arg-type]
    results = list(propagate(video.labels, steps=video.steps, size=video.size, options=options))
    assert len(results) >= 30
    near, distances = [], []
    for result in results:
        assert result.labels is not None
        assert result.record.reached is not None
        near.append(errors(video, result.labels, result.record.reached))
        distances.append(result.record.distance)
    assert max(distances) >= 200
    share = (np.concatenate(near) < 1).mean()
    assert share > 0.98, share


def errors(video: MadeUpVideo, labels: np.ndarray, reached: Pair) -> np.ndarray:
    """Pixels between a label's second point and where its first point's scene point truly is."""
    first, second = (video.tracks[video.indices.index(frame)] for frame in reached)
    seen = np.isfinite(first[:, 0])
    first, second = first[seen], second[seen]
    apart = np.linalg.norm(labels[:, None, :2] - first[None], axis=2)
    nearest = apart.argmin(axis=1)
    # Without noise, the first point is one of the scene's points exactly.
    assert apart[np.arange(len(labels)), nearest].max() < 1e-3
    # A point that has left the second frame cannot be right there.
    return np.nan_to_num(np.linalg.norm(labels[:, 2:] - second[nearest], axis=1), nan=np.inf)


def test_failures_have_reasons() -> None:
    labels = random_labels(7, gaps=0.0, complete=True)
    for options, reason in (
        (PropagationOptions(start_labels_above=3, min_joined=10_000), "smallest step"),
        (PropagationOptions(start_labels_above=3, min_joined=12, min_final=900), "900 are needed"),
    ):
        results = list(propagate(labels, steps=STEPS, size=SIZE, options=options))
        assert results
        assert all(result.labels is None for result in results)
        assert all(reason in result.record.failure for result in results)
    nothing = Propagator({}, steps=STEPS, size=SIZE, options=SMALL).run(0, 80)
    assert nothing.record.failure == "no labels to chain"


def test_what_is_kept_does_not_change_results() -> None:
    labels = random_labels(8)
    results = [
        [
            (r.record, None if r.labels is None else r.labels.tobytes())
            for r in propagate(
                labels,
                steps=STEPS,
                size=SIZE,
                options=PropagationOptions(
                    start_labels_above=3, min_joined=12, min_final=8, memory_mb=memory
                ),
            )
        ]
        for memory in (0, 1024)
    ]
    assert results[0] == results[1]


def test_labels_that_are_not_numbers_are_refused() -> None:
    labels = random_labels(9, gaps=0.0, complete=True)
    labels[0, 40][0][3, 2] = np.nan
    with pytest.raises(InputError, match="frames 0, 40"):
        list(propagate(labels, steps=STEPS, size=SIZE, options=SMALL))


# -------------------------------------------------------------------------------------- on files


def write_stores(
    folder: Path, labels: dict[Pair, list[np.ndarray]], *, size: tuple[int, int] = SIZE
) -> list[LabelStore]:
    stores = []
    rounds = max(len(arrays) for arrays in labels.values())
    for k in range(rounds):
        path = folder / f"round{k}.h5"
        info = StoreInfo(
            video="walk",
            labeller="sift",
            zoom=bool(k),
            steps=STEPS,
            size=size,
            fps=30.0,
            gap=10,
            settings={"matcher": "sift"},
        )
        with LabelWriter(path, info) as writer:
            for (i, j), arrays in labels.items():
                if len(arrays[k]):
                    writer.put(i, j, arrays[k])
                else:
                    writer.fail(i, j, "no matches")
            writer.write()
        stores.append(LabelStore(path))
    return stores


@pytest.fixture(scope="module")
def labels() -> dict[Pair, list[np.ndarray]]:
    return random_labels(11, frames=30)


@pytest.fixture
def stores(tmp_path: Path, labels: dict[Pair, list[np.ndarray]]) -> list[LabelStore]:
    return write_stores(tmp_path, labels)


def content(path: Path) -> dict[Pair, tuple[bytes, Pair]]:
    with PropagatedStore(path) as store:
        return {(a, b): (store.read(a, b)[0].tobytes(), store.read(a, b)[1]) for a, b in store}


def test_files_hold_what_memory_holds(
    tmp_path: Path, stores: list[LabelStore], labels: dict[Pair, list[np.ndarray]]
) -> None:
    base = rounds_by_step(reversed(stores))
    assert [store.info.zoom for store in base[10]] == [False, True]
    path = tmp_path / "out" / "propagated.h5"
    summary = propagate_video(base, path, SMALL)
    expected = list(propagate(labels, steps=STEPS, size=SIZE, options=SMALL))
    with PropagatedStore(path) as store:
        made = [r for r in expected if r.labels is not None]
        assert store.pairs().tolist() == [[r.record.start, r.record.target] for r in made]
        assert store.reached().tolist() == [list(r.record.reached or ()) for r in made]
        assert store.counts().tolist() == [r.record.count for r in made]
        for result in made:
            read, reached = store.read(result.record.start, result.record.target)
            np.testing.assert_array_equal(read, result.labels)
            assert reached == result.record.reached
        assert [f[:2] for f in store.failures()] == [
            (r.record.start, r.record.target) for r in expected if r.labels is None
        ]
        assert all(reason for _, _, reason in store.failures())
        assert (store.facts.video, store.facts.size, store.facts.fps) == ("walk", SIZE, 30.0)
        copy = pickle.loads(pickle.dumps(store))
        assert copy.read(*store.pairs()[0])[0].shape == (store.counts()[0], 4)
        with pytest.raises(InputError, match="no labels of the pair 1, 2"):
            store.read(1, 2)
    assert len(summary.made) == len(made)
    assert f"{len(made)} of {len(expected)} starts" in summary.line()
    told = json.loads(path.with_suffix(".json").read_text())
    assert told["propagated"] == len(made)
    assert told["records"][0]["start"] == expected[0].record.start
    table = path.with_suffix(".csv").read_text().splitlines()
    assert len(table) == len(expected) + 1
    assert table[0].startswith("start,target,from,to,distance,hops,joined,labels")


def test_when_nothing_is_propagated_the_line_says_why(
    tmp_path: Path, stores: list[LabelStore]
) -> None:
    options = dataclasses.replace(SMALL, min_joined=100_000)
    line = propagate_video(rounds_by_step(stores), tmp_path / "p.h5", options).line()
    assert "walk: 0 of " in line
    assert "reached no farther than the smallest step" in line
    assert "100000 needed" in line


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_where_it_stopped(
    tmp_path: Path, stores: list[LabelStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = rounds_by_step(stores)
    whole = propagate_video(base, tmp_path / "whole.h5", SMALL)
    count = len(whole.records)
    assert count > 8
    path = tmp_path / "killed.h5"
    run, calls = Propagator.run, []

    def dying(self: Propagator, start: int, target: int) -> object:
        calls.append(start)
        if len(calls) == 5:
            raise Killed
        return run(self, start, target)

    monkeypatch.setattr(Propagator, "run", dying)
    with pytest.raises(Killed):
        propagate_video(base, path, SMALL)
    assert not path.exists()
    with pytest.raises(InputError, match="not finished"):
        PropagatedStore(path)
    summary = propagate_video(base, path, SMALL)
    assert summary.resumed == 4
    assert len(calls) == 5 + count - 4
    assert content(path) == content(tmp_path / "whole.h5")
    assert summary.records == whole.records
    # Once more: nothing is left to do.
    assert propagate_video(base, path, SMALL).resumed == count
    assert len(calls) == 5 + count - 4


def test_other_options_or_labels_are_done_anew_and_come_back(
    tmp_path: Path, stores: list[LabelStore], labels: dict[Pair, list[np.ndarray]]
) -> None:
    path = tmp_path / "p.h5"
    base = rounds_by_step(stores)
    count = len(propagate_video(base, path, SMALL).records)
    before = content(path)
    other = dataclasses.replace(SMALL, min_joined=20)
    assert propagate_video(base, path, other).resumed == 0
    assert content(path) != before
    assert propagate_video(base, path, SMALL).resumed == count
    assert content(path) == before
    assert propagate_video(base, path, SMALL, overwrite=True).resumed == 0
    assert content(path) == before
    # Memory is not an option that decides labels.
    more = dataclasses.replace(SMALL, memory_mb=7)
    assert propagate_video(base, path, more).resumed == count
    changed = {**labels, (0, 10): [rows[:15] for rows in labels[0, 10]]}
    (tmp_path / "again").mkdir()
    again = rounds_by_step(write_stores(tmp_path / "again", changed))
    assert propagate_video(again, path, SMALL).resumed == 0


def test_propagated_labels_of_0_1_are_taken_over(tmp_path: Path, stores: list[LabelStore]) -> None:
    """Their file had no cache once it was finished."""
    path = tmp_path / "p.h5"
    base = rounds_by_step(stores)
    count = len(propagate_video(base, path, SMALL).records)
    before = content(path)
    path.with_suffix(".cache").unlink()
    assert propagate_video(base, path, SMALL).resumed == count
    assert content(path) == before


def test_flipped_bytes_are_noticed_and_heal(tmp_path: Path, stores: list[LabelStore]) -> None:
    path = tmp_path / "p.h5"
    base = rounds_by_step(stores)
    propagate_video(base, path, SMALL)
    before, whole = content(path), path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(10):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        propagate_video(base, path, SMALL)
        assert content(path) == before


def test_several_processes_give_the_same(tmp_path: Path, stores: list[LabelStore]) -> None:
    base = rounds_by_step(stores)
    one = propagate_video(base, tmp_path / "one.h5", SMALL)
    two = propagate_video(base, tmp_path / "two.h5", SMALL, where=Where(devices=("cpu", "cpu")))
    assert one.records == two.records
    assert content(tmp_path / "one.h5") == content(tmp_path / "two.h5")


def test_only_one_run_writes(tmp_path: Path, stores: list[LabelStore]) -> None:
    path = tmp_path / "p.h5"
    with FolderLock(path.parent), pytest.raises(LockedError):
        propagate_video(rounds_by_step(stores), path, SMALL)


def test_labels_that_do_not_belong_together(
    tmp_path: Path, stores: list[LabelStore], labels: dict[Pair, list[np.ndarray]]
) -> None:
    (tmp_path / "large").mkdir()
    larger = write_stores(tmp_path / "large", labels, size=(128, 96))
    with pytest.raises(InputError, match=r"size \(128, 96\).*\(64, 48\)"):
        propagate_video(rounds_by_step([stores[0], larger[1]]), tmp_path / "p.h5", SMALL)


def test_a_round_that_is_not_finished(tmp_path: Path, stores: list[LabelStore]) -> None:
    base = {**rounds_by_step(stores), 40: stores[:1]}
    with pytest.raises(InputError, match=r"sift \(zoom\): no labels at step 40"):
        propagate_video(base, tmp_path / "p.h5", SMALL)
    loose = PropagationOptions(start_labels_above=3, min_joined=12, min_final=8, require="any")
    assert propagate_video(base, tmp_path / "p.h5", loose).made


def test_a_video_without_starts(tmp_path: Path, labels: dict[Pair, list[np.ndarray]]) -> None:
    few = {pair: arrays for pair, arrays in labels.items() if pair[1] <= 60}
    stores = write_stores(tmp_path, few)
    summary = propagate_video(rounds_by_step(stores), tmp_path / "p.h5", SMALL)
    assert summary.records == ()
    assert "no frame to start from" in summary.notes[0]
    assert "at step 40 (with more than 3 labels)" in summary.notes[0]
    with PropagatedStore(tmp_path / "p.h5") as store:
        assert store.pairs().shape == (0, 2)
        assert store.reached().shape == (0, 2)
        assert store.failures() == []


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no propagated labels"):
        PropagatedStore(tmp_path / "p.h5")
    (tmp_path / "p.h5").write_bytes(b"no h5")
    with pytest.raises(InputError, match="damaged"):
        PropagatedStore(tmp_path / "p.h5")
