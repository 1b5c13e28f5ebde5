"""Our networks against the reference's recorded numbers, and the command that compares them."""

from __future__ import annotations

import functools
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gim_hloc.errors import InputError
from gim_hloc.evaluation import _parity_lightglue, filled, parity

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"
TRAINED = ("xfeat", "lighterglue")  # recorded with the trained weights
GOLDEN = sorted(PARITY.glob("*.npz"))

needs_parity = pytest.mark.skipif(not GOLDEN, reason="../shared/parity is not there")


@functools.lru_cache(maxsize=1)
def limits() -> dict[str, dict[str, dict[str, Any]]]:
    return parity.tolerances(PARITY)


@needs_parity
def test_the_parity_data_are_complete() -> None:
    assert len(GOLDEN) == 28
    assert set(limits()) == {p.stem for p in GOLDEN}


@needs_parity
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=[pytest.mark.slow] * path.stem.endswith("_full")
            + [pytest.mark.weights] * path.stem.startswith(TRAINED),
        )
        for path in GOLDEN
    ],
)
def test_every_golden_array(path: Path) -> None:
    rows = parity.check_file(path, limits()[path.stem])
    failed = [row.line() for row in rows if row.state == "FAIL"]
    assert not failed, "\n".join(["", parity.HEADER, *failed])
    assert sum(row.state == "ok" for row in rows) >= 2
    # Nothing that has a limit escapes judgement.
    unjudged = {row.array for row in rows if row.state == "input"}
    assert not unjudged & set(limits()[path.stem])
    following = [p.stem.partition("_")[0] for p in GOLDEN[GOLDEN.index(path) + 1 :][:1]]
    if path.stem.partition("_")[0] not in following:
        parity.release(parity.family_of(path.stem))


@needs_parity
@pytest.mark.parametrize(
    "model", ["gim_loftr", "gim_lightglue", "gim_dkm", "semseg_encoder", "semseg_decoder"]
)
def test_filled_weights_are_those_of_the_parity_data(model: str) -> None:
    expected = json.loads((PARITY / "digests.json").read_text())["models"][model]
    state = parity.Weights(PARITY)(model)
    assert len(state) == expected["tensors"]
    assert filled.digest(state) == expected["digest"]
    for key, values in expected["samples"].items():
        assert state[key].flatten()[: len(values)].tolist() == values


@needs_parity
@pytest.mark.slow
@pytest.mark.parametrize("model", ["gim_roma", "dinov2_vitl14"])
def test_filled_weights_of_large_networks(model: str) -> None:
    test_filled_weights_are_those_of_the_parity_data(model)


def test_the_recipe_without_the_data() -> None:
    """The first values of the recipe's own code, and what its text promises."""
    assert filled.uniform("tag", 3).tolist() == [
        0.1851399540901184,
        0.33908069133758545,
        0.7227785587310791,
    ]
    assert filled.fill_array("x", "a.num_batches_tracked", (), "int64") == 0
    assert filled.fill_array("x", "a._running_iter", (1,)).tolist() == [1.0]
    variance = filled.fill_array("x", "bn.running_var", (1000,))
    assert variance.min() >= 0.65
    assert variance.max() <= 1.35
    weight = filled.fill_array("gim_loftr", "model.backbone.encode.conv1.weight", (64, 3, 7, 7))
    assert np.abs(weight.reshape(64, -1).mean(1)).max() < 1e-6
    assert weight.std() == pytest.approx(8 / np.sqrt(147), rel=0.02)


# A tiny folder, made up: a "network" of one weight that scales its input.


