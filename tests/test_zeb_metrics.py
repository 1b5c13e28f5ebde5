"""ZEB's figures: AUC against its definition, intervals that cover, ranks, the worst pairs."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gim_hloc.errors import InputError
from gim_hloc.evaluation import metrics
from gim_hloc.evaluation.dumps import Dump, DumpRecord
from gim_hloc.evaluation.zeb.published import PUBLISHED
from gim_hloc.evaluation.zeb.sets import NAMES


def make_dump(errors: dict[str, float], *, matcher: str = "a", dataset: str = "KITTI") -> Dump:
    records = tuple(
        DumpRecord(
            identifier=name,
            covisible0=0.5,
            covisible1=0.5,
            rotation_error=error,
            translation_error=error / 2,
            translation_distance=0.1,
        )
        for name, error in errors.items()
    )
    return Dump(matcher=matcher, dataset=dataset, version="v", records=records)


@settings(deadline=None, max_examples=40)
@given(errors=st.lists(st.floats(0, 30), min_size=1, max_size=20))
def test_a_resampling_has_the_auc_of_its_errors(errors: list[float]):
    """The closed form of the bootstrap is the AUC of the drawn errors, drawn here once more."""
    thresholds = (5.0, 20.0)
    drawn = metrics.bootstrap_auc(np.array(errors), thresholds, samples=3, seed=7, name="x")
    generator = np.random.default_rng([7, zlib.crc32(b"x")])
    index = generator.integers(0, len(errors), (3, len(errors)), dtype=np.int32)
    for row, places in zip(drawn, index, strict=True):
        expected = metrics.auc(np.array(errors)[places], thresholds)
        assert row == pytest.approx(expected, abs=1e-12)


def test_interval_covers_the_true_auc():
    # e^2 / 200 is uniform on [0, 1]: recall(e) = e^2/200, so AUC@5 = 25/600. Of 100 intervals at
    # 95 %, fewer than 86 covering it has a chance below 1e-4.
    generator = np.random.default_rng(0)
    truth = 25 / 600
    hits = 0
    for trial in range(100):
        errors = np.sqrt(200 * generator.random(1000))
        samples = metrics.bootstrap_auc(errors, [5.0], samples=200, seed=trial)
        low, high = metrics.interval(samples)[:, 0]
        hits += low <= truth <= high
    assert 86 <= hits <= 100


def test_bootstrap_is_seeded_and_paired_by_set():
    errors = np.random.default_rng(1).uniform(0, 20, 300)

    def draw(name: str, seed: int = 0) -> np.ndarray:
        return metrics.bootstrap_auc(errors, [5.0, 10.0], samples=50, seed=seed, name=name)

    np.testing.assert_array_equal(draw("KITTI"), draw("KITTI"))
    assert not np.array_equal(draw("KITTI"), draw("GL3D"))
    assert not np.array_equal(draw("KITTI"), draw("KITTI", seed=1))
    # An error shifted for all pairs shifts every resampling the same way only if they are paired.
    worse = metrics.bootstrap_auc(errors + 0.5, [5.0, 10.0], samples=50, seed=0, name="KITTI")
    assert (worse < draw("KITTI")).all()


def test_bootstrap_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch):
    errors = np.random.default_rng(2).uniform(0, 20, 100)
    expected = metrics.bootstrap_auc(errors, [5.0], samples=33, seed=0)
    monkeypatch.setattr(metrics, "_BLOCK", 350)
    np.testing.assert_array_equal(
        metrics.bootstrap_auc(errors, [5.0], samples=33, seed=0), expected
    )


def test_errors_that_are_not_finite_are_failures():
    rotation = np.array([1.0, np.inf, 2.0, np.nan])
    translation = np.array([3.0, 1.0, np.nan, np.inf])
    assert metrics.pose_errors(rotation, translation).tolist() == [3.0, 180.0, 180.0, 180.0]
    assert metrics.failed(rotation, translation).tolist() == [False, True, True, True]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 181.0, math.nan, math.inf])
def test_bad_threshold(threshold: float):
    with pytest.raises(InputError, match="threshold"):
        metrics.auc([1.0], [threshold])


def test_no_pairs_and_no_thresholds():
    with pytest.raises(InputError, match="no errors"):
        metrics.auc([], [5.0])
    with pytest.raises(InputError, match="no errors"):
        metrics.bootstrap_auc(np.empty(0), [5.0], samples=2, seed=0)
    with pytest.raises(InputError, match="no AUC threshold"):
        metrics.auc([1.0], [])


def record(i: int, rotation: float, translation: float, *counts: float) -> DumpRecord:
    names = ("precision_before", "precision_after", "correct_before", "correct_after")
    return DumpRecord(
        identifier=f"s#{i}#{i}", covisible0=0.5, covisible1=0.5, rotation_error=rotation,
        translation_error=translation, **dict(zip(names, counts, strict=True)),
    )  # fmt: skip


def test_measure():
    records = [
        record(0, 1.0, 2.0, 0.5, 1.0, 10, 8),
        record(1, np.inf, np.inf, 0.25, 0.0, 5, 0),
        record(2, 2.0, 30.0, 0.0, np.nan, 0, 0),
    ]
    figures = metrics.measure(records, thresholds=(5.0,), samples=20)
    assert (figures.pairs, figures.failures) == (3, 1)
    # One of three pairs at 2 degrees: (2 * 1/3 / 2 + 3 * 1/3) / 5.
    assert figures.auc == pytest.approx([4 / 15])
    assert figures.matches == 20.0  # 10 / 0.5 and 5 / 0.25; the third pair does not tell
    assert figures.correct_before == 5.0
    assert figures.correct_after == pytest.approx(8 / 3)
    assert figures.precision_before == 0.25
    assert figures.precision_after == pytest.approx(1 / 3)
    assert (figures.rotation_median, figures.translation_median) == (2.0, 30.0)
    assert figures.samples.shape == (20, 1)
    low, high = figures.interval()[:, 0]
    assert 0 <= low <= figures.auc[0] <= high <= 1


def test_measure_without_bootstrap():
    figures = metrics.measure([record(0, 1.0, 1.0, 1, 1, 1, 1)], samples=0)
    assert np.isnan(figures.interval()).all()


def test_most_different_pairs():
    first = make_dump({"s#a": 1.0, "s#b": 30.0, "s#c": 170.0, "s#only": 0.0, "s#d": 9.0})
    second = make_dump({"s#d": 4.0, "s#c": 40.0, "s#b": math.inf, "s#a": 15.0}, matcher="b")
    found = metrics.most_different(first, second, count=3)
    assert [(pair.identifier, pair.gap) for pair in found] == [
        ("s#a", -14.0),  # the first is better by 14 degrees
        ("s#d", 5.0),
        ("s#b", 0.0),  # both useless
    ]
    assert (found[2].error0, found[2].error1) == (30.0, 180.0)
    with pytest.raises(InputError, match=r"a on KITTI and b on GL3D have no pair in common"):
        metrics.most_different(first, make_dump({"t#a": 1.0}, matcher="b", dataset="GL3D"))


def test_worst_pairs():
    dump = make_dump({"s#b": math.inf, "s#a": math.nan, "s#c": 3.0, "s#d": 20.0})
    assert metrics.worst(dump, count=3) == [("s#a", 180.0), ("s#b", 180.0), ("s#d", 20.0)]


def test_published_rows_are_consistent():
    """Each printed mean is that of its row: catches a mistyped or swapped number."""
    assert len(NAMES) == 12
    for row in PUBLISHED:
        assert len(row.percent) == 12
        # The mean of twelve values rounded to 0.1, itself rounded.
        assert np.mean(row.percent) == pytest.approx(row.percent_mean, abs=0.1)
    dkm = next(row for row in PUBLISHED if row.method == "GIM_DKM 100h")
    assert dkm.mean(NAMES) == pytest.approx(0.512)
    assert dkm.mean(["KITTI", "GL3D"]) == pytest.approx((0.434 + 0.633) / 2)
    assert math.isnan(dkm.mean(["KITTI", "my own set"]))
