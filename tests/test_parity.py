"""Our networks against the reference's recorded numbers, and the command that compares them."""

from __future__ import annotations

import functools
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED
from parity import __main__ as command
from parity import filled, golden, lightglue

PARITY = SHARED / "parity"
TRAINED = ("xfeat", "lighterglue")  # recorded with the trained weights
GOLDEN = sorted(  # by families, whose networks of a gigabyte are made once
    filter(golden.family, PARITY.glob("*.npz")), key=lambda path: (golden.family(path), path)
)

needs_parity = pytest.mark.skipif(not GOLDEN, reason="../shared/parity is not there")
# By default each network but RoMa, of gigabytes, sees made-up pictures; two small ones photographs.
SLOW = {p.stem for p in GOLDEN if p.stem.endswith(("_full", "_real"))}
SLOW = SLOW - {"lighterglue_real", "xfeat_star_real"} | {"roma_synthetic"}
limits = functools.cache(functools.partial(golden.tolerances, PARITY))


@pytest.fixture(scope="module", autouse=True)
def networks_of_gigabytes() -> Iterator[None]:
    yield
    golden._networks.cache_clear()


@needs_parity
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=[pytest.mark.slow] * (path.stem in SLOW)
            + [pytest.mark.weights] * path.stem.startswith(TRAINED),
        )
        for path in GOLDEN
    ],
)
def test_every_golden_array(path: Path) -> None:
    rows = golden.check_file(path, limits()[path.stem])
    failed = [row.line() for row in rows if row.state == "FAIL"]
    assert not failed, "\n".join(["", golden.HEADER, *failed])
    assert sum(row.state == "ok" for row in rows) >= 2
    # Nothing that has a limit escapes judgement.
    unjudged = {row.array for row in rows if row.state == "input"}
    assert not unjudged & set(limits()[path.stem])


@needs_parity
@pytest.mark.parametrize(
    "model",
    [
        *("gim_loftr", "gim_lightglue", "gim_dkm", "semseg_encoder", "semseg_decoder"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gim_roma", "dinov2_vitl14")),
    ],
)
def test_filled_weights_are_those_of_the_parity_data(model: str) -> None:
    expected = json.loads((PARITY / "digests.json").read_text())["models"][model]
    state = golden.Weights(PARITY)(model)
    assert len(state) == expected["tensors"]
    assert filled.digest(state) == expected["digest"]
    for key, values in expected["samples"].items():
        assert state[key].flatten()[: len(values)].tolist() == values


def test_the_recipe_without_the_data() -> None:
    assert filled.uniform("tag", 3).tolist() == [
        *(0.1851399540901184, 0.33908069133758545, 0.7227785587310791)
    ]
    assert filled.fill_array("x", "a.num_batches_tracked", (), "int64") == 0
    weight = filled.fill_array("gim_loftr", "model.backbone.encode.conv1.weight", (64, 3, 7, 7))
    assert np.abs(weight.reshape(64, -1).mean(1)).max() < 1e-6
    assert weight.std() == pytest.approx(8 / np.sqrt(147), rel=0.02)


# A tiny folder, made up: a "network" of one weight that scales its input.


class Toy(types.ModuleType):
    """A folder with one golden file, and the module of its family."""

    def __init__(self, folder: Path) -> None:
        super().__init__("parity.toy")
        self.folder = folder
        self.x = np.linspace(-2, 3, 12, dtype=np.float32).reshape(3, 4)
        (folder / "toy.keys.json").write_text(json.dumps({"weight": [[1], "float32"]}))
        self.limits: dict[str, Any] = {
            "y": {"atol": 1e-4},
            "big": {"atol": 1e-4},
            "labels": {"agree": 0.9},
            "drawn": {"mode": "info", "why": "random"},
            "a_keypoints": {"mode": "set", "agree": 0.6},
            "a_descriptors16": {"mode": "info", "why": "no order"},
        }
        y = self.x * filled.fill_array("toy", "weight", (1,))
        self.arrays: dict[str, np.ndarray] = {
            "image": self.x,
            "y": y,
            "labels": np.arange(10),
            "pairs": np.array([[0, 1], [2, 3]]),
            "a_keypoints": np.array([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [9.0, 9.0]]], np.float32),
            "a_n_detected": np.array(3),
            "a_descriptors16": np.arange(8, dtype=np.float32).reshape(4, 2),
            "drawn": np.zeros(3, np.float32),
            "big@sub": y.reshape(-1)[::5],
            "big@meta": np.array([5, 1, 3, 4]),
            "big@stats": np.zeros(4),
        }

    def write(self, seed: str = filled.SEED, **changes: np.ndarray) -> dict[str, golden.Row]:
        """Write the file with other arrays, and check it."""
        arrays: dict[str, Any] = self.arrays | changes
        path = self.folder / "toy_one.npz"
        np.savez(path, config=np.array(json.dumps({"seed": seed})), **arrays)
        (self.folder / "tolerances.json").write_text(json.dumps({"toy_one": self.limits}))
        return {row.array: row for row in golden.check_file(path, self.limits)}

    def load(self, weights: golden.Weights) -> torch.Tensor:
        return weights("toy")["weight"]

    def produce(self, recorded: golden.Golden, weight: torch.Tensor) -> dict[str, Any]:
        y = torch.from_numpy(recorded["image"]) * weight
        order = [2, 0, 1]  # another order, and other random padding
        padding = np.full((1, 2), 7, np.float32)
        return {
            "y": y[None],
            "big": y,
            "labels": np.arange(10),
            "pairs": np.array([[2, 3], [0, 1]]),
            "a_keypoints": np.concatenate([self.arrays["a_keypoints"][0][order], padding]),
            "a_n_detected": 3,
            "a_descriptors16": self.arrays["a_descriptors16"][[*order, 3]],
            "unknown": y,
        }


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    made = Toy(tmp_path)
    monkeypatch.setitem(sys.modules, "parity.toy", made)
    monkeypatch.setitem(golden.FAMILIES, "toy", "toy")
    return made