class Toy:
    """A folder with one golden file and the producer of its family."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.x = np.linspace(-2, 3, 12, dtype=np.float32).reshape(3, 4)
        (folder / "toy.keys.json").write_text(json.dumps({"weight": [[1], "float32"]}))
        self.limits: dict[str, Any] = {
            "y": {"atol": 1e-4},
            "big": {"atol": 1e-4},
            "labels": {"agree": 0.9},
            "pairs": {"agree": 1.0},
            "points": {"mode": "set", "agree": 0.75},
            "drawn": {"mode": "info", "why": "random"},
        }
        self.scale = filled.fill_array("toy", "weight", (1,))
        self.arrays: dict[str, np.ndarray] = {
            "image": self.x,
            "y": self.x * self.scale,
            "labels": np.arange(10),
            "pairs": np.array([[0, 1], [2, 3]]),
            "a_keypoints": np.array([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [9.0, 9.0]]], np.float32),
            "a_n_detected": np.array(3),
            "a_descriptors16": np.arange(8, dtype=np.float32).reshape(4, 2),
            "drawn": np.zeros(3, np.float32),
            "big@sub": (self.x * self.scale).reshape(-1)[::5],
            "big@meta": np.array([5, 1, 3, 4]),
            "big@stats": np.zeros(4),
        }
        self.limits["a_keypoints"] = {"mode": "set", "agree": 0.6}
        self.limits["a_descriptors16"] = {"mode": "info", "why": "no order"}

    def write(self, seed: str = filled.SEED, **changes: np.ndarray) -> Path:
        arrays: dict[str, Any] = self.arrays | changes
        config = json.dumps({"model": "toy", "seed": seed})
        np.savez(self.folder / "toy_one.npz", config=np.array(config), **arrays)
        (self.folder / "tolerances.json").write_text(json.dumps({"toy_one": self.limits}))
        return self.folder

    def produce(self, golden: parity.Golden, weights: parity.Weights) -> dict[str, Any]:
        y = torch.from_numpy(golden["image"]) * weights("toy")["weight"]
        order = [2, 0, 1]  # another order, and other random padding
        return {
            "y": y[None],
            "big": y,
            "labels": np.arange(10),
            "pairs": np.array([[2, 3], [0, 1]]),
            "a_keypoints": np.concatenate(
                [self.arrays["a_keypoints"][0][order], np.full((1, 2), 7, np.float32)]
            ),
            "a_n_detected": 3,
            "a_descriptors16": self.arrays["a_descriptors16"][[*order, 3]],
            "unknown": y,
        }


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    made = Toy(tmp_path)
    module: Any = types.ModuleType("gim_hloc.evaluation._parity_toy")
    module.produce = lambda golden, weights: made.produce(golden, weights)
    monkeypatch.setitem(sys.modules, "gim_hloc.evaluation._parity_toy", module)
    monkeypatch.setitem(parity.FAMILIES, "toy", "toy")
    return made


def states(folder: Path) -> dict[str, parity.Row]:
    limits = parity.tolerances(folder).get("toy_one")
    rows = parity.check_file(folder / "toy_one.npz", limits)
    return {row.array: row for row in rows}


def test_the_command_passes_and_prints_a_table(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity.main([str(toy.write())]) == 0
    text = capsys.readouterr().out
    for name in toy.limits:
        if name != "points":
            assert f"\n{name} " in text
    assert "toy_one: 7 arrays judged, all within their limits" in text
    rows = states(toy.folder)
    assert rows["image"].state == "input"
    assert rows["drawn"].state == "info"
    assert rows["a_descriptors16"].note == "3 common points"
    assert rows["y"].absolute == 0.0


def test_a_file_says_the_seed_it_was_recorded_with(toy: Toy) -> None:
    assert states(toy.write(seed="another"))["y"].state == "FAIL"
    y = toy.x * filled.fill_array("toy", "weight", (1,), seed="another")
    rows = states(toy.write(seed="another", y=y, **{"big@sub": y.reshape(-1)[::5]}))
    assert {row.state for row in rows.values()} == {"ok", "input", "info"}


class Counting:
    """A detector that finds nothing and tells how much it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def detect(self, image: torch.Tensor, *, max_keypoints: int, **_: Any) -> list[Any]:
        self.asked.append(max_keypoints)
        nothing = torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, 256)
        return [types.SimpleNamespace(xy=nothing[0], scores=nothing[1], descriptors=nothing[2])]


def test_counts_are_those_that_a_file_says(tmp_path: Path) -> None:
    def record(name: str, config: dict[str, Any], **arrays: np.ndarray) -> parity.Golden:
        path = tmp_path / f"{name}.npz"
        np.savez(path, config=np.array(json.dumps(config)), **arrays)
        return parity.Golden(path)

    gray = np.zeros((64, 64), np.uint8)
    settings = {"max_num_keypoints": 77, "force_num_keypoints": True}
    images = record("superpoint_a_top77", {"config": settings}, gray0=gray, gray1=gray)
    counting: Any = Counting()
    produced = _parity_lightglue._superpoint(images, counting)
    assert counting.asked == [77, 77]
    assert produced["top77_0_keypoints"].shape == (1, 77, 2)

    demo = record("lightglue_demo_a", {"note": "the whole demo path on superpoint_a_top77: ..."})
    assert _parity_lightglue._input(demo).config == images.config
    made_up = {"note": "fill.feature_pair(30, 20, 10, seed)", "seed": "another"}
    features = _parity_lightglue._made_up(record("lightglue_random", made_up))
    expected = filled.feature_pair(30, 20, 10, "another")
    assert [x.tolist() for x in features] == [x.tolist() for x in expected]