def test_the_command_prints_a_table(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    rows = toy.write()
    assert command.main([str(toy.folder)]) == 0
    text = capsys.readouterr().out
    for name in toy.limits:
        assert f"\n{name} " in text
    assert "toy_one: 7 arrays judged, all within their limits" in text
    assert rows["image"].state == "input"
    assert rows["drawn"].state == "info"
    assert rows["a_descriptors16"].note == "3 common points"
    assert rows["y"].error == 0.0
    # Files of networks that are not here are named; damaged ones and broken networks fail.
    (toy.folder / "other_one.npz").write_bytes((toy.folder / "toy_one.npz").read_bytes())
    assert command.main([str(toy.folder), "--failures"]) == 0
    assert "not checked, no network of this name: other_one" in capsys.readouterr().out
    (toy.folder / "toy_two.npz").write_bytes(b"not a zip file")
    assert command.main([str(toy.folder), "toy_*"]) == 1
    text = capsys.readouterr().out
    assert "toy_two.npz cannot be read" in text
    assert "failed in toy_two" in text
    with pytest.raises(SystemExit):
        command.main([str(toy.folder), "loftr_*"])


def test_a_file_says_the_seed_it_was_recorded_with(toy: Toy) -> None:
    assert toy.write(seed="another")["y"].state == "FAIL"
    y = toy.x * filled.fill_array("toy", "weight", (1,), seed="another")
    rows = toy.write(seed="another", y=y, **{"big@sub": y.reshape(-1)[::5]})
    assert {row.state for row in rows.values()} == {"ok", "input", "info"}


def test_counts_are_those_that_a_file_says(tmp_path: Path) -> None:
    made_up = {"note": "fill.feature_pair(30, 20, 10, seed)", "seed": "another"}
    path = tmp_path / "lightglue_random.npz"
    np.savez(path, config=np.array(json.dumps(made_up)))
    expected = filled.feature_pair(30, 20, 10, "another")
    found = lightglue._made_up(golden.Golden(path))
    assert [x.tolist() for x in found] == [x.tolist() for x in expected]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("y", 1e-3), ("y", np.nan), ("y", np.inf), ("big@sub", 1e-3), ("labels", 2)),
        *(("pairs", 1), ("a_keypoints", 0.5), ("a_descriptors16", 0.01), ("a_n_detected", 1)),
    ],
)
def test_a_perturbed_golden_array_fails(toy: Toy, name: str, change: float) -> None:
    array = toy.arrays[name]
    rows = toy.write(**{name: (array + change).astype(array.dtype)})
    assert rows[name.partition("@")[0]].state == "FAIL"
    assert command.main([str(toy.folder), "--failures"]) == 1


def test_limits(toy: Toy) -> None:
    """A share of the values may be over; without an entry the limit follows the largest value."""
    y = toy.arrays["y"].copy()
    y[1, 2] += 1
    assert toy.write(y=y)["y"].state == "FAIL"
    toy.limits["y"] = {"atol": 1e-4, "over": 0.1}
    assert toy.write(y=y)["y"].state == "ok"
    del toy.limits["y"]
    limit = toy.write()["y"].limit
    assert limit == pytest.approx(1e-4 * np.abs(toy.arrays["y"]).max())
    assert toy.write(y=toy.arrays["y"] + limit * 1.1)["y"].state == "FAIL"


def test_what_cannot_be_compared_fails(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = toy.write(another=np.zeros(3, np.float32), y=toy.arrays["y"].T.copy())
    assert rows["another"].note == "not produced"
    assert rows["y"].note == "shape (1, 3, 4) instead of (4, 3)"
    assert toy.write(**{"big@meta": np.array([5, 3, 4, 1])})["big"].state == "FAIL"
    recorded = golden.Golden(toy.folder / "toy_one.npz")
    with pytest.raises(golden.GoldenError, match="whole of big"):
        recorded["big"]
    monkeypatch.setattr(toy, "produce", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in toy.write()["(all)"].note
    (toy.folder / "toy.keys.json").unlink()
    assert "toy.keys.json is missing" in toy.write(seed="third")["(all)"].note