@pytest.mark.parametrize(
    ("changes", "array"),
    [
        ({"y": 1e-3}, "y"),
        ({"big@sub": 1e-3}, "big"),
        ({"labels": 2}, "labels"),
        ({"pairs": 1}, "pairs"),
        ({"a_keypoints": 0.5}, "a_keypoints"),
        ({"a_descriptors16": 0.01}, "a_descriptors16"),
        ({"a_n_detected": 1}, "a_n_detected"),
    ],
)
def test_a_perturbed_golden_array_fails(
    toy: Toy, changes: dict[str, float], array: str, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.write(**{k: (toy.arrays[k] + v).astype(toy.arrays[k].dtype) for k, v in changes.items()})
    rows = states(toy.folder)
    assert rows[array].state == "FAIL"
    assert parity.main([str(toy.folder), "--no-arrays"]) == 1
    assert f"\n{array} " in capsys.readouterr().out


def test_a_single_value_and_a_nan_fail(toy: Toy) -> None:
    for value in (toy.arrays["y"][1, 2] + 1.1e-4, np.nan, np.inf):
        y = toy.arrays["y"].copy()
        y[1, 2] = value
        row = states(toy.write(y=y))["y"]
        assert row.state == "FAIL"
        assert not row.absolute <= 1e-4


def test_over_allows_a_share_of_the_values(toy: Toy) -> None:
    y = toy.arrays["y"].copy()
    y[1, 2] += 1
    toy.limits["y"] = {"atol": 1e-4, "over": 0.1}
    assert states(toy.write(y=y))["y"].state == "ok"
    y[2, 2] += 1
    assert states(toy.write(y=y))["y"].state == "FAIL"


def test_without_an_entry_the_limit_follows_the_largest_value(toy: Toy) -> None:
    del toy.limits["y"]
    row = states(toy.write())["y"]
    assert row.limit == pytest.approx(1e-4 * np.abs(toy.arrays["y"]).max())
    assert states(toy.write(y=toy.arrays["y"] + row.limit * 1.1))["y"].state == "FAIL"


def test_an_array_that_is_not_produced_fails(toy: Toy) -> None:
    folder = toy.write(another=np.zeros(3, np.float32))
    row = states(folder)["another"]
    assert (row.state, row.note) == ("FAIL", "not produced")
    assert parity.main([str(folder)]) == 1


def test_another_shape_fails(toy: Toy) -> None:
    rows = states(toy.write(y=toy.arrays["y"].T.copy()))
    assert rows["y"].state == "FAIL"
    assert rows["y"].note == "shape (1, 3, 4) instead of (4, 3)"
    meta = np.array([5, 3, 4, 1])
    assert states(toy.write(**{"big@meta": meta}))["big"].state == "FAIL"


def test_a_network_that_raises_fails(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> dict[str, Any]:
        raise ValueError("no such layer")

    monkeypatch.setattr(toy, "produce", broken)
    rows = states(toy.write())
    assert rows["(all)"].note == "ValueError: no such layer"
    assert parity.main([str(toy.folder)]) == 1


def test_an_unknown_family_and_a_damaged_file_fail(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = toy.write()
    (folder / "other_one.npz").write_bytes((folder / "toy_one.npz").read_bytes())
    (folder / "toy_two.npz").write_bytes(b"not a zip file")
    assert parity.main([str(folder), "--no-arrays"]) == 1
    text = capsys.readouterr().out
    assert "other_one.npz belongs to no known family" in text
    assert "toy_two.npz cannot be read" in text
    assert "3 files: failed in other_one, toy_two" in text
    assert parity.main([str(folder), "--files", "toy_one"]) == 0


def test_what_is_missing_is_named(toy: Toy, tmp_path: Path) -> None:
    folder = toy.write()
    with pytest.raises(InputError, match="does not exist"):
        parity.golden_files(folder / "absent")
    with pytest.raises(InputError, match="matches loftr_"):
        parity.golden_files(folder, ["loftr_*"])
    empty = tmp_path / "empty"
    empty.mkdir()
    assert parity.main([str(empty)]) == 2
    (folder / "toy.keys.json").unlink()
    with pytest.raises(InputError, match=r"keys\.json"):
        parity.run(parity.ParityOptions(folder=folder))
    (folder / "other.keys.json").write_text("{}")
    assert "toy.keys.json is missing" in states(folder)["(all)"].note


def test_golden_refuses_arrays_that_were_recorded_in_part(toy: Toy) -> None:
    golden = parity.Golden(toy.write() / "toy_one.npz")
    assert golden.has("big")
    assert golden.recorded("big")[1:] == ((1, 3, 4), 5)
    with pytest.raises(InputError, match="a part of big"):
        golden["big"]
    with pytest.raises(InputError, match="no nothing"):
        golden["nothing"]
    assert golden.sibling("toy_one").names == golden.names


def test_release_forgets_networks(toy: Toy) -> None:
    calls: list[int] = []

    @functools.lru_cache
    def network() -> None:
        calls.append(1)

    sys.modules["gim_hloc.evaluation._parity_toy"].network = network  # type: ignore[attr-defined]
    network()
    network()
    parity.release("toy")
    network()
    assert len(calls) == 2
